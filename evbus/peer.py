"""One connection of a server, as its control plane knows it."""

from __future__ import annotations

from evbus._router import Interest, Link
from evbus.wire import Dialect

__all__ = ["Peer"]


class Peer:
    """One connection, as the control plane knows it."""

    __slots__ = (
        "address",
        "connected_at",
        "handshake_text",
        "heard_at",
        "is_ambiguous",
        "link",
        "name",
        "owner",
        "progress_at",
        "silence_s",
        "soft_since",
        "subscriptions",
    )

    def __init__(self, address: str, now: float) -> None:
        self.link: Link
        self.address = address
        self.name = ""
        #: The Message of the answer to its handshake, for the case that it asks again.
        self.handshake_text = ""
        #: Whether its handshake fits two dialects, so that its heartbeat has the last word.
        self.is_ambiguous = False
        #: The owner's object for the connection (its socket and callbacks).
        self.owner: object = None
        self.connected_at = now
        #: When its last byte came.
        self.heard_at = now
        #: When the kernel last took a byte of what waits for it.
        self.progress_at = now
        #: Since when it is over the soft limit of pending bytes; None while it is not.
        self.soft_since: float | None = None
        self.silence_s = 0.0
        #: By subscription id (version 2) or subject (version 1); None until the first, as most peers never subscribe.
        self.subscriptions: dict[int | bytes, Interest] | None = None

    @property
    def is_announced(self) -> bool:
        """Whether it speaks evbus's own objects."""
        return self.link.dialect == Dialect.EVBUS_2

    @property
    def label(self) -> str:
        """Its name and address for a log line: one line, whatever the peer chose as its name."""
        return f"{ascii(self.name)[1:-1]} at {self.address}" if self.name else self.address

    def __repr__(self) -> str:
        return f"<Peer {self.link.id} {self.address}>"
