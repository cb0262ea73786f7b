"""The client's half of the handshake: what it says of itself, and what it makes of the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from evbus._frame import pack
from evbus._version import __version__
from evbus.announcement import FEATURES, HEARTBEAT_RANGE_S
from evbus.errors import AuthError, NotEventServerError
from evbus.options import SessionOptions
from evbus.wire import (
    ANNOUNCEMENT_PREFIX,
    HEADER_BYTES_23,
    MAX_PACKET_CEILING_BYTES,
    MAX_PAYLOAD_CEILING_BYTES,
    PACKET_OVERHEAD_BYTES,
    PROTOCOL_VERSION_MAX,
    PROTOCOL_VERSION_MIN,
    Dialect,
    ObjectId,
    Status,
)

__all__ = ["HANDSHAKE_PACKET_BYTES", "ServerFacts", "handshake_packet", "read_answer"]

#: Largest packet that is taken from a server that has not answered the handshake yet.
HANDSHAKE_PACKET_BYTES = 64 * 1024

# The SystemId of a C# server counts from another epoch since 1.2.0: .NET ticks, where it was a FILETIME before. This is
# the year 1601 in ticks, and the year 3200 as a FILETIME.
_FIRST_TICKS = 504_911_232_000_000_000
# What C# servers from 1.4.0 on take; earlier ones have no limit but the packet's.
_DEFAULT_PAYLOAD_BYTES = 1 << 20


@dataclass(frozen=True)
class ServerFacts:
    """What a server told of itself."""

    dialect: Dialect
    """EVBUS_2, or H23_199 for one that did not announce itself."""
    server: str = ""
    """Its name and version, in its own words."""
    connection: int = 0
    """Our connection's id there; 0 if it does not tell."""
    heartbeat_s: float | None = None
    """How often it wants to hear from us; None if it does not tell."""
    payload_bytes: int = _DEFAULT_PAYLOAD_BYTES
    packet_bytes: int = MAX_PACKET_CEILING_BYTES
    features: frozenset[str] = frozenset()


def handshake_packet(task_id: bytes, options: SessionOptions, client_id: str, unix_ms: int) -> bytes:
    """The first packet of a connection.

    It has the three strings that C# servers read, and a fourth that announces us to an evbus server. Its SystemId must
    be
    0: that tells a server that our bodies are those of version 1.2.0 and later.
    """
    facts = {
        "versions": [PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX],
        "name": options.name,
        "client": f"evbus-python {__version__}",
        "heartbeat": options.heartbeat_s,
        "features": FEATURES,
    }
    announcement = ANNOUNCEMENT_PREFIX + json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return pack(
        HEADER_BYTES_23, ObjectId.HANDSHAKE, 1, 0, unix_ms, "ssss", task_id, options.token, client_id, announcement
    )


def read_answer(address: str, system_id: int, status: int, text: str) -> ServerFacts:
    """What a server's answer to the handshake says.

    Args:
        address: the server's, for the words of errors.
        system_id, status, text: of its ResponseCommon.

    Raises:
        AuthError: it refused us.
        NotEventServerError: it is none, or one that we have no common language with.
    """
    if status == Status.FAIL:
        if "protocol version" in text:  # how an evbus server says that there is no common one
            raise NotEventServerError(address, text[:1024])
        raise AuthError(address, text[:1024])
    if status != Status.SUCCESS:
        raise NotEventServerError(address, f"it answered the handshake with status {status}")
    if not text.startswith(ANNOUNCEMENT_PREFIX):
        if system_id < _FIRST_TICKS:
            raise NotEventServerError(
                address, "it speaks the dialect of CodeWF.EventBus.Socket before 1.2, which this client does not"
            )
        return ServerFacts(Dialect.H23_199)
    try:
        facts = json.loads(text[len(ANNOUNCEMENT_PREFIX) :])
    except (ValueError, RecursionError) as exc:
        raise NotEventServerError(address, "its announcement is not readable") from exc
    if not isinstance(facts, dict) or not _whole(facts.get("version"), PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX):
        raise NotEventServerError(address, "it speaks another version of the protocol; update evbus on the older side")
    limits = facts.get("limits")
    if not isinstance(limits, dict):
        limits = {}
    payload = _whole(limits.get("payload"), 1, MAX_PAYLOAD_CEILING_BYTES) or _DEFAULT_PAYLOAD_BYTES
    features = facts.get("features")
    heartbeat = facts.get("heartbeat")
    server = facts.get("server")
    return ServerFacts(
        Dialect.EVBUS_2,
        server=server[:200] if isinstance(server, str) else "",
        connection=_whole(facts.get("connection"), 1, 2**63 - 1),
        heartbeat_s=heartbeat
        if isinstance(heartbeat, (int, float)) and HEARTBEAT_RANGE_S[0] <= heartbeat <= HEARTBEAT_RANGE_S[1]
        else None,
        payload_bytes=payload,
        packet_bytes=_whole(limits.get("packet"), payload, MAX_PACKET_CEILING_BYTES) or payload + PACKET_OVERHEAD_BYTES,
        features=frozenset(name for name in features if isinstance(name, str))
        if isinstance(features, list)
        else frozenset(),
    )


def _whole(value: object, lowest: int, highest: int) -> int:
    """The value if it is a whole number within the bounds, else 0. Nothing a server says is taken on trust."""
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return value
    return 0
