"""Overflow policies in the data plane: exact gaps, credit, and receipts that wait. Over real connections they are in
`test_overflow`; the rules of credit are also held against the reference broker, by the fuzz.
"""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import reference as ref
from helpers_bus import Bus
from test_broker import notice
from test_router import Plane, publish

from evbus._frame import Ring, pack
from evbus._router import Interest, Link
from evbus.wire import CloseReason, ErrorCode, GapReason, ObjectId, Overflow

SOFT = 20_000
HEAD = 23 + 10 + 1 + 2 + 1 + 4 + 4  # of a delivery on a subject of one letter


class Receiver:
    """A link that takes what it is told to, and what its subscriptions were sent."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.takes = 0
        self.data = bytearray()
        self.link: Link = plane.link(flush=self.flush)
        self.subs: dict[int, tuple[str, Overflow, str, Interest]] = {}

    def flush(self, ring: Ring) -> int:
        got = ring.take(min(self.takes, len(ring)))
        self.takes -= len(got)
        self.data += got
        return len(ring)

    def subscribe(self, sid: int, subject: str, overflow: Overflow, group: str = "") -> Interest:
        interest = self.plane.router.subscribe(self.link, subject.encode(), sid, 0, group.encode(), overflow)
        self.subs[sid] = subject, overflow, group, interest
        return interest

    def take(self, size: int) -> None:
        """The socket has room for so many bytes."""
        self.takes += size
        self.plane.router.take_blocked()
        while self.link.pending_bytes and self.takes:
            self.plane.router.flush(self.link)
            self.plane.router.flush_dirty()

    def seen(self) -> dict[int, list[tuple[str, Any]]]:
        """By subscription: ("message", its number) and ("gap", its count), in order."""
        out: dict[int, list[tuple[str, Any]]] = {sid: [] for sid in self.subs}
        for packet in ref.packets(bytes(self.data), ref.EVBUS_2):
            if packet.object_id == ref.GAP:
                assert packet.fields["Reason"] == GapReason.OVERFLOW
                out[packet.fields["SubscriptionId"]].append(("gap", packet.fields["Count"]))
                continue
            assert packet.object_id == ref.DELIVERY
            number = int.from_bytes(packet.fields["Buffer"][:4], "big")
            tokens = packet.fields["Subject"].split(".")
            for sid, (subject, overflow, group, _) in self.subs.items():
                named = overflow == Overflow.BLOCK or group != ""
                if (
                    packet.fields["SubscriptionId"] == sid
                    if named
                    else (packet.fields["SubscriptionId"] == 0 and ref.matches(subject.split("."), tokens))
                ):
                    out[sid].append(("message", number))
        return out


def numbered(subject: str, number: int, size: int = 1000, **fields: Any) -> bytes:
    return publish(ref.EVBUS_2, subject, number.to_bytes(4, "big") + bytes(size - 4), 2, **fields)


@pytest.mark.parametrize("seed", range(40))
def test_every_subscription_gets_each_message_or_is_told(seed: int) -> None:
    rng = random.Random(seed)
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    quick = plane.link(subject="*")
    receivers = [Receiver(plane) for _ in range(4)]
    for receiver in receivers:
        for sid in range(1, rng.randrange(2, 6)):
            overflow = rng.choice([Overflow.CLOSE, Overflow.DROP_NEWEST, Overflow.DROP_NEWEST, Overflow.BLOCK])
            receiver.subscribe(sid, rng.choice(["a", "b", "*", ">", "c"]), overflow)
    published: list[str] = []
    for _ in range(60):
        packets = []
        for _ in range(rng.randrange(1, 20)):
            packets.append(numbered(rng.choice("aaabc"), len(published), rng.choice([4, 100, 1000, 9000])))
            published.append(ref.packets(packets[-1], ref.EVBUS_2)[0].fields["Subject"])
        plane.feed(source, *packets)
        for receiver in receivers:
            if rng.random() < 0.3:
                receiver.take(rng.choice([100, 5000, 40_000]))
            for _, overflow, _, interest in receiver.subs.values():
                if overflow == Overflow.BLOCK and rng.random() < 0.2:
                    plane.router.grant(interest, 3)
    assert plane.router.take_victims() == ()
    assert len(plane.packets(quick)) == len(published)
    for at, receiver in enumerate(receivers):
        receiver.take(1 << 40)
        for _, overflow, _, interest in receiver.subs.values():
            if overflow == Overflow.BLOCK:
                assert interest.held_msgs == 0 or interest.credit == 0
                plane.router.grant(interest, 1 << 20)
                while plane.router.is_dirty:
                    plane.router.flush_dirty()
        for sid, found in receiver.seen().items():
            subject, overflow, _, interest = receiver.subs[sid]
            expected = [n for n, on in enumerate(published) if ref.matches(subject.split("."), [on])]
            position = 0
            for kind, value in found:
                if kind == "gap":
                    assert value > 0
                    position += value
                else:
                    assert value == expected[position]
                    position += 1
            assert position == len(expected), (at, sid)
            gaps = sum(value for kind, value in found if kind == "gap")
            assert gaps == interest.dropped
            assert gaps == 0 or overflow == Overflow.DROP_NEWEST
    counters = plane.router.counters()
    assert (counters["held_msgs"], counters["dropped_slow"], counters["gaps_untold"]) == (0, 0, 0)
    assert sum(receiver.link.counters()["dropped"] for receiver in receivers) == counters["dropped_newest"]


@pytest.mark.parametrize("seed", range(10))
def test_a_group_loses_nothing_uncounted_and_prefers_members_with_room(seed: int) -> None:
    rng = random.Random(seed)
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receivers = [Receiver(plane) for _ in range(3)]
    for receiver in receivers:
        receiver.subscribe(1, "a", rng.choice([Overflow.CLOSE, Overflow.DROP_NEWEST]), "g")
    receivers[0].subscribe(2, "a", Overflow.BLOCK, "h")
    receivers[1].subscribe(2, "a", Overflow.BLOCK, "h")
    for number in range(400):
        plane.feed(source, numbered("a", number))
        if rng.random() < 0.1:
            receivers[rng.randrange(3)].take(rng.randrange(30_000))
        if rng.random() < 0.1:
            plane.router.grant(rng.choice(receivers[:2]).subs[2][3], 3)
    held = [receiver.subs[2][3].held_msgs for receiver in receivers[:2]]
    for receiver in receivers:
        receiver.take(1 << 40)
        if 2 in receiver.subs:
            plane.router.grant(receiver.subs[2][3], 1000)
    while plane.router.is_dirty:
        plane.router.flush_dirty()
    for sid in (1, 2):
        found = [receiver.seen()[sid] for receiver in receivers if sid in receiver.subs]
        numbers = [value for one in found for kind, value in one if kind == "message"]
        gaps = sum(value for one in found for kind, value in one if kind == "gap")
        assert len(numbers) == len(set(numbers))
        assert len(numbers) + gaps == 400
        assert sid == 1 or gaps == 0
        for one in found:
            own = [value for kind, value in one if kind == "message"]
            assert own == sorted(own)
    assert sum(held) > 0


def test_dropping_goes_on_until_half_of_the_limit_is_left() -> None:
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    interest = receiver.subscribe(7, "a", Overflow.DROP_NEWEST)
    plane.feed(source, *(numbered("a", number, 1000 - HEAD) for number in range(25)))
    assert (receiver.link.pending_bytes, interest.dropped) == (SOFT, 5)
    receiver.take(5000)
    plane.feed(source, numbered("a", 25))
    assert (receiver.link.pending_bytes, interest.dropped) == (SOFT - 5000, 6)
    receiver.take(5000)
    assert receiver.link.pending_bytes == SOFT // 2 + 23 + 13  # the gap, though nothing more was published
    plane.feed(source, numbered("a", 26))
    receiver.take(1 << 20)
    assert receiver.seen()[7][20:] == [("gap", 6), ("message", 26)]
    assert plane.router.gaps == 1


def test_a_message_larger_than_the_limit_goes_into_an_empty_queue() -> None:
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    receiver.subscribe(1, "a", Overflow.DROP_NEWEST)
    blocking = receiver.subscribe(2, "a", Overflow.BLOCK)
    plane.router.grant(blocking, 10)
    plane.feed(source, numbered("a", 0, 3 * SOFT))
    receiver.take(1 << 20)
    plane.feed(source, numbered("a", 1, 3 * SOFT))
    receiver.take(1 << 20)
    assert receiver.seen() == {1: [("message", 0), ("message", 1)], 2: [("message", 0), ("message", 1)]}


def test_one_subscription_that_closes_makes_the_copy_needed() -> None:
    """A connection gets one copy for all its plain subscriptions, so it is dropped only if all of them allow that."""
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    receiver.subscribe(1, "*", Overflow.DROP_NEWEST)
    receiver.subscribe(2, "b", Overflow.CLOSE)
    for number in range(60):
        plane.feed(source, numbered("a" if number < 30 else "b", number, 1000))
    receiver.take(1 << 20)
    seen = receiver.seen()
    assert seen[2] == [("message", number) for number in range(30, 60)]
    kept = sum(kind == "message" for kind, _ in seen[1]) - 30
    assert 0 < kept < 30
    assert seen[1][kept:] == [("gap", 30 - kept), *seen[2]]


def test_an_owed_gap_is_told_when_the_subscription_ends_and_counted_when_the_connection_does() -> None:
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    first = receiver.subscribe(1, "a", Overflow.DROP_NEWEST)
    second = receiver.subscribe(2, "a", Overflow.DROP_NEWEST)
    plane.feed(source, *(numbered("a", number, 1000 - HEAD) for number in range(25)))
    plane.router.unsubscribe(first)
    receiver.link.state = 2  # LINK_CLOSING, as the control plane sets it
    plane.router.unsubscribe(second)
    plane.router.detach(receiver.link)
    assert (plane.router.gaps, plane.router.gaps_untold) == (1, 5)


def test_the_receipt_waits_for_all_who_block_and_says_who_went() -> None:
    plane = Plane()
    source = plane.link()
    receivers = [Receiver(plane) for _ in range(3)]
    interests = [receiver.subscribe(1, "a", Overflow.BLOCK) for receiver in receivers]
    plane.link(subject="a")
    plane.router.grant(interests[0], 1)

    def receipts() -> list[tuple[str, int, int]]:
        plane.router.flush_dirty()
        return [
            (packet.fields["TaskId"], packet.fields["Receivers"], packet.fields["Dropped"])
            for packet in plane.packets(source)
        ]

    plane.feed(source, numbered("a", 0, TaskId="p", Flags=ref.CONFIRM), numbered("a", 1, TaskId="q", Flags=ref.CONFIRM))
    plane.feed(source, numbered("b", 2, TaskId="r", Flags=ref.CONFIRM))
    assert receipts() == [("r", 0, 0)]
    plane.router.grant(interests[1], 2)
    assert receipts() == []
    plane.router.unsubscribe(interests[2])
    assert receipts() == [("p", 3, 1)]
    assert plane.router.dropped_held == 2
    plane.router.grant(interests[0], 1)
    assert receipts() == [("q", 3, 1)]
    assert plane.router.held_msgs == 0


def test_a_publisher_that_goes_leaves_its_messages() -> None:
    plane = Plane()
    source = plane.link()
    receiver = Receiver(plane)
    interest = receiver.subscribe(1, "a", Overflow.BLOCK)
    plane.feed(source, *(numbered("a", number, TaskId="p", Flags=ref.CONFIRM) for number in range(3)))
    plane.router.detach(source)
    plane.router.grant(interest, 9)
    receiver.take(1 << 20)
    assert receiver.seen()[1] == [("message", number) for number in range(3)]


def test_what_waits_for_credit_goes_no_further_than_the_soft_limit() -> None:
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    interest = receiver.subscribe(1, "a", Overflow.BLOCK)
    plane.feed(source, *(numbered("a", number, 1000) for number in range(100)))
    assert receiver.link.held_bytes > 100_000
    plane.router.grant(interest, 100)
    assert receiver.link.pending_bytes <= SOFT
    assert receiver.link.counters()["held_msgs"] == interest.held_msgs > 70
    for _ in range(40):
        receiver.take(3000)
        assert receiver.link.pending_bytes <= SOFT
    receiver.take(1 << 20)
    assert [value for _, value in receiver.seen()[1]] == list(range(100))
    assert (receiver.link.held_bytes, receiver.link.has_pending) == (0, False)


def test_held_messages_count_against_the_hard_limit() -> None:
    plane = Plane(pending_bytes=50_000)
    source = plane.link()
    receiver = Receiver(plane)
    receiver.subscribe(1, "a", Overflow.BLOCK)
    plane.feed(source, *(numbered("a", number, 1000, TaskId="p", Flags=ref.CONFIRM) for number in range(100)))
    assert plane.router.take_victims() == [(receiver.link, CloseReason.SLOW_CONSUMER)]
    assert receiver.link.held_bytes <= 50_000


def test_a_server_that_is_thrown_away_with_messages_waiting() -> None:
    plane = Plane(soft_bytes=SOFT)
    source = plane.link()
    receiver = Receiver(plane)
    receiver.subscribe(1, "a", Overflow.BLOCK)
    receiver.subscribe(2, "a", Overflow.DROP_NEWEST)
    plane.feed(source, *(numbered("a", number, TaskId="p", Flags=ref.CONFIRM) for number in range(50)))
    del source, receiver, plane
    gc.collect()


def test_a_stalled_subscriber_that_drops_is_closed_by_the_write_timeout_only() -> None:
    bus = Bus(check=False, pending_soft_bytes=SOFT, pending_soft_s=2.0)
    source, slow = bus.open(), bus.open()
    slow.send(ref.SUBSCRIBE, 2, Subject="a", SubscriptionId=1, Overflow=Overflow.DROP_NEWEST)
    slow.wire.stalled = True
    source.wire.peer.link.inp.write(b"".join(numbered("a", number) for number in range(100)))
    bus.broker.receive(source.wire.peer)
    notice(bus)
    interest = slow.wire.peer.subscriptions[1]  # type: ignore[index]
    assert interest.dropped > 50
    for _ in range(9):
        bus.wait(1.0)
        assert slow.is_open
    bus.wait(1.1)
    bus.wait(1.1)
    assert slow.closed is CloseReason.WRITE_TIMEOUT
    stats = bus.broker.stats()
    assert stats["gaps_untold"] == stats["dropped_newest"] > 50  # type: ignore[operator]


def test_credit_that_makes_no_sense() -> None:
    bus = Bus()
    client = bus.open()
    client.send(ref.SUBSCRIBE, 2, Subject="a", SubscriptionId=1, Overflow=Overflow.DROP_NEWEST)
    for fields in (
        {"SubscriptionId": 1, "Msgs": 0},
        {"SubscriptionId": 0, "Msgs": 1},
        {"SubscriptionId": 1, "Msgs": -1},
    ):
        client.send(ref.CREDIT, **fields)
    client.send_bytes(pack(23, ObjectId.CREDIT, 1, 0, 0, "i", 1))
    client.send(ref.CREDIT, SubscriptionId=1, Msgs=5)  # has no use for it
    client.send(ref.CREDIT, SubscriptionId=9, Msgs=5)  # not there (any more)
    assert client.brief() == [(ref.ERROR, "", ErrorCode.MALFORMED)] * 4
