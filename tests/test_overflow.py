"""Subscribers that are too slow, over real connections: what is dropped is told, and blocking loses nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import reference as ref
from helpers_raw import RawClient

from evbus import AsyncEventClient, ConfirmTimeoutError, EventClient, EventServer, Gap, Limits, RefusedError

WAIT = 20.0
SOFT = 256 * 1024


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def small_server(hard: int = 64 << 20) -> EventServer:
    return EventServer(port=0, limits=Limits(pending_soft_bytes=SOFT, pending_hard_bytes=hard))


def number(message: ref.Packet) -> int:
    return int.from_bytes(message.fields["Buffer"][:4], "big")


def numbered(n: int, size: int = 1000) -> bytes:
    return n.to_bytes(4, "big") + bytes(size - 4)


def test_a_stalled_subscriber_is_told_exactly_what_it_missed() -> None:
    count = 20_000
    with small_server() as server, RawClient("127.0.0.1", server.port, timeout=WAIT) as stalled:
        stalled.handshake()
        stalled.send(
            ref.SUBSCRIBE, version=2, TaskId="s", Subject="flood", SubscriptionId=1, Role=0, Overflow=1, Group=""
        )
        stalled.send(ref.SUBSCRIBE, version=2, TaskId="t", Subject="*", SubscriptionId=2, Role=0, Overflow=1, Group="")
        assert [stalled.read().fields["Status"] for _ in range(2)] == [1, 1]
        got: list[int] = []
        with (
            EventClient("127.0.0.1", server.port) as reader,
            EventClient("127.0.0.1", server.port) as publisher,
        ):
            reader.subscribe("flood", lambda message: got.append(int.from_bytes(message.data[:4], "big")))
            for n in range(count):
                publisher.publish("flood", numbered(n))
            publisher.flush(WAIT)
            receipt = publisher.publish("flood", numbered(count), confirm=True, timeout=WAIT)
            assert receipt is not None
            assert (receipt.receivers, receipt.dropped) == (1, 1)
            wait_for(lambda: len(got) == count + 1)
            assert got == list(range(count + 1))
            stats = server.stats()
            assert stats["dropped_newest"] > 1000  # type: ignore[operator]
            # Now it reads. Each number comes once, or is in the gap that stands before the next one, for both.
            received = 0
            missed = {1: 0, 2: 0}
            following = 0
            published = count + 1
            while min(received + missed[1], received + missed[2]) < published:
                packet = stalled.read()
                if packet.object_id == ref.GAP:
                    assert packet.fields["Reason"] == 1
                    missed[packet.fields["SubscriptionId"]] += packet.fields["Count"]
                    continue
                assert missed[1] == missed[2]
                assert number(packet) == received + missed[1]
                received += 1
                following = number(packet) + 1
            assert received > 0
            assert missed[1] == missed[2] == server.stats()["dropped_newest"] == published - received
            assert following <= published
            # It is told although nothing more came; and what comes now arrives as ever.
            publisher.publish("flood", numbered(published))
            assert number(stalled.read()) == published
            assert server.stats()["gaps"] >= 2  # type: ignore[operator]
            assert server.stats()["closed"] == {}


def test_a_client_that_drops_hears_of_both_queues() -> None:
    """One number for what the server dropped and what our own queue did."""
    seen: list[int] = []
    gaps: list[Gap] = []
    go, entered = threading.Event(), threading.Event()

    def handler(data: bytes) -> None:
        entered.set()
        assert go.wait(WAIT)
        seen.append(int.from_bytes(data[:4], "big"))

    with (
        small_server() as server,
        EventClient("127.0.0.1", server.port) as slow,
        EventClient("127.0.0.1", server.port) as publisher,
    ):
        subscription = slow.subscribe(
            "flood", handler, overflow="drop_newest", max_pending_msgs=100, on_gap=gaps.append
        )
        publisher.publish("flood", numbered(0))
        assert entered.wait(WAIT)
        for n in range(1, 5000):
            publisher.publish("flood", numbered(n))
        publisher.flush(WAIT)
        slow.flush(WAIT)
        go.set()
        wait_for(lambda: subscription.pending_msgs == 0)
        publisher.publish("flood", numbered(5000))
        wait_for(lambda: seen and seen[-1] == 5000)
        assert len(seen) + sum(gap.count or 0 for gap in gaps) == 5001
        assert subscription.missed == 5001 - len(seen)
        assert {(gap.subject, gap.reason) for gap in gaps} == {("flood", "overflow")}


def test_blocking_loses_nothing_and_slows_confirmed_publishers_down() -> None:
    count = 300
    seen: list[int] = []
    with (
        EventServer(port=0) as server,
        EventClient("127.0.0.1", server.port) as slow,
        EventClient("127.0.0.1", server.port) as publisher,
    ):
        ahead: list[int] = []
        sent = 0

        def handler(data: bytes) -> None:
            seen.append(int.from_bytes(data[:4], "big"))
            ahead.append(sent - len(seen))
            time.sleep(0.0005)

        slow.subscribe("work", handler, overflow="block", max_pending_msgs=8)
        for n in range(count):
            receipt = publisher.publish("work", numbered(n), confirm=True, timeout=WAIT)
            assert receipt is not None
            assert (receipt.receivers, receipt.dropped) == (1, 0)
            sent += 1
        wait_for(lambda: len(seen) == count)
        assert seen == list(range(count))
        # The publisher is never further ahead than the window and the message that it is at.
        assert max(ahead) <= 9
        stats = server.stats()
        assert stats["held"] > 0  # type: ignore[operator]
        assert (stats["held_msgs"], stats["dropped_newest"], stats["dropped_held"]) == (0, 0, 0)


@pytest.mark.parametrize("group", [None, "workers"])
def test_blocking_holds_unconfirmed_messages_in_the_server(group: str | None) -> None:
    count = 5000
    seen: list[int] = []
    go = threading.Event()

    def handler(data: bytes) -> None:
        assert go.wait(WAIT)
        seen.append(int.from_bytes(data[:4], "big"))

    with (
        EventServer(port=0) as server,
        EventClient("127.0.0.1", server.port) as slow,
        EventClient("127.0.0.1", server.port) as publisher,
    ):
        subscription = slow.subscribe("work", handler, overflow="block", max_pending_msgs=16, group=group)
        for n in range(count):
            publisher.publish("work", numbered(n))
        publisher.flush(WAIT)
        slow.flush(WAIT)
        assert server.stats()["held_msgs"] == count - 16
        assert subscription.received == 16
        go.set()
        wait_for(lambda: len(seen) == count)
        assert seen == list(range(count))
        assert server.stats()["held_msgs"] == 0
        assert subscription.missed == subscription.dropped == 0


def test_a_subscriber_that_holds_back_for_ever_is_closed_at_the_hard_limit() -> None:
    with small_server(8 << 20) as server, RawClient("127.0.0.1", server.port, timeout=WAIT) as never:
        never.handshake()
        never.send(ref.SUBSCRIBE, version=2, TaskId="s", Subject="x", SubscriptionId=1, Role=0, Overflow=2, Group="")
        assert never.read().fields["Status"] == 1
        with EventClient("127.0.0.1", server.port) as publisher:
            for n in range(9000):
                publisher.publish("x", numbered(n))
            publisher.flush(WAIT)
            never.read_end()
            stats = server.stats()
            assert stats["closed"] == {"slow_consumer": 1}
            assert stats["held_msgs"] == 0
            assert stats["dropped_held"] + stats["dropped_slow"] + stats["unrouted"] == 9000  # type: ignore[operator]


@pytest.mark.parametrize("how", ["unsubscribe", "disconnect"])
def test_whoever_goes_releases_the_receipts_that_waited_for_it(how: str) -> None:
    go, entered = threading.Event(), threading.Event()

    def handler(data: bytes) -> None:
        entered.set()
        assert go.wait(WAIT)

    with EventServer(port=0) as server, EventClient("127.0.0.1", server.port) as publisher:
        slow = EventClient("127.0.0.1", server.port).connect()
        try:
            subscription = slow.subscribe("work", handler, overflow="block", max_pending_msgs=1)
            publisher.publish("work", b"taken", confirm=True, timeout=WAIT)
            assert entered.wait(WAIT)
            with pytest.raises(ConfirmTimeoutError):
                publisher.publish("work", b"waits", confirm=True, timeout=0.1)
            outcome: list[object] = []
            thread = threading.Thread(
                target=lambda: outcome.append(publisher.publish("work", b"waits", confirm=True, timeout=WAIT))
            )
            thread.start()
            wait_for(lambda: server.stats()["held_msgs"] == 2)
            assert not outcome
            if how == "unsubscribe":
                subscription.unsubscribe()
            else:
                slow.disconnect(drain=False)
            thread.join(WAIT)
            (receipt,) = outcome
            assert (receipt.receivers, receipt.dropped) == (0, 1)  # type: ignore[attr-defined]
            assert server.stats()["dropped_held"] == 2
        finally:
            go.set()
            slow.disconnect(drain=False)


def test_blocking_works_by_iteration_and_in_asyncio() -> None:
    count = 200

    async def scenario(port: int) -> None:
        seen: list[int] = []
        async with AsyncEventClient("127.0.0.1", port) as slow, AsyncEventClient("127.0.0.1", port) as publisher:

            async def handler(data: bytes) -> None:
                await asyncio.sleep(0)
                seen.append(int.from_bytes(data[:4], "big"))

            await slow.subscribe("work", handler, overflow="block", max_pending_msgs=5)
            subscription = await slow.subscribe("work", overflow="block", max_pending_msgs=1)

            async def publish() -> None:
                for n in range(count):
                    await publisher.publish("work", numbered(n), confirm=True, timeout=WAIT)

            task = asyncio.ensure_future(publish())
            taken = [int.from_bytes((await subscription.next(WAIT)).data[:4], "big") for _ in range(count)]
            await task
            assert taken == list(range(count))
            while len(seen) < count:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.001)
            assert seen == taken

    with EventServer(port=0) as server:
        asyncio.run(asyncio.wait_for(scenario(server.port), 2 * WAIT))
        with EventClient("127.0.0.1", server.port) as slow, EventClient("127.0.0.1", server.port) as publisher:
            subscription = slow.subscribe("work", overflow="block", max_pending_msgs=3)
            plain = slow.subscribe("work")
            for n in range(count):
                publisher.publish("work", numbered(n))
            assert [subscription.next(WAIT).data for _ in range(count)] == [numbered(n) for n in range(count)]
            assert [plain.next(WAIT).data for _ in range(count)] == [numbered(n) for n in range(count)]


def test_queries_do_not_wait_for_credit() -> None:
    with (
        EventServer(port=0) as server,
        EventClient("127.0.0.1", server.port) as slow,
        EventClient("127.0.0.1", server.port) as other,
    ):
        slow.subscribe("sum", lambda message: b"4", overflow="block", max_pending_msgs=1)
        for _ in range(50):
            assert other.query("sum", b"2+2", timeout=WAIT) == b"4"
        other.publish("sum", b"", confirm=True, timeout=WAIT)
        assert server.stats()["held_msgs"] == 0


def test_a_server_without_credit_refuses_block_and_drops_in_our_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evbus.announcement.FEATURES", ("headers", "receipt", "gap"))
    with EventServer(port=0) as server, EventClient("127.0.0.1", server.port) as client:
        with pytest.raises(RefusedError, match="block"):
            client.subscribe("x", overflow="block")
        subscription = client.subscribe("x", overflow="drop_newest", max_pending_msgs=1)
        for n in range(3):
            client.publish("x", n)
        client.flush()
        assert subscription.next(WAIT).decode() == 0
        assert subscription.missed == 2
        assert client.stats().subscriptions == 1
