"""Running a subscription's handler over what waits in its mailbox. Knows no thread: whoever has one calls `run`."""

from __future__ import annotations

import logging
from contextlib import suppress
from contextvars import Token
from typing import Any

from evbus._inbox import Waiter
from evbus._mailbox import Batch, Mailbox
from evbus._message import Message, claim_answer, handler_done
from evbus.answers import current_query
from evbus.correlation import AnsweredError, Notify
from evbus.errors import CodecError, NotConnectedError
from evbus.gaps import GapTeller
from evbus.payload import Decoder
from evbus.session import Session
from evbus.signatures import Handler
from evbus.wire import HANDLER_FAILED

__all__ = ["HandlerRunner"]

_log = logging.getLogger("evbus.client")


class HandlerRunner:
    """One subscription's handler.

    Args:
        session: whose queries it answers and whose reports it writes.
        mailbox: where its messages wait.
        subject: the subscription's, for the log.
        handler: the user's function.
        decoder: makes its argument; None if it takes the Message.
        gaps: tells of messages that are missing.
        responder: its return value is always the answer to a query, None included.

    Attributes:
        at_work: whoever runs it (a thread, a task), and the batch that it is at.
    """

    def __init__(
        self,
        session: Session,
        mailbox: Mailbox,
        subject: str,
        handler: Handler,
        decoder: Decoder[Any] | None,
        gaps: GapTeller,
        *,
        responder: bool = False,
    ) -> None:
        self.handler = handler
        self._gaps = gaps
        self.subject = subject
        self.at_work: dict[object, Batch] = {}
        self._drains: list[Waiter] = []
        self._session = session
        self._mailbox = mailbox
        self._decoder = decoder
        self._responder = responder

    def run(self, worker: object = None) -> None:
        """Handle what waits, in order, until nothing does. Raises nothing, whatever the handler does.

        Args:
            worker: who does it; nobody else has that name at the same time.
        """
        take, at_work = self._mailbox.take, self.at_work
        batch: Batch | None = None
        while (batch := take(batch)) is not None:
            at_work[worker] = batch
            if batch.plain:
                self._events(batch)
            else:
                self._gaps.tell(batch)
                for message in batch:
                    if message.is_query:
                        self._query(message)
                    else:
                        self._event(message)
        self._rest(worker)

    def _rest(self, worker: object) -> None:
        """A worker has found nothing more to do."""
        self.at_work.pop(worker, None)
        if self._drains and self._mailbox.is_idle:
            self._drained()

    def slow(self, seconds: float, stack: str) -> None:
        """A call of the handler takes long; see `watch.Watched`. Any thread."""
        self._session.reports.slow_handler(self.subject, seconds, stack)

    def drained(self, notify: Notify) -> Waiter:
        """The waiter for the moment when nothing waits and nobody is at work."""
        waiter = Waiter(b"", self.subject, "drain", notify)
        self._drains.append(waiter)
        # After that, so that whoever comes to rest just now either sees the waiter or is seen.
        if self._mailbox.is_idle:
            self._drained()
        return waiter

    def _drained(self) -> None:
        # Others may be at it, too.
        with suppress(IndexError):
            while True:
                self._drains.pop().resolve()

    def _events(self, batch: Batch) -> None:
        """A batch without a query: the loop that has to be fast."""
        handler, decoder = self.handler, self._decoder
        message: Message | None = None
        while True:
            try:
                if decoder is None:
                    for message in batch:
                        handler(message)
                else:
                    for message in batch:
                        handler(decoder(message.codec, message.data))
                return
            except BaseException as exc:  # noqa: BLE001 - the user's code; even SystemExit must not end the thread
                assert message is not None
                self._report(exc, message)

    def _event(self, message: Message) -> None:
        try:
            self.handler(self._argument(message))
        except BaseException as exc:  # noqa: BLE001 - as above
            self._report(exc, message)

    def _query(self, message: Message) -> None:
        """Have a query answered: by the value returned, by a publish on its subject, or by a failure."""
        try:
            answer = self._ask(message)
            if answer is not None or self._responder:
                self._reply(message, answer)
                return
        except BaseException as exc:  # noqa: BLE001 - as above
            self._query_failed(exc, message)
            return
        self._give_up(message, None)

    def _query_failed(self, error: BaseException, message: Message) -> None:
        """The handler of a query raised, or its answer could not be sent."""
        self._report(error, message)
        self._give_up(message, (HANDLER_FAILED, f"{type(error).__name__}: {_text(error)}"))

    def _ask(self, message: Message) -> object:
        argument = self._argument(message)
        if self._responder:
            return self.handler(argument)
        token = self._begin(message)
        try:
            return self.handler(argument)
        finally:
            self._end(token)

    def _begin(self, message: Message) -> Token[Message | None]:
        """The handler starts on a query: what it publishes on the query's subject is the answer."""
        self._session.outbox.begin_answering()
        return current_query.set(message)

    def _end(self, token: Token[Message | None]) -> None:
        """The handler has ended."""
        current_query.reset(token)
        self._session.outbox.end_answering()

    def _reply(self, message: Message, answer: object) -> None:
        if message.answered:
            return
        try:
            self._session.answers.reply(message, answer)
        except AnsweredError:
            pass  # by another handler, a moment ago
        except NotConnectedError:
            # The query went with its connection; its asker has been told.
            _log.debug("the answer on %r found no connection", message.subject)

    def _give_up(self, message: Message, failure: tuple[int, str] | None) -> None:
        """The handler had no answer. If it was the last one, the asker is told of the first failure."""
        first = handler_done(message, failure)
        if first is None or not claim_answer(message):
            return
        try:
            self._session.answers.tell_failure(message, *first)
        except NotConnectedError:
            _log.debug("the failure on %r found no connection", message.subject)

    def _argument(self, message: Message) -> object:
        return message if self._decoder is None else self._decoder(message.codec, message.data)

    def _report(self, error: BaseException, message: Message) -> None:
        if isinstance(error, CodecError) and not error.subject:
            error.subject = message.subject
        self._mailbox.count_error()
        self._session.reports.handler_error(error, message, self.subject)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a __str__ of the user's that raises
        return ""
