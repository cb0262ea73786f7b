"""The client's hot path: outbox, inbox and mailboxes, without any thread or socket."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from evbus import _inbox, _mailbox, _outbox, wire
from evbus._clock import SystemClock
from evbus._frame import Ring, next_packet, pack, unpack
from evbus._inbox import Inbox, Waiter
from evbus._mailbox import Mailbox
from evbus._outbox import PACK_CLOSED, PACK_FULL, PACK_OK, PACK_SLOW, Clock, Outbox
from evbus.errors import InvalidSubjectError, PayloadTooLargeError
from evbus.message import Message

V2 = wire.Dialect.EVBUS_2
V1 = wire.Dialect.H23_199
ENVELOPE = "BBiibbbyy"


class Sink:
    """A transport's sending half: takes what it may and keeps it."""

    def __init__(self, takes: int = 1 << 40) -> None:
        self.takes = takes
        self.got = b""
        self.calls = 0
        self.error: OSError | None = None
        self.during: Callable[[], None] = lambda: None

    def flush(self, ring: Ring) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.during()
        self.got += ring.take(min(self.takes, len(ring)))
        self.takes -= min(self.takes, len(self.got))
        return len(ring)

    def packets(self) -> list[tuple[int, int, int, int, bytes]]:
        ring = Ring()
        ring.write(self.got)
        found = []
        while (packet := next_packet(ring, 23, 1 << 26)) is not None:
            found.append(packet)
        assert len(ring) == 0
        return found


def outbox(dialect: int = V2, *, sink: Sink | None = None, limit: int = 1 << 20, **options: int) -> tuple[Outbox, Sink]:
    sink = sink or Sink()
    box = Outbox(Clock(1000), **options)
    box.attach(sink)
    box.open(dialect, limit)
    assert box.flush(True) == _outbox.FLUSH_DONE  # as the I/O thread does, which is then idle
    return box, sink


