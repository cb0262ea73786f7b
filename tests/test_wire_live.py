"""A live server, spoken to in bytes: both header layouts, every dialect, and the examples of `docs/protocol.md`."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
from helpers_raw import Example, RawClient, doc_examples
from helpers_server import HOST, connect

from evbus import wire
from evbus.server import EventServer
from evbus.wire import Dialect

EXAMPLES = doc_examples()


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


def read_bytes(client: RawClient) -> bytes:
    """The next packet, as it comes over the wire."""
    client.sock.settimeout(client.timeout)
    data = b""
    while len(data) < 4 or len(data) < struct.unpack_from("<I", data)[0]:
        wanted = (4 if len(data) < 4 else struct.unpack_from("<I", data)[0]) - len(data)
        piece = client.sock.recv(wanted)
        assert piece, f"the server closed the connection after {data!r}"
        data += piece
    return data


def settle(client: RawClient, count: int = 1) -> list[ref.Packet]:
    """The next packets."""
    return [client.read() for _ in range(count)]


# --- the examples of the document


def assert_like(data: bytes, example: Example) -> None:
    """Byte for byte, but for what the example cannot know: the server's clock, and the ids that it makes up."""
    layout, expected = ref.layout_of(example.dialect), example.data
    (frame,) = [ref.Decoder(layout)]
    frame.feed(data)
    got = frame.next()
    assert isinstance(got, ref.Frame), data
    at = slice(layout - 8, layout)
    clock_ms = struct.unpack("<q", data[at])[0]
    caused = got.object_id == ref.DELIVERY
    if not caused:
        assert abs(clock_ms - time.time() * 1000) < 60_000
        expected = expected[: at.start] + data[at] + expected[at.stop :]
    if example.dialect != ref.EVBUS_2:
        now_ms = int(time.time() * 1000)
        epoch_ms = wire.TICKS_EPOCH_MS if example.dialect == ref.H23_199 else wire.FILETIME_EPOCH_MS
        assert abs(got.system_id // 10_000 - epoch_ms - now_ms) < 60_000
        expected = expected[:4] + data[4:12] + expected[12:]
    if example.name == "v1-22-query-delivery":
        mine, theirs = (ref.packets(each, ref.H22)[0].fields["TaskId"].encode() for each in (data, expected))
        expected = expected.replace(theirs, mine)
    assert data == expected, example.name


def speak(clients: dict[str, RawClient], names: str) -> None:
    """Words are connection:example. What a client says is sent as printed, what the server says must be as printed."""
    for word in names.split():
        who, _, name = word.partition(":")
        example = EXAMPLES[name]
        if example.sender == "client":
            clients[who].send_bytes(example.data)
        else:
            assert_like(read_bytes(clients[who]), example)


@pytest.mark.parametrize("tag", ["v1-199", "v1-22", "v1-255"])
def test_version_1_of_the_document(tag: str) -> None:
    names = [name for name in EXAMPLES if name.startswith(tag + "-")]
    assert len(names) >= 4
    with EventServer(port=0) as running, RawClient(HOST, running.port, EXAMPLES[names[0]].dialect) as client:
        speak({"a": client}, " ".join(f"a:{name}" for name in names))
        assert client.heartbeat() == []
        errors = running.stats()["errors"]
        assert errors == {}


def test_version_2_of_the_document() -> None:
    with EventServer(port=0) as running, contextlib.ExitStack() as stack:
        for _ in range(16):  # the document's connections are the 17th and the 18th
            connect(running).close()
        clients = {name: stack.enter_context(RawClient(HOST, running.port)) for name in "ab"}
        speak(clients, "a:handshake-v2 a:handshake-v2-answer")
        clients["b"].handshake()
        speak(clients, "a:subscribe-v2 a:subscribe-v2-answer a:subscribe-group-v2 a:subscribe-responder-v2")
        assert [packet.object_id for packet in settle(clients["a"], 2)] == [ref.RESPONSE] * 2
        speak(clients, "a:unsubscribe-v2")
        assert settle(clients["a"])[0].fields["TaskId"] == "s-4"
        speak(clients, "b:publish-v2 a:delivery-v2 b:receipt b:publish-v2-plain")
        assert settle(clients["a"])[0].fields["Buffer"] == b"Hi"
        speak(clients, "b:query-v2 a:query-delivery-v2 a:answer-v2 b:answer-delivery-v2")
        speak(clients, "b:query-v2 a:query-delivery-v2 a:failure b:failure-to-asker")
        speak(clients, "b:query-v2 a:query-delivery-v2 b:cancel-query b:query-v2-nobody")
        told = clients["b"].read()
        assert told.fields | {"Text": ""} == EXAMPLES["error"].packet.fields | {"Text": ""}  # all texts are free
        speak(clients, "b:heartbeat b:heartbeat-echo b:credit")
        speak(clients, "b:query-v2 a:query-delivery-v2")
        clients["a"].close()
        speak(clients, "b:query-end")
        assert clients["b"].heartbeat() == []
        stats = running.stats()
        assert (stats["unknown_packets"], stats["errors"]) == (0, {"no_responders": 1})
        running.stop()
        (last,) = clients["b"].read_end()
        example = EXAMPLES["go-away"].packet
        assert (last.object_id, last.fields["Reason"]) == (example.object_id, example.fields["Reason"])


# --- every dialect


@pytest.mark.parametrize("dialect", ref.DIALECTS)
def test_conversation(server: EventServer, dialect: str) -> None:
    """Handshake, subscribe, publish, query and heartbeat of one peer, on its own subject."""
    subject = f"own.{dialect}"
    with connect(server, dialect) as client:
        client.send(ref.SUBSCRIBE, TaskId="s", Subject=subject)
        assert client.read().fields == {"TaskId": "s", "Status": 1, "Message": ""}
        client.send(ref.PUBLISH, TaskId="p", Subject=subject, Buffer=b"\x05hello")
        event, acknowledged = settle(client, 2)
        assert (event.object_id, event.fields["TaskId"], event.fields["Buffer"]) == (ref.DELIVERY, "p", b"\x05hello")
        assert acknowledged.fields == {"TaskId": "p", "Status": 1, "Message": ""}
        client.send(ref.PUBLISH, Subject=subject, Buffer=b"quiet")
        assert client.read().fields["Buffer"] == b"quiet"
        assert client.heartbeat() == []  # and no acknowledgement
        client.send(ref.QUERY, TaskId="q", Subject=subject, Buffer=b"?")
        asked = client.read()
        assert asked.fields["Buffer"] == b"?"
        assert (asked.fields["TaskId"] == "q") is (dialect not in ref.OLD)
        answer: dict[str, Any] = {"TaskId": "a", "Subject": subject, "Buffer": b"!"}
        if dialect not in ref.OLD:
            answer["QueryTaskId"] = "q"
        client.send(ref.PUBLISH, answer)
        answered = client.read()
        assert (answered.fields["TaskId"], answered.fields["Buffer"]) == ("q", b"!")
        if dialect not in ref.OLD:
            assert client.read().fields["TaskId"] == "a"
        client.send(ref.QUERY, TaskId="q2", Subject="nobody.is.here")
        failed = client.read()
        assert failed.fields["TaskId"] == "q2"
        assert failed.object_id == (ref.ERROR if dialect == ref.EVBUS_2 else ref.RESPONSE)
        client.send(ref.UNSUBSCRIBE, TaskId="u", Subject=subject)
        client.send(ref.PUBLISH, Subject=subject)
        assert [packet.fields["TaskId"] for packet in client.heartbeat()] == ["u"]


@pytest.mark.parametrize(("asker", "responder"), list(itertools.product(ref.DIALECTS, repeat=2)))
def test_events_and_queries_between_dialects(server: EventServer, asker: str, responder: str) -> None:
    subject = f"pair.{asker}.{responder}"
    with connect(server, asker) as one, connect(server, responder) as two:
        two.send(ref.SUBSCRIBE, TaskId="s", Subject=subject)
        two.read()
        one.send(ref.PUBLISH, TaskId="p", Subject=subject, Buffer=b"event")
        assert one.read().fields["TaskId"] == "p"
        event = two.read()
        assert (event.fields["TaskId"], event.fields["Subject"], event.fields["Buffer"]) == ("p", subject, b"event")
        assert not event.fields.get("IsQueryRequest")
        one.send(ref.QUERY, TaskId="q", Subject=subject, Buffer=b"question")
        asked = two.read()
        assert asked.fields["Buffer"] == b"question"
        # The old generation answers by publishing on the subject; the others name the query.
        number = {} if responder in ref.OLD else {"QueryTaskId": asked.fields["TaskId"]}
        two.send(ref.PUBLISH, {"TaskId": "a", "Subject": subject, "Buffer": b"answer"} | number)
        answered = one.read()
        assert (answered.object_id, answered.fields["TaskId"]) == (ref.DELIVERY, "q")
        assert answered.fields["Buffer"] == b"answer"
        assert not answered.fields.get("IsQueryRequest")
        after = two.heartbeat()
        assert [packet.fields["TaskId"] for packet in after] == ([] if responder in ref.OLD else ["a"])
        # It was not broadcast, and the next publication is an event again.
        two.send(ref.PUBLISH, Subject=subject, Buffer=b"event again")
        assert [packet.fields["Buffer"] for packet in two.heartbeat()] == [b"event again"]
        assert one.heartbeat() == []


@pytest.mark.parametrize("dialect", ref.DIALECTS)
def test_byte_by_byte(server: EventServer, dialect: str) -> None:
    """Every packet of a short conversation in pieces of one byte, each in a segment of its own."""
    with RawClient(HOST, server.port, dialect) as client:
        fields = {"TaskId": "h"} | ({"Announcement": 'evbus/1 {"versions":[2,2]}'} if dialect == ref.EVBUS_2 else {})
        system_id = 5 if dialect in ref.OLD else 0
        stream = ref.encode(dialect, ref.HANDSHAKE, fields, system_id=system_id)
        stream += ref.encode(dialect, ref.SUBSCRIBE, {"TaskId": "s", "Subject": "slow"})
        stream += ref.encode(dialect, ref.PUBLISH, {"TaskId": "p", "Subject": "slow", "Buffer": b"x" * 50})
        for at in range(len(stream)):
            client.send_bytes(stream[at : at + 1])
        assert [packet.fields["TaskId"] for packet in settle(client, 4)] == ["h", "s", "p", "p"]
        assert client.heartbeat() == []


@pytest.mark.parametrize("dialect", ref.DIALECTS)
def test_ten_thousand_packets_at_once_and_a_large_one(server: EventServer, dialect: str) -> None:
    subject = f"many.{dialect}"
    with connect(server, dialect) as source, connect(server, dialect) as receiver:
        receiver.send(ref.SUBSCRIBE, TaskId="s", Subject=subject)
        receiver.read()
        packets = [
            ref.encode(dialect, ref.PUBLISH, {"Subject": subject, "Buffer": struct.pack("<I", number)})
            for number in range(10_000)
        ]
        large = ref.encode(dialect, ref.PUBLISH, {"Subject": subject, "Buffer": bytes(1 << 20)})
        source.send_bytes(b"".join(packets[:5000]) + large + b"".join(packets[5000:]))
        got = [packet.fields["Buffer"] for packet in settle(receiver, 10_001)]
        assert len(got.pop(5000)) == 1 << 20
        assert got == [struct.pack("<I", number) for number in range(10_000)]
        assert source.heartbeat() == []


def test_the_second_witness() -> None:
    """A one-string handshake with an unusual SystemId; the heartbeat tells what it is."""
    with EventServer(port=0) as server, RawClient(HOST, server.port, ref.H23_199) as client:
        client.send_bytes(ref.encode(ref.H23_199, ref.HANDSHAKE, {"TaskId": "h"}, system_id=7))
        assert client.read().fields["Status"] == 1
        core = server._core
        assert core is not None
        (peer,) = core.broker.peers.values()
        assert peer.link.dialect == Dialect.H23_255
        assert client.heartbeat() == []
        assert peer.link.dialect == Dialect.H23_199
        client.send(ref.SUBSCRIBE, TaskId="s", Subject="w")
        client.send(ref.PUBLISH, {"TaskId": "p", "Subject": "w"})
        assert [packet.fields.get("IsQueryRequest") for packet in settle(client, 3)] == [None, False, None]
