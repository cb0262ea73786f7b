"""The oracle's codec and subject rules; see `reference`, which passes everything here on.

Written from `docs/protocol.md` (section numbers are that document's). Strings are kept as `str` with `surrogateescape`,
so that bytes which are no UTF-8 survive a round trip; `text()` gives what a reader is shown.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
#: No peer takes a larger PackSize, whatever its configuration.
MAX_PACKET = 64 * 1024 * 1024

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

    def __init__(self, layout: int | None = None, limit: int = MAX_PACKET) -> None:
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
        if self.layout is None and not 22 <= size <= MAX_PACKET:
            return Refuse(CLOSES["NOT_EVENT_BUS"])
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
        if names is _ENVELOPE:
            if cursor.at != len(body):
                raise Malformed("bytes after the envelope")
            decode_headers(fields["Headers"])
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
    """The pairs of a Headers field; `Malformed` if it does not end after a value, is no UTF-8, or has an empty key."""
    cursor, pairs = Cursor(data), []
    while cursor.at < len(data):
        key, value = cursor.string(), cursor.string()
        if key == "" or text(key) != key or text(value) != value:
            raise Malformed("a header")
        pairs.append((key, value))
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
