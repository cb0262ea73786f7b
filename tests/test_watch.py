"""Slow handlers: found by looking now and then, reported once, with their stack."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from helpers_server import wait_for

from evbus import AsyncEventClient, ConfigError, EventClient, EventServer, Message
from evbus._mailbox import Batch
from evbus.watch import Watch, Watcher, stack_of

WAIT = 10.0


class Runner:
    """Something to be watched; its batches are moved by the test."""

    def __init__(self) -> None:
        self.at_work: dict[object, Batch] = {}
        self.told: list[float] = []

    def slow(self, seconds: float, stack: str) -> None:
        assert stack
        self.told.append(round(seconds, 3))


class Moved:
    """A batch that a test moves on."""

    taken = 1


class TestWatch:
    def test_a_call_is_reported_once(self) -> None:
        watch, runner = Watch(), Runner()
        watch.add(runner, 10.0)
        batch = Moved()
        runner.at_work[1] = batch  # type: ignore[assignment]
        for now in (100.0, 102.5, 109.9):
            watch.look(now)
        assert runner.told == []
        for now in (110.1, 112.0, 150.0):
            watch.look(now)
        assert runner.told == [10.1]
        batch.taken += 1  # the next call
        watch.look(151.0)
        watch.look(160.9)
        assert runner.told == [10.1]
        watch.look(161.0)
        assert runner.told == [10.1, 10.0]

    def test_another_batch_is_another_call(self) -> None:
        watch, runner = Watch(), Runner()
        watch.add(runner, 1.0)
        for now in range(20):
            runner.at_work[1] = Moved()  # type: ignore[assignment]
            watch.look(now)
        assert runner.told == []

    def test_who_has_rested_begins_anew(self) -> None:
        watch, runner = Watch(), Runner()
        watch.add(runner, 2.0)
        batch = Moved()
        for now in range(0, 20, 2):
            runner.at_work = {} if now % 4 else {1: batch}  # type: ignore[dict-item]
            watch.look(now)
        assert runner.told == []

    def test_several_workers_and_limits(self) -> None:
        watch, quick, patient = Watch(), Runner(), Runner()
        assert watch.interval_s is None
        watch.add(patient, 100.0)
        assert watch.interval_s == 2.5
        watch.add(quick, 1.0)
        assert watch.interval_s == 0.25
        for runner in (quick, patient):
            runner.at_work.update({1: Moved(), 2: Moved()})  # type: ignore[dict-item]
        for now in (0.0, 1.0):
            watch.look(now)
        assert (quick.told, patient.told) == ([1.0, 1.0], [])
        watch.remove(quick)
        watch.remove(quick)
        watch.look(100.0)
        assert (quick.told, patient.told) == ([1.0, 1.0], [100.0, 100.0])
        patient.at_work.clear()
        watch.look(101.0)
        del runner, patient  # nobody has to take back what is gone
        gc.collect()
        assert watch.interval_s is None

    def test_the_thread_lives_as_long_as_there_is_something_to_look_at(self) -> None:
        own = Watcher()
        assert own.thread is None
        first, second = Runner(), Runner()
        own.add(first, 1000.0)
        thread = own.thread
        assert thread is not None
        assert thread.daemon
        own.add(second, 0.02)
        assert own.thread is thread
        second.at_work[threading.get_ident()] = Moved()  # type: ignore[assignment]
        wait_for(lambda: second.told)
        own.remove(first)
        own.remove(second)
        thread.join(WAIT)
        assert own.thread is None
        assert not thread.is_alive()

    def test_a_report_that_fails_ends_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(Runner):
            def slow(self, seconds: float, stack: str) -> None:
                super().slow(seconds, stack)
                raise ValueError("no")

        own, runner = Watcher(), Broken()
        runner.at_work[threading.get_ident()] = Moved()  # type: ignore[assignment]
        own.add(runner, 0.02)
        wait_for(lambda: len(runner.told) == 1)
        runner.at_work[threading.get_ident()] = Moved()  # type: ignore[assignment]
        wait_for(lambda: len(runner.told) == 2)
        own.remove(runner)
        assert "looking after slow handlers failed" in caplog.text


class TestStacks:
    def test_of_a_thread(self) -> None:
        begun, end = threading.Event(), threading.Event()

        def stand_still() -> None:
            begun.set()
            end.wait(WAIT)

        thread = threading.Thread(target=stand_still)
        thread.start()
        assert begun.wait(WAIT)
        assert thread.ident is not None
        text = stack_of(thread.ident)
        end.set()
        thread.join()
        assert "in stand_still" in text
        assert text.index("in stand_still") < text.index("in wait")  # the innermost comes last
        assert "ended" in stack_of(-1)

    def test_of_a_task_that_waits_and_of_one_that_runs(self) -> None:
        async def inner(event: asyncio.Event) -> None:
            await event.wait()

        async def outer(event: asyncio.Event) -> None:
            await inner(event)

        async def main() -> None:
            event = asyncio.Event()
            task = asyncio.create_task(outer(event))
            await asyncio.sleep(0)
            text = stack_of(task)
            assert text.index("in outer") < text.index("in inner") < text.index("in wait")
            assert "in main" not in text
            event.set()
            await task
            assert "ended" in stack_of(task)
            mine = stack_of(asyncio.current_task())
            assert mine.index("in main") < mine.index("in stack_of")

        asyncio.run(main())


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Watcher:
    """One that no other test's clients have to do with."""
    own = Watcher()
    monkeypatch.setattr("evbus.subscription.watcher", own)
    monkeypatch.setattr("evbus.aio_subscription.watcher", own)
    return own


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "is at one message" in record.getMessage()]


