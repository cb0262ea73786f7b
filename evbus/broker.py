"""The server's control plane: handshakes, subscriptions, heartbeats, deadlines, limits and statistics. No I/O.

Theory of operation. The broker owns the data plane (`_router.Router`) and one `Peer` per connection. Its owner
(`server.py`, or the simulated network of the tests) moves the bytes: it fills a peer's input ring and calls
`receive(peer)`, which lets the data plane run and handles in between whatever the data plane hands up, so that one
connection's packets are handled strictly in order. The owner then closes whom `receive` or `take_closing` says, with
the reason given, and calls `closed(peer)`.

Time comes in as arguments: `now` is the reactor's clock in seconds, `unix_ms` the wall clock for packet headers.
`tick` checks everything that depends on time, and says by `next_tick` when it wants to be called again.

Threads: one, the owner's. `stats` may be called from any thread.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Final

from evbus import _frame, wire
from evbus._frame import RingPool
from evbus._router import FEED_CONTROL, FEED_YIELD, LINK_CLOSING, LINK_NEW, LINK_READY, Link, Router
from evbus.announcement import read_client_announcement, server_announcement
from evbus.limits import Limits
from evbus.peer import Peer
from evbus.ratelog import RateLimitedLog
from evbus.reasons import NOTEWORTHY, WORDS
from evbus.wire import CloseReason, Dialect, ErrorCode, ObjectId, Overflow, Role, Status

__all__ = ["CONTROL_PACKETS_PER_TURN", "YIELD", "Broker", "Peer"]

#: `Broker.receive` returns this when a peer has used up its share of the turn and must be called again in the next.
YIELD: Final = -1

#: Control packets (subscribe, heartbeat, ...) of one peer per turn of the loop. They cost Python time, some 5 us each,
#: so a flood of them must not hold up the other peers (nats-server bounds work per connection for the same reason).
CONTROL_PACKETS_PER_TURN: Final = 256

#: A control packet as the data plane hands it up: object id, version, SystemId, UnixTimeMilliseconds, body.
_Packet = tuple[int, int, int, int, bytes]

#: Seconds between checks of silence and slowness: how late a dead peer may be noticed.
TICK_S: Final = 0.25

#: Checks of silence that come so many seconds late say only that we were held up ourselves: what came meanwhile may
#: not have been read yet.
_HELD_UP_S: Final = 0.5

#: A peer that announced evbus is dropped after this many of its own heartbeat intervals without a byte.
MISSED_HEARTBEATS: Final = 2


class Broker:
    """The control plane of one server.

    Args:
        limits: what peers are granted.
        now: the reactor's clock, seconds.
        unix_ms: the wall clock, Unix milliseconds.
        log: where state changes and refused peers are reported.
    """

    def __init__(self, limits: Limits, *, now: float, unix_ms: int, log: logging.Logger) -> None:
        self.limits = limits
        self.pool = RingPool()
        self.router = Router(
            self.pool,
            payload_bytes=limits.payload_bytes,
            pending_bytes=limits.pending_hard_bytes,
            queries=min(limits.queries_per_connection, 0xFFFFFFFF),
            query_max_s=limits.query_s,
            query_default_s=limits.query_default_s,
            cache_subjects=limits.match_cache,
            soft_bytes=limits.pending_soft_bytes,
            ticks=wire.dotnet_ticks(unix_ms),
        )
        self.peers: dict[int, Peer] = {}
        self.is_draining = False
        #: Connections closed, by reason.
        self.closed_by_reason: Counter[CloseReason] = Counter()
        #: Messages that were queued for connections when they were closed, in bytes.
        self.undelivered_bytes = 0
        self.accepted = 0
        self._next_id = 0
        self._now = now
        self._unix_ms = unix_ms
        self._log = RateLimitedLog(log)
        #: Peers without a handshake, oldest first, with their deadlines: all have the same patience.
        self._greeting: deque[tuple[float, Peer]] = deque()
        self._handshakes_open = 0
        #: Peers that the kernel takes nothing from at the moment.
        self._waiting: set[Peer] = set()
        self._next_sweep = now + TICK_S
        self._handlers: dict[int, Callable[[Peer, _Packet], CloseReason | None]] = {
            ObjectId.HANDSHAKE: self._on_handshake,
            ObjectId.SUBSCRIBE: self._on_subscribe,
            ObjectId.UNSUBSCRIBE: self._on_unsubscribe,
            ObjectId.HEARTBEAT: self._on_heartbeat,
            ObjectId.HEARTBEAT_OLD: self._on_heartbeat_old,
            ObjectId.ERROR: self._on_error,
            ObjectId.CANCEL_QUERY: self._on_cancel_query,
            ObjectId.CREDIT: self._on_credit,
        }
        self.router.set_time(now, unix_ms)

    # ---- connections -----------------------------------------------------------------------------------------------

    def refusal(self) -> CloseReason | None:
        """Why a further connection cannot be taken now, or None if it can."""
        if self.is_draining:
            return CloseReason.SERVER_SHUTDOWN
        if len(self.peers) >= self.limits.connections:
            return CloseReason.TOO_MANY_CONNECTIONS
        if self._handshakes_open >= self.limits.handshakes:
            return CloseReason.TOO_MANY_HANDSHAKES
        return None

    def refused(self, reason: CloseReason, address: str) -> None:
        """Count a connection that was closed at once."""
        self.closed_by_reason[reason] += 1
        self._log.warning(reason.name, self._now, "refused a connection from %s: %s", address, WORDS[reason])

    def opened(self, address: str, flush: Callable[[_frame.Ring], int], now: float) -> Peer:
        """A new connection. The owner fills `peer.link.inp` and calls `receive`.

        Args:
            address: the peer's, for logs.
            flush: sends what a ring holds, once; returns the bytes left, raises OSError.
            now: the reactor's clock.
        """
        self._next_id += 1
        self.accepted += 1
        peer = Peer(address, now)
        peer.link = Link(self.router, self._next_id, flush, peer)
        peer.link.packet_limit = self.limits.handshake_bytes
        self.peers[self._next_id] = peer
        self._greeting.append((now + self.limits.handshake_s, peer))
        self._handshakes_open += 1
        return peer

    def closed(self, peer: Peer, reason: CloseReason, detail: str = "") -> None:
        """The owner has closed (or is about to close) a connection. Idempotent.

        Ends its subscriptions and queries; whoever waits for an answer that only it could give is told.
        """
        link = peer.link
        if self.peers.pop(link.id, None) is None:
            return
        if link.state == LINK_NEW:
            self._handshakes_open -= 1
        self.closed_by_reason[reason] += 1
        waiting = link.pending_bytes + link.held_bytes
        self.undelivered_bytes += waiting
        link.state = LINK_CLOSING  # nothing more is queued for it
        self._waiting.discard(peer)
        if peer.subscriptions:
            for interest in peer.subscriptions.values():
                self.router.unsubscribe(interest)
        peer.subscriptions = None
        if reason in NOTEWORTHY:
            self._log.warning(
                reason.name,
                self._now,
                "closed connection %d (%s): %s%s",
                link.id,
                peer.label,
                WORDS[reason],
                f"; {waiting:,} bytes were waiting for it" if waiting else "",
            )
        else:
            self._log.debug("connection %d (%s) ended: %s%s", link.id, peer.label, WORDS[reason], detail)
        self.router.detach(link)

    # ---- packets ---------------------------------------------------------------------------------------------------

    def set_time(self, now: float, unix_ms: int) -> None:
        """The time from here on; once per turn, or before whatever depends on it."""
        self._now = now
        self._unix_ms = unix_ms
        self.router.set_time(now, unix_ms)

    def receive(self, peer: Peer) -> CloseReason | int | None:
        """Handle what stands in a peer's input ring.

        Returns:
            None: all complete packets are handled. `YIELD`: call again in the next turn, and read nothing from this
            peer until then. A CloseReason: close the connection.
        """
        router = self.router
        link = peer.link
        for _ in range(CONTROL_PACKETS_PER_TURN):
            event = router.feed(link)
            if event == FEED_CONTROL:
                packet = router.take_packet()
                reason = self._handlers[packet[0]](peer, packet)
                if reason is not None:
                    return reason
            elif event == FEED_YIELD:
                return YIELD
            elif event < 0:
                return CloseReason(-event)
            else:
                return None
        return YIELD

    def _on_handshake(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        _, _, system_id, _, body = packet
        link = peer.link
        header = link.header_bytes
        if header == wire.HEADER_BYTES_22 and len(body) == 4 and link.state == LINK_NEW:
            # The int dialects of 2024-07: an i32 TaskId and nothing else.
            return CloseReason.UNSUPPORTED_DIALECT
        strings = _frame.unpack_strings(body, 1 if header == wire.HEADER_BYTES_22 else 4)
        if strings is None or any(len(s) > limit for s, limit in zip(strings, _HANDSHAKE_LIMITS, strict=False)):
            self.router.refuse(link, self._readable_task_id(body), ErrorCode.MALFORMED)
            return None
        if link.state == LINK_READY:
            self._respond(peer, strings[0], Status.SUCCESS, peer.handshake_text)
            return None
        announcement = None
        if header == wire.HEADER_BYTES_22:
            dialect = Dialect.H22
        elif len(strings) == 1 and system_id != 0:
            dialect = Dialect.H23_255
        else:
            dialect = Dialect.H23_199
            if len(strings) >= 4:
                announcement = read_client_announcement(strings[3])
        peer.silence_s = self.limits.silence_s
        if announcement is not None:
            low, high = announcement.versions
            if low > wire.PROTOCOL_VERSION_MAX or high < wire.PROTOCOL_VERSION_MIN:
                self._respond(
                    peer,
                    strings[0],
                    Status.FAIL,
                    f"this server speaks protocol versions {wire.PROTOCOL_VERSION_MIN} to {wire.PROTOCOL_VERSION_MAX}, "
                    f"the client {low} to {high}",
                )
                return CloseReason.UNSUPPORTED_DIALECT
            dialect = Dialect.EVBUS_2
            peer.name = announcement.label
            peer.silence_s = announcement.heartbeat_s * MISSED_HEARTBEATS
            peer.handshake_text = server_announcement(self.limits, link.id, announcement.heartbeat_s)
        peer.is_ambiguous = header == wire.HEADER_BYTES_23 and len(strings) == 1
        link.dialect = dialect
        link.packet_limit = self.limits.packet_bytes
        link.state = LINK_READY
        self._handshakes_open -= 1
        self._respond(peer, strings[0], Status.SUCCESS, peer.handshake_text)
        self._log.debug("connection %d (%s) speaks %s", link.id, peer.label, dialect.name)
        if self.is_draining:
            self._say_go_away(peer, CloseReason.SERVER_SHUTDOWN)
        return None

    def _on_subscribe(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        _, version, _, _, body = packet
        if version == 2:
            fields = _frame.unpack(body, "bbiBBb")
        else:
            fields = _frame.unpack(body, "bb")
            if fields is not None:
                fields += (0, int(Role.SUBSCRIBER), int(Overflow.CLOSE), b"")
        if (
            fields is None
            or len(fields[0]) > wire.MAX_TASK_ID_BYTES
            or (version == 2 and fields[2] <= 0)
            or len(fields[5]) > wire.MAX_GROUP_BYTES
        ):
            self.router.refuse(peer.link, self._readable_task_id(body), ErrorCode.MALFORMED)
            return None
        task_id, subject, sid, role, overflow, group = fields
        if not _frame.subject_is_valid(subject, True):
            self.router.refuse(peer.link, task_id, ErrorCode.INVALID_SUBJECT, subject)
            return None
        if role > Role.RESPONDER or overflow > (Overflow.CLOSE if role == Role.RESPONDER else Overflow.BLOCK):
            self.router.refuse(peer.link, task_id, ErrorCode.UNSUPPORTED, subject)
            return None
        key = sid or subject
        known = peer.subscriptions.get(key) if peer.subscriptions else None
        if known is not None:
            if known.subject != subject or (known.role, known.overflow, known.group) != (role, overflow, group):
                self.router.refuse(peer.link, task_id, ErrorCode.DUPLICATE_ID, subject)
            else:
                self.router.acknowledge(peer.link, task_id)
            return None
        if (
            peer.link.subscriptions >= self.limits.subscriptions_per_connection
            or self.router.table.subscriptions >= self.limits.subscriptions
        ):
            self.router.refuse(peer.link, task_id, ErrorCode.TOO_MANY_SUBSCRIPTIONS, subject)
            return None
        if peer.subscriptions is None:
            peer.subscriptions = {}
        peer.subscriptions[key] = self.router.subscribe(peer.link, subject, sid, role, group, overflow)
        self.router.acknowledge(peer.link, task_id)
        return None

    def _on_unsubscribe(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        _, version, _, _, body = packet
        fields = _frame.unpack(body, "bi" if version == 2 else "bb")
        if fields is None or len(fields[0]) > wire.MAX_TASK_ID_BYTES:
            self.router.refuse(peer.link, self._readable_task_id(body), ErrorCode.MALFORMED)
            return None
        task_id, key = fields
        interest = peer.subscriptions.pop(key, None) if peer.subscriptions else None
        if interest is not None:
            self.router.unsubscribe(interest)
        elif version == 2:
            self.router.refuse(peer.link, task_id, ErrorCode.UNKNOWN_SUBSCRIPTION)
            return None
        self.router.acknowledge(peer.link, task_id)
        return None

    def _on_heartbeat(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        body = packet[4]
        link = peer.link
        if len(body) < 4:
            self.router.refuse(link, b"", ErrorCode.MALFORMED)
            return None
        self._second_witness(peer, Dialect.H23_199)
        self.router.send(link, self._packet(peer, ObjectId.HEARTBEAT, body[:4]))
        return None

    def _on_heartbeat_old(self, peer: Peer, _packet: _Packet) -> CloseReason | None:
        self._second_witness(peer, Dialect.H23_255)
        self.router.send(peer.link, self._packet(peer, ObjectId.HEARTBEAT_OLD, b""))
        return None

    def _second_witness(self, peer: Peer, dialect: Dialect) -> None:
        """A heartbeat tells the dialect too: the opening packets of two of them differ in nothing but the SystemId."""
        if peer.is_ambiguous and peer.link.dialect != dialect:
            peer.link.dialect = dialect

    def _on_error(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        fields = _frame.unpack(packet[4], "bibb")
        if fields is None or len(fields[0]) > wire.MAX_TASK_ID_BYTES:
            self.router.refuse(peer.link, self._readable_task_id(packet[4]), ErrorCode.MALFORMED)
            return None
        task_id, code, _, text = fields
        # One that fits no query is counted by the router and no more: it may just have come too late.
        self.router.fail_query(peer.link, task_id, code, text[:1024].decode("utf-8", "replace").encode())
        return None

    def _on_cancel_query(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        fields = _frame.unpack(packet[4], "b")
        if fields is None or len(fields[0]) > wire.MAX_TASK_ID_BYTES:
            self.router.refuse(peer.link, b"", ErrorCode.MALFORMED)
        else:
            # Not pending any more is no error: its answer may just be on the way.
            self.router.cancel_query(peer.link, fields[0])
        return None

    def _on_credit(self, peer: Peer, packet: _Packet) -> CloseReason | None:
        fields = _frame.unpack(packet[4], "ii")
        if fields is None or fields[0] <= 0 or fields[1] <= 0:
            self.router.refuse(peer.link, b"", ErrorCode.MALFORMED)
            return None
        # Of a subscription that has just ended, or was refused, there is nothing to say.
        interest = peer.subscriptions.get(fields[0]) if peer.subscriptions else None
        if interest is not None:
            self.router.grant(interest, fields[1])
        return None

    # ---- time ------------------------------------------------------------------------------------------------------

    def waiting(self, peer: Peer) -> None:
        """The kernel took no more of what is queued for this peer: watch it."""
        if peer not in self._waiting:
            peer.progress_at = self._now
            self._waiting.add(peer)

    def progressed(self, peer: Peer, left: int) -> None:
        """The kernel took some of it; `left` bytes still wait."""
        peer.progress_at = self._now
        if left <= self.limits.pending_soft_bytes:
            peer.soft_since = None
        if left == 0:
            self._waiting.discard(peer)

    @property
    def next_tick(self) -> float:
        """Clock time at which `tick` wants to be called at the latest."""
        when = self._next_sweep
        if self._greeting and self._greeting[0][0] < when:
            when = self._greeting[0][0]
        deadline = self.router.queries.next_deadline
        if deadline is not None and deadline < when:
            when = deadline
        return when

    def tick(self) -> list[tuple[Peer, CloseReason]]:
        """Check what depends on time (set by `set_time`); returns whom to close, and why."""
        now = self._now
        out: list[tuple[Peer, CloseReason]] = []
        greeting = self._greeting
        while greeting and (greeting[0][0] <= now or greeting[0][1].link.state != LINK_NEW):
            _, peer = greeting.popleft()
            if peer.link.state == LINK_NEW and peer.link.id in self.peers:
                out.append((peer, CloseReason.HANDSHAKE_TIMEOUT))
        self.router.expire_queries()
        if now >= self._next_sweep:
            late = now - self._next_sweep > _HELD_UP_S
            self._next_sweep = now + TICK_S
            if not late:
                out.extend(self._sweep(now))
        self._log.tick(now)
        return out

    def _sweep(self, now: float) -> Iterable[tuple[Peer, CloseReason]]:
        limits = self.limits
        for peer in self._waiting:
            if now - peer.progress_at >= limits.write_timeout_s:
                yield peer, CloseReason.WRITE_TIMEOUT
            elif peer.link.pending_bytes <= limits.pending_soft_bytes:
                peer.soft_since = None
            elif peer.soft_since is None:
                peer.soft_since = now
            elif now - peer.soft_since >= limits.pending_soft_s:
                yield peer, CloseReason.SLOW_CONSUMER_SOFT
        for peer in self.peers.values():
            if now - peer.heard_at > peer.silence_s and peer.link.state == LINK_READY:
                yield peer, CloseReason.STALE

    # ---- the end ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new connections and tell announced peers that the server goes away. What is in flight goes on."""
        self.is_draining = True
        for peer in self.peers.values():
            self._say_go_away(peer, CloseReason.SERVER_SHUTDOWN)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight: no byte queued for anybody, no query pending."""
        return not any(peer.link.has_pending for peer in self.peers.values())

    def go_away(self, peer: Peer, reason: CloseReason) -> None:
        """Tell a peer why it is about to be closed, if it has words for it."""
        self._say_go_away(peer, reason)

    def _say_go_away(self, peer: Peer, reason: CloseReason) -> None:
        if peer.link.state == LINK_READY and peer.is_announced:
            self.router.send(peer.link, self._pack(peer, ObjectId.GO_AWAY, "iis", int(reason), 0, WORDS[reason]))

    # ---- statistics ------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, object]:
        """Counters since the start, and what is there now. Any thread; the numbers are of about the same moment."""
        out: dict[str, object] = dict(self.router.counters())
        out["connections"] = len(self.peers)
        out["connections_accepted"] = self.accepted
        out["handshakes_open"] = self._handshakes_open
        out["connections_waiting"] = len(self._waiting)
        out["closed"] = {reason.name.lower(): count for reason, count in sorted(dict(self.closed_by_reason).items())}
        out["undelivered_bytes"] = self.undelivered_bytes
        out["ring_bytes"] = self.pool.held_bytes
        return out

    # ---- packets of its own ----------------------------------------------------------------------------------------

    def _own_system_id(self, peer: Peer) -> int:
        dialect = peer.link.dialect
        if dialect == Dialect.EVBUS_2:
            return 0
        if dialect in (Dialect.H22, Dialect.H23_255):
            return wire.filetime(self._unix_ms)
        return self.router.ticks_system_id

    def _pack(self, peer: Peer, object_id: int, layout: str, *values: str | bytes | int) -> bytes:
        return _frame.pack(
            peer.link.header_bytes, object_id, 1, self._own_system_id(peer), self._unix_ms, layout, *values
        )

    def _packet(self, peer: Peer, object_id: int, body: bytes) -> bytes:
        return _frame.pack_raw(peer.link.header_bytes, object_id, 1, self._own_system_id(peer), self._unix_ms, body)

    def _respond(self, peer: Peer, task_id: bytes, status: Status, text: str) -> None:
        self.router.send(peer.link, self._pack(peer, ObjectId.RESPONSE, "sBs", task_id, int(status), text))

    @staticmethod
    def _readable_task_id(body: bytes) -> bytes:
        fields = _frame.unpack(body, "b")
        if fields is None or len(fields[0]) > wire.MAX_TASK_ID_BYTES:
            return b""
        task_id: bytes = fields[0]
        return task_id


#: Limits of the handshake's strings, in bytes. The announcement is bounded by the packet.
_HANDSHAKE_LIMITS: Final = (wire.MAX_TASK_ID_BYTES, wire.MAX_TOKEN_BYTES, wire.MAX_CLIENT_ID_BYTES, 1 << 31)
