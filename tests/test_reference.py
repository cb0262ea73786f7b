"""The oracle itself: against the golden vectors, against the protocol document, and against plain expectations."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import reference as ref
from helpers_bus import brief
from helpers_raw import CLIENT_FACTS, PROTOCOL_MD, Example, RawClient, doc_examples, render
from hypothesis import given
from hypothesis import strategies as st

from evbus import wire

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "codewf.json").read_text(encoding="utf-8"))
SPOKEN = {"h22": ref.H22, "h23-255": ref.H23_255, "h23-199": ref.H23_199}
SPOKEN |= {"h23-auth": ref.H23_199, "h23-client": ref.H23_199}
MESSAGES = [message for message in VECTORS["messages"] if message["dialect"] in SPOKEN]
MALFORMED = VECTORS["malformed"]
EXAMPLES = doc_examples()


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(case.get(key) or "") for key in ("dialect", "layout", "message", "name", "case"))


def value_of(kind: str, value: Any) -> Any:
    """A field of a vector as the codec gives it."""
    if kind == "bytes":
        return bytes.fromhex(value or "")
    return value or "" if kind == "string" else value


# --- tables


def test_tables_are_those_of_wire() -> None:
    kinds = {"string": "s", "bytes": "b", "u8": "B", "bool": "?", "i32": "i", "i64": "q"}
    for (number, group), fields in wire.BODIES_V1.items():
        expected = tuple((name, kinds[kind]) for name, kind in fields)
        for dialect in ref.DIALECTS:
            if group == "*" or (group == "22/255") == (dialect in ref.OLD):
                assert ref.schema(dialect, number, 1) == expected, (number, dialect)
    for number, fields in wire.BODIES_V2.items():
        version = 1 if number >= 1000 else 2
        assert ref.schema(ref.EVBUS_2, number, version) == tuple((name, kinds[kind]) for name, kind in fields)
        assert ref.schema(ref.H23_199, number, version) is None
    assert {**ref.VERSION_2, **ref.EXTENSIONS}.keys() == wire.BODIES_V2.keys()
    assert {code.name: code.value for code in wire.ErrorCode} == ref.ERRORS
    assert {reason.name: reason.value for reason in wire.CloseReason} == ref.CLOSES
    flags = [wire.Flag.CONFIRM, wire.Flag.NO_ECHO, wire.Flag.ALL, wire.Flag.QUERY, wire.Flag.ANSWER]
    assert [int(flag) for flag in flags] == [ref.CONFIRM, ref.NO_ECHO, ref.ALL, ref.IS_QUERY, ref.IS_ANSWER]
    assert tuple(wire.EndReason)[:3] == (ref.COMPLETE, ref.LOST, ref.DEADLINE)
    assert (ref.SUCCESS, ref.FAIL, ref.RESPONDER, ref.BLOCK) == (
        wire.Status.SUCCESS,
        wire.Status.FAIL,
        wire.Role.RESPONDER,
        wire.Overflow.BLOCK,
    )
    sizes = {
        "TaskId": wire.MAX_TASK_ID_BYTES,
        "QueryTaskId": wire.MAX_TASK_ID_BYTES,
        "AuthenticationToken": wire.MAX_TOKEN_BYTES,
        "ClientId": wire.MAX_CLIENT_ID_BYTES,
        "Group": wire.MAX_GROUP_BYTES,
        "Headers": wire.MAX_HEADERS_BYTES,
    }
    assert sizes == ref.FIELD_LIMITS
    assert ref.ANNOUNCEMENT == wire.ANNOUNCEMENT_PREFIX
    assert (ref.Limits().overhead, wire.MAX_SUBJECT_BYTES, wire.MAX_SUBJECT_TOKENS) == (
        wire.PACKET_OVERHEAD_BYTES,
        256,
        32,
    )


def test_the_document_lists_every_code_reason_and_object() -> None:
    document = PROTOCOL_MD.read_text(encoding="utf-8")
    rows = {(int(number), name) for number, name in re.findall(r"^\| (\d+) \| ([A-Z_]{4,}) \|", document, re.MULTILINE)}
    assert rows == {(value, name) for table in (ref.ERRORS, ref.CLOSES) for name, value in table.items()}
    for number in wire.ObjectId:
        assert re.search(rf"^\| {int(number)} ", document, re.MULTILINE), number


# --- the golden vectors


@pytest.mark.parametrize("case", MESSAGES, ids=name_of)
def test_vector_message(case: dict[str, Any]) -> None:
    dialect, data = SPOKEN[case["dialect"]], bytes.fromhex(case["hex"])
    fields = {name: value_of(kind, value) for name, kind, value in case["fields"]}
    system_id = int(case["system_id"])
    (packet,) = ref.packets(data, dialect)
    assert packet == ref.Packet(case["object_id"], case["object_version"], fields, system_id, case["unix_ms"])
    written = {name: None if value is None else fields[name] for name, _, value in case["fields"]}
    assert ref.encode(dialect, case["object_id"], written, system_id=system_id, time=case["unix_ms"]) == data
    assert len(data) == case["size"]
    # In pieces, and with the next packet right behind.
    decoder = ref.Decoder(ref.layout_of(dialect))
    for index in range(len(data)):
        assert decoder.next() is None
        decoder.feed(data[index : index + 1])
    decoder.feed(data[:5])
    frame = decoder.next()
    assert isinstance(frame, ref.Frame)
    assert ref.decode(frame, dialect) == packet
    assert (decoder.next(), bytes(decoder.buffer)) == (None, data[:5])


@pytest.mark.parametrize("case", [c for c in MALFORMED if c["kind"] == "frame"], ids=name_of)
def test_vector_malformed_frame(case: dict[str, Any]) -> None:
    layout, dialect = (22, ref.H22) if case["layout"] == "h22" else (23, ref.H23_199)
    assert ref.verdict(bytes.fromhex(case["hex"]), layout, dialect) == case["advice"]


@pytest.mark.parametrize("case", [c for c in MALFORMED if c["kind"] == "body"], ids=name_of)
def test_vector_malformed_body(case: dict[str, Any]) -> None:
    assert ref.verdict(bytes.fromhex(case["hex"]), 23, SPOKEN[case["dialect"]]) == case["advice"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("trailing bytes", "Subject", "s"),
        ("length prefix not minimal", "Subject", "s"),
        ("length prefix of 5 bytes, zero", "Subject", ""),
        ("invalid UTF-8, lone continuation", "Subject", "a\ufffdb"),
        ("invalid UTF-8, cut sequence", "Subject", "a\ufffd"),
        ("invalid UTF-8, encoded surrogate", "Subject", "\ufffd\ufffd\ufffd"),
        ("empty Subject", "Subject", ""),
        ("QueryTaskId of blanks", "QueryTaskId", "  "),
        ("flag 2", "IsQueryRequest", True),
        ("status 9", "Status", 9),
    ],
)
def test_vector_odd_but_accepted(name: str, field: str, value: Any) -> None:
    (case,) = [c for c in MALFORMED if c["name"] == name and c["kind"] == "body"]
    (packet,) = ref.packets(bytes.fromhex(case["hex"]), ref.H23_199)
    found = packet.fields[field]
    assert (ref.text(found) if isinstance(found, str) else found) == value


@pytest.mark.parametrize("case", VECTORS["detection"], ids=lambda case: case["role"] + case.get("case", ""))
def test_vector_detection(case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["hex"])
    if case["role"] == "client reads the answer":
        (packet,) = ref.packets(data, case["layout"] if case["layout"] == "h22" else ref.H23_199)
        assert packet.object_id == ref.RESPONSE
        assert packet.system_id == int(case["system_id"])
        return
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    if case["role"].startswith("client sends both"):
        broker.feed(conn, data)
        (out,) = broker.take(conn)
        assert out.packet.fields["TaskId"] == case["same_task_id"]
        assert broker.counts == {"unknown": 1}
        return
    for index in range(len(data)):
        broker.feed(conn, data[index : index + 1])
    if case["layout"] == "refuse":
        # A PackSize between 4 KiB and 64 MiB may be a packet, but no handshake.
        late = 4096 < case.get("pack_size", 0) <= ref.MAX_PACKET
        assert broker.closed == {conn: ref.CLOSES["PACKET_TOO_LARGE" if late else "NOT_EVENT_BUS"]}
    elif case["layout"] is None:
        assert (broker.closed, broker.conns[conn].decoder.layout) == ({}, None)
    elif case["dialect"] in SPOKEN:
        state = broker.conns[conn]
        assert (state.decoder.layout, state.dialect) == (int(case["layout"][1:]), SPOKEN[case["dialect"]])
        assert len(broker.take(conn)) == 1
    else:  # the int dialects
        assert broker.closed == {conn: ref.CLOSES["UNSUPPORTED_DIALECT"]}


# --- the document


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_of_the_document(example: Example) -> None:
    assert render(example.data, example.dialect) == example.block
    packet = example.packet
    assert packet.system_id is not None
    assert packet.time is not None
    again = ref.encode(
        example.dialect,
        packet.object_id,
        packet.fields,
        version=packet.version,
        system_id=packet.system_id,
        time=packet.time,
    )
    assert again == example.data


def test_the_document_has_every_object() -> None:
    shown = {(example.packet.object_id, example.packet.version) for example in EXAMPLES.values()}
    assert shown == {(number, 1) for number in wire.ObjectId} | {(number, 2) for number in ref.VERSION_2}


def play(broker: ref.ReferenceBroker, conns: dict[str, int], names: str) -> None:
    """Feed the client's examples and hold what comes out against the server's. A word is connection:example."""
    for word in names.split():
        who, _, name = word.partition(":")
        example = EXAMPLES[name]
        if example.sender == "client":
            broker.feed(conns[who], example.data)
            continue
        out = broker.take(conns[who])
        assert ref.diff(out[:1], [example.packet], times=True) is None, name
        broker._outs[conns[who]] = out[1:]


@pytest.mark.parametrize("tag", ["v1-199", "v1-22"])
def test_version_1_conversation_of_the_document(tag: str) -> None:
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    names = [name for name in EXAMPLES if name.startswith(tag)]
    assert len(names) >= 15
    play(broker, {"a": conn}, " ".join("a:" + name for name in names))
    assert broker.take(conn) == []


def test_version_2_conversation_of_the_document() -> None:
    broker = ref.ReferenceBroker()
    broker._numbers = 16
    conns = {"a": broker.connect(), "b": broker.connect()}
    play(broker, conns, "a:handshake-v2 a:handshake-v2-answer b:handshake-v2 b:handshake-v2-answer")
    play(broker, conns, "a:subscribe-v2 a:subscribe-v2-answer a:subscribe-group-v2 a:subscribe-responder-v2")
    assert len(broker.take(conns["a"])) == 2
    play(broker, conns, "a:unsubscribe-v2")
    assert len(broker.take(conns["a"])) == 1
    play(broker, conns, "b:publish-v2 a:delivery-v2 b:receipt b:publish-v2-plain")
    assert (len(broker.take(conns["a"])), broker.take(conns["b"])) == (1, [])
    play(broker, conns, "b:query-v2 a:query-delivery-v2 a:answer-v2 b:answer-delivery-v2")
    play(broker, conns, "b:query-v2 a:query-delivery-v2 a:failure b:failure-to-asker")
    play(broker, conns, "b:query-v2 a:query-delivery-v2 b:cancel-query")
    play(
        broker, conns, "b:query-v2-nobody b:error b:heartbeat b:heartbeat-echo b:credit b:query-v2 a:query-delivery-v2"
    )
    broker.close(conns["a"])
    play(broker, conns, "b:query-end")
    assert (broker.take(conns["b"]), broker.counts) == ([], {"NO_RESPONDERS": 1})


# --- the broker


class Bus:
    """A broker, and packets by name instead of by bytes."""

    def __init__(self, chooser: ref.Chooser | None = None, limits: ref.Limits | None = None) -> None:
        self.broker = ref.ReferenceBroker(limits, chooser)
        self.dialects: dict[int, str] = {}

    def open(self, dialect: str = ref.EVBUS_2) -> int:
        conn = self.broker.connect()
        self.dialects[conn] = dialect
        fields: dict[str, Any] = {"TaskId": "h"}
        if dialect == ref.EVBUS_2:
            fields["Announcement"] = CLIENT_FACTS
        self.send(conn, ref.HANDSHAKE, system_id=1 if dialect in ref.OLD else 0, **fields)
        assert len(self.take(conn)) == 1
        assert self.broker.conns[conn].dialect == dialect
        return conn

    def send(self, conn: int, object_id: int, version: int = 1, system_id: int = 0, **fields: Any) -> None:
        data = ref.encode(self.dialects[conn], object_id, fields, version=version, system_id=system_id, time=5)
        self.broker.feed(conn, data)

    def subscribe(self, conn: int, subject: str, number: int = 0, role: int = 0, group: str = "") -> None:
        if number:
            self.send(conn, ref.SUBSCRIBE, 2, Subject=subject, SubscriptionId=number, Role=role, Group=group)
        else:
            self.send(conn, ref.SUBSCRIBE, Subject=subject)

    def take(self, conn: int) -> list[tuple[Any, ...]]:
        """Object and its telling fields."""
        return [brief(out.packet) for out in self.broker.take(conn)]


def test_one_copy_per_connection_and_one_per_group() -> None:
    bus = Bus()
    a, b, c = bus.open(), bus.open(ref.H23_199), bus.open(ref.H22)
    for conn in (a, b, c):
        bus.subscribe(conn, "x.*")
        bus.subscribe(conn, "x.>")
    bus.subscribe(a, "x.y", 7, group="g")
    bus.send(b, ref.PUBLISH, TaskId="t", Subject="x.y", Buffer=b"1")
    assert bus.take(a) == [(5, "t", 0, 0), (5, "t", 0, 7)]
    assert bus.take(b) == [(5, "t", False), (254, "t", 1)]
    assert bus.take(c) == [(5, "t")]
    bus.send(a, ref.PUBLISH, 2, TaskId="u", Subject="x.y", Flags=ref.CONFIRM | ref.NO_ECHO)
    assert bus.take(a) == [(1003, "u", 2)]
    bus.send(a, ref.PUBLISH, 2, TaskId="", Subject="x.z", Flags=ref.CONFIRM)
    assert bus.take(a) == [(5, "", 0, 0)]


def test_group_takes_turns_and_says_among_whom() -> None:
    bus = Bus()
    a, b = bus.open(), bus.open()
    bus.subscribe(a, "x", 1, group="g")
    bus.subscribe(b, ">", 2, group="g")
    for _ in range(4):
        bus.send(a, ref.PUBLISH, Subject="x")
    outs = bus.broker.take(a) + bus.broker.take(b)
    assert [out.packet.fields["SubscriptionId"] for out in outs] == [1, 1, 2, 2]
    assert {out.one_of for out in outs} == {((a, 1), (b, 2))}


def test_subscribe_twice_and_unsubscribe() -> None:
    bus = Bus()
    a, b = bus.open(), bus.open(ref.H23_199)
    for version, more in ((1, {}), (2, {"SubscriptionId": 3})):
        for _ in range(2):
            bus.send(a, ref.SUBSCRIBE, version, TaskId="s", Subject="x", **more)
            assert bus.take(a) == [(254, "s", 1)]
    bus.send(a, ref.SUBSCRIBE, 2, TaskId="s", Subject="y", SubscriptionId=3)
    bus.send(a, ref.SUBSCRIBE, 2, TaskId="s", Subject="y", SubscriptionId=0)
    for more in ({"Role": 2}, {"Role": 1, "Overflow": 1}, {"Role": 1, "Overflow": ref.BLOCK}, {"Overflow": 3}):
        bus.send(a, ref.SUBSCRIBE, 2, TaskId="s", Subject="y", SubscriptionId=4, **more)
    codes = ("DUPLICATE_ID", "MALFORMED", *["UNSUPPORTED"] * 4)
    assert [out[2] for out in bus.take(a)] == [ref.ERRORS[code] for code in codes]
    bus.send(a, ref.UNSUBSCRIBE, 2, TaskId="u", SubscriptionId=3)
    bus.send(a, ref.UNSUBSCRIBE, 2, TaskId="u", SubscriptionId=3)
    bus.send(a, ref.UNSUBSCRIBE, TaskId="u", Subject="x")
    assert bus.take(a) == [(254, "u", 1), (1000, "u", ref.ERRORS["UNKNOWN_SUBSCRIPTION"]), (254, "u", 1)]
    bus.send(b, ref.UNSUBSCRIBE, TaskId="u", Subject="never")
    bus.send(b, ref.PUBLISH, TaskId="p", Subject="x")
    assert (bus.take(a), bus.take(b)) == ([], [(254, "u", 1), (254, "p", 1)])


@pytest.mark.parametrize(
    ("subject", "publish", "subscribe"),
    [
        ("a", True, True),
        ("a b", True, True),
        ("ü.😀", True, True),
        ("x" * 256, True, True),
        ("x" * 257, False, False),
        (".".join("a" * 32), True, True),
        (".".join("a" * 33), False, False),
        ("", False, False),
        (".", False, False),
        ("a.", False, False),
        ("a..b", False, False),
        ("a\x1f", False, False),
        ("a\x7f", False, False),
        ("a\udc80", False, False),
        ("*", False, True),
        ("a.*.b", False, True),
        ("a.>", False, True),
        (">", False, True),
        (">.a", False, False),
        ("a*", False, False),
        ("a.b>", False, False),
        ("**", False, False),
    ],
)
def test_subject(subject: str, publish: bool, subscribe: bool) -> None:
    assert (ref.valid_subject(subject, pattern=False), ref.valid_subject(subject, pattern=True)) == (publish, subscribe)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("mail.new", "mail.new", "mail mail.new.x mail.newer"),
        ("mail.*", "mail.new", "mail mail.new.x"),
        ("*.new", "mail.new", "new mail.new.x"),
        ("mail.>", "mail.new mail.new.x", "mail"),
        ("*.*.>", "a.b.c a.b.c.d", "a.b"),
        (">", "mail a.b.c", ""),
    ],
)
def test_match(pattern: str, yes: str, no: str) -> None:
    for subjects, expected in ((yes, True), (no, False)):
        for subject in subjects.split():
            assert ref.matches(pattern.split("."), subject.split(".")) is expected, subject


def test_bad_packets_are_told_to_announced_peers_only() -> None:
    bus = Bus(limits=ref.Limits(payload=10))
    a, b = bus.open(), bus.open(ref.H23_199)
    for conn in (a, b):
        for task_id in ("t", ""):
            bus.send(conn, ref.PUBLISH, TaskId=task_id, Subject="a.*")
            bus.send(conn, ref.PUBLISH, TaskId=task_id, Subject="a", Buffer=b"x" * 11)
            bus.send(conn, ref.PUBLISH, TaskId=task_id, Subject="a", QueryTaskId="none")
            bus.broker.feed(conn, ref.encode_frame(23, ref.SUBSCRIBE, 1, ref.encode_string(task_id)))
        bus.send(conn, ref.QUERY, TaskId=" \t", Subject="a")
        bus.send(conn, ref.PUBLISH, TaskId="t" * 129, Subject="a")
    codes = [ref.ERRORS[name] for name in ("INVALID_SUBJECT", "PAYLOAD_TOO_LARGE", "UNKNOWN_QUERY", "MALFORMED")]
    told = [(1000, task_id, code) for task_id in ("t", "") for code in codes]
    assert bus.take(a) == [*told, (1000, " \t", 1), (1000, "", 1)]
    assert bus.take(b) == [(254, "t", 2), (254, "t", 2)]
    expected = {"INVALID_SUBJECT": 4, "PAYLOAD_TOO_LARGE": 4, "UNKNOWN_QUERY": 4, "MALFORMED": 8}
    assert bus.broker.counts == expected
    body = ref.encode_body(ref.EVBUS_2, ref.PUBLISH, 2, {"TaskId": "t", "Subject": "a"})
    bus.broker.feed(a, ref.encode_frame(23, ref.PUBLISH, 2, body + b"\0"))
    bus.broker.feed(b, ref.encode_frame(23, ref.PUBLISH, 2, body))
    bus.broker.feed(b, ref.encode_frame(23, ref.ERROR, 1, b""))
    assert (bus.take(a), bus.take(b), bus.broker.counts["unknown"]) == ([(1000, "t", 1)], [], 2)


def test_handshake() -> None:
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    broker.feed(conn, ref.encode_frame(23, ref.HANDSHAKE, 1, b""))
    broker.feed(conn, ref.encode(ref.H23_199, ref.HEARTBEAT, {"TaskId": 1}))
    broker.feed(conn, ref.encode(ref.H23_199, ref.HANDSHAKE, {"TaskId": "h"}) * 2)
    assert [brief(out.packet) for out in broker.take(conn)] == [(254, "h", 1)] * 2
    assert broker.counts == {"MALFORMED": 1, "early": 1}
    slow = broker.connect()
    broker.advance(5.0)
    assert broker.closed == {slow: ref.CLOSES["HANDSHAKE_TIMEOUT"]}
    large = broker.connect()
    broker.feed(large, b"\x01\x10\0\0")
    assert broker.closed[large] == ref.CLOSES["PACKET_TOO_LARGE"]


@pytest.mark.parametrize(
    ("size", "closed"),
    [
        (-1, "NOT_EVENT_BUS"),
        (0, "NOT_EVENT_BUS"),
        (21, "NOT_EVENT_BUS"),
        (22, None),
        (4096, None),
        (4097, "PACKET_TOO_LARGE"),
        (1 << 26, "PACKET_TOO_LARGE"),
        ((1 << 26) + 1, "NOT_EVENT_BUS"),
    ],
)
def test_first_size(size: int, closed: str | None) -> None:
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    broker.feed(conn, (size & 0xFFFFFFFF).to_bytes(4, "little"))
    assert broker.closed == ({} if closed is None else {conn: ref.CLOSES[closed]})
    ready = Bus()
    a = ready.open()
    ready.broker.feed(a, (size & 0xFFFFFFFF).to_bytes(4, "little"))
    later = "PROTOCOL_ERROR" if size < 23 else "PACKET_TOO_LARGE" if size > 1048576 + 65536 else None
    assert ready.broker.closed == ({} if later is None else {a: ref.CLOSES[later]})


@pytest.mark.parametrize(
    ("announcement", "dialect"),
    [
        (CLIENT_FACTS, ref.EVBUS_2),
        ('evbus/1 {"versions":[1,9]}', ref.EVBUS_2),
        ('evbus/1 {"versions":[3,4]}', None),
        ('evbus/1 {"versions":[2,1]}', ref.H23_199),
        ('evbus/1 {"versions":[2.0,2]}', ref.H23_199),
        ('evbus/1 {"versions":2}', ref.H23_199),
        ("evbus/1 {}", ref.H23_199),
        ("evbus/1 []", ref.H23_199),
        ("evbus/1 " + "[" * 3000, ref.H23_199),
        ("evbus/1 ", ref.H23_199),
        ("evbus/2 {}", ref.H23_199),
        ("", ref.H23_199),
    ],
)
def test_announcement(announcement: str, dialect: str | None) -> None:
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    broker.feed(conn, ref.encode(ref.H23_199, ref.HANDSHAKE, {"TaskId": "h", "Announcement": announcement}))
    (out,) = broker.take(conn)
    if dialect is None:
        assert brief(out.packet) == (254, "h", 2)
        assert broker.closed == {conn: ref.CLOSES["UNSUPPORTED_DIALECT"]}
    else:
        assert broker.conns[conn].dialect == dialect
        assert (out.packet.fields["Message"] == "") is (dialect == ref.H23_199)


def test_header_that_the_size_does_not_hold() -> None:
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    data = ref.encode_frame(23, ref.HANDSHAKE, 1, b"", size=22)
    broker.feed(conn, data[:13])
    assert broker.closed == {}
    broker.feed(conn, data[13:14])
    assert broker.closed == {conn: ref.CLOSES["PROTOCOL_ERROR"]}


def test_token() -> None:
    broker = ref.ReferenceBroker(token="secret")
    for token, status in (("secret", 1), ("wrong", 2), (None, 2)):
        conn = broker.connect()
        fields = {"TaskId": "h"} | ({} if token is None else {"AuthenticationToken": token})
        broker.feed(conn, ref.encode(ref.H23_199, ref.HANDSHAKE, fields))
        assert [brief(out.packet) for out in broker.take(conn)] == [(254, "h", status)]
        assert broker.closed.get(conn) == (None if status == 1 else ref.CLOSES["AUTH_FAILED"])


def test_counted_limits() -> None:
    bus = Bus(limits=ref.Limits(subscriptions=2, queries=1))
    a, b = bus.open(), bus.open(ref.H23_199)
    for conn in (a, b):
        for subject in ("x", "y", "z", "x", "a*"):
            bus.send(conn, ref.SUBSCRIBE, TaskId=subject, Subject=subject)
        for subject in ("x", "x", "*"):
            bus.send(conn, ref.QUERY, TaskId=f"q{conn}{subject}", Subject=subject)
            bus.send(conn, ref.QUERY, TaskId=f"r{conn}{subject}", Subject=subject)
    codes = [out[2] for out in bus.take(a) if out[0] == ref.ERROR]
    names = ("TOO_MANY_SUBSCRIPTIONS", "INVALID_SUBJECT", "TOO_MANY_QUERIES", "DUPLICATE_ID", "TOO_MANY_QUERIES")
    assert codes == [ref.ERRORS[name] for name in (*names, "INVALID_SUBJECT", "INVALID_SUBJECT")]
    failed = [out[1] for out in bus.take(b) if out[0] == ref.RESPONSE and out[2] == ref.FAIL]
    assert failed == ["z", "a*", "r2x", "q2x", "r2x", "q2*", "r2*"]


def test_silence_and_shutdown() -> None:
    bus = Bus()
    quick, old, alive = bus.open(), bus.open(ref.H22), bus.open()
    for _ in range(4):  # the announced heartbeat of these tests is 60 s
        bus.broker.advance(59.0)
        bus.send(alive, ref.HEARTBEAT, TaskId=3)
    assert bus.broker.closed == {quick: ref.CLOSES["STALE"], old: ref.CLOSES["STALE"]}
    bus.broker.shutdown()
    assert bus.take(alive) == [(199, 3)] * 4 + [(1001, ref.CLOSES["SERVER_SHUTDOWN"])]


def test_heartbeat_is_a_second_witness() -> None:
    bus = Bus()
    a = bus.open(ref.H23_199)
    bus.subscribe(a, "x")
    bus.send(a, ref.HEARTBEAT_OLD)
    bus.broker.feed(a, ref.encode(ref.H23_255, ref.PUBLISH, {"Subject": "x", "Buffer": b"1"}))
    assert [out.packet.fields for out in bus.broker.take(a)] == [{}, {"TaskId": "", "Subject": "x", "Buffer": b"1"}]


# --- queries


def test_one_responder_is_asked_and_only_it_may_answer() -> None:
    bus = Bus()
    asker, plain, one, two = (bus.open() for _ in range(4))
    bus.subscribe(plain, "q")
    bus.subscribe(one, "q", 1, ref.RESPONDER)
    bus.subscribe(two, ">", 2, ref.RESPONDER)
    bus.send(asker, ref.QUERY, 2, TaskId="a", Subject="q", DeadlineMs=90000)
    assert (bus.take(one), bus.take(two), bus.take(plain)) == ([(5, "a", 8, 1)], [], [])
    bus.send(asker, ref.QUERY, 2, TaskId="a", Subject="q")
    assert bus.take(asker) == [(1000, "a", ref.ERRORS["DUPLICATE_ID"])]
    for conn, subject in ((plain, "q"), (two, "q"), (one, "other")):
        bus.send(conn, ref.PUBLISH, 2, TaskId="p", Subject=subject, QueryTaskId="a")
        assert bus.take(conn) == [(1000, "p", ref.ERRORS["UNKNOWN_QUERY"])]
    bus.send(one, ref.PUBLISH, 2, TaskId="p", Subject="q", QueryTaskId="a")
    assert (bus.take(one), bus.take(asker)) == ([(254, "p", 1)], [(5, "a", 16, 0)])
    bus.send(one, ref.PUBLISH, 2, Subject="q", QueryTaskId="a")
    assert bus.take(one) == [(1000, "", ref.ERRORS["UNKNOWN_QUERY"])]
    assert bus.broker.queries == {}
    bus.send(one, ref.PUBLISH, Subject="q", QueryTaskId="  ")
    assert bus.take(plain) == [(5, "", 0, 0)]  # an ordinary event, and none for responders
    assert bus.take(two) == []


def test_plain_subscribers_are_all_asked_and_the_first_wins() -> None:
    bus = Bus()
    asker, new, old, two = bus.open(ref.H23_199), bus.open(ref.H23_199), bus.open(ref.H23_255), bus.open()
    for conn in (asker, new, old, two):
        bus.subscribe(conn, "q")
    bus.send(asker, ref.QUERY, TaskId="a", Subject="q")
    assert bus.take(asker) == [(5, "a", True)]
    assert bus.take(new) == [(5, "a", True)]
    (out,) = bus.broker.take(old)
    assert out.packet.fields["TaskId"] == "12345678-0000-0000-0000-00000000000a"
    assert out.packet.fields["TaskId"] != "a"
    assert bus.take(two) == [(5, "a", 8, 0)]
    bus.send(two, ref.ERROR, TaskId="a", Code=500, Subject="q")
    assert bus.take(asker) == []
    bus.send(old, ref.PUBLISH, TaskId="p", Subject="q", Buffer=b"!")
    assert (bus.take(old), bus.take(asker)) == ([], [(5, "a", False)])
    bus.send(new, ref.PUBLISH, TaskId="p", Subject="q", QueryTaskId="a")
    assert (bus.take(new), bus.take(asker)) == ([], [])


def test_taken_query_id_is_mapped_and_mapped_back() -> None:
    bus = Bus()
    one, two, responder = bus.open(), bus.open(), bus.open()
    bus.subscribe(responder, "q", 1, ref.RESPONDER)
    bus.send(one, ref.QUERY, TaskId="a", Subject="q")
    bus.send(two, ref.QUERY, TaskId="a", Subject="q")
    assert bus.take(responder) == [(5, "a", 8, 1), (5, "evbus-1", 8, 1)]
    bus.send(responder, ref.PUBLISH, Subject="q", QueryTaskId="evbus-1")
    assert (bus.take(one), bus.take(two)) == ([], [(5, "a", 16, 0)])
    bus.send(two, ref.CANCEL_QUERY, TaskId="a")
    assert list(bus.broker.queries) == ["a"]


def test_nobody_to_ask() -> None:
    bus = Bus()
    a, b = bus.open(), bus.open(ref.H22)
    for conn in (a, b):
        bus.send(conn, ref.QUERY, TaskId="q", Subject="x")
    assert (bus.take(a), bus.take(b)) == ([(1000, "q", ref.ERRORS["NO_RESPONDERS"])], [(254, "q", 2)])


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ("ok ok", [(5, "q", 16, 0), (5, "q", 16, 0), (1005, "q", ref.COMPLETE, 2)]),
        ("ok bad", [(5, "q", 16, 0), (1000, "q", 7), (1005, "q", ref.COMPLETE, 2)]),
        ("gone ok", [(1005, "q", ref.LOST, 0), (5, "q", 16, 0), (1005, "q", ref.LOST, 1)]),
        ("gone gone", [(1005, "q", ref.LOST, 0)] * 3),
        ("ok late", [(5, "q", 16, 0), (1005, "q", ref.DEADLINE, 1)]),
    ],
)
def test_query_all(replies: str, expected: list[tuple[Any, ...]]) -> None:
    bus = Bus()
    asker, one, two = bus.open(), bus.open(), bus.open()
    for conn in (one, two):
        bus.subscribe(conn, "q", 1, ref.RESPONDER)
        bus.subscribe(conn, ">", 2, ref.RESPONDER)
    bus.send(asker, ref.QUERY, 2, TaskId="q", Subject="q", Flags=ref.ALL, DeadlineMs=2000)
    assert (len(bus.take(one)), len(bus.take(two))) == (1, 1)
    for conn, reply in zip((one, two), replies.split(), strict=True):
        if reply == "ok":
            bus.send(conn, ref.PUBLISH, 2, Subject="q", QueryTaskId="q")
        elif reply == "bad":
            bus.send(conn, ref.ERROR, TaskId="q", Code=7)
        elif reply == "gone":
            bus.broker.close(conn)
    bus.broker.advance(1.999)
    if "late" in replies:
        assert bus.take(asker) == expected[:-1]
        expected = expected[-1:]
    bus.broker.advance(0.001)
    assert bus.take(asker) == expected
    assert bus.broker.queries == {}


def ask_groups(bus: Bus) -> list[list[ref.Out]]:
    """What three connections get when a query finds three groups, two of which have their only member on the second."""
    conns = [bus.open() for _ in range(3)]
    bus.subscribe(conns[1], "q", 1, group="g")
    bus.subscribe(conns[1], "*", 2, group="h")
    bus.subscribe(conns[2], "q", 3, group="i")
    bus.send(conns[0], ref.QUERY, 2, TaskId="a", Subject="q", Flags=ref.ALL)
    return [bus.broker.take(conn) for conn in conns]


def test_groups_are_asked_where_nobody_else_is() -> None:
    bus = Bus()
    outs = ask_groups(bus)
    assert [[brief(out.packet) for out in each] for each in outs] == [[], [(5, "a", 8, 1)], [(5, "a", 8, 3)]]
    assert outs[2][0].one_of == ((3, 3),)
    assert bus.broker.queries["a"].waiting == {2, 3}
    # An implementation that asks the second connection through its other subscription is followed.
    other = ref.Packet(ref.DELIVERY, 2, {**outs[1][0].packet.fields, "SubscriptionId": 2}, 1, 5)
    hello = ref.Packet(ref.RESPONSE, 1, {})
    actual = {1: [hello], 2: [hello, other], 3: [hello, outs[2][0].packet]}
    followed = ask_groups(Bus(ref.Follower(actual.__getitem__)))
    assert [ref.diff(out, actual[conn][1:], times=True) for conn, out in enumerate(followed, 1)] == [None] * 3


@pytest.mark.parametrize(("dialect", "told"), [(ref.EVBUS_2, (1000, "q", 500)), (ref.H22, (254, "q", 2))])
def test_failure_of_the_responder(dialect: str, told: tuple[Any, ...]) -> None:
    bus = Bus()
    asker, responder, other = bus.open(dialect), bus.open(), bus.open()
    bus.subscribe(responder, "q", 1, ref.RESPONDER)
    bus.send(asker, ref.QUERY, TaskId="q", Subject="q")
    bus.send(other, ref.ERROR, TaskId="q", Code=500)
    bus.send(other, ref.CANCEL_QUERY, TaskId="q")
    assert (bus.take(asker), bus.take(other), bus.broker.counts) == ([], [], {"UNKNOWN_QUERY": 2})
    bus.send(responder, ref.ERROR, TaskId="q", Code=500, Subject="q", Text="no")
    (out,) = bus.broker.take(asker)
    assert brief(out.packet) == told
    assert out.packet.system_id == (responder if dialect == ref.EVBUS_2 else None)
    if dialect == ref.EVBUS_2:
        assert (out.packet.fields["Subject"], out.packet.fields["Text"]) == ("q", "no")
    assert bus.broker.queries == {}


def test_query_ends_with_its_asker() -> None:
    bus = Bus()
    asker, responder = bus.open(), bus.open()
    bus.subscribe(responder, "q", 1, ref.RESPONDER)
    bus.send(asker, ref.QUERY, TaskId="q", Subject="q")
    bus.broker.close(asker)
    bus.send(responder, ref.PUBLISH, TaskId="p", Subject="q", QueryTaskId="q")
    assert bus.take(responder) == [(5, "q", 8, 1), (1000, "p", ref.ERRORS["UNKNOWN_QUERY"])]


@pytest.mark.parametrize(("dialect", "lost"), [(ref.EVBUS_2, (1005, "q", 1, 0)), (ref.H23_199, (254, "q", 2))])
def test_lost_responder_and_deadline(dialect: str, lost: tuple[Any, ...]) -> None:
    bus = Bus()
    asker, responder = bus.open(dialect), bus.open()
    bus.subscribe(responder, "q", 1, ref.RESPONDER)
    bus.send(asker, ref.QUERY, TaskId="q", Subject="q")
    bus.broker.advance(29.9)
    assert bus.take(asker) == []
    bus.broker.advance(0.1)
    assert bus.take(asker) == ([(1005, "q", ref.DEADLINE, 0)] if dialect == ref.EVBUS_2 else [])
    bus.send(asker, ref.QUERY, TaskId="q", Subject="q")
    bus.broker.close(responder)
    assert bus.take(asker) == [lost]


# --- comparing with an implementation


class Wild(ref.Chooser):
    """Any choice, and ids of its own making."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def choose(
        self, broker: ref.ReferenceBroker, key: str, candidates: list[ref.Target], fields: dict[str, Any]
    ) -> int | None:
        return self.rng.randrange(len(candidates))

    def query_id(
        self, broker: ref.ReferenceBroker, default: str, targets: list[ref.Target], fields: dict[str, Any]
    ) -> str:
        return f"evbus-{self.rng.getrandbits(60)}"


