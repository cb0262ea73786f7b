"""An independent, plain and slow codec and broker: the oracle of the property tests and of the fuzz. Not shipped.

It is written from `docs/protocol.md` (section numbers below are that document's) and shares no code and no tables with
evbus; a test holds its tables against `evbus.wire`. Strings are kept as `str` with `surrogateescape`, so that bytes
which are no UTF-8 survive a round trip; `text()` gives what a reader is shown.

Codec: `Decoder` cuts a stream into `Frame`s or says `Refuse`; `decode` turns a frame into a `Packet`; `encode` is the
way back. Broker: `ReferenceBroker` is fed the bytes of each connection and lists what each connection must receive, as
`Out`s. Where the protocol leaves a choice (which group member, which responder), a `Chooser` decides: `RoundRobin` by
itself, `Follower` by looking at what an implementation really sent, so that the two go on from the same state. `diff`
compares.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

H22, H23_255, H23_199, EVBUS_2 = "h22", "h23-255", "h23-199", "evbus-2"
DIALECTS = (H22, H23_255, H23_199, EVBUS_2)
OLD = (H22, H23_255)  # the generations that cannot tell a query from an event

HANDSHAKE, SUBSCRIBE, UNSUBSCRIBE, PUBLISH, DELIVERY, QUERY = 1, 2, 3, 4, 5, 6
HEARTBEAT, RESPONSE, HEARTBEAT_OLD = 199, 254, 255
ERROR, GO_AWAY, GAP, RECEIPT, CANCEL_QUERY, QUERY_END, CREDIT = 1000, 1001, 1002, 1003, 1004, 1005, 1006

SUCCESS, FAIL = 1, 2
CONFIRM, NO_ECHO, ALL, IS_QUERY, IS_ANSWER = 1, 2, 4, 8, 16
RESPONDER = 1
BLOCK = 2
COMPLETE, LOST, DEADLINE = 0, 1, 2

ERRORS = {
    "MALFORMED": 1,
    "INVALID_SUBJECT": 2,
    "PAYLOAD_TOO_LARGE": 3,
    "PERMISSION_DENIED": 4,
    "NO_RESPONDERS": 5,
    "RESPONDER_LOST": 6,
    "QUERY_TIMEOUT": 7,
    "TOO_MANY_SUBSCRIPTIONS": 8,
    "TOO_MANY_QUERIES": 9,
    "DUPLICATE_ID": 10,
    "UNKNOWN_SUBSCRIPTION": 11,
    "UNKNOWN_QUERY": 12,
    "DRAINING": 13,
    "UNSUPPORTED": 14,
}
CLOSES = {
    "CLIENT_CLOSED": 1,
    "CONNECTION_LOST": 2,
    "HANDSHAKE_TIMEOUT": 3,
    "NOT_EVENT_BUS": 4,
    "UNSUPPORTED_DIALECT": 5,
    "PACKET_TOO_LARGE": 6,
    "PROTOCOL_ERROR": 7,
    "STALE": 8,
    "SLOW_CONSUMER": 9,
    "SLOW_CONSUMER_SOFT": 10,
    "WRITE_TIMEOUT": 11,
    "TOO_MANY_CONNECTIONS": 12,
    "SERVER_SHUTDOWN": 13,
    "INTERNAL_ERROR": 14,
    "TOO_MANY_HANDSHAKES": 15,
    "AUTH_FAILED": 16,
}
ANNOUNCEMENT = "evbus/1 "

# Field types: s string, b bytes, B u8, ? bool, i i32, q i64.
_Fields = tuple[tuple[str, str], ...]
_TASK: _Fields = (("TaskId", "s"),)
_TASK_SUBJECT: _Fields = (("TaskId", "s"), ("Subject", "s"))
_PLAIN: _Fields = (("TaskId", "s"), ("Subject", "s"), ("Buffer", "b"))
_OPTIONAL = ("AuthenticationToken", "ClientId", "Announcement")
VERSION_1: dict[int, _Fields] = {
    HANDSHAKE: _TASK,
    SUBSCRIBE: _TASK_SUBJECT,
    UNSUBSCRIBE: _TASK_SUBJECT,
    PUBLISH: (("TaskId", "s"), ("Subject", "s"), ("QueryTaskId", "s"), ("Buffer", "b")),
    DELIVERY: (("TaskId", "s"), ("Subject", "s"), ("IsQueryRequest", "?"), ("Buffer", "b")),
    QUERY: _PLAIN,
    HEARTBEAT: (("TaskId", "i"),),
    RESPONSE: (("TaskId", "s"), ("Status", "B"), ("Message", "s")),
    HEARTBEAT_OLD: (),
}
VERSION_1_OLD: dict[int, _Fields] = {**VERSION_1, PUBLISH: _PLAIN, DELIVERY: _PLAIN}
_ENVELOPE: _Fields = (
    ("Flags", "B"),
    ("Codec", "B"),
    ("SubscriptionId", "i"),
    ("DeadlineMs", "i"),
    ("TaskId", "s"),
    ("Subject", "s"),
    ("QueryTaskId", "s"),
    ("Headers", "b"),
    ("Buffer", "b"),
)
VERSION_2: dict[int, _Fields] = {
    SUBSCRIBE: (
        ("TaskId", "s"),
        ("Subject", "s"),
        ("SubscriptionId", "i"),
        ("Role", "B"),
        ("Overflow", "B"),
        ("Group", "s"),
    ),
    UNSUBSCRIBE: (("TaskId", "s"), ("SubscriptionId", "i")),
    PUBLISH: _ENVELOPE,
    DELIVERY: _ENVELOPE,
    QUERY: _ENVELOPE,
}
EXTENSIONS: dict[int, _Fields] = {
    ERROR: (("TaskId", "s"), ("Code", "i"), ("Subject", "s"), ("Text", "s")),
    GO_AWAY: (("Reason", "i"), ("RetryAfterMs", "i"), ("Text", "s")),
    GAP: (("SubscriptionId", "i"), ("Count", "q"), ("Reason", "B")),
    RECEIPT: (("TaskId", "s"), ("Receivers", "i"), ("Dropped", "i")),
    CANCEL_QUERY: _TASK,
    QUERY_END: (("TaskId", "s"), ("Reason", "B"), ("Replies", "i")),
    CREDIT: (("SubscriptionId", "i"), ("Msgs", "i")),
}
#: Bytes a field may have at most; more makes the packet malformed.
FIELD_LIMITS = {
    "TaskId": 128,
    "QueryTaskId": 128,
    "AuthenticationToken": 1024,
    "ClientId": 128,
    "Group": 128,
    "Headers": 16384,
}


class Malformed(Exception):
    """The body cannot be read. `task_id` is its TaskId if that could be read, else empty."""

    def __init__(self, why: str, task_id: str = "") -> None:
        super().__init__(why)
        self.task_id = task_id


class Frame(NamedTuple):
    """A whole packet whose body has not been read."""

    object_id: int
    version: int
    system_id: int
    time: int
    body: bytes


class Refuse(NamedTuple):
    """The connection must be closed, for this `CLOSES` reason."""

    reason: int


@dataclass(slots=True)
class Packet:
    """A packet as values. `system_id` and `time` are None where a test does not care."""

    object_id: int
    version: int
    fields: dict[str, Any]
    system_id: int | None = 0
    time: int | None = 0


# --- codec (sections 1 to 4) -----------------------------------------------------------------------------------------


def text(value: str) -> str:
    """What a reader is shown: every broken part of the UTF-8 as U+FFFD."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def raw(value: str) -> bytes:
    """The bytes of a string field, as they stood on the wire."""
    return value.encode("utf-8", "surrogateescape")


