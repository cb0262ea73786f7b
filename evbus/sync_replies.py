"""How the synchronous client's user takes the replies to a query that asks everybody."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Generic, TypeVar

from evbus.replies import Gathering, Reply
from evbus.waiting import Waiting

__all__ = ["Replies"]

T = TypeVar("T")


class Replies(Generic[T]):
    """What `EventClient.query_all` returns: an iterator of `Reply`, in the order in which they come.

    Each responder that was asked leads to exactly one; after the last of them the iteration ends.

    Raises, when iterated over:
        NoRespondersError: nobody was there to be asked.
        QueryTimeoutError: the time is up, and not all have replied.
        ConnectionLostError: our connection was lost.

    Any of these ends it. `close`, or the end of a `with` block, takes the query back at the server; leaving a loop
    early alone does not. Any thread may use it, and the replies are shared by those that do.
    """

    def __init__(self, waiting: Waiting, gathering: Gathering[T]) -> None:
        self._gathering = gathering
        self._news = threading.Semaphore(0)
        self._taking = threading.Lock()
        self._deadline = time.monotonic() + gathering.seconds
        waiting.push(gathering.start(self._news.release), gathering.seconds)

    def __iter__(self) -> Replies[T]:
        return self

    def __next__(self) -> Reply[T]:
        with self._taking:
            while True:
                reply = self._gathering.take()
                if reply is not None:
                    return reply
                left = min(max(self._deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
                if not self._news.acquire(timeout=left):
                    self._gathering.expire()

    def close(self) -> None:
        """Take no more; responders that have not replied yet are not waited for. Again: nothing happens."""
        self._gathering.close()
        self._news.release()  # for a thread that waits

    def __enter__(self) -> Replies[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
