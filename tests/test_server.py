"""`EventServer` over real sockets: its life, its limits, and that bad input concerns nobody but its sender."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
from helpers_raw import CLIENT_FACTS, RawClient
from helpers_server import HOST, ServerProcess, connect, exchange, v2, wait_for

from evbus import transport
from evbus.errors import ConfigError, ServerStartError
from evbus.limits import Limits
from evbus.reactor import Reactor
from evbus.server import EventServer
from evbus.server_core import ServerCore
from evbus.transport import TcpTransport
from evbus.wire import CloseReason, ErrorCode, ObjectId

MIB = 1 << 20


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test gives back its descriptors and threads."""
    before, threads = descriptors(), threading.active_count()
    yield
    wait_for(lambda: threading.active_count() <= threads, what="threads end")
    wait_for(lambda: descriptors() <= before, what=f"descriptors: {before} before, {descriptors()} after")


# --- life


def test_start_returns_when_it_listens() -> None:
    server = EventServer(port=0)
    assert (server.port, server.address, server.is_running) == (0, "127.0.0.1:0", False)
    assert server.start() is server
    try:
        assert server.port > 0
        assert server.address == f"127.0.0.1:{server.port}"
        assert server.addresses == [server.address]
        assert server.is_running
        exchange(server)
        with EventServer(port=0) as other:
            assert other.port != server.port
        assert server.stats()["connections_accepted"] == 2
    finally:
        server.stop()
    assert (server.is_running, server.port) == (False, 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, other.port or 1), 1.0)


def test_a_port_in_use() -> None:
    with EventServer(port=0) as first:
        second = EventServer(port=first.port)
        with pytest.raises(ServerStartError, match="in use") as caught:
            second.start()
        assert str(first.port) in str(caught.value)
        assert not second.is_running
        second.stop()
        exchange(first)
    second.start()
    exchange(second)
    second.stop()


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(transport.socket, "getaddrinfo", unknown)
    with pytest.raises(ServerStartError, match=r"nowhere\.example.*unknown"):
        EventServer("nowhere.example", 0).start()


@pytest.mark.parametrize("host", ["a..b", "203.0.113.7"])
def test_a_host_that_is_not_here(host: str) -> None:
    with pytest.raises(ServerStartError, match=host.replace(".", r"\.")):
        EventServer(host, 0, allow_anonymous_network=True).start()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": -1}, "port"), ({"port": 65536}, "port"), ({"port": "9100"}, "port"), ({"port": True}, "port"),
        ({"port": 1.5}, "port"), ({"host": None}, "host"), ({"host": 5}, "host"), ({"limits": {}}, "limits"),
        ({"drain": -1}, "drain"), ({"drain": "5"}, "drain"), ({"drain": float("inf")}, "drain"),
        ({"drain": float("nan")}, "drain"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EventServer(**options)


def test_a_public_address_must_be_asked_for() -> None:
    server = EventServer("0.0.0.0", 0)
    with pytest.raises(ConfigError, match="allow_anonymous_network"):
        server.start()
    assert not server.is_running
    with EventServer("0.0.0.0", 0, allow_anonymous_network=True) as public:
        exchange(public)


def test_stop_and_start_again() -> None:
    server = EventServer(port=0)
    server.stop()  # it does not run: nothing happens
    assert server.stats() == {}
    for _ in range(3):
        with server:
            exchange(server)
            with pytest.raises(ConfigError, match="runs already"):
                server.start()
            assert server.stats()["connections_accepted"] == 2
        server.stop()
        assert server.stats()["connections_accepted"] == 2  # of the last run


def test_serve_forever_is_ended_from_another_thread() -> None:
    server = EventServer(port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    wait_for(lambda: server.port, what="it listens")
    exchange(server)
    server.stop()
    thread.join(5.0)
    assert not thread.is_alive()
    assert server.stats()["connections"] == 0


def test_idle_peers_do_not_delay_a_stop() -> None:
    with EventServer(port=0) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server, dialect)) for dialect in ref.DIALECTS * 5]
        silent = stack.enter_context(connect(server, handshake=False))
        start = time.monotonic()
        server.stop(10.0)
        assert time.monotonic() - start < 2.0
        for client in clients:
            told = [ObjectId.GO_AWAY] if client.dialect == ref.EVBUS_2 else []
            assert [packet.object_id for packet in client.read_end()] == told
        assert silent.read_end() == []
        assert server.stats()["closed"] == {"server_shutdown": 21}


