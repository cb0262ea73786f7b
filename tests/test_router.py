"""The data plane: fan-out in every dialect, order, slow receivers, failing transports, and what is not allocated."""

from __future__ import annotations

import gc
import random
import sys
import tracemalloc
from typing import Any

import pytest
import reference as ref
from helpers_bus import Bus, Client
from side_by_side import START_MS

from evbus import wire
from evbus._frame import Ring, RingPool
from evbus._router import FEED_CONTROL, FEED_DONE, FEED_YIELD, LINK_CLOSING, LINK_READY, Link, Router
from evbus.wire import CloseReason, Dialect, ErrorCode

NOW_MS = START_MS + 12_345
DIALECT = {
    ref.H22: Dialect.H22,
    ref.H23_255: Dialect.H23_255,
    ref.H23_199: Dialect.H23_199,
    ref.EVBUS_2: Dialect.EVBUS_2,
}


class Plane:
    """A router alone, with links that are ready and keep what is flushed."""

    def __init__(self, **limits: Any) -> None:
        self.pool = RingPool()
        options: dict[str, Any] = {
            "payload_bytes": 1 << 20,
            "pending_bytes": 1 << 26,
            "queries": 100,
            "query_max_s": 60.0,
            "query_default_s": 30.0,
            "cache_subjects": 1000,
            "ticks": wire.dotnet_ticks(START_MS),
        }
        self.router = Router(self.pool, **options | limits)
        self.router.set_time(50.0, NOW_MS)
        self.links: list[Link] = []
        self.sent: dict[int, bytearray] = {}
        self.interests: list[object] = []

    def link(self, dialect: str = ref.EVBUS_2, flush: Any = None, subject: str = "") -> Link:
        """A link; its header layout is learnt from a first packet that is dropped (it is early)."""
        number = len(self.links) + 1
        sent = self.sent[number] = bytearray()

        def take(ring: Ring) -> int:
            sent.extend(ring.take())
            return 0

        link = Link(self.router, number, flush or take)
        # Version 0 of the id 1, or id 1 of version 2, is nobody's handshake: it only shows the layout.
        first = bytearray(ref.encode_frame(ref.layout_of(dialect), 1, 1, b""))
        link.inp.write(bytes(first))
        assert self.router.feed(link) == FEED_CONTROL
        self.router.take_packet()
        assert self.router.feed(link) == FEED_DONE
        link.dialect = DIALECT[dialect]
        link.state = LINK_READY
        link.packet_limit = 1 << 26
        self.links.append(link)
        if subject:
            self.interests.append(self.router.subscribe(link, subject.encode()))
        return link

    def feed(self, link: Link, *packets: bytes) -> int:
        """Hand packets to a link at once, and flush what they cause."""
        link.inp.write(b"".join(packets))
        result = self.router.feed(link)
        self.router.flush_dirty()
        return result

    def packets(self, link: Link, dialect: str = ref.EVBUS_2) -> list[ref.Packet]:
        """All that was sent to a link since the last call."""
        data = bytes(self.sent[link.id])
        self.sent[link.id].clear()
        return ref.packets(data, dialect)


def publish(dialect: str, subject: str, buffer: bytes = b"", version: int = 1, time: int = 7, **fields: Any) -> bytes:
    """A publish, as bytes."""
    return ref.encode(dialect, ref.PUBLISH, {"Subject": subject, "Buffer": buffer} | fields, version=version, time=time)


# --- fan-out


