"""How subscriptions end: at once, or when their handlers have finished what waits. And what was left when all ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from typing import Protocol

from evbus._inbox import Waiter
from evbus.correlation import Notify
from evbus.handlers import HandlerRunner
from evbus.message import Unfinished
from evbus.plan import Interest
from evbus.session import Session

__all__ = ["Closing", "Endable", "Ending"]

_log = logging.getLogger("evbus.client")

#: One thing to be started and waited for, and for how many seconds; None: as long as it takes.
Step = tuple[Callable[[Notify], "Waiter | None"], "float | None"]


class Endable(Protocol):
    """A subscription, as far as its end is concerned."""

    interest: Interest
    runner: HandlerRunner | None

    def ended(self, discard: bool = True) -> int:
        """It is over; who iterates over it learns so after what may still be taken.

        Args:
            discard: discard what waits.

        Returns:
            how many messages were discarded.
        """
        ...


class Ending:
    """The end of one subscription, step by step; whoever has the steps started waits for each, and goes on if it fails.

    Args:
        drain: the handler finishes what waits first.
        seconds: for the drain.
        worker: who asks for it. A handler that ends its own subscription is not waited for.

    Attributes:
        unhandled: how many messages were waiting and were not handled; known after the last step.
    """

    def __init__(
        self, session: Session, subscription: Endable, drain: bool, seconds: float | None, worker: object
    ) -> None:
        self.unhandled = 0
        self._session = session
        self._subscription = subscription
        self._drain = drain
        self._seconds = seconds
        self._worker = worker

    def steps(self) -> Generator[Step, None, None]:
        """The steps. Closed early, the subscription ends at once."""
        session, subscription = self._session, self._subscription
        interest, runner = subscription.interest, subscription.runner
        discard = True
        try:
            if not self._drain:
                yield self._end, None
                return
            # Until the server has confirmed, messages that it has sent before still find their way.
            yield lambda notify: session.withdraw(interest, notify), None
            session.unsubscribe(interest)
            if runner is None or self._worker in runner.at_work:
                discard = False  # whoever iterates takes the rest, and the handler goes on once it has returned
                self.unhandled = interest.mailbox.pending_msgs
            else:
                yield runner.drained, self._seconds
        finally:
            session.unsubscribe(interest)
            self.unhandled += subscription.ended(discard)

    def _end(self, notify: Notify) -> Waiter | None:
        waiter = self._session.unsubscribe(self._subscription.interest, notify)
        self.unhandled += self._subscription.ended()
        return waiter


class Closing:
    """The end of a client: made before it is closed, `finish` after it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._queries = session.inbox.waiting
        self._unsent_bytes = session.unsent_bytes

    def finish(self, subscriptions: Iterable[Endable], drained: bool, worker: object) -> Unfinished:
        """End all subscriptions.

        Args:
            drained: whether there was to be nothing left.
            worker: who closes the client; if it is a handler, it does not count.
        """
        messages = handlers = 0
        for subscription in subscriptions:
            self._session.unsubscribe(subscription.interest)
            if subscription.runner is not None and any(one != worker for one in list(subscription.runner.at_work)):
                handlers += 1
            messages += subscription.ended()
        left = Unfinished(messages, handlers, self._session.unsent_bytes - self._unsent_bytes, self._queries)
        if left:
            _log.log(
                logging.WARNING if drained else logging.INFO,
                "closed with %d messages unhandled, %d handlers at work, %d bytes unsent, %d queries unanswered",
                left.messages,
                left.handlers,
                left.unsent_bytes,
                left.queries,
            )
        return left
