"""Queries by the hundred thousand. See `_asking.pyx` for why."""

from collections.abc import Callable
from typing import final

from typing_extensions import Self

from evbus._inbox import Inbox, Waiter
from evbus._outbox import Outbox

@final
class Asker:
    """Asks plain queries on one connection after the other.

    Args:
        inbox: expects the answers.
        outbox: takes the packets.

    Attributes:
        prefix: eight characters that the ids begin with; another one for each connection.
    """

    prefix: str
    def __new__(cls, inbox: Inbox, outbox: Outbox) -> Self: ...
    def ask(
        self,
        subject: str,
        codec: int,
        payload: bytes,
        timeout: float,
        deadline_ms: int,
        notify: Callable[[], object] | None,
    ) -> Waiter | None:
        """Ask a query without headers.

        Args:
            timeout: seconds, for the words of a timeout.
            deadline_ms: how long the server may wait for the answer.
            notify: called once when the outcome is there.

        Returns:
            the waiter for the answer. None: the buffer is full or there is no connection or the payload is too large,
            and nothing has happened: take the general way, which knows what to do.

        Raises:
            InvalidSubjectError: nothing was asked.
        """
