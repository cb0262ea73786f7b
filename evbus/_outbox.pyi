"""The client's sending side: packets are staged by any thread and sent by one at a time.

See `_outbox.pyx` for how it works.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, final

from typing_extensions import Self, disjoint_base

from evbus._frame import Ring

PACK_OK: int
PACK_FULL: int
PACK_CLOSED: int
PACK_SLOW: int
PACK_YIELD: int
FLUSH_DONE: int
FLUSH_BUSY: int
FLUSH_BLOCKED: int
FLUSH_CLOSED: int

class _Sink(Protocol):
    """The half of a transport that takes bytes."""

    def flush(self, ring: Ring) -> int: ...

@disjoint_base
class Clock:
    """The time that goes into packets; this one stands still unless it is moved. `_clock.SystemClock` is the real one.

    Args:
        unix_ms: milliseconds since 1970; assign the attribute to move the clock.
    """

    unix_ms: int
    def __new__(cls, unix_ms: int = 0) -> Self: ...
    def now_ms(self) -> int:
        """Milliseconds since 1970."""

@final
class Outbox:
    """The bytes that wait to be sent, and the rules for who sends them.

    Args:
        clock: the time for packet headers.
        high_bytes: above this many waiting bytes packing is refused (PACK_FULL), so that the publisher waits.
        low_bytes: at this many or fewer, waiting publishers are told to go on.
        eager_bytes: a packer that has staged this much sends it itself.

    `wake` is called, from any thread, when the I/O thread is to look at `broken`, `is_blocked` and `is_polling`;
    `on_room` when `want_room` said that there was none and now there is. Both must return quickly and must not raise.
    """

    wake: Callable[[], object] | None
    on_room: Callable[[], object] | None
    broken: OSError | None
    packed_msgs: int
    flushed_bytes: int
    flushes: int
    wakes: int

    def __new__(
        cls, clock: Clock, *, high_bytes: int = 4194304, low_bytes: int = 1048576, eager_bytes: int = 65536
    ) -> Outbox: ...
    def attach(self, transport: _Sink) -> None:
        """A fresh connection: from now on control packets may be staged and flushed, messages not yet (`open`)."""

    def open(
        self, dialect: int, payload_limit: int, kept: Iterable[tuple[bytes, bytes, bytes, int, int]] = ()
    ) -> list[tuple[str, int]]:
        """The handshake is done and the subscriptions are staged: let messages in.

        Args:
            dialect: EVBUS_2, or H23_199 for a server that did not announce itself.
            payload_limit: largest payload that the server takes, in bytes.
            kept: messages that waited for this: tuples of the subject's UTF-8, payload, headers, flags and codec. They
                are staged before any other message, however many bytes they are.

        Returns:
            of the kept ones those that were not staged as they are over the limit: tuples of subject and bytes.
        """

    def close(self) -> None:
        """Take no more messages; what is staged can still be flushed, and control packets pass."""

    def drop(self) -> int:
        """Forget the connection and all that waits. Returns the number of bytes that were never sent.

        A flusher may still be inside its system call (`flusher_inside`); the transport must not be closed before it
        left.
        """

    def now_ms(self) -> int:
        """The clock's time, for packets that are encoded elsewhere."""

    @property
    def flusher_inside(self) -> bool:
        """Whether a thread is inside a transport's `flush` right now."""

    @property
    def is_open(self) -> bool:
        """Whether messages can be staged."""

    @property
    def is_blocked(self) -> bool:
        """Whether the kernel took less than it was given, so that the I/O thread waits for it."""

    @property
    def pending_bytes(self) -> int:
        """Bytes staged and not yet taken by the kernel."""

    @property
    def high_bytes(self) -> int:
        """The high watermark."""

    @property
    def payload_limit_bytes(self) -> int:
        """Largest payload that the server takes; 0 before the handshake."""

    def gather(self) -> None:
        """There is one thread only, and `wake` has it flush in its next turn: packets gather until then, urgent ones too."""

    def begin_answering(self) -> None:
        """A handler starts on a query that a publish may answer: until it ends, `pack_event` says PACK_SLOW."""

    def end_answering(self) -> None:
        """The inverse of begin_answering."""

    @property
    def is_answering(self) -> bool:
        """Whether a handler is at work on a query, so that a publish may be its answer."""

    @property
    def is_polling(self) -> bool:
        """Whether packers count on the I/O thread to flush every millisecond. It ends that with `end_polling`."""

    def end_polling(self) -> None:
        """The burst is over, the I/O thread flushes once more and then waits to be woken."""

    def hold(self) -> None:
        """The I/O thread is at work and will flush when it is done: no need to wake it until then."""

    def key(self, subject: str) -> bytes:
        """The UTF-8 of a subject to publish to, validated. Raises InvalidSubjectError."""

    def pack_event(self, subject: str, payload: bytes, codec: int) -> int:
        """Stage a plain event for a server that speaks version 2: no ids, no headers, no acknowledgement.

        Returns PACK_OK, PACK_FULL, or PACK_SLOW when `pack_message` must be used instead. If the outbox gathers, also
        PACK_YIELD: staged, and a buffer full was sent, so that it is time to let others have a turn.

        Raises:
            InvalidSubjectError, PayloadTooLargeError: nothing was staged.
        """

    def pack_message(
        self,
        object_id: int,
        key: bytes,
        payload: bytes,
        *,
        flags: int = 0,
        codec: int = 0,
        deadline_ms: int = 0,
        task_id: bytes = b"",
        query_task_id: bytes = b"",
        headers: bytes = b"",
        urgent: bool = False,
    ) -> int:
        """Stage a publish (or answer) or a query with all its fields, in the dialect of the connection.

        A server that speaks version 1 gets neither flags, codec, deadline nor headers.

        Args:
            object_id: PUBLISH or QUERY.
            key: the subject's UTF-8, validated (`key`).
            headers: as `pack_headers` makes them.
            urgent: send it now rather than with what comes next.

        Returns:
            PACK_OK, PACK_FULL or PACK_CLOSED.

        Raises:
            PayloadTooLargeError: above the server's limit; nothing was staged.
        """

    def pack_control(self, packet: bytes, urgent: bool = False) -> int:
        """Stage a packet that is already encoded, at any time while a transport is attached and whatever waits already.

        Returns PACK_OK or PACK_CLOSED.
        """

    def want_room(self, size: int = 0) -> bool:
        """Ask for `on_room` after PACK_FULL. Returns False if there is room already (or no connection), so: try again.

        Args:
            size: bytes of the payload that waits; a large one needs more room than the low watermark leaves.

        Also sends what is staged, if nobody is at it.
        """

    def flush(self, io_thread: bool) -> int:
        """Send what is staged, as far as the kernel takes it.

        Args:
            io_thread: the caller is the I/O thread, which alone may try while the kernel is known to take nothing.

        Returns:
            FLUSH_DONE, FLUSH_BUSY, FLUSH_BLOCKED or FLUSH_CLOSED. After FLUSH_BLOCKED the I/O thread calls again as
            soon as the socket is writable. A failure of the transport is kept in `broken` for the I/O thread, which is
            woken.
        """
