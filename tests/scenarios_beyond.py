"""More of `scenarios`: gaps, overflow, asking everybody, orderly ends, lost connections."""

from __future__ import annotations

import pytest
from scenario_bus import Stage
from scenarios import Joined, scenario

import evbus
from evbus import (
    ClientLimits,
    ConnectionLostError,
    ConnectStatus,
    Message,
    NoRespondersError,
    QueryTimeoutError,
    RemoteError,
    ResponderLostError,
    SlowConsumerError,
)

# ---- publishing ------------------------------------------------------------------------------------------------------


@scenario
async def publishing_for_the_others_only(bus: Stage) -> None:
    client, other, own, theirs = await bus.client(), await bus.client(), bus.log(), bus.log()
    await client.subscribe("a", own, type=int)
    await other.subscribe("a", theirs, type=int)
    await client.publish("a", 1, no_echo=True)
    await client.publish("a", 2)
    receipt = await client.publish("a", 3, no_echo=True, confirm=True)
    assert receipt.receivers == 1
    await client.publish_many("a", [4, 5], no_echo=True)
    await bus.idle()
    assert (own.items, theirs.items) == ([2], [1, 2, 3, 4, 5])


@scenario
async def publishing_many(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe("n", log)
    assert await client.publish_many("n", range(1000)) == 1000
    assert await client.publish_many("n", (b"x" for _ in range(10)), headers={"k": "v"}) == 10
    assert await client.publish_many("n", []) == 0
    got = await log.take(1010)
    assert [message.decode(int) for message in got[:1000]] == list(range(1000))
    assert {message.headers["k"] for message in got[1000:]} == {"v"}


@scenario
async def publishing_many_of_a_class(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe(Joined, log, type=Joined)
    assert await client.publish_many(Joined, [Joined("Ann"), Joined("Bob")], timeout=5.0) == 2
    assert await log.take(2) == [Joined("Ann"), Joined("Bob")]


@scenario
async def publishing_many_waits_for_room(bus: Stage) -> None:
    client, log = await bus.client(limits=ClientLimits(buffer_bytes=65536)), bus.log()
    await client.subscribe("big", log)
    assert await client.publish_many("big", (b"x" * 30_000 for _ in range(100))) == 100
    assert len(await log.take(100)) == 100


# ---- gaps and overflow -----------------------------------------------------------------------------------------------


@scenario
async def a_gap_is_told_in_order(bus: Stage) -> None:
    client, other, log, begun, release = await bus.client(), await bus.client(), bus.log(), bus.event(), bus.event()

    async def slow(number: int) -> None:
        begun.set()
        await release.wait()
        log(number)

    subscription = await client.subscribe("n", slow, max_pending_msgs=10, overflow="drop_newest", on_gap=log)
    for number in range(100):
        await other.publish("n", number)
    await begun.wait()
    await other.flush()
    await bus.until(lambda: subscription.received + subscription.dropped == 100)
    release.set()
    await bus.idle()
    await other.publish("n", 100)
    await bus.idle()
    gaps = [item for item in log.items if isinstance(item, evbus.Gap)]
    numbers = [item for item in log.items if not isinstance(item, evbus.Gap)]
    (gap,) = gaps
    assert (gap.subject, gap.reason) == ("n", "overflow")
    assert gap.count == 101 - len(numbers) == subscription.missed == client.stats().missed
    assert log.items.index(gap) == len(numbers) - 1  # before the first message that came after it
    assert numbers == [*range(len(numbers) - 1), 100]


@scenario
async def a_gap_of_the_oldest_comes_before_what_is_left(bus: Stage) -> None:
    client, other, gaps = await bus.client(), await bus.client(), bus.log()
    subscription = await client.subscribe("n", max_pending_msgs=10, overflow="drop_oldest", on_gap=gaps)
    for number in range(30):
        await other.publish("n", number)
    await other.flush()
    await bus.until(lambda: subscription.dropped == 20)
    assert gaps.items == []
    assert (await subscription.next(timeout=5)).decode(int) == 20
    assert gaps.items == [evbus.Gap("n", 20, "overflow")]
    assert subscription.missed == 20


@scenario
async def a_gap_that_nobody_asked_for_is_an_error(bus: Stage) -> None:
    errors = bus.log()
    client, other = await bus.client(on_error=errors), await bus.client()
    subscription = await client.subscribe("n", max_pending_msgs=10, overflow="drop_oldest")
    for number in range(30):
        await other.publish("n", number)
    await other.flush()
    await bus.until(lambda: subscription.dropped == 20)
    await subscription.next(timeout=5)
    error, _ = await errors.next()
    assert isinstance(error, SlowConsumerError)
    assert client.stats().missed == subscription.missed == 20


@scenario
async def a_subscriber_that_makes_its_publishers_wait(bus: Stage) -> None:
    client, other, log, release = await bus.client(), await bus.client(), bus.log(), bus.event()

    async def slow(number: int) -> None:
        await release.wait()
        log(number)

    subscription = await client.subscribe("n", slow, max_pending_msgs=16, overflow="block")

    async def publish() -> int:
        for number in range(500):
            await other.publish("n", number)
        return 500

    publishing = bus.start(publish())
    await bus.until(lambda: subscription.received >= 16)
    release.set()
    assert await publishing == 500
    assert await log.take(500) == list(range(500))
    assert (subscription.dropped, subscription.missed) == (0, 0)


# ---- query_all -------------------------------------------------------------------------------------------------------


@scenario
async def asking_everybody(bus: Stage) -> None:
    asker, senders = await bus.client(), set()
    for name in ("one", "two", "three"):
        responder = await bus.client()
        responder.on_query("who")(lambda message, name=name: name)
        await responder.flush()
    values = []
    async for reply in asker.query_all("who", None, str, timeout=10.0):
        assert reply.error is None
        assert isinstance(reply.message, Message)
        values.append(reply.value)
        senders.add(reply.sender)
    assert sorted(values) == ["one", "three", "two"]
    assert len(senders) == 3


@scenario
async def asking_everybody_of_whom_one_fails(bus: Stage) -> None:
    asker, good, bad = await bus.client(), await bus.client(), await bus.client()
    good.on_query("q")(lambda message: 1)
    bad.on_query("q")(lambda message: message.fail(7, "no"))
    await good.flush()
    await bad.flush()
    replies = [reply async for reply in asker.query_all("q", None, int)]
    assert sorted(reply.value for reply in replies if reply.error is None) == [1]
    (failed,) = [reply for reply in replies if reply.error is not None]
    assert isinstance(failed.error, RemoteError)
    with pytest.raises(RemoteError, match="no"):
        _ = failed.value


@scenario
async def asking_everybody_of_whom_one_goes_away(bus: Stage) -> None:
    asker, good, bad, begun, release = (
        await bus.client(),
        await bus.client(),
        await bus.client(),
        bus.event(),
        bus.event(),
    )

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    good.on_query("q")(lambda message: 1)
    bad.on_query("q")(slow)
    await good.flush()
    await bad.flush()

    async def collect() -> list[evbus.Reply[int]]:
        return [reply async for reply in asker.query_all("q", None, int)]

    asking = bus.start(collect())
    await begun.wait()
    closing = bus.start(bad.disconnect(drain=False))
    replies = await asking
    assert [reply.value for reply in replies if reply.error is None] == [1]
    assert [type(reply.error) for reply in replies if reply.error is not None] in ([], [ResponderLostError])
    release.set()
    await closing


@scenario
async def asking_everybody_where_nobody_is(bus: Stage) -> None:
    client = await bus.client()
    with pytest.raises(NoRespondersError):
        async for _ in client.query_all("q"):
            pass


@scenario
async def asking_everybody_of_whom_one_is_late(bus: Stage) -> None:
    asker, good, bad, release = await bus.client(), await bus.client(), await bus.client(), bus.event()

    async def slow(message: Message) -> None:
        await release.wait()

    good.on_query("q")(lambda message: 1)
    bad.on_query("q")(slow)
    await good.flush()
    await bad.flush()
    values = []
    with pytest.raises(QueryTimeoutError):
        async for reply in asker.query_all("q", None, int, timeout=0.2):
            values.append(reply.value)  # noqa: PERF401 - those before the error count
    assert values == [1]
    release.set()


@scenario
async def asking_everybody_until_one_is_enough(bus: Stage) -> None:
    asker, responder, release = await bus.client(), await bus.client(), bus.event()

    async def slow(message: Message) -> int:
        await release.wait()
        return 2

    responder.on_query("q")(lambda message: 1)
    await responder.flush()
    other = await bus.client()
    other.on_query("q")(slow)
    await other.flush()
    async with asker.query_all("q", None, int, timeout=10.0, headers={"k": "v"}) as replies:
        async for reply in replies:
            assert reply.value == 1
            break
    await asker.flush()
    assert asker.stats().pending_queries == 0
    await bus.until(lambda: bus.network.stats()["queries_pending"] == 0)
    release.set()


# ---- ending ----------------------------------------------------------------------------------------------------------


@scenario
async def unsubscribing_says_what_was_waiting(bus: Stage) -> None:
    client = await bus.client()
    subscription = await client.subscribe("n")
    for number in range(5):
        await client.publish("n", number, confirm=True)
    await client.rtt()
    assert await client.unsubscribe(subscription) == 5
    assert await client.unsubscribe(subscription) == 0


@scenario
async def unsubscribing_with_a_drain(bus: Stage) -> None:
    client, log, begun, release = await bus.client(), bus.log(), bus.event(), bus.event()

    async def slow(number: int) -> None:
        begun.set()
        await release.wait()
        log(number)

    subscription = await client.subscribe("n", slow)
    for number in range(5):
        await client.publish("n", number)
    await client.flush()
    await begun.wait()
    ending = bus.start(subscription.unsubscribe(drain=True, timeout=10.0))
    await client.rtt()
    await client.publish("n", 99)
    release.set()
    assert await ending == 0
    assert log.items == list(range(5))
    again = await client.subscribe("n", slow)
    await client.publish("n", 5)
    await bus.idle()
    assert await client.unsubscribe("n", slow, drain=True) == 0
    assert not again.is_active


@scenario
async def disconnecting_says_what_was_not_finished(bus: Stage) -> None:
    client, other, begun, release = await bus.client(), await bus.client(), bus.event(), bus.event()

    async def endless(message: Message) -> None:
        begun.set()
        await release.wait()

    await client.subscribe("work", endless)
    for _ in range(4):
        await other.publish("work")
    await other.flush()
    await begun.wait()
    await client.rtt()
    unfinished = await client.disconnect(drain=True, timeout=0.05)
    assert unfinished
    assert (unfinished.messages, unfinished.handlers, unfinished.queries) == (3, 1, 0)
    assert unfinished.unsent_bytes == 0
    release.set()
    assert not await other.disconnect()


@scenario
async def what_is_at_work_can_be_seen(bus: Stage) -> None:
    client, begun, release = await bus.client(), bus.event(), bus.event()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    subscription = await client.subscribe("a", slow)
    assert subscription.is_idle
    await client.publish("a")
    await begun.wait()
    assert not subscription.is_idle
    assert client.stats().at_work >= 1
    release.set()
    await bus.until(lambda: subscription.is_idle and not client.stats().at_work)


@scenario
async def a_handler_that_takes_too_long_is_counted(bus: Stage) -> None:
    client, begun, release = await bus.client(warn_after=0.02), bus.event(), bus.event()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    await client.subscribe("a", slow)
    await client.publish("a")
    await begun.wait()
    await bus.until(lambda: client.stats().slow_handlers == 1)
    release.set()


# ---- reconnecting ----------------------------------------------------------------------------------------------------


@scenario
async def a_client_reconnects_by_itself(bus: Stage) -> None:
    statuses, log, gaps = bus.log(), bus.log(), bus.log()
    client, other = await bus.client(on_status=statuses), await bus.client()
    await client.subscribe("n", log, type=int, on_gap=gaps)
    await statuses.take(2)
    bus.network.drop_connections()
    assert await statuses.next() is ConnectStatus.RECONNECTING
    await client.wait_connected(timeout=10.0)
    await other.wait_connected(timeout=10.0)
    await other.publish("n", 1, confirm=True)
    assert await log.next() == 1
    assert gaps.items == [evbus.Gap("n", None, "reconnect")]
    assert client.stats().connects == 2


@scenario
async def an_iteration_goes_on_after_a_reconnect(bus: Stage) -> None:
    client, gaps = await bus.client(), bus.log()
    subscription = await client.subscribe("n", on_gap=gaps)
    await client.publish("n", 1, confirm=True)
    await client.rtt()
    bus.network.drop_connections()
    await bus.until(lambda: client.status is not ConnectStatus.CONNECTED)
    assert (await subscription.next(timeout=10)).decode(int) == 1
    await client.wait_connected(timeout=10.0)
    await client.publish("n", 2, confirm=True)
    assert (await subscription.next(timeout=10)).decode(int) == 2
    assert gaps.items == [evbus.Gap("n", None, "reconnect")]


@scenario
async def what_was_under_way_fails_when_the_connection_is_lost(bus: Stage) -> None:
    client, begun, release = await bus.client(), bus.event(), bus.event()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    client.on_query("q")(slow)
    await client.flush()
    asking = bus.start(client.query("q", timeout=30.0))
    await begun.wait()
    bus.network.drop_connections()
    with pytest.raises(ConnectionLostError):
        await asking
    release.set()
    await client.wait_connected(timeout=10.0)
    assert await client.query("q") is None  # the responder is there again


@scenario
async def connecting_is_tried_again_if_asked_for(bus: Stage) -> None:
    bus.network.cut_after(0)
    client = bus.new_client()
    await client.connect(timeout=10.0, retry=True)
    assert client.status is ConnectStatus.CONNECTED


@scenario
async def unsubscribed_while_there_was_no_connection(bus: Stage) -> None:
    gone, stays = bus.log(), bus.log()
    client = await bus.client()
    await client.subscribe("n", gone, type=int)
    await client.subscribe("n", stays, type=int)
    bus.network.pause()
    bus.network.drop_connections()
    await bus.until(lambda: client.status is not ConnectStatus.CONNECTED)
    await client.unsubscribe("n", gone)
    bus.network.resume()
    await client.wait_connected(timeout=10.0)
    await client.publish("n", 1)
    assert await stays.next() == 1
    await bus.idle()
    assert gone.items == []
