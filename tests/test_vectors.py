"""The golden vectors of the C# library, against evbus's own codec and the shipped broker: whole, and cut at every byte.

`tests/test_reference.py` does the same with the oracle, so that the two cannot agree on the same mistake.
"""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest

from evbus import _frame, wire
from evbus._frame import Ring
from evbus.broker import YIELD, Broker
from evbus.limits import Limits
from evbus.peer import Peer
from evbus.wire import CloseReason, Dialect, ObjectId

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "codewf.json").read_text(encoding="utf-8"))
SPOKEN = {
    "h22": Dialect.H22,
    "h23-255": Dialect.H23_255,
    "h23-199": Dialect.H23_199,
    "h23-auth": Dialect.H23_199,
    "h23-client": Dialect.H23_199,
}
MESSAGES = [case for case in VECTORS["messages"] if case["dialect"] in SPOKEN]
LETTERS = {"string": "b", "bytes": "y", "byte": "B", "bool": "B", "int32": "i"}
TASK = "f8de2f8a-86df-4485-b1ad-7c9f4c88d638"
QUERY = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(case[key]) for key in ("dialect", "layout", "message", "name", "role", "case") if case.get(key))


def vector(dialect: str, message: str, case: str = "", direction: str = "C>S") -> dict[str, Any]:
    """One of the messages."""
    (found,) = [
        each
        for each in VECTORS["messages"]
        if (each["dialect"], each["message"], each["case"], each["direction"]) == (dialect, message, case, direction)
    ]
    return dict(found)


def octets(case: dict[str, Any]) -> bytes:
    return bytes.fromhex(case["hex"])


def header_of(dialect: str) -> int:
    return 22 if dialect.startswith("h22") else 23


def value_of(kind: str, value: Any) -> Any:
    """A vector's value as `unpack` gives it."""
    if kind == "string":
        return (value or "").encode()
    return bytes.fromhex(value or "") if kind == "bytes" else int(value)


# --- the codec


@pytest.mark.parametrize("case", MESSAGES, ids=name_of)
def test_codec(case: dict[str, Any]) -> None:
    data, header = octets(case), header_of(case["dialect"])
    layout = "".join(LETTERS[kind] for _, kind, _ in case["fields"])
    values = tuple(value_of(kind, value) for _, kind, value in case["fields"])
    head = (case["object_id"], case["object_version"], int(case["system_id"]), case["unix_ms"])
    for cut in range(len(data) + 1):
        ring = Ring()
        ring.write(data[:cut])
        if cut < len(data):
            assert _frame.next_packet(ring, header, 4096) is None
        ring.write(data[cut:] + data[:7])
        assert _frame.next_packet(ring, header, 4096) == (*head, data[header:])
        assert _frame.next_packet(ring, header, 4096) is None
        assert ring.peek() == data[:7]
    ring = Ring()
    for index in range(len(data)):
        assert _frame.next_packet(ring, header, 4096) is None
        ring.write(data[index : index + 1])
    assert _frame.next_packet(ring, header, 4096) == (*head, data[header:])
    body = data[header:]
    assert _frame.unpack(body, layout, True) == values
    for cut in range(len(body)):
        assert _frame.unpack(body[:cut], layout) is None
    object_id, version, system_id, unix_ms = head
    kinds = layout.replace("b", "s")
    assert _frame.pack(header, object_id, version, system_id, unix_ms, kinds, *values) == data
    assert _frame.pack_raw(header, object_id, version, system_id, unix_ms, body) == data


# --- the server


