"""The messages that wait for one subscription: filled by the I/O thread, emptied by workers."""

from collections.abc import Callable
from typing import Any, final

from evbus._message import Message

OVERFLOW_CLOSE: int
OVERFLOW_DROP_NEWEST: int
OVERFLOW_DROP_OLDEST: int
OVERFLOW_BLOCK: int

@final
class Batch:
    """Messages of one mailbox, in order; iterating over it takes them. Before the first, `take_gaps` says what is missing.

    When the mailbox is cleared the iteration ends, wherever it stands.
    """

    plain: bool
    """Whether there is no query among them, and no gap before them."""
    taken: int
    """How many were taken."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Batch: ...
    def __next__(self) -> Message: ...
    def take_gaps(self) -> list[tuple[int | None, str]]:
        """What is missing before the first message: (count, reason) tuples in order. The second call finds none."""

@final
class Tally:
    """What all mailboxes of a client have counted together, those that are gone included."""

    handled: int
    dropped: int
    errors: int
    missed: int

@final
class Mailbox:
    """The messages that wait for one subscription, within its limits.

    Whoever empties it does so through `take`. When messages come and fewer than `concurrency` workers are at it, the
    inbox lists the mailbox as ready and counts one more worker; `take` returning None ends that worker's turn.

    Args:
        owner: the subscription, for whoever gets the mailbox.
        sid: the subscription's id on the wire.
        max_msgs, max_bytes: what may wait; a message that is alone is always taken.
        overflow: one of the OVERFLOW_ constants.
        concurrency: how many workers may take from it at a time. With one, order is kept.
        tally: counts along.
    """

    sid: int
    owner: Any
    overflowed: bool
    """Whether a message found it full and so ended it."""
    received: int
    dropped: int
    discarded: int
    handled: int
    errors: int
    missed: int
    """Messages that gaps have told of, dropped here or by the server."""
    wake: Callable[[], object] | None
    """Called on the I/O thread when there are messages and a worker is wanted; each call stands for one worker."""
    grant: Callable[[int], object] | None
    """With OVERFLOW_BLOCK: called where messages are taken, with how many more the server may send."""
    max_msgs: int
    max_bytes: int

    def __init__(
        self,
        owner: object,
        sid: int,
        *,
        tally: Tally | None = None,
        max_msgs: int = 524288,
        max_bytes: int = 134217728,
        overflow: int = 0,
        concurrency: int = 1,
    ) -> None: ...
    @property
    def pending_msgs(self) -> int:
        """Messages that wait: that no worker has begun with."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of payload and headers of the messages that wait, and of the batches that workers are at."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nobody is at work."""

    @property
    def is_ended(self) -> bool:
        """Whether no more messages are taken in."""

    def take(self, done: Batch | None = None) -> Batch | None:
        """The next batch, or None if nothing waits; a worker calls it until it gets None.

        Args:
            done: the batch that this worker got before. Its messages stop counting as pending.
        """

    def put_gap(self, count: int | None, reason: str) -> None:
        """Messages are missing after those that wait, and before the next one that comes.

        Gaps of the same reason with no message between them become one. Nothing happens to a mailbox that has ended. A
        worker must see to it, so callers use `Inbox.put_gap`.

        Args:
            count: how many; None if nobody knows.
            reason: "overflow" or "reconnect".
        """

    def open_window(self, bytes_each: int) -> int:
        """With OVERFLOW_BLOCK: a connection is there; from now on `grant` tells of messages that are done with.

        Args:
            bytes_each: the largest message that may come; so many of them as fit into `max_bytes` may be on their way.

        Returns:
            how many messages the server may send at first: what waits here from an earlier connection takes its room.
        """

    def count_error(self) -> None:
        """A worker reports that its handler failed."""

    def end(self) -> None:
        """Take no more messages in. Those that wait can still be taken."""

    def clear(self) -> int:
        """End, and discard what waits; a worker's iteration over its batch ends with the message at hand.

        Returns the number of messages discarded.
        """