class TestOutbox:
    def test_an_event_is_one_version_2_publish(self) -> None:
        box, sink = outbox()
        assert box.pack_event("a.b", b"hello", 1) == PACK_OK
        ((object_id, version, system_id, unix_ms, body),) = sink.packets()
        assert (object_id, version, system_id, unix_ms) == (wire.ObjectId.PUBLISH, 2, 0, 1000)
        assert unpack(body, ENVELOPE, True) == (0, 1, 0, 0, b"", b"a.b", b"", b"", b"hello")

    @pytest.mark.parametrize("headers", [b"", b"\x01k\x01v"])
    def test_a_message_has_all_its_fields(self, headers: bytes) -> None:
        box, sink = outbox()
        fields = {"flags": 4, "codec": 3, "deadline_ms": 77, "task_id": b"t", "query_task_id": b"q"}
        assert box.pack_message(6, b"s", b"data", headers=headers, urgent=True, **fields) == PACK_OK  # type: ignore[arg-type]
        ((object_id, version, _, _, body),) = sink.packets()
        assert (object_id, version) == (6, 2)
        assert unpack(body, ENVELOPE, True) == (4, 3, 0, 77, b"t", b"s", b"q", headers, b"data")

    def test_a_version_1_server_gets_version_1(self) -> None:
        box, sink = outbox(V1)
        assert box.pack_event("s", b"x", 1) == PACK_SLOW
        box.pack_message(4, b"s", b"x", flags=1, codec=3, task_id=b"t", query_task_id=b"q", headers=b"\x01k\x01v")
        box.pack_message(6, b"s", b"y", codec=3, task_id=b"t", deadline_ms=5)
        first, second = sink.packets()
        assert first[:2] == (4, 1)
        assert unpack(first[4], "bbby", True) == (b"t", b"s", b"q", b"x")
        assert second[:2] == (6, 1)
        assert unpack(second[4], "bby", True) == (b"t", b"s", b"y")

    def test_bad_subjects_and_large_payloads_are_refused_before_anything_is_staged(self) -> None:
        box, sink = outbox(limit=10)
        for subject in ("", "a..b", "a.*", ">", "x" * 257, "a\x00b", "\udc80"):
            with pytest.raises(InvalidSubjectError):
                box.pack_event(subject, b"", 1)
        with pytest.raises(TypeError):
            box.pack_event(5, b"", 1)  # type: ignore[arg-type]
        with pytest.raises(PayloadTooLargeError) as caught:
            box.pack_event("s", b"x" * 11, 1)
        assert (caught.value.size, caught.value.limit, caught.value.subject) == (11, 10, "s")
        with pytest.raises(PayloadTooLargeError):
            box.pack_message(4, b"s", b"x" * 11)
        assert sink.got == b""
        assert box.pending_bytes == 0

    def test_many_subjects_are_each_encoded_as_themselves(self) -> None:
        box, sink = outbox()
        subjects = [f"s.{n % 5000}.ü" for n in range(12_000)]
        for subject in subjects:
            box.pack_event(subject, b"", 1)
        box.flush(True)
        assert [unpack(body, ENVELOPE)[5].decode() for *_, body in sink.packets()] == subjects  # type: ignore[index]

    def test_str_subclasses_are_subjects_too(self) -> None:
        class Subject(str):
            __slots__ = ()

        box, sink = outbox()
        box.pack_event(Subject("a"), b"", 1)
        box.pack_event(Subject("b"), b"", 1)
        assert [unpack(body, ENVELOPE)[5] for *_, body in sink.packets()] == [b"a", b"b"]  # type: ignore[index]

    def test_nothing_is_taken_without_a_connection(self) -> None:
        box = Outbox(Clock())
        assert box.pack_event("s", b"", 1) == PACK_SLOW
        assert box.pack_message(4, b"s", b"") == PACK_CLOSED
        assert box.pack_control(b"") == PACK_CLOSED
        assert box.flush(True) == _outbox.FLUSH_CLOSED
        box.attach(Sink())
        assert box.pack_message(4, b"s", b"") == PACK_CLOSED  # no handshake yet
        assert box.pack_control(pack(23, 199, 1, 0, 0, "i", 0)) == PACK_OK

    def test_the_first_packets_of_a_millisecond_go_at_once_and_a_burst_gathers(self) -> None:
        box, sink = outbox()
        wakes: list[int] = []
        box.wake = lambda: wakes.append(1)
        for _ in range(50):
            box.pack_event("s", b"x", 1)
        assert len(wakes) == 1
        assert box.is_polling
        sent = len(sink.packets())
        assert 1 < sent < 10
        # The I/O thread looks after the rest, and then is idle again.
        box.end_polling()
        assert box.flush(True) == _outbox.FLUSH_DONE
        assert len(sink.packets()) == 50

    def test_a_packer_that_has_gathered_enough_sends_it_itself(self) -> None:
        box, sink = outbox(eager_bytes=4096)
        box.wake = lambda: None
        for _ in range(2000):
            box.pack_event("s", b"x" * 50, 1)
            assert box.pending_bytes < 4096 + 200
        assert 2000 * 90 // 4096 - 10 < sink.calls < 2000 * 90 // 4096 + 10

    def test_with_one_thread_urgent_packets_go_with_the_turn_or_by_the_handful(self) -> None:
        box, sink = outbox()
        turns: list[int] = []
        box.wake = lambda: turns.append(1)
        box.gather()
        box.flush(True)
        for number in range(1, 81):
            box.pack_message(6, b"s", b"x", task_id=b"%d" % number, urgent=True)
            assert sink.calls == number // 32
        assert turns == [1, 1, 1]
        box.flush(True)
        assert len(sink.packets()) == 80

    def test_over_the_high_watermark_nothing_is_taken_until_there_is_room(self) -> None:
        box, sink = outbox(sink=Sink(takes=0), high_bytes=10_000, low_bytes=2_000, eager_bytes=1000)
        rooms: list[int] = []
        box.wake = lambda: None
        box.on_room = lambda: rooms.append(1)
        count = 0
        while box.pack_event("s", b"x" * 100, 1) == PACK_OK:
            count += 1
        assert 50 < count < 100
        assert box.pack_message(4, b"s", b"y" * 100) == PACK_FULL
        assert box.is_blocked
        assert box.want_room()
        sink.takes = 3000
        assert box.flush(True) == _outbox.FLUSH_BLOCKED
        assert rooms == []
        sink.takes = 1 << 30
        assert box.flush(True) == _outbox.FLUSH_DONE
        assert rooms == [1]
        assert not box.want_room()
        assert len(sink.packets()) == count

    def test_one_packet_always_finds_room(self) -> None:
        box, sink = outbox(sink=Sink(takes=0), high_bytes=1000, low_bytes=100)
        assert box.pack_event("s", b"x" * 5000, 1) == PACK_OK
        assert box.pack_event("s", b"", 1) == PACK_FULL
        # Control packets pass in any case: they are few, and heartbeats must not wait for room.
        assert box.pack_control(pack(23, 199, 1, 0, 0, "i", 0)) == PACK_OK
        sink.takes = 1 << 30
        box.flush(True)
        assert [packet[0] for packet in sink.packets()] == [4, 199]

    def test_while_the_kernel_takes_nothing_only_the_io_thread_tries(self) -> None:
        box, sink = outbox(sink=Sink(takes=0))
        wakes: list[int] = []
        box.wake = lambda: wakes.append(1)
        box.pack_event("s", b"", 1)
        assert (sink.calls, len(wakes)) == (1, 1)
        box.pack_message(4, b"s", b"", urgent=True)
        assert box.flush(False) == _outbox.FLUSH_BLOCKED
        assert sink.calls == 1
        assert box.flush(True) == _outbox.FLUSH_BLOCKED
        assert sink.calls == 2

    def test_what_is_staged_during_a_flush_is_sent_by_that_flusher(self) -> None:
        box, sink = outbox()

        def during() -> None:
            sink.during = lambda: None
            assert box.flusher_inside
            assert box.flush(False) == _outbox.FLUSH_BUSY
            box.pack_message(4, b"second", b"", urgent=True)

        sink.during = during
        box.pack_message(4, b"first", b"", urgent=True)
        assert [unpack(body, ENVELOPE)[5] for *_, body in sink.packets()] == [b"first", b"second"]  # type: ignore[index]
        assert not box.flusher_inside

    def test_partial_writes_keep_every_byte_in_order(self) -> None:
        rng = random.Random(5)
        box, sink = outbox(sink=Sink(takes=0), eager_bytes=500)
        box.wake = lambda: None
        expected = []
        for _ in range(3000):
            payload = rng.randbytes(rng.randrange(200))
            assert box.pack_event("s", payload, 1) == PACK_OK
            expected.append(payload)
            if rng.random() < 0.5:
                sink.takes = rng.randrange(700)
                box.flush(True)
        sink.takes = 1 << 30
        box.flush(True)
        assert [unpack(body, ENVELOPE)[8] for *_, body in sink.packets()] == expected  # type: ignore[index]

    def test_a_failure_is_kept_for_the_io_thread(self) -> None:
        box, sink = outbox()
        wakes: list[int] = []
        box.wake = lambda: wakes.append(1)
        sink.error = BrokenPipeError(32, "Broken pipe")
        assert box.pack_event("s", b"", 1) == PACK_OK
        assert box.broken is sink.error
        assert wakes == [1]
        assert box.flush(True) == _outbox.FLUSH_CLOSED
        assert box.drop() > 0
        assert box.broken is None

    def test_an_interrupt_inside_the_transport_loses_nothing(self) -> None:
        box, sink = outbox()

        def interrupt() -> None:
            sink.during = lambda: None
            raise KeyboardInterrupt

        sink.during = interrupt
        with pytest.raises(KeyboardInterrupt):
            box.pack_event("s", b"1", 1)
        box.pack_event("s", b"2", 1)
        assert [unpack(body, ENVELOPE)[8] for *_, body in sink.packets()] == [b"1", b"2"]  # type: ignore[index]

    def test_dropping_during_a_flush_leaves_the_new_connection_alone(self) -> None:
        box, old = outbox()
        new = Sink()

        def during() -> None:
            assert box.drop() > 0
            assert box.flusher_inside
            box.attach(new)
            box.open(V2, 100)

        old.during = during
        box.pack_event("s", b"old", 1)
        assert not box.flusher_inside
        assert new.got == b""
        box.flush(True)
        box.pack_event("s", b"new", 1)
        assert [unpack(body, ENVELOPE)[8] for *_, body in new.packets()] == [b"new"]  # type: ignore[index]

    def test_dropping_tells_those_who_wait_for_room(self) -> None:
        box, _ = outbox(sink=Sink(takes=0), high_bytes=1000, low_bytes=10)
        rooms: list[int] = []
        box.on_room = lambda: rooms.append(1)
        while box.pack_event("s", b"x" * 100, 1) == PACK_OK:
            pass
        assert box.want_room()
        box.drop()
        assert rooms == [1]
        assert not box.want_room()

    def test_while_a_query_is_handled_events_take_the_general_way(self) -> None:
        box, _ = outbox()
        box.begin_answering()
        box.begin_answering()
        box.end_answering()
        assert box.is_answering
        assert box.pack_event("s", b"", 1) == PACK_SLOW
        box.end_answering()
        assert box.pack_event("s", b"", 1) == PACK_OK

    def test_fields_over_their_limits_are_our_own_fault(self) -> None:
        box, _ = outbox()
        for fields in ({"task_id": b"x" * 129}, {"query_task_id": b"x" * 129}, {"headers": b"x" * 20_000}):
            with pytest.raises(ValueError, match="limit"):
                box.pack_message(4, b"s", b"", **fields)
        with pytest.raises(ValueError, match="limit"):
            box.pack_message(4, b"s" * 257, b"")
        with pytest.raises(ValueError, match="client"):
            box.pack_message(5, b"s", b"")
        with pytest.raises(ValueError, match="EVBUS_2"):
            box.open(wire.Dialect.H22, 1)

    def test_the_largest_head_fits(self) -> None:
        box, sink = outbox()
        key = ("ü" * 127).encode()
        box.pack_message(4, key, b"p", task_id=b"t" * 128, query_task_id=b"q" * 128, headers=b"\x01k\x01v" * 100)
        ((*_, body),) = sink.packets()
        fields = unpack(body, ENVELOPE, True)
        assert fields is not None
        assert fields[4:] == (b"t" * 128, key, b"q" * 128, b"\x01k\x01v" * 100, b"p")


