"""AsyncEventClient against a real EventServer, and servers that stall or refuse, on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import logging
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from test_client import Peer, ScriptedServer

import evbus
from evbus import (
    AsyncEventClient,
    AsyncSubscription,
    BufferFullError,
    ClientClosedError,
    ClientLimits,
    CodecError,
    ConfigError,
    ConfirmTimeoutError,
    ConnectError,
    ConnectionLostError,
    ConnectStatus,
    EventClient,
    EventServer,
    Gap,
    InvalidSubjectError,
    Message,
    NoRespondersError,
    NotConnectedError,
    NotEventServerError,
    PayloadTooLargeError,
    QueryTimeoutError,
    Receipt,
    RemoteError,
    ResponderLostError,
    SlowConsumerError,
)

WAIT = 20.0
LOOPS = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]

Scenario = Callable[..., Coroutine[Any, Any, None]]


@dataclass
class Mail:
    subject: str
    size: int


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "uvloop":
        loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
        return loop
    return asyncio.SelectorEventLoop()


def run(scenario: Awaitable[None], kind: str = "asyncio") -> None:
    """To its end, on a loop of its own, with nothing left behind."""

    async def main() -> None:
        await asyncio.wait_for(scenario, WAIT)  # type: ignore[arg-type]  # a coroutine
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    loop = new_loop(kind)
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    try:
        loop.run_until_complete(main())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert not failures


def on_loops(scenario: Scenario) -> Any:
    """A coroutine function as a test on each kind of loop; it is given the server's port."""

    def test(server: EventServer, kind: str) -> None:
        run(scenario(server.port), kind)

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return pytest.mark.parametrize("kind", LOOPS)(test)


@asynccontextmanager
async def client_of(port: int, **options: Any) -> AsyncIterator[AsyncEventClient]:
    async with AsyncEventClient("127.0.0.1", port, **options) as client:
        yield client
        assert client.stats().pending_queries == 0


async def until(true: Callable[[], object]) -> None:
    """Let the loop run until something is so; `run` bounds it."""
    while not true():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.001)


# ---- life ------------------------------------------------------------------------------------------------------------


@on_loops
async def test_connect_and_disconnect(port: int) -> None:
    told: list[ConnectStatus] = []
    client = AsyncEventClient("127.0.0.1", port, on_status=told.append)
    assert client.status is ConnectStatus.DISCONNECTED
    assert client.address == f"127.0.0.1:{port}"
    for call in (client.publish("a"), client.flush(), client.query("a"), client.rtt()):
        with pytest.raises(NotConnectedError):
            await call
    assert await asyncio.gather(client.connect(), client.connect()) == [client, client]
    assert await client.connect() is client
    assert 0 < await client.rtt() < WAIT
    assert "connected" in repr(client)
    assert client.stats().connects == 1
    await asyncio.gather(client.disconnect(), client.disconnect())
    await client.disconnect()
    await asyncio.sleep(0)
    S = ConnectStatus
    assert told == [S.CONNECTING, S.CONNECTED, S.DRAINING, S.CLOSED]
    for call in (client.publish("a"), client.flush(), client.query("a"), client.subscribe("a"), client.connect()):
        with pytest.raises(ClientClosedError):
            await call
    with pytest.raises(ClientClosedError):
        client.on("a")(print)


@on_loops
async def test_coroutine_callbacks_run_in_order(port: int) -> None:
    told: list[Any] = []

    async def on_status(status: ConnectStatus) -> None:
        await asyncio.sleep(0)
        told.append(status)
        if status is ConnectStatus.CONNECTED:
            raise LookupError("a callback may fail")

    async with client_of(port, on_status=on_status):
        await until(lambda: len(told) == 2)
    await until(lambda: len(told) == 4)
    assert [status.name for status in told] == ["CONNECTING", "CONNECTED", "DRAINING", "CLOSED"]


@pytest.mark.parametrize("kind", LOOPS)
def test_nobody_there(kind: str) -> None:
    async def scenario() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            client = AsyncEventClient("127.0.0.1", port)
            with pytest.raises(ConnectError, match=f"127.0.0.1:{port}.*refused.*evbus serve"):
                await client.connect()
            assert client.status is ConnectStatus.DISCONNECTED
        with pytest.raises(ConnectError, match="unknown"):
            await AsyncEventClient("no such host.invalid").connect()

    run(scenario(), kind)