class Server:
    """A broker that was started when the vectors' server was, at the time of the vectors; bytes in, bytes out."""

    def __init__(self, dialect: str = "h23-199") -> None:
        self.dialect = dialect
        (self.time,) = {case["unix_ms"] for case in VECTORS["messages"] if case["dialect"] == dialect}
        start = 639_179_136_000_000_000 // 10_000 - wire.TICKS_EPOCH_MS
        self.broker = Broker(Limits(), now=0.0, unix_ms=start, log=logging.getLogger("evbus.test"))
        self.broker.set_time(0.0, self.time)
        self.sent: dict[int, bytearray] = {}

    def connect(self) -> Peer:
        out = bytearray()

        def flush(ring: Ring) -> int:
            out.extend(ring.take())
            return 0

        peer = self.broker.opened("test:1", flush, 0.0)
        self.sent[peer.link.id] = out
        return peer

    def ready(self, dialect: str | None = None) -> Peer:
        """A connection that has shaken hands as the vectors do."""
        peer = self.connect()
        case = {"h23-auth": "token", "h23-client": "token"}.get(dialect or self.dialect, "")
        self.feed(peer, octets(vector(dialect or self.dialect, "RequestIsEventServer", case)))
        assert self.take(peer)
        assert peer.link.dialect == SPOKEN[dialect or self.dialect]
        return peer

    def feed(self, peer: Peer, *pieces: bytes) -> CloseReason | None:
        """Bytes from a peer; the reason to close it, if there is one."""
        for piece in pieces:
            peer.link.inp.write(piece)
            result = self.broker.receive(peer)
            assert result != YIELD
            self.broker.router.flush_dirty()
            if result is not None:
                self.broker.closed(peer, CloseReason(result))
                return CloseReason(result)
        return None

    def take(self, peer: Peer) -> bytes:
        """What the peer was sent since the last call."""
        data = bytes(self.sent[peer.link.id])
        self.sent[peer.link.id].clear()
        return data

    def response(self, status: int, task_id: str = TASK, text: bytes = b"") -> bytes:
        """A Response as this server writes it."""
        peer_dialect = SPOKEN[self.dialect]
        old = peer_dialect in (Dialect.H22, Dialect.H23_255)
        system_id = wire.filetime(self.time) if old else 639_179_136_000_000_000
        values = (task_id, status, text)
        return _frame.pack(header_of(self.dialect), ObjectId.RESPONSE, 1, system_id, self.time, "sBs", *values)

    @property
    def counts(self) -> dict[str, int]:
        router = self.broker.router
        errors: dict[str, int] = router.counters()["errors"]
        found = errors | {"unknown": router.unknown_packets, "early": router.early_packets}
        return {name: count for name, count in found.items() if count}


def without_system_id(data: bytes) -> bytes:
    """A packet with a FILETIME in it has one of finer grain than a millisecond."""
    return data[:4] + data[12:]


def assert_same(actual: bytes, case: dict[str, Any]) -> None:
    """Byte for byte, but for the FILETIME."""
    if case["dialect"] in ("h22", "h23-255"):
        assert without_system_id(actual) == without_system_id(octets(case))
        (mine,), (theirs,) = struct.unpack_from("<q", actual, 4), struct.unpack_from("<q", octets(case), 4)
        assert abs(mine - theirs) < 100_000_000  # 10 s
    else:
        assert actual == octets(case)


REQUESTS = [case for case in MESSAGES if case["direction"] == "C>S"]


def reaction(server: Server, case: dict[str, Any]) -> bytes | None:
    """What the server must answer on a connection of its own; None: the vector of the heartbeat's echo."""
    kind, fields = case["message"], {name: value for name, _, value in case["fields"]}
    if kind == "Heartbeat":
        return None
    if kind == "RequestQuery":
        return server.response(2, QUERY, b"nobody answers queries on this subject")
    if kind == "RequestPublish" and fields.get("QueryTaskId"):
        return b""  # answers a query that nobody asked
    return server.response(1)