def layout_of(dialect: str) -> int:
    """Bytes of the header in a dialect."""
    return 22 if dialect == H22 else 23


def schema(dialect: str, object_id: int, version: int) -> _Fields | None:
    """The fields of an object, or None if that dialect does not know it. The vectors' names of dialects will do."""
    if version == 1 and object_id < 1000:
        return (VERSION_1_OLD if dialect in OLD else VERSION_1).get(object_id)
    if dialect != EVBUS_2:
        return None
    return EXTENSIONS.get(object_id) if version == 1 else VERSION_2.get(object_id) if version == 2 else None


class Decoder:
    """Cuts one direction of a stream into frames; bytes come in any pieces (section 2).

    `layout` None: decide from the first 14 bytes, as a server does. `limit` is the greatest PackSize taken; whoever
    drives the decoder raises it after the handshake.
    """

    def __init__(self, layout: int | None = None, limit: int = 64 * 1024 * 1024) -> None:
        self.layout = layout
        self.limit = limit
        self.buffer = bytearray()
        self.refused: Refuse | None = None

    def feed(self, data: bytes) -> None:
        """Take more bytes."""
        self.buffer += data

    def next(self) -> Frame | Refuse | None:
        """The next frame; None while bytes are missing; Refuse (for good) if the stream cannot go on."""
        if self.refused is None:
            item = self._next()
            if not isinstance(item, Refuse):
                return item
            self.refused = item
        return self.refused

    def _next(self) -> Frame | Refuse | None:
        buffer = self.buffer
        if len(buffer) < 4:
            return None
        (size,) = struct.unpack_from("<i", buffer, 0)
        if size < (self.layout or 22):
            return Refuse(CLOSES["PROTOCOL_ERROR"])
        if size > self.limit:
            return Refuse(CLOSES["PACKET_TOO_LARGE"])
        if self.layout is None:
            if len(buffer) < 14:
                return None
            if buffer[12] != 1 or buffer[13] > 1:
                return Refuse(CLOSES["NOT_EVENT_BUS"])
            self.layout = 23 if buffer[13] == 0 else 22
            if size < self.layout:
                return Refuse(CLOSES["PROTOCOL_ERROR"])
        if len(buffer) < size:
            return None
        system_id, object_id, version, time = struct.unpack_from("<qBBq" if self.layout == 22 else "<qHBq", buffer, 4)
        body = bytes(buffer[self.layout : size])
        del buffer[:size]
        return Frame(object_id, version, system_id, time, body)


