"""R25: whatever a handler does, no thread dies, nothing locks up, each failure is told once, and nobody else waits."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers_rows import Row, summary_ms
from scenario_bus import AsyncStage, PlainStage, Stage

from evbus import Message, SlowConsumerError
from evbus.testing import ServerBus

KINDS = [PlainStage, AsyncStage]
RAISES = 200


class Fatal(BaseException):
    """No Exception, so what `except Exception` does not catch."""


@pytest.fixture(params=KINDS, ids=["plain", "asyncio"])
def stage(request: pytest.FixtureRequest) -> Any:
    with ServerBus() as bus:
        yield request.param(bus)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    return Row(
        record_property,
        "R25",
        "handlers raise, block, call from inside: no thread death, no deadlock, errors = raises, others <= 100 ms",
    )


@pytest.mark.parametrize("error", [LookupError, Fatal, SlowConsumerError], ids=lambda error: error.__name__)
def test_handlers_that_raise(stage: Stage, row: Row, error: type[BaseException]) -> None:
    async def scenario(bus: Stage) -> None:
        errors, log = bus.log(), bus.log()
        client = await bus.client(on_error=errors)

        async def careless(number: int) -> None:
            if number % 2:
                raise error(str(number))
            log(number)

        def plain(number: int) -> None:
            raise error(str(number))

        await client.subscribe("n", careless)
        await client.subscribe("n", plain)
        for number in range(2 * RAISES):
            await client.publish("n", number)
        assert await log.take(RAISES) == list(range(0, 2 * RAISES, 2))
        told = await errors.take(3 * RAISES)
        await bus.idle()
        assert len(errors.items) == 3 * RAISES == client.stats().handler_errors
        assert {type(one) for one, _ in told} == {error}
        row.measured(f"{type(bus).__name__}: {3 * RAISES} x {error.__name__}, {len(errors.items)} told")

    stage.run(scenario)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit], ids=lambda error: error.__name__)
def test_what_would_end_a_thread(row: Row, error: type[BaseException]) -> None:
    """Of the blocking client; on an asyncio loop these end the program, as from any task."""

    async def scenario(bus: Stage) -> None:
        errors, log = bus.log(), bus.log()
        client = await bus.client(on_error=errors)

        def careless(number: int) -> None:
            if number % 2:
                raise error
            log(number)

        await client.subscribe("n", careless)
        client.on_query("q")(careless_answer := lambda message: careless(1))
        assert callable(careless_answer)
        for number in range(2 * RAISES):
            await client.publish("n", number)
        assert await log.take(RAISES) == list(range(0, 2 * RAISES, 2))
        with pytest.raises(Exception, match=error.__name__):
            await client.query("q")
        assert len(await errors.take(RAISES + 1)) == client.stats().handler_errors
        row.measured(f"PlainStage: {RAISES + 1} x {error.__name__}, {len(errors.items)} told")

    with ServerBus() as bus:
        PlainStage(bus).run(scenario)


def test_a_blocked_handler_and_the_others(stage: Stage, row: Row) -> None:
    async def scenario(bus: Stage) -> None:
        client, begun, release, log = await bus.client(), bus.log(), bus.event(), bus.log()

        async def blocked(message: Message) -> None:
            begun(message)
            await release.wait()

        for number in range(8):
            await client.subscribe(f"slow.{number}", blocked)
        await client.subscribe("fast", log)
        client.on_query("ask")(lambda message: 1)
        await client.flush()
        for number in range(8):
            await client.publish(f"slow.{number}")
        await begun.take(8)
        events, answers = [], []
        for _ in range(50):
            at = time.perf_counter()
            await client.publish("fast")
            await log.next()
            events.append(time.perf_counter() - at)
            at = time.perf_counter()
            assert await client.query("ask") == 1
            answers.append(time.perf_counter() - at)
        release.set()
        row.measured(
            f"{type(bus).__name__}, 8 handlers blocked: events {summary_ms(events)}; answers {summary_ms(answers)}"
        )
        # The median: what a busy machine does to single ones is not the client's doing.
        assert statistics.median(events) <= 0.1
        assert statistics.median(answers) <= 0.1

    stage.run(scenario)


@pytest.mark.full
def test_a_handler_that_blocks_for_5_s(row: Row) -> None:
    """In a system call, as real ones do; of the blocking client (a plain handler blocks asyncio's loop by nature)."""

    async def scenario(bus: Stage) -> None:
        client, begun, ended, log = await bus.client(heartbeat=0.5), bus.event(), bus.event(), bus.log()

        def blocked(message: Message) -> None:
            begun.set()
            time.sleep(5.0)
            ended.set()

        await client.subscribe("slow", blocked)
        await client.subscribe("fast", log)
        await client.publish("slow")
        await begun.wait()
        took: list[float] = []
        until = time.monotonic() + 4.5
        while time.monotonic() < until:
            at = time.perf_counter()
            await client.publish("fast")
            await log.next()
            took.append(time.perf_counter() - at)
            time.sleep(0.01)  # noqa: ASYNC251 - a rate of messages, not a wait for something
        await ended.wait()
        row.measured(f"PlainStage, 5 s: {summary_ms(took)}")
        assert max(took) <= 0.1
        assert client.stats().connects == 1

    with ServerBus() as bus:
        PlainStage(bus).run(scenario)


def test_everything_from_inside_a_handler(stage: Stage, row: Row) -> None:
    async def scenario(bus: Stage) -> None:
        client, done, late = await bus.client(), bus.log(), bus.log()
        client.on_query("echo", type=int)(lambda number: number)
        subscriptions: list[Any] = []

        async def busy(number: int) -> None:
            await client.publish("late", number)
            await client.publish("late", number, confirm=True)
            assert await client.query("echo", number, int) == number
            assert await client.rtt() > 0
            await client.flush()
            inner = await client.subscribe("inner", late)
            await client.publish("inner", b"")
            await client.unsubscribe(inner)
            if number == 19:
                await client.unsubscribe(subscriptions[0])  # itself
            done(number)

        await client.subscribe("late", late, type=int)
        subscriptions.append(await client.subscribe("busy", busy))
        for number in range(20):
            await client.publish("busy", number)
        assert await done.take(20) == list(range(20))
        assert not subscriptions[0].is_active
        closed = bus.event()

        async def closing(message: Message) -> None:
            await client.disconnect()
            closed.set()

        await client.subscribe("close", closing)
        await client.publish("close")
        await closed.wait()
        row.measured(f"{type(bus).__name__}: publish, query, rtt, flush, subscribe, unsubscribe, close from inside")

    stage.run(scenario)


def test_queries_within_queries(stage: Stage, row: Row) -> None:
    async def scenario(bus: Stage) -> None:
        client = await bus.client()
        depth = 10

        def level(number: int) -> Callable[..., Any]:
            async def answer(message: Message) -> int:
                return 1 if number == 0 else 1 + await client.query(f"level.{number - 1}", None, int)

            return answer

        for number in range(depth):
            client.on_query(f"level.{number}")(level(number))
        await client.flush()
        for _ in range(20):
            assert await client.query(f"level.{depth - 1}", None, int) == depth
        row.measured(f"{type(bus).__name__}: {depth} deep, 20 times")

    stage.run(scenario)


def test_no_thread_is_left(row: Row) -> None:
    before = set(threading.enumerate())

    async def scenario(bus: Stage) -> None:
        client, errors = await bus.client(), bus.log()

        def careless(message: Message) -> None:
            errors(message)
            raise Fatal

        for _ in range(10):
            await client.subscribe("a", careless)
        await client.publish("a")
        await errors.take(10)

    with ServerBus() as bus:
        PlainStage(bus).run(scenario)
    deadline = time.monotonic() + 10
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        next(iter(left)).join(0.05)
    row.measured("PlainStage: no thread left")
