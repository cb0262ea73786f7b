"""One way to write a scenario for both clients: as asyncio code, which the blocking client runs without a loop.

A scenario is a coroutine function of one argument, a `Stage`. With `AsyncStage` its clients are AsyncEventClients. With
`PlainStage` they are EventClients behind `Awaited`: every call blocks at once and never suspends, so the coroutine runs
from its beginning to its end as plain code, and a coroutine function given as a handler runs so on the worker thread
that calls it. Which of a client's methods are awaited is taken from the asyncio client, so the two must have the same
names and take the same arguments, or a scenario fails.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import queue
import threading
import time
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from tempfile import TemporaryDirectory
from typing import Any

from helpers_fake import FakeNetwork, Play

import evbus
from evbus import AsyncEventClient, EventClient, EventServer, Limits, Message
from evbus.testing import Bus, MemoryBus, ServerBus
from evbus.testing._proxy import Proxy
from evbus.testing._record import Record

__all__ = ["NETWORKS", "AsyncStage", "PlainStage", "Stage", "UnixBus"]

PATIENCE_S = 20.0

Body = Callable[["Stage"], Coroutine[Any, Any, None]]


# --- networks ---------------------------------------------------------------------------------------------------------


class UnixBus(Bus):
    """A `ServerBus` on a Unix domain socket."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        self._directory = TemporaryDirectory()
        path = os.path.join(self._directory.name, "bus")
        self.server = EventServer(None, unix=path, limits=limits).start()
        record = Record()
        self._proxy = Proxy(path, record)
        super().__init__(record, self._proxy.faults)

    def stats(self) -> dict[str, object]:
        return self.server.stats()

    def _new_client(self, options: dict[str, Any]) -> EventClient:
        return EventClient(servers=[f"unix://{self._proxy.path}"], **options)

    def _new_async_client(self, options: dict[str, Any]) -> AsyncEventClient:
        return AsyncEventClient(servers=[f"unix://{self._proxy.path}"], **options)

    def _end(self) -> None:
        self._proxy.close()
        self.server.stop(0)
        self._directory.cleanup()


NETWORKS: dict[str, Callable[..., Bus]] = {"tcp": ServerBus, "unix": UnixBus, "memory": MemoryBus}


# --- what scenarios are given -----------------------------------------------------------------------------------------


class Log(ABC):
    """A handler or callback that writes down what it is given: a value, or a tuple of several. Its parameter has no
    annotation, so as a handler it is given the Message, unless `type=` says otherwise.
    """

    items: list[Any]

    @abstractmethod
    def __call__(self, *item) -> None: ...

    @abstractmethod
    async def next(self) -> Any:
        """The next one, waited for."""

    async def take(self, count: int) -> list[Any]:
        """The next ones."""
        return [await self.next() for _ in range(count)]


class Event(ABC):
    """Something that happens once."""

    @abstractmethod
    def set(self) -> None: ...

    @abstractmethod
    async def wait(self) -> None: ...