def test_strangers() -> None:
    def silent(peer: Peer) -> None:
        while peer.sock.recv(4096):
            pass

    async def scenario(port: int) -> None:
        client = AsyncEventClient("127.0.0.1", port)
        with pytest.raises(NotEventServerError, match="did not answer"):
            await client.connect(0.1)
        assert client.status is ConnectStatus.NOT_EVENT_SERVER
        task = asyncio.create_task(client.connect())
        await until(lambda: client.status is ConnectStatus.CONNECTING)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client._session.is_connected
        assert client.stats().pending_queries == 0

    with ScriptedServer(silent) as script:
        run(scenario(script.port))


def test_options() -> None:
    for options in ({"codec": "xml"}, {"heartbeat": 0}, {"host": ""}, {"port": 0}):
        with pytest.raises(ConfigError):
            AsyncEventClient(**options)  # type: ignore[arg-type]


@on_loops
async def test_disconnect_finishes_what_was_begun(port: int) -> None:
    async with client_of(port) as other, client_of(port) as client:
        log = await other.subscribe("drain.done")
        begun, release = asyncio.Event(), asyncio.Event()

        async def slow(number: int) -> None:
            begun.set()
            await release.wait()
            await client.publish("drain.done", number)

        await client.subscribe("drain.work", slow)
        for number in range(3):
            await other.publish("drain.work", number)
        await begun.wait()
        await other.flush()
        closing = asyncio.create_task(client.disconnect())
        await until(lambda: client.status is ConnectStatus.DRAINING)
        release.set()
        await closing
        assert [(await log.next(WAIT)).decode(int) for _ in range(3)] == [0, 1, 2]


@on_loops
async def test_disconnect_cancels_what_does_not_end(port: int) -> None:
    ended: list[str] = []

    async def endless(_: bytes) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with client_of(port) as client:
        await client.subscribe("endless", endless)
        await client.publish("endless", b"")
        await until(lambda: client.stats().received)
        await asyncio.sleep(0)
        await client.disconnect(timeout=0.01)
    assert ended == ["cancelled"]


@on_loops
async def test_disconnect_inside_a_handler(port: int) -> None:
    client = await AsyncEventClient("127.0.0.1", port).connect()
    ended = asyncio.Event()

    async def last(_: bytes) -> None:
        await client.disconnect()
        ended.set()

    await client.subscribe("last", last)
    await client.publish("last", b"")
    await ended.wait()
    assert client.status is ConnectStatus.CLOSED


@on_loops
async def test_a_cancelled_disconnect_closes(port: int) -> None:
    client = await AsyncEventClient("127.0.0.1", port).connect()

    async def endless(_: bytes) -> None:
        await asyncio.Event().wait()

    await client.subscribe("endless.2", endless)
    await client.publish("endless.2", b"")
    await until(lambda: client.stats().received)
    task = asyncio.create_task(client.disconnect(timeout=WAIT))
    await until(lambda: client.status is ConnectStatus.DRAINING)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.status is ConnectStatus.CLOSED


# ---- events ----------------------------------------------------------------------------------------------------------


@on_loops
async def test_handlers_of_every_kind_in_order(port: int) -> None:
    async with client_of(port) as client:
        got: dict[str, list[int]] = {name: [] for name in ("plain", "coroutine", "suspends", "lambda", "partial")}

        async def coroutine(number: int) -> None:
            got["coroutine"].append(number)

        async def suspends(number: int) -> None:
            if number % 7 == 0:
                await asyncio.sleep(0)
            got["suspends"].append(number)

        async def later(name: str, number: int) -> None:
            got[name].append(number)

        await client.subscribe("kinds", got["plain"].append, type=int)
        await client.subscribe("kinds", coroutine)
        await client.subscribe("kinds", suspends)
        await client.subscribe("kinds", lambda number: later("lambda", number), type=int)
        await client.subscribe("kinds", functools.partial(later, "partial"), type=int)
        for number in range(5000):
            await client.publish("kinds", number)
        await until(lambda: all(len(numbers) == 5000 for numbers in got.values()))
        assert all(numbers == list(range(5000)) for numbers in got.values())
    assert client.stats().handled == 25_000


