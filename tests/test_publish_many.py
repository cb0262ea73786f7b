"""`publish_many` and `no_echo` of both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import evbus
from evbus import AsyncEventClient, BufferFullError, ClientLimits, EventClient, EventServer, NotConnectedError
from evbus.testing import ServerBus

WAIT = 10.0


@evbus.event("order.new")
@dataclass
class Order:
    number: int


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


Do = Callable[..., Any]


def do_sync(port: int, method: str, *args: Any, limits: ClientLimits | None = None, **options: Any) -> Any:
    """One call of a client, and a flush."""
    with EventClient(port=port, limits=limits) as bus:
        result = getattr(bus, method)(*args, **options)
        bus.flush()
        return result


def do_async(port: int, method: str, *args: Any, limits: ClientLimits | None = None, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncEventClient(port=port, limits=limits) as bus:
            result = await getattr(bus, method)(*args, **options)
            await bus.flush()
            return result

    return asyncio.run(main())


both = pytest.mark.parametrize("do", [do_sync, do_async], ids=["sync", "asyncio"])


@both
def test_all_kinds_in_order(do: Do, server: EventServer) -> None:
    with EventClient(port=server.port) as bus, bus.subscribe("s") as plain, bus.subscribe(Order) as orders:
        messages = [b"1", "2", {"n": 3}, bytearray(b"4")]
        assert do(server.port, "publish_many", "s", iter(messages), headers={"h": "v"}) == 4
        assert do(server.port, "publish_many", "s", messages) == 4
        for headers in ({"h": "v"}, {}):
            got = [plain.next(WAIT) for _ in messages]
            assert [message.decode() for message in got] == [b"1", "2", {"n": 3}, b"4"]
            assert all(message.headers == headers for message in got)
        assert do(server.port, "publish_many", Order, [Order(1), Order(2)]) == 2
        assert [orders.next(WAIT).decode(Order) for _ in range(2)] == [Order(1), Order(2)]
        assert do(server.port, "publish_many", "s", []) == 0


@both
def test_more_than_the_buffer_holds(do: Do, server: EventServer) -> None:
    count, payload = 3000, bytes(1000)
    with EventClient(port=server.port) as bus, bus.subscribe("s") as subscription:
        limits = ClientLimits(buffer_bytes=100_000)
        assert do(server.port, "publish_many", "s", (payload for _ in range(count)), limits=limits) == count
        for _ in range(count):
            assert len(subscription.next(WAIT).data) == 1000


def test_the_loop_gets_its_turns(server: EventServer) -> None:
    async def main() -> None:
        async with AsyncEventClient(port=server.port) as bus:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(count())
            await bus.publish_many("s", (bytes(1000) for _ in range(3000)))
            assert turns >= 10
            task.cancel()

    asyncio.run(main())


@both
def test_mistakes(do: Do, server: EventServer) -> None:
    for single in ("text", b"bytes", {"a": "mapping"}):
        with pytest.raises(TypeError, match="iterable"):
            do(server.port, "publish_many", "s", single)
    with pytest.raises(evbus.ConfigError):
        do(server.port, "publish_many", "s", [1], timeout=-1)

    def some() -> Iterator[object]:
        yield b"first"
        yield object()
        yield b"never"

    with EventClient(port=server.port) as bus, bus.subscribe("s") as subscription:
        with pytest.raises(evbus.CodecError, match="'s'"):
            do(server.port, "publish_many", "s", some())
        bus.publish("s", b"last")
        assert [subscription.next(WAIT).data for _ in range(2)] == [b"first", b"last"]


def test_without_a_connection_and_without_room() -> None:
    with pytest.raises(NotConnectedError):
        EventClient().publish_many("s", [b"1"])
    with ServerBus() as bus:
        client = bus.client(limits=ClientLimits(buffer_bytes=100_000))
        bus.pause()
        with pytest.raises(BufferFullError):
            client.publish_many("s", (bytes(60_000) for _ in range(2000)), timeout=0)
        bus.drop_connections()


@pytest.mark.parametrize("group", [None, "members"])
def test_no_echo(server: EventServer, group: str | None) -> None:
    with EventClient(port=server.port) as bus, EventClient(port=server.port) as other:
        mine, theirs = bus.subscribe("s", group=group), other.subscribe("s", group=group)
        receipt = bus.publish("s", b"1", confirm=True, no_echo=True)
        assert receipt is not None
        assert receipt.receivers == 1
        assert bus.publish("s", b"2", no_echo=True) is None
        assert bus.publish_many("s", [b"3", "4"], no_echo=True) == 2
        bus.flush()
        assert [theirs.next(WAIT).data for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        assert (mine.received, mine.pending_msgs) == (0, 0)


def test_no_echo_of_the_asyncio_client(server: EventServer) -> None:
    async def main() -> None:
        async with AsyncEventClient(port=server.port) as bus, AsyncEventClient(port=server.port) as other:
            mine, theirs = await bus.subscribe("s"), await other.subscribe("s")
            assert await bus.publish("s", b"1", no_echo=True) is None
            await bus.publish_many("s", [b"2"], no_echo=True)
            await bus.publish("s", b"3")
            assert [(await theirs.next(WAIT)).data for _ in range(3)] == [b"1", b"2", b"3"]
            assert (await mine.next(WAIT)).data == b"3"

    asyncio.run(main())
