"""The wire: packet layouts, object ids, field tables and codes. The one normative place.

Everything that travels between a client and a server is a *packet*: a header and a body, both little-endian. Two header
layouts exist; which one a connection uses is decided once, from the first 14 bytes of the stream (`docs/protocol.md`,
"Which layout"), and holds for the connection's life in both directions::

    offset  23-byte header            22-byte header
    0       i32 PackSize              i32 PackSize            whole packet, header included
    4       i64 SystemId              i64 SystemId
    12      u16 ObjectId              u8  ObjectId
    14      u8  ObjectVersion         u8  ObjectVersion (at 13)
    15      i64 UnixTimeMilliseconds  i64 UnixTimeMilliseconds (at 14)
    23      body                      body (at 22)

A body is its fields in order with nothing between them. `string` is an unsigned LEB128 byte length followed by UTF-8;
`bytes` is an i32 count followed by the bytes. The tables `BODIES_V1` and `BODIES_V2` below say which fields each object
has. `_frame.pxd` repeats the numbers for the compiler; a test holds the two files against each other.

Version 1 of objects 1 to 6, 199, 254 and 255 is the protocol of the C# library CodeWF.EventBus.Socket. Version 2 and
the objects from 1000 up are evbus's own and are sent only to a peer that announced itself (`ANNOUNCEMENT_PREFIX`).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "ANNOUNCEMENT_PREFIX",
    "BODIES_V1",
    "BODIES_V2",
    "FILETIME_EPOCH_MS",
    "HANDLER_FAILED",
    "HEADER_BYTES_22",
    "HEADER_BYTES_23",
    "MAX_CLIENT_ID_BYTES",
    "MAX_GROUP_BYTES",
    "MAX_HEADERS_BYTES",
    "MAX_PACKET_CEILING_BYTES",
    "MAX_PAYLOAD_CEILING_BYTES",
    "MAX_SUBJECT_BYTES",
    "MAX_SUBJECT_TOKENS",
    "MAX_TASK_ID_BYTES",
    "MAX_TOKEN_BYTES",
    "PACKET_OVERHEAD_BYTES",
    "PROTOCOL_VERSION_MAX",
    "PROTOCOL_VERSION_MIN",
    "TICKS_EPOCH_MS",
    "CloseReason",
    "Codec",
    "Dialect",
    "EndReason",
    "ErrorCode",
    "Flag",
    "GapReason",
    "ObjectId",
    "Overflow",
    "Role",
    "Status",
    "dotnet_ticks",
    "filetime",
]

HEADER_BYTES_22 = 22
HEADER_BYTES_23 = 23

#: The fourth string of an evbus client's RequestIsEventServer, and the Message of an evbus server's answer to it, start
#: with this and go on with one JSON object.
ANNOUNCEMENT_PREFIX = "evbus/1 "

#: Protocol versions this library speaks. 1 is the C# library's protocol and needs no announcement.
PROTOCOL_VERSION_MIN = 2
PROTOCOL_VERSION_MAX = 2

# Sizes of fields, in bytes of UTF-8. They bound what a peer can make the other side keep per packet.
MAX_SUBJECT_BYTES = 256
MAX_SUBJECT_TOKENS = 32
MAX_TASK_ID_BYTES = 128
MAX_CLIENT_ID_BYTES = 128
MAX_TOKEN_BYTES = 1024
MAX_GROUP_BYTES = 128
MAX_HEADERS_BYTES = 16 * 1024
#: A packet may exceed the payload limit by this much: header, ids, subject and headers.
PACKET_OVERHEAD_BYTES = 64 * 1024
#: CodeWF.NetWeaver from 2.1.2.1 on refuses a PackSize above 64 MiB, so no server may be configured to send more.
MAX_PACKET_CEILING_BYTES = 64 * 1024 * 1024
MAX_PAYLOAD_CEILING_BYTES = MAX_PACKET_CEILING_BYTES - PACKET_OVERHEAD_BYTES

#: Code of the Error that a responder sends when its handler raised (HTTP's "internal error").
HANDLER_FAILED = 500

# Milliseconds from each epoch to 1970-01-01, for the SystemIds that C# peers put into headers.
FILETIME_EPOCH_MS = 11_644_473_600_000  # from 1601-01-01
TICKS_EPOCH_MS = 62_135_596_800_000  # from 0001-01-01


class ObjectId(IntEnum):
    """What a packet is. Ids 193 to 211, 254 and 255 belong to the C# libraries; evbus's own start at 1000."""

    HANDSHAKE = 1  # RequestIsEventServer
    SUBSCRIBE = 2  # RequestSubscribe
    UNSUBSCRIBE = 3  # RequestUnsubscribe
    PUBLISH = 4  # RequestPublish; with a QueryTaskId it is an answer
    DELIVERY = 5  # UpdateEvent
    QUERY = 6  # RequestQuery
    HEARTBEAT = 199
    RESPONSE = 254  # ResponseCommon
    HEARTBEAT_OLD = 255
    ERROR = 1000
    GO_AWAY = 1001
    GAP = 1002
    RECEIPT = 1003
    CANCEL_QUERY = 1004
    QUERY_END = 1005
    CREDIT = 1006