def test_a_slow_handler_of_the_synchronous_client(
    server: EventServer, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def dig(message: Message) -> None:
        if message.data == b"slow":
            gate.wait(WAIT)

    with EventClient(port=server.port, warn_after=0.02) as bus:
        bus.on("hole.*")(dig)
        bus.publish("hole.1", b"quick")
        bus.publish("hole.1", b"slow")
        wait_for(lambda: bus.stats().slow_handlers)
        gate.set()
        (report,) = reports(caplog)
        first, *stack = report.splitlines()
        assert first.startswith("the handler of hole.* is at one message for 0.")
        assert "in dig" in stack[0]  # from the handler on, without what called it
        assert "gate.wait(WAIT)" in stack[1]
        assert bus.stats().slow_handlers == 1
    wait_for(lambda: watcher.thread is None)


@pytest.mark.parametrize("kind", ["suspended", "blocking"])
def test_a_slow_handler_of_the_asyncio_client(
    server: EventServer, watcher: Watcher, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    gate = threading.Event()

    async def deeper() -> None:
        await asyncio.sleep(WAIT)

    async def dig(_: Message) -> None:
        await deeper()

    def block(_: Message) -> None:
        gate.wait(WAIT)

    async def main() -> None:
        async with AsyncEventClient(port=server.port, warn_after=0.02) as bus:
            await bus.subscribe("hole", dig if kind == "suspended" else block)
            await bus.publish("hole")
            while not bus.stats().slow_handlers:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)
            with contextlib.suppress(TimeoutError):
                await bus.disconnect(timeout=0)

    def open_later() -> None:
        wait_for(lambda: reports(caplog))
        gate.set()

    opener = threading.Thread(target=open_later)
    opener.start()
    asyncio.run(main())
    opener.join()
    (report,) = reports(caplog)
    _, *stack = report.splitlines()
    assert f"in {'dig' if kind == 'suspended' else 'block'}" in stack[0]
    if kind == "suspended":
        assert "in deeper" in report
    wait_for(lambda: watcher.thread is None)


def test_the_option(server: EventServer, watcher: Watcher, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (0, -1, "10", True, float("nan")):
        for kind in (EventClient, AsyncEventClient):
            with pytest.raises(ConfigError, match="warn_after"):
                kind(warn_after=wrong)  # type: ignore[arg-type]
    with EventClient(port=server.port, warn_after=None) as bus:
        bus.on("hole")(lambda _: time.sleep(0))
        assert watcher.thread is None
    with EventClient(port=server.port) as bus:
        assert watcher.thread is None  # without a handler
        bus.on("hole")(print)
        assert watcher.thread is not None
        bus.unsubscribe("hole")
        wait_for(lambda: watcher.thread is None)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