@pytest.mark.parametrize("sender", ref.DIALECTS)
@pytest.mark.parametrize("size", [0, 1, 127, 128, 8191, 8192, 70_000, 1 << 20])
def test_one_event_in_every_dialect(sender: str, size: int) -> None:
    plane = Plane()
    source = plane.link(sender)
    receivers = {dialect: plane.link(dialect, subject="x") for dialect in ref.DIALECTS}
    version = 2 if sender == ref.EVBUS_2 else 1
    payload = random.Random(size).randbytes(size)
    more = {"Codec": 3, "Headers": ref.encode_headers([("k", "v")])} if version == 2 else {}
    assert plane.feed(source, publish(sender, "x", payload, version, TaskId="t", **more)) == FEED_DONE
    systems = {
        ref.H22: wire.filetime(NOW_MS),
        ref.H23_255: wire.filetime(NOW_MS),
        ref.H23_199: wire.dotnet_ticks(START_MS),
        ref.EVBUS_2: source.id,
    }
    for dialect, link in receivers.items():
        (packet,) = plane.packets(link, dialect)
        fields = {"TaskId": "t", "Subject": "x", "Buffer": payload}
        if dialect == ref.EVBUS_2:
            fields |= {"Flags": 0, "SubscriptionId": 0, "DeadlineMs": 0, "QueryTaskId": ""}
            fields |= {"Codec": 0, "Headers": b""} | more
        elif dialect == ref.H23_199:
            fields["IsQueryRequest"] = False
        assert packet == ref.Packet(ref.DELIVERY, 2 if dialect == ref.EVBUS_2 else 1, fields, systems[dialect], 7)
    (answer,) = plane.packets(source, sender)
    assert (answer.object_id, answer.time) == (ref.RESPONSE, NOW_MS)
    assert answer.system_id == (0 if sender == ref.EVBUS_2 else systems[sender])
    assert plane.pool.held_bytes == 0


@pytest.mark.parametrize("sender", ref.DIALECTS)
def test_order_survives_every_mixture_of_receivers(sender: str) -> None:
    """Runs, copies, groups, own copies and acknowledgements in one stream; receivers of all dialects see one order."""
    for seed in range(20):
        rng = random.Random(seed)
        bus = Bus(seed=seed)
        clients = [bus.open(rng.choice(ref.DIALECTS)) for _ in range(5)]
        source = bus.open(sender)
        for client in [*clients, source]:
            for subject in rng.sample(["a", "b", "*", ">"], rng.randrange(3)):
                client.subscribe(subject)
            if client.dialect == ref.EVBUS_2 and rng.random() < 0.5:
                client.subscribe("a", 9, group="g")
        stream = b""
        for index in range(40):
            version = 2 if sender == ref.EVBUS_2 and rng.random() < 0.7 else 1
            fields: dict[str, Any] = {"TaskId": rng.choice(["", "", "t"])}
            if version == 2:
                fields |= {"Flags": rng.choice([0, 0, 0, ref.CONFIRM, ref.NO_ECHO])}
            buffer = b"%d;" % index + bytes(rng.choice([0, 0, 10, 9000]))
            # Some of them cannot be their own delivery: a padded length, an invalid subject, a malformed body.
            packet = publish(sender, rng.choice("abc"), buffer, version, index, **fields)
            odd = rng.random()
            if odd < 0.1 and version == 1:
                packet = ref.encode_frame(ref.layout_of(sender), 4, 1, packet[ref.layout_of(sender) :] + b"!")
            elif odd < 0.15:
                packet = publish(sender, "a..b", buffer, version, index, **fields)
            elif odd < 0.2:
                packet = ref.encode_frame(ref.layout_of(sender), 4, 1, b"\x01t\x05")
            stream += packet
        source.send_bytes(stream)  # the oracle knows what each must get, and in which order


def test_an_error_comes_after_what_earlier_packets_caused() -> None:
    for kind in ("malformed", "subject", "payload"):
        bus = Bus(payload_bytes=100)
        client = bus.open()
        client.subscribe("a")
        bad = {
            "malformed": ref.encode_frame(23, ref.PUBLISH, 2, b"\0"),
            "subject": publish(ref.EVBUS_2, "a..b", version=2),
            "payload": publish(ref.EVBUS_2, "a", bytes(101), version=2),
        }[kind]
        client.send_bytes(publish(ref.EVBUS_2, "a", b"first", version=2) + bad + publish(ref.EVBUS_2, "a", version=2))
        assert [packet.object_id for packet in client.take()] == [ref.DELIVERY, ref.ERROR, ref.DELIVERY], kind