def concrete(packet: ref.Packet) -> ref.Packet:
    """An expected packet with values in the place of what stands for many."""
    stand_ins = {ref.SERVER_FACTS: "evbus/1 {}", ref.FRESH_GUID: "12345678-0000-0000-0000-00000000000a"}
    numbers = ("RetryAfterMs",)
    fields = {
        name: stand_ins.get(value, 0 if name in numbers else "text") if isinstance(value, ref.Matcher) else value
        for name, value in packet.fields.items()
    }
    return ref.Packet(packet.object_id, packet.version, fields, packet.system_id, packet.time)


@pytest.mark.parametrize("seed", range(20))
def test_follower_agrees_with_every_choice(seed: int) -> None:
    rng = random.Random(seed)
    actual: dict[int, list[ref.Packet]] = {}
    bus, oracle = Bus(Wild(rng)), ref.ReferenceBroker(chooser=ref.Follower(actual.__getitem__))
    expected: dict[int, list[ref.Out]] = {}
    conns: list[int] = []
    asked: list[tuple[int, str, str]] = []

    def settle() -> None:
        for conn in actual:
            new = [concrete(out.packet) for out in bus.broker.take(conn)]
            actual[conn] += new
            asked.extend(
                (conn, packet.fields["TaskId"], packet.fields["Subject"])
                for packet in new
                if packet.object_id == ref.DELIVERY and packet.fields.get("Flags") == ref.IS_QUERY
            )

    def both(conn: int, data: bytes) -> None:
        bus.broker.feed(conn, data)
        settle()
        oracle.feed(conn, data)

    for _ in range(6):
        dialect = rng.choice([ref.EVBUS_2, ref.EVBUS_2, ref.H23_199, ref.H22])
        conn = bus.broker.connect()
        assert oracle.connect() == conn
        bus.dialects[conn], actual[conn], expected[conn] = dialect, [], []
        conns.append(conn)
        hello = {"TaskId": "h"} | ({"Announcement": CLIENT_FACTS} if dialect == ref.EVBUS_2 else {})
        both(conn, ref.encode(dialect, ref.HANDSHAKE, hello))
    subjects, patterns = ["a", "b.c", "b.d"], ["a", "b.*", ">", "b.c"]
    for step in range(150):
        conn = rng.choice(conns)
        dialect, subject = bus.dialects[conn], rng.choice(subjects)
        buffer, kind = str(step).encode(), rng.random()
        new = dialect == ref.EVBUS_2
        version = 2 if new and rng.random() < 0.7 else 1
        fields: dict[str, Any] = {"TaskId": rng.choice(["", "t"]), "Subject": subject, "Buffer": buffer}
        if kind < 0.2:
            fields = {"TaskId": "s", "Subject": rng.choice(patterns)}
            if version == 2:
                more = {"SubscriptionId": step, "Role": rng.randrange(2), "Group": rng.choice(["", "g", "h"])}
                fields |= more
            both(conn, ref.encode(dialect, ref.SUBSCRIBE, fields, version=version))
        elif kind < 0.5:
            flags = {"Flags": rng.randrange(4)} if version == 2 else {}
            both(conn, ref.encode(dialect, ref.PUBLISH, fields | flags, version=version))
        elif kind < 0.75:
            flags = {"Flags": rng.choice([0, ref.ALL]), "DeadlineMs": rng.choice([0, 500])} if version == 2 else {}
            fields["TaskId"] = rng.choice(["q1", "q2", f"q{step}"])
            both(conn, ref.encode(dialect, ref.QUERY, fields | flags, version=version))
        elif kind < 0.97 and asked:
            conn, number, subject = asked.pop(rng.randrange(len(asked)))
            if conn in bus.broker.conns:
                fields = {"TaskId": "p", "Subject": subject, "QueryTaskId": number, "Buffer": buffer}
                both(conn, ref.encode(ref.EVBUS_2, ref.PUBLISH, fields, version=2))
        else:
            for broker in (bus.broker, oracle):
                broker.advance(0.1)
            settle()
        if step == 140:
            for broker in (bus.broker, oracle):
                broker.close(conns[0])
            settle()
    for conn in conns:
        expected[conn] += oracle.take(conn)
        assert ref.diff(expected[conn], actual[conn], times=True) is None
        assert ref.diff(expected[conn], actual[conn][:-1]) is not None
    assert sorted(query.task_id for query in oracle.queries.values()) == sorted(
        query.task_id for query in bus.broker.queries.values()
    )