@on_loops
async def test_typed_handlers_and_envelopes(port: int) -> None:
    errors: list[Any] = []
    async with client_of(port, on_error=lambda *error: errors.append(error)) as client:
        mails: list[Mail] = []
        envelopes: list[Message] = []

        @client.on("typed.*")
        async def typed(mail: Mail) -> None:
            mails.append(mail)

        @client.on("typed.>")
        async def envelope(message: Message) -> None:
            envelopes.append(message)

        await client.flush()
        await client.publish("typed.a", Mail("hello", 3), headers={"from": "me"})
        await client.publish("typed.a", "no mail")
        await until(lambda: len(envelopes) == 2 and errors)
        assert mails == [Mail("hello", 3)]
        assert envelopes[0].headers == {"from": "me"}
        assert envelopes[0].decode(Mail) == Mail("hello", 3)
        ((error, message),) = errors
        assert isinstance(error, CodecError)
        assert message.data == envelopes[1].data
        await client.unsubscribe("typed.*", typed)
        await client.publish("typed.a", Mail("late", 0))
        await until(lambda: len(envelopes) == 3)
        assert len(mails) == 1
        assert client.stats().subscriptions == 1


@on_loops
async def test_a_handler_that_raises_is_reported_and_goes_on(port: int) -> None:
    errors: list[Any] = []
    async with client_of(port, on_error=lambda *error: errors.append(error)) as client:
        got: list[int] = []

        async def careless(number: int) -> None:
            await asyncio.sleep(0)
            if number == 1:
                raise LookupError(number)
            if number == 2:
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            got.append(number)

        await client.subscribe("raises", careless)
        for number in range(4):
            await client.publish("raises", number)
        await until(lambda: len(got) == 2)
        assert got == [0, 3]
        assert [type(error) for error, _ in errors] == [LookupError, asyncio.CancelledError]
        assert client.stats().handler_errors == 2


@on_loops
async def test_a_handler_may_use_timeouts(port: int) -> None:
    async with client_of(port) as client:
        got: list[str] = []

        async def patient(_: bytes) -> None:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.001)
            except (asyncio.TimeoutError, TimeoutError):
                got.append("timeout")

        await client.subscribe("patient", patient)
        await client.publish("patient", b"")
        await until(lambda: got)


@on_loops
async def test_concurrency(port: int) -> None:
    async with client_of(port) as client:
        together = 0
        most = 0
        done = 0

        async def handler(_: int) -> None:
            nonlocal together, most, done
            together += 1
            most = max(most, together)
            await asyncio.sleep(0.001)
            together -= 1
            done += 1

        await client.subscribe("many", handler, concurrency=4)
        for number in range(40):
            await client.publish("many", number)
        await until(lambda: done == 40)
        assert most == 4


@on_loops
async def test_iteration(port: int) -> None:
    async with client_of(port) as client:
        async with await client.subscribe("iter") as subscription:
            assert isinstance(subscription, AsyncSubscription)
            with pytest.raises(TimeoutError):
                await subscription.next(0)
            with pytest.raises(TimeoutError, match="iter"):
                await subscription.next(0.01)
            for number in range(5000):
                await client.publish("iter", number)
            got = []
            async for message in subscription:
                got.append(message.decode(int))
                if len(got) == 5000:
                    break
            assert got == list(range(5000))
            taker = asyncio.create_task(subscription.next())
            await asyncio.sleep(0)
            taker.cancel()
            await asyncio.wait([taker])
            await client.publish("iter", -1)
            assert (await subscription.next(WAIT)).decode(int) == -1
        assert [message async for message in subscription] == []
        assert not subscription.is_active
        handled = await client.subscribe("iter", print)
        with pytest.raises(TypeError, match="has a handler"):
            await handled.next()
        with pytest.raises(TypeError, match="has a handler"):
            aiter_of(handled)


def aiter_of(subscription: AsyncSubscription) -> object:
    return subscription.__aiter__()


@on_loops
async def test_an_iterator_shares_the_loop(port: int) -> None:
    """And so does a task that only publishes."""
    async with client_of(port) as client:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        for _ in range(20_000):
            await client.publish("nobody", bytes(128))
        assert turns > 20
        for _ in range(20):
            await client.publish("nobody", bytes(70_000))
        assert turns > 40
        task.cancel()


@on_loops
async def test_refused_subscriptions(port: int) -> None:
    async with client_of(port) as client:
        for subject in ("a..b", "", "a b\n"):
            with pytest.raises(InvalidSubjectError):
                await client.subscribe(subject)
        with pytest.raises(TypeError, match="one argument"):
            await client.subscribe("a", lambda: None)  # type: ignore[arg-type,misc]
        with pytest.raises(ConfigError, match="overflow"):
            await client.subscribe("a", overflow="burst")
        assert client.stats().subscriptions == 0