class Status(IntEnum):
    """Status of a ResponseCommon."""

    WAIT = 0
    SUCCESS = 1
    FAIL = 2


class Dialect(IntEnum):
    """How the bodies of one connection look; decided by its handshake. Fan-out encodes a delivery once per dialect."""

    UNKNOWN = 0
    H22 = 1  # 22-byte header; EventBus.Socket 0.1.0 to 0.2.1.1
    H23_255 = 2  # 23-byte header, bodies as in H22; 0.2.2.0 to 1.1.0
    H23_199 = 3  # QueryTaskId and IsQueryRequest; 1.2.0 and later
    EVBUS_2 = 4  # announced evbus peer, protocol version 2


class Flag(IntFlag):
    """Flags of a version-2 envelope (publish, query, answer, delivery)."""

    CONFIRM = 1  # publish: answer with a Receipt
    NO_ECHO = 2  # publish: not to the publisher's own subscriptions
    ALL = 4  # query: ask every responder, end with QueryEnd
    QUERY = 8  # delivery: this is a query, an answer is expected
    ANSWER = 16  # delivery: this answers the query named by TaskId


class Role(IntEnum):
    """Role of a version-2 subscription."""

    SUBSCRIBER = 0  # gets events; queries too, where nobody subscribed as responder
    RESPONDER = 1  # gets queries only, one responder per query


class Overflow(IntEnum):
    """What the server does when a version-2 subscription's connection is over its limit of pending bytes."""

    CLOSE = 0
    DROP_NEWEST = 1
    BLOCK = 2


class Codec(IntEnum):
    """How the payload of a version-2 envelope is encoded. Version 1 has no such field and counts as UNKNOWN."""

    UNKNOWN = 0
    BYTES = 1
    TEXT = 2
    MSGPACK = 3
    JSON = 4
    NETWEAVER = 5


class ErrorCode(IntEnum):
    """Codes of an Error that the server itself sends (its SystemId is 0). Stable: numbers are never reused.

    An Error with another SystemId was made by the responder of that connection id; its code is the application's.
    """

    MALFORMED = 1
    INVALID_SUBJECT = 2
    PAYLOAD_TOO_LARGE = 3
    PERMISSION_DENIED = 4
    NO_RESPONDERS = 5
    RESPONDER_LOST = 6
    QUERY_TIMEOUT = 7
    TOO_MANY_SUBSCRIPTIONS = 8
    TOO_MANY_QUERIES = 9
    DUPLICATE_ID = 10
    UNKNOWN_SUBSCRIPTION = 11
    UNKNOWN_QUERY = 12
    DRAINING = 13
    UNSUPPORTED = 14


class EndReason(IntEnum):
    """Why a query ended without a further answer (QueryEnd)."""

    COMPLETE = 0  # every responder asked has replied (query_all)
    RESPONDER_LOST = 1
    DEADLINE = 2
    CANCELLED = 3


class GapReason(IntEnum):
    """Why messages are missing (Gap)."""

    OVERFLOW = 1
    RECONNECT = 2


class CloseReason(IntEnum):
    """Why a server closed a connection: counted per reason, and sent in GoAway where the peer can still read it."""

    CLIENT_CLOSED = 1  # orderly end of stream
    CONNECTION_LOST = 2  # reset or another error of the socket
    HANDSHAKE_TIMEOUT = 3
    NOT_EVENT_BUS = 4  # the first bytes are no event bus packet
    UNSUPPORTED_DIALECT = 5  # the int dialects of 2024-07, or no common protocol version
    PACKET_TOO_LARGE = 6
    PROTOCOL_ERROR = 7  # a PackSize below the header
    STALE = 8  # silent for longer than its heartbeats allow
    SLOW_CONSUMER = 9  # pending bytes over the hard limit
    SLOW_CONSUMER_SOFT = 10  # pending bytes over the soft limit for too long
    WRITE_TIMEOUT = 11  # took no byte for too long while data waited
    TOO_MANY_CONNECTIONS = 12
    SERVER_SHUTDOWN = 13
    INTERNAL_ERROR = 14
    TOO_MANY_HANDSHAKES = 15
    AUTH_FAILED = 16


