"""The short way of a query, and the time limits of many queries with one timer."""

from __future__ import annotations

import asyncio

import pytest

from evbus._asking import Asker
from evbus._frame import Ring, next_packet, unpack
from evbus._inbox import Inbox, Waiter
from evbus._outbox import Clock, Outbox
from evbus._wake import Resume
from evbus.aio_loop import Deadlines
from evbus.errors import InvalidSubjectError
from evbus.wire import Dialect, ObjectId


class Sink:
    def __init__(self) -> None:
        self.ring = Ring()

    def flush(self, ring: Ring) -> int:
        self.ring.write(ring.take())
        return 0


@pytest.fixture
def asked() -> tuple[Asker, Inbox, Outbox, Sink]:
    outbox, sink = Outbox(Clock(7), high_bytes=1000, low_bytes=100), Sink()
    inbox = Inbox(lambda _: ((), ()))
    outbox.attach(sink)
    outbox.open(Dialect.EVBUS_2, 500)
    asker = Asker(inbox, outbox)
    asker.prefix = "0a1b2c3d"
    return asker, inbox, outbox, sink


def test_a_query_is_asked_in_one_step(asked: tuple[Asker, Inbox, Outbox, Sink]) -> None:
    asker, inbox, outbox, sink = asked
    outcomes: list[int] = []
    waiter = asker.ask("a.b", 1, b"payload", 2.5, 2501, lambda: outcomes.append(1))
    assert waiter is not None
    assert (waiter.task_id, waiter.subject, waiter.action, waiter.timeout) == (b"0a1b2c3dq1", "a.b", "query", 2.5)
    assert inbox.find_waiter(b"0a1b2c3dq1") is waiter
    packet = next_packet(sink.ring, 23, 1 << 20)
    assert packet is not None
    assert packet[:2] == (ObjectId.QUERY, 2)
    assert unpack(packet[4], "BBBBBBiss") is not None
    assert packet[4].endswith(b"payload")
    assert outbox.packed_msgs == 1
    assert waiter.resolve("answer")
    assert not waiter.resolve("again")
    assert (waiter.result(), outcomes) == ("answer", [1])
    other = asker.ask("a.b", 1, b"", 1.0, 1001, None)
    assert other is not None
    assert other.task_id == b"0a1b2c3dq2"


def test_what_needs_the_long_way(asked: tuple[Asker, Inbox, Outbox, Sink]) -> None:
    asker, inbox, outbox, _ = asked
    assert asker.ask("a", 1, b"x" * 501, 1.0, 1, None) is None  # above the server's limit
    with pytest.raises(InvalidSubjectError):
        asker.ask("a..b", 1, b"", 1.0, 1, None)
    with pytest.raises(ValueError, match="eight"):
        asker.prefix = "short"
    outbox.close()
    assert asker.ask("a", 1, b"", 1.0, 1, None) is None  # no connection
    assert inbox.waiting == 0


def test_a_full_buffer_needs_the_long_way() -> None:
    outbox, inbox = Outbox(Clock(7), high_bytes=1000), Inbox(lambda _: ((), ()))

    class Stuck:
        def flush(self, ring: Ring) -> int:
            return len(ring)

    outbox.attach(Stuck())
    outbox.open(Dialect.EVBUS_2, 500)
    asker = Asker(inbox, outbox)
    asked = 0
    while asker.ask("a", 1, b"x" * 100, 1.0, 1, None) is not None:
        asked += 1
    assert 5 <= asked <= 10
    assert inbox.waiting == asked


def test_resuming_a_coroutine() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        resume = Resume(future)
        resume()
        resume()  # once is enough
        await future

    asyncio.run(main())


class FakeLoop(asyncio.SelectorEventLoop):
    """Time stands still unless it is moved."""

    moment = 0.0

    def time(self) -> float:
        return self.moment

    def until(self, moment: float) -> None:
        self.moment = moment
        self.call_soon(self.stop)
        self.run_forever()
        self.call_soon(self.stop)
        self.run_forever()


class TestDeadlines:
    def test_each_runs_out_at_its_time(self) -> None:
        loop, expired = FakeLoop(), []
        deadlines = Deadlines(lambda waiter, seconds: expired.append((waiter.task_id, seconds)))
        waiters = {name: Waiter(name) for name in (b"long", b"short", b"mid", b"answered")}
        deadlines.add(loop, 5.0, waiters[b"long"])
        deadlines.add(loop, 1.0, waiters[b"answered"])
        deadlines.add(loop, 1.0, waiters[b"short"])
        loop.until(0.5)
        waiters[b"answered"].resolve()
        deadlines.add(loop, 1.0, waiters[b"mid"])
        loop.until(0.99)
        assert expired == []
        loop.until(1.0)
        assert expired == [(b"short", 1.0)]
        loop.until(1.5)
        assert expired == [(b"short", 1.0), (b"mid", 1.0)]
        loop.until(5.0)
        assert expired[2:] == [(b"long", 5.0)]
        deadlines.add(loop, 1.0, Waiter(b"later"))
        loop.until(6.0)
        assert expired[3:] == [(b"later", 1.0)]
        loop.close()

    def test_what_has_ended_is_not_kept(self) -> None:
        loop = FakeLoop()
        deadlines = Deadlines(lambda waiter, seconds: None)
        for _ in range(100):
            waiter = Waiter(b"x")
            deadlines.add(loop, 3.0, waiter)
            waiter.resolve(b"large")
        assert len(deadlines._queues[3.0]) == 1
        deadlines.add(loop, 3.0, Waiter(b"takes its time"))
        for _ in range(100_000):
            waiter = Waiter(b"x")
            deadlines.add(loop, 3.0, waiter)
            waiter.resolve()
        assert len(deadlines._queues[3.0]) <= 2048
        loop.close()
