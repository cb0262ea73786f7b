"""The testing kit: what it sees, what it waits for, what it breaks, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers_cli import Program

import evbus
from evbus import ConnectStatus, EventClient
from evbus._frame import pack
from evbus.testing import Bus, MemoryBus, ServerBus, _bus
from evbus.testing._faults import CAPACITY_BYTES
from evbus.testing._proxy import Proxy
from evbus.testing._record import Reader, Record, matches
from evbus.wire import ObjectId

PATIENCE_S = 20.0


@pytest.fixture(params=[MemoryBus, ServerBus], ids=["memory", "server"])
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    with request.param() as made:
        yield made


class Statuses:
    """Waits for what `on_status` tells."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[ConnectStatus] = queue.SimpleQueue()

    def __call__(self, status: ConnectStatus) -> None:
        self._news.put(status)

    def wait_for(self, status: ConnectStatus) -> None:
        while self._news.get(timeout=PATIENCE_S) is not status:
            pass


# --- what was published -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "subject", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a", False),
        ("a", "a.b", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        (">", "a", True),
        (">", "a.b.c", True),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("a.*.>", "a.b", False),
        ("b.>", "a.b", False),
    ],
)
def test_patterns(pattern: str, subject: str, fits: bool) -> None:
    assert matches(pattern, subject) is fits


def test_what_was_published(bus: Bus) -> None:
    one, two = bus.client(), bus.client()
    one.publish("mail.new", {"to": "Ann"}, headers={"k": "v"})
    assert [message.subject for message in bus.published()] == ["mail.new"]
    two.publish("mail.gone", "x")
    first, second = bus.published()
    assert (first.subject, first.decode(dict), first.headers) == ("mail.new", {"to": "Ann"}, {"k": "v"})
    assert abs(first.timestamp - time.time()) < 60
    assert bus.published("mail.*") == [first, second]
    assert bus.published("mail.gone") == [second]
    assert bus.published("letter.>") == []
    with pytest.raises(evbus.InvalidSubjectError):
        bus.published("a..b")


def test_expect_takes_each_message_once_whenever_it_came(bus: Bus) -> None:
    client = bus.client()
    client.publish("a.1", b"first")
    assert bus.expect("a.1").data == b"first"
    threading.Timer(0.01, lambda: client.publish("a.1", b"second")).start()
    assert bus.expect("a.1", PATIENCE_S).data == b"second"
    assert [message.data for message in bus.expect("a.*", count=2)] == [b"first", b"second"]
    with pytest.raises(ValueError, match="count"):
        bus.expect("a.1", count=0)


def test_expect_says_what_came_instead(bus: Bus) -> None:
    client = bus.client()
    with pytest.raises(AssertionError, match=r"nothing was published on 'a' within 0.01 s, nor on any other subject"):
        bus.expect("a", 0.01)
    for subject, data in (("b", b"x"), ("a", b"1"), ("c", b"y" * 100)):
        client.publish(subject, data)
    bus.wait_idle()
    bus.expect("a")
    with pytest.raises(AssertionError) as caught:
        bus.expect("a", 0.01)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "nothing was published on 'a' within 0.01 s (beyond 1 that expect('a') has returned already); "
        "of other subjects (2 messages, the last ones):"
    )
    assert lines[1] == "  b: b'x'"
    assert lines[2].endswith("... (100 bytes)")
    with pytest.raises(AssertionError, match="2 of 3 messages were published on '\\*' within"):
        bus.expect("b", count=1)
        bus.expect("*", count=1)
        bus.expect("*", 0.01, count=3)


def test_nobody_listens_in(bus: Bus) -> None:
    """Reading along changes neither receipts nor the outcome of queries; and queries are no events."""
    client = bus.client()
    assert client.publish("a", b"", confirm=True) == evbus.Receipt(0)
    with pytest.raises(evbus.NoRespondersError):
        client.query("a", b"?")
    client.on_query("b")(lambda message: "answer")
    assert client.query("b", response=str) == "answer"
    bus.wait_idle()
    assert [message.subject for message in bus.published()] == ["a"]


