"""Bad input over real sockets: each has its outcome, is counted, and concerns nobody but its sender.

The tables follow section 10 of `docs/protocol.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
from helpers_raw import CLIENT_FACTS
from helpers_server import connect, exchange, v1, v2, wait_for

from evbus.limits import Limits
from evbus.server import EventServer
from evbus.wire import CloseReason, ErrorCode, ObjectId


@pytest.fixture(scope="module")
def shared() -> Iterator[EventServer]:
    with EventServer(port=0, limits=Limits(payload_bytes=10_000)) as server:
        yield server


def frame(object_id: int, body: bytes, version: int = 1, size: int | None = None, layout: int = 23) -> bytes:
    return ref.encode_frame(layout, object_id, version, body, size=size)


def string(text: str | bytes) -> bytes:
    return ref.encode_string(text if isinstance(text, str) else text.decode("utf-8", "surrogateescape"))


#: name: (bytes on a fresh connection, the reason to close it, or what is counted if it stays)
FIRST: dict[str, tuple[bytes, CloseReason | str]] = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", CloseReason.NOT_EVENT_BUS),
    "TLS": (bytes.fromhex("1603010200010001fc0303") + bytes(506), CloseReason.PACKET_TOO_LARGE),
    "NATS": (b'CONNECT {"verbose":false}\r\nPING\r\n', CloseReason.NOT_EVENT_BUS),
    "Redis": (b"*1\r\n$4\r\nPING\r\n", CloseReason.NOT_EVENT_BUS),
    "MQTT": (bytes.fromhex("101000044d5154540402003c000461626364"), CloseReason.NOT_EVENT_BUS),
    "zeros": (bytes(64), CloseReason.NOT_EVENT_BUS),
    "size below a header": ((21).to_bytes(4, "little"), CloseReason.NOT_EVENT_BUS),
    "negative size": (b"\xff\xff\xff\xff", CloseReason.NOT_EVENT_BUS),
    "size above 64 MiB": ((1 << 26 | 1).to_bytes(4, "little"), CloseReason.NOT_EVENT_BUS),
    "size above 4 KiB": ((4097).to_bytes(4, "little"), CloseReason.PACKET_TOO_LARGE),
    "size that does not hold its header": (frame(1, b"", size=22), CloseReason.PROTOCOL_ERROR),
    "another first object": (v1(ref.SUBSCRIBE, Subject="x"), CloseReason.NOT_EVENT_BUS),
    "an int dialect": (frame(1, b"\1\0\0\0", layout=22), CloseReason.UNSUPPORTED_DIALECT),
    "malformed handshake": (frame(1, b"\x05ab"), "errors.malformed"),
    "a message before the handshake": (frame(1, b"") + v1(ref.PUBLISH, TaskId="t", Subject="x"), "early_packets"),
    "a heartbeat before the handshake": (frame(1, b"") + v1(ref.HEARTBEAT), "early_packets"),
}

#: name: (bytes of an announced peer, what it is told: (TaskId, code), CloseReason or nothing, and then what is counted)
LATER: dict[str, tuple[bytes, tuple[str, ErrorCode] | CloseReason | str]] = {
    "size below the header": ((22).to_bytes(4, "little"), CloseReason.PROTOCOL_ERROR),
    "negative size": (b"\0\0\0\x80", CloseReason.PROTOCOL_ERROR),
    "size above the limit": (b"\xff\xff\xff\x7f", CloseReason.PACKET_TOO_LARGE),
    "unknown object": (frame(77, b"abc"), "unknown_packets"),
    "unknown version": (frame(4, b"abc", version=3), "unknown_packets"),
    "an object that only servers send": (v1(ref.RESPONSE, TaskId="t", Status=1), "unknown_packets"),
    "string beyond the body": (frame(2, string("t") + b"\x05ab"), ("t", ErrorCode.MALFORMED)),
    "string without an end": (frame(2, string("t") + b"\x80"), ("t", ErrorCode.MALFORMED)),
    "over-long length": (frame(2, string("t") + b"\xff" * 5 + b"s"), ("t", ErrorCode.MALFORMED)),
    "negative count": (frame(4, string("t") + string("x") + b"\0" + b"\xff" * 4), ("t", ErrorCode.MALFORMED)),
    "missing field": (frame(4, string("t")), ("t", ErrorCode.MALFORMED)),
    "empty body": (frame(4, b"", version=2), ("", ErrorCode.MALFORMED)),
    "id above its limit": (v1(ref.PUBLISH, TaskId="t" * 129, Subject="x"), ("", ErrorCode.MALFORMED)),
    "bytes after an envelope": (
        frame(4, ref.encode_body(ref.EVBUS_2, 4, 2, {"TaskId": "t", "Subject": "x"}) + b"\0", version=2),
        ("t", ErrorCode.MALFORMED),
    ),
    "headers that are none": (
        v2(ref.PUBLISH, TaskId="t", Subject="x", Headers=b"\x01"),
        ("t", ErrorCode.MALFORMED),
    ),
    "empty subject": (v1(ref.PUBLISH, TaskId="t"), ("t", ErrorCode.INVALID_SUBJECT)),
    "empty token": (v2(ref.PUBLISH, TaskId="t", Subject="a..b"), ("t", ErrorCode.INVALID_SUBJECT)),
    "control character": (v1(ref.SUBSCRIBE, TaskId="t", Subject="a\nb"), ("t", ErrorCode.INVALID_SUBJECT)),
    "subject of 257 bytes": (v1(ref.SUBSCRIBE, Subject="s" * 257), ("", ErrorCode.INVALID_SUBJECT)),
    "subject that is no UTF-8": (v1(ref.PUBLISH, TaskId="t", Subject="\udcff"), ("t", ErrorCode.INVALID_SUBJECT)),
    "wildcard in a publish": (v2(ref.PUBLISH, Subject="a.*"), ("", ErrorCode.INVALID_SUBJECT)),
    "wildcard in a query": (v2(ref.QUERY, TaskId="q", Subject=">"), ("q", ErrorCode.INVALID_SUBJECT)),
    "payload above the limit": (
        v2(ref.PUBLISH, TaskId="t", Subject="x", Buffer=bytes(10_001)),
        ("t", ErrorCode.PAYLOAD_TOO_LARGE),
    ),
    "subscribe twice": (
        v2(ref.SUBSCRIBE, Subject="x", SubscriptionId=1) + v2(ref.SUBSCRIBE, TaskId="s", Subject="y", SubscriptionId=1),
        ("s", ErrorCode.DUPLICATE_ID),
    ),
    "unsubscribe of nothing": (
        v2(ref.UNSUBSCRIBE, TaskId="u", SubscriptionId=9),
        ("u", ErrorCode.UNKNOWN_SUBSCRIPTION),
    ),
    "role that is not known": (
        v2(ref.SUBSCRIBE, TaskId="s", Subject="x", SubscriptionId=1, Role=2),
        ("s", ErrorCode.UNSUPPORTED),
    ),
    "overflow that the server does not have": (
        v2(ref.SUBSCRIBE, TaskId="s", Subject="x", SubscriptionId=1, Overflow=3),
        ("s", ErrorCode.UNSUPPORTED),
    ),
    "answer to a query that was never asked": (
        v2(ref.PUBLISH, TaskId="p", Subject="x", QueryTaskId="never"),
        ("p", ErrorCode.UNKNOWN_QUERY),
    ),
    "failure of a query that was never asked": (
        ref.encode(ref.EVBUS_2, ref.ERROR, {"TaskId": "never"}),
        "errors.unknown_query",
    ),
    "cancelling what was never asked": (
        ref.encode(ref.EVBUS_2, ref.CANCEL_QUERY, {"TaskId": "never"}),
        "errors.unknown_query",
    ),
    "query with a blank id": (v2(ref.QUERY, TaskId=" ", Subject="x"), (" ", ErrorCode.MALFORMED)),
    "query that nobody can answer": (v2(ref.QUERY, TaskId="q", Subject="x"), ("q", ErrorCode.NO_RESPONDERS)),
}


def count(server: EventServer, path: str) -> int:
    found: Any = server.stats()
    for name in path.split("."):
        found = found.get(name, {}) if isinstance(found, dict) else found
    return found if isinstance(found, int) else 0


def counter_of(outcome: tuple[str, ErrorCode] | CloseReason | str) -> str:
    """Where an outcome is counted."""
    if isinstance(outcome, CloseReason):
        return f"closed.{outcome.name.lower()}"
    return outcome if isinstance(outcome, str) else f"errors.{outcome[1].name.lower()}"


@pytest.mark.parametrize("name", FIRST)
def test_bad_first_bytes(shared: EventServer, name: str) -> None:
    data, outcome = FIRST[name]
    counter = counter_of(outcome)
    before = count(shared, counter)
    with connect(shared, ref.H23_199, handshake=False) as client:
        client.send_bytes(data)
        if isinstance(outcome, CloseReason):
            assert client.read_end() == []
        else:
            wait_for(lambda: count(shared, counter) > before)
            client.handshake()  # and the first packet that comes back is the answer to this
        assert count(shared, counter) == before + 1
        exchange(shared)
    wait_for(lambda: shared.stats()["connections"] == 0)


@pytest.mark.parametrize("name", LATER)
def test_bad_input(shared: EventServer, name: str) -> None:
    data, outcome = LATER[name]
    counter = counter_of(outcome)
    before = count(shared, counter)
    with connect(shared) as client:
        client.send_bytes(data)
        if isinstance(outcome, CloseReason):
            (told,) = client.read_end()
            assert (told.object_id, told.fields["Reason"]) == (ObjectId.GO_AWAY, outcome)
        else:
            if isinstance(outcome, tuple):
                task_id, code = outcome
                packet = client.read()
                assert (packet.object_id, packet.system_id) == (ObjectId.ERROR, 0)
                assert (packet.fields["TaskId"], packet.fields["Code"]) == (task_id, code)
                assert packet.fields["Text"]
            assert client.heartbeat(7) == []  # nothing more, and the connection goes on
        assert count(shared, counter) == before + 1
        exchange(shared)
    wait_for(lambda: shared.stats()["connections"] == 0)
    assert shared.stats()["subscriptions"] == 0


@pytest.mark.parametrize("name", [name for name in LATER if not isinstance(LATER[name][1], CloseReason)])
def test_bad_input_of_a_version_1_peer(shared: EventServer, name: str) -> None:
    """It is told what version 1 has words for, and its connection goes on."""
    data, outcome = LATER[name]
    if data[14] == 2 or int.from_bytes(data[12:14], "little") >= 1000:
        outcome = "unknown_packets"  # for a peer that did not announce itself it does not exist
    counter = counter_of(outcome)
    before = count(shared, counter)
    with connect(shared, ref.H23_199) as client:
        client.send_bytes(data)
        if isinstance(outcome, tuple) and outcome[0] and outcome[1] != ErrorCode.MALFORMED:
            packet = client.read()
            assert (packet.object_id, packet.fields["TaskId"]) == (ObjectId.RESPONSE, outcome[0])
            assert packet.fields["Status"] == ref.FAIL
            assert packet.fields["Message"]
        assert client.heartbeat(7) == []
        assert count(shared, counter) > before
        exchange(shared)


def test_the_same_handshake_again_and_both_layouts_at_once(shared: EventServer) -> None:
    with connect(shared) as client:
        first = client.facts
        for _ in range(2):
            client.handshake("again")
            assert client.facts == first
    with connect(shared, ref.H23_199, handshake=False) as client:
        body = string("h") + b"\0\0" + string(CLIENT_FACTS)
        client.send_bytes(frame(1, body) + ref.encode(ref.H22, ref.HANDSHAKE, {"TaskId": "h"}))
        assert client.read().fields["Status"] == ref.SUCCESS
        client.dialect = ref.EVBUS_2
        assert client.heartbeat() == []


@pytest.mark.parametrize("how", ["close", "reset", "half a packet"])
def test_peers_that_go_in_the_middle(shared: EventServer, how: str) -> None:
    with connect(shared) as asker:
        gone = connect(shared)
        gone.send(ref.SUBSCRIBE, {"TaskId": "s", "Subject": "q", "SubscriptionId": 1, "Role": 1}, version=2)
        gone.read()
        asker.send(ref.QUERY, {"TaskId": "q", "Subject": "q"}, version=2)
        gone.read()
        if how == "half a packet":
            gone.send_bytes(v2(ref.PUBLISH, Subject="q", QueryTaskId="q")[:-3])
        (gone.reset if how == "reset" else gone.close)()
        ended = asker.read()
        assert (ended.object_id, ended.fields["Reason"]) == (ObjectId.QUERY_END, ref.LOST)
    wait_for(lambda: shared.stats()["connections"] == 0)
    stats = shared.stats()
    assert (stats["subscriptions"], stats["queries_pending"], stats["ring_bytes"]) == (0, 0, 0)