def test_the_clocks() -> None:
    clock = Clock(5)
    clock.unix_ms = 7
    assert clock.now_ms() == 7
    import time

    assert abs(SystemClock().now_ms() - time.time() * 1000) < 5000


def delivery(
    subject: str | bytes,
    data: bytes = b"",
    *,
    flags: int = 0,
    sid: int = 0,
    task_id: bytes = b"",
    headers: bytes = b"",
    sender: int = 3,
) -> bytes:
    return pack(23, 5, 2, sender, 1234, "BBiisssyy", flags, 1, sid, 0, task_id, subject, "", headers, data)


class Table:
    """Plain subscriptions by subject, and an inbox that asks it."""

    def __init__(self, dialect: int = V2, limit: int = 1 << 20) -> None:
        self.boxes: dict[bytes, tuple[Mailbox, ...]] = {}
        self.asked: list[bytes] = []
        self.inbox = Inbox(self.match)
        self.inbox.answerer = self
        if dialect:
            self.inbox.open(dialect, limit)

    def match(self, key: bytes) -> tuple[tuple[Mailbox, ...], tuple[Mailbox, ...]]:
        self.asked.append(key)
        found = self.boxes.get(key, ())
        return found, found

    def reply(self, message: Message, value: object, headers: object) -> None: ...
    def fail(self, message: Message, code: int, text: str) -> None: ...

    def add(self, subject: str, sid: int, **options: int) -> Mailbox:
        box = Mailbox(subject, sid, **options)
        self.inbox.add_mailbox(box)
        key = subject.encode()
        self.boxes[key] = (*self.boxes.get(key, ()), box)
        return box

    def feed(self, data: bytes) -> list[tuple[int, int, int, int, bytes]]:
        self.inbox.ring.write(data)
        return self.inbox.receive()


