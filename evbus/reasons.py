"""Why connections end, in words: for logs, and for the GoAway that tells the peer."""

from __future__ import annotations

from typing import Final

from evbus.wire import CloseReason

__all__ = ["NOTEWORTHY", "WORDS"]

#: Close reasons that are news to whoever runs the server; the others are the normal course of things.
NOTEWORTHY: Final = frozenset(CloseReason) - {
    CloseReason.CLIENT_CLOSED,
    CloseReason.CONNECTION_LOST,
    CloseReason.SERVER_SHUTDOWN,
}

WORDS: Final[dict[CloseReason, str]] = {
    CloseReason.CLIENT_CLOSED: "the peer closed it",
    CloseReason.CONNECTION_LOST: "the connection was lost",
    CloseReason.HANDSHAKE_TIMEOUT: "no handshake in time",
    CloseReason.NOT_EVENT_BUS: "it does not speak this protocol",
    CloseReason.UNSUPPORTED_DIALECT: "it speaks no version of the protocol that this server knows",
    CloseReason.PACKET_TOO_LARGE: "it claimed a packet above the limit",
    CloseReason.PROTOCOL_ERROR: "it claimed a packet shorter than a header",
    CloseReason.STALE: "silent for too long",
    CloseReason.SLOW_CONSUMER: "slow consumer, over the hard limit of pending bytes",
    CloseReason.SLOW_CONSUMER_SOFT: "slow consumer, over the soft limit of pending bytes for too long",
    CloseReason.WRITE_TIMEOUT: "slow consumer, took nothing for too long",
    CloseReason.TOO_MANY_CONNECTIONS: "the limit of connections is reached",
    CloseReason.SERVER_SHUTDOWN: "the server stops",
    CloseReason.INTERNAL_ERROR: "an internal error",
    CloseReason.TOO_MANY_HANDSHAKES: "too many connections without a handshake",
    CloseReason.AUTH_FAILED: "authentication failed",
}
