"""The public server: listens, owns the loop's thread or runs in the caller's, and stops in order."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Final

from evbus.acceptor import Acceptor
from evbus.errors import ConfigError
from evbus.limits import Limits
from evbus.reactor import Reactor
from evbus.server_core import ServerCore
from evbus.transport import TcpTransport, format_address, listen_tcp, listen_unix, remove_unix

if TYPE_CHECKING:
    import socket

if sys.platform != "win32":
    import resource

__all__ = ["DEFAULT_PORT", "EventServer"]

DEFAULT_PORT: Final = 9100

#: Descriptors left for the rest of the process: listeners, logs, the selector, what an embedding program opens.
SPARE_DESCRIPTORS: Final = 32

_log = logging.getLogger("evbus.server")

# An answer within this time costs nobody the waking of a thread: with one message in flight, half of the time that nats
# takes instead of as much. What reads much at a time, as the load of `bench throughput`, is not concerned.
_LINGER_S = 20e-6


class EventServer:
    """An event bus server.

    Use it as a context manager, or `start` and `stop` it, or let `serve_forever` run it in the calling thread::

        with EventServer(port=0) as server:
            print(server.address)

    Args:
        host: name or numeric address to listen on; loopback by default. None: no TCP, only `unix`.
        port: TCP port; 0 takes a free one (see `port` after `start`).
        unix: path of a Unix domain socket to listen on as well; only this user may connect to it (0600).
        limits: what peers are granted; `Limits()` by default.
        allow_anonymous_network: must be True to listen on an address that other machines can reach, as anyone there
            could then publish, subscribe and answer.
        drain: seconds that `serve_forever`, and leaving the `with` block, give to what is in flight.

    Raises:
        ConfigError: an option makes no sense.

    Threads: `start`, `stop`, `stats` and the properties may be called from any thread. The server itself is one thread.
    """

    def __init__(
        self,
        host: str | None = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        unix: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        allow_anonymous_network: bool = False,
        drain: float = 5.0,
    ) -> None:
        if unix is not None and (not isinstance(unix, (str, os.PathLike)) or not os.fspath(unix)):
            raise ConfigError("unix", f"must be the path of a socket, not {unix!r}")
        if host is None and unix is None:
            raise ConfigError("host", "may be None (no TCP) only if `unix` is given")
        if host is not None and not isinstance(host, str):
            raise ConfigError("host", f"must be text, not {type(host).__name__}")
        if type(port) is not int or not 0 <= port <= 65535:
            raise ConfigError("port", f"must be 0 to 65535 (0 takes a free one), not {port!r}")
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigError("limits", f"must be evbus.Limits, not {type(limits).__name__}")
        if type(drain) not in (int, float) or not 0 <= drain < float("inf"):
            raise ConfigError("drain", f"must be a number of seconds from 0 up, not {drain!r}")
        self._host = host
        self._port = port
        self._unix = os.fspath(unix) if unix is not None else None
        self._unix_inode = 0
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
        """Listen and run the loop in the calling thread until `stop` is called from another thread or a signal
        handler, or Ctrl-C is pressed; both stop in order. Raises as `start`.
        """
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
        """Where it listens, "host:port" or the path of its socket; of several the first. The one asked for while it
        does not run.
        """
        if self._addresses:
            return self._addresses[0]
        return format_address((self._host, self._port)) if self._host is not None else str(self._unix)

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
        if self._host is None or not self._addresses:
            return self._port
        return int(self._addresses[0].rpartition(":")[2])

    def _open(self) -> None:
        if not self._stopped.is_set():
            raise ConfigError("start", "the server runs already; stop() it first")
        listeners = listen_tcp(self._host, self._port) if self._host is not None else []
        try:
            self._refuse_public(listeners)
            if self._unix is not None:
                listeners.append(listen_unix(self._unix))
                self._unix_inode = os.lstat(self._unix).st_ino
            reactor = Reactor()
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self._addresses = [format_address(listener.getsockname()) for listener in listeners]
        self._reactor = reactor
        self._core = ServerCore(reactor, _within_descriptors(self._limits), linger_s=_LINGER_S)
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
                    f"127.0.0.1, or say allow_anonymous_network=True (--allow-anonymous-network) if you trust it",
                )

    def _on_accept(self, sock: socket.socket, peer: str) -> None:
        assert self._core is not None
        self._core.add(TcpTransport(sock, peer))

    def _run(self) -> None:
        """The loop, and what must follow it however it ends. KeyboardInterrupt is for `serve_forever`."""
        assert self._reactor is not None
        try:
            self._reactor.run()
        except KeyboardInterrupt:
            raise
        except BaseException:
            _log.exception("the event loop failed")
            self._close()
            raise
        self._close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped, however that came about. Returns whether it has."""
        return self._stopped.wait(timeout)

    def _begin_stop(self, seconds: float) -> None:
        core, acceptor, reactor = self._core, self._acceptor, self._reactor
        if core is None or acceptor is None or reactor is None:
            return
        if core.broker.is_draining:
            core.close_all()
            core.when_gone(reactor.stop)
            return
        acceptor.close()
        if self._unix is not None:
            remove_unix(self._unix, self._unix_inode)
        _log.info("stopping: %d connections, up to %.1f s for what is in flight", len(core.broker.peers), seconds)
        core.drain(seconds, reactor.stop)

    def _finish_after_interrupt(self) -> None:
        """Ctrl-C in `serve_forever`: the loop was left in the middle of a turn; drain, and a second Ctrl-C ends at
        once.
        """
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
        if self._unix is not None:
            remove_unix(self._unix, self._unix_inode)
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
    if sys.platform == "win32":
        return limits
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    room = max(soft - SPARE_DESCRIPTORS, 1)
    if limits.connections <= room:
        return limits
    _log.info("at most %d connections, as this process may open %d descriptors (ulimit -n)", room, soft)
    return replace(limits, connections=room)