@pytest.mark.parametrize(
    ("header", "handshake", "layout", "values"),
    [
        (22, "s", "ssy", ("", "a", b"data")),
        (23, "s", "sssy", ("", "a", "", b"data")),
        (23, "ssss", "sssy", ("t", "a", "", b"data")),
    ],
)
def test_older_packets_are_read_too(header: int, handshake: str, layout: str, values: tuple[str | bytes, ...]) -> None:
    record = Record()
    stream = pack(header, ObjectId.HANDSHAKE, 1, 0, 0, handshake, *("x" for _ in handshake))
    stream += pack(header, ObjectId.PUBLISH, 1, 0, 5000, layout, *values)
    if layout == "sssy":
        stream += pack(header, ObjectId.PUBLISH, 1, 0, 0, layout, "t", "a", "query", b"answer")
    stream += pack(header, ObjectId.PUBLISH, 1, 0, 0, layout, "t", "not..valid", *values[2:])
    reader = Reader(record)
    for number in range(len(stream)):
        reader.feed(stream[number : number + 1])
    assert [(message.data, message.timestamp) for message in record.published("a")] == [(b"data", 5.0)]
    assert len(record.published(">")) == 1


def test_what_is_no_event_bus_is_not_read() -> None:
    record = Record()
    reader = Reader(record)
    for _ in range(3):
        reader.feed(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert record.published(">") == []


# --- idle -------------------------------------------------------------------------------------------------------------


def test_idle_means_that_handlers_have_finished(bus: Bus) -> None:
    """A chain: each handler's publish is the next one's event."""
    clients = [bus.client() for _ in range(3)]
    seen: list[str] = []

    def step(client: EventClient, following: str) -> Callable[[str], None]:
        def handle(text: str) -> None:
            time.sleep(0.01)  # the work
            client.publish(following, text + "+")
            seen.append(following)

        return handle

    for number, client in enumerate(clients):
        client.subscribe(f"step.{number}", step(client, f"step.{number + 1}"), type=str)
    clients[0].publish("step.0", "x")
    bus.wait_idle()
    assert seen == ["step.1", "step.2", "step.3"]
    assert bus.expect("step.3", 0).decode(str) == "x+++"


def test_who_keeps_a_bus_from_being_idle(bus: Bus) -> None:
    client = bus.client(name="worker")
    go = threading.Event()
    client.subscribe("job", lambda message: go.wait(PATIENCE_S))
    client.publish("job", b"1", confirm=True)
    client.publish("job", b"2", confirm=True)
    with pytest.raises(AssertionError, match=r"not idle within 0.3 s: a handler on 'job' of client 'worker' is at"):
        bus.wait_idle(0.3)
    go.set()
    bus.wait_idle()
    assert client.stats().handled == 2


def test_a_query_that_waits_is_not_idle(bus: Bus) -> None:
    client = bus.client()
    asked: queue.SimpleQueue[evbus.Message] = queue.SimpleQueue()
    held = client.on_query("later")
    held(lambda message: (asked.put(message), go.wait(PATIENCE_S))[1])
    go = threading.Event()
    thread = threading.Thread(target=lambda: client.query("later", timeout=PATIENCE_S))
    thread.start()
    asked.get(timeout=PATIENCE_S)
    with pytest.raises(AssertionError, match="1 queries wait for an answer"):
        bus.wait_idle(0.3)
    go.set()
    thread.join()
    bus.wait_idle()


def test_messages_for_a_loop_do_not_count(bus: Bus) -> None:
    client = bus.client()
    with client.subscribe("a") as subscription:
        client.publish("a", b"1")
        bus.wait_idle()
        assert subscription.next(0).data == b"1"


def test_clients_that_are_known_by_their_connection(tmp_path: Path) -> None:
    with ServerBus() as bus, evbus.connect(bus.url) as stranger:
        got = []
        stranger.subscribe("a", lambda message: got.append(message.data))
        for _ in range(100):
            stranger.publish("a", b"x")
        bus.expect("a", count=100)
        bus.wait_idle()
        assert len(bus.published("a")) == 100
        assert bus.watch(stranger) is stranger
        bus.wait_idle()
        assert len(got) == 100
        assert stranger.address == bus.address == f"{bus.host}:{bus.port}"
        assert bus.port != bus.server.port


# --- faults -----------------------------------------------------------------------------------------------------------


def test_dropped_connections(bus: Bus) -> None:
    statuses = Statuses()
    client = bus.client(on_status=statuses, reconnect=False)
    seen: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client.subscribe("a", lambda message: seen.put(message.data))
    statuses.wait_for(ConnectStatus.CONNECTED)
    assert bus.drop_connections() == 1
    statuses.wait_for(ConnectStatus.DISCONNECTED)
    client.connect()
    client.publish("a", b"again")
    assert seen.get(timeout=PATIENCE_S) == b"again"


def test_a_pause_is_silence(bus: Bus) -> None:
    client = bus.client()
    bus.pause()
    client.publish("a", b"held")
    with pytest.raises(evbus.ConfirmTimeoutError):
        client.rtt(0.02)
    assert bus.published() == []
    with pytest.raises(AssertionError, match=r"has not answered a client \(the bus is paused\)"):
        bus.wait_idle(0.02)
    bus.resume()
    assert bus.expect("a").data == b"held"


def test_a_pause_holds_publishers_back(bus: Bus) -> None:
    """What a paused bus keeps is bounded, as a network's buffers are; nothing is lost or out of order."""
    limits = evbus.ClientLimits(buffer_bytes=1 << 20)
    client = bus.client(limits=limits)
    bus.pause()
    sent = 0
    with pytest.raises(evbus.BufferFullError):
        while sent < 5000:  # 320 MB
            client.publish("a", sent.to_bytes(4, "big") * 16384, timeout=0.1)
            sent += 1
    assert bus._faults.waiting <= CAPACITY_BYTES + 65536
    bus.resume()
    messages = bus.expect("a", PATIENCE_S, count=sent)
    assert [int.from_bytes(message.data[:4], "big") for message in messages] == list(range(sent))
    bus.wait_idle()


def test_a_dead_line_is_noticed(bus: Bus) -> None:
    statuses = Statuses()
    bus.client(on_status=statuses, heartbeat=0.1, reconnect=False)
    bus.pause()
    statuses.wait_for(ConnectStatus.DISCONNECTED)


def test_a_delay_is_there_and_back(bus: Bus) -> None:
    client = bus.client()
    bus.delay(0.03)
    assert client.rtt() >= 0.06
    bus.delay(60)
    with pytest.raises(evbus.ConfirmTimeoutError):
        client.rtt(0.02)
    bus.delay(0)
    client.rtt()
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="delay"):
            bus.delay(wrong)