@pytest.mark.parametrize("dialect", [ref.H23_199, ref.H22])
def test_stop_delivers_what_is_queued(dialect: str) -> None:
    """Also what the system has taken and not sent yet: the receiver reads on after a while."""
    with EventServer(port=0) as server, connect(server) as source, connect(server, dialect) as slow:
        slow.send(ref.SUBSCRIBE, TaskId="s", Subject="x")
        slow.read()
        for index in range(300):
            source.send(ref.PUBLISH, {"Subject": "x", "Buffer": bytes([index % 256]) * 65_536}, version=2)
        source.heartbeat()
        assert server.stats()["connections_waiting"] == 1
        stopper = threading.Thread(target=server.stop, args=(20.0,))
        stopper.start()
        assert source.read().fields["Reason"] == CloseReason.SERVER_SHUTDOWN
        got = []
        while server.is_running:  # read no more than it takes to have the server's own queue emptied
            got.append(slow.read())
            wait_for(lambda: not server.is_running or server.stats()["connections_waiting"], what="a wait or the end")
        stopper.join(10.0)
        assert not stopper.is_alive()
        got += slow.read_end()
        assert [packet.fields["Buffer"][:1] for packet in got] == [bytes([index % 256]) for index in range(300)]
        assert server.stats()["undelivered_bytes"] == 0


def test_stop_waits_for_answers() -> None:
    with EventServer(port=0) as server, connect(server) as asker, connect(server) as responder:
        responder.send(ref.SUBSCRIBE, {"TaskId": "s", "Subject": "q", "SubscriptionId": 1, "Role": 1}, version=2)
        responder.read()
        asker.send(ref.QUERY, {"TaskId": "q", "Subject": "q"}, version=2)
        assert responder.read().fields["Flags"] == ref.IS_QUERY
        stopper = threading.Thread(target=server.stop, args=(20.0,))
        stopper.start()
        assert responder.read().object_id == ObjectId.GO_AWAY
        assert asker.read().object_id == ObjectId.GO_AWAY
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, responder.sock.getpeername()[1]), 1.0)
        responder.send(ref.PUBLISH, {"Subject": "q", "QueryTaskId": "q", "Buffer": b"42"}, version=2)
        assert asker.read().fields["Buffer"] == b"42"
        stopper.join(5.0)
        assert not stopper.is_alive()


@pytest.mark.parametrize("again", [False, True])
def test_stop_gives_up_on_who_does_not_read(again: bool) -> None:
    """At the end of its patience, or at once if it is asked a second time."""
    with EventServer(port=0) as server, connect(server) as source, connect(server) as slow:
        slow.send(ref.SUBSCRIBE, TaskId="s", Subject="x")
        slow.read()
        for _ in range(300):
            source.send(ref.PUBLISH, {"Subject": "x", "Buffer": bytes(65_536)}, version=2)
        source.heartbeat()
        start = time.monotonic()
        if again:
            stopper = threading.Thread(target=server.stop, args=(60.0,))
            stopper.start()
            assert source.read().object_id == ObjectId.GO_AWAY
            server.stop()
            stopper.join(5.0)
        else:
            server.stop(0.3)
        assert time.monotonic() - start < 5.0
        stats = server.stats()
        assert (stats["connections"], stats["closed"]) == (0, {"server_shutdown": 2})
        assert int(str(stats["undelivered_bytes"])) > MIB


# --- limits


