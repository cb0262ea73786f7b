"""The control plane: handshakes, subscriptions, heartbeats, limits, time, and the end. The oracle looks on."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import reference as ref
from helpers_bus import Bus, Client
from side_by_side import START_MS

from evbus import wire
from evbus.announcement import FEATURES
from evbus.broker import CONTROL_PACKETS_PER_TURN, YIELD, Broker
from evbus.limits import UNLIMITED, Limits
from evbus.wire import CloseReason, Dialect, ErrorCode

NAMES = {ref.H22: "H22", ref.H23_255: "H23_255", ref.H23_199: "H23_199", ref.EVBUS_2: "EVBUS_2"}


def dialect_of(client: Client) -> str:
    return Dialect(client.wire.peer.link.dialect).name


# --- handshakes


@pytest.mark.parametrize("dialect", ref.DIALECTS)
@pytest.mark.parametrize("task_id", ["", "h", "x" * 128])
def test_handshake(dialect: str, task_id: str) -> None:
    bus = Bus()
    client = bus.open(dialect, TaskId=task_id)
    assert dialect_of(client) == NAMES[dialect]
    assert bus.broker.stats()["handshakes_open"] == 0


@pytest.mark.parametrize(
    ("strings", "system_id", "dialect"),
    [
        (1, 0, "H23_199"),
        (1, 5, "H23_255"),
        (1, -1, "H23_255"),
        (2, 0, "H23_199"),
        (2, 5, "H23_199"),
        (3, 0, "H23_199"),
        (4, 0, "EVBUS_2"),
        (4, 5, "EVBUS_2"),
    ],
)
def test_dialect_of_a_23_byte_header(strings: int, system_id: int, dialect: str) -> None:
    bus = Bus()
    client = bus.fresh(ref.H23_199)
    texts = ["h", "token", "client", 'evbus/1 {"versions":[2,2]}'][:strings]
    body = b"".join(ref.encode_string(text) for text in texts)
    client.send_bytes(ref.encode_frame(23, 1, 1, body, system_id))
    assert dialect_of(client) == dialect


def test_what_the_server_says_of_itself() -> None:
    bus = Bus(payload_bytes=5000, subscriptions_per_connection=7, queries_per_connection=8)
    bus.open()
    client = bus.fresh()
    client.handshake(Announcement='evbus/1 {"versions":[1,7],"heartbeat":2}')
    (answer,) = client.take()
    message = answer.fields["Message"]
    assert message.startswith("evbus/1 {")
    assert json.loads(message[8:]) == {
        "version": 2,
        "server": f"evbus {__import__('evbus._version', fromlist=['__version__']).__version__}",
        "connection": 2,
        "heartbeat": 2.0,
        "limits": {
            "payload": 5000, "packet": 5000 + 65536, "subject": 256, "tokens": 32, "subscriptions": 7, "queries": 8,
        },
        "features": list(FEATURES),
    }  # fmt: skip
    client.handshake(TaskId="again", Announcement="nonsense")
    (again,) = client.take()
    assert again.fields == {"TaskId": "again", "Status": 1, "Message": message}


@pytest.mark.parametrize(
    ("announcement", "heartbeat"),
    [
        ('{"versions":[2,2]}', 5.0),
        ('{"versions":[2,2],"heartbeat":0.001}', 0.05),
        ('{"versions":[2,2],"heartbeat":1e300}', 3600.0),
        ('{"versions":[2,2],"heartbeat":0}', 5.0),
        ('{"versions":[2,2],"heartbeat":-3}', 5.0),
        ('{"versions":[2,2],"heartbeat":true}', 5.0),
        ('{"versions":[2,2],"heartbeat":"1"}', 5.0),
        ('{"versions":[2,2],"name":{"a":1},"client":7,"features":"x","heartbeat":7}', 7.0),
        ('{"versions":[0,1000000000000000000000],"later":[[[[]]]]}', 5.0),
        ('{"versions":[2,2], "more" : null }', 5.0),
        ('{"versions":[3,3]}', None),
        ('{"versions":[0,1]}', None),
        ('{"versions":[2,1]}', 0),
        ('{"versions":[2]}', 0),
        ('{"versions":[2,2,2]}', 0),
        ('{"versions":[2.0,2.0]}', 0),
        ('{"versions":["2","2"]}', 0),
        ('{"versions":[true,true]}', 0),
        ('{"versions":{}}', 0),
        ("{}", 0),
        ("[2,2]", 0),
        ("", 0),
        ('{"versions":[2,2]', 0),
        ('{"versions":[2,2]}}', 0),
        ('{"versions":[2,2],"x":NaN}', 0),
        ("[" * 3500, 0),
        ('{"versions":[2,2],"x":' + "[" * 3500, 0),
        ('{"versions":[2,2],"x":' + "[" * 1500 + "]" * 1500 + "}", 0),
    ],
)
def test_announcements(announcement: str, heartbeat: float | None) -> None:
    """heartbeat: the interval in force; 0: no announcement, so a version-1 peer; None: no common version."""
    # How deep a nesting may be is not said: the oracle and the server need not agree on 1,500 levels.
    bus = Bus(check="]" * 100 not in announcement)
    client = bus.fresh()
    client.handshake(Announcement="evbus/1 " + announcement)
    (answer,) = client.take()
    if heartbeat is None:
        assert (answer.fields["Status"], client.closed) == (ref.FAIL, CloseReason.UNSUPPORTED_DIALECT)
        assert "2 to 2" in answer.fields["Message"]
        return
    assert answer.fields["Status"] == ref.SUCCESS
    if heartbeat:
        assert json.loads(answer.fields["Message"][8:])["heartbeat"] == heartbeat
        assert client.wire.peer.silence_s == 2 * heartbeat
    else:
        assert (answer.fields["Message"], dialect_of(client)) == ("", "H23_199")


@pytest.mark.parametrize(
    ("field", "size", "good"),
    [
        ("TaskId", 128, True), ("TaskId", 129, False), ("AuthenticationToken", 1024, True),
        ("AuthenticationToken", 1025, False), ("ClientId", 128, True), ("ClientId", 129, False),
    ],
)  # fmt: skip
def test_limits_of_a_handshakes_strings(field: str, size: int, good: bool) -> None:
    bus = Bus()
    client = bus.fresh(ref.H23_199)
    client.handshake(**{field: "x" * size})
    assert bool(client.take()) is good
    assert bus.errors() == ({} if good else {"malformed": 1})
    client.handshake()
    assert len(client.take()) == 1  # the server went on waiting for a good one
    announced = bus.open()
    announced.handshake(TaskId="t", AuthenticationToken="x" * 1025)
    announced.handshake(TaskId="t" * 129)
    malformed = ErrorCode.MALFORMED
    assert announced.brief() == [(ref.ERROR, "t", malformed), (ref.ERROR, "", malformed)]


def test_int_dialects_are_refused_only_as_a_first_packet() -> None:
    bus = Bus()
    client = bus.fresh(ref.H22)
    client.send_bytes(ref.encode_frame(22, 1, 1, b"\1\0\0\0"))
    assert (client.closed, client.take()) == (CloseReason.UNSUPPORTED_DIALECT, [])
    ready = bus.open(ref.H22)
    ready.handshake(TaskId="abc")  # a body of four bytes as well
    assert ready.brief() == [(ref.RESPONSE, "abc", 1)]


def test_before_a_handshake_all_else_is_dropped() -> None:
    bus = Bus()
    watcher = bus.open()
    watcher.subscribe(">")
    client = bus.fresh(ref.H23_199)
    client.send_bytes(ref.encode_frame(23, 1, 1, b""))  # malformed, but it shows the layout
    client.send(ref.HEARTBEAT, TaskId=1)
    client.send(ref.HEARTBEAT_OLD)
    client.send(ref.SUBSCRIBE, TaskId="t", Subject="x")
    client.publish("x", task_id="t")
    client.send(ref.QUERY, TaskId="q", Subject="x")
    client.send_bytes(ref.encode_frame(23, 1, 2, b"\1h"))
    client.send_bytes(ref.encode_frame(23, 1000, 1, b""))
    assert (client.take(), watcher.take()) == ([], [])
    stats = bus.broker.stats()
    assert (stats["early_packets"], stats["errors"], stats["unknown_packets"]) == (7, {"malformed": 1}, 0)
    client.handshake()
    client.send(ref.HEARTBEAT, TaskId=1)
    assert client.brief() == [(ref.RESPONSE, "h", 1), (ref.HEARTBEAT, 1)]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", CloseReason.NOT_EVENT_BUS),
        (b"\x16\x03\x01\x02\x00\x01", CloseReason.PACKET_TOO_LARGE),  # a TLS hello: 33 MB if read as a size
        (b"CONNECT {}\r\n", CloseReason.NOT_EVENT_BUS),
        (b"*1\r\n$4\r\nPING\r\n", CloseReason.NOT_EVENT_BUS),
        (b"\0\0\0\0", CloseReason.NOT_EVENT_BUS),
        ((21).to_bytes(4, "little"), CloseReason.NOT_EVENT_BUS),
        ((22).to_bytes(4, "little"), None),
        ((4096).to_bytes(4, "little"), None),
        ((4097).to_bytes(4, "little"), CloseReason.PACKET_TOO_LARGE),
        ((1 << 26).to_bytes(4, "little"), CloseReason.PACKET_TOO_LARGE),
        (((1 << 26) + 1).to_bytes(4, "little"), CloseReason.NOT_EVENT_BUS),
        (b"\xff\xff\xff\xff", CloseReason.NOT_EVENT_BUS),
        ((60).to_bytes(4, "little") + bytes(8) + b"\1\2", CloseReason.NOT_EVENT_BUS),
        ((60).to_bytes(4, "little") + bytes(8) + b"\2\0", CloseReason.NOT_EVENT_BUS),
        ((60).to_bytes(4, "little") + bytes(8) + b"\2\1", CloseReason.NOT_EVENT_BUS),
        ((22).to_bytes(4, "little") + bytes(8) + b"\1\0", CloseReason.PROTOCOL_ERROR),
    ],
)
def test_first_bytes(first: bytes, reason: CloseReason | None) -> None:
    for pieces in ([first], [first[at : at + 1] for at in range(len(first))]):
        bus = Bus()
        good = bus.open()
        client = bus.fresh()
        client.send_bytes(*pieces)
        assert (client.closed, client.take()) == (reason, [])
        good.send(ref.HEARTBEAT, TaskId=1)
        assert len(good.take()) == 1
        assert bus.broker.closed_by_reason == ({} if reason is None else {reason: 1})


def test_heartbeat_is_the_second_witness_of_the_dialect() -> None:
    bus = Bus()
    new, old = bus.open(ref.H23_199), bus.open(ref.H23_255)
    for client in (new, old):
        client.subscribe("x")
    new.send(ref.HEARTBEAT_OLD)
    old.send(ref.HEARTBEAT, TaskId=4)
    assert (dialect_of(new), dialect_of(old)) == ("H23_255", "H23_199")
    new.dialect, old.dialect = ref.H23_255, ref.H23_199
    new.publish("x", b"!", "t")
    deliveries = [packet.fields for packet in new.take() + old.take() if packet.object_id == ref.DELIVERY]
    assert deliveries == [
        {"TaskId": "t", "Subject": "x", "Buffer": b"!"},
        {"TaskId": "t", "Subject": "x", "IsQueryRequest": False, "Buffer": b"!"},
    ]
    # Where the handshake left no doubt, a heartbeat changes nothing.
    for dialect in (ref.EVBUS_2, ref.H22):
        sure = bus.open(dialect)
        sure.send(ref.HEARTBEAT_OLD)
        sure.send(ref.HEARTBEAT, TaskId=5)
        assert dialect_of(sure) == NAMES[dialect]
        assert [packet.object_id for packet in sure.take()] == [ref.HEARTBEAT_OLD, ref.HEARTBEAT]


@pytest.mark.parametrize("dialect", ref.DIALECTS)
def test_heartbeats_are_echoed_in_the_senders_form(dialect: str) -> None:
    bus = Bus()
    client = bus.open(dialect)
    for number in (0, 7, -1, 2**31 - 1):
        client.send(ref.HEARTBEAT, TaskId=number)
    client.send_bytes(ref.encode_frame(ref.layout_of(dialect), ref.HEARTBEAT, 1, b"\1\0\0"))
    client.send_bytes(ref.encode_frame(ref.layout_of(dialect), ref.HEARTBEAT, 1, b"\1\0\0\0more"))
    echoes = [(ref.HEARTBEAT, number) for number in (0, 7, -1, 2**31 - 1)]
    malformed = [(ref.ERROR, "", ErrorCode.MALFORMED)] if dialect == ref.EVBUS_2 else []
    assert client.brief() == [*echoes, *malformed, (ref.HEARTBEAT, 1)]


# --- subscriptions


def test_subscribe_and_unsubscribe() -> None:
    bus = Bus()
    client, source = bus.open(), bus.open(ref.H23_199)
    for _ in range(2):
        client.send(ref.SUBSCRIBE, TaskId="s", Subject="x")
        client.send(ref.SUBSCRIBE, 2, TaskId="s", Subject="x", SubscriptionId=3, Group="g")
    assert client.brief() == [(ref.RESPONSE, "s", 1)] * 4
    assert client.wire.peer.link.subscriptions == 2
    source.publish("x")
    assert len(client.take()) == 2
    client.send(ref.UNSUBSCRIBE, TaskId="u", Subject="x")
    client.send(ref.UNSUBSCRIBE, TaskId="u", Subject="x")
    client.send(ref.UNSUBSCRIBE, 2, TaskId="u", SubscriptionId=3)
    client.send(ref.UNSUBSCRIBE, 2, TaskId="u", SubscriptionId=3)
    unknown = (ref.ERROR, "u", ErrorCode.UNKNOWN_SUBSCRIPTION)
    assert client.brief() == [(ref.RESPONSE, "u", 1)] * 3 + [unknown]
    source.publish("x")
    assert (client.take(), bus.router.table.subscriptions, bus.router.table.subjects) == ([], 0, 1)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, None),
        ({"Subject": "y"}, "DUPLICATE_ID"),
        ({"Role": 1}, "DUPLICATE_ID"),
        ({"Group": "h"}, "DUPLICATE_ID"),
        ({"Role": 2}, "UNSUPPORTED"),
        ({"Role": 255}, "UNSUPPORTED"),
        ({"Overflow": 1}, "DUPLICATE_ID"),
        ({"Overflow": 2}, "DUPLICATE_ID"),
        ({"Overflow": 3}, "UNSUPPORTED"),
        ({"Overflow": 1, "Role": 1}, "UNSUPPORTED"),
        ({"Overflow": 2, "Role": 1}, "UNSUPPORTED"),
        ({"Subject": "a..b", "Role": 2}, "INVALID_SUBJECT"),
        ({"Subject": "a*"}, "INVALID_SUBJECT"),
        ({"SubscriptionId": 0}, "MALFORMED"),
        ({"SubscriptionId": -1, "Subject": ""}, "MALFORMED"),
        ({"Group": "g" * 129}, "MALFORMED"),
    ],
)
def test_the_same_id_again_with_other_fields(change: dict[str, Any], code: str | None) -> None:
    bus = Bus()
    client = bus.open()
    fields: dict[str, Any] = {"TaskId": "s", "Subject": "x", "SubscriptionId": 3, "Group": "g"}
    client.send(ref.SUBSCRIBE, 2, **fields)
    client.send(ref.SUBSCRIBE, 2, **fields | change)
    told = (ref.RESPONSE, "s", 1) if code is None else (ref.ERROR, "s", ErrorCode[code])
    assert client.brief() == [(ref.RESPONSE, "s", 1), told]
    assert client.wire.peer.link.subscriptions == 1


def test_limits_of_subscriptions() -> None:
    bus = Bus(check=False, subscriptions_per_connection=3, subscriptions=5)
    one, two = bus.open(), bus.open(ref.H23_199)
    for index in range(4):
        one.send(ref.SUBSCRIBE, 2, TaskId=f"s{index}", Subject=f"a.{index}", SubscriptionId=index + 1)
        two.send(ref.SUBSCRIBE, TaskId=f"s{index}", Subject=f"a.{index}")
    one.send(ref.SUBSCRIBE, 2, TaskId="again", Subject="a.0", SubscriptionId=1)
    too_many = (ref.ERROR, "s3", ErrorCode.TOO_MANY_SUBSCRIPTIONS)
    assert one.brief()[3:] == [too_many, (ref.RESPONSE, "again", 1)]
    assert [out[2] for out in two.brief()] == [1, 1, 2, 2]
    assert bus.router.table.subscriptions == 5
    one.close()
    two.send(ref.SUBSCRIBE, TaskId="s", Subject="b")
    assert two.brief() == [(ref.RESPONSE, "s", 1)]
    assert bus.errors() == {"too_many_subscriptions": 3}


def test_ids_that_are_too_long_are_malformed() -> None:
    long = "x" * 129
    bus = Bus()
    client = bus.open()
    client.send(ref.ERROR, TaskId=long, Code=500)
    client.send(ref.CANCEL_QUERY, TaskId=long)
    client.send(ref.SUBSCRIBE, TaskId=long, Subject="x")
    client.send(ref.UNSUBSCRIBE, TaskId=long, Subject="x")
    client.publish("x", task_id=long)
    client.publish("x", task_id=long, version=2)
    assert client.brief() == [(ref.ERROR, "", ErrorCode.MALFORMED)] * 6


@pytest.mark.parametrize("object_id", [0, 5, 7, 254, 1001, 1002, 1003, 1005, 1007, 0xFF05])
def test_objects_that_have_no_business_here(object_id: int) -> None:
    bus = Bus()
    clients = [bus.open(dialect) for dialect in ref.DIALECTS]
    for client in clients:
        layout = ref.layout_of(client.dialect)
        for version in (0, 1, 2, 3):
            client.send_bytes(ref.encode_frame(layout, object_id & (0xFF if layout == 22 else 0xFFFF), version, b""))
        client.send(ref.HEARTBEAT, TaskId=1)
        assert client.brief() == [(ref.HEARTBEAT, 1)]
    assert (bus.errors(), bus.router.unknown_packets) == ({}, 16)


def test_version_2_is_for_announced_peers_only() -> None:
    bus = Bus()
    client = bus.open(ref.H23_199)
    for object_id, version in ((2, 2), (3, 2), (4, 2), (6, 2), (1000, 1), (1004, 1)):
        client.send_bytes(ref.encode(ref.EVBUS_2, object_id, {}, version=version))
    assert (client.take(), bus.router.unknown_packets, bus.errors()) == ([], 6, {})


def test_control_packets_take_turns_with_other_peers() -> None:
    bus = Bus(check=False)
    client = bus.open()
    link = client.wire.peer.link
    link.inp.write(ref.encode(ref.EVBUS_2, ref.HEARTBEAT, {"TaskId": 1}) * (CONTROL_PACKETS_PER_TURN * 2 + 10))
    results = [bus.broker.receive(client.wire.peer) for _ in range(3)]
    assert results == [YIELD, YIELD, None]
    bus.world.run([])
    assert len(client.take()) == CONTROL_PACKETS_PER_TURN * 2 + 10


# --- time


def test_handshakes_have_a_deadline_that_nothing_moves() -> None:
    bus = Bus(handshake_s=3.0)
    client = bus.fresh(ref.H23_199)
    packet = ref.encode_frame(23, 1, 1, b"")
    for at in range(29):
        client.send_bytes((packet * 2)[at : at + 1])
        bus.wait(0.1)
    assert client.is_open
    bus.wait(0.2)
    assert client.closed is CloseReason.HANDSHAKE_TIMEOUT
    late = bus.fresh()
    bus.wait(2.9)
    late.handshake()
    bus.wait(50.0)
    assert late.is_open


def test_silence() -> None:
    bus = Bus(silence_s=30.0)
    clients = {dialect: bus.open(dialect) for dialect in (ref.H22, ref.H23_199)}
    announced = bus.fresh()
    announced.handshake(Announcement='evbus/1 {"versions":[2,2],"heartbeat":4}')
    bus.world.check = False
    for _ in range(7):
        bus.wait(3.9)
        clients[ref.H22].send_bytes(b"\x16")  # any byte is a sign of life
        clients[ref.H22].send_bytes(ref.encode(ref.H22, ref.HEARTBEAT_OLD, {})[1:])
    assert announced.closed is CloseReason.STALE
    assert clients[ref.H23_199].is_open
    bus.wait(4.0)
    assert clients[ref.H23_199].closed is CloseReason.STALE
    assert clients[ref.H22].is_open
    for _ in range(9):
        bus.wait(3.9)
    assert clients[ref.H22].closed is CloseReason.STALE
    assert bus.broker.closed_by_reason == {CloseReason.STALE: 3}


def test_silence_is_noticed_half_a_second_after_two_heartbeats_at_the_latest() -> None:
    bus = Bus(check=False)
    for phase in range(10):
        bus.wait(0.1 + phase / 7)
        silent = bus.fresh()
        silent.handshake(Announcement='evbus/1 {"versions":[2,2],"heartbeat":1}')
        bus.wait(1.99)
        assert silent.is_open
        bus.wait(0.51)
        assert silent.closed is CloseReason.STALE


def test_a_server_that_was_held_up_itself_judges_nobody_by_it() -> None:
    bus = Bus(check=False)
    client = bus.fresh()
    client.handshake(Announcement='evbus/1 {"versions":[2,2],"heartbeat":1}')
    bus.wait(1.0)
    bus.broker.set_time(bus.world.now + 30.0, START_MS)  # suspended; what has come meanwhile is unread
    assert bus.broker.tick() == []
    bus.world.now += 30.0
    client.send_bytes(b"\x17")
    bus.wait(0.5)
    assert client.is_open
    bus.wait(2.5)
    assert client.closed is CloseReason.STALE


def notice(bus: Bus) -> None:
    """What the owner of a broker does with those that take no more."""
    for link in bus.router.take_blocked():
        bus.broker.waiting(link.owner)


def test_no_byte_taken_for_too_long() -> None:
    bus = Bus(check=False, silence_s=UNLIMITED, write_timeout_s=10.0)
    source, slow = bus.open(ref.H23_199), bus.open(ref.H23_199)
    slow.subscribe("x")
    slow.wire.stalled = True
    source.wire.peer.link.inp.write(ref.encode(ref.H23_199, ref.PUBLISH, {"Subject": "x", "Buffer": bytes(100_000)}))
    bus.broker.receive(source.wire.peer)
    notice(bus)
    assert bus.broker.stats()["connections_waiting"] == 1
    for _ in range(9):
        bus.wait(1.0)
    assert slow.is_open
    bus.broker.progressed(slow.wire.peer, 50_000)  # it took some
    for _ in range(9):
        bus.wait(1.0)
    assert slow.is_open
    bus.wait(1.1)
    bus.wait(1.1)
    assert slow.closed is CloseReason.WRITE_TIMEOUT
    assert source.is_open
    assert bus.broker.undelivered_bytes > 100_000


def test_too_much_for_too_long() -> None:
    bus = Bus(check=False, silence_s=UNLIMITED, pending_soft_bytes=50_000, pending_soft_s=5.0)
    source, slow = bus.open(ref.H23_199), bus.open(ref.H23_199)
    slow.subscribe("x")
    slow.wire.stalled = True
    source.wire.peer.link.inp.write(ref.encode(ref.H23_199, ref.PUBLISH, {"Subject": "x", "Buffer": bytes(100_000)}))
    bus.broker.receive(source.wire.peer)
    notice(bus)
    for _ in range(4):
        bus.wait(1.0)
        bus.broker.progressed(slow.wire.peer, 90_000)
    assert slow.is_open
    bus.broker.progressed(slow.wire.peer, 10_000)  # below: the time begins anew
    for _ in range(5):
        bus.wait(1.0)
        bus.broker.progressed(slow.wire.peer, 90_000)
    assert slow.is_open
    for _ in range(2):
        bus.wait(1.0)
        bus.broker.progressed(slow.wire.peer, 90_000)
    assert slow.closed is CloseReason.SLOW_CONSUMER_SOFT


def test_next_tick_is_never_late() -> None:
    bus = Bus(check=False, handshake_s=0.2)
    broker = bus.broker
    assert broker.next_tick <= bus.world.now + 0.5
    bus.fresh()
    assert broker.next_tick == pytest.approx(bus.world.now + 0.2)
    client, responder = bus.open(), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    client.send(ref.QUERY, 2, TaskId="q", Subject="q", DeadlineMs=20)
    assert broker.next_tick == pytest.approx(bus.world.now + 0.02)
    bus.wait(0.021)
    assert client.brief() == [(ref.QUERY_END, "q", ref.DEADLINE, 0)]
    assert broker.next_tick > bus.world.now


# --- limits of connections, the end, statistics


def test_limits_of_connections_and_of_handshakes() -> None:
    bus = Bus(connections=4, handshakes=2)
    broker = bus.broker
    bus.fresh()
    waiting = bus.fresh()
    assert broker.refusal() is CloseReason.TOO_MANY_HANDSHAKES
    waiting.handshake()
    assert broker.refusal() is None
    bus.open()
    bus.open()
    assert broker.refusal() is CloseReason.TOO_MANY_CONNECTIONS
    broker.refused(CloseReason.TOO_MANY_CONNECTIONS, "test:9")
    waiting.close()
    assert broker.refusal() is None
    broker.drain()
    assert broker.refusal() is CloseReason.SERVER_SHUTDOWN
    assert broker.closed_by_reason[CloseReason.TOO_MANY_CONNECTIONS] == 1
    stats = broker.stats()
    assert (stats["connections"], stats["connections_accepted"], stats["handshakes_open"]) == (3, 4, 1)


def test_drain_tells_announced_peers() -> None:
    bus = Bus(check=False)
    clients = [bus.open(dialect) for dialect in ref.DIALECTS]
    strange = bus.fresh()
    bus.broker.drain()
    bus.world.run([])
    for client in clients:
        told = [(ref.GO_AWAY, CloseReason.SERVER_SHUTDOWN)] if client.dialect == ref.EVBUS_2 else []
        assert client.brief() == told
    strange.handshake()
    assert strange.brief() == [(ref.RESPONSE, "h", 1), (ref.GO_AWAY, CloseReason.SERVER_SHUTDOWN)]
    assert bus.broker.is_idle
    clients[-1].subscribe("q", 1, role=ref.RESPONDER)
    clients[0].send(ref.QUERY, TaskId="q", Subject="q")
    assert not bus.broker.is_idle
    clients[0].close()
    assert bus.broker.is_idle


def test_closing_twice_counts_once() -> None:
    bus = Bus(check=False)
    client = bus.open()
    client.subscribe("x")
    for _ in range(2):
        bus.broker.closed(client.wire.peer, CloseReason.CLIENT_CLOSED)
    assert bus.broker.stats()["closed"] == {"client_closed": 1}
    assert (bus.router.table.subscriptions, len(bus.broker.peers)) == (0, 0)


def test_log_lines_are_single_and_few(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("evbus.test.broker")
    broker = Broker(Limits(), now=0.0, unix_ms=START_MS, log=log)
    with caplog.at_level(logging.DEBUG, "evbus.test.broker"):
        for index in range(100):
            peer = broker.opened("test:1", len, 0.0)
            peer.name = "bad\r\n\x1b[31m\u202eevil"
            broker.closed(peer, CloseReason.PROTOCOL_ERROR if index % 2 else CloseReason.STALE)
        broker.set_time(2.0, START_MS)
        broker.tick()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 22
    assert not any(char in line for line in lines for char in "\r\n\x1b\u202e")
    assert sum("40 further lines" in line for line in lines) == 2
    assert broker.stats()["closed"] == {"protocol_error": 50, "stale": 50}


def test_own_packets_carry_the_systems_id_and_time_of_their_dialect() -> None:
    bus = Bus()
    bus.wait(1.25)
    expected = {
        ref.H22: wire.filetime(START_MS + 1250),
        ref.H23_255: wire.filetime(START_MS + 1250),
        ref.H23_199: wire.dotnet_ticks(START_MS),
        ref.EVBUS_2: 0,
    }
    for dialect, system_id in expected.items():
        client = bus.fresh(dialect)
        client.handshake()
        client.send(ref.HEARTBEAT_OLD if dialect in ref.OLD else ref.HEARTBEAT)
        client.send(ref.SUBSCRIBE, TaskId="s", Subject="x")
        client.send(ref.QUERY, TaskId="q", Subject="nobody")
        packets = client.take()
        assert len(packets) == 4
        assert {(packet.system_id, packet.time) for packet in packets} == {(system_id, START_MS + 1250)}
