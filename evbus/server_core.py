"""A broker on a reactor: the server's connections, from accept to farewell.

`EventServer` runs it over sockets; the simulated network of the tests runs the same code over fake ones. One thread,
the reactor's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from evbus._frame import Ring
from evbus.broker import YIELD, Broker
from evbus.limits import Limits
from evbus.peer import Peer
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor, Timer
from evbus.transport import Transport
from evbus.wire import CloseReason, Dialect

__all__ = ["ServerCore"]

#: Seconds between looks at whether a drain is over.
_DRAIN_LOOK_S: Final = 0.02

_log = logging.getLogger("evbus.server")

#: What counts as little for `linger_s`: a message or two.
LINGER_BYTES = 2048

#: Reasons after which the peer can still read a GoAway, as its socket works and is not hopelessly full.
_TELL: Final = frozenset(
    {
        CloseReason.PACKET_TOO_LARGE,
        CloseReason.PROTOCOL_ERROR,
        CloseReason.STALE,
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

#: After a fault of the peer its unread input is read for this long at most, so that the close is not a reset that
#: destroys the words about it on their way.
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
                self.end(CloseReason.CONNECTION_LOST, f" ({error.strerror or error})")
                return
            except MemoryError:
                self.end(CloseReason.INTERNAL_ERROR, " (no memory to read into)")
                return
            if got == 0:
                self.end(CloseReason.CLIENT_CLOSED)
                return
            if got > 0:
                if core.linger_s:
                    # Little was read: somebody may wait for what comes of it, and go on at once. Much: the next is far.
                    core.reactor.linger(core.linger_s if got <= LINGER_BYTES else 0.0)
                peer.heard_at = core.set_time()
                self.receive()
        if mask & EVENT_WRITE and self.peer.link.is_blocked:
            core.on_writable(self.peer)

    def end(self, reason: CloseReason, detail: str = "") -> None:
        self.core.set_time()
        self.core.close(self.peer, reason, detail)
        # Others may have been told of it: those who wait for an answer that only it could give.
        self.core.after()

    def receive(self) -> None:
        core = self.core
        result: CloseReason | int | None
        try:
            result = core.broker.receive(self.peer)
        except Exception as exc:  # noqa: BLE001 - reported; a fault in the handling of one peer ends that one alone
            core.reactor.report(exc, self.receive)
            result = CloseReason.INTERNAL_ERROR
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
        linger_s: how long to go on looking for more after little was read, before the thread sleeps; 0: not at all.
        log: where state changes are reported.
    """

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        *,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        linger_s: float = 0.0,
        log: logging.Logger = _log,
    ) -> None:
        self.reactor = reactor
        self.wall_ms = wall_ms
        self.linger_s = linger_s
        self.broker = Broker(limits, now=reactor.now(), unix_ms=wall_ms(), log=log)
        self.on_room: Callable[[], object] = lambda: None
        self._flush_queued = False
        self._timer: Timer | None = None
        self._farewells: set[_Farewell] = set()
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
        self._arm_earlier()
        return connection.peer

    def after(self) -> None:
        """After anything that may have queued bytes: close whom the data plane gave up, flush the rest at the turn's
        end.
        """
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
        if router.queries.count:
            self._arm_earlier()

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
        """End a connection: tell it why if it can still read that, forget its subscriptions and queries, close its
        socket.
        """
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
        # Old C# clients spin on an orderly end of stream, and end properly on a reset. But a reset would drop what the
        # system has not sent yet, and a server that stops has promised to deliver it.
        old = link.dialect in (Dialect.H22, Dialect.H23_255)
        reset = reason in _RESET or (old and reason is not CloseReason.SERVER_SHUTDOWN)
        self.broker.closed(peer, reason, detail)
        peer.owner = None
        self.reactor.unregister(transport)
        if reset:
            transport.abort()
        elif tell or reason is CloseReason.SERVER_SHUTDOWN:
            self._farewells.add(_Farewell(self, transport))
        else:
            transport.close()
        self.on_room()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.reactor.call_at(self.broker.next_tick, self._tick)

    def _arm_earlier(self) -> None:
        if self._timer is None or self.broker.next_tick < self._timer.when:
            self._arm()

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
            self.when_gone(done)

        # The turn's end first, so that what was just queued is sent before anyone looks.
        self.reactor.call_soon(look)

    def leave(self, farewell: _Farewell) -> None:
        """A farewell is over."""
        self._farewells.discard(farewell)

    def when_gone(self, done: Callable[[], object]) -> None:
        """Call back when the last closed connection has taken its leave: at once, or within 0.2 s."""
        if self._farewells:
            self.reactor.call_later(_DRAIN_LOOK_S, lambda: self.when_gone(done))
        else:
            done()

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
    """The last moments of a connection that the server ends: our side is shut, and its input is read and thrown away
    until it ends too, or for 0.2 s. Closing with unread input would be a reset, which can destroy what is on its way
    to the peer.
    """

    __slots__ = ("core", "left", "ring", "timer", "transport")

    def __init__(self, core: ServerCore, transport: Transport) -> None:
        self.core = core
        self.transport = transport
        self.left = _LINGER_BYTES
        self.ring = Ring(core.broker.pool)
        transport.shutdown_write()
        self.timer = core.reactor.call_later(_LINGER_S, self.end)
        core.reactor.register(transport, EVENT_READ, self.on_ready)

    def on_ready(self, _mask: int) -> None:
        try:
            got = self.transport.fill(self.ring, _LINGER_BYTES)
        except (OSError, MemoryError):
            got = 0
        self.ring.clear()
        self.left -= max(got, 0)
        if got == 0 or self.left <= 0:
            self.timer.cancel()
            self.end()

    def end(self) -> None:
        self.core.leave(self)
        self.core.reactor.unregister(self.transport)
        self.transport.close()
        self.core.on_room()
