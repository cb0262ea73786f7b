"""The messages that wait for one subscription: filled by the I/O thread, emptied by workers."""

from collections.abc import Callable
from typing import Any, final

from evbus._message import Message

OVERFLOW_CLOSE: int
OVERFLOW_DROP_NEWEST: int
OVERFLOW_DROP_OLDEST: int

@final
class Batch:
    """Messages of one mailbox, in order; iterating over it takes them.

    When the mailbox is cleared the iteration ends, wherever it stands.
    """

    plain: bool
    """Whether there is no query among them."""
    taken: int
    """How many were taken."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Batch: ...
    def __next__(self) -> Message: ...

@final
class Tally:
    """What all mailboxes of a client have counted together, those that are gone included."""

    handled: int
    dropped: int
    errors: int

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
    wake: Callable[[], object] | None
    """Called on the I/O thread when there are messages and a worker is wanted; each call stands for one worker."""
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

    def count_error(self) -> None:
        """A worker reports that its handler failed."""

    def end(self) -> None:
        """Take no more messages in. Those that wait can still be taken."""

    def clear(self) -> int:
        """End, and discard what waits; a worker's iteration over its batch ends with the message at hand.

        Returns the number of messages discarded.
        """