def test_lengths_that_are_padded_are_written_anew() -> None:
    plane = Plane()
    source = plane.link(ref.H23_199)
    twin, old = plane.link(ref.H23_199, subject="x"), plane.link(ref.H22, subject="x")
    body = b"\x81\x00t" + b"\x81\x80\x80\x00x" + b"\x80\x80\x00" + b"\x02\0\0\0ab" + b"behind it"
    plane.feed(source, ref.encode_frame(23, ref.PUBLISH, 1, body, time=9))
    for link, dialect in ((twin, ref.H23_199), (old, ref.H22)):
        data = bytes(plane.sent[link.id])
        (packet,) = plane.packets(link, dialect)
        assert (packet.fields["TaskId"], packet.fields["Subject"], packet.fields["Buffer"]) == ("t", "x", b"ab")
        again = ref.encode(dialect, ref.DELIVERY, packet.fields, system_id=packet.system_id or 0, time=9)
        assert again == data


def test_a_query_id_that_is_too_long_is_malformed() -> None:
    for dialect in (ref.H23_199, ref.EVBUS_2):
        for blank in (" " * 129, "x" * 129):
            bus = Bus()
            client, watcher = bus.open(dialect), bus.open()
            watcher.subscribe("x")
            client.publish("x", task_id="t", QueryTaskId=blank)
            told = [(ref.ERROR, "t", ErrorCode.MALFORMED)] if dialect == ref.EVBUS_2 else []
            assert (client.brief(), watcher.take()) == (told, [])


def test_one_copy_for_each_connection_and_each_group() -> None:
    bus = Bus()
    source, many, member = bus.open(), bus.open(), bus.open()
    for index, subject in enumerate(["a.b", "a.*", "a.>", ">", "*.b"]):
        many.subscribe(subject)
        many.subscribe(subject, index + 1)
    member.subscribe("a.b", 1, group="g")
    member.subscribe("a.*", 2, group="g")
    member.subscribe(">", 3, group="h")
    source.publish("a.b", task_id="t", version=2, Flags=ref.CONFIRM)
    assert len(many.take()) == 1
    assert sorted(out[3] for out in member.brief()) in ([1, 3], [2, 3])
    assert source.brief() == [(ref.RECEIPT, "t", 3)]


def test_no_echo_counts_nobody_twice() -> None:
    bus = Bus()
    source, other = bus.open(), bus.open()
    source.subscribe("x")
    source.subscribe("x", 1, group="alone")
    source.subscribe("x", 2, group="both")
    other.subscribe("x", 1, group="both")
    source.publish("x", task_id="t", version=2, Flags=ref.CONFIRM | ref.NO_ECHO)
    (receipt,) = source.take()
    assert (receipt.fields["Receivers"], receipt.fields["Dropped"]) == (1, 0)
    assert len(other.take()) == 1


@pytest.mark.parametrize("subjects", [["x"], [f"x.{index}" for index in range(1200)]])
def test_groups_take_turns(subjects: list[str]) -> None:
    """Also if every subject is used only once: then there is no earlier turn on it to go by."""
    bus = Bus(check=False, match_cache=16)
    source, members = bus.open(), [bus.open() for _ in range(4)]
    for member in members:
        member.subscribe(">", 1, group="workers")
    for index in range(1200):
        source.publish(subjects[index % len(subjects)])
    shares = [len(member.take()) for member in members]
    assert sum(shares) == 1200
    assert max(shares) - min(shares) <= 4, shares


# --- receivers that are slow, or gone


