"""The shared codec: ring buffers, packets, body fields and subject rules. How it works is in `_frame.pyx`.

Nothing here locks: a ring, and a pool with all its rings, belong to one thread at a time.
"""

from typing import Any

from typing_extensions import Buffer, Self, disjoint_base

READ_BYTES: int
"""One read of a transport takes at most so many bytes."""

@disjoint_base
class RingPool:
    """Blocks of memory that rings of one thread share.

    Args:
        keep_bytes: how much free memory the pool keeps for reuse; the rest goes back to the system.
    """

    def __new__(cls, keep_bytes: int = ...) -> Self: ...
    @property
    def held_bytes(self) -> int:
        """Bytes of blocks that rings hold now."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of free blocks kept for reuse."""

@disjoint_base
class Ring:
    """A byte queue over a pooled block of memory.

    Args:
        pool: where blocks come from; None takes them from the system.
    """

    def __new__(cls, pool: RingPool | None = ...) -> Self: ...
    def __len__(self) -> int:
        """Bytes queued, lent ones included."""

    @property
    def capacity(self) -> int:
        """Bytes of the block held now; 0 when none is."""

    def write(self, data: Buffer) -> None:
        """Append bytes (any contiguous buffer). Raises MemoryError when they find no room; nothing is then written."""

    def peek(self, size: int = -1) -> bytes:
        """A copy of the first `size` bytes queued (all of them by default; fewer if there are fewer)."""

    def take(self, size: int = -1) -> bytes:
        """Remove and return the first `size` bytes queued (all of them by default; fewer if there are fewer)."""

    def clear(self) -> None:
        """Drop all bytes and give the block back."""

    def fit(self) -> None:
        """Give the block back, or trade it for a small one when little is left in it."""

    def make_room(self, limit: int) -> int:
        """Prepare for a read, as the transports do; returns the bytes that can be read now."""

def subject_fault(fault: int) -> str:
    """The words for a result of the subject check."""

def check_subject(subject: str | bytes, pattern: bool = False) -> bytes:
    """Validate a subject; return its UTF-8 bytes.

    Args:
        subject: text, or UTF-8 bytes.
        pattern: whether the wildcards `*` and `>` are allowed (they are in subscriptions only).

    Raises:
        InvalidSubjectError: says which rule it breaks.
        TypeError: neither str nor bytes.
    """

def subject_is_valid(subject: bytes, pattern: bool = False) -> bool:
    """Whether UTF-8 bytes are a valid subject, or pattern if those are allowed."""

def has_wildcard(subject: bytes) -> bool:
    """Whether a valid subject is a pattern."""

def pack(
    header: int, object_id: int, version: int, system_id: int, unix_ms: int, layout: str, *values: str | bytes | int
) -> bytes:
    """Encode one packet.

    Args:
        header: 22 or 23, the header layout of the connection.
        object_id: of the header.
        version: of the header.
        system_id: of the header.
        unix_ms: of the header.
        layout: one character per field: `s` string, `y` bytes, `B` u8, `i` i32, `q` i64.
        values: the fields in wire order; strings as str or UTF-8 bytes.

    Raises:
        ValueError, TypeError, OverflowError: a value does not fit its field.
    """

def pack_raw(header: int, object_id: int, version: int, system_id: int, unix_ms: int, body: bytes) -> bytes:
    """Encode one packet around a body that is already encoded; otherwise as `pack`."""

def unpack(body: bytes, layout: str, exact: bool = False) -> tuple[Any, ...] | None:
    """Decode the fields of a body; bytes after the last one are ignored unless `exact`.

    Strings are decoded with U+FFFD for broken parts, as the C# readers do; where bytes matter (subjects), use `b`, a
    string left as bytes. Other field types as in `pack`. Returns a tuple, or None if the body is too short or not well
    formed.
    """

def unpack_strings(body: bytes, at_most: int) -> list[bytes] | None:
    """Up to `at_most` strings of a body, as bytes; what follows them is ignored.

    None if there is none, or one of them is not well formed.
    """

def pack_headers(headers: dict[str, str]) -> bytes:
    """Encode message headers (str to str) for an envelope. Raises ValueError over the limit or for an empty key."""

def unpack_headers(data: bytes) -> dict[str, str] | None:
    """Decode message headers; None if they are not well formed."""

def detect_layout(ring: Ring, limit: int) -> int:
    """Header layout of a fresh stream: 22 or 23; 0: more bytes are needed; -1: refuse; -2: PackSize is over the limit."""

def next_packet(ring: Ring, header: int, limit: int) -> tuple[int, int, int, int, bytes] | None:
    """Take the next complete packet from a ring.

    Returns:
        (object_id, version, system_id, unix_ms, body), or None while the packet is incomplete.

    Raises:
        ProtocolError: PackSize is below the header or above `limit`; the stream cannot be read any further.
    """

def constants() -> dict[str, int | dict[str, int]]:
    """The numbers of `_frame.pxd` by their name in `wire`, for the test that holds the two files together."""