class Cursor:
    """Reads fields from a body, one after the other."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count < 0 or count > len(self.body) - self.at:
            raise Malformed("beyond the body")
        self.at += count
        return self.body[self.at - count : self.at]

    def string(self) -> str:
        """LEB128 length of at most 5 bytes and 2^31 - 1, then the bytes."""
        length = 0
        for index in range(5):
            byte = self.take(1)[0]
            if index == 4 and byte > 0x0F:
                raise Malformed("fifth byte of a length")
            length |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                break
        if length > 0x7FFFFFFF:
            raise Malformed("length over 2^31 - 1")
        return self.take(length).decode("utf-8", "surrogateescape")

    def value(self, kind: str) -> Any:
        """A field of type `kind`."""
        if kind == "s":
            return self.string()
        if kind == "b":
            return self.take(struct.unpack("<i", self.take(4))[0])
        number = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]
        return bool(number) if kind == "?" else number


def _check_size(name: str, value: Any) -> None:
    limit = FIELD_LIMITS.get(name)
    if limit is None or isinstance(value, int):
        return
    if len(value if isinstance(value, bytes) else raw(value)) > limit:
        raise Malformed(f"{name} over {limit} bytes")


def decode_body(dialect: str, object_id: int, version: int, body: bytes) -> dict[str, Any]:
    """The fields of a body; `Malformed` if it has none of that shape, KeyError if the dialect does not know the object.

    Trailing bytes are ignored, except after an envelope. A handshake has the optional strings that it carries.
    """
    names = schema(dialect, object_id, version)
    if names is None:
        raise KeyError((dialect, object_id, version))
    cursor = Cursor(body)
    fields: dict[str, Any] = {}
    try:
        for name, kind in names:
            value = cursor.value(kind)
            _check_size(name, value)
            fields[name] = value
        if object_id == HANDSHAKE and dialect != H22:
            for name in _OPTIONAL:
                if cursor.at == len(body):
                    break
                value = cursor.string()
                _check_size(name, value)
                fields[name] = value
        if names is _ENVELOPE and cursor.at != len(body):
            raise Malformed("bytes after the envelope")
    except Malformed as error:
        task_id = fields.get("TaskId", "")
        raise Malformed(str(error), task_id if isinstance(task_id, str) else "") from None
    return fields


def decode(frame: Frame, dialect: str) -> Packet:
    """A frame as values; raises like `decode_body`."""
    fields = decode_body(dialect, frame.object_id, frame.version, frame.body)
    return Packet(frame.object_id, frame.version, fields, frame.system_id, frame.time)


def packets(data: bytes, dialect: str) -> list[Packet]:
    """All packets of a stream of one dialect that holds nothing else; AssertionError on a rest or a refusal."""
    decoder = Decoder(layout_of(dialect))
    decoder.feed(data)
    result = []
    while (item := decoder.next()) is not None:
        assert isinstance(item, Frame), item
        result.append(decode(item, dialect))
    assert not decoder.buffer, bytes(decoder.buffer)
    return result


def verdict(data: bytes, layout: int | None, dialect: str) -> str:
    """What becomes of these bytes on a fresh connection: close, wait, ignore (unknown), drop (malformed) or accept."""
    decoder = Decoder(layout)
    decoder.feed(data)
    item = decoder.next()
    if item is None:
        return "wait"
    if isinstance(item, Refuse):
        return "close"
    try:
        decode(item, dialect)
    except KeyError:
        return "ignore"
    except Malformed:
        return "drop"
    return "accept"


def encode_string(value: str | None) -> bytes:
    """A string field; None is written as empty."""
    data = raw(value or "")
    length, prefix = len(data), bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + data


def encode_value(kind: str, value: Any) -> bytes:
    """A field of type `kind`; None is written as empty or 0."""
    if kind == "s":
        return encode_string(value)
    if kind == "b":
        return struct.pack("<i", len(value or b"")) + bytes(value or b"")
    return struct.pack("<" + kind, value or 0)


def encode_frame(
    layout: int, object_id: int, version: int, body: bytes, system_id: int = 0, time: int = 0, size: int | None = None
) -> bytes:
    """A packet around any body. `size` states another PackSize than the right one, for hostile tests."""
    size = layout + len(body) if size is None else size
    head = struct.pack("<iqBBq" if layout == 22 else "<iqHBq", size, system_id, object_id, version, time)
    return head + body


def encode_body(dialect: str, object_id: int, version: int, fields: Mapping[str, Any]) -> bytes:
    """The body of an object; fields that are missing are written empty or 0, unknown ones are a KeyError."""
    names = schema(dialect, object_id, version)
    if names is None:
        raise KeyError((dialect, object_id, version))
    rest = dict(fields)
    body = b"".join(encode_value(kind, rest.pop(name, None)) for name, kind in names)
    if object_id == HANDSHAKE:
        last = max((index for index, name in enumerate(_OPTIONAL) if name in rest), default=-1)
        body += b"".join(encode_string(rest.pop(name, None)) for name in _OPTIONAL[: last + 1])
    if rest:
        raise KeyError(f"object {object_id} has no {sorted(rest)}")
    return body


def encode(
    dialect: str, object_id: int, fields: Mapping[str, Any], *, version: int = 1, system_id: int = 0, time: int = 0
) -> bytes:
    """A whole packet of a dialect."""
    body = encode_body(dialect, object_id, version, fields)
    return encode_frame(layout_of(dialect), object_id, version, body, system_id, time)


def encode_headers(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The value of a Headers field: key string, value string, repeated."""
    return b"".join(encode_string(key) + encode_string(value) for key, value in pairs)


def decode_headers(data: bytes) -> list[tuple[str, str]]:
    """The pairs of a Headers field; `Malformed` if it does not end after a value."""
    cursor, pairs = Cursor(data), []
    while cursor.at < len(data):
        pairs.append((cursor.string(), cursor.string()))
    return pairs


# --- subjects (section 6) --------------------------------------------------------------------------------------------


