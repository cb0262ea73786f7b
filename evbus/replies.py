"""The replies to a query that asks everybody: one of each responder, until the last has replied or is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from evbus._message import Message
from evbus.errors import CodecError, EvbusError, RemoteError, ResponderLostError

if TYPE_CHECKING:
    from evbus._inbox import Waiter
    from evbus.correlation import Correlation, Notify, Sending
    from evbus.payload import Decoder

__all__ = ["Gathering", "Reply"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@final
class Reply(Generic[T_co]):
    """What one responder has replied to a `query_all`. Read-only.

    Attributes:
        error: why there is no value: RemoteError, the responder failed; ResponderLostError, its connection ended before
            it replied; CodecError, its answer does not fit the type asked for. None if there is a value.
        sender: the responder's connection id.
        message: the answer as it came; None if the responder failed or is lost.
    """

    __slots__ = ("_value", "error", "message", "sender")

    def __init__(self, value: T_co, message: Message | None, error: EvbusError | None, sender: int) -> None:
        self._value = value
        self.message = message
        self.error = error
        self.sender = sender

    @property
    def value(self) -> T_co:
        """The answer.

        Raises:
            RemoteError, ResponderLostError, CodecError: what `error` has.
        """
        if self.error is not None:
            raise self.error
        return self._value

    def __repr__(self) -> str:
        outcome = repr(self._value) if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return f"<Reply of connection {self.sender}: {outcome}>"


class Gathering(Generic[T]):
    """The replies to one query that have come and are not taken yet. For one taker at a time.

    Args:
        make: makes the query, given what to call for each reply and at the end.
        decoder: makes the replies' values; None if they are the messages.
        seconds: what it may all take.
    """

    def __init__(
        self,
        correlation: Correlation,
        make: Callable[[Notify], Sending],
        decoder: Decoder[Any] | None,
        seconds: float,
    ) -> None:
        self._correlation = correlation
        self._make = make
        self._decoder = decoder
        self.seconds = seconds
        self._waiter: Waiter | None = None
        self._replies: deque[object] = deque()
        self._closed = False

    def start(self, notify: Notify) -> Sending:
        """The query, to be packed.

        Args:
            notify: called when `take` may have something, from any thread; must not raise.
        """
        sending = self._make(notify)
        self._waiter = sending.waiter
        return sending

    def take(self) -> Reply[T] | None:
        """The next reply; None if there is none now.

        Raises:
            StopIteration: there will be no more.
            EvbusError: there will be no more because of that; told once.
        """
        waiter = self._waiter
        if self._closed or waiter is None:
            raise StopIteration
        if not self._replies:
            done = waiter.done  # looked at first: what was pushed before the end is found below
            self._replies.extend(waiter.take_replies())
            if done and not self._replies:
                self._closed = True
                waiter.result()
                raise StopIteration
        return self._reply(self._replies.popleft()) if self._replies else None

    def _reply(self, found: object) -> Reply[Any]:
        if not isinstance(found, Message):
            assert isinstance(found, (RemoteError, ResponderLostError))
            return Reply(None, None, found, found.sender)
        if self._decoder is None:
            return Reply(found, found, None, found.sender)
        try:
            return Reply(self._decoder(found.codec, found.data), found, None, found.sender)
        except CodecError as exc:
            exc.subject = found.subject
            return Reply(None, found, exc, found.sender)

    def expire(self) -> None:
        """The time is up. What has come can still be taken; then it is a timeout."""
        if self._waiter is not None:
            self._correlation.expire(self._waiter, self.seconds)

    def close(self) -> None:
        """Nobody takes any more; the server is told. Again: nothing happens."""
        if not self._closed:
            self._closed = True
            self._replies.clear()
            if self._waiter is not None:
                self._correlation.abandon(self._waiter)