def test_partial_flushes_lose_nothing() -> None:
    for seed in range(5):
        rng = random.Random(seed)
        plane = Plane()
        taken: dict[int, bytearray] = {}
        source = plane.link()

        def receiver(number: int, rng: random.Random = rng, taken: dict[int, bytearray] = taken) -> Any:
            taken[number] = bytearray()

            def flush(ring: Ring) -> int:
                taken[number].extend(ring.take(rng.choice([0, 1, 22, 5000, 20_000])))
                return len(ring)

            return flush

        links = [plane.link(flush=receiver(number), subject="x") for number in range(4)]
        for index in range(200):
            payloads = [bytes([index]) * rng.choice([1, 9, 9000]) for _ in range(3)]
            plane.feed(source, *(publish(ref.EVBUS_2, "x", payload, 2) for payload in payloads))
            for link in plane.router.take_blocked():
                if rng.random() < 0.5:
                    plane.router.flush(link)
        for number, link in enumerate(links):
            while link.pending_bytes:
                plane.router.flush(link)
            got = [packet.fields["Buffer"][:1] for packet in ref.packets(bytes(taken[number]), ref.EVBUS_2)]
            assert len(got) == 600
            assert got == sorted(got)
        assert plane.pool.held_bytes == 0


def test_over_the_limit_a_receiver_is_given_up_and_nobody_else() -> None:
    bus = Bus(check=False, pending_soft_bytes=200_000, pending_hard_bytes=200_000, payload_bytes=50_000)
    source, slow, quick = bus.open(), bus.open(), bus.open(ref.H23_199)
    for client in (slow, quick):
        client.subscribe("x")
    slow.wire.stalled = True
    for index in range(10):
        source.publish("x", bytes([index]) * 50_000, f"t{index}", 2, Flags=ref.CONFIRM)
    receipts = [(packet.fields["Receivers"], packet.fields["Dropped"]) for packet in source.take()]
    # Three fit; at the fourth it is given up, and the fifth finds it gone.
    assert receipts == [(2, 0)] * 3 + [(1, 1)] + [(1, 0)] * 6
    assert (slow.closed, quick.closed, len(quick.take())) == (CloseReason.SLOW_CONSUMER, None, 10)
    counters = bus.router.counters()
    assert (counters["delivered"], counters["dropped_slow"]) == (13, 1)
    assert bus.broker.undelivered_bytes == 3 * 50_000 + 3 * (23 + 10 + 3 + 2 + 1 + 4 + 4)
    assert bus.broker.closed_by_reason[CloseReason.SLOW_CONSUMER] == 1


def test_many_receivers_given_up_in_one_feed() -> None:
    plane = Plane(pending_bytes=100_000)
    source = plane.link()
    stalled = [plane.link(flush=len, subject="x") for _ in range(150)]
    good = plane.link(subject="x")
    for _ in range(3):
        plane.feed(source, publish(ref.EVBUS_2, "x", bytes(60_000), 2), publish(ref.EVBUS_2, "y", version=2))
    victims = plane.router.take_victims()
    assert sorted(link.id for link, _ in victims) == sorted(link.id for link in stalled)
    assert {reason for _, reason in victims} == {CloseReason.SLOW_CONSUMER}
    assert (len(plane.packets(good)), plane.router.take_victims()) == (3, ())
    assert (plane.router.dropped_slow, plane.router.delivered) == (300, 153)


def test_a_group_passes_over_members_that_are_given_up() -> None:
    plane = Plane(pending_bytes=100_000)
    source = plane.link()
    dead, good = plane.link(flush=len), plane.link()
    for sid, link in enumerate((dead, good), 1):
        plane.interests.append(plane.router.subscribe(link, b"x", sid, 0, b"g"))
    plane.interests.append(plane.router.subscribe(dead, b"x", 3, 0, b"alone"))
    for _ in range(4):
        plane.feed(source, publish(ref.EVBUS_2, "x", bytes(40_000), 2, TaskId="t", Flags=ref.CONFIRM))
    counts = [(packet.fields["Receivers"], packet.fields["Dropped"]) for packet in plane.packets(source)]
    assert counts[0] == (2, 0)
    assert counts[-1] == (1, 1)
    assert len(plane.packets(good)) + dead.counters()["msgs_out"] == sum(receivers for receivers, _ in counts)