def test_a_cut_in_the_middle_of_a_message(bus: Bus) -> None:
    statuses = Statuses()
    client = bus.client(on_status=statuses, reconnect=False)
    other = bus.client()
    bus.cut_after(100)
    client.publish("a", b"x" * 200)
    statuses.wait_for(ConnectStatus.DISCONNECTED)
    other.publish("b", b"y" * 200, confirm=True)
    assert [message.subject for message in bus.published()] == ["b"]
    client.connect()
    client.publish("a", b"x" * 200, confirm=True)
    assert len(bus.published("a")) == 1


def test_a_cut_on_the_way_back(bus: Bus) -> None:
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    client = bus.client(on_error=lambda error, message: errors.put(error))
    got = []
    client.subscribe("a", lambda message: got.append(message))
    bus.cut_after(100, to_server=False)
    client.publish("a", b"x" * 200)
    assert isinstance(errors.get(timeout=PATIENCE_S), evbus.ConnectionLostError)
    assert not got
    assert len(bus.published("a")) == 1


@pytest.mark.parametrize("size", [0, 10])
def test_a_cut_of_the_connection_that_comes(bus: Bus, size: int) -> None:
    bus.cut_after(size)
    with pytest.raises(evbus.EvbusError):
        bus.client()
    bus.client()


