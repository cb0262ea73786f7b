"""The client's receiving side: packets become messages in mailboxes, answers for waiters, control tuples.

See `_inbox.pyx` for how it works and who owns what.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, final

from evbus._frame import Ring
from evbus._mailbox import Mailbox
from evbus._message import Message
from evbus.errors import ProtocolError

class _Answerer(Protocol):
    """What a query is answered through."""

    def reply(self, message: Message, value: object, headers: Mapping[str, str] | None) -> None: ...
    def fail(self, message: Message, code: int, text: str) -> None: ...

@final
class Waiter:
    """Somebody who waits for one outcome: of a query, a confirmed publish, a subscribe, a flush.

    Args:
        task_id: the id that the outcome will carry.
        subject, action, timeout: for the words of errors.
        notify: called once when the outcome is there (and for each reply, if `many`), from any thread; must not raise.
        many: replies are collected until the end is told.
    """

    task_id: bytes
    subject: str
    action: str
    timeout: float
    many: bool
    notify: Callable[[], object] | None

    def __init__(
        self,
        task_id: bytes,
        subject: str = "",
        action: str = "",
        notify: Callable[[], object] | None = None,
        many: bool = False,
        timeout: float = 0.0,
    ) -> None: ...
    @property
    def done(self) -> bool:
        """Whether the outcome is known."""

    def resolve(self, value: object = None) -> bool:
        """Set the outcome; the first one counts. Returns whether this was it."""

    def fail(self, error: BaseException) -> bool:
        """Set an exception as the outcome; the first outcome counts. Returns whether this was it."""

    def end(self, value: object, error: BaseException | None) -> bool:
        """As resolve or fail."""

    def push(self, reply: object) -> bool:
        """Add a reply, if `many`; else the same as resolve."""

    def take_replies(self) -> list[Any]:
        """The replies since the last call."""

    def result(self) -> Any:
        """The value, or raises the exception, of the outcome."""

@final
class Inbox:
    """Everything that arrives on one connection.

    Args:
        match: `match(subject_utf8)` gives the mailboxes of the plain subscriptions that a subject concerns: two tuples,
            of those that get its events and of those that are asked its queries.
        fallback: MSGPACK or JSON: what payloads of unknown codec count as.

    `answerer` is what queries are answered through.
    """

    answerer: _Answerer | None
    ring: Ring
    fault: ProtocolError | None
    received_packets: int
    received_msgs: int
    malformed: int
    unknown: int
    unmatched: int
    late_answers: int
    missed_late: int
    """Messages that the server says it had to drop, for subscriptions that had ended."""

    def __new__(
        cls,
        match: Callable[[bytes], tuple[tuple[Mailbox, ...], tuple[Mailbox, ...]]],
        *,
        fallback: int = 3,
    ) -> Inbox: ...
    def start(self, limit: int) -> None:
        """A fresh connection: only control packets of at most `limit` bytes until `open`."""

    def open(self, dialect: int, limit: int) -> None:
        """The handshake is done: let deliveries of that dialect in, and packets of at most `limit` bytes."""

    @property
    def is_announced(self) -> bool:
        """Whether there is a server that speaks version 2."""

    @property
    def limit_bytes(self) -> int:
        """The largest packet that is taken."""

    def add_mailbox(self, box: Mailbox) -> None:
        """A new subscription. Raises ValueError if its id is taken."""

    def remove_mailbox(self, box: Mailbox) -> None:
        """The subscription is gone; does nothing if it was not there."""

    def put_gap(self, box: Mailbox, count: int | None, reason: str) -> None:
        """Messages for that mailbox are missing here: see `Mailbox.put_gap`. On the I/O thread; look at `take_ready` next."""

    def forget_routes(self) -> None:
        """Subscriptions changed: ask `match` again for each subject."""

    def add_waiter(self, waiter: Waiter) -> None:
        """Expect an outcome for the waiter's id."""

    def pop_waiter(self, task_id: bytes) -> Waiter | None:
        """The waiter of that id, who is expected no more; None if there is none."""

    def find_waiter(self, task_id: bytes) -> Waiter | None:
        """The waiter of that id, or None."""

    def take_waiters(self) -> list[Waiter]:
        """All waiters; none is expected any more."""

    @property
    def waiting(self) -> int:
        """How many waiters there are."""

    def take_ready(self) -> list[Mailbox]:
        """Mailboxes that have messages and need a worker; each entry stands for one worker."""

    def take_overflows(self) -> list[Mailbox]:
        """Mailboxes that a message ended because they were full."""

    def receive(self) -> list[tuple[int, int, int, int, bytes]]:
        """Take all complete packets from the ring.

        Afterwards look, in this order, at what is returned, at `take_overflows`, at `take_ready` and at `fault` (what
        the server did wrong; nothing can be read after it).

        Returns:
            the control packets in their order: tuples of object id, version, SystemId, Unix milliseconds and body.
        """
