"""Running a subscription's handler on an asyncio loop, be it a coroutine function or a plain one.

A subscription that has something to do has a task (`concurrency` of them at most), not each message: a handler that
does not suspend costs no more than its call, and one that does is in a task of its own kind, with timeouts and all.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import Any

from evbus._mailbox import Batch, Mailbox
from evbus._message import Message
from evbus.aio_loop import AsyncWaiting
from evbus.correlation import AnsweredError
from evbus.errors import NotConnectedError
from evbus.gaps import GapTeller
from evbus.handlers import HandlerRunner
from evbus.payload import Decoder
from evbus.session import Session
from evbus.signatures import Handler, is_coroutine_function

__all__ = ["AsyncHandlerRunner"]

_log = logging.getLogger("evbus.client")

# After so many messages the loop gets a turn, if the handler has not given it one.
_TURN_MSGS = 1024


class AsyncHandlerRunner(HandlerRunner):
    """One subscription's handler. `work` is for a task, `run` for nobody.

    Args:
        waiting: where an answer waits for room.
        executor: runs the handler, if it is a plain function; None: the loop does.
        Others: as for HandlerRunner.
    """

    def __init__(
        self,
        session: Session,
        mailbox: Mailbox,
        subject: str,
        handler: Handler,
        decoder: Decoder[Any] | None,
        gaps: GapTeller,
        waiting: AsyncWaiting,
        *,
        responder: bool = False,
        executor: Executor | None = None,
    ) -> None:
        super().__init__(session, mailbox, subject, handler, decoder, gaps, responder=responder)
        self._waiting = waiting
        self._coroutine = is_coroutine_function(handler)
        self._executor = executor if not self._coroutine else None

    async def work(self) -> None:
        """Handle what waits, in order, until nothing does. Ends early only if its task is cancelled by the client."""
        worker = asyncio.current_task()
        try:
            await self._work(worker)
        finally:
            self._rest(worker)

    async def _work(self, worker: object) -> None:
        take, at_work = self._mailbox.take, self.at_work
        batch: Batch | None = None
        handled = 0
        while (batch := take(batch)) is not None:
            at_work[worker] = batch
            handled += len(batch)
            if self._executor is not None:
                del at_work[worker]  # a thread is
                await self._work_elsewhere(batch, self._executor)
            elif batch.plain:
                await self._work_events(batch)
            else:
                await self._gaps.tell_async(batch)
                for message in batch:
                    if message.is_query:
                        await self._work_query(message)
                    else:
                        await self._work_event(message)
            if handled >= _TURN_MSGS:
                handled = 0
                await asyncio.sleep(0)

    async def _work_elsewhere(self, batch: Batch, executor: Executor) -> None:
        """A batch for a handler that runs on other threads: one call after the other, as everywhere."""
        if batch.plain:
            try:
                await self._elsewhere(batch, executor, self._events, batch)
            except Exception as exc:  # noqa: BLE001 - the executor's: what the handler raises is caught there
                for message in batch:
                    self._report(exc, message)
            return
        for message in batch:
            if message.is_query:
                await self._query_elsewhere(batch, executor, message)
                continue
            try:
                await self._elsewhere(batch, executor, self._event, message)
            except Exception as exc:  # noqa: BLE001 - as above
                self._report(exc, message)

    async def _query_elsewhere(self, batch: Batch, executor: Executor, message: Message) -> None:
        """As `_work_query`: only the handler runs elsewhere."""
        try:
            answer = await self._elsewhere(batch, executor, self._ask, message)
            if inspect.isawaitable(answer):
                answer = await answer
            if answer is not None or self._responder:
                await self._send(message, answer)
                return
        except BaseException as exc:  # noqa: BLE001 - as below
            self._query_failed(exc, message)
            if isinstance(exc, asyncio.CancelledError):
                self._stop_at(exc)
            return
        self._give_up(message, None)

    async def _elsewhere(
        self, batch: Batch, executor: Executor, function: Callable[[Any], object], argument: object
    ) -> object:
        def call() -> object:
            thread = threading.get_ident()
            self.at_work[thread] = batch
            try:
                return function(argument)
            except StopIteration as exc:  # which no future can carry
                raise RuntimeError("the handler raised StopIteration") from exc
            finally:
                del self.at_work[thread]

        return await asyncio.get_running_loop().run_in_executor(executor, copy_context().run, call)

    def _report(self, error: BaseException, message: Message) -> None:
        # What is reported belongs to the loop, as `on_error` does.
        self._waiting.post(partial(super()._report, error, message))

    async def _work_events(self, batch: Batch) -> None:
        """A batch without a query: the loops that have to be fast."""
        handler, decoder = self.handler, self._decoder
        message: Message | None = None
        while True:
            try:
                if not self._coroutine:
                    for message in batch:
                        result = handler(message if decoder is None else decoder(message.codec, message.data))
                        if result is not None and inspect.isawaitable(result):
                            await result
                elif decoder is None:
                    for message in batch:
                        await handler(message)
                else:
                    for message in batch:
                        await handler(decoder(message.codec, message.data))
                return
            except BaseException as exc:  # noqa: BLE001 - the user's code
                assert message is not None
                self._raised(exc, message)

    async def _work_event(self, message: Message) -> None:
        try:
            result = self.handler(self._argument(message))
            if result is not None and inspect.isawaitable(result):
                await result
        except BaseException as exc:  # noqa: BLE001 - as above
            self._raised(exc, message)

    async def _work_query(self, message: Message) -> None:
        """Have a query answered: by the value returned, by a publish on its subject, or by a failure."""
        try:
            answer = await self._work_ask(message)
            if answer is not None or self._responder:
                await self._send(message, answer)
                return
        except BaseException as exc:  # noqa: BLE001 - as above
            self._query_failed(exc, message)
            self._stop_at(exc)
            return
        self._give_up(message, None)

    async def _work_ask(self, message: Message) -> object:
        argument = self._argument(message)
        token = self._begin(message) if not self._responder else None
        try:
            answer = self.handler(argument)
            if answer is not None and inspect.isawaitable(answer):
                answer = await answer
            return answer
        finally:
            if token is not None:
                self._end(token)

    async def _send(self, message: Message, answer: object) -> None:
        if message.answered:
            return
        try:
            sending = self._session.answers.prepared(message, answer)
            if not sending.pack():
                await self._waiting.push(sending, None)
        except AnsweredError:
            pass  # by another handler, a moment ago
        except NotConnectedError:
            # The query went with its connection; its asker has been told.
            _log.debug("the answer on %r found no connection", message.subject)

    def _raised(self, error: BaseException, message: Message) -> None:
        self._report(error, message)
        self._stop_at(error)

    def _stop_at(self, error: BaseException) -> None:
        """A cancellation may be the handler's own affair, for example of a task that it waits for; it ends the work if
        this task is meant. SystemExit and KeyboardInterrupt go to the loop, as from any task: they end the program.
        """
        if isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
            raise error
        if isinstance(error, asyncio.CancelledError):
            # Before 3.11 a task does not tell. Then only a closed client ends the work.
            cancelling = getattr(asyncio.current_task(), "cancelling", int)
            if cancelling() or not self._session.is_connected:
                raise error