def test_the_sync_client_still_refuses_coroutine_functions(server: EventServer) -> None:
    async def handler(_: object) -> None: ...

    with EventClient("127.0.0.1", server.port) as client:
        for kind in (None, bytes):
            with pytest.raises(TypeError, match="AsyncEventClient"):
                client.subscribe("a", handler, type=kind)


def test_a_decorator_that_the_server_refuses() -> None:
    with EventServer(port=0, limits=evbus.Limits(subscriptions=1)) as server:

        async def scenario() -> None:
            async with client_of(server.port) as client:
                client.on("one")(print)
                client.on("two")(print)
                with pytest.raises(evbus.EvbusError, match=r"two|subscription"):
                    await client.flush()
                await client.flush()
                with pytest.raises(evbus.EvbusError):
                    await client.subscribe("three")
                assert client.stats().subscriptions == 1

        run(scenario())


@on_loops
async def test_overflow_closes_the_subscription(port: int) -> None:
    errors: list[BaseException] = []
    async with client_of(port, on_error=lambda error, _: errors.append(error)) as client:
        subscription = await client.subscribe("flood", max_pending_msgs=10)
        for number in range(11):
            await client.publish("flood", number)
        await client.flush()
        got = []
        with pytest.raises(SlowConsumerError):
            async for message in subscription:
                got.append(message.decode(int))  # noqa: PERF401
        assert got == list(range(10))
        assert subscription.dropped == 1
        await until(lambda: errors)  # told in a turn of its own
        assert [type(error) for error in errors] == [SlowConsumerError]


@on_loops
async def test_groups(port: int) -> None:
    async with client_of(port) as client:
        first = await client.subscribe("job", group="workers")
        second = await client.subscribe("job", group="workers")
        for number in range(10):
            await client.publish("job", number)
        await client.flush()
        assert (first.received, second.received) == (5, 5)
        assert first.group == "workers"


# ---- publishing ------------------------------------------------------------------------------------------------------


@on_loops
async def test_receipts_and_payloads(port: int) -> None:
    async with client_of(port) as client:
        assert await client.publish("nobody.here", b"", confirm=True) == Receipt(0, 0)
        subscription = await client.subscribe("kind")
        assert await client.publish("kind", b"bytes", confirm=True, timeout=WAIT) == Receipt(1, 0)
        for value in ("text", {"a": [1]}, None):
            assert await client.publish("kind", value) is None
        await client.publish("kind")
        values = [(await subscription.next(WAIT)).decode() for _ in range(5)]
        assert values == [b"bytes", "text", {"a": [1]}, None, values[4]]
        with pytest.raises(PayloadTooLargeError):
            await client.publish("kind", bytes(2 << 20))
        with pytest.raises(InvalidSubjectError):
            await client.publish("a.*", b"")
        with pytest.raises(CodecError):
            await client.publish("kind", object())
        with pytest.raises(ConfigError):
            await client.publish("kind", b"", confirm=True, timeout=0)


def test_backpressure_of_a_server_that_stalls() -> None:
    """64 MiB to a server that does not read: the publisher is suspended, and memory stays within the limit (R44)."""
    release = threading.Event()
    limit = 1 << 20

    async def scenario(port: int) -> None:
        async with client_of(port, limits=ClientLimits(buffer_bytes=limit)) as client:
            sent = 0

            async def pour() -> None:
                nonlocal sent
                while sent < 64 << 20:
                    await client.publish("s", bytes(65536))
                    sent += 65536

            task = asyncio.create_task(pour())
            before = -1
            while before != sent or not client.stats().pending_bytes:
                before = sent
                await asyncio.sleep(0.05)
                assert client.stats().pending_bytes <= limit
            assert not task.done()
            with pytest.raises(BufferFullError):
                await client.publish("s", bytes(limit - 1024), timeout=0)
            with pytest.raises(BufferFullError):
                await client.publish("s", bytes(limit - 1024), timeout=0.01)
            with pytest.raises(ConfirmTimeoutError):
                await client.flush(0.01)
            large = asyncio.create_task(client.publish("s", bytes(limit - 1024)))
            cancelled = asyncio.create_task(client.publish("s", bytes(limit - 1024)))
            await asyncio.sleep(0)
            cancelled.cancel()
            release.set()
            await asyncio.gather(task, large)
            await client.flush()
            assert client.stats().pending_bytes == 0
            assert client.stats().published == (64 << 20) // 65536 + 1

    with ScriptedServer(lambda peer: peer.stall(release)) as script:
        run(scenario(script.port))