def test_diff_takes_neighbours_in_any_order_but_loses_none() -> None:
    one, two, three = (ref.Packet(ref.HEARTBEAT, 1, {"TaskId": number}) for number in (1, 2, 3))
    outs = [ref.Out(one, 4), ref.Out(two, 4), ref.Out(three, optional=True)]
    for actual in ([one, two, three], [two, one, three], [two, one]):
        assert ref.diff(outs, actual) is None
    for actual in ([one, one, three], [one, three], [one, two, three, three], [one, two, two], [one]):
        assert ref.diff(outs, actual) is not None


# --- properties of the codec

TEXTS = st.text(max_size=40)
VALUES = {
    "s": TEXTS,
    "b": st.binary(max_size=300),
    "B": st.integers(0, 255),
    "?": st.booleans(),
    "i": st.integers(-(2**31), 2**31 - 1),
    "q": st.integers(-(2**63), 2**63 - 1),
}


KEYS = st.text(min_size=1, max_size=40)
HEADERS = st.lists(st.tuples(KEYS, TEXTS), max_size=5).map(ref.encode_headers)


@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    dialect = data.draw(st.sampled_from(ref.DIALECTS))
    known = [(number, 1) for number in ref.VERSION_1]
    known += [(number, 1) for number in ref.EXTENSIONS if dialect == ref.EVBUS_2]
    known += [(number, 2) for number in ref.VERSION_2 if dialect == ref.EVBUS_2]
    number, version = data.draw(st.sampled_from(known))
    schema = ref.schema(dialect, number, version)
    assert schema is not None
    fields = {name: data.draw(HEADERS if name == "Headers" else VALUES[kind]) for name, kind in schema}
    fields = {name: value[:30] if isinstance(value, str) else value for name, value in fields.items()}
    packet = ref.encode(dialect, number, fields, version=version, system_id=7, time=9)
    assert ref.packets(packet * 2, dialect) == [ref.Packet(number, version, fields, 7, 9)] * 2
    assert ref.verdict(packet[:-1], ref.layout_of(dialect), dialect) == "wait"


