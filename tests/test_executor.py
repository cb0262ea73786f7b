"""`AsyncEventClient(executor=...)`: plain handlers off the loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

from evbus import AsyncEventClient, EvbusError, EventServer, Message, RemoteError, Unfinished

WAIT = 10.0


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4, thread_name_prefix="mine") as executor:
        yield executor


Scenario = Callable[[AsyncEventClient], Coroutine[Any, Any, None]]


def run(server: EventServer, executor: Executor, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        async with AsyncEventClient(port=server.port, executor=executor, **options) as bus:
            await asyncio.wait_for(scenario(bus), WAIT)

    asyncio.run(main(), debug=True)


def on_mine() -> bool:
    return threading.current_thread().name.startswith("mine")


def test_plain_handlers_run_there_in_order_and_the_loop_goes_on(server: EventServer, executor: Executor) -> None:
    gate = threading.Event()
    seen: list[int] = []
    elsewhere: list[bool] = []
    on_loop: list[bool] = []

    async def scenario(bus: AsyncEventClient) -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        @bus.on("s")
        def plain(number: int) -> None:
            assert gate.wait(WAIT)
            seen.append(number)
            elsewhere.append(on_mine())
            if number == 2999:
                loop.call_soon_threadsafe(done.set)

        @bus.on("s")
        async def coroutine(number: int) -> None:
            on_loop.append(not on_mine())
            if number == 2999:
                gate.set()  # it was not held up by the other

        await bus.flush()
        await bus.publish_many("s", range(3000))
        await done.wait()

    run(server, executor, scenario)
    assert seen == list(range(3000))
    assert all(elsewhere)
    assert len(on_loop) == 3000
    assert all(on_loop)


def test_queries(server: EventServer, executor: Executor) -> None:
    async def scenario(bus: AsyncEventClient) -> None:
        loop = asyncio.get_running_loop()

        @bus.on_query("double")
        def double(number: int) -> int:
            assert on_mine()
            return number * 2

        @bus.on_query("fail")
        def fail(_: Message) -> None:
            raise ValueError("no")

        @bus.on_query("stop")
        def stop(_: Message) -> None:
            raise StopIteration

        @bus.on_query("reply")
        def reply(message: Message) -> None:
            message.reply("x" * 300_000)
            with pytest.raises(EvbusError, match="answered already"):
                message.reply("y")

        @bus.on_query("own")
        def own(message: Message) -> None:
            message.fail(7, "no reason")

        @bus.on("mixed")
        def by_publishing(message: Message) -> None:
            if message.is_query:
                asyncio.run_coroutine_threadsafe(bus.publish("mixed", "published"), loop).result(WAIT)

        await bus.flush()
        assert await asyncio.gather(*(bus.query("double", n, int) for n in range(50))) == [n * 2 for n in range(50)]
        for subject, code in (("fail", 500), ("stop", 500), ("own", 7)):
            with pytest.raises(RemoteError) as caught:
                await bus.query(subject)
            assert caught.value.code == code
        assert await bus.query("reply", response=str) == "x" * 300_000
        await bus.publish("mixed", "an event, too")
        assert await bus.query("mixed", response=str) == "published"

    run(server, executor, scenario)


def test_errors_are_told_on_the_loop(server: EventServer, executor: Executor) -> None:
    told: list[tuple[str, bool]] = []

    async def scenario(bus: AsyncEventClient) -> None:
        @bus.on("s")
        def fail(message: Message) -> None:
            raise SystemExit if message.data == b"exit" else ValueError("no")

        await bus.flush()
        await bus.publish_many("s", [b"1", b"exit", b"2"])
        while len(told) < 3:  # noqa: ASYNC110 - told from on_error
            await asyncio.sleep(0.001)
        assert bus.stats().handler_errors == 3

    run(server, executor, scenario, on_error=lambda error, _: told.append((type(error).__name__, on_mine())))
    assert told == [("ValueError", False), ("SystemExit", False), ("ValueError", False)]


def test_context_variables_go_along(server: EventServer, executor: Executor) -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")

    async def main() -> None:
        who.set("somebody")
        async with AsyncEventClient(port=server.port, executor=executor) as bus:
            bus.on_query("who")(lambda _: who.get())
            await bus.flush()
            assert await bus.query("who", response=str) == "somebody"

    asyncio.run(main())


def test_an_executor_that_is_shut_down(server: EventServer) -> None:
    told: list[object] = []

    async def scenario(bus: AsyncEventClient) -> None:
        bus.on("s")(print)
        bus.on_query("q")(print)
        await bus.flush()
        await bus.publish_many("s", [b"1", b"2"])
        while len(told) < 2:  # noqa: ASYNC110 - told from on_error
            await asyncio.sleep(0.001)
        with pytest.raises(RemoteError, match="shutdown"):
            await bus.query("q")

    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    run(server, executor, scenario, on_error=lambda error, message: told.append((type(error), message.data)))
    assert told[:2] == [(RuntimeError, b"1"), (RuntimeError, b"2")]


def test_drain_and_what_is_left(server: EventServer, executor: Executor) -> None:
    gate, begun = threading.Event(), threading.Event()
    seen: list[bytes] = []

    def handler(message: Message) -> None:
        begun.set()
        assert gate.wait(WAIT)
        seen.append(message.data)

    async def main() -> None:
        bus = await AsyncEventClient(port=server.port, executor=executor).connect()
        subscription = await bus.subscribe("s", handler)
        await bus.publish_many("s", [b"1", b"2", b"3"])
        await bus.flush()
        await asyncio.to_thread(begun.wait, WAIT)
        drain = asyncio.create_task(subscription.unsubscribe(drain=True, timeout=WAIT))
        while subscription.is_active:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        gate.set()
        assert await drain == 0
        assert seen == [b"1", b"2", b"3"]

        gate.clear()
        begun.clear()
        await bus.subscribe("s", handler)
        await bus.publish_many("s", [b"1", b"2", b"3"])
        await bus.flush()
        await asyncio.to_thread(begun.wait, WAIT)
        left = await bus.disconnect(timeout=0.01)
        assert left == Unfinished(messages=2, handlers=1)
        gate.set()

    asyncio.run(main())
    executor.shutdown()
    assert seen[3:] == [b"1"]


def test_slow_handlers_are_reported_with_their_thread(
    server: EventServer, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def dig(_: Message) -> None:
        gate.wait(WAIT)

    async def scenario(bus: AsyncEventClient) -> None:
        await bus.subscribe("s", dig)
        await bus.publish("s")
        while not bus.stats().slow_handlers:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        gate.set()

    run(server, executor, scenario, warn_after=0.02)
    (report,) = [record.getMessage() for record in caplog.records if "is at one message" in record.getMessage()]
    assert "in dig" in report.splitlines()[1]


def test_another_loop_is_refused(server: EventServer, executor: Executor) -> None:
    async def scenario(bus: AsyncEventClient) -> None:
        loop = asyncio.get_running_loop()

        @bus.on_query("q")
        def wrong(message: Message) -> str:
            for work in (bus.flush(), bus.query("q"), bus.publish("s", {"a": 1}, confirm=True)):
                with pytest.raises(RuntimeError, match="belongs to the event loop"):
                    asyncio.run(work)
            right = bus.publish("s", b"fine", confirm=True)
            receipt = asyncio.run_coroutine_threadsafe(right, loop).result(WAIT)
            assert receipt is not None
            return "told"

        await bus.flush()
        assert await bus.query("q", response=str) == "told"

    run(server, executor, scenario)
