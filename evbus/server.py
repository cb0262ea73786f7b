"""The server: listeners, connections and the event loop around a broker.

`ServerCore` joins a broker, a reactor and transports; the simulated network of the tests runs it over fake ones.
`EventServer` is the public face: it listens, owns the loop's thread (or runs in the caller's), and stops in order.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Final

from evbus._frame import Ring
from evbus.acceptor import Acceptor
from evbus.broker import YIELD, Broker, Peer
from evbus.errors import ConfigError
from evbus.limits import Limits
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor, Timer
from evbus.transport import TcpTransport, Transport, format_address, listen_tcp
from evbus.wire import CloseReason, Dialect

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import socket

__all__ = ["DEFAULT_PORT", "EventServer", "ServerCore"]

DEFAULT_PORT: Final = 9100

#: Descriptors that are left for the rest of the process: listeners, logs, the selector, what an embedding program opens.
SPARE_DESCRIPTORS: Final = 32

#: Seconds between looks at whether a drain is over.
_DRAIN_LOOK_S: Final = 0.02

_log = logging.getLogger("evbus.server")

#: Reasons after which the peer can still read a GoAway, as its socket works and is not hopelessly full.
_TELL: Final = frozenset(
    {
        CloseReason.PACKET_TOO_LARGE,
        CloseReason.PROTOCOL_ERROR,
        CloseReason.STALE,
        CloseReason.SERVER_SHUTDOWN,
        CloseReason.INTERNAL_ERROR,
    }
)

#: Reasons for which the connection is reset: an orderly close would wait for a peer that does not read.
_RESET: Final = frozenset(
    {
        CloseReason.SLOW_CONSUMER,
        CloseReason.SLOW_CONSUMER_SOFT,
        CloseReason.WRITE_TIMEOUT,
        CloseReason.CONNECTION_LOST,
    }
)

#: After a fault of the peer its unread input is read for this long at most, so that the close is not a reset that destroys
#: the words about it on their way.
_LINGER_S: Final = 0.2
_LINGER_BYTES: Final = 64 * 1024


class _Connection:
    """One connection of the server: its transport, its peer, and what to do when the transport is ready."""

    __slots__ = ("core", "peer", "transport", "yielded")

    def __init__(self, core: ServerCore, transport: Transport, now: float) -> None:
        self.core = core
        self.transport = transport
        self.yielded = False
        self.peer = core.broker.opened(transport.peer, transport.flush, now)
        self.peer.owner = self

    def on_ready(self, mask: int) -> None:
        core = self.core
        if mask & EVENT_READ and not self.yielded:
            peer = self.peer
            try:
                got = self.transport.fill(peer.link.inp, peer.link.packet_limit)
            except OSError as error:
                core.close(peer, CloseReason.CONNECTION_LOST, f" ({error.strerror or error})")
                return
            if got == 0:
                core.close(peer, CloseReason.CLIENT_CLOSED)
                return
            if got > 0:
                peer.heard_at = core.set_time()
                self.receive()
        if mask & EVENT_WRITE and self.peer.link.is_blocked:
            core.on_writable(self.peer)

    def receive(self) -> None:
        core = self.core
        result = core.broker.receive(self.peer)
        if result is not None:
            if result == YIELD:
                self.yielded = True
                core.reactor.call_soon(self.resume)
            else:
                core.close(self.peer, CloseReason(result))
        core.after()

    def resume(self) -> None:
        """The rest of what was read, in the next turn: other connections had theirs in between."""
        self.yielded = False
        if self.peer.link.id in self.core.broker.peers:
            self.core.set_time()
            self.receive()


class ServerCore:
    """A broker on a reactor. One thread, the reactor's.

    Args:
        reactor: the loop.
        limits: what peers are granted.
        wall_ms: the wall clock in Unix milliseconds, for packet headers.
        log: where state changes are reported.
    """

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        *,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        log: logging.Logger = _log,
    ) -> None:
        self.reactor = reactor
        self.wall_ms = wall_ms
        self.broker = Broker(limits, now=reactor.now(), unix_ms=wall_ms(), log=log)
        self.on_room: Callable[[], object] = lambda: None
        self._flush_queued = False
        self._timer: Timer | None = None
        self._arm()

    def set_time(self) -> float:
        """Give the broker the time of this turn; returns the clock's seconds."""
        now = self.reactor.now()
        self.broker.set_time(now, self.wall_ms())
        return now

    def add(self, transport: Transport) -> Peer | None:
        """Serve a connected transport; None if it was refused (and closed)."""
        reason = self.broker.refusal()
        if reason is not None:
            self.broker.refused(reason, transport.peer)
            transport.abort()
            return None
        connection = _Connection(self, transport, self.set_time())
        self.reactor.register(transport, EVENT_READ, connection.on_ready)
        self._arm()
        return connection.peer

    def after(self) -> None:
        """After anything that may have queued bytes: close whom the data plane gave up, flush the rest at the turn's end."""
        router = self.broker.router
        for link in router.take_blocked():
            self._on_blocked(link.owner)
        for link, error in router.take_lost():
            self.close(link.owner, CloseReason.CONNECTION_LOST, f" ({error.strerror or error})")
        for link, reason in router.take_victims():
            self.close(link.owner, CloseReason(reason))
        if router.is_dirty and not self._flush_queued:
            self._flush_queued = True
            self.reactor.at_turn_end(self._flush_dirty)
        deadline = router.queries.next_deadline
        if deadline is not None and self._timer is not None and deadline < self._timer.when:
            self._arm()

    def _flush_dirty(self) -> None:
        self._flush_queued = False
        self.broker.router.flush_dirty()
        self.after()

    def _on_blocked(self, peer: Peer) -> None:
        connection = peer.owner
        if isinstance(connection, _Connection) and peer.link.id in self.broker.peers:
            self.broker.waiting(peer)
            self.reactor.modify(connection.transport, EVENT_READ | EVENT_WRITE)

    def on_writable(self, peer: Peer) -> None:
        """A blocked connection takes bytes again."""
        connection = peer.owner
        if not isinstance(connection, _Connection) or peer.link.id not in self.broker.peers:
            return
        self.set_time()
        before = peer.link.pending_bytes
        left = self.broker.router.flush(peer.link)
        if left < before:
            self.broker.progressed(peer, left)
        if not left and not peer.link.is_blocked:
            self.reactor.modify(connection.transport, EVENT_READ)
        self.after()

    def close(self, peer: Peer, reason: CloseReason, detail: str = "") -> None:
        """End a connection: tell it why if it can still read that, forget its subscriptions and queries, close its socket."""
        connection = peer.owner
        if not isinstance(connection, _Connection) or peer.link.id not in self.broker.peers:
            return
        link = peer.link
        transport = connection.transport
        tell = reason in _TELL and not link.is_blocked
        if tell:
            self.broker.go_away(peer, reason)
        if reason not in _RESET and link.pending_bytes and not link.is_blocked:
            try:
                self.broker.router.flush(link)
            except OSError:
                tell = False
        # Old C# clients spin on an orderly end of stream, and end properly on a reset (protocol.md, "Closing").
        reset = reason in _RESET or (link.dialect in (Dialect.H22, Dialect.H23_255))
        self.broker.closed(peer, reason, detail)
        peer.owner = None
        self.reactor.unregister(transport)
        if reset:
            transport.abort()
        elif tell and reason is not CloseReason.SERVER_SHUTDOWN:
            _Farewell(self, transport)
        else:
            transport.close()
        self.on_room()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.reactor.call_at(self.broker.next_tick, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.set_time()
        for peer, reason in self.broker.tick():
            self.close(peer, reason)
        self._arm()
        self.after()

    def drain(self, seconds: float, done: Callable[[], object]) -> None:
        """Stop in order: peers are told, what is queued or pending goes on for up to `seconds`, then all are closed.

        `done` is called when the last connection is closed. Ends as soon as nothing is in flight.
        """
        self.set_time()
        self.broker.drain()
        self.after()
        deadline = self.reactor.now() + seconds

        def look() -> None:
            if not self.broker.is_idle and self.reactor.now() < deadline:
                self.reactor.call_later(_DRAIN_LOOK_S, look)
                return
            self.close_all()
            done()

        # The turn's end first, so that what was just queued is sent before anyone looks.
        self.reactor.call_soon(look)

    def close_all(self) -> None:
        """Close every connection now."""
        self.set_time()
        for peer in list(self.broker.peers.values()):
            # Whoever still has bytes waiting would keep an orderly close open for nothing.
            self.close(peer, CloseReason.SERVER_SHUTDOWN)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Farewell:
    """The last moments of a connection that was told why it ends: our side is shut, and its input is read and thrown away for
    a moment. Closing with unread input would be a reset, which can destroy the words on their way."""

    __slots__ = ("core", "left", "ring", "timer", "transport")

    def __init__(self, core: ServerCore, transport: Transport) -> None:
        self.core = core
        self.transport = transport
        self.left = _LINGER_BYTES
        self.ring = Ring(core.broker.pool)
        transport.shutdown_write()
        self.timer = core.reactor.call_later(_LINGER_S, self.end)
        core.reactor.register(transport, EVENT_READ, self.on_ready)

    def on_ready(self, mask: int) -> None:
        try:
            got = self.transport.fill(self.ring, _LINGER_BYTES)
        except OSError:
            got = 0
        self.ring.clear()
        self.left -= max(got, 0)
        if got == 0 or self.left <= 0:
            self.timer.cancel()
            self.end()

    def end(self) -> None:
        self.core.reactor.unregister(self.transport)
        self.transport.close()
        self.core.on_room()


class EventServer:
    """An event bus server.

    Use it as a context manager, or `start` and `stop` it, or let `serve_forever` run it in the calling thread::

        with EventServer(port=0) as server:
            print(server.address)

    Args:
        host: name or numeric address to listen on; loopback by default.
        port: TCP port; 0 takes a free one (see `port` after `start`).
        limits: what peers are granted; `Limits()` by default.
        allow_anonymous_network: must be True to listen on an address that other machines can reach, as anyone there could
            then publish, subscribe and answer.
        drain: seconds that `serve_forever`, and leaving the `with` block, give to what is in flight.

    Raises:
        ConfigError: an option makes no sense.

    Threads: `start`, `stop`, `stats` and the properties may be called from any thread. The server itself is one thread.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        limits: Limits | None = None,
        allow_anonymous_network: bool = False,
        drain: float = 5.0,
    ) -> None:
        if not isinstance(host, str):
            raise ConfigError("host", f"must be text, not {type(host).__name__}")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ConfigError("port", f"must be 0 to 65535 (0 takes a free one), not {port!r}")
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigError("limits", f"must be evbus.Limits, not {type(limits).__name__}")
        if isinstance(drain, bool) or not isinstance(drain, (int, float)) or not 0 <= drain < float("inf"):
            raise ConfigError("drain", f"must be a number of seconds from 0 up, not {drain!r}")
        self._host = host
        self._port = port
        self._limits = limits if limits is not None else Limits()
        self._allow_anonymous_network = allow_anonymous_network
        self._drain = float(drain)
        self._lock = threading.Lock()
        self._reactor: Reactor | None = None
        self._core: ServerCore | None = None
        self._acceptor: Acceptor | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._stopped.set()
        self._addresses: list[str] = []
        self._last_stats: dict[str, object] = {}

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> EventServer:
        """Listen, and run the loop in a thread of its own; returns when the server accepts connections.

        Raises:
            ServerStartError: the port is in use, the host unknown or not this machine's.
            ConfigError: the address is public and `allow_anonymous_network` was not given; or the server runs already.
        """
        with self._lock:
            self._open()
            self._thread = threading.Thread(target=self._run, name=f"evbus-server-{self._port_now()}", daemon=True)
            self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Listen and run the loop in the calling thread until `stop` is called from another thread or a signal handler, or
        Ctrl-C is pressed; both stop in order. Raises as `start`."""
        with self._lock:
            self._open()
        try:
            self._run()
        except KeyboardInterrupt:
            self._finish_after_interrupt()

    def stop(self, drain: float | None = None, *, wait: bool = True) -> None:
        """Stop in order: accept no more, tell the clients, deliver what is queued, then close.

        Args:
            drain: seconds for what is in flight; it ends sooner if nothing is. None takes the server's own figure.
            wait: return when the server has stopped; False returns at once (for signal handlers).

        Idempotent: a server that does not run stays as it is; a second call while it drains ends the drain at once.
        """
        reactor = self._reactor
        if reactor is None:
            return
        seconds = self._drain if drain is None else float(drain)
        reactor.call_threadsafe(lambda: self._begin_stop(seconds))
        if wait and threading.current_thread() is not self._thread:
            self._stopped.wait()
            thread = self._thread
            if thread is not None:
                thread.join()

    def __enter__(self) -> EventServer:
        return self if self.is_running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- facts -----------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether it listens, or drains."""
        return not self._stopped.is_set()

    @property
    def address(self) -> str:
        """Where it listens, "host:port"; of several addresses the first. The one asked for while it does not run."""
        return self._addresses[0] if self._addresses else format_address((self._host, self._port))

    @property
    def addresses(self) -> list[str]:
        """All addresses it listens on."""
        return list(self._addresses) or [self.address]

    @property
    def port(self) -> int:
        """The TCP port it listens on; the one asked for while it does not run."""
        return self._port_now()

    @property
    def limits(self) -> Limits:
        """What it grants its peers."""
        return self._limits

    def stats(self) -> dict[str, object]:
        """Counters since the start and what is there now; of the last run once it has stopped."""
        core = self._core
        return core.broker.stats() if core is not None else dict(self._last_stats)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _port_now(self) -> int:
        return int(self._addresses[0].rpartition(":")[2]) if self._addresses else self._port

    def _open(self) -> None:
        if not self._stopped.is_set():
            raise ConfigError("start", "the server runs already; stop() it first")
        listeners = listen_tcp(self._host, self._port)
        try:
            self._refuse_public(listeners)
            reactor = Reactor()
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self._addresses = [format_address(listener.getsockname()) for listener in listeners]
        self._reactor = reactor
        self._core = ServerCore(reactor, _within_descriptors(self._limits))
        self._acceptor = Acceptor(reactor, listeners, self._on_accept)
        self._core.on_room = self._acceptor.resume
        self._stopped.clear()
        _log.info("listening on %s", ", ".join(self._addresses))

    def _refuse_public(self, listeners: Iterable[socket.socket]) -> None:
        if self._allow_anonymous_network:
            return
        for listener in listeners:
            host = listener.getsockname()[0]
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                raise ConfigError(
                    "host",
                    f"{host} can be reached from other machines, and this server asks nobody who they are: listen on "
                    f"127.0.0.1, or say allow_anonymous_network=True (--allow-anonymous-network) if the network is trusted",
                )

    def _on_accept(self, sock: socket.socket, peer: str) -> None:
        assert self._core is not None
        self._core.add(TcpTransport(sock, peer))

    def _run(self) -> None:
        assert self._reactor is not None
        self._reactor.run()
        self._close()

    def _begin_stop(self, seconds: float) -> None:
        core, acceptor, reactor = self._core, self._acceptor, self._reactor
        if core is None or acceptor is None or reactor is None:
            return
        if core.broker.is_draining:
            core.close_all()
            reactor.stop()
            return
        acceptor.close()
        _log.info("stopping: %d connections, up to %.1f s for what is in flight", len(core.broker.peers), seconds)
        core.drain(seconds, reactor.stop)

    def _finish_after_interrupt(self) -> None:
        """Ctrl-C in `serve_forever`: the loop was left in the middle of a turn; drain, and a second Ctrl-C ends at once."""
        reactor = self._reactor
        assert reactor is not None
        try:
            self._begin_stop(self._drain)
            reactor.run()
        except KeyboardInterrupt:
            if self._core is not None:
                self._core.close_all()
        self._close()

    def _close(self) -> None:
        core, acceptor, reactor = self._core, self._acceptor, self._reactor
        assert core is not None
        assert acceptor is not None
        assert reactor is not None
        acceptor.close()
        core.close_all()
        lost = core.broker.undelivered_bytes
        stats = core.broker.stats()
        self._last_stats = stats
        reactor.close()
        self._core = None
        self._acceptor = None
        self._reactor = None
        self._addresses = []
        _log.info(
            "stopped: %d connections served, %d messages delivered, %d dropped, %d bytes undelivered",
            stats["connections_accepted"],
            stats["delivered"],
            stats["dropped_slow"],
            lost,
        )
        self._stopped.set()


def _within_descriptors(limits: Limits) -> Limits:
    """The limits, with no more connections than this process has descriptors for."""
    if resource is None:
        return limits
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    room = max(soft - SPARE_DESCRIPTORS, 1)
    if limits.connections <= room:
        return limits
    _log.info("at most %d connections, as this process may open %d descriptors (ulimit -n)", room, soft)
    return replace(limits, connections=room)