def valid_subject(subject: str, pattern: bool) -> bool:
    """Whether a subject may be published to, or (pattern) subscribed to."""
    data = raw(subject)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if not 1 <= len(data) <= 256 or any(byte < 0x20 or byte == 0x7F for byte in data):
        return False
    tokens = subject.split(".")
    if len(tokens) > 32 or "" in tokens:
        return False
    for index, token in enumerate(tokens):
        if "*" not in token and ">" not in token:
            continue
        if not pattern or token not in ("*", ">") or (token == ">" and index != len(tokens) - 1):
            return False
    return True


def matches(pattern: Sequence[str], tokens: Sequence[str]) -> bool:
    """Whether a subscription's tokens match a subject's."""
    for index, token in enumerate(pattern):
        if token == ">":
            return len(tokens) > index
        if index == len(tokens) or token not in ("*", tokens[index]):
            return False
    return len(pattern) == len(tokens)


def blank(value: str) -> bool:
    """Whether an id counts as absent: empty, or only ASCII white space (0x09 to 0x0d, 0x20)."""
    return not value.strip(" \t\n\v\f\r")


# --- what a broker must send (sections 5 to 9) -----------------------------------------------------------------------


class _Matcher:
    """An expected value that stands for many."""

    def __init__(self, name: str, test: Callable[[Any], bool]) -> None:
        self.name = name
        self.test = test

    def __eq__(self, other: object) -> bool:
        return self.test(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<{self.name}>"


_GUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
ANY = _Matcher("anything", lambda value: True)
SOME_TEXT = _Matcher("a text", lambda value: isinstance(value, str) and value != "")
FRESH_GUID = _Matcher("a fresh GUID", lambda value: isinstance(value, str) and _GUID.fullmatch(value) is not None)
SERVER_FACTS = _Matcher("an announcement", lambda value: isinstance(value, str) and value.startswith(ANNOUNCEMENT))

Target = tuple[int, int]  # connection, subscription id (0: a plain subscription)


@dataclass(slots=True)
class Out:
    """One packet that a connection must receive.

    Neighbours with the same non-zero `unordered` may come in any order. `optional`: may be missing. `one_of`: the
    targets among which an implementation was free to choose this one (empty: no choice).
    """

    packet: Packet
    unordered: int = 0
    optional: bool = False
    one_of: tuple[Target, ...] = ()


def same(expected: Packet, actual: Packet, *, ids: bool = True, times: bool = False) -> bool:
    """Whether an actual packet is the expected one; `ids`, `times`: compare SystemId and time too where known."""
    return (
        expected.object_id == actual.object_id
        and expected.version == actual.version
        and expected.fields == actual.fields
        and (not ids or expected.system_id is None or expected.system_id == actual.system_id)
        and (not times or expected.time is None or expected.time == actual.time)
    )


def diff(expected: Sequence[Out], actual: Sequence[Packet], *, ids: bool = True, times: bool = False) -> str | None:
    """What differs between the packets that a connection must receive and those that it did; None if nothing does."""
    at = start = 0
    while start < len(expected):
        end = start + 1
        group = expected[start].unordered
        while group and end < len(expected) and expected[end].unordered == group:
            end += 1
        wanted = list(expected[start:end])
        while wanted:
            found = actual[at] if at < len(actual) else None
            hit = next((o for o in wanted if found and same(o.packet, found, ids=ids, times=times)), None)
            if hit is not None:
                wanted = [out for out in wanted if out is not hit]
                at += 1
            elif all(o.optional for o in wanted):
                break
            else:
                return f"packet {at}: expected {' or '.join(repr(o.packet) for o in wanted)}, got {found!r}"
        start = end
    return None if at == len(actual) else f"packet {at}: expected nothing more, got {actual[at]!r}"


class Chooser:
    """Decides what the protocol leaves open."""

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        """Index of the candidate that gets a message with these `fields`; None: none of them (taken as index 0 where
        that is not allowed). `key` names the group, or the responders of a subject."""
        raise NotImplementedError

    def query_id(self, broker: ReferenceBroker, default: str, targets: list[Target], fields: dict[str, Any]) -> str:
        """The id that the server gives a query whose own id is taken."""
        return default


class RoundRobin(Chooser):
    """One after the other."""

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        turn = self.turns[key]
        self.turns[key] += 1
        return turn % len(candidates)


class Follower(Chooser):
    """Chooses what an implementation chose. Feed the implementation first, then the broker with the same bytes.

    `actual(conn)` gives every packet that the implementation has sent to a connection since its start. Payloads should
    be unique in a test, else two choices can be taken for each other.
    """

    WINDOW = 16

    def __init__(self, actual: Callable[[int], Sequence[Packet]]) -> None:
        self.actual = actual

    def _offset(self, broker: ReferenceBroker, target: Target, fields: dict[str, Any]) -> tuple[int, str] | None:
        conn, subscription = target
        start = broker.sent[conn]
        for offset, packet in enumerate(self.actual(conn)[start : start + self.WINDOW]):
            there = packet.fields
            if packet.object_id != DELIVERY or there.get("SubscriptionId", 0) != subscription:
                continue
            if there["Buffer"] == fields["Buffer"] and there["Subject"] == fields["Subject"]:
                return offset, there["TaskId"]
        return None

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        best: tuple[int, int] | None = None
        for index, target in enumerate(candidates):
            found = self._offset(broker, target, fields)
            if found is not None and (best is None or found[0] < best[0]):
                best = found[0], index
        return None if best is None else best[1]

    def query_id(self, broker: ReferenceBroker, default: str, targets: list[Target], fields: dict[str, Any]) -> str:
        for target in targets:
            if broker.conns[target[0]].dialect not in OLD:
                found = self._offset(broker, target, fields)
                if found is not None:
                    return found[1]
        return default


@dataclass(slots=True)
class Limits:
    """What the broker is configured to take."""

    payload: int = 1048576
    overhead: int = 65536
    before_handshake: int = 4096
    subscriptions: int = 10000
    queries: int = 10000
    handshake_s: float = 5.0
    stale_s: float = 180.0  # a version-1 peer
    heartbeat_s: float = 5.0  # an announced peer that has no wish; stale after two


@dataclass(slots=True)
class _Subscription:
    tokens: list[str]
    id: int = 0
    fields: tuple[Any, ...] = ()
    responder: bool = False
    group: str = ""


@dataclass(slots=True)
class _Conn:
    id: int
    decoder: Decoder
    opened_at: float
    seen_at: float
    dialect: str = ""
    one_string: bool = False
    message: Any = ""
    stale_s: float = 0.0
    by_subject: dict[str, _Subscription] = field(default_factory=dict)
    by_id: dict[int, _Subscription] = field(default_factory=dict)


@dataclass(slots=True)
class _Query:
    id: str  # as forwarded
    asker: int
    task_id: str  # as the asker named it
    subject: str
    all: bool
    ends_at: float
    waiting: set[int]
    asked: int
    replies: int = 0


class ReferenceBroker:
    """A server without sockets: bytes and seconds in, expected packets out.

    `connect` gives a connection's number (1, 2, 3, ...); `take(conn)` what it must have received since the last call;
    `closed[conn]` the reason why the server closed it; `counts` what was skipped and refused.
    """

    def __init__(self, limits: Limits | None = None, chooser: Chooser | None = None, token: str | None = None) -> None:
        self.limits = limits or Limits()
        self.chooser = chooser or RoundRobin()
        self.token = token
        self.now = 0.0
        self.conns: dict[int, _Conn] = {}
        self.closed: dict[int, int] = {}
        self.sent: Counter[int] = Counter()  # packets listed so far, taken or not
        self.counts: Counter[str] = Counter()
        self.queries: dict[str, _Query] = {}  # by forwarded id, oldest first
        self._outs: dict[int, list[Out]] = {}
        self._numbers = 0
        self._own_ids = 0
        self._burst = 2

    # -- what a test calls

    def connect(self) -> int:
        """A new connection."""
        self._numbers += 1
        conn = _Conn(self._numbers, Decoder(None, self.limits.before_handshake), self.now, self.now)
        self.conns[conn.id] = conn
        self._outs[conn.id] = []
        return conn.id

    def feed(self, conn_id: int, data: bytes) -> None:
        """Bytes from a peer, in any pieces; ignored once the server has closed the connection."""
        conn = self.conns.get(conn_id)
        if conn is None:
            return
        conn.seen_at = self.now
        conn.decoder.feed(data)
        while conn_id in self.conns and (item := conn.decoder.next()) is not None:
            self._burst += 2
            if isinstance(item, Refuse):
                self._close(conn, item.reason)
            else:
                self._frame(conn, item)

    def close(self, conn_id: int) -> None:
        """The peer went away."""
        if conn_id in self.conns:
            self._burst += 2
            self._close(self.conns[conn_id], CLOSES["CLIENT_CLOSED"])

    def advance(self, seconds: float) -> None:
        """Let time pass; deadlines on the way happen in their order."""
        until = self.now + seconds
        self._burst += 2
        while True:
            due: list[tuple[float, int, Any]] = [(q.ends_at, 0, q) for q in self.queries.values()]
            for conn in self.conns.values():
                ready = conn.dialect != ""
                due.append(
                    (conn.seen_at + conn.stale_s if ready else conn.opened_at + self.limits.handshake_s, 1, conn)
                )
            if not due:
                break
            at, _, what = min(due, key=lambda item: item[:2])
            if at > until:
                break
            self.now = max(self.now, at)
            if isinstance(what, _Query):
                self._end(what, DEADLINE)
            else:
                self._close(what, CLOSES["STALE" if what.dialect else "HANDSHAKE_TIMEOUT"])
        self.now = until

    def take(self, conn_id: int) -> list[Out]:
        """What the connection must have received since the last call."""
        outs, self._outs[conn_id] = self._outs[conn_id], []
        return outs

    def shutdown(self) -> None:
        """Every announced peer is told that the server goes."""
        for conn in self.conns.values():
            self._go_away(conn, CLOSES["SERVER_SHUTDOWN"], optional=False)

    # -- sending

    def _send(self, conn: _Conn, object_id: int, fields: dict[str, Any], version: int = 1, **more: Any) -> None:
        packet = Packet(object_id, version, fields, more.pop("system_id", None), more.pop("time", None))
        if conn.dialect == EVBUS_2 and packet.system_id is None:
            packet.system_id = 0
        self._outs[conn.id].append(Out(packet, **more))
        self.sent[conn.id] += 1

    def _respond(self, conn: _Conn, task_id: str, status: int, message: Any = "", **more: Any) -> None:
        self._send(conn, RESPONSE, {"TaskId": task_id, "Status": status, "Message": message}, **more)

    def _error(self, conn: _Conn, code: str, task_id: str, subject: Any = "") -> None:
        self.counts[code] += 1
        if conn.dialect == EVBUS_2:
            self._send(conn, ERROR, {"TaskId": task_id, "Code": ERRORS[code], "Subject": subject, "Text": ANY})
        elif task_id and code != "MALFORMED":
            self._respond(conn, task_id, FAIL, SOME_TEXT)

    def _go_away(self, conn: _Conn, reason: int, optional: bool) -> None:
        if conn.dialect == EVBUS_2:
            fields = {"Reason": reason, "RetryAfterMs": ANY, "Text": ANY}
            self._send(conn, GO_AWAY, fields, optional=optional)

    def _close(self, conn: _Conn, reason: int) -> None:
        if reason > CLOSES["CONNECTION_LOST"]:
            self.closed[conn.id] = reason
            self._go_away(conn, reason, optional=True)
        del self.conns[conn.id]
        for query in list(self.queries.values()):
            if query.asker == conn.id:
                del self.queries[query.id]
            elif conn.id in query.waiting:
                query.waiting.remove(conn.id)
                if not query.waiting:
                    self._end(query, LOST)

    # -- packets

    def _frame(self, conn: _Conn, frame: Frame) -> None:
        kind = frame.object_id, frame.version
        if conn.dialect == "":
            if kind != (HANDSHAKE, 1):
                self.counts["early"] += 1
                return
            self._handshake(conn, frame)
            return
        handler = _HANDLERS.get(kind)
        if handler is None or (conn.dialect != EVBUS_2 and (frame.version == 2 or frame.object_id >= 1000)):
            self.counts["unknown"] += 1
            return
        try:
            packet = decode(frame, conn.dialect)
            handler(self, conn, packet, packet.fields)
        except Malformed as error:
            self._error(conn, "MALFORMED", error.task_id)

    def _handshake(self, conn: _Conn, frame: Frame) -> None:
        layout = conn.decoder.layout
        if layout == 22 and len(frame.body) == 4:
            self._close(conn, CLOSES["UNSUPPORTED_DIALECT"])
            return
        try:
            fields = decode_body(H22 if layout == 22 else H23_199, HANDSHAKE, 1, frame.body)
        except Malformed:
            self.counts["MALFORMED"] += 1
            return
        wish = announced(fields.get("Announcement", ""))
        dialect, stale_s = H22 if layout == 22 else H23_199, self.limits.stale_s
        if layout == 23 and len(fields) == 1 and frame.system_id != 0:
            dialect = H23_255
        if self.token is not None and fields.get("AuthenticationToken", "") != self.token:
            self._respond(conn, fields["TaskId"], FAIL, SOME_TEXT)
            self._close(conn, CLOSES["AUTH_FAILED"])
            return
        if wish is not None:
            low, high = wish["versions"]
            if not low <= 2 <= high:
                self._respond(conn, fields["TaskId"], FAIL, SOME_TEXT)
                self._close(conn, CLOSES["UNSUPPORTED_DIALECT"])
                return
            beat: Any = wish.get("heartbeat")
            if type(beat) not in (int, float) or not beat > 0:
                beat = self.limits.heartbeat_s
            dialect, stale_s = EVBUS_2, 2.0 * beat
        conn.dialect, conn.stale_s, conn.one_string = dialect, stale_s, layout == 23 and len(fields) == 1
        conn.message = SERVER_FACTS if dialect == EVBUS_2 else ""
        conn.decoder.limit = self.limits.payload + self.limits.overhead
        self._respond(conn, fields["TaskId"], SUCCESS, conn.message)

    def _handshake_again(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        self._respond(conn, fields["TaskId"], SUCCESS, conn.message)

    def _heartbeat(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if conn.one_string:  # the second witness
            conn.dialect = H23_199 if packet.object_id == HEARTBEAT else H23_255
        self._send(conn, packet.object_id, fields)

    def _subscribe(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        task_id, subject = fields["TaskId"], fields["Subject"]
        number = fields.get("SubscriptionId", 0)
        if packet.version == 2 and number <= 0:
            raise Malformed("SubscriptionId", task_id)
        if not valid_subject(subject, pattern=True):
            self._error(conn, "INVALID_SUBJECT", task_id, ANY)
            return
        new = _Subscription(subject.split("."))
        if packet.version == 2:
            if fields["Role"] > RESPONDER or fields["Overflow"] >= BLOCK:
                self._error(conn, "UNSUPPORTED", task_id, subject)
                return
            new.id, new.responder, new.group = number, fields["Role"] == RESPONDER, fields["Group"]
            new.fields = subject, fields["Role"], fields["Overflow"], fields["Group"]
        old = conn.by_id.get(number) if packet.version == 2 else conn.by_subject.get(subject)
        if old is not None and old.fields != new.fields:
            self._error(conn, "DUPLICATE_ID", task_id, subject)
            return
        if old is None:
            if len(conn.by_id) + len(conn.by_subject) >= self.limits.subscriptions:
                self._error(conn, "TOO_MANY_SUBSCRIPTIONS", task_id, subject)
                return
            if packet.version == 2:
                conn.by_id[number] = new
            else:
                conn.by_subject[subject] = new
        self._acknowledge(conn, packet, 0)

    def _unsubscribe(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if packet.version == 1:
            conn.by_subject.pop(fields["Subject"], None)
        elif conn.by_id.pop(fields["SubscriptionId"], None) is None:
            self._error(conn, "UNKNOWN_SUBSCRIPTION", fields["TaskId"])
            return
        self._acknowledge(conn, packet, 0)

    def _acknowledge(self, conn: _Conn, packet: Packet, receivers: int, unordered: int = 0) -> None:
        task_id = packet.fields["TaskId"]
        if task_id == "":
            return
        if packet.object_id == PUBLISH and packet.fields.get("Flags", 0) & CONFIRM:
            fields = {"TaskId": task_id, "Receivers": receivers, "Dropped": 0}
            self._send(conn, RECEIPT, fields, unordered=unordered)
        else:
            self._respond(conn, task_id, SUCCESS, unordered=unordered)

    # -- events

    def _matching(self, subject: str, skip: int = 0) -> tuple[list[int], dict[str, list[Target]], list[Target]]:
        """Connections with a plain subscription, members by group, responders."""
        tokens = subject.split(".")
        plain: list[int] = []
        groups: dict[str, list[Target]] = {}
        responders: list[Target] = []
        for conn in self.conns.values():
            if conn.id == skip:
                continue
            for subs in (conn.by_subject, conn.by_id):
                for sub in subs.values():
                    if not matches(sub.tokens, tokens):
                        continue
                    if sub.responder:
                        responders.append((conn.id, sub.id))
                    elif sub.group:
                        groups.setdefault(sub.group, []).append((conn.id, sub.id))
                    elif conn.id not in plain:
                        plain.append(conn.id)
        return plain, groups, responders

    def _deliver(
        self,
        target: Target,
        source: _Conn,
        packet: Packet,
        task_id: Any,
        flags: int = 0,
        deadline_ms: int = 0,
        one_of: Sequence[Target] = (),
    ) -> None:
        conn, fields = self.conns[target[0]], packet.fields
        new: dict[str, Any] = {"TaskId": task_id, "Subject": fields["Subject"], "Buffer": fields["Buffer"]}
        more: dict[str, Any] = {"time": packet.time, "unordered": self._burst, "one_of": tuple(one_of)}
        if conn.dialect == EVBUS_2:
            new.update(Flags=flags, Codec=fields.get("Codec", 0), SubscriptionId=target[1], DeadlineMs=deadline_ms)
            new.update(QueryTaskId="", Headers=fields.get("Headers", b""))
            self._send(conn, DELIVERY, new, 2, system_id=source.id, **more)
        elif conn.dialect in OLD:
            if flags & IS_QUERY:
                new["TaskId"] = FRESH_GUID
            self._send(conn, DELIVERY, new, **more)
        else:
            new["IsQueryRequest"] = bool(flags & IS_QUERY)
            self._send(conn, DELIVERY, new, **more)

    def _checked(self, conn: _Conn, fields: dict[str, Any]) -> bool:
        if not valid_subject(fields["Subject"], pattern=False):
            self._error(conn, "INVALID_SUBJECT", fields["TaskId"], ANY)
        elif len(fields["Buffer"]) > self.limits.payload:
            self._error(conn, "PAYLOAD_TOO_LARGE", fields["TaskId"], fields["Subject"])
        else:
            return True
        return False

    def _publish(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if not self._checked(conn, fields):
            return
        answered = fields.get("QueryTaskId", "")
        if not blank(answered):
            query = self.queries.get(answered)
            if query is None or conn.id not in query.waiting or query.subject != fields["Subject"]:
                # Not acknowledged, so a version-1 peer hears nothing: its TaskId is not shown to `_error`.
                task_id = fields["TaskId"] if conn.dialect == EVBUS_2 else ""
                self._error(conn, "UNKNOWN_QUERY", task_id, fields["Subject"])
                return
            self._answer(query, conn, packet)
            self._acknowledge(conn, packet, 1, self._burst + 1)
            return
        if conn.dialect in OLD:
            for query in self.queries.values():
                if conn.id in query.waiting and query.subject == fields["Subject"]:
                    self._answer(query, conn, packet)
                    return
        skip = conn.id if fields.get("Flags", 0) & NO_ECHO else 0
        plain, groups, _ = self._matching(fields["Subject"], skip)
        for number in plain:
            self._deliver((number, 0), conn, packet, fields["TaskId"])
        for group, members in groups.items():
            index = self.chooser.choose(self, "group " + group, members, fields) or 0
            self._deliver(members[index], conn, packet, fields["TaskId"], one_of=members)
        self._acknowledge(conn, packet, len(plain) + len(groups))

    # -- queries

    def _query(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        task_id, subject = fields["TaskId"], fields["Subject"]
        if blank(task_id):
            raise Malformed("a query without an id", task_id)
        if not self._checked(conn, fields):
            return
        mine = [query for query in self.queries.values() if query.asker == conn.id]
        if any(query.task_id == task_id for query in mine):
            self._error(conn, "DUPLICATE_ID", task_id, subject)
            return
        if len(mine) >= self.limits.queries:
            self._error(conn, "TOO_MANY_QUERIES", task_id, subject)
            return
        to_all = bool(fields.get("Flags", 0) & ALL)
        targets = self._query_targets(subject, to_all, fields)
        if not targets:
            self._error(conn, "NO_RESPONDERS", task_id, subject)
            return
        number = task_id
        if number in self.queries:
            while number in self.queries:
                self._own_ids += 1
                number = f"evbus-{self._own_ids}"
            number = self.chooser.query_id(self, number, [target for target, _ in targets], fields)
        wish = fields.get("DeadlineMs", 0)
        deadline_ms = 30000 if wish <= 0 else min(wish, 60000)
        waiting = {target[0] for target, _ in targets}
        query = _Query(number, conn.id, task_id, subject, to_all, self.now + deadline_ms / 1000, waiting, len(waiting))
        self.queries[number] = query
        for target, one_of in targets:
            self._deliver(target, conn, packet, number, IS_QUERY, deadline_ms, one_of)

    def _query_targets(self, subject: str, to_all: bool, fields: dict[str, Any]) -> list[tuple[Target, list[Target]]]:
        """Who is asked: (target, the targets it was chosen from). A connection is asked at most once."""
        plain, groups, responders = self._matching(subject)
        chosen: list[tuple[Target, list[Target]]] = []
        if responders and not to_all:
            index = self.chooser.choose(self, "responders " + subject, responders, fields) or 0
            return [(responders[index], responders)]
        if responders:
            by_conn: dict[int, list[Target]] = {}
            for target in responders:
                by_conn.setdefault(target[0], []).append(target)
            for number, own in by_conn.items():
                index = (self.chooser.choose(self, f"own {number}", own, fields) or 0) if len(own) > 1 else 0
                chosen.append((own[index], own if len(own) > 1 else []))
            return chosen
        if plain:
            return [((number, 0), []) for number in plain]
        # A group may have chosen a member on a connection that another group had asked before it, and so ask nobody:
        # for a Follower that is a group for which it finds no delivery, so those come last.
        asked: set[int] = set()
        picks = [
            (self.chooser.choose(self, "group " + name, members, fields), members) for name, members in groups.items()
        ]
        for picked, members in sorted(picks, key=lambda pick: pick[0] is None):
            target = members[picked or 0]
            if target[0] in asked or (picked is None and any(member[0] in asked for member in members)):
                continue
            asked.add(target[0])
            chosen.append((target, members))
        return chosen

    def _answer(self, query: _Query, answerer: _Conn, packet: Packet) -> None:
        query.waiting.discard(answerer.id)
        query.replies += 1
        self._deliver((query.asker, 0), answerer, packet, query.task_id, IS_ANSWER)
        self._settled(query)

    def _settled(self, query: _Query) -> None:
        if not query.all:
            del self.queries[query.id]
        elif not query.waiting:
            self._end(query, COMPLETE)

    def _end(self, query: _Query, reason: int) -> None:
        """No further answer can come."""
        del self.queries[query.id]
        asker = self.conns[query.asker]
        if query.all and reason != DEADLINE:
            reason = COMPLETE if query.replies == query.asked else LOST
        if asker.dialect == EVBUS_2:
            fields = {"TaskId": query.task_id, "Reason": reason, "Replies": query.replies}
            self._send(asker, QUERY_END, fields, unordered=self._burst + 1)
        elif reason == LOST:
            self._respond(asker, query.task_id, FAIL, SOME_TEXT, unordered=self._burst + 1)

    def _failure(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        query = self.queries.get(fields["TaskId"])
        if query is None or conn.id not in query.waiting:
            self.counts["UNKNOWN_QUERY"] += 1
            return
        query.waiting.remove(conn.id)
        if not query.all and query.waiting:
            return  # others may still answer
        query.replies += 1
        asker = self.conns[query.asker]
        if asker.dialect == EVBUS_2:
            new = {**fields, "TaskId": query.task_id}
            self._send(asker, ERROR, new, system_id=conn.id)
        else:
            self._respond(asker, query.task_id, FAIL, SOME_TEXT)
        self._settled(query)

    def _cancel(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        for query in list(self.queries.values()):
            if query.asker == conn.id and query.task_id == fields["TaskId"]:
                del self.queries[query.id]
                return
        self.counts["UNKNOWN_QUERY"] += 1

    def _credit(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        """Nothing is subscribed with credit yet."""


_HANDLERS: dict[tuple[int, int], Callable[[ReferenceBroker, _Conn, Packet, dict[str, Any]], None]] = {
    (HANDSHAKE, 1): ReferenceBroker._handshake_again,
    (SUBSCRIBE, 1): ReferenceBroker._subscribe,
    (SUBSCRIBE, 2): ReferenceBroker._subscribe,
    (UNSUBSCRIBE, 1): ReferenceBroker._unsubscribe,
    (UNSUBSCRIBE, 2): ReferenceBroker._unsubscribe,
    (PUBLISH, 1): ReferenceBroker._publish,
    (PUBLISH, 2): ReferenceBroker._publish,
    (QUERY, 1): ReferenceBroker._query,
    (QUERY, 2): ReferenceBroker._query,
    (HEARTBEAT, 1): ReferenceBroker._heartbeat,
    (HEARTBEAT_OLD, 1): ReferenceBroker._heartbeat,
    (ERROR, 1): ReferenceBroker._failure,
    (CANCEL_QUERY, 1): ReferenceBroker._cancel,
    (CREDIT, 1): ReferenceBroker._credit,
}


def announced(announcement: str) -> dict[str, Any] | None:
    """The facts in a fourth string, or None if it is no announcement that can be used (section 5)."""
    if not announcement.startswith(ANNOUNCEMENT):
        return None
    try:
        facts: dict[str, Any] = json.loads(raw(announcement[len(ANNOUNCEMENT) :]).decode("utf-8"))
        low, high = facts["versions"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return facts if type(low) is int and type(high) is int and low <= high else None