def test_a_cut_that_is_taken_back(bus: Bus) -> None:
    client = bus.client()
    bus.cut_after(100)
    bus.cut_after(None)
    client.publish("a", b"x" * 200, confirm=True)
    with pytest.raises(ValueError, match="0 bytes or more"):
        bus.cut_after(-1)


def test_exactly_so_many_bytes_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener.getsockname(), Record())
        try:
            proxy.faults.cut_after(70_000, to_server=True)
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S) as client:
                server, _ = listener.accept()
                with server:
                    server.settimeout(PATIENCE_S)
                    thread = threading.Thread(target=send_all, args=(client, bytes(100_000)))
                    thread.start()
                    assert len(read_all(server)) == 70_000
                    thread.join()
        finally:
            proxy.close()


def test_the_proxy_hands_on_the_end_of_a_stream() -> None:
    """One direction ends, the other goes on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener.getsockname(), Record())
        try:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S) as client:
                server, _ = listener.accept()
                with server:
                    server.settimeout(PATIENCE_S)
                    send_all(client, b"question")
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(server) == b"question"
                    server.sendall(b"answer")
                    server.shutdown(socket.SHUT_WR)
                    assert read_all(client) == b"answer"
        finally:
            proxy.close()


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    proxy = Proxy(address, Record())
    try:
        with pytest.raises(evbus.EvbusError):
            EventClient("127.0.0.1", proxy.port).connect()
    finally:
        proxy.close()


def send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it was cut
        sock.sendall(data)


def read_all(sock: socket.socket) -> bytes:
    found = b""
    try:
        while data := sock.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


# --- the end ----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return psutil.Process().num_fds()


def test_memory_has_no_descriptor() -> None:
    before = descriptors()
    with MemoryBus() as bus:
        client = bus.client()
        client.subscribe("a", lambda message: None)
        client.publish("a", b"1", confirm=True)
        assert descriptors() == before
        assert client.address == "memory:1"


@pytest.mark.parametrize("kind", [MemoryBus, ServerBus])
@pytest.mark.parametrize("fault", ["none", "pause", "delay", "drop", "cut"])
def test_nothing_is_left(kind: type[Bus], fault: str) -> None:
    threads, files = set(threading.enumerate()), descriptors()
    with kind() as bus:
        client = bus.client()
        client.subscribe("a", lambda message: None)
        client.on_query("q")(lambda message: 1)
        client.query("q")
        {
            "none": bus.resume,
            "pause": bus.pause,
            "delay": lambda: bus.delay(60),
            "drop": bus.drop_connections,
            "cut": lambda: bus.cut_after(5),
        }[fault]()
        try:
            client.publish("a", b"x")
        except evbus.NotConnectedError:
            assert fault == "drop"
    assert set(threading.enumerate()) - threads == set()
    assert descriptors() == files
    assert client.status is ConnectStatus.CLOSED
    bus.close()


def test_the_end_of_a_bus_in_memory() -> None:
    with MemoryBus() as bus:
        client = bus.client()
    with pytest.raises(evbus.ClientClosedError):
        client.publish("a", b"")
    with pytest.raises(evbus.ConnectError, match="the bus in memory is closed"):
        bus.client()
    assert bus.stats()["connections"] == 0


def test_a_handler_that_does_not_return_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bus, "_PATIENCE_S", 0.05)
    go, begun = threading.Event(), threading.Event()
    bus = MemoryBus()
    client = bus.client(name="stuck")
    client.subscribe("a", lambda message: (begun.set(), go.wait(PATIENCE_S)))
    client.publish("a", b"")
    assert begun.wait(PATIENCE_S)
    with pytest.raises(AssertionError, match="a handler or callback of client 'stuck' has not returned"):
        bus.close()
    go.set()
    assert client._pool.join(PATIENCE_S)


# --- pytest -----------------------------------------------------------------------------------------------------------

TESTS = """
import threading

def test_server(evbus_server, evbus_client):
    assert evbus_client.address == evbus_server.address
    evbus_client.publish("a", "x")
    assert evbus_server.expect("a").decode(str) == "x"

def test_both(evbus_memory, evbus_server, evbus_client):
    evbus_memory.client().publish("a", "x")
    assert len(evbus_memory.published("a")) == 1
    assert evbus_server.published("a") == []