@on_loops
async def test_partial_writes(port: int) -> None:
    """Large messages both ways through small socket buffers arrive as they were sent (R42)."""
    async with client_of(port) as client:
        fd = client._connector.core._transport.fileno()  # type: ignore[union-attr]
        with socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        subscription = await client.subscribe("large")
        payloads = [random.Random(seed).randbytes(1 << 20) for seed in range(4)]

        async def send() -> None:
            for payload in payloads:
                await client.publish("large", payload)

        task = asyncio.create_task(send())
        for payload in payloads:
            assert (await subscription.next(WAIT)).data == payload
        await task


def test_errors_of_the_server_come_with_flush() -> None:
    errors: list[BaseException] = []

    async def scenario(port: int) -> None:
        async with client_of(port, on_error=lambda error, _: errors.append(error)) as client:
            await client.publish("s", b"1")
            with pytest.raises(evbus.EvbusError, match="no"):
                await client.flush()
            await client.flush()
            assert client.stats().server_errors == 1
            assert len(errors) == 1

    with ScriptedServer(Peer.refuse_publishes) as script:
        run(scenario(script.port))


@pytest.mark.parametrize("kind", LOOPS)
def test_a_lost_connection(kind: str) -> None:
    errors: list[BaseException] = []

    async def scenario() -> None:
        server = EventServer(port=0).start()
        port = server.port
        client = AsyncEventClient("127.0.0.1", port, reconnect=False, on_error=lambda error, _: errors.append(error))
        await client.connect()
        silent = await client.subscribe("silent", lambda _: None)
        iterated = await client.subscribe("iterated")
        asker = asyncio.create_task(client.query("silent", timeout=WAIT))
        taker = asyncio.create_task(iterated.next())
        await until(lambda: silent.received)
        await asyncio.get_running_loop().run_in_executor(None, server.stop, 0.0)
        for task in (asker, taker):
            with pytest.raises(ConnectionLostError):
                await task
        await until(lambda: client.status is not ConnectStatus.CONNECTED)
        assert any(isinstance(error, ConnectionLostError) for error in errors)
        assert client.stats().pending_queries == 0
        with pytest.raises(NotConnectedError):
            await client.publish("a", b"")
        with EventServer(port=port):
            await client.connect()
            await client.publish("iterated", b"again")
            assert (await iterated.next(WAIT)).data == b"again"
            await client.disconnect()

    run(scenario(), kind)


# ---- queries ---------------------------------------------------------------------------------------------------------


@on_loops
async def test_outcomes_of_queries(port: int) -> None:
    async with client_of(port) as client, client_of(port) as other:
        errors: list[BaseException] = []

        @client.on_query("square")
        async def square(number: int) -> int:
            await asyncio.sleep(0)
            return number * number

        @client.on_query("plain")
        def plain(number: int) -> None:
            assert number

        @client.on_query("says.no")
        def says_no(message: Message) -> None:
            message.fail(422, "no")

        @client.on_query("replies")
        async def replies(message: Message) -> str:
            message.reply("first")
            return "second"

        @client.on_query("raises.q")
        async def raises(_: Message) -> None:
            await asyncio.sleep(0)
            raise LookupError("x")

        @client.on_query("never")
        async def never(_: Message) -> None:
            await asyncio.Event().wait()

        await client.flush()
        assert await other.query("square", 7, int) == 49
        assert await other.query("plain", 7) is None
        assert (await other.query("replies", 7, Message)).decode() == "first"
        with pytest.raises(RemoteError) as caught:
            await other.query("says.no")
        assert (caught.value.code, caught.value.text) == (422, "no")
        with pytest.raises(RemoteError, match="LookupError: x"):
            await other.query("raises.q")
        with pytest.raises(CodecError):
            await other.query("square", 7, list[str])
        with pytest.raises(NoRespondersError):
            await other.query("nobody.answers")
        with pytest.raises(QueryTimeoutError):
            await other.query("never", timeout=0.02)
        with pytest.raises(InvalidSubjectError):
            await other.query("square.*")
        asked = asyncio.create_task(other.query("never"))
        await until(lambda: client.stats().received == 8)
        await client.disconnect(drain=False)
        with pytest.raises(ResponderLostError):
            await asked
        assert errors == []


