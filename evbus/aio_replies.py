"""How the asyncio client's user takes the replies to a query that asks everybody."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Generic, TypeVar

from evbus.aio_loop import AsyncWaiting, wake_future
from evbus.replies import Gathering, Reply

__all__ = ["AsyncReplies"]

T = TypeVar("T")


class AsyncReplies(Generic[T]):
    """What `AsyncEventClient.query_all` returns: an asynchronous iterator of `Reply`, in the order in which they come.
    The query is asked at its first step.

    Each responder that was asked leads to exactly one; after the last of them the iteration ends.

    Raises, when iterated over:
        NoRespondersError: nobody was there to be asked.
        QueryTimeoutError: the time is up, and not all have replied.
        ConnectionLostError: our connection was lost.
        NotConnectedError, InvalidSubjectError, PayloadTooLargeError, BufferFullError: nothing was asked.

    Any of these ends it. `close`, or the end of an `async with` block, takes the query back at the server; leaving a
    loop early alone does not. A step that is cancelled has taken no reply. For one task at a time.
    """

    def __init__(self, waiting: AsyncWaiting, gathering: Gathering[T]) -> None:
        self._waiting = waiting
        self._gathering = gathering
        self._begun = self._over = False
        self._deadline = 0.0
        self._step: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncReplies[T]:
        return self

    async def __anext__(self) -> Reply[T]:
        loop = asyncio.get_running_loop()
        if not self._begun and not self._over:
            self._begun = True
            self._deadline = loop.time() + self._gathering.seconds
            try:
                await self._waiting.push(self._gathering.start(self._notify), self._gathering.seconds)
            except BaseException:
                self._over = True
                raise
        while not self._over:
            try:
                reply = self._gathering.take()
            except StopIteration:
                break
            if reply is not None:
                return reply
            await self._wait(loop)
        raise StopAsyncIteration

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._step = loop.create_future()
        timer = loop.call_at(self._deadline, self._expire)
        try:
            await self._step
        finally:
            self._step = None
            timer.cancel()

    def _expire(self) -> None:
        self._gathering.expire()
        self._notify()

    def _notify(self) -> None:
        if self._step is not None:
            wake_future(self._step)

    async def close(self) -> None:
        """Take no more; responders that have not replied yet are not waited for. Again: nothing happens."""
        self._over = True
        self._gathering.close()
        self._notify()

    async def __aenter__(self) -> AsyncReplies[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