class Stage(ABC):
    """A bus with clients of one kind.

    Attributes:
        network: makes the faults: `drop_connections`, `pause`, `resume`, `delay`, `cut_after`; and has the server's
            `stats`.
    """

    def __init__(self, network: Bus) -> None:
        self.network = network
        self.made: list[Any] = []
        self.fakes: list[FakeNetwork] = []

    @abstractmethod
    def new_client(self, **options: Any) -> Any:
        """A client that is not connected yet."""

    async def client(self, **options: Any) -> Any:
        """A connected client."""
        return await self.new_client(**options).connect()

    def client_of_fake(self, play: Play, **options: Any) -> Any:
        """A client, not connected yet, whose server is played by a function."""
        fake = FakeNetwork(self.network, play)
        self.fakes.append(fake)
        client = self.new_client(**options)
        self._dial_to(client, fake)
        return client

    @abstractmethod
    def _dial_to(self, client: Any, fake: FakeNetwork) -> None: ...

    @abstractmethod
    def log(self) -> Log: ...

    @abstractmethod
    def event(self) -> Event: ...

    @abstractmethod
    def start(self, job: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        """Let a coroutine run beside this one; what is returned is awaited for its result."""

    async def gather(self, *jobs: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run them at the same time; their results in order."""
        return [await job for job in [self.start(job) for job in jobs]]

    @abstractmethod
    async def until(self, true: Callable[[], object]) -> None:
        """Wait for what has no event: a counter."""

    @abstractmethod
    async def idle(self) -> None:
        """Wait until all that was published is handled."""

    @abstractmethod
    def run(self, scenario: Body) -> None:
        """Play a scenario, and disconnect all clients."""

    async def _play(self, scenario: Body) -> None:
        try:
            await scenario(self)
        finally:
            for client in self.made:
                await client.disconnect(drain=False)
            for fake in self.fakes:
                fake.close()
        for client in self.made:
            figures = client.stats()
            assert (figures.pending_queries, figures.subscriptions, figures.pending_msgs) == (0, 0, 0), figures


# --- asyncio ----------------------------------------------------------------------------------------------------------


class _AsyncLog(Log):
    def __init__(self) -> None:
        self.items = []
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def __call__(self, *item) -> None:
        value = item[0] if len(item) == 1 else item
        self.items.append(value)
        self._queue.put_nowait(value)

    async def next(self) -> Any:
        return await asyncio.wait_for(self._queue.get(), PATIENCE_S)


class _AsyncEvent(Event):
    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self._event.wait(), PATIENCE_S)


class AsyncStage(Stage):
    """With AsyncEventClients."""

    def new_client(self, **options: Any) -> Any:
        client = self.network.async_client(**options)
        self.made.append(client)
        return client

    def _dial_to(self, client: Any, fake: FakeNetwork) -> None:
        client._dial = fake.dial_async

    def log(self) -> Log:
        return _AsyncLog()

    def event(self) -> Event:
        return _AsyncEvent()

    def start(self, job: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        task = asyncio.get_running_loop().create_task(job)

        async def result() -> Any:
            return await asyncio.wait_for(task, PATIENCE_S)

        return result()

    async def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, true
            await asyncio.sleep(0.001)

    async def idle(self) -> None:
        await asyncio.to_thread(self.network.wait_idle, PATIENCE_S)

    def run(self, scenario: Body) -> None:
        async def main() -> None:
            await asyncio.wait_for(self._play(scenario), 2 * PATIENCE_S)
            await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        asyncio.run(main())


# --- blocking ---------------------------------------------------------------------------------------------------------


def run_plain(job: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends."""
    try:
        job.send(None)
    except StopIteration as stop:
        return stop.value
    job.close()
    raise AssertionError("blocking code has suspended")


class _PlainLog(Log):
    def __init__(self) -> None:
        self.items = []
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, *item) -> None:
        value = item[0] if len(item) == 1 else item
        self.items.append(value)
        self._queue.put(value)

    async def next(self) -> Any:
        return self._queue.get(timeout=PATIENCE_S)


class _PlainEvent(Event):
    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        assert self._event.wait(PATIENCE_S), "not in time"


class Awaited:
    """An object of the blocking client, with the methods of its twin in the asyncio client."""

    def __init__(self, stage: PlainStage, target: Any, twin: type) -> None:
        self._stage = stage
        self._target = target
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        declared = inspect.getattr_static(self._twin, name)
        if inspect.iscoroutinefunction(declared):

            async def awaited(*args: Any, **options: Any) -> Any:
                try:
                    return self._call(value, args, options)
                except StopIteration:
                    raise StopAsyncIteration from None

            return awaited
        if inspect.isfunction(declared):
            return lambda *args, **options: self._call(value, args, options)
        return value

    def _call(self, method: Callable[..., Any], args: Iterable[Any], options: dict[str, Any]) -> Any:
        stage = self._stage
        result = method(*map(stage.plain, args), **{name: stage.plain(value) for name, value in options.items()})
        if inspect.isfunction(result):  # `on` and `on_query`
            return lambda handler: (result(stage.plain(handler)), handler)[1]
        return self if result is self._target else stage.awaited(result)

    async def __aenter__(self) -> Any:
        self._target.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._target.__exit__(*error)

    def __aiter__(self) -> Any:
        iter(self._target)
        return self

    async def __anext__(self) -> Any:
        try:
            return self._stage.awaited(next(self._target))
        except StopIteration:
            raise StopAsyncIteration from None


class PlainStage(Stage):
    """With EventClients."""

    TWINS: typing.ClassVar[dict[type, type]] = {
        getattr(evbus, name): getattr(evbus, f"Async{name}")
        for name in ("EventClient", "Subscription", "Replies")
        if name in evbus.__all__
    }

    def __init__(self, network: Bus) -> None:
        super().__init__(network)
        self._plain: dict[Any, Any] = {}

    def new_client(self, **options: Any) -> Any:
        plain = {name: self.plain(value) for name, value in options.items()}
        client = Awaited(self, self.network.watch(self.network._new_client(plain)), AsyncEventClient)
        self.made.append(client)
        return client

    def _dial_to(self, client: Any, fake: FakeNetwork) -> None:
        client._target._dial = fake.dial

    def awaited(self, result: Any) -> Any:
        """What a blocking call has returned, as the asyncio client would."""
        for kind, twin in self.TWINS.items():
            if isinstance(result, kind):
                return Awaited(self, result, twin)
        return [self.awaited(one) for one in result] if type(result) is list else result

    def plain(self, value: Any) -> Any:
        """An argument as the blocking client takes it; the same one for the same one."""
        if isinstance(value, Awaited):
            return value._target
        if not inspect.iscoroutinefunction(value):
            return value
        if value not in self._plain:
            self._plain[value] = _plain_function(value)
        return self._plain[value]

    def log(self) -> Log:
        return _PlainLog()

    def event(self) -> Event:
        return _PlainEvent()

    def start(self, job: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                results.put((run_plain(job), None))
            except BaseException as exc:
                results.put((None, exc))

        threading.Thread(target=work, daemon=True).start()

        async def result() -> Any:
            value, error = results.get(timeout=PATIENCE_S)
            if error is not None:
                raise error
            return value

        return result()

    async def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, true
            time.sleep(0.001)  # noqa: ASYNC251 - this is the blocking kind

    async def idle(self) -> None:
        self.network.wait_idle(PATIENCE_S)

    def run(self, scenario: Body) -> None:
        run_plain(self._play(scenario))


def _plain_function(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """A coroutine function as a plain one that has the same signature, with its annotations resolved."""

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        return run_plain(function(*args))

    del plain.__wrapped__  # type: ignore[attr-defined]  # or it would still be a coroutine function to evbus
    hints = typing.get_type_hints(function, localns={"Message": Message})
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=hints.get(one.name, one.annotation)) for one in signature.parameters.values()]
    plain.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return plain
