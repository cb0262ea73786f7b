"""One message as a client has received it, and the bookkeeping of who answers it if it is a query."""

from collections.abc import Mapping
from typing import Any, TypeVar, final, overload

_T = TypeVar("_T")

@final
class Message:
    """One message as it arrived: an event, a query, or the answer to a query. Read-only; usable from any thread.

    Make one yourself only to test a handler.

    Args:
        subject: the subject it was published on.
        data: the payload's bytes.
        codec: how they are encoded, a `wire.Codec`.
        headers: text to text.
        timestamp: seconds since 1970.
        sender: connection id of the publisher; 0 if the server does not tell.
    """

    subject: str
    """The subject it was published on, never a pattern."""
    data: bytes
    """The payload's bytes as they were sent."""
    codec: int
    """How the payload is encoded: a `wire.Codec`."""
    sender: int
    """Connection id of the publisher as the server knows it; of an answer, of the responder. 0 from a version-1 server,
    which does not tell."""
    deadline_ms: int
    """Of a query: how long its asker waits, in milliseconds from its arrival at the server; 0 if unknown."""

    def __init__(
        self,
        subject: str,
        data: bytes = b"",
        *,
        codec: int = 0,
        headers: Mapping[str, str] | None = None,
        timestamp: float = 0.0,
        sender: int = 0,
    ) -> None: ...
    @property
    def headers(self) -> dict[str, str]:
        """The publisher's headers; empty if there are none. Decoded when first read."""

    @property
    def timestamp(self) -> float:
        """When it was published: seconds since 1970 by the publisher's clock, as `time.time()` gives them."""

    @property
    def is_query(self) -> bool:
        """Whether an answer is expected."""

    @property
    def answered(self) -> bool:
        """Whether this query was answered here, by a reply or a failure."""

    @overload
    def decode(self, type: type[_T]) -> _T: ...
    @overload
    def decode(self, type: Any = None) -> Any: ...
    def reply(self, value: object = None, *, headers: Mapping[str, str] | None = None) -> None:
        """Answer this query. Any thread, during the handler or after it.

        Raises:
            EvbusError: it is no query, or was answered here already.
            CodecError, PayloadTooLargeError: the value cannot be sent; the query is still open.
            NotConnectedError: the connection is gone, and the query with it.
        """

    def fail(self, code: int, text: str = "") -> None:
        """Answer this query with a failure: the asker gets `RemoteError(code, text)`.

        Args:
            code: a number of the application's own.
            text: at most 1 KiB of UTF-8 are sent.

        Raises:
            EvbusError: as for `reply`.
        """

def query_id(message: Message) -> bytes:
    """The id to answer a query with; empty for what is no query."""

def claim_answer(message: Message) -> bool:
    """Take the right to answer a query, which exists once however many handlers have it. Returns whether it was
    free.
    """

def release_answer(message: Message) -> None:
    """Give the right back: the answer could not be sent."""

def handler_done(message: Message, failure: tuple[int, str] | None) -> tuple[int, str] | None:
    """One of the handlers of a query has ended without an answer.

    Args:
        failure: (code, text) if it failed, None if it had nothing to say.

    Returns:
        the first failure, to be told to the asker, if this was the last handler and none answered; else None.
    """
