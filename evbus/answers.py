"""Answering queries: by a value, by a failure, or by publishing on the query's subject while handling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

from evbus._frame import pack
from evbus._inbox import Waiter
from evbus._message import Message, claim_answer, query_id
from evbus._outbox import PACK_OK
from evbus.correlation import AnsweredError, Correlation, Sending, encode_headers
from evbus.errors import ConfigError
from evbus.payload import encode
from evbus.wire import HEADER_BYTES_23, Codec, ObjectId

__all__ = ["MAX_FAILURE_BYTES", "Answers", "current_query"]

#: Of the text that tells an asker of a failure, in UTF-8.
MAX_FAILURE_BYTES = 1024

#: The query that the running handler of a plain subscription is at. It follows the handler's code across awaits.
current_query: ContextVar[Message | None] = ContextVar("evbus_current_query", default=None)


class Answers:
    """How the queries of one client are answered.

    Args:
        codec: for structured values.

    Attributes:
        send: gets a Sending into the buffer, waiting for room if need be. The shell's business; by default it does not
            wait.
        call: makes a call where the buffer may be touched, and returns what it does. The shell's business too.
    """

    def __init__(self, correlation: Correlation, codec: Codec) -> None:
        self._correlation = correlation
        self._codec = codec
        self.send: Callable[[Sending], object] = Sending.pack
        self.call: Callable[[Callable[[], int]], int] = _at_once

    def reply(self, message: Message, value: object, headers: Mapping[str, str] | None = None) -> None:
        """See `Message.reply`."""
        self.send(self.prepared(message, value, headers))

    def prepared(self, message: Message, value: object, headers: Mapping[str, str] | None = None) -> Sending:
        """The answer to a query, from a value. Packing it fails if the query was answered meanwhile."""
        codec, payload = encode(value, self._codec)
        return self.sending(message, codec, payload, headers)

    def sending(
        self,
        message: Message,
        codec: Codec,
        payload: bytes,
        headers: Mapping[str, str] | None,
        waiter: Waiter | None = None,
    ) -> Sending:
        """The answer to a query. Packing it fails if the query was answered meanwhile."""
        return Sending(
            self._correlation,
            "reply",
            ObjectId.PUBLISH,
            message.subject.encode(),
            payload,
            waiter,
            message,
            codec=int(codec),
            headers=encode_headers(headers),
            query_task_id=query_id(message),
            task_id=waiter.task_id if waiter is not None else b"",
            urgent=True,
        )

    def fail(self, message: Message, code: int, text: str) -> None:
        """See `Message.fail`."""
        if not -(2**31) <= code < 2**31:
            raise ConfigError("code", f"must be a whole number of 32 bits, not {code}")
        if not claim_answer(message):
            raise AnsweredError(f"the query on {message.subject!r} was answered already")
        self.tell_failure(message, code, text)

    def tell_failure(self, message: Message, code: int, text: str) -> None:
        """Tell the asker of a failure. A version-1 server has no words for it: there the asker runs into its
        timeout.
        """
        outbox = self._correlation.outbox
        if not self._correlation.inbox.is_announced:
            return
        packet = pack(
            HEADER_BYTES_23,
            ObjectId.ERROR,
            1,
            0,
            outbox.now_ms(),
            "siss",
            query_id(message),
            code,
            message.subject,
            _cut(text),
        )
        if self.call(lambda: outbox.pack_control(packet, True)) != PACK_OK:
            raise self._correlation.not_connected("fail")


def _at_once(function: Callable[[], int]) -> int:
    return function()


def _cut(text: str) -> bytes:
    """The text as UTF-8, cut between characters."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_FAILURE_BYTES:
        return data
    return data[: MAX_FAILURE_BYTES - 3].decode(errors="ignore").encode() + b"..."
