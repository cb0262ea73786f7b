"""What was published while there was no connection, and waits for the next one."""

from __future__ import annotations

from evbus.correlation import Kept, Sending
from evbus.errors import BufferFullError

__all__ = ["Backlog"]

# What a message takes besides its payload and headers.
_OVERHEAD_BYTES = 64


class Backlog:
    """Messages in the order in which they were published. Not safe for threads: its owner has the lock.

    Args:
        limit_bytes: for all of them together; 0: nothing is kept.

    Attributes:
        size: the bytes that they take, with an allowance for each message.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.size = 0
        self._limit = limit_bytes
        self._kept: list[Kept] = []

    def add(self, sending: Sending) -> bool:
        """Keep a message. Returns False if nothing is kept here at all.

        Raises:
            BufferFullError: there is no more room.
        """
        if not self._limit:
            return False
        kept = sending.kept()
        cost = sum(len(field) for field in kept[:3]) + _OVERHEAD_BYTES
        if self.size + cost > self._limit:
            raise BufferFullError(self.size, self._limit)
        self.size += cost
        self._kept.append(kept)
        return True

    def take(self) -> list[Kept]:
        """All of them; none is kept any more."""
        kept, self._kept = self._kept, []
        self.size = 0
        return kept
