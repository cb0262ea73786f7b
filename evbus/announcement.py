"""The announcement: what an evbus client and an evbus server say of themselves in the strings that C# peers do not
read.

A client's fourth handshake string, and the Message of a server's answer to it, are `wire.ANNOUNCEMENT_PREFIX` and one
JSON object. Unknown keys are ignored on both sides, so that either can say more later.
"""

from __future__ import annotations

from typing import Final

import msgspec

from evbus import wire
from evbus._version import __version__
from evbus.limits import Limits

__all__ = ["FEATURES", "HEARTBEAT_RANGE_S", "ClientAnnouncement", "read_client_announcement", "server_announcement"]

#: A protocol feature per name; a peer uses only what the other side names too.
FEATURES: Final = ("headers", "receipt", "gap", "goaway", "query_end", "cancel", "error", "drop_newest", "credit")

#: Bounds of the heartbeat interval that a client may announce, in seconds.
HEARTBEAT_RANGE_S: Final = (0.05, 3600.0)


#: Of a client that says none, in seconds.
DEFAULT_HEARTBEAT_S: Final = 5.0


class ClientAnnouncement(msgspec.Struct):
    """What an evbus client says about itself."""

    versions: tuple[int, int]
    """Lowest and highest protocol version."""
    name: object = ""
    heartbeat: object = DEFAULT_HEARTBEAT_S
    """Seconds between its heartbeats."""

    @property
    def label(self) -> str:
        """Its name as operators see it."""
        return self.name[:128] if isinstance(self.name, str) else ""

    @property
    def heartbeat_s(self) -> float:
        """The interval in force: its wish, brought into the range; the default if that is no number above 0."""
        wish = self.heartbeat
        if isinstance(wish, bool) or not isinstance(wish, (int, float)) or not wish > 0:
            return DEFAULT_HEARTBEAT_S
        return float(min(max(wish, HEARTBEAT_RANGE_S[0]), HEARTBEAT_RANGE_S[1]))


def read_client_announcement(text: bytes) -> ClientAnnouncement | None:
    """The announcement in a handshake's fourth string; None for anything else: a version-1 peer."""
    prefix = wire.ANNOUNCEMENT_PREFIX.encode()
    if not text.startswith(prefix):
        return None
    try:
        found = msgspec.json.decode(text[len(prefix) :], type=ClientAnnouncement)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # Whatever else it gets wrong, it is an evbus client if it can say which versions it speaks.
    return found if found.versions[0] <= found.versions[1] else None


def server_announcement(limits: Limits, connection: int, heartbeat_s: float) -> str:
    """The Message of a server's answer to a client that announced itself."""
    facts = {
        "version": wire.PROTOCOL_VERSION_MAX,
        "server": f"evbus {__version__}",
        "connection": connection,
        "heartbeat": heartbeat_s,
        "limits": {
            "payload": limits.payload_bytes,
            "packet": limits.packet_bytes,
            "subject": wire.MAX_SUBJECT_BYTES,
            "tokens": wire.MAX_SUBJECT_TOKENS,
            "subscriptions": limits.subscriptions_per_connection,
            "queries": limits.queries_per_connection,
        },
        "features": FEATURES,
    }
    return wire.ANNOUNCEMENT_PREFIX + msgspec.json.encode(facts).decode()
