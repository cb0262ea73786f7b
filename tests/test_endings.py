"""How subscriptions and clients end: with a drain or without, and what they say was left."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest
from helpers_server import wait_for

from evbus import AsyncEventClient, ClientClosedError, ClientLimits, EventClient, EventServer, Message, Unfinished
from evbus.testing import ServerBus

WAIT = 10.0


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as server:
        yield server


class Gate:
    """A handler that begins with a message, and stands still until it is opened."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.handled: list[bytes] = []

    def __call__(self, message: Message) -> None:
        self.begun.set()
        assert self.open.wait(WAIT)
        self.handled.append(message.data)


NUMBERS = [b"%d" % n for n in range(10)]


class TestSync:
    @pytest.fixture
    def bus(self, server: EventServer) -> Iterator[EventClient]:
        with EventClient(port=server.port) as bus:
            yield bus

    def test_without_a_drain_what_waits_is_discarded(self, bus: EventClient) -> None:
        gate = Gate()
        subscription = bus.subscribe("s", gate)
        bus.publish_many("s", NUMBERS)
        bus.flush()
        assert gate.begun.wait(WAIT)
        assert bus.unsubscribe("s", gate) == 9
        assert subscription.discarded == 9
        assert (bus.unsubscribe("s"), subscription.unsubscribe()) == (0, 0)
        gate.open.set()

    def test_a_drain_finishes_what_waits(self, bus: EventClient) -> None:
        gate = Gate()
        subscription = bus.subscribe("s", gate)
        bus.publish_many("s", NUMBERS)
        bus.flush()
        assert gate.begun.wait(WAIT)
        result: list[int] = []
        ending = threading.Thread(target=lambda: result.append(subscription.unsubscribe(drain=True, timeout=WAIT)))
        ending.start()
        wait_for(lambda: not subscription.is_active)
        bus.publish("s", b"too late")
        bus.flush()
        assert ending.is_alive()
        gate.open.set()
        ending.join(WAIT)
        assert (result, gate.handled, subscription.discarded) == ([0], NUMBERS, 0)
        assert bus.stats().subscriptions == 0

    def test_what_is_on_its_way_is_handled_too(self, bus: EventClient) -> None:
        seen: list[bytes] = []
        bus.on("s")(lambda message: seen.append(message.data))
        bus.publish_many("s", NUMBERS * 1000)  # most of it has not come back yet
        assert bus.unsubscribe("s", drain=True, timeout=WAIT) == 0
        assert seen == NUMBERS * 1000

    def test_a_drain_that_is_out_of_time(self, bus: EventClient) -> None:
        gate = Gate()
        subscription = bus.subscribe("s", gate)
        bus.publish_many("s", NUMBERS)
        bus.flush()
        assert gate.begun.wait(WAIT)
        assert subscription.unsubscribe(drain=True, timeout=0) == 9
        assert subscription.discarded == 9
        gate.open.set()

    def test_a_handler_drains_its_own_subscription(self, bus: EventClient) -> None:
        begin = threading.Event()
        left: list[int] = []
        seen: list[bytes] = []

        def handler(message: Message) -> None:
            assert begin.wait(WAIT)
            if not seen:
                left.append(bus.unsubscribe("s", drain=True, timeout=None))
            seen.append(message.data)

        subscription = bus.subscribe("s", handler)
        bus.publish_many("s", NUMBERS)
        bus.flush()
        begin.set()
        wait_for(lambda: len(seen) == 10)
        assert (left, seen, subscription.is_active) == ([9], NUMBERS, False)

    def test_an_iterator_takes_the_rest(self, bus: EventClient) -> None:
        subscription = bus.subscribe("s")
        bus.publish_many("s", NUMBERS)
        bus.flush()
        assert subscription.unsubscribe(drain=True) == 10
        assert [message.data for message in subscription] == NUMBERS

    def test_another_subscription_on_the_subject_goes_on(self, bus: EventClient) -> None:
        gate, other = Gate(), bus.subscribe("s")
        bus.subscribe("s", gate)
        gate.open.set()
        bus.publish("s", b"1")
        assert bus.unsubscribe("s", gate, drain=True) == 0
        bus.publish("s", b"2")
        assert [other.next(WAIT).data for _ in range(2)] == [b"1", b"2"]
        assert gate.handled == [b"1"]

    def test_without_a_connection(self) -> None:
        bus = EventClient()
        bus.on("s")(print)
        assert bus.unsubscribe("s", drain=True) == 0
        assert bus.stats().subscriptions == 0
        assert bus.disconnect() == Unfinished()

    def test_nothing_unfinished(self, bus: EventClient, caplog: pytest.LogCaptureFixture) -> None:
        bus.on("s")(lambda message: None)
        bus.publish_many("s", NUMBERS)
        left = bus.disconnect()
        assert left == Unfinished()
        assert not left
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert bus.disconnect() == Unfinished()

    def test_messages_and_handlers_unfinished(self, bus: EventClient, caplog: pytest.LogCaptureFixture) -> None:
        gate = Gate()
        bus.on("s")(gate)
        unread = bus.subscribe("s")
        bus.publish_many("s", NUMBERS)
        bus.flush()
        assert gate.begun.wait(WAIT)
        left = bus.disconnect(timeout=0.05)
        gate.open.set()
        assert left == Unfinished(messages=9 + 10, handlers=1)
        assert left
        assert unread.discarded == 10
        (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert warning.getMessage() == (
            "closed with 19 messages unhandled, 1 handlers at work, 0 bytes unsent, 0 queries unanswered"
        )

    def test_queries_unfinished(self, server: EventServer, bus: EventClient) -> None:
        gate = Gate()
        asked: list[BaseException] = []

        def ask(other: EventClient) -> None:
            try:
                other.query("q", timeout=WAIT)
            except ClientClosedError as exc:
                asked.append(exc)

        bus.on_query("q")(gate)
        other = EventClient(port=server.port).connect()
        asker = threading.Thread(target=ask, args=(other,))
        asker.start()
        assert gate.begun.wait(WAIT)
        assert other.disconnect() == Unfinished(queries=1)
        asker.join(WAIT)
        assert len(asked) == 1
        gate.open.set()

    def test_a_handler_that_closes_the_client_is_not_counted(self, server: EventServer) -> None:
        bus = EventClient(port=server.port).connect()
        result: list[Unfinished] = []
        done = threading.Event()

        @bus.on("s")
        def close(_: Message) -> None:
            result.append(bus.disconnect())
            done.set()

        bus.publish("s", b"")
        assert done.wait(WAIT)
        assert result == [Unfinished()]


def test_unsent_bytes() -> None:
    with ServerBus() as bus:
        client = bus.client(limits=ClientLimits(buffer_bytes=64 << 20))
        bus.pause()
        # More than the system's buffers take.
        client.publish_many("s", [bytes(1 << 20)] * 32)
        left = client.disconnect(drain=False)
        assert left.unsent_bytes > 1 << 20
        assert left == Unfinished(unsent_bytes=left.unsent_bytes)


class TestAsync:
    def test_drains(self, server: EventServer) -> None:
        async def main() -> None:
            async with AsyncEventClient(port=server.port) as bus:
                seen: list[bytes] = []
                begun, gate = asyncio.Event(), asyncio.Event()

                async def handler(message: Message) -> None:
                    begun.set()
                    await gate.wait()
                    seen.append(message.data)

                subscription = await bus.subscribe("s", handler)
                await bus.publish_many("s", NUMBERS)
                await bus.flush()
                await begun.wait()
                drain = asyncio.create_task(bus.unsubscribe("s", drain=True, timeout=WAIT))
                while subscription.is_active:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0)
                await bus.publish("s", b"too late")
                await bus.flush()
                gate.set()
                assert await drain == 0
                assert seen == NUMBERS

                gate.clear()
                begun.clear()
                subscription = await bus.subscribe("s", handler)
                await bus.publish_many("s", NUMBERS)
                await bus.flush()
                await begun.wait()
                assert await subscription.unsubscribe(drain=True, timeout=0.01) == 9
                assert await subscription.unsubscribe() == 0
                gate.set()

        asyncio.run(main())

    def test_a_handler_drains_its_own_subscription(self, server: EventServer) -> None:
        async def main() -> None:
            async with AsyncEventClient(port=server.port) as bus:
                left: list[int] = []
                seen: list[bytes] = []
                done = asyncio.Event()

                async def handler(message: Message) -> None:
                    if not seen:
                        await bus.flush()
                        left.append(await bus.unsubscribe("s", drain=True, timeout=None))
                    seen.append(message.data)
                    if len(seen) == 10:
                        done.set()

                await bus.subscribe("s", handler)
                await bus.publish_many("s", NUMBERS)
                await asyncio.wait_for(done.wait(), WAIT)
                assert (left, seen) == ([9], NUMBERS)

        asyncio.run(main())

    def test_a_cancelled_drain_ends_the_subscription(self, server: EventServer) -> None:
        async def main() -> None:
            async with AsyncEventClient(port=server.port) as bus:
                begun = asyncio.Event()

                async def handler(_: Message) -> None:
                    begun.set()
                    await asyncio.sleep(WAIT)

                subscription = await bus.subscribe("s", handler)
                await bus.publish_many("s", NUMBERS)
                await begun.wait()
                drain = asyncio.create_task(subscription.unsubscribe(drain=True, timeout=None))
                while subscription.is_active:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0)
                drain.cancel()
                await asyncio.wait([drain])
                assert drain.cancelled()
                assert subscription.pending_msgs == 0
                assert bus.stats().subscriptions == 0
                left = await bus.disconnect(timeout=0.01)
                assert left == Unfinished()  # its handler is no subscription's any more

        asyncio.run(main())

    def test_an_iterator_takes_the_rest(self, server: EventServer) -> None:
        async def main() -> None:
            async with AsyncEventClient(port=server.port) as bus:
                subscription = await bus.subscribe("s")
                await bus.publish_many("s", NUMBERS)
                await bus.flush()
                assert await subscription.unsubscribe(drain=True) == 10
                assert [message.data async for message in subscription] == NUMBERS

        asyncio.run(main())

    def test_unfinished(self, server: EventServer, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            bus = await AsyncEventClient(port=server.port).connect()
            begun = asyncio.Event()

            @bus.on("s")
            async def handler(_: Message) -> None:
                begun.set()
                await asyncio.sleep(WAIT)

            await bus.flush()
            await bus.publish_many("s", NUMBERS)
            await begun.wait()
            await bus.flush()
            assert await bus.disconnect(timeout=0.01) == Unfinished(messages=9, handlers=1)
            assert await bus.disconnect() == Unfinished()
            async with AsyncEventClient(port=server.port) as other:
                assert await other.disconnect() == Unfinished()

        asyncio.run(main())
        assert any("9 messages unhandled, 1 handlers at work" in record.getMessage() for record in caplog.records)