_Field = tuple[str, str]

#: Version 1, by dialect group. "22/255" are H22 and H23_255, "199" is H23_199. Types: string, bytes, u8, bool, i32.
#: HANDSHAKE may carry up to three further strings: AuthenticationToken, ClientId, Announcement.
BODIES_V1: dict[tuple[ObjectId, str], tuple[_Field, ...]] = {
    (ObjectId.HANDSHAKE, "*"): (("TaskId", "string"),),
    (ObjectId.SUBSCRIBE, "*"): (("TaskId", "string"), ("Subject", "string")),
    (ObjectId.UNSUBSCRIBE, "*"): (("TaskId", "string"), ("Subject", "string")),
    (ObjectId.PUBLISH, "22/255"): (("TaskId", "string"), ("Subject", "string"), ("Buffer", "bytes")),
    (ObjectId.PUBLISH, "199"): (
        ("TaskId", "string"),
        ("Subject", "string"),
        ("QueryTaskId", "string"),
        ("Buffer", "bytes"),
    ),
    (ObjectId.DELIVERY, "22/255"): (("TaskId", "string"), ("Subject", "string"), ("Buffer", "bytes")),
    (ObjectId.DELIVERY, "199"): (
        ("TaskId", "string"),
        ("Subject", "string"),
        ("IsQueryRequest", "bool"),
        ("Buffer", "bytes"),
    ),
    (ObjectId.QUERY, "*"): (("TaskId", "string"), ("Subject", "string"), ("Buffer", "bytes")),
    (ObjectId.RESPONSE, "*"): (("TaskId", "string"), ("Status", "u8"), ("Message", "string")),
    (ObjectId.HEARTBEAT_OLD, "*"): (),
    (ObjectId.HEARTBEAT, "*"): (("TaskId", "i32"),),
}

#: The one body of version 2 of PUBLISH, QUERY and DELIVERY. The fixed fields come first and the layout is the same in
#: both directions, so that a server turns a publish into its delivery by patching 24 bytes in place.
_ENVELOPE: tuple[_Field, ...] = (
    ("Flags", "u8"),
    ("Codec", "u8"),
    ("SubscriptionId", "i32"),  # delivery to a group member or responder; else 0
    ("DeadlineMs", "i32"),  # query: time left; else 0
    ("TaskId", "string"),
    ("Subject", "string"),
    ("QueryTaskId", "string"),  # publish: the query that this answers; else empty
    ("Headers", "bytes"),  # key string, value string, repeated to the end
    ("Buffer", "bytes"),  # must end the packet
)

#: Version 2 of the old objects and version 1 of the new ones (from 1000 up).
BODIES_V2: dict[ObjectId, tuple[_Field, ...]] = {
    ObjectId.SUBSCRIBE: (
        ("TaskId", "string"),
        ("Subject", "string"),
        ("SubscriptionId", "i32"),
        ("Role", "u8"),
        ("Overflow", "u8"),
        ("Group", "string"),
    ),
    ObjectId.UNSUBSCRIBE: (("TaskId", "string"), ("SubscriptionId", "i32")),
    ObjectId.PUBLISH: _ENVELOPE,
    ObjectId.DELIVERY: _ENVELOPE,
    ObjectId.QUERY: _ENVELOPE,
    ObjectId.ERROR: (("TaskId", "string"), ("Code", "i32"), ("Subject", "string"), ("Text", "string")),
    ObjectId.GO_AWAY: (("Reason", "i32"), ("RetryAfterMs", "i32"), ("Text", "string")),
    ObjectId.GAP: (("SubscriptionId", "i32"), ("Count", "i64"), ("Reason", "u8")),
    ObjectId.RECEIPT: (("TaskId", "string"), ("Receivers", "i32"), ("Dropped", "i32")),
    ObjectId.CANCEL_QUERY: (("TaskId", "string"),),
    ObjectId.QUERY_END: (("TaskId", "string"), ("Reason", "u8"), ("Replies", "i32")),
    ObjectId.CREDIT: (("SubscriptionId", "i32"), ("Msgs", "i32")),
}


def filetime(unix_ms: int) -> int:
    """The Windows FILETIME (100 ns since 1601-01-01 UTC) of a Unix time in milliseconds: SystemId of servers up to
    1.1.
    """
    return (unix_ms + FILETIME_EPOCH_MS) * 10_000


def dotnet_ticks(unix_ms: int) -> int:
    """The .NET ticks (100 ns since 0001-01-01) of a Unix time in milliseconds: SystemId of servers from 1.2 on."""
    return (unix_ms + TICKS_EPOCH_MS) * 10_000