def test_handshake_deadline() -> None:
    """R39: absolute, so that neither a trickle of bytes nor other packets move it."""
    with EventServer(port=0, limits=Limits(handshake_s=0.6)) as server, contextlib.ExitStack() as stack:
        start = time.monotonic()
        silent, trickle, early = (stack.enter_context(connect(server, ref.H23_199, handshake=False)) for _ in range(3))
        opening = ref.encode(ref.H23_199, ref.HANDSHAKE, {"TaskId": "x" * 120})
        early.send_bytes(ref.encode_frame(23, ref.HANDSHAKE, 1, b""))  # malformed: the server goes on waiting
        ended: dict[RawClient, float] = {}
        sent = 0
        while len(ended) < 3:
            now = time.monotonic() - start
            assert now < 5.0
            with contextlib.suppress(OSError):  # once they are closed
                sent += 1
                trickle.send_bytes(opening[sent - 1 : sent])
                early.send(ref.HEARTBEAT)
            for client in {silent, trickle, early} - ended.keys():
                client.sock.settimeout(0.01)
                try:
                    gone = client.sock.recv(1) == b""
                except TimeoutError:
                    gone = False
                except ConnectionError:
                    gone = True
                if gone:
                    ended[client] = now
        assert sent < 120
        assert min(ended.values()) > 0.5
        assert max(ended.values()) < 3.0
        assert server.stats()["closed"] == {"handshake_timeout": 3}
        exchange(server)


@pytest.mark.parametrize("size", [4096, 4097])
def test_size_of_a_handshake(size: int) -> None:
    with EventServer(port=0) as server, connect(server, ref.H23_199, handshake=False) as client:
        fields = {"TaskId": "h", "AuthenticationToken": "", "ClientId": "", "Announcement": "x"}
        short = len(ref.encode(ref.H23_199, ref.HANDSHAKE, fields))
        fields["Announcement"] = "x" * (size - short)
        data = ref.encode(ref.H23_199, ref.HANDSHAKE, fields)
        assert len(data) == size
        client.send_bytes(data)
        if size == 4096:
            assert client.read().fields["Status"] == ref.SUCCESS
        else:
            assert client.read_end() == []
            assert server.stats()["closed"] == {"packet_too_large": 1}
        exchange(server)


def refused(server: EventServer) -> None:
    """A connection is reset at once; that can be so quick that `connect` already reports it."""
    with contextlib.suppress(ConnectionError), connect(server, handshake=False) as client:
        assert client.read_end() == []


def test_limits_of_connections_and_of_handshakes() -> None:
    limits = Limits(connections=6, handshakes=2)
    with EventServer(port=0, limits=limits) as server, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connect(server, handshake=False)) for _ in range(2)]
        wait_for(lambda: server.stats()["handshakes_open"] == 2)
        refused(server)
        strangers[0].handshake()
        good = [stack.enter_context(connect(server)) for _ in range(4)]
        refused(server)
        assert server.stats()["closed"] == {"too_many_connections": 1, "too_many_handshakes": 1}
        good[0].close()
        wait_for(lambda: server.stats()["connections"] == 5)
        stack.enter_context(connect(server))
        assert good[1].heartbeat() == []