@pytest.mark.parametrize("case", REQUESTS, ids=name_of)
def test_request(case: dict[str, Any]) -> None:
    dialect, data = case["dialect"], octets(case)
    server = Server(dialect)
    cuts = [[data], [data[at : at + 1] for at in range(len(data))]]
    cuts += [[data[:at], data[at:]] for at in range(1, len(data))]
    if case["message"] == "RequestIsEventServer":
        for pieces in cuts:
            peer = server.connect()
            assert server.feed(peer, *pieces) is None
            assert_same(server.take(peer), vector(dialect, "ResponseCommon", "success, null message", "S>C"))
            assert peer.link.dialect == SPOKEN[dialect]
        assert server.counts == {}
        return
    peer = server.ready()
    expected = reaction(server, case)
    for pieces in cuts:
        assert server.feed(peer, *pieces) is None
        got = server.take(peer)
        if expected is not None:
            assert got == expected
        else:
            echo = vector(dialect, "Heartbeat", "echo", "S>C")
            assert_same(got[: header_of(dialect)], echo | {"hex": echo["hex"][: 2 * header_of(dialect)]})
            assert got[header_of(dialect) :] == data[header_of(dialect) :]
    failed = {"RequestQuery": "no_responders", "RequestPublish": "unknown_query" if not expected else ""}
    name = failed.get(case["message"], "")
    assert server.counts == ({name: len(cuts)} if name else {})


@pytest.mark.parametrize("dialect", SPOKEN)
@pytest.mark.parametrize("what", ["an object", "an int", "null payload"])
def test_event(dialect: str, what: str) -> None:
    """The delivery, byte for byte, to a receiver of the same dialect and of every other."""
    server = Server(dialect)
    source = server.ready()
    subscribe = _frame.pack(header_of(dialect), 2, 1, 0, 0, "ss", "", "demo.order.created")
    twin = server.ready()
    server.feed(twin, subscribe)
    others = {}
    for other in SPOKEN:
        others[other] = server.ready(other)
        server.feed(others[other], _frame.pack(header_of(other), 2, 1, 0, 0, "ss", "", "demo.order.*"))
    data = octets(vector(dialect, "RequestPublish", what))
    for at in range(len(data)):
        assert server.feed(source, data[:at], data[at:]) is None
        assert_same(server.take(twin), vector(dialect, "UpdateEvent", what, "S>C"))
        assert server.take(source) == server.response(1)
        for other, peer in others.items():
            expected = octets(vector(other, "UpdateEvent", what, "S>C"))
            got = server.take(peer)
            # Everything but the SystemId and the time, which are the publisher's day and not the other vectors'.
            start = header_of(other)
            assert (got[:4], got[12 : start - 8], got[start:]) == (
                expected[:4], expected[12 : start - 8], expected[start:],
            )  # fmt: skip
    assert server.counts == {}


@pytest.mark.parametrize("dialect", SPOKEN)
def test_query(dialect: str) -> None:
    """What the one asked gets, and what the asker gets, byte for byte, in the manner of either generation."""
    server = Server(dialect)
    asker, responder = server.ready(), server.ready()
    header, old = header_of(dialect), dialect in ("h22", "h23-255")
    asked = vector(dialect, "UpdateEvent", "a query handed to a subscriber", "S>C")
    fields = {name: value_of(kind, value) for name, kind, value in asked["fields"]}
    server.feed(responder, _frame.pack(header, 2, 1, 0, 0, "ss", "", fields["Subject"]))
    query = _frame.pack(header, 6, 1, 0, server.time, "ssy", QUERY, fields["Subject"], fields["Buffer"])
    answer = octets(vector(dialect, "RequestPublish", "the answer to a query"))
    for at in range(len(answer)):
        server.feed(asker, query)
        got = server.take(responder)
        if old:  # a fresh id, of the same form as the vector's
            (task_id,) = _frame.unpack(got[header:], "b") or (b"",)
            assert len(task_id) == 36
            assert task_id != QUERY.encode()
            got = got.replace(task_id, TASK.encode())
        assert_same(got, asked)
        assert server.take(asker) == b""
        server.feed(responder, answer[:at], answer[at:])
        assert_same(server.take(asker), vector(dialect, "UpdateEvent", "the answer handed to the asker", "S>C"))
        assert server.take(responder) == (b"" if old else server.response(1))
    assert server.counts == {}
    assert server.broker.router.queries.count == 0