@on_loops
async def test_a_publish_on_the_same_subject_answers(port: int) -> None:
    """Across awaits, and while other handlers of the same kind are at other queries."""
    async with client_of(port) as client:
        turn = asyncio.Event()

        async def handler(number: int) -> None:
            if number % 2:
                await turn.wait()
            await client.publish("other", number)
            await client.publish("same", number * 10)
            turn.set()

        log = await client.subscribe("other")
        await client.subscribe("same", handler, concurrency=8)
        answers = await asyncio.gather(*[client.query("same", number, int) for number in range(1, 9)])
        assert answers == [number * 10 for number in range(1, 9)]
        assert sorted([(await log.next(WAIT)).decode(int) for _ in range(8)]) == list(range(1, 9))
        assert not client._session.outbox.is_answering


@on_loops
async def test_queries_inside_handlers(port: int) -> None:
    async with client_of(port) as client:

        @client.on_query("fib")
        async def fib(number: int) -> int:
            if number < 2:
                return number
            below = await asyncio.gather(*[client.query("fib", number - k, int) for k in (1, 2)])
            return sum(below)

        assert await client_query(client, "fib", 1) == 1
        await client.unsubscribe("fib")
        client.on_query("fib", concurrency=1000)(fib)
        await client.flush()
        assert await client.query("fib", 10, int, timeout=WAIT) == 55


async def client_query(client: AsyncEventClient, subject: str, value: int) -> int:
    await client.flush()
    return await client.query(subject, value, int)


@on_loops
async def test_sync_and_asyncio_ask_each_other(port: int) -> None:
    loop = asyncio.get_running_loop()
    async with client_of(port) as client:
        client.on_query("from.sync", type=int)(lambda number: number + 1)
        await client.flush()
        with EventClient("127.0.0.1", port) as sync:
            sync.on_query("from.async", type=int)(lambda number: number + 2)
            assert await client.query("from.async", 1, int) == 3
            assert await loop.run_in_executor(None, lambda: sync.query("from.sync", 1, int)) == 2


@pytest.mark.parametrize("kind", LOOPS)
def test_random_cancellations(server: EventServer, kind: str) -> None:
    """No answer goes to a wrong query, nothing is left waiting, the connection lives (R26)."""
    rng = random.Random(26)
    right = cancelled = timeouts = 0

    async def scenario() -> None:
        nonlocal right, cancelled, timeouts
        async with client_of(server.port) as client, client_of(server.port) as responder:

            @responder.on_query("echo", concurrency=64)
            async def echo(number: int) -> int:
                for _ in range(number % 4):
                    await asyncio.sleep(0)
                return number

            await responder.flush()

            async def ask(number: int) -> None:
                nonlocal right, timeouts
                try:
                    timeout = 0.0005 if number % 50 == 0 else WAIT
                    assert await client.query("echo", number, int, timeout=timeout) == number
                    right += 1
                except QueryTimeoutError:
                    timeouts += 1

            for first in range(0, 10_000, 100):
                tasks = [asyncio.create_task(ask(first + k)) for k in range(100)]
                tasks += [asyncio.create_task(cancel_some(client, rng)) for _ in range(3)]
                while pending := [task for task in tasks if not task.done()]:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    for task in rng.sample(pending, min(len(pending), rng.randrange(8))):
                        task.cancel()
                for task in tasks:
                    if task.cancelled():
                        cancelled += 1
                    else:
                        task.result()
            assert await client.query("echo", 1, int) == 1
            stats = client.stats()
            assert (stats.pending_queries, stats.subscriptions) == (0, 0)
            assert not client._session.correlation._beats
            assert client.status is ConnectStatus.CONNECTED

    run(scenario(), kind)
    assert right > 500
    assert cancelled > 1000


async def cancel_some(client: AsyncEventClient, rng: random.Random) -> None:
    """The other awaits of a client."""
    async with await client.subscribe(f"some.{rng.randrange(5)}") as subscription:
        await client.publish(subscription.subject, b"x", confirm=True)
        await subscription.next()
        await client.flush()


# ---- the shell -------------------------------------------------------------------------------------------------------


