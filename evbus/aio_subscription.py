"""One subscription of the asyncio client, as its user holds it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from types import TracebackType

from evbus._mailbox import Batch
from evbus._message import Message
from evbus.aio_handlers import AsyncHandlerRunner
from evbus.aio_loop import AsyncWaiting, Tasks, wake_future
from evbus.gaps import GapTeller
from evbus.handlers import HandlerRunner
from evbus.options import check_timeout
from evbus.plan import Interest
from evbus.session import Session
from evbus.signatures import Handler
from evbus.subscription import SubscriptionFacts, Wishes, look_after, prepare
from evbus.watch import watcher

__all__ = ["AsyncSubscription"]


class AsyncSubscription(SubscriptionFacts):
    """What `AsyncEventClient.subscribe` returns.

    Without a handler it is an asynchronous iterator of `Message`: `async for message in subscription` waits for each
    next one and ends when the subscription does. If the connection is lost, the iterator raises ConnectionLostError
    once the messages received before are taken; if messages came faster than they were taken, SlowConsumerError.

    As an asynchronous context manager it unsubscribes at the end. Each message goes to one of the tasks that iterate.
    """

    def __init__(
        self,
        interest: Interest,
        handler: Handler | None,
        gaps: GapTeller,
        runner: HandlerRunner | None,
        unsubscribe: Callable[[AsyncSubscription, bool, float | None], Awaitable[int]],
    ) -> None:
        super().__init__(interest, handler, gaps, runner)
        self._unsubscribe = unsubscribe
        # What happens to an iterator: True, there are messages and it is our turn to take them; an exception; None, the
        # end.
        self._news: deque[bool | Exception | None] = deque()
        self._takers: set[asyncio.Future[None]] = set()
        self._batch: Batch | None = None
        self._may_take = False
        if handler is None:
            interest.mailbox.wake = lambda: self._tell(True)
            interest.on_lost = self._on_lost

    @classmethod
    def make(
        cls,
        session: Session,
        subject: str,
        handler: Handler | None,
        wishes: Wishes,
        waiting: AsyncWaiting,
        tasks: Tasks,
        unsubscribe: Callable[[AsyncSubscription, bool, float | None], Awaitable[int]],
        executor: Executor | None = None,
    ) -> AsyncSubscription:
        """A subscription that no server knows yet.

        Args:
            waiting, tasks: of the client.
            unsubscribe: what the subscription's own method of that name is to do.
            executor: runs handlers that are plain functions; None: the loop does.

        Raises:
            InvalidSubjectError, ConfigError, TypeError: something makes no sense.
        """
        interest, decoder = prepare(session, subject, handler, wishes, coroutines=True)
        mailbox = interest.mailbox
        gaps = GapTeller(session.reports, mailbox, subject, wishes.on_gap)
        if handler is None:
            return cls(interest, None, gaps, None, unsubscribe)
        runner = AsyncHandlerRunner(
            session, mailbox, subject, handler, decoder, gaps, waiting, responder=wishes.responder, executor=executor
        )
        mailbox.wake = lambda: tasks.spawn(runner.work())
        look_after(session, runner)
        return cls(interest, handler, gaps, runner, unsubscribe)

    async def unsubscribe(self, *, drain: bool = False, timeout: float | None = 5.0) -> int:
        """End it. Returns when the server has confirmed, with the number of messages that were waiting and are not
        handled.

        Without `drain` no handler call begins after that, and what was waiting is discarded (counted in `discarded`);
        a handler call at work finishes. Again: nothing happens.

        Args:
            drain: no more messages come, and the handler finishes those that wait first. Its own handler does not wait
                for itself: what waits is handled after it. Of a subscription without a handler, what waits can still be
                taken; then the iteration ends.
            timeout: seconds for the drain; what is not handled by then is discarded. None: as long as it takes.
        """
        return await self._unsubscribe(self, drain, check_timeout(timeout, zero=True))

    async def next(self, timeout: float | None = None) -> Message:
        """The next message.

        Args:
            timeout: seconds to wait for it; None: as long as it takes. 0 takes one that is there.

        Raises:
            TimeoutError: none came in time.
            StopAsyncIteration: the subscription has ended.
            ConnectionLostError, SlowConsumerError: no more messages came because of that.
            TypeError: this subscription has a handler.

        Cancelled, it has taken no message.
        """
        self._check()
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if self._batch is not None:
                message = next(self._batch, None)
                if message is not None:
                    return message
                self._batch = self._mailbox.take(self._batch)
                self._may_take = False
                if self._batch is not None:
                    if not self._batch.plain:
                        await self._gaps.tell_async(self._batch)
                    await asyncio.sleep(0)  # a good many were taken without a pause
            elif self._may_take:
                self._batch = self._mailbox.take()
                self._may_take = False
                if self._batch is not None and not self._batch.plain:
                    await self._gaps.tell_async(self._batch)
            elif self._news:
                self._read(self._news[0])
            elif deadline is not None and loop.time() >= deadline:
                raise TimeoutError(f"no message on {self.subject!r} within {timeout:g} s")
            else:
                await self._wait(loop, deadline)

    def _read(self, news: bool | Exception | None) -> None:
        if news is None:  # stays, for whoever asks next
            raise StopAsyncIteration
        self._news.popleft()
        if isinstance(news, Exception):
            raise news
        self._may_take = True

    async def _wait(self, loop: asyncio.AbstractEventLoop, deadline: float | None) -> None:
        future = loop.create_future()
        self._takers.add(future)
        timer = loop.call_at(deadline, wake_future, future) if deadline is not None else None
        try:
            await future
        finally:
            self._takers.discard(future)
            if timer is not None:
                timer.cancel()

    def _check(self) -> None:
        if self._handler is not None:
            raise TypeError(f"the subscription on {self.subject!r} has a handler, so there is nothing to iterate over")

    def _tell(self, news: bool | Exception | None) -> None:
        self._news.append(news)
        for future in self._takers:
            wake_future(future)

    def _on_lost(self, error: Exception) -> None:
        self._tell(error)
        if not self.interest.active:
            self._tell(None)

    def ended(self, discard: bool = True) -> int:
        """See `endings.Endable`."""
        count = self._mailbox.clear() if discard else 0
        self._tell(None)
        if self.runner is not None:
            watcher.remove(self.runner)
        return count

    def __aiter__(self) -> AsyncIterator[Message]:
        self._check()
        return self

    async def __anext__(self) -> Message:
        return await self.next()

    async def __aenter__(self) -> AsyncSubscription:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.unsubscribe()
