"""What both clients do, each thing once; `test_scenarios` plays all of it with both, over TCP, Unix sockets and memory.

The text of a scenario is what a user of the asyncio client would write. `bus` is a `scenario_bus.Stage`: it makes
clients, logs (handlers that write down what they are given) and events; its `network` makes faults.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, TypedDict

import msgspec
import pytest
import reference as ref
from helpers_fake import Peer
from scenario_bus import Body, Stage

import evbus
from evbus import (
    AuthError,
    BufferFullError,
    ClientClosedError,
    ClientLimits,
    CodecError,
    ConfigError,
    ConfirmTimeoutError,
    ConnectError,
    ConnectionLostError,
    ConnectStatus,
    EvbusError,
    EventRouter,
    InvalidSubjectError,
    LimitError,
    Limits,
    Message,
    NoRespondersError,
    NotConnectedError,
    NotEventServerError,
    PayloadTooLargeError,
    PermissionDeniedError,
    Query,
    QueryError,
    QueryTimeoutError,
    Receipt,
    RefusedError,
    RemoteError,
    ResponderLostError,
    SlowConsumerError,
)

__all__ = ["SCENARIOS", "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """One, and what the server grants in it."""

    body: Body
    limits: Limits = field(default_factory=Limits)

    @property
    def name(self) -> str:
        return self.body.__name__


SCENARIOS: list[Scenario] = []


def scenario(body: Body | None = None, *, limits: Limits | None = None) -> Any:
    """Collect a scenario."""

    def collect(body: Body) -> Body:
        SCENARIOS.append(Scenario(body, limits if limits is not None else Limits()))
        return body

    return collect if body is None else collect(body)


#: For clients whose lost connection stays lost.
ONCE: dict[str, Any] = {"reconnect": False} if "reconnect" in inspect.signature(evbus.EventClient).parameters else {}


@dataclass
class Mail:
    to: str
    size: int


class Point(msgspec.Struct):
    x: int
    y: int


class Options(TypedDict):
    color: str


@evbus.event("user.joined")
@dataclass
class Joined:
    name: str


@dataclass
class Square(Query[int], subject="math.square"):
    number: int


# ---- connecting ------------------------------------------------------------------------------------------------------


@scenario
async def connecting_and_disconnecting(bus: Stage) -> None:
    statuses = bus.log()
    client = bus.new_client(on_status=statuses)
    assert client.status is ConnectStatus.DISCONNECTED
    assert await client.connect() is client
    assert await client.connect(timeout=1.0) is client  # again: nothing happens
    assert client.status is ConnectStatus.CONNECTED
    assert client.address
    assert client.stats().connects == 1
    await client.disconnect()
    await client.disconnect()
    assert client.status is ConnectStatus.CLOSED
    assert await statuses.take(4) == [
        ConnectStatus.CONNECTING,
        ConnectStatus.CONNECTED,
        ConnectStatus.DRAINING,
        ConnectStatus.CLOSED,
    ]


@scenario
async def a_client_is_a_context_manager(bus: Stage) -> None:
    async with bus.new_client(name="visitor", heartbeat=1.0, codec="msgpack", auth="not asked for") as client:
        assert await client.rtt(timeout=5.0) < 5.0
    assert client.status is ConnectStatus.CLOSED


@scenario
async def without_a_connection_every_call_says_so(bus: Stage) -> None:
    client = bus.new_client()
    for call in (client.publish("a", b""), client.flush(), client.query("a"), client.rtt()):
        with pytest.raises(NotConnectedError, match="connect"):
            await call


@scenario
async def after_the_end_every_call_says_so(bus: Stage) -> None:
    client = await bus.client()
    await client.disconnect()
    for call in (client.publish("a", b""), client.flush(), client.query("a"), client.subscribe("a"), client.connect()):
        with pytest.raises(ClientClosedError, match="closed"):
            await call


@scenario
async def nobody_is_there(bus: Stage) -> None:
    bus.network.close()
    client = bus.new_client()
    with pytest.raises(ConnectError, match="cannot connect"):
        await client.connect()
    assert client.status is ConnectStatus.DISCONNECTED


@scenario
async def somebody_else_is_there(bus: Stage) -> None:
    def web_server(peer: Peer, packet: ref.Packet | None) -> None:
        if packet is None:
            peer.send_bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    client = bus.client_of_fake(web_server)
    with pytest.raises(NotEventServerError, match="not an event server"):
        await client.connect()
    assert client.status is ConnectStatus.NOT_EVENT_SERVER


@scenario
async def wrong_credentials(bus: Stage) -> None:
    asked = bus.log()

    def strict(peer: Peer, packet: ref.Packet | None) -> None:
        if packet is not None:
            asked.items.append(packet.fields["AuthenticationToken"])
            peer.send(ref.RESPONSE, TaskId=packet.fields["TaskId"], Status=ref.FAIL, Message="unknown token")

    with pytest.raises(AuthError, match="unknown token") as caught:
        await bus.client_of_fake(strict, auth="secret").connect()
    assert "secret" not in str(caught.value)
    assert asked.items == ["secret"]


@scenario
async def options_that_make_no_sense(bus: Stage) -> None:
    for options in ({"codec": "xml"}, {"heartbeat": 0}, {"name": 7}, {"limits": 7}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            bus.new_client(**options)
    with pytest.raises(ConfigError, match="buffer_bytes"):
        ClientLimits(buffer_bytes=0)
    client = await bus.client()
    with pytest.raises(ConfigError, match="timeout"):
        await client.flush(timeout=-1)
    for wish in ({"concurrency": 0}, {"overflow": "explode"}, {"max_pending_msgs": 0}, {"max_pending_bytes": -1}):
        with pytest.raises(ConfigError, match=next(iter(wish))):
            await client.subscribe("a", print, **wish)


@scenario
async def rtt_is_the_time_there_and_back(bus: Stage) -> None:
    client = await bus.client()
    bus.network.delay(0.02)
    assert await client.rtt() >= 0.04


@scenario
async def a_lost_connection_is_told(bus: Stage) -> None:
    errors, statuses = bus.log(), bus.log()
    client = await bus.client(on_error=errors, on_status=statuses, **ONCE)
    assert bus.network.drop_connections() == 1
    error, message = await errors.next()
    assert isinstance(error, ConnectionLostError)
    assert message is None
    while await statuses.next() is not ConnectStatus.DISCONNECTED:
        pass
    with pytest.raises(NotConnectedError):
        await client.publish("a", b"")
    await client.connect()
    await client.publish("a", b"", confirm=True)
    assert client.stats().connects == 2


@scenario
async def a_silent_server_is_noticed(bus: Stage) -> None:
    errors = bus.log()
    await bus.client(heartbeat=0.05, on_error=errors, **ONCE)
    bus.network.pause()
    error, _ = await errors.next()
    assert isinstance(error, ConnectionLostError)
    assert "no sign of life" in error.reason


@scenario
async def a_server_that_breaks_the_protocol_is_left(bus: Stage) -> None:
    def babbler(peer: Peer, packet: ref.Packet | None) -> None:
        if packet is not None:
            peer.serve(packet)
            if packet.object_id == ref.PUBLISH:
                peer.send_bytes(b"\xff" * 64)

    errors = bus.log()
    client = await bus.client_of_fake(babbler, on_error=errors, **ONCE).connect()
    await client.publish("a", b"")
    error, _ = await errors.next()
    assert isinstance(error, ConnectionLostError)
    assert "the peer broke the protocol" in error.reason  # the words of ProtocolError


@scenario
async def a_server_that_stops_says_goodbye(bus: Stage) -> None:
    def leaving(peer: Peer, packet: ref.Packet | None) -> None:
        if packet is not None:
            peer.serve(packet)
            if packet.object_id == ref.PUBLISH:
                peer.send(ref.GO_AWAY, Reason=ref.CLOSES["SERVER_SHUTDOWN"], Text="back at noon")
                peer.close()

    errors = bus.log()
    client = await bus.client_of_fake(leaving, on_error=errors, **ONCE).connect()
    await client.publish("a", b"")
    error, _ = await errors.next()
    assert isinstance(error, ConnectionLostError)
    assert "back at noon" in error.reason


@scenario
async def subscriptions_made_before_connecting(bus: Stage) -> None:
    client, log = bus.new_client(), bus.log()
    subscription = await client.subscribe("news", log, type=str)
    client.on_query("double")(lambda message: 2 * message.decode(int))
    assert subscription.is_active
    await client.connect()
    other = await bus.client()
    await other.publish("news", "first")
    assert await log.next() == "first"
    assert await other.query("double", 4) == 8


@scenario
async def connecting_again_restores_the_subscriptions(bus: Stage) -> None:
    lost, log = bus.event(), bus.log()
    client = await bus.client(on_error=lambda error, message: lost.set(), **ONCE)
    await client.subscribe("news", log, type=str)
    bus.network.drop_connections()
    await lost.wait()
    await client.connect()
    await client.publish("news", "again")
    assert await log.next() == "again"


@scenario
async def disconnecting_finishes_what_was_begun(bus: Stage) -> None:
    statuses, begun, release, done = bus.log(), bus.event(), bus.event(), bus.log()
    client, other = await bus.client(on_status=statuses), await bus.client()
    await other.subscribe("done", done, type=int)

    async def slow(number: int) -> None:
        begun.set()
        await release.wait()
        await client.publish("done", number)

    await client.subscribe("work", slow)
    for number in range(3):
        await other.publish("work", number)
    await other.flush()
    await begun.wait()
    closing = bus.start(client.disconnect(drain=True, timeout=10.0))
    while await statuses.next() is not ConnectStatus.DRAINING:
        pass
    release.set()
    await closing
    assert await done.take(3) == [0, 1, 2]


@scenario
async def disconnecting_without_a_drain_discards(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    subscription = await client.subscribe("work")
    await other.publish("work", b"", confirm=True)
    await client.rtt()
    assert subscription.pending_msgs == 1
    await client.disconnect(drain=False)
    assert subscription.discarded == 1
    assert not subscription.is_active


@scenario
async def a_handler_may_disconnect_its_client(bus: Stage) -> None:
    client, done = await bus.client(), bus.event()

    async def last(message: Message) -> None:
        await client.disconnect()
        done.set()

    await client.subscribe("last", last)
    await client.publish("last")
    await done.wait()
    assert client.status is ConnectStatus.CLOSED


@scenario
async def counters(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    subscription = await client.subscribe("a", log, type=int)
    for number in range(10):
        await client.publish("a", number)
    await log.take(10)
    await bus.idle()
    stats = client.stats()
    assert (stats.published, stats.received, stats.handled, stats.subscriptions) == (10, 10, 10, 1)
    assert (stats.handler_errors, stats.dropped, stats.server_errors, stats.missed, stats.malformed) == (0, 0, 0, 0, 0)
    assert (stats.pending_msgs, stats.pending_bytes, stats.pending_queries, stats.late_answers) == (0, 0, 0, 0)
    assert (subscription.received, subscription.handled, subscription.errors, subscription.dropped) == (10, 10, 0, 0)
    assert subscription.pending_bytes == 0


# ---- publishing and subscribing --------------------------------------------------------------------------------------


@scenario
async def messages_come_in_order(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe("n", log, type=int)
    for number in range(1000):
        await client.publish("n", number)
    assert await log.take(1000) == list(range(1000))


@scenario
async def a_handler_is_given_what_it_is_annotated_with(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()

    @client.on("mail")
    async def mail(value: Mail) -> None:
        log(value)

    @client.on("point")
    def point(value: Point) -> None:
        log(value)

    @client.on("options")
    def options(value: Options) -> None:
        log(value)

    @client.on("list")
    def numbers(value: list[int]) -> None:
        log(value)

    await client.flush()
    for subject, value in {
        "mail": Mail("Ann", 3),
        "point": Point(1, 2),
        "options": {"color": "red"},
        "list": [1, 2],
    }.items():
        await client.publish(subject, value)
        assert await log.next() == value


@scenario
async def bytes_and_text_go_as_they_are(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe("raw", log)
    await client.publish("raw", b"\0\xff")
    await client.publish("raw", "grüß dich")
    await client.publish("raw")
    first, second, third = await log.take(3)
    assert (first.data, second.data, third.data) == (b"\0\xff", "grüß dich".encode(), b"")
    assert (first.decode(), second.decode(str)) == (b"\0\xff", "grüß dich")


@scenario
async def a_message_tells_where_it_comes_from(bus: Stage) -> None:
    client, other, log = await bus.client(), await bus.client(), bus.log()
    await client.subscribe("a.*", log)
    await other.publish("a.b", {"k": [1, None]}, headers={"trace": "7"})
    await other.publish("a.c", b"", confirm=True)
    await client.publish("a.d", b"")
    first, second, third = await log.take(3)
    assert (first.subject, first.headers, first.is_query) == ("a.b", {"trace": "7"}, False)
    assert first.decode(dict) == {"k": [1, None]}
    assert first.timestamp > 1.7e9
    assert first.sender == second.sender > 0
    assert third.sender not in (0, first.sender)
    assert second.headers == {}
    with pytest.raises(EvbusError, match="query"):
        first.reply(1)


@scenario
async def json_or_msgpack(bus: Stage) -> None:
    speaks_json, speaks_msgpack, log = await bus.client(codec="json"), await bus.client(codec="msgpack"), bus.log()
    await speaks_msgpack.subscribe("mail", log)
    await speaks_json.publish("mail", Mail("Ann", 3), confirm=True)  # there is no order between publishers
    await speaks_msgpack.publish("mail", Mail("Bob", 4))
    one, two = await log.take(2)
    assert one.data == b'{"to":"Ann","size":3}'
    assert two.data == msgspec.msgpack.encode({"to": "Bob", "size": 4})
    assert [one.decode(Mail), two.decode(Mail)] == [Mail("Ann", 3), Mail("Bob", 4)]


@scenario
async def patterns(bus: Stage) -> None:
    client, one, rest = await bus.client(), bus.log(), bus.log()
    await client.subscribe("a.*", one)
    await client.subscribe("a.>", rest)
    for subject in ("a", "a.b", "a.b.c", "b.a"):
        await client.publish(subject, b"")
    await bus.idle()
    assert [message.subject for message in one.items] == ["a.b"]
    assert [message.subject for message in rest.items] == ["a.b", "a.b.c"]


@scenario
async def every_subscription_of_a_client_gets_its_call(bus: Stage) -> None:
    client, logs = await bus.client(), [bus.log() for _ in range(3)]
    for log, subject in zip(logs, ("a.b", "a.b", "a.*"), strict=True):
        await client.subscribe(subject, log)
    await client.publish("a.b", b"")
    await bus.idle()
    assert [len(log.items) for log in logs] == [1, 1, 1]
    assert client.stats().received == 1  # one copy on the wire


@scenario
async def a_group_shares_the_messages(bus: Stage) -> None:
    client, all_of_them, shares = await bus.client(), bus.log(), [bus.log() for _ in range(3)]
    await client.subscribe("job", all_of_them, type=int)
    for log in shares:
        member = await (await bus.client()).subscribe("job", log, type=int, group="workers")
        assert member.group == "workers"
    for number in range(30):
        await client.publish("job", number)
    await bus.idle()
    assert all_of_them.items == list(range(30))
    assert sorted(number for log in shares for number in log.items) == list(range(30))
    assert all(log.items == sorted(log.items) for log in shares)


@scenario
async def unsubscribing(bus: Stage) -> None:
    client, one, two, three = await bus.client(), bus.log(), bus.log(), bus.log()
    await client.subscribe("a", one, type=int)
    await client.subscribe("a", two, type=int)
    third = await client.subscribe("a", three, type=int)
    await client.publish("a", 1)
    await bus.idle()
    await client.unsubscribe("a", one)  # this handler
    await client.publish("a", 2)
    await bus.idle()
    await client.unsubscribe(third)  # this subscription
    await client.publish("a", 3)
    await bus.idle()
    await client.unsubscribe("a")  # all that are left
    await client.unsubscribe("a")  # nothing happens
    await client.publish("a", 4)
    await bus.idle()
    assert (one.items, two.items, three.items) == ([1], [1, 2, 3], [1, 2])
    assert client.stats().subscriptions == 0


@scenario
async def a_decorated_function_stays_as_it_is(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()

    @client.on("a", group="g", concurrency=1, max_pending_msgs=10, max_pending_bytes=1000, overflow="close")
    def handler(number: int) -> None:
        log(number)

    await client.flush()
    handler(1)
    await client.publish("a", 2)
    await bus.idle()
    await client.unsubscribe("a", handler)
    await client.publish("a", 3)
    await bus.idle()
    assert log.items == [1, 2]


@scenario
async def iterating_over_a_subscription(bus: Stage) -> None:
    client = await bus.client()
    async with await client.subscribe("n") as subscription:
        assert (subscription.subject, subscription.group, subscription.handler) == ("n", None, None)
        with pytest.raises(TimeoutError):
            await subscription.next(timeout=0)
        with pytest.raises(TimeoutError, match=r"no message on .n. within 0\.01 s"):
            await subscription.next(timeout=0.01)
        for number in range(100):
            await client.publish("n", number)
        got: list[int] = []
        async for message in subscription:
            got.append(message.decode(int))
            if len(got) == 100:
                break
        assert got == list(range(100))
    assert not subscription.is_active
    assert [message async for message in subscription] == []
    with pytest.raises(StopAsyncIteration):
        await subscription.next()
    await subscription.unsubscribe()


@scenario
async def an_iteration_ends_with_its_connection(bus: Stage) -> None:
    client = await bus.client(**ONCE)
    subscription = await client.subscribe("n")
    await client.publish("n", 1, confirm=True)
    await client.rtt()
    bus.network.drop_connections()
    assert (await subscription.next(timeout=10)).decode(int) == 1
    with pytest.raises(ConnectionLostError):
        await subscription.next(timeout=10)


@scenario
async def handlers_at_the_same_time(bus: Stage) -> None:
    client, begun, release = await bus.client(), bus.log(), bus.event()

    async def handler(number: int) -> None:
        begun(number)
        await release.wait()

    await client.subscribe("a", handler, concurrency=3)
    for number in range(3):
        await client.publish("a", number)
    assert sorted(await begun.take(3)) == [0, 1, 2]
    release.set()


@scenario
async def a_blocked_handler_delays_no_other_subscription(bus: Stage) -> None:
    client, begun, release, log = await bus.client(), bus.event(), bus.event(), bus.log()

    async def blocked(message: Message) -> None:
        begun.set()
        await release.wait()

    await client.subscribe("slow", blocked)
    await client.subscribe("fast", log, type=int)
    await client.publish("slow")
    await begun.wait()
    for number in range(100):
        await client.publish("fast", number)
    assert await log.take(100) == list(range(100))
    release.set()


@scenario
async def a_handler_that_raises_is_reported_and_goes_on(bus: Stage) -> None:
    errors, log = bus.log(), bus.log()
    client = await bus.client(on_error=errors)

    async def careless(number: int) -> None:
        if number % 2:
            raise LookupError(number)
        log(number)

    subscription = await client.subscribe("n", careless)
    for number in range(4):
        await client.publish("n", number)
    assert await log.take(2) == [0, 2]
    told = await errors.take(2)
    assert [(type(error), error.args, message.decode(int)) for error, message in told] == [
        (LookupError, (1,), 1),
        (LookupError, (3,), 3),
    ]
    assert subscription.errors == client.stats().handler_errors == 2


@scenario
async def a_message_that_does_not_fit_is_reported(bus: Stage) -> None:
    errors, log = bus.log(), bus.log()
    client = await bus.client(on_error=errors)
    await client.subscribe("mail", log, type=Mail)
    await client.publish("mail", "no mail")
    await client.publish("mail", Mail("Ann", 3))
    error, message = await errors.next()
    assert isinstance(error, CodecError)
    assert (error.subject, message.data) == ("mail", b"no mail")
    assert await log.next() == Mail("Ann", 3)


@scenario
async def what_cannot_be_published(bus: Stage) -> None:
    client = await bus.client()
    with pytest.raises(CodecError, match="encode"):
        await client.publish("a", object())
    for subject in ("", "a..b", "a.*", ">", "x" * 257):
        with pytest.raises(InvalidSubjectError):
            await client.publish(subject, b"")
    with pytest.raises(InvalidSubjectError):
        await client.subscribe("a.>.b", print)
    with pytest.raises(ConfigError, match="headers"):
        await client.publish("a", b"", headers={"long": "x" * 20_000})
    with pytest.raises(TypeError):
        await client.publish(Joined, "Ann")
    assert client.stats().published == 0


@scenario(limits=Limits(payload_bytes=1000))
async def what_is_too_large(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe("a", log)
    with pytest.raises(PayloadTooLargeError, match=r"1,001 bytes, limit 1,000") as caught:
        await client.publish("a", b"x" * 1001)
    assert isinstance(caught.value, LimitError)
    assert (caught.value.size, caught.value.limit, caught.value.subject) == (1001, 1000, "a")
    await client.publish("a", b"x" * 1000)
    assert len((await log.next()).data) == 1000


@scenario(limits=Limits(subscriptions_per_connection=1))
async def what_the_server_refuses(bus: Stage) -> None:
    client = await bus.client()
    await client.subscribe("a", print)
    with pytest.raises(RefusedError, match="too many subscriptions") as caught:
        await client.subscribe("b", print)
    assert caught.value.subject == "b"
    assert client.stats().subscriptions == 1


@scenario
async def what_is_not_allowed(bus: Stage) -> None:
    def guard(peer: Peer, packet: ref.Packet | None) -> None:
        if packet is None:
            return
        if packet.object_id in (ref.SUBSCRIBE, ref.PUBLISH, ref.QUERY):
            peer.send(
                ref.ERROR,
                TaskId=packet.fields["TaskId"],
                Code=ref.ERRORS["PERMISSION_DENIED"],
                Subject=packet.fields["Subject"],
                Text="not for you",
            )
        else:
            peer.serve(packet)

    errors = bus.log()
    client = await bus.client_of_fake(guard, on_error=errors).connect()
    with pytest.raises(PermissionDeniedError, match="not for you") as caught:
        await client.subscribe("a", print)
    assert (caught.value.action, caught.value.subject) == ("subscribe", "a")
    with pytest.raises(PermissionDeniedError):
        await client.publish("a", b"", confirm=True)
    with pytest.raises(PermissionDeniedError):
        await client.query("a")
    await client.publish("b", b"")  # nobody waits for this one:
    with pytest.raises(PermissionDeniedError, match="'b'"):
        await client.flush()
    await client.flush()
    assert isinstance((await errors.next())[0], PermissionDeniedError)
    assert client.stats().server_errors == 1


@scenario
async def a_receipt_tells_how_many_receive(bus: Stage) -> None:
    client = await bus.client()
    assert await client.publish("a", b"", confirm=True) == Receipt(0)
    for _ in range(2):
        await (await bus.client()).subscribe("a", bus.log())
        await (await bus.client()).subscribe("a", bus.log(), group="g")
    receipt = await client.publish("a", b"", confirm=True, timeout=5.0)
    assert (receipt.receivers, receipt.dropped) == (3, 0)
    assert await client.publish("a", b"") is None


@scenario
async def no_receipt_in_time(bus: Stage) -> None:
    client = await bus.client()
    bus.network.pause()
    with pytest.raises(ConfirmTimeoutError, match=r"0\.02 s") as caught:
        await client.publish("a", b"", confirm=True, timeout=0.02)
    assert (caught.value.subject, caught.value.timeout) == ("a", 0.02)
    with pytest.raises(ConfirmTimeoutError):
        await client.flush(timeout=0.02)
    bus.network.resume()
    await client.flush()


@scenario
async def no_receipt_without_a_connection(bus: Stage) -> None:
    client = await bus.client(**ONCE)
    bus.network.cut_after(10)
    with pytest.raises(ConnectionLostError, match="outcome is unknown"):
        await client.publish("a", b"", confirm=True)


@scenario
async def flush_returns_when_the_server_has_all(bus: Stage) -> None:
    client = await bus.client()
    for _ in range(100):
        await client.publish("a", b"x")
    await client.flush(timeout=10)
    assert bus.network.stats()["published"] == 100


@scenario
async def a_full_buffer(bus: Stage) -> None:
    client = await bus.client(limits=ClientLimits(buffer_bytes=65536))
    log = bus.log()
    await (await bus.client()).subscribe("big", log)
    bus.network.pause()
    sent = 0
    with pytest.raises(BufferFullError, match="buffer is full") as caught:
        while True:
            await client.publish("big", b"x" * 30_000, timeout=0)
            sent += 1
    assert isinstance(caught.value, LimitError)
    with pytest.raises(BufferFullError):
        while True:  # the system takes a little more, in its own time
            await client.publish("big", b"x" * 30_000, timeout=0.02)
            sent += 1
    waiting = bus.start(client.publish("big", b"last"))
    bus.network.resume()
    await waiting
    assert [len(message.data) for message in await log.take(sent + 1)] == [30_000] * sent + [4]


@scenario
async def overflow_closes_the_subscription(bus: Stage) -> None:
    errors, release, begun, fine = bus.log(), bus.event(), bus.event(), bus.log()
    client, other = await bus.client(on_error=errors), await bus.client()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    subscription = await client.subscribe("n", slow, max_pending_msgs=5)
    await client.subscribe("fine", fine, type=int)
    await other.publish("n", 0)
    await begun.wait()
    for number in range(100):
        await other.publish("n", number)
    error, _ = await errors.next()
    assert isinstance(error, SlowConsumerError)
    assert (error.subject, error.limit, error.unit) == ("n", 5, "messages")
    assert error.pending == error.size >= 5
    assert not subscription.is_active
    release.set()
    await other.publish("fine", 1)  # the connection is as it was
    assert await fine.next() == 1


@scenario
async def overflow_ends_an_iteration(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    subscription = await client.subscribe("n", max_pending_bytes=1000, overflow="close")
    for _ in range(20):
        await other.publish("n", b"x" * 100)
    await other.flush()
    with pytest.raises(SlowConsumerError) as caught:
        while True:
            await subscription.next(timeout=10)
    assert caught.value.unit == "bytes"


@scenario
async def overflow_drops_the_newest(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    subscription = await client.subscribe("n", max_pending_msgs=10, overflow="drop_newest")
    for number in range(30):
        await other.publish("n", number)
    await other.flush()
    await bus.until(lambda: subscription.received + subscription.dropped == 30)
    assert [(await subscription.next(timeout=0)).decode(int) for _ in range(10)] == list(range(10))
    assert subscription.dropped == client.stats().dropped == 20


@scenario
async def overflow_drops_the_oldest(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    subscription = await client.subscribe("n", max_pending_msgs=10, overflow="drop_oldest")
    for number in range(30):
        await other.publish("n", number)
    await other.flush()
    await bus.until(lambda: subscription.dropped == 20)
    assert [(await subscription.next(timeout=0)).decode(int) for _ in range(10)] == list(range(20, 30))


# ---- queries ---------------------------------------------------------------------------------------------------------


@scenario
async def asking_and_answering(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()

    @client.on_query("mail.find")
    async def find(name: str) -> list[Mail]:
        return [Mail(name, 1), Mail(name, 2)]

    await client.flush()
    assert await other.query("mail.find", "Ann", list[Mail]) == [Mail("Ann", 1), Mail("Ann", 2)]
    assert await other.query("mail.find", "Ann") == [{"to": "Ann", "size": 1}, {"to": "Ann", "size": 2}]
    answer = await other.query("mail.find", "Ann", Message, timeout=5.0)
    assert (answer.decode(list[Mail])[1], answer.is_query) == (Mail("Ann", 2), False)
    assert answer.sender > 0


@scenario
async def what_a_responder_knows_of_a_query(bus: Stage) -> None:
    client, other, log = await bus.client(), await bus.client(), bus.log()

    @client.on_query("q", concurrency=2)
    def answer(message: Message) -> None:
        log((message.is_query, message.headers, 0 < message.deadline_ms <= 2001, message.answered))
        message.reply(1)
        assert message.answered
        with pytest.raises(EvbusError, match="answered already"):
            message.reply(2)

    await client.flush()
    assert await other.query("q", headers={"k": "v"}, timeout=2.0) == 1
    assert await log.next() == (True, {"k": "v"}, True, False)


@scenario
async def a_responder_may_answer_later(bus: Stage) -> None:
    client, other, log = await bus.client(), await bus.client(), bus.log()
    await client.subscribe("q", log)
    asking = bus.start(other.query("q", 21, int))
    message = await log.next()
    message.reply(2 * message.decode(int), headers={"k": "v"})
    assert await asking == 42


@scenario
async def a_responder_that_returns_none_has_answered(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    client.on_query("q", type=int)(lambda number: None)
    await client.flush()
    assert await other.query("q", 1) is None


@scenario
async def a_responder_that_raises(bus: Stage) -> None:
    errors = bus.log()
    client, other = await bus.client(on_error=errors), await bus.client()

    @client.on_query("q")
    async def answer(number: int) -> int:
        raise LookupError("no such thing")

    await client.flush()
    with pytest.raises(RemoteError, match="no such thing") as caught:
        await other.query("q", 1)
    assert (caught.value.code, caught.value.subject) == (500, "q")
    assert isinstance(caught.value, QueryError)
    assert isinstance((await errors.next())[0], LookupError)


@scenario
async def a_responder_that_fails_in_its_own_words(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    client.on_query("q")(lambda message: message.fail(404, "not found"))
    await client.flush()
    with pytest.raises(RemoteError) as caught:
        await other.query("q")
    assert (caught.value.code, caught.value.text) == (404, "not found")
    assert caught.value.sender > 0


@scenario
async def nobody_answers(bus: Stage) -> None:
    client = await bus.client()
    with pytest.raises(NoRespondersError, match="nobody answers queries on 'q'"):
        await client.query("q", timeout=60.0)  # told at once
    assert client.stats().pending_queries == 0


@scenario
async def no_answer_in_time(bus: Stage) -> None:
    client, other, release = await bus.client(), await bus.client(), bus.event()

    async def slow(message: Message) -> int:
        await release.wait()
        return 1

    client.on_query("q")(slow)
    await client.flush()
    with pytest.raises(QueryTimeoutError, match=r"0\.02 s") as caught:
        await other.query("q", timeout=0.02)
    assert caught.value.timeout == 0.02
    release.set()
    assert await other.query("q") == 1  # the late answer of the first one did not get in its way


@scenario
async def a_responder_that_goes_away(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    begun, release = bus.event(), bus.event()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    client.on_query("q")(slow)
    await client.flush()
    asking = bus.start(other.query("q"))
    await begun.wait()
    closing = bus.start(client.disconnect(drain=False))
    with pytest.raises(ResponderLostError, match="went away"):
        await asking
    release.set()
    await closing


@scenario
async def an_asker_that_loses_its_connection(bus: Stage) -> None:
    client, begun, release = await bus.client(**ONCE), bus.event(), bus.event()

    async def slow(message: Message) -> None:
        begun.set()
        await release.wait()

    client.on_query("q")(slow)
    await client.flush()
    asking = bus.start(client.query("q"))
    await begun.wait()
    bus.network.drop_connections()
    with pytest.raises(ConnectionLostError, match="query"):
        await asking
    release.set()


@scenario
async def an_answer_that_does_not_fit(bus: Stage) -> None:
    client = await bus.client()
    client.on_query("q")(lambda message: "text")
    await client.flush()
    with pytest.raises(CodecError, match="'q'"):
        await client.query("q", None, int)


@scenario
async def responders_take_turns(bus: Stage) -> None:
    asker, names = await bus.client(), ["one", "two", "three"]
    for name in names:
        responder = await bus.client()
        responder.on_query("who")(lambda message, name=name: name)
        await responder.flush()
    answers = [await asker.query("who", None, str) for _ in range(9)]
    assert sorted(answers) == sorted(3 * names)


@scenario
async def plain_subscribers_answer_where_there_is_no_responder(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()

    async def by_publishing(message: Message) -> None:
        await client.publish("sum", sum(message.decode(list[int])))

    await client.subscribe("sum", by_publishing)
    await client.subscribe("max", lambda numbers: max(numbers), type=list[int])
    await client.subscribe("max", lambda numbers: None, type=list[int])  # has nothing to say
    assert await other.query("sum", [1, 2, 3]) == 6
    assert await other.query("max", [1, 2, 3]) == 3


@scenario
async def with_a_responder_plain_subscribers_are_not_asked(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()
    await client.subscribe("q", log)
    client.on_query("q")(lambda message: "answer")
    await client.flush()
    assert await client.query("q") == "answer"
    await client.publish("q", b"event")
    await bus.idle()
    assert [message.data for message in log.items] == [b"event"]


@scenario
async def handlers_may_ask(bus: Stage) -> None:
    client = await bus.client()

    @client.on_query("factorial")
    async def factorial(number: int) -> int:
        return 1 if number == 0 else number * await client.query("factorial", number - 1, int)

    # Each level waits for the next, so each needs a handler of its own.
    for _ in range(5):
        client.on_query("factorial")(factorial)
    await client.flush()
    assert await client.query("factorial", 5) == 120


@scenario
async def many_queries_at_once(bus: Stage) -> None:
    client, other = await bus.client(), await bus.client()
    client.on_query("echo", type=int, concurrency=4)(lambda number: number)
    await client.flush()
    assert await bus.gather(*(other.query("echo", number, int) for number in range(50))) == list(range(50))
    assert bus.network.stats()["queries_pending"] == 0


# ---- classes and routers ---------------------------------------------------------------------------------------------


@scenario
async def classes_that_name_their_subject(bus: Stage) -> None:
    client, log = await bus.client(), bus.log()

    @client.on(Joined)
    async def joined(event: Joined) -> None:
        log(event)

    await client.subscribe(Joined, log)
    await client.flush()
    await client.publish(Joined("Ann"))
    assert await log.take(2) == [Joined("Ann")] * 2
    await client.unsubscribe(Joined, joined)
    await client.publish(Joined, Joined("Bob"))
    await bus.idle()
    assert log.items[2:] == [Joined("Bob")]


@scenario
async def queries_that_name_their_answer(bus: Stage) -> None:
    client = await bus.client()

    @client.on_query(Square)
    async def square(query: Square) -> int:
        return query.number**2

    await client.flush()
    assert await client.query(Square(7)) == 49
    with pytest.raises(CodecError):
        await client.query(Square(7), response=list[str])


@scenario
async def a_router_declares_handlers(bus: Stage) -> None:
    log = bus.log()
    outer, inner = EventRouter("shop"), EventRouter("order")

    @inner.on("new", group="workers")
    def new(number: int) -> None:
        log(number)

    @inner.on_query("price")
    def price(item: str) -> int:
        return {"nut": 3}[item]

    @outer.on(Joined)
    def joined(event: Joined) -> None:
        log(event)

    outer.include(inner)
    client = await bus.client()
    made = await client.include(outer)
    assert {one.subject for one in made} == {"shop.order.new", "shop.order.price", "user.joined"}
    await client.publish("shop.order.new", 1)
    await client.publish(Joined("Ann"))
    assert await log.take(2) in ([1, Joined("Ann")], [Joined("Ann"), 1])
    assert await client.query("shop.order.price", "nut", int) == 3


@scenario
async def a_router_is_included_whole_or_not_at_all(bus: Stage) -> None:
    router = EventRouter()
    router.on("a")(print)
    router.on("b", concurrency=0)(print)
    client = await bus.client()
    with pytest.raises(ConfigError, match="concurrency"):
        await client.include(router)
    assert client.stats().subscriptions == 0


# ---- callbacks -------------------------------------------------------------------------------------------------------


@scenario
async def callbacks_may_use_the_client(bus: Stage) -> None:
    told, log = bus.log(), bus.log()
    clients: list[Any] = []

    async def on_error(error: BaseException, message: Message | None) -> None:
        told(error)
        await clients[0].publish("trouble", str(error))

    client = await bus.client(on_error=on_error)
    clients.append(client)
    await client.subscribe("trouble", log, type=str)

    def careless(message: Message) -> None:
        raise LookupError("oh")

    await client.subscribe("a", careless)
    await client.publish("a", b"")
    assert isinstance(await told.next(), LookupError)
    assert await log.next() == "oh"


@scenario
async def callbacks_that_raise_do_no_harm(bus: Stage) -> None:
    def on_status(status: ConnectStatus) -> None:
        raise LookupError(status)

    def on_error(error: BaseException, message: Message | None) -> None:
        raise error

    log = bus.log()
    client = await bus.client(on_status=on_status, on_error=on_error)
    await client.subscribe("n", log, type=int)
    await client.publish("n", "no number")
    await client.publish("n", 1)
    assert await log.next() == 1