def test_nothing_is_left():
    assert threading.active_count() == 1
"""


def test_the_fixtures(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('import evbus.testing\n\npytest_plugins = ["evbus.testing"]\n')
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:timeout"]
    with Program(command, cwd=tmp_path, env={"PYTEST_ADDOPTS": ""}) as program:
        result = program.finish()
    assert result.code == 0, result.out + result.err
    assert "3 passed" in result.out


def test_pytest_is_imported_by_the_fixtures_alone(tmp_path: Path) -> None:
    code = "import sys, json, evbus.testing; print(json.dumps(sorted(sys.modules)))"
    with Program([sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ)) as program:
        loaded = json.loads(program.finish().out)
    assert "evbus.testing" in loaded
    assert "pytest" not in loaded


# --- clients for asyncio ----------------------------------------------------------------------------------------------


def test_clients_for_asyncio(bus: Bus) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun, release = asyncio.Event(), asyncio.Event()
        done: list[int] = []
        async with bus.async_client(name="worker") as worker, bus.async_client() as other:

            async def work(number: int) -> None:
                begun.set()
                await release.wait()
                done.append(number)

            await worker.subscribe("work", work)
            worker.on_query("twice")(lambda message: 2 * message.decode(int))
            await worker.flush()
            assert await other.query("twice", 21) == 42
            await other.publish("work", 1)
            await begun.wait()
            with pytest.raises(AssertionError, match="a handler on 'work' of client 'worker' is at work"):
                await asyncio.to_thread(bus.wait_idle, 0.05)
            waiting = asyncio.create_task(asyncio.to_thread(bus.wait_idle, PATIENCE_S))
            loop.call_soon(release.set)
            await waiting
            assert done == [1]
            assert [message.subject for message in await asyncio.to_thread(bus.published)] == ["work"]
            with pytest.raises(RuntimeError, match="to_thread"):
                bus.wait_idle()

    asyncio.run(main())
    bus.wait_idle(PATIENCE_S)


def test_both_kinds_of_clients_meet(bus: Bus) -> None:
    got: queue.SimpleQueue[int] = queue.SimpleQueue()
    bus.client().subscribe("n", got.put, type=int)

    async def main() -> None:
        async with bus.async_client() as client:
            for number in range(2000):
                await client.publish("n", number)
            await client.publish("n", b"x" * 700_000)  # more than a flow holds

    asyncio.run(main())
    assert [got.get(timeout=PATIENCE_S) for _ in range(2000)] == list(range(2000))


def test_faults_hit_clients_for_asyncio(bus: Bus) -> None:
    async def main() -> None:
        lost = asyncio.Event()
        async with bus.async_client(on_error=lambda error, _: lost.set()) as client:
            bus.delay(0.05)
            assert await client.rtt(PATIENCE_S) >= 0.1
            bus.delay(0.0)
            bus.pause()
            asking = asyncio.create_task(client.rtt(PATIENCE_S))
            await asyncio.sleep(0)
            bus.resume()
            await asking
            assert bus.drop_connections() == 1
            await asyncio.wait_for(lost.wait(), PATIENCE_S)

    asyncio.run(main())


def test_a_bus_in_memory_may_end_before_its_asyncio_clients() -> None:
    async def main() -> None:
        statuses: asyncio.Queue[ConnectStatus] = asyncio.Queue()
        with MemoryBus() as bus:
            client = await bus.async_client(on_status=statuses.put_nowait, reconnect=False).connect()
        while await asyncio.wait_for(statuses.get(), PATIENCE_S) is not ConnectStatus.DISCONNECTED:
            pass
        with pytest.raises(evbus.ConnectError):
            await client.connect()
        await client.disconnect()

    asyncio.run(main())


def test_a_loop_that_ended_first() -> None:
    with MemoryBus() as bus:
        loop = asyncio.new_event_loop()
        client = bus.async_client()
        loop.run_until_complete(client.connect())
        loop.close()
        bus.client().publish("a", b"1")
        bus.wait_idle(PATIENCE_S)
