"""`query_all` of both clients: each responder that was asked leads to exactly one reply."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from helpers_server import wait_for

import evbus
from evbus import (
    AsyncEventClient,
    CodecError,
    ConnectionLostError,
    EventClient,
    EventServer,
    NoRespondersError,
    NotConnectedError,
    QueryTimeoutError,
    RemoteError,
    Reply,
    ResponderLostError,
)
from evbus.testing import ServerBus

WAIT = 10.0


@dataclass
class Load(evbus.Query[int], subject="load"):
    minutes: int


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


@pytest.fixture
def workers(server: EventServer) -> Iterator[list[EventClient]]:
    clients = [EventClient(port=server.port).connect() for _ in range(3)]
    yield clients
    for client in clients:
        client.disconnect(drain=False)


Found = tuple[list[Reply[Any]], BaseException | None]


def ask_sync(port: int, *args: Any, **options: Any) -> Found:
    found: list[Reply[Any]] = []
    with EventClient(port=port) as bus:
        try:
            found.extend(bus.query_all(*args, **options))
        except evbus.EvbusError as exc:
            return found, exc
        assert bus.stats().pending_queries == 0
    return found, None


def ask_async(port: int, *args: Any, **options: Any) -> Found:
    found: list[Reply[Any]] = []

    async def main() -> BaseException | None:
        async with AsyncEventClient(port=port) as bus:
            try:
                async for reply in bus.query_all(*args, **options):
                    found.append(reply)  # noqa: PERF401 - what came before an error counts
            except evbus.EvbusError as exc:
                return exc
            assert bus.stats().pending_queries == 0
        return None

    return found, asyncio.run(main())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async], ids=["sync", "asyncio"])
Ask = Callable[..., Found]


@both
def test_each_responder_replies(ask: Ask, server: EventServer, workers: list[EventClient]) -> None:
    for number, worker in enumerate(workers):
        worker.on_query(Load)(lambda query, number=number: query.minutes + number)
    replies, error = ask(server.port, Load(10))
    assert error is None
    assert sorted(reply.value for reply in replies) == [10, 11, 12]
    assert len({reply.sender for reply in replies}) == 3
    for reply in replies:
        assert reply.message is not None
        assert (reply.message.sender, reply.error) == (reply.sender, None)
        assert repr(reply) == f"<Reply of connection {reply.sender}: {reply.value}>"


@both
def test_one_that_fails_one_that_is_lost_and_one_that_does_not_fit(
    ask: Ask, server: EventServer, workers: list[EventClient]
) -> None:
    asked = threading.Event()
    release = threading.Event()

    def vanish(_: object) -> None:
        asked.set()
        release.wait(WAIT)

    def fail(_: object) -> None:
        raise ValueError("no figures")

    workers[0].on_query("load")(fail)
    workers[1].on_query("load")(vanish)
    workers[2].on_query("load")(lambda _: "much")
    result: list[Found] = []
    asker = threading.Thread(target=lambda: result.append(ask(server.port, "load", response=int, timeout=WAIT)))
    asker.start()
    assert asked.wait(WAIT)
    workers[1].disconnect(drain=False)
    asker.join(WAIT)
    release.set()
    ((replies, error),) = result
    assert error is None
    errors = {type(reply.error): reply for reply in replies}
    assert set(errors) == {RemoteError, ResponderLostError, CodecError}
    assert len({reply.sender for reply in replies}) == 3
    assert errors[CodecError].message is not None
    assert errors[RemoteError].message is None
    for kind, reply in errors.items():
        with pytest.raises(kind):
            _ = reply.value
    lost = errors[ResponderLostError].error
    assert isinstance(lost, ResponderLostError)
    assert lost.sender == errors[ResponderLostError].sender != 0
    assert "ResponderLostError" in repr(errors[ResponderLostError])


@both
def test_nobody_and_too_late(ask: Ask, server: EventServer, workers: list[EventClient]) -> None:
    replies, error = ask(server.port, "load")
    assert (replies, type(error)) == ([], NoRespondersError)
    release = threading.Event()
    workers[0].on_query("load")(lambda _: release.wait(WAIT))
    workers[1].on_query("load")(lambda _: 7)
    replies, error = ask(server.port, "load", timeout=0.3)
    release.set()
    assert [reply.value for reply in replies] == [7]
    assert isinstance(error, QueryTimeoutError)
    assert error.timeout == 0.3


@both
def test_plain_subscribers_are_asked_too(ask: Ask, server: EventServer, workers: list[EventClient]) -> None:
    for number, worker in enumerate(workers):
        worker.on("load")(lambda message, number=number: number)
    replies, error = ask(server.port, "load", response=int)
    assert error is None
    assert sorted(reply.value for reply in replies) == [0, 1, 2]


def test_not_connected() -> None:
    with pytest.raises(NotConnectedError):
        EventClient().query_all("load")

    async def main() -> None:
        replies = AsyncEventClient().query_all("load")
        with pytest.raises(NotConnectedError):
            await replies.__anext__()
        with pytest.raises(StopAsyncIteration):
            await replies.__anext__()

    asyncio.run(main())


def test_taking_it_back(server: EventServer, workers: list[EventClient]) -> None:
    release = threading.Event()
    for worker in workers[:2]:
        worker.on_query("load")(lambda _: release.wait(WAIT))
    workers[2].on_query("load")(lambda _: 1)

    def none_pending() -> bool:
        return server.stats()["queries_pending"] == 0

    with workers[0].query_all("load", timeout=WAIT) as replies:
        assert next(replies).value == 1
        assert server.stats()["queries_pending"] == 1
    wait_for(none_pending)
    assert list(replies) == []
    replies.close()

    async def main() -> None:
        async with AsyncEventClient(port=server.port) as bus:
            async with bus.query_all("load", timeout=WAIT) as replies:
                assert (await replies.__anext__()).value == 1
                waiting = asyncio.create_task(replies.__anext__())
                await bus.flush()
                waiting.cancel()  # takes no reply, and leaves the query as it is
                await asyncio.wait([waiting])
                assert bus.stats().pending_queries == 1
            assert [reply async for reply in replies] == []
            assert bus.stats().pending_queries == 0
            await bus.flush()
            assert none_pending()

    asyncio.run(main())
    release.set()


def test_closing_wakes_a_thread_that_waits(server: EventServer, workers: list[EventClient]) -> None:
    release = threading.Event()
    asked = threading.Event()
    workers[0].on_query("load")(lambda _: (asked.set(), release.wait(WAIT))[1])
    replies = workers[1].query_all("load", timeout=WAIT)
    found: list[object] = []
    taker = threading.Thread(target=lambda: found.append(list(replies)))
    taker.start()
    assert asked.wait(WAIT)
    replies.close()
    taker.join(WAIT)
    release.set()
    assert found == [[]]


@both
def test_a_lost_connection_ends_it(ask: Ask) -> None:
    asked = threading.Event()
    release = threading.Event()
    result: list[Found] = []
    with ServerBus() as bus, EventClient(port=bus.server.port) as responder:
        responder.on_query("load")(lambda _: (asked.set(), release.wait(WAIT))[1])
        asker = threading.Thread(target=lambda: result.append(ask(bus.port, "load", timeout=WAIT)))
        asker.start()
        assert asked.wait(WAIT)
        bus.drop_connections()
        asker.join(WAIT)
        release.set()
    assert [(replies, type(error)) for replies, error in result] == [([], ConnectionLostError)]