@pytest.mark.parametrize("size", [10, 9000, 100_000])
def test_a_connection_that_breaks_while_it_is_written_to(size: int) -> None:
    plane = Plane()
    source = plane.link()

    def broken(ring: Ring) -> int:
        raise ConnectionResetError(104, "reset")

    bad = plane.link(flush=broken, subject="x")
    good = plane.link(subject="x")
    plane.feed(source, *(publish(ref.EVBUS_2, "x", bytes(size), 2) for _ in range(5)))
    lost = plane.router.take_lost()
    assert [(link.id, type(error)) for link, error in lost] == [(bad.id, ConnectionResetError)]
    assert len(plane.packets(good)) == 5
    plane.router.detach(bad)
    assert plane.pool.held_bytes == 0


def test_a_transport_that_breaks_its_promise() -> None:
    """Only OSError is expected of a flush. Whatever else comes, no pointer into a foreign ring may stay behind."""
    plane = Plane()
    source = plane.link()

    def wrong(ring: Ring) -> int:
        raise ZeroDivisionError

    bad, good = plane.link(flush=wrong, subject="x"), plane.link(subject="x")
    assert plane.feed(source, publish(ref.EVBUS_2, "x", bytes(50_000), 2)) == -CloseReason.INTERNAL_ERROR
    source.inp.write(b"\xff" * 100_000)
    assert len(bad.out.peek()) == len(good.out.peek()) or len(plane.packets(good)) == 1
    assert b"\xff" not in bad.out.peek()[23:]


def test_nothing_more_is_queued_for_a_connection_that_is_gone() -> None:
    plane = Plane()
    source, gone = plane.link(), plane.link()
    interest = plane.router.subscribe(gone, b"x")
    plane.feed(source, publish(ref.EVBUS_2, "x", version=2))
    plane.router.unsubscribe(interest)
    plane.router.detach(gone)
    plane.router.detach(gone)
    gone.inp.write(publish(ref.EVBUS_2, "x", version=2))
    assert (plane.router.feed(gone), gone.inp.capacity, gone.state) == (FEED_DONE, 0, LINK_CLOSING)
    plane.router.send(gone, b"late")
    plane.feed(source, publish(ref.EVBUS_2, "x", version=2))
    assert (gone.pending_bytes, plane.router.delivered) == (0, 1)


def test_a_server_that_is_thrown_away_with_everything_in_it() -> None:
    """Subscriptions, pending queries and queued bytes, and no `closed` or `detach` for any of them."""
    for _ in range(3):
        bus = Bus(check=False)
        clients: list[Client] = [bus.open(dialect) for dialect in ref.DIALECTS]
        for client in clients:
            for subject in ("a", "a.*", "b.>"):
                client.subscribe(subject)
            client.wire.stalled = True
        for client in clients:
            client.publish("a", bytes(9000))
        for client in clients:
            client.send(ref.QUERY, TaskId=f"q{client.id}", Subject="a")
        assert bus.router.queries.count == 4
        del bus, clients, client
        gc.collect()


# --- bounded work, and no objects per message


