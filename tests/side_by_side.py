"""The shipped broker and the oracle side by side, in one thread and without sockets.

`World` plays batches of steps: bytes go into a connection's input ring, a fake flush takes what waits for it, sometimes
only in part, and what each connection was sent is held against what the oracle says. The fuzz (`fuzzing`) and the tests
of router and broker (`helpers_bus`) stand on it.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import reference as ref

from evbus._frame import Ring
from evbus.broker import YIELD, Broker
from evbus.limits import Limits
from evbus.peer import Peer
from evbus.wire import CloseReason

#: ("open",) | ("data", connection, bytes) | ("close", connection) | ("wait", seconds)
Step = tuple[Any, ...]
Batch = list[Step]

START_MS = 1_760_000_000_000
#: Reasons that the owner of a broker tells an announced peer, as `server_core` does.
TOLD = (CloseReason.PACKET_TOO_LARGE, CloseReason.PROTOCOL_ERROR)
#: Small enough to be reached by chance.
FUZZ_LIMITS = Limits(payload_bytes=20_000, subscriptions_per_connection=12, queries_per_connection=6)

_log = logging.getLogger("evbus.test")


class Mismatch(AssertionError):
    """The broker did something else than the oracle."""


class Wire:
    """One connection of the real broker: what it was sent, as bytes and as packets."""

    def __init__(self, rng: random.Random) -> None:
        self.peer: Peer
        self.rng = rng
        #: Takes everything, however the dice fall; takes nothing at all.
        self.eager = False
        self.stalled = False
        self.bytes = bytearray()
        self.packets: list[ref.Packet] = []
        self.compared = 0
        self.decoder: ref.Decoder | None = None

    def flush(self, ring: Ring) -> int:
        """What a transport does: takes all, some or nothing."""
        how = 1.0 if self.stalled else 0.0 if self.eager else self.rng.random()
        if how < 0.6:
            self.bytes += ring.take()
        elif how < 0.9:
            self.bytes += ring.take(self.rng.randrange(len(ring) + 1))
        return len(ring)

    def read(self, ticks: int) -> None:
        """Turn new bytes into packets. The SystemId tells the dialect in which each was written."""
        if not self.bytes:
            return
        if self.decoder is None:
            self.decoder = ref.Decoder(self.peer.link.header_bytes)
        self.decoder.feed(bytes(self.bytes))
        self.bytes.clear()
        while (frame := self.decoder.next()) is not None:
            if not isinstance(frame, ref.Frame):
                raise Mismatch(f"connection {self.peer.link.id} was sent {frame}")
            dialect = ref.H23_199 if frame.system_id == ticks else ref.H23_255
            if self.decoder.layout == 22:
                dialect = ref.H22
            elif frame.system_id < 1 << 32:
                dialect = ref.EVBUS_2
            elif (
                frame.system_id != ticks and not 0 <= frame.system_id // 10_000 - START_MS - 11_644_473_600_000 < 10**7
            ):
                raise Mismatch(f"SystemId {frame.system_id}")
            try:
                self.packets.append(ref.decode(frame, dialect))
            except (ref.Malformed, KeyError) as error:
                raise Mismatch(f"connection {self.peer.link.id} was sent {frame}: {error!r}") from error


class World:
    """The broker and the oracle, fed alike.

    Args:
        seed: for how much each flush takes.
        limits: of both.
        check: False runs the broker alone, for what the oracle does not know: receivers that are slow.
    """

    def __init__(self, seed: int = 0, limits: Limits = FUZZ_LIMITS, check: bool = True) -> None:
        self.rng = random.Random(seed)
        self.check = check
        self.now = 1000.0
        self.broker = Broker(limits, now=self.now, unix_ms=START_MS, log=_log)
        self.ticks = self.broker.router.ticks_system_id
        self.wires: dict[int, Wire] = {}
        self.oracle = ref.ReferenceBroker(
            ref.Limits(
                payload=limits.payload_bytes,
                subscriptions=limits.subscriptions_per_connection,
                queries=limits.queries_per_connection,
                handshake_s=limits.handshake_s,
                stale_s=limits.silence_s,
            ),
            ref.Follower(lambda conn: self.wires[conn].packets),
        )
        self.oracle.now = self.now
        self.closed: dict[int, int] = {}
        #: Queries that were put to somebody: (connection, forwarded id, subject).
        self.asked: list[tuple[int, str, str]] = []

    def run(self, batch: Sequence[Step]) -> None:
        """Both sides do the steps of a batch, the broker first, and are compared."""
        for step in batch:
            self._broker_step(step)
        self._drain()
        for wire_ in self.wires.values():
            wire_.read(self.ticks)
        if self.check:
            for step in batch:
                self._oracle_step(step)
            self._compare()

    # -- the broker

    def _broker_step(self, step: Step) -> None:
        kind = step[0]
        if kind == "open":
            wire_ = Wire(self.rng)
            wire_.peer = self.broker.opened(f"test:{len(self.wires) + 1}", wire_.flush, self.now)
            self.wires[wire_.peer.link.id] = wire_
        elif kind == "data":
            wire_ = self.wires[step[1]]
            if wire_.peer.link.id in self.broker.peers:
                wire_.peer.heard_at = self.now
                wire_.peer.link.inp.write(step[2])
                self._receive(wire_)
        elif kind == "close":
            self._close(self.wires[step[1]], CloseReason.CLIENT_CLOSED)
        else:
            until = self.now + step[1]
            while self.now < until:  # called when it asks to be, as by its owner
                self.now = min(max(self.broker.next_tick, self.now + 0.001), until)
                self.broker.set_time(self.now, START_MS + int((self.now - 1000.0) * 1000))
                for peer, reason in self.broker.tick():
                    self._close(self.wires[peer.link.id], reason)
        router = self.broker.router
        if self.rng.random() < 0.3:
            router.flush_dirty()
        for link in router.take_blocked():
            if link.id in self.broker.peers and self.rng.random() < 0.3:
                router.flush(link)
        for link, reason in router.take_victims():
            self._close(self.wires[link.id], CloseReason(reason))
        lost = router.take_lost()
        if lost:
            raise Mismatch(f"lost {lost}")

    def _receive(self, wire_: Wire) -> None:
        result: CloseReason | int | None = YIELD
        while result == YIELD:
            result = self.broker.receive(wire_.peer)
        if result is not None:
            self._close(wire_, CloseReason(result))

    def _close(self, wire_: Wire, reason: CloseReason) -> None:
        link = wire_.peer.link
        if link.id not in self.broker.peers:
            return
        if reason in TOLD:
            self.broker.go_away(wire_.peer, reason)
        if reason > CloseReason.CONNECTION_LOST:
            self.closed[link.id] = int(reason)
        if not wire_.stalled:
            wire_.bytes += link.out.take()
        self.broker.closed(wire_.peer, reason)

    def _drain(self) -> None:
        """All that waits is taken, so that both sides can be compared."""
        router = self.broker.router
        for wire_ in self.wires.values():
            wire_.eager = True
        router.flush_dirty()
        router.take_blocked()
        for wire_ in self.wires.values():
            link = wire_.peer.link
            if link.pending_bytes and link.id in self.broker.peers and not wire_.stalled:
                router.flush(link)
                if link.pending_bytes or link.is_blocked:
                    raise Mismatch(f"connection {link.id} still waits")
            wire_.eager = False

    # -- the oracle

    def _oracle_step(self, step: Step) -> None:
        kind = step[0]
        if kind == "open":
            self.oracle.connect()
        elif kind == "data":
            self.oracle.feed(step[1], step[2])
        elif kind == "close":
            self.oracle.close(step[1])
        else:
            self.oracle.advance(step[1])

    def _compare(self) -> None:
        oracle, router = self.oracle, self.broker.router
        for conn, wire_ in self.wires.items():
            expected = oracle.take(conn)
            actual = wire_.packets[wire_.compared :]
            wire_.compared = len(wire_.packets)
            if not expected and not actual:
                continue
            wrong = ref.diff(expected, actual, times=True)
            if wrong is not None:
                raise Mismatch(f"connection {conn}, {wrong}")
            if len(expected) != len(actual):  # something optional was not sent: the Follower counts what was
                oracle.sent[conn] -= len(expected) - len(actual)
            for packet in actual:
                if packet.object_id == ref.DELIVERY and (
                    packet.fields.get("Flags") == ref.IS_QUERY or packet.fields.get("IsQueryRequest")
                ):
                    self.asked.append((conn, packet.fields["TaskId"], packet.fields["Subject"]))
        if self.broker.peers.keys() != oracle.conns.keys():
            raise Mismatch(f"open: {sorted(self.broker.peers)}, expected {sorted(oracle.conns)}")
        if self.closed != oracle.closed:
            raise Mismatch(f"closed: {self.closed}, expected {oracle.closed}")
        counters = router.counters()
        counts = {name.upper(): count for name, count in counters["errors"].items()}
        counts |= {"unknown": counters["unknown_packets"], "early": counters["early_packets"]}
        if +Counter(counts) != oracle.counts:
            raise Mismatch(f"counted {counts}, expected {dict(oracle.counts)}")
        if router.queries.count != len(oracle.queries):
            raise Mismatch(f"{router.queries.count} queries pending, expected {list(oracle.queries)}")
        waiting = sum(len(sub.waiting) for conn in oracle.conns.values() for sub in conn.by_id.values())
        if router.held_msgs != waiting:
            raise Mismatch(f"{router.held_msgs} messages wait for credit, expected {waiting}")
        held = sum(len(conn.by_id) + len(conn.by_subject) for conn in oracle.conns.values())
        if router.table.subscriptions != held:
            raise Mismatch(f"{router.table.subscriptions} subscriptions, expected {held}")

    def end(self) -> None:
        """All connections go; nothing may be left behind."""
        self.run([("close", conn) for conn in self.broker.peers])
        table, router = self.broker.router.table, self.broker.router
        left = (table.subscriptions, table.nodes, router.queries.count, self.broker.pool.held_bytes)
        if left != (0, 0, 0, 0):
            raise Mismatch(f"subscriptions, trie nodes, queries and ring bytes left: {left}")
