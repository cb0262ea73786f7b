"""Connections that are lost and come back, for both clients, against real servers that stop and start."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import evbus
from evbus import (
    AsyncEventClient,
    BufferFullError,
    ClientClosedError,
    ConnectError,
    ConnectionLostError,
    ConnectStatus,
    EventClient,
    EventServer,
    Gap,
    Message,
    NotConnectedError,
    Reconnect,
)

WAIT = 20.0
QUICK = Reconnect(first_delay_s=0.01, min_delay_s=0.01, max_delay_s=0.05)
KEEPING = Reconnect(first_delay_s=0.01, min_delay_s=0.01, max_delay_s=0.05, buffer_bytes=100_000)


class Statuses:
    """The changes of a client's status, to wait for."""

    def __init__(self) -> None:
        self._changes: queue.SimpleQueue[ConnectStatus] = queue.SimpleQueue()
        self.put = self._changes.put

    def wait_for(self, status: ConnectStatus) -> None:
        while self._changes.get(timeout=WAIT) is not status:
            pass


@pytest.fixture
def statuses() -> Statuses:
    return Statuses()


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that has just stopped, so that connections to it are refused."""
    server = EventServer(port=0).start()
    yield server.port
    server.stop(0)


@pytest.fixture
def path() -> Iterator[str]:
    with TemporaryDirectory() as where:
        yield str(Path(where) / "bus")


# ---- the synchronous client ------------------------------------------------------------------------------------------


def test_subscriptions_come_back_and_are_told_of_the_gap(statuses: Statuses) -> None:
    got: queue.SimpleQueue[object] = queue.SimpleQueue()
    server = EventServer(port=0).start()
    at = server.port
    with EventClient(port=server.port, reconnect=QUICK, on_status=statuses.put) as bus:
        bus.subscribe("events.*", lambda message: got.put(message.data), on_gap=got.put)
        bus.on_query("question")(lambda text: f"re: {text.decode()}")
        iterated = bus.subscribe("events.>")
        bus.publish("events.a", b"before")
        assert got.get(timeout=WAIT) == b"before"
        assert iterated.next(WAIT).data == b"before"
        server.stop(0)
        statuses.wait_for(ConnectStatus.RECONNECTING)
        with pytest.raises(NotConnectedError, match="RECONNECTING"):
            bus.publish("events.a", b"lost")
        with EventServer(port=at):
            assert bus.wait_connected(WAIT) is bus
            assert bus.status is ConnectStatus.CONNECTED
            bus.publish("events.a", b"after")
            assert got.get(timeout=WAIT) == Gap("events.*", None, "reconnect")
            assert got.get(timeout=WAIT) == b"after"
            assert iterated.next(WAIT).data == b"after"
            assert bus.query("question", "you", str) == "re: you"
            assert bus.stats().connects == 2


def test_what_changes_while_away_is_what_comes_back(statuses: Statuses) -> None:
    server = EventServer(port=0).start()
    at = server.port
    with EventClient(port=server.port, reconnect=QUICK, on_status=statuses.put) as bus:
        gone = bus.subscribe("gone")
        server.stop(0)
        statuses.wait_for(ConnectStatus.RECONNECTING)
        gone.unsubscribe()
        new = bus.subscribe("new")
        with EventServer(port=at) as again:
            bus.wait_connected(WAIT)
            assert again.stats()["subscriptions"] == 1
            bus.publish("new", b"x")
            assert new.next(WAIT).data == b"x"


def test_what_waits_for_the_server_fails_with_the_connection(statuses: Statuses) -> None:
    asked = threading.Event()
    release = threading.Event()
    server = EventServer(port=0).start()

    def slow(_: Message) -> None:
        asked.set()
        release.wait(WAIT)

    with EventClient(port=server.port, reconnect=QUICK, on_status=statuses.put) as bus:
        bus.on_query("slow")(slow)
        outcome: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

        def ask() -> None:
            try:
                bus.query("slow", timeout=WAIT)
            except BaseException as exc:
                outcome.put(exc)

        asker = threading.Thread(target=ask)
        asker.start()
        assert asked.wait(WAIT)
        server.stop(0)
        assert isinstance(outcome.get(timeout=WAIT), ConnectionLostError)
        asker.join()
        release.set()
        statuses.wait_for(ConnectStatus.RECONNECTING)


def test_kept_publishes_are_sent_in_order(statuses: Statuses) -> None:
    server = EventServer(port=0).start()
    at = server.port
    with EventClient(port=server.port, reconnect=KEEPING, on_status=statuses.put) as bus:
        subscription = bus.subscribe("n")
        server.stop(0)
        statuses.wait_for(ConnectStatus.RECONNECTING)
        for number in range(50):
            bus.publish("n", b"%d" % number, headers={"n": str(number)} if number % 2 else None)
        with EventServer(port=at):
            bus.wait_connected(WAIT)
            bus.publish("n", b"50")
            got = [subscription.next(WAIT) for _ in range(51)]
            assert [message.data for message in got] == [b"%d" % number for number in range(51)]
            assert got[49].headers == {"n": "49"}


def test_the_buffer_of_kept_publishes_is_bounded(statuses: Statuses) -> None:
    server = EventServer(port=0).start()
    with EventClient(port=server.port, reconnect=KEEPING, on_status=statuses.put) as bus:
        server.stop(0)
        statuses.wait_for(ConnectStatus.RECONNECTING)
        with pytest.raises(BufferFullError):
            for _ in range(101):
                bus.publish("n", b"x" * 1000)
        bus.disconnect()
        assert bus.stats().unsent_bytes > 90_000


@pytest.mark.parametrize("option", [{"port": 9999}, {"host": "127.0.0.1"}, {"servers": ["a"]}])
def test_connect_does_not_take_what_belongs_into_the_url(option: dict[str, object]) -> None:
    with pytest.raises(evbus.ConfigError, match="part of the URL"):
        evbus.connect(**option)  # type: ignore[arg-type]


def test_several_servers() -> None:
    with EventServer(port=0) as first, EventServer(port=0) as second:
        bus = evbus.connect(f"evbus://127.0.0.1:{first.port},127.0.0.1:{second.port}", reconnect=QUICK)
        assert bus.address == f"127.0.0.1:{first.port}"
        first.stop(0)
        bus.wait_connected(WAIT)
        assert bus.address == f"127.0.0.1:{second.port}"
        bus.disconnect()


def test_the_first_connection_fails_fast_or_waits_for_a_server(port: int) -> None:
    with EventServer(port=0) as server:
        free = server.port
    with pytest.raises(ConnectError, match="refused"):
        evbus.connect(f"127.0.0.1:{free}")
    client = EventClient(port=free, reconnect=QUICK)
    waiting = threading.Event()
    thread = threading.Thread(target=lambda: (waiting.set(), client.connect(None, retry=True)))
    thread.start()
    assert waiting.wait(WAIT)
    with EventServer(port=free):
        thread.join(WAIT)
        assert client.status is ConnectStatus.CONNECTED
        client.disconnect()


def test_disconnect_ends_a_search() -> None:
    with EventServer(port=0) as server:
        free = server.port
    client = EventClient(port=free, on_status=(statuses := Statuses()).put)
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def connect() -> None:
        try:
            client.connect(None, retry=True)
        except BaseException as exc:
            failures.put(exc)

    thread = threading.Thread(target=connect)
    thread.start()
    statuses.wait_for(ConnectStatus.CONNECTING)
    client.disconnect()
    thread.join(WAIT)
    assert isinstance(failures.get(timeout=WAIT), (ClientClosedError, ConnectError))
    assert client.status is ConnectStatus.CLOSED


def test_waiting_for_what_will_not_come(port: int) -> None:
    client = EventClient(port=port)
    with pytest.raises(NotConnectedError):
        client.wait_connected(WAIT)
    client.connect()
    assert client.wait_connected(0.001) is client
    client.disconnect()
    with pytest.raises(ClientClosedError):
        client.wait_connected(WAIT)
    with pytest.raises(ClientClosedError):
        client.connect()


def test_waiting_has_its_time(statuses: Statuses) -> None:
    server = EventServer(port=0).start()
    with EventClient(port=server.port, reconnect=QUICK, on_status=statuses.put) as bus:
        server.stop(0)
        statuses.wait_for(ConnectStatus.RECONNECTING)
        with pytest.raises(ConnectError):
            bus.wait_connected(0.05)
        with pytest.raises(ConnectError):
            bus.connect(0.05)
        assert bus.status is ConnectStatus.RECONNECTING


@pytest.mark.skipif(sys.platform == "win32", reason="no Unix domain sockets")
def test_unix_sockets(path: str) -> None:
    with pytest.raises(ConnectError, match="no such file"):
        evbus.connect(f"unix://{path}")
    server = EventServer(None, unix=path).start()
    with evbus.connect(f"unix://{path}", reconnect=QUICK) as bus:
        assert bus.address == path
        subscription = bus.subscribe("a")
        server.stop(0)
        with EventServer(None, unix=path):
            bus.wait_connected(WAIT)
            bus.publish("a", b"x")
            assert subscription.next(WAIT).data == b"x"


# ---- the asyncio client ----------------------------------------------------------------------------------------------


def test_asyncio_subscriptions_come_back() -> None:
    async def scenario() -> None:
        got: asyncio.Queue[object] = asyncio.Queue()
        statuses: asyncio.Queue[ConnectStatus] = asyncio.Queue()
        server = EventServer(port=0).start()
        at = server.port
        bus = AsyncEventClient(port=server.port, reconnect=KEEPING, on_status=statuses.put)
        async with bus:
            await bus.subscribe("a", lambda message: got.put(message.data), on_gap=got.put)
            iterated = await bus.subscribe("a")
            await asyncio.to_thread(server.stop, 0)
            while await asyncio.wait_for(statuses.get(), WAIT) is not ConnectStatus.RECONNECTING:
                pass
            for number in range(20):
                await bus.publish("a", b"%d" % number)
            with pytest.raises(ConnectError):
                await bus.wait_connected(0.05)
            with EventServer(port=at):
                assert await bus.wait_connected(WAIT) is bus
                assert await got.get() == Gap("a", None, "reconnect")
                for number in range(20):
                    assert await got.get() == b"%d" % number
                    assert (await iterated.next(WAIT)).data == b"%d" % number

    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))


def test_asyncio_first_connection() -> None:
    async def scenario() -> None:
        with EventServer(port=0) as server:
            free = server.port
        client = AsyncEventClient(port=free, reconnect=QUICK)
        with pytest.raises(ConnectError, match="refused"):
            await client.connect()
        with pytest.raises(NotConnectedError):
            await client.wait_connected()
        attempt = asyncio.ensure_future(client.connect(None, retry=True))
        await asyncio.sleep(0)
        with EventServer(port=free):
            await attempt
            await client.disconnect()
        with pytest.raises(ClientClosedError):
            await client.connect()

    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))


def test_asyncio_disconnect_and_cancellation_end_a_search() -> None:
    async def scenario() -> None:
        with EventServer(port=0) as server:
            free = server.port
        client = AsyncEventClient(port=free)
        attempt = asyncio.ensure_future(client.connect(None, retry=True))
        await asyncio.sleep(0)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        assert client.status is ConnectStatus.DISCONNECTED
        attempt = asyncio.ensure_future(client.connect(None, retry=True))
        await asyncio.sleep(0)
        await client.disconnect()
        with pytest.raises(ClientClosedError):
            await attempt
        assert client.status is ConnectStatus.CLOSED

    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))


@pytest.mark.skipif(sys.platform == "win32", reason="no Unix domain sockets")
def test_asyncio_unix_sockets(path: str) -> None:
    async def scenario() -> None:
        client = AsyncEventClient(servers=[f"unix://{path}"])
        with pytest.raises(ConnectError, match="no such file"):
            await client.connect()
        with EventServer(None, unix=path):
            async with client as bus:
                subscription = await bus.subscribe("a")
                await bus.publish("a", b"x")
                assert (await subscription.next(WAIT)).data == b"x"

    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))