def test_a_feed_stops_after_its_share_of_deliveries() -> None:
    plane = Plane()
    source = plane.link()
    links = [plane.link(subject="x") for _ in range(100)]
    source.inp.write(publish(ref.EVBUS_2, "x", b"1", 2) * 2000)
    results = []
    while True:
        results.append(plane.router.feed(source))
        plane.router.flush_dirty()
        if results[-1] == FEED_DONE:
            break
    assert results[:-1] == [FEED_YIELD] * (2000 * 100 // 65_536)
    size = len(ref.encode(ref.EVBUS_2, ref.DELIVERY, {"Subject": "x", "Buffer": b"1"}, version=2))
    assert [len(plane.sent[link.id]) for link in links] == [2000 * size] * 100


def test_a_feed_stops_after_its_share_of_matching() -> None:
    """Patterns that a peer made up to be costly, and a new subject in every message."""
    plane = Plane()
    source, owner = plane.link(), plane.link()
    for bits in range(4000):
        name = ".".join("*" if bits >> at & 1 else "t" for at in range(12)) + ".t" * 20
        plane.interests.append(plane.router.subscribe(owner, name.encode(), bits + 1, 1))
    source.inp.write(b"".join(publish(ref.EVBUS_2, "t." * 31 + str(index), version=2) for index in range(100)))
    feeds = 1
    while plane.router.feed(source) == FEED_YIELD:
        feeds += 1
    assert feeds > 50  # each of these subjects is a good deal of the share
    assert plane.router.published == 100


def test_control_packets_come_up_in_order_between_the_others() -> None:
    plane = Plane()
    source, watcher = plane.link(), plane.link(subject="x")
    beats = [ref.encode(ref.EVBUS_2, ref.HEARTBEAT, {"TaskId": number}) for number in (1, 2)]
    source.inp.write(publish(ref.EVBUS_2, "x", b"a") + beats[0] + publish(ref.EVBUS_2, "x", b"b") + beats[1])
    seen = []
    while plane.router.feed(source) == FEED_CONTROL:
        plane.router.flush_dirty()
        object_id, version, _, _, body = plane.router.take_packet()
        seen.append((object_id, version, body[0], [packet.fields["Buffer"] for packet in plane.packets(watcher)]))
    assert seen == [(ref.HEARTBEAT, 1, 1, [b"a"]), (ref.HEARTBEAT, 1, 2, [b"b"])]


@pytest.mark.parametrize("last", ["heartbeat", "publish", "unknown", "half a packet", "half a packet and a rest"])
def test_an_idle_connection_holds_no_memory(last: str) -> None:
    plane = Plane()
    link = plane.link()
    packet = publish(ref.EVBUS_2, "x", bytes(1000), 2)
    heartbeat = ref.encode(ref.EVBUS_2, ref.HEARTBEAT, {"TaskId": 1})
    link.inp.make_room(4096)  # as a transport does before it reads
    assert plane.pool.held_bytes >= 1 << 18
    data = {"heartbeat": heartbeat, "publish": packet, "unknown": ref.encode_frame(23, 77, 1, b"")}
    data |= {"half a packet": packet[:500], "half a packet and a rest": packet * 3 + heartbeat + packet[:700]}
    link.inp.write(data[last])
    while plane.router.feed(link) == FEED_CONTROL:
        plane.router.take_packet()
    plane.router.flush_dirty()
    assert plane.pool.held_bytes == (0 if "half" not in last else 512 if "rest" not in last else 1024)


@pytest.mark.parametrize("size", [-(2**31), -1, 0, 22])
def test_sizes_below_the_header(size: int) -> None:
    plane = Plane()
    link, watcher = plane.link(), plane.link(subject="x")
    good = publish(ref.EVBUS_2, "x", version=2)
    link.inp.write(good + (size & 0xFFFFFFFF).to_bytes(4, "little"))
    assert plane.router.feed(link) == -CloseReason.PROTOCOL_ERROR
    plane.router.flush_dirty()
    assert len(plane.packets(watcher)) == 1


def test_sizes_above_the_limit() -> None:
    plane = Plane()
    for size in (1001, 1 << 20, 2**31 - 1):
        link = plane.link()
        link.packet_limit = 1000
        link.inp.write(size.to_bytes(4, "little"))
        assert plane.router.feed(link) == -CloseReason.PACKET_TOO_LARGE
    link = plane.link()
    link.packet_limit = 1000
    link.inp.write((1000).to_bytes(4, "little"))
    assert plane.router.feed(link) == FEED_DONE
    assert link.inp.capacity == 512  # for the 4 bytes that came, not for the 1000 that may


def discard(ring: Ring) -> int:
    """A flush that takes everything and keeps nothing."""
    ring.clear()
    return 0


def packets_of(kind: str) -> bytes:
    """One message of a kind, in the dialect that has it."""
    return {
        "v1": publish(ref.H23_199, "x", b"12345678"),
        "v1 acknowledged": publish(ref.H23_199, "x", b"12345678", TaskId="t"),
        "v2": publish(ref.EVBUS_2, "x", b"12345678", 2, Headers=ref.encode_headers([("k", "v")])),
        "v2 confirmed": publish(ref.EVBUS_2, "x", b"12345678", 2, TaskId="t", Flags=ref.CONFIRM),
        "to a group": publish(ref.EVBUS_2, "grouped", b"12345678", 2),
        "to nobody": publish(ref.EVBUS_2, "nobody", b"12345678", 2),
        "many subjects": b"".join(publish(ref.EVBUS_2, f"s.{index}", version=2) for index in range(10)),
        "invalid": publish(ref.EVBUS_2, "a..b", b"12345678", 2, TaskId="t"),
        "malformed": ref.encode_frame(23, ref.PUBLISH, 2, b"\1\2\3"),
        "unknown": ref.encode_frame(23, 77, 1, b"\1\2\3"),
        "a query": ref.encode(ref.EVBUS_2, ref.QUERY, {"TaskId": "q", "Subject": "asked"}, version=2)
        + publish(ref.EVBUS_2, "asked", b"!", 2, QueryTaskId="q"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "v1", "v1 acknowledged", "v2", "v2 confirmed", "to a group", "to nobody", "many subjects", "invalid",
        "malformed", "unknown", "a query",
    ],
)  # fmt: skip
def test_python_allocates_nothing_per_message(kind: str) -> None:
    plane = Plane(queries=100_000)
    source = plane.link(ref.H23_199 if kind.startswith("v1") else ref.EVBUS_2, flush=discard)
    for dialect in (*ref.DIALECTS, ref.EVBUS_2):
        link = plane.link(dialect, flush=len)
        plane.interests += [plane.router.subscribe(link, subject) for subject in (b"x", b"s.*")]
        plane.interests.append(plane.router.subscribe(link, b"grouped", 5, 0, b"g"))
    plane.interests.append(plane.router.subscribe(source, b"asked", 6, 1))
    data = packets_of(kind)

    def feed(count: int) -> tuple[int, int]:
        """(blocks that are there more than before, bytes at the peak) of one batch."""
        source.inp.write(data * count)
        gc.collect()
        gc.disable()
        blocks = sys.getallocatedblocks()
        tracemalloc.start()
        try:
            while (result := plane.router.feed(source)) == FEED_YIELD:
                pass
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
        after = sys.getallocatedblocks()
        assert result == FEED_DONE
        return after - blocks, peak

    feed(10)
    few, many = feed(10), feed(10_000)
    # The same for 10 as for 10,000, give or take what the interpreter does by itself.
    assert many[0] - few[0] < 20, (few, many)
    assert many[1] - few[1] < 4096, (few, many)


def test_counters_of_a_link() -> None:
    plane = Plane()
    source, watcher = plane.link(), plane.link(subject="x")
    packet = publish(ref.EVBUS_2, "x", b"1", 2)
    before = source.counters()
    plane.feed(source, packet, packet, ref.encode_frame(23, 77, 1, b""))
    after = source.counters()
    assert after["packets_in"] - before["packets_in"] == 3
    assert after["bytes_in"] - before["bytes_in"] == 2 * len(packet) + 23
    assert watcher.counters()["msgs_out"] == 2
    counters = plane.router.counters()
    assert {name: counters[name] for name in ("published", "delivered", "unrouted", "unknown_packets")} == {
        "published": 2, "delivered": 2, "unrouted": 0, "unknown_packets": 1,
    }  # fmt: skip
    assert counters["bytes_out"] == 2 * len(packet)
    plane.feed(source, publish(ref.EVBUS_2, "nobody", version=2))
    assert plane.router.unrouted == 1


def test_bad_arguments() -> None:
    plane = Plane()
    link = plane.link()
    with pytest.raises(ValueError, match="dialect"):
        link.dialect = 9
    for call in (plane.router.feed, plane.router.flush, plane.router.detach, plane.router.unsubscribe):
        with pytest.raises(TypeError):
            call(None)