def test_limits_of_subscriptions_payload_and_packet() -> None:
    limits = Limits(subscriptions_per_connection=3, payload_bytes=1000)
    with EventServer(port=0, limits=limits) as server, connect(server) as client:
        assert client.facts["limits"]["payload"] == 1000
        for index in range(4):
            client.send(ref.SUBSCRIBE, TaskId=f"s{index}", Subject=f"x.{index}")
        packets = [client.read() for _ in range(4)]
        assert [packet.fields.get("Code") for packet in packets] == [None] * 3 + [ErrorCode.TOO_MANY_SUBSCRIPTIONS]
        client.send(ref.PUBLISH, {"TaskId": "p", "Subject": "x.0", "Buffer": bytes(1000)}, version=2)
        assert [client.read().object_id for _ in range(2)] == [ObjectId.DELIVERY, ObjectId.RESPONSE]
        client.send(ref.PUBLISH, {"TaskId": "p", "Subject": "x.0", "Buffer": bytes(1001)}, version=2)
        assert client.read().fields["Code"] == ErrorCode.PAYLOAD_TOO_LARGE
        assert client.heartbeat() == []
        client.send_bytes((1000 + 65_536).to_bytes(4, "little"))
        exchange(server)  # a packet of that size may come
    with EventServer(port=0, limits=limits) as server, connect(server) as client:
        client.send_bytes((1000 + 65_537).to_bytes(4, "little"))
        (told,) = client.read_end()
        assert told.fields["Reason"] == CloseReason.PACKET_TOO_LARGE
        assert server.stats()["closed"] == {"packet_too_large": 1}
        exchange(server)


def test_a_silent_peer_is_dropped() -> None:
    with EventServer(port=0, limits=Limits(silence_s=0.3)) as server, contextlib.ExitStack() as stack:
        old = stack.enter_context(connect(server, ref.H22))
        new = stack.enter_context(connect(server, ref.EVBUS_2, handshake=False))
        new.send(ref.HANDSHAKE, TaskId="h", Announcement='evbus/1 {"versions":[2,2],"heartbeat":0.1}')
        new.read()
        (told,) = new.read_end()
        assert told.fields["Reason"] == CloseReason.STALE
        assert old.read_end() == []
        assert server.stats()["closed"] == {"stale": 2}


# --- faults


def test_whoever_waits_for_a_peer_that_goes_is_told_in_the_same_turn() -> None:
    reactor = Reactor()
    core = ServerCore(reactor, Limits())
    pairs = [socket.socketpair() for _ in range(2)]
    for index, (_, theirs) in enumerate(pairs):
        core.add(TcpTransport(theirs, f"test:{index}"))
    (asker, _), (responder, _) = pairs
    try:
        hello = ref.encode(ref.EVBUS_2, ref.HANDSHAKE, {"TaskId": "h", "Announcement": CLIENT_FACTS})
        for sock in (asker, responder):
            sock.sendall(hello)
        responder.sendall(v2(ref.SUBSCRIBE, Subject="q", SubscriptionId=1, Role=1))
        reactor.run_once(0)
        asker.sendall(v2(ref.QUERY, TaskId="q", Subject="q"))
        reactor.run_once(0)
        asker.setblocking(False)
        asker.recv(4096)
        responder.close()
        reactor.run_once(0)
        (packet,) = ref.packets(asker.recv(4096), ref.EVBUS_2)
        assert (packet.object_id, packet.fields["Reason"]) == (ObjectId.QUERY_END, ref.LOST)
    finally:
        core.close_all()
        for ours, _ in pairs:
            ours.close()
        for _ in range(3):
            reactor.run_once(0)
        reactor.close()


def test_a_fault_of_the_server_ends_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with EventServer(port=0) as server, connect(server) as victim, connect(server) as other:
        core = server._core
        assert core is not None
        good = core.broker._handlers[ObjectId.SUBSCRIBE]

        def fail(peer: Any, packet: Any) -> Any:
            if b"bad" in packet[4]:
                raise RecursionError("planted")
            return good(peer, packet)

        monkeypatch.setitem(core.broker._handlers, ObjectId.SUBSCRIBE, fail)
        victim.send(ref.SUBSCRIBE, TaskId="s", Subject="bad")
        (told,) = victim.read_end()
        assert told.fields["Reason"] == CloseReason.INTERNAL_ERROR
        other.send(ref.SUBSCRIBE, TaskId="s", Subject="good")
        assert other.read().fields["Status"] == ref.SUCCESS
        assert server.stats()["closed"] == {"internal_error": 1}
        exchange(server)
    assert sum("planted" in (record.exc_text or "") for record in caplog.records) == 1