@pytest.mark.parametrize("case", [case for case in MESSAGES if case["direction"] == "S>C"], ids=name_of)
def test_what_only_servers_send_is_skipped(case: dict[str, Any]) -> None:
    server = Server(case["dialect"])
    peer, data = server.ready(), octets(case)
    for at in range(len(data)):
        assert server.feed(peer, data[:at], data[at:]) is None
    echoed = case["message"] == "Heartbeat"
    assert bool(server.take(peer)) is echoed
    assert server.counts == ({} if echoed else {"unknown": len(data)})


# --- the malformed ones

FRAMES = [case for case in VECTORS["malformed"] if case["kind"] == "frame"]
BODIES = [case for case in VECTORS["malformed"] if case["kind"] == "body"]


@pytest.mark.parametrize("case", FRAMES, ids=name_of)
def test_malformed_frame(case: dict[str, Any]) -> None:
    data, advice = octets(case), case["advice"]
    dialect = "h22" if case["layout"] == "h22" else "h23-199"
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        server = Server(dialect)
        good, bad = server.ready(), server.ready()
        closed = server.feed(bad, *pieces)
        large = case["name"] in ("size 64 MiB + 1", "size maximum int")
        reason = CloseReason.PACKET_TOO_LARGE if large else CloseReason.PROTOCOL_ERROR
        assert closed == (reason if advice == "close" else None)
        assert server.take(bad) == b""
        assert server.counts == {"drop": {"malformed": 1}, "ignore": {"unknown": 1}}.get(advice, {})
        waiting = {"wait": data}.get(advice, b"")
        assert bad.link.inp.peek() == waiting
        # Only that connection is concerned, and it goes on if it was not closed.
        publish = octets(vector(dialect, "RequestPublish", "an int"))
        for peer in (good,) if closed or waiting else (good, bad):
            server.feed(peer, publish)
            assert server.take(peer) == server.response(1)


@pytest.mark.parametrize("case", [c for c in FRAMES if c["advice"] in ("close", "wait", "drop")], ids=name_of)
def test_malformed_first_frame(case: dict[str, Any]) -> None:
    data, advice = octets(case), case["advice"]
    dialect = "h22" if case["layout"] == "h22" else "h23-199"
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        server = Server(dialect)
        peer = server.connect()
        closed = server.feed(peer, *pieces)
        short = case["layout"] == "h23" and case["name"] == "size one below the header"
        reason = CloseReason.PROTOCOL_ERROR if short else CloseReason.NOT_EVENT_BUS
        assert closed == (reason if advice == "close" else None)
        assert server.take(peer) == b""
        if advice == "drop":
            assert server.counts == {"malformed": 1}
            server.feed(peer, octets(vector(dialect, "RequestIsEventServer")))
            assert server.take(peer) == server.response(1, QUERY)


#: What the codec accepts as the C# readers do, and the server refuses because of its own rules for subjects.
REFUSED = {
    "length prefix of 5 bytes, zero",
    "invalid UTF-8, lone continuation",
    "invalid UTF-8, cut sequence",
    "invalid UTF-8, encoded surrogate",
    "empty Subject",
}