@given(st.lists(st.tuples(KEYS, TEXTS), max_size=5))
def test_headers_round_trip(pairs: list[tuple[str, str]]) -> None:
    data = ref.encode_headers(pairs)
    assert ref.decode_headers(data) == pairs
    if data:
        with pytest.raises(ref.Malformed):
            ref.decode_headers(data + b"\x01a")


@pytest.mark.parametrize("hostile", ["01", "0161", "00", "0000", "000161", "01800161", "0161e4b80161", "0161016102"])
def test_headers_that_no_receiver_should_see(hostile: str) -> None:
    bus = Bus()
    a = bus.open()
    fields = {"TaskId": "t", "Subject": "a", "Headers": bytes.fromhex(hostile)}
    for object_id in (ref.PUBLISH, ref.QUERY):
        bus.send(a, object_id, 2, **fields)
    assert bus.take(a) == [(1000, "t", ref.ERRORS["MALFORMED"])] * 2


@given(st.binary(max_size=200), st.sampled_from([None, 22, 23]), st.sampled_from(ref.DIALECTS))
def test_garbage_has_a_verdict(data: bytes, layout: int | None, dialect: str) -> None:
    assert ref.verdict(data, layout, dialect) in ("close", "wait", "ignore", "drop", "accept")


# --- the raw client, against the oracle as a server