# --- resources


#: AddressSanitizer keeps freed memory, and large parts of its own.
MEASURES_MEMORY = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer's memory is larger"
)


@MEASURES_MEMORY
def test_a_subscriber_that_stops_reading() -> None:
    """R9: 180 MB published to it; reset and counted, the server stays small, and the publisher is never held up."""
    with ServerProcess() as server, contextlib.ExitStack() as stack:
        source, good = stack.enter_context(connect(server)), stack.enter_context(connect(server))
        stalled = stack.enter_context(RawClient(HOST, server.port))
        stalled.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        stalled.handshake()
        stalled.send(ref.SUBSCRIBE, TaskId="s", Subject="big")
        stalled.read()
        good.send(ref.SUBSCRIBE, TaskId="s", Subject="small")
        good.read()
        packet = v2(ref.PUBLISH, Subject="big", Buffer=bytes(60_000))
        small = v2(ref.PUBLISH, Subject="small", Buffer=b"!")
        before = peak = server.rss
        start = time.monotonic()
        longest = 0.0
        for index in range(3000):
            at = time.monotonic()
            source.send_bytes(packet)
            longest = max(longest, time.monotonic() - at)
            if index % 100 == 0:
                peak = max(peak, server.rss)
                source.send_bytes(small)
                assert good.read().fields["Buffer"] == b"!"
        assert source.heartbeat() == []
        closed = wait_for(lambda: server.stats()["closed"], timeout=15.0)
        assert time.monotonic() - start < 15.0
        peak = max(peak, server.rss)
        assert closed == {"slow_consumer": 1}
        assert longest < 1.0
        assert peak - before < 80 * MIB, f"{(peak - before) / MIB:.1f} MiB"
        assert server.stats()["dropped_slow"] >= 1
        with pytest.raises(ConnectionError):
            while stalled.sock.recv(MIB):
                pass
        exchange(server)


@MEASURES_MEMORY
def test_claims_cost_nothing() -> None:
    """R7: 50 peers that claim 1 MB each and send no more than the beginning of it."""
    with ServerProcess() as server, contextlib.ExitStack() as stack:
        exchange(server)
        before = server.rss
        claim = v2(ref.PUBLISH, Subject="x", Buffer=bytes(1_000_000))[:100]
        clients = [stack.enter_context(connect(server)) for _ in range(50)]
        for client in clients:
            client.send_bytes(claim)
        wait_for(lambda: server.stats()["ring_bytes"] == 50 * 512)  # not while it is at one of them
        assert server.rss - before < 8 * MIB
        exchange(server)


def test_idle_connections_hold_no_rings() -> None:
    with ServerProcess() as server, contextlib.ExitStack() as stack:
        exchange(server)
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in clients:
            client.heartbeat()
        wait_for(lambda: server.stats()["ring_bytes"] == 0)  # not while it answers the last one


@pytest.mark.skipif(os.name == "nt", reason="descriptors are counted differently there")
def test_all_descriptors_used_up() -> None:
    """R16: it does not burn a core on connections that it cannot accept, and takes them when it can."""
    with ServerProcess(connections=50) as server, contextlib.ExitStack() as stack:
        early = stack.enter_context(connect(server))
        assert server.tell("exhaust") == errno.EMFILE
        late = [stack.enter_context(connect(server, handshake=False)) for _ in range(3)]
        for client in late:
            client.send(ref.HANDSHAKE, TaskId="h", Announcement=CLIENT_FACTS)
        assert early.heartbeat() == []
        start, used = time.monotonic(), server.cpu_s
        with pytest.raises(AssertionError, match="no packet"):
            late[0].read(timeout=1.5)
        share = (server.cpu_s - used) / (time.monotonic() - start)
        assert share < 0.1, f"{share:.0%} of a core"
        assert early.heartbeat() == []
        server.tell("free")
        for client in late:
            assert client.read().fields["Status"] == ref.SUCCESS
        exchange(server)