@pytest.mark.parametrize("case", BODIES, ids=name_of)
def test_malformed_body(case: dict[str, Any]) -> None:
    data, body = octets(case), bytes.fromhex(case["body_hex"])
    layout = {"RequestSubscribe": "ss", "RequestPublish": "sssy", "UpdateEvent": "ssBy", "ResponseCommon": "sBs"}
    fields = _frame.unpack(body, layout[case["message"]])
    assert (fields is None) is (case["advice"] == "drop")
    server = Server()
    peer = server.ready()
    for times, pieces in enumerate(([data], [data[at : at + 1] for at in range(len(data))]), 1):
        assert server.feed(peer, *pieces) is None
        got = server.take(peer)
        if case["message"] in ("UpdateEvent", "ResponseCommon"):
            assert (got, server.counts) == (b"", {"unknown": times})
        elif case["advice"] == "drop":
            assert (got, server.counts) == (b"", {"malformed": times})
        elif case["name"] in REFUSED:
            assert got == server.response(2, QUERY, b"the subject is not valid here")
            assert server.counts == {"invalid_subject": times}
        else:
            assert (got, server.counts) == (server.response(1, QUERY), {})


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("trailing bytes", 1, "s"),
        ("length prefix not minimal", 1, "s"),
        ("length prefix of 5 bytes, zero", 1, ""),
        ("invalid UTF-8, lone continuation", 1, "a\ufffdb"),
        ("invalid UTF-8, cut sequence", 1, "a\ufffd"),
        ("invalid UTF-8, encoded surrogate", 1, "\ufffd\ufffd\ufffd"),
        ("empty Subject", 1, ""),
        ("QueryTaskId of blanks", 2, "  "),
        ("flag 2", 2, 2),
        ("status 9", 1, 9),
    ],
)
def test_odd_but_accepted(name: str, at: int, value: Any) -> None:
    (case,) = [case for case in BODIES if case["name"] == name]
    layout = {"RequestSubscribe": "ss", "RequestPublish": "sssy", "UpdateEvent": "ssBy", "ResponseCommon": "sBs"}
    fields = _frame.unpack(bytes.fromhex(case["body_hex"]), layout[case["message"]])
    assert fields is not None
    assert fields[at] == value


# --- which dialect


@pytest.mark.parametrize("case", VECTORS["detection"], ids=name_of)
def test_detection(case: dict[str, Any]) -> None:
    data = octets(case)
    if case["role"] == "client reads the answer":
        header = 22 if case["layout"] == "h22" else 23
        ring = Ring()
        ring.write(data)
        packet = _frame.next_packet(ring, header, 4096)
        assert packet is not None
        assert (packet[0], packet[2]) == (ObjectId.RESPONSE, int(case["system_id"]))
        return
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        server = Server()
        peer = server.connect()
        closed = server.feed(peer, *pieces)
        if case["role"].startswith("client sends both"):
            assert (closed, server.counts) == (None, {"unknown": 1})
            assert _frame.unpack(server.take(peer)[23:], "s") == (case["same_task_id"],)
        elif case["layout"] == "refuse":
            size = case.get("pack_size", 0)
            large = 4096 < size <= wire.MAX_PACKET_CEILING_BYTES
            assert closed == (CloseReason.PACKET_TOO_LARGE if large else CloseReason.NOT_EVENT_BUS)
        elif case["layout"] is None:
            assert (closed, peer.link.header_bytes, peer.link.inp.peek()) == (None, 0, data)
        elif case["dialect"] in SPOKEN:
            assert closed is None
            assert (peer.link.header_bytes, peer.link.dialect) == (int(case["layout"][1:]), SPOKEN[case["dialect"]])
            assert server.take(peer)
        else:  # the int dialects of 2024-07
            assert (closed, server.take(peer)) == (CloseReason.UNSUPPORTED_DIALECT, b"")


@pytest.mark.parametrize("dialect", SPOKEN)
def test_layout_is_decided_after_14_bytes(dialect: str) -> None:
    first = next(case for case in REQUESTS if case["dialect"] == dialect)
    ring = Ring()
    for at in range(14):
        assert _frame.detect_layout(ring, 4096) == 0
        ring.write(octets(first)[at : at + 1])
    assert _frame.detect_layout(ring, 4096) == header_of(dialect)


def test_a_long_stream_in_all_pieces() -> None:
    """Three packets of each dialect behind each other, with every pair of cuts."""
    for dialect in SPOKEN:
        server = Server(dialect)
        names = [("RequestPublish", "an int"), ("Heartbeat", ""), ("RequestUnsubscribe", "")]
        data = b"".join(octets(vector(dialect, *name)) for name in names)
        peer = server.ready()
        server.feed(peer, data)
        expected = server.take(peer)
        assert len(expected) > 100
        for first in range(0, len(data), 3):
            for second in range(first, len(data), 5):
                server.feed(peer, data[:first], data[first:second], data[second:])
                assert server.take(peer) == expected