def serve(listener: socket.socket, dialect: str) -> None:
    """One connection of a real socket, served by the oracle."""
    broker = ref.ReferenceBroker()
    conn = broker.connect()
    sock, _ = listener.accept()
    with sock:
        while conn in broker.conns and (data := sock.recv(3)):
            broker.feed(conn, data)
            for out in broker.take(conn):
                packet = concrete(out.packet)
                sock.sendall(ref.encode(dialect, packet.object_id, packet.fields, version=packet.version))


@pytest.mark.parametrize("dialect", ref.DIALECTS)
def test_raw_client(dialect: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener, dialect), daemon=True)
        thread.start()
        with RawClient("127.0.0.1", listener.getsockname()[1], dialect) as client:
            assert client.handshake().fields["Status"] == ref.SUCCESS
            client.send(ref.SUBSCRIBE, Subject="x", TaskId="s")
            assert brief(client.read()) == (254, "s", 1)
            client.send(ref.PUBLISH, {"Subject": "x", "Buffer": b"1"})
            assert [packet.fields["Buffer"] for packet in client.heartbeat()] == [b"1"]
            client.send_bytes(b"\0\0\0\0")
            last = [(ref.GO_AWAY, ref.CLOSES["PROTOCOL_ERROR"])] if dialect == ref.EVBUS_2 else []
            assert [brief(packet) for packet in client.read_end()] == last
        thread.join(5.0)
        assert not thread.is_alive()