def everything(box: Mailbox) -> list[Message]:
    found: list[Message] = []
    batch = None
    while (batch := box.take(batch)) is not None:
        found += batch
    return found


def in_order(box: Mailbox) -> list[object]:
    """What waits: payloads' first bytes, and gaps as (count, reason)."""
    found: list[object] = []
    batch = None
    while (batch := box.take(batch)) is not None:
        gaps = batch.take_gaps()
        assert batch.take_gaps() == []
        assert batch.plain <= (not gaps)
        found += gaps
        found += [message.data[:4] for message in batch]
    return found


def gap(sid: int, count: int, reason: int = 1) -> bytes:
    return pack(23, wire.ObjectId.GAP, 1, 0, 0, "iqB", sid, count, reason)


class TestInbox:
    def test_deliveries_find_the_mailboxes_of_their_subject(self) -> None:
        table = Table()
        first, second, other = table.add("a", 1), table.add("a", 2), table.add("b", 3)
        assert table.feed(delivery("a", b"1") + delivery("b", b"2") + delivery("a", b"3") + delivery("c", b"4")) == []
        assert [message.data for message in everything(first)] == [b"1", b"3"]
        assert [message.data for message in everything(second)] == [b"1", b"3"]
        assert [message.data for message in everything(other)] == [b"2"]
        assert table.inbox.unmatched == 1
        assert table.inbox.received_msgs == 3

    def test_each_subject_is_looked_up_once_until_subscriptions_change(self) -> None:
        table = Table()
        table.add("a", 1)
        table.feed((delivery("a") + delivery("b")) * 10)
        assert table.asked == [b"a", b"b"]
        box = table.add("b", 2)
        table.feed(delivery("b") + delivery("a"))
        assert table.asked == [b"a", b"b", b"b", b"a"]
        assert len(everything(box)) == 1
        table.inbox.remove_mailbox(box)
        table.feed(delivery("b"))
        assert table.asked[-1] == b"b"

    def test_a_change_during_the_look_up_is_not_overwritten_by_it(self) -> None:
        table = Table()
        box = table.add("a", 1)
        answers = [((), ()), ((box,), (box,))]

        def match(key: bytes) -> tuple[tuple[Mailbox, ...], tuple[Mailbox, ...]]:
            if len(answers) == 2:
                inbox.forget_routes()  # as another thread would
            return answers.pop(0)

        inbox = Inbox(match)
        inbox.open(V2, 1 << 20)
        inbox.ring.write(delivery("a") * 2)
        inbox.receive()
        assert len(everything(box)) == 1

    def test_more_subjects_than_are_remembered(self) -> None:
        table = Table()
        box = table.add("s.7", 1)
        table.feed(b"".join(delivery(f"s.{n}") for n in range(10_000)) + delivery("s.7"))
        assert len(everything(box)) == 2

    def test_a_named_subscription_alone_gets_its_delivery(self) -> None:
        table = Table()
        plain, member = table.add("a", 1), Mailbox("group", 9)
        table.inbox.add_mailbox(member)
        table.feed(delivery("a", sid=9) + delivery("a", sid=77))
        assert everything(plain) == []
        assert [message.subject for message in everything(member)] == ["a"]
        assert table.inbox.unmatched == 1

    def test_an_answer_goes_to_its_waiter(self) -> None:
        table = Table()
        box = table.add("a", 1)
        done: list[int] = []
        waiter = Waiter(b"q1", "a", "query", lambda: done.append(1))
        table.inbox.add_waiter(waiter)
        assert table.inbox.find_waiter(b"q1") is waiter
        table.feed(delivery("a", b"x", flags=wire.Flag.ANSWER, task_id=b"q1") * 2)
        assert waiter.done
        assert waiter.result().data == b"x"
        assert waiter.result().sender == 3
        assert done == [1]
        assert table.inbox.late_answers == 1
        assert table.inbox.waiting == 0
        assert everything(box) == []

    def test_version_1_tells_answers_by_their_id_and_queries_by_a_flag(self) -> None:
        table = Table(V1)
        box = table.add("a", 1)
        waiter = Waiter(b"q1", "a", "query")
        table.inbox.add_waiter(waiter)

        def v1(task_id: bytes, is_query: int, data: bytes) -> bytes:
            # The SystemId is a time there, and names nobody.
            return pack(23, 5, 1, 638_000_000_000_000_000, 1_500, "ssBy", task_id, "a", is_query, data)

        table.feed(
            v1(b"q1", 1, b"asked ourselves") + v1(b"q1", 0, b"answer") + v1(b"q1", 0, b"event") + v1(b"", 0, b"")
        )
        assert waiter.result().data == b"answer"
        messages = everything(box)
        assert [message.data for message in messages] == [b"asked ourselves", b"event", b""]
        assert [message.is_query for message in messages] == [True, False, False]
        assert {message.codec for message in messages} == {0}
        assert {(message.sender, message.timestamp) for message in [*messages, waiter.result()]} == {(0, 1.5)}

    def test_only_deliveries_of_the_connections_version_count(self) -> None:
        v1 = pack(23, 5, 1, 0, 0, "ssBy", "", "a", 0, b"")
        for dialect, foreign in ((V2, v1), (V1, delivery("a"))):
            table = Table(dialect)
            box = table.add("a", 1)
            assert table.feed(foreign) == []
            assert table.inbox.unknown == 1
            assert everything(box) == []

    def test_before_the_handshake_control_packets_come_one_by_one_and_nothing_else(self) -> None:
        table = Table(0)
        box = table.add("a", 1)
        response = pack(23, 254, 1, 0, 0, "sBs", "t", 1, "")
        controls = table.feed(delivery("a") + response + response + delivery("a", b"after"))
        assert [control[0] for control in controls] == [254]
        table.inbox.open(V2, 1 << 20)
        assert [control[0] for control in table.inbox.receive()] == [254]
        assert [message.data for message in everything(box)] == [b"after"]

    def test_control_packets_keep_their_order_and_unknown_ones_are_counted(self) -> None:
        table = Table()
        ids = [254, 199, 1000, 1003, 1005, 1001]
        data = b"".join(pack(23, number, 1, 5, 6, "i", 0) for number in ids)
        skipped = b"".join(pack(23, number, version, 0, 0, "i", 0) for number, version in ((1, 1), (254, 2), (7000, 1)))
        controls = table.feed(data + skipped)
        assert [control[0] for control in controls] == ids
        assert controls[0] == (254, 1, 5, 6, b"\0\0\0\0")
        assert table.inbox.unknown == 3

    def test_hostile_sizes_end_it(self) -> None:
        for size in (0, 22, (1 << 20) + 1, 2**31 - 1, 2**31, 2**32 - 1):
            table = Table()
            good = pack(23, 199, 1, 0, 0, "i", 0)
            assert len(table.feed(good + struct.pack("<I", size))) == 1
            assert table.inbox.fault is not None
            assert "claims" in str(table.inbox.fault)
            assert table.feed(good) == []
            table.inbox.start(100)
            assert table.inbox.fault is None
            assert len(table.feed(good)) == 1

    def test_malformed_deliveries_are_counted_and_skipped(self) -> None:
        good = delivery("a", b"x" * 20, headers=b"\x01k\x01v", task_id=b"id")
        rng = random.Random(1)
        table = Table()
        box = table.add("a", 1)
        for cut in range(23, len(good)):
            table.feed(struct.pack("<I", cut) + good[4:cut])
        assert table.inbox.malformed == len(good) - 23
        for _ in range(2000):
            broken = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                broken[rng.randrange(12, len(broken))] = rng.randrange(256)
            table.feed(bytes(broken))
            assert table.inbox.fault is None
        long_subject = delivery("x" * 300)
        before = table.inbox.malformed
        table.feed(long_subject)
        assert table.inbox.malformed == before + 1
        everything(box)
        table.feed(good)
        assert [message.data for message in everything(box)] == [b"x" * 20]

    def test_subjects_that_are_no_utf8_do_no_harm(self) -> None:
        table = Table()
        box = Mailbox("x", 1)
        table.boxes[b"\xff\xfe"] = (box,)
        table.feed(delivery(b"\xff\xfe") * 2)
        assert [message.subject for message in everything(box)] == ["\ufffd\ufffd"] * 2

    def test_packets_cut_anywhere(self) -> None:
        rng = random.Random(2)
        data = b"".join(delivery("a", str(n).encode()) for n in range(300))
        for _ in range(20):
            table = Table()
            box = table.add("a", 1)
            at = 0
            while at < len(data):
                size = rng.choice((1, 3, 22, 23, 24, 100, 1000))
                table.feed(data[at : at + size])
                at += size
            assert [message.data for message in everything(box)] == [str(n).encode() for n in range(300)]
            assert len(table.inbox.ring) == 0
            assert table.inbox.ring.capacity == 0

    def test_a_subscription_id_is_used_once(self) -> None:
        table = Table()
        table.add("a", 1)
        with pytest.raises(ValueError, match="taken"):
            table.inbox.add_mailbox(Mailbox("b", 1))
        table.inbox.remove_mailbox(Mailbox("never there", 2))

    def test_taking_all_waiters(self) -> None:
        inbox = Inbox(lambda key: ((), ()))
        waiters = [Waiter(b"%d" % n) for n in range(3)]
        for waiter in waiters:
            inbox.add_waiter(waiter)
        assert inbox.take_waiters() == waiters
        assert inbox.waiting == 0
        assert inbox.pop_waiter(b"1") is None