def test_logging(server: EventServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with client_of(server.port):
            pass

    caplog.set_level(logging.INFO, logger="evbus.client")
    run(scenario())
    lines = [record.getMessage() for record in caplog.records if record.name == "evbus.client"]
    assert len(lines) == 2
    assert lines[0].startswith(f"connected to 127.0.0.1:{server.port} (evbus ")
    assert lines[1] == f"disconnected from 127.0.0.1:{server.port}"


def test_the_same_names_as_the_synchronous_client() -> None:
    """With the same parameters and defaults; all but the decorators and the looks at what is there are awaited."""
    for name in {name for name in vars(EventClient) if not name.startswith("_")}:
        ours, theirs = getattr(AsyncEventClient, name), getattr(EventClient, name)
        if isinstance(theirs, property):
            assert isinstance(ours, property), name
            continue
        assert [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()] == [
            (p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()
        ], name
        assert inspect.iscoroutinefunction(ours) == (name not in ("on", "on_query", "query_all", "stats")), name
    options = list(inspect.signature(AsyncEventClient).parameters)
    assert options == [*inspect.signature(EventClient).parameters, "executor"]


def test_the_shell_names_no_part_of_the_protocol() -> None:
    for name in ("aio", "aio_loop", "aio_handlers", "aio_replies", "aio_subscription"):
        source = inspect.getsource(importlib.import_module(f"evbus.{name}"))
        for word in (
            "TaskId",
            "task_id",
            "ObjectId",
            "object_id",
            "back-off",
            "backoff",
            "jitter",
            "random",
            "uniform",
        ):
            assert word not in source, (name, word)


def test_classes_that_name_their_subject_and_routers(server: EventServer) -> None:
    @evbus.event("order.new")
    @dataclass
    class Order:
        number: int

    @dataclass
    class Total(evbus.Query[int], subject="order.total"):
        above: int

    router = evbus.EventRouter(prefix="shop")
    seen: list[object] = []

    @router.on("closed")
    async def closed(why: str) -> None:
        seen.append(why)

    async def main() -> None:
        async with AsyncEventClient(port=server.port) as bus:

            @bus.on(Order)
            async def order(one: Order) -> None:
                seen.append(one)

            @bus.on_query(Total)
            async def total(query: Total) -> int:
                return query.above + 1

            await bus.include(router)
            await bus.flush()
            await bus.publish(Order(7))
            await bus.publish("shop.closed", "holiday")
            assert await bus.query(Total(41)) == 42
            await bus.unsubscribe(Order)
            receipt = await bus.publish(Order(8), confirm=True)
            assert receipt is not None
            assert receipt.receivers == 0

    asyncio.run(main())
    assert seen == [Order(7), "holiday"]


@on_loops
async def test_handlers_and_iteration_are_told_of_gaps(port: int) -> None:
    seen: list[object] = []

    async def on_gap(gap: Gap) -> None:
        await asyncio.sleep(0)
        seen.append(("gap", gap.count))

    async with client_of(port) as bus:
        subscription = await bus.subscribe("flood", max_pending_msgs=2, overflow="drop_newest", on_gap=on_gap)
        handled: list[object] = []
        await bus.subscribe("flood", handled.append, type=int, max_pending_msgs=10, on_gap=handled.append)
        for n in range(6):
            await bus.publish("flood", n)
        await bus.flush()
        seen += [(await subscription.next(5)).decode() for _ in range(2)]
        await bus.publish("flood", 9)
        seen.append((await subscription.next(5)).decode())
        assert seen == [0, 1, ("gap", 4), 9]
        assert (subscription.missed, bus.stats().missed) == (4, 4)
        await until(lambda: len(handled) == 7)


@on_loops
async def test_a_plain_handler_is_told_of_gaps_in_order(port: int) -> None:
    seen: list[object] = []
    go = asyncio.Event()

    async def handler(number: int) -> None:
        seen.append(number)
        await go.wait()

    async with client_of(port) as bus:
        await bus.subscribe("flood", handler, max_pending_msgs=3, overflow="drop_oldest", on_gap=seen.append)
        await bus.publish("flood", 0)
        await until(lambda: seen)
        for n in range(1, 10):
            await bus.publish("flood", n)
        await bus.flush()
        go.set()
        await until(lambda: len(seen) == 5)
        assert seen == [0, Gap("flood", 6, "overflow"), 7, 8, 9]
