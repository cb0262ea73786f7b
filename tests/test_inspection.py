"""What clients and subscriptions tell of themselves, for tests and tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from helpers_server import wait_for

from evbus import AsyncEventClient, EventClient, EventServer, Message

WAIT = 10.0


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


def test_of_the_synchronous_client(server: EventServer) -> None:
    gate, begun = threading.Event(), threading.Event()

    def handler(_: Message) -> None:
        begun.set()
        assert gate.wait(WAIT)

    with EventClient(port=server.port, name="shop") as bus:
        assert (bus.name, EventClient().name, bus.subscriptions) == ("shop", "", ())
        first, second = bus.subscribe("b", handler), bus.subscribe("a")
        assert bus.subscriptions == (first, second)
        wait_for(lambda: bus.stats().at_work == 0)
        assert first.is_idle
        bus.publish("b")
        assert begun.wait(WAIT)
        assert bus.stats().at_work == 1
        assert not first.is_idle
        gate.set()
        wait_for(lambda: first.is_idle and bus.stats().at_work == 0)
        bus.publish("a")
        bus.flush()
        assert not second.is_idle  # a message waits to be taken
        first.unsubscribe()
        assert bus.subscriptions == (second,)
    assert bus.subscriptions == ()


def test_of_the_asyncio_client(server: EventServer) -> None:
    async def main() -> None:
        gate, begun = asyncio.Event(), asyncio.Event()

        async def handler(_: Message) -> None:
            begun.set()
            await gate.wait()

        async with AsyncEventClient(port=server.port, name="shop") as bus:
            subscription = await bus.subscribe("b", handler)
            assert (bus.name, bus.subscriptions) == ("shop", (subscription,))
            assert (subscription.is_idle, bus.stats().at_work) == (True, 0)
            await bus.publish("b")
            await begun.wait()
            assert (subscription.is_idle, bus.stats().at_work) == (False, 1)
            gate.set()
            while bus.stats().at_work:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
            assert subscription.is_idle
        assert bus.subscriptions == ()

    asyncio.run(main())