class TestWaiter:
    def test_the_first_outcome_counts(self) -> None:
        notes: list[int] = []
        waiter = Waiter(b"t", "s", "query", lambda: notes.append(1))
        assert waiter.fail(ValueError("first"))
        assert not waiter.resolve(5)
        assert not waiter.push(5)
        assert notes == [1]
        with pytest.raises(ValueError, match="first"):
            waiter.result()

    def test_many_replies_until_the_end(self) -> None:
        notes: list[int] = []
        waiter = Waiter(b"t", "s", "query", lambda: notes.append(1), True)
        assert waiter.push("a")
        assert waiter.push("b")
        assert not waiter.done
        assert waiter.take_replies() == ["a", "b"]
        assert waiter.take_replies() == []
        assert waiter.resolve(None)
        assert not waiter.push("late")
        assert len(notes) == 3


class TestMailbox:
    def fill(self, table: Table, count: int, size: int = 10) -> None:
        table.feed(b"".join(delivery("a", b"%04d" % n + b"x" * (size - 4)) for n in range(count)))

    def test_one_worker_at_a_time_is_called(self) -> None:
        table = Table()
        box = table.add("a", 1)
        self.fill(table, 3)
        assert table.inbox.take_ready() == [box]
        self.fill(table, 3)
        assert table.inbox.take_ready() == []
        assert len(everything(box)) == 6
        assert box.is_idle
        self.fill(table, 1)
        assert table.inbox.take_ready() == [box]

    def test_with_concurrency_each_worker_gets_one_message_at_a_time(self) -> None:
        table = Table()
        box = table.add("a", 1, concurrency=3)
        self.fill(table, 5)
        assert table.inbox.take_ready() == [box] * 3
        batches = [box.take() for _ in range(3)]
        assert [[message.data[:4] for message in batch] for batch in batches if batch is not None] == [
            [b"0000"],
            [b"0001"],
            [b"0002"],
        ]
        fourth, fifth = box.take(batches[1]), box.take(batches[0])
        assert box.take(batches[2]) is None
        assert box.take(fourth) is None
        assert fifth is not None
        assert not box.is_idle
        assert box.take(fifth) is None
        assert box.is_idle

    def test_accounting(self) -> None:
        table = Table()
        box = table.add("a", 1)
        self.fill(table, 3000)
        assert (box.received, box.pending_msgs, box.pending_bytes) == (3000, 3000, 30_000)
        batch = box.take()
        assert batch is not None
        assert len(batch) < 3000
        assert batch.plain
        next(batch)
        assert box.pending_msgs == 2999
        list(batch)
        rest = box.take(batch)
        assert box.handled == 3000 - len(rest or [])
        assert len(list(rest or [])) == box.pending_msgs or box.pending_msgs == 0
        assert box.take(rest) is None
        assert (box.handled, box.pending_msgs, box.pending_bytes) == (3000, 0, 0)

    def test_clearing_counts_exactly(self) -> None:
        table = Table()
        box = table.add("a", 1)
        self.fill(table, 5000)
        batch = box.take()
        assert batch is not None
        for _ in range(10):
            next(batch)
        assert box.clear() == 4990
        assert list(batch) == []
        assert box.take(batch) is None
        assert (box.handled, box.discarded, box.dropped) == (10, 4990, 0)
        self.fill(table, 3)
        assert box.dropped == 3
        assert box.is_idle

    def test_close_ends_it_but_what_waits_can_be_taken(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=10)
        self.fill(table, 15)
        assert table.inbox.take_overflows() == [box]
        assert table.inbox.take_overflows() == []
        assert box.overflowed
        assert box.is_ended
        assert box.dropped == 5
        assert len(everything(box)) == 10

    def test_messages_at_work_do_not_count_against_the_limit(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=10)
        self.fill(table, 10)
        batch = box.take()
        assert batch is not None
        for _ in range(4):
            next(batch)
        self.fill(table, 4)
        assert not box.overflowed
        self.fill(table, 1)
        assert box.overflowed

    def test_bytes_are_limited_but_one_message_always_fits(self) -> None:
        table = Table()
        box = table.add("a", 1, max_bytes=100, overflow=_mailbox.OVERFLOW_DROP_NEWEST)
        self.fill(table, 1, size=500)
        assert box.pending_msgs == 1
        everything(box)
        self.fill(table, 12, size=10)
        assert (box.pending_msgs, box.dropped) == (10, 2)
        assert [message.data[:4] for message in everything(box)] == [b"%04d" % n for n in range(10)]

    def test_drop_oldest_keeps_the_newest(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=10, overflow=_mailbox.OVERFLOW_DROP_OLDEST)
        self.fill(table, 25)
        assert (box.pending_msgs, box.dropped, box.received) == (10, 15, 25)
        assert [message.data[:4] for message in everything(box)] == [b"%04d" % n for n in range(15, 25)]
        assert not box.overflowed

    def test_drop_oldest_leaves_what_workers_have(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=10, overflow=_mailbox.OVERFLOW_DROP_OLDEST)
        self.fill(table, 10)
        batch = box.take()
        self.fill(table, 3)
        assert box.dropped == 3
        assert batch is not None
        assert len(batch) == 10
        everything(box)

    def test_a_gap_waits_in_its_place(self) -> None:
        table = Table()
        box = table.add("a", 1)
        assert table.feed(delivery("a", b"1") + gap(1, 5) + delivery("a", b"2") + delivery("a", b"3") + gap(1, 2)) == []
        assert table.inbox.take_ready() == [box]
        assert in_order(box) == [b"1", (5, "overflow"), b"2", b"3", (2, "overflow")]
        assert (box.missed, box.handled, box.received, box.is_idle) == (7, 3, 3, True)

    def test_a_gap_alone_wants_a_worker(self) -> None:
        table = Table()
        box = table.add("a", 1)
        table.inbox.put_gap(box, None, "reconnect")
        assert table.inbox.take_ready() == [box]
        assert not box.is_idle
        assert in_order(box) == [(None, "reconnect")]
        assert box.is_idle
        assert box.missed == 0

    def test_gaps_with_nothing_between_them_become_one(self) -> None:
        table = Table()
        box = table.add("a", 1)
        table.feed(gap(1, 5) + gap(1, 6) + gap(1, 3, 2) + gap(1, 1))
        table.inbox.put_gap(box, None, "overflow")
        table.feed(delivery("a", b"1"))
        assert in_order(box) == [(11, "overflow"), (3, "reconnect"), (None, "overflow"), b"1"]
        assert box.missed == 15

    def test_gaps_that_concern_nobody_are_counted(self) -> None:
        table = Table()
        box = table.add("a", 1)
        table.feed(gap(7, 5) + gap(7, -1) + pack(23, wire.ObjectId.GAP, 1, 0, 0, "iq", 1, 1))
        assert (table.inbox.missed_late, table.inbox.malformed, box.missed) == (5, 1, 0)
        box.end()
        table.inbox.put_gap(box, 3, "overflow")
        assert table.inbox.take_ready() == []
        assert box.missed == 0

    def test_drop_newest_leaves_a_gap_where_the_messages_were(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=3, overflow=_mailbox.OVERFLOW_DROP_NEWEST)
        self.fill(table, 5)
        assert in_order(box) == [b"0000", b"0001", b"0002", (2, "overflow")]
        self.fill(table, 1)
        assert in_order(box) == [b"0000"]
        assert (box.missed, box.dropped, box.received) == (2, 2, 4)

    def test_drop_oldest_leaves_a_gap_before_the_oldest_that_is_left(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=3, overflow=_mailbox.OVERFLOW_DROP_OLDEST)
        self.fill(table, 2)
        table.feed(gap(1, 10, 2))
        self.fill(table, 2)
        assert in_order(box) == [(1, "overflow"), b"0001", (10, "reconnect"), b"0000", b"0001"]
        self.fill(table, 1)
        table.feed(gap(1, 10, 2) + gap(1, 5))
        self.fill(table, 4)
        assert in_order(box) == [(1, "overflow"), (10, "reconnect"), (6, "overflow"), b"0001", b"0002", b"0003"]
        assert (box.missed, box.dropped, box.pending_msgs, box.pending_bytes) == (28, 3, 0, 0)

    def test_drop_oldest_one_message_per_batch(self) -> None:
        table = Table()
        box = table.add("a", 1, max_msgs=3, overflow=_mailbox.OVERFLOW_DROP_OLDEST, concurrency=2)
        self.fill(table, 9)
        first = box.take()
        assert first is not None
        assert first.take_gaps() == [(6, "overflow")]
        assert [message.data[:4] for message in (box.take() or [])] == [b"0006"]

    def test_clearing_takes_the_gaps_too(self) -> None:
        table = Table()
        box = table.add("a", 1)
        table.feed(gap(1, 5) + delivery("a"))
        batch = box.take()
        table.feed(gap(1, 5))
        assert box.clear() == 1
        assert batch is not None
        assert batch.take_gaps() == []
        assert box.take(batch) is None

    def test_queries_make_a_batch_one_to_look_at(self) -> None:
        table = Table()
        box = table.add("a", 1)
        table.feed(delivery("a") + delivery("a", flags=wire.Flag.QUERY, task_id=b"q"))
        batch = box.take()
        assert batch is not None
        assert not batch.plain


def test_no_references_leak() -> None:
    import gc
    import sys

    box, sink = outbox()
    table = Table()
    mailbox = table.add("a", 1)
    payload = b"payload that is long enough not to be shared"
    subject = "a.subject.of.its.own"
    box.pack_event(subject, payload, 1)
    before = sys.getrefcount(payload), sys.getrefcount(subject)
    for _ in range(1000):
        box.pack_event(subject, payload, 1)
        box.pack_message(4, b"k", payload, urgent=True)
        table.feed(delivery("a", payload) * 3)
        everything(mailbox)
        sink.got = b""
    assert (sys.getrefcount(payload), sys.getrefcount(subject)) == before
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, _inbox.Waiter) and found.task_id == b"leak"]
