"""What a user asks of a client, made ready for its session: payloads encoded, outcomes decoded, timeouts checked.

Both clients send what comes from here; they differ only in how they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from evbus._inbox import Waiter
from evbus._message import Message
from evbus._outbox import PACK_OK, PACK_YIELD
from evbus.correlation import Notify, Sending
from evbus.errors import CodecError
from evbus.events import address_of, response_of
from evbus.options import check_timeout
from evbus.payload import Decoder, encode, make_decoder
from evbus.replies import Gathering
from evbus.session import MAX_QUERY_S, Session
from evbus.wire import Codec

__all__ = ["Asking", "Outgoing", "Publishing", "Requests"]

_BYTES = int(Codec.BYTES)

Headers = Mapping[str, str] | None


class Outgoing:
    """A message that is still to be sent, and what its outcome is good for.

    Attributes:
        make: makes it, given what to call when its outcome is there. None: there is nothing left to send, but a buffer
            full was sent, so that it is time to let others have a turn.
        seconds: for all of it; None: as long as it takes.
        finish: makes what the user gets from the outcome; None if nobody waits for it.
    """

    __slots__ = ("finish", "make", "seconds")

    def __init__(
        self,
        make: Callable[[Notify | None], Sending] | None,
        seconds: float | None = None,
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        self.make = make
        self.seconds = seconds
        self.finish = finish


class Asking:
    """A query that is still to be asked, and what its answer is good for.

    Attributes:
        seconds: for all of it.
    """

    __slots__ = ("_codec", "_decoder", "_headers", "_payload", "_session", "_subject", "seconds")

    def __init__(
        self,
        session: Session,
        subject: str,
        codec: Codec,
        payload: bytes,
        decoder: Decoder[Any] | None,
        seconds: float,
        headers: Headers,
    ) -> None:
        self._session = session
        self._subject = subject
        self._codec = codec
        self._payload = payload
        self._decoder = decoder
        self._headers = headers
        self.seconds = seconds

    def start(self, notify: Notify) -> Waiter | None:
        """Ask it, the short way.

        Returns:
            the waiter for the answer; None if only the long way will do: `make`, and packing what it gives.
        """
        if self._headers:
            return None
        return self._session.ask(self._subject, self._codec, self._payload, self.seconds, notify)

    def make(self, notify: Notify | None) -> Sending:
        """The query, to be packed."""
        return self._session.query(
            self._subject, self._codec, self._payload, headers=self._headers, notify=notify, timeout=self.seconds
        )

    def finish(self, answer: Message) -> Any:
        """What the user gets.

        Raises:
            CodecError: the answer does not fit; names the subject.
        """
        if self._decoder is None:
            return answer
        try:
            return self._decoder(answer.codec, answer.data)
        except CodecError as exc:
            exc.subject = self._subject
            raise


_TURN = Outgoing(None)


def _same(outcome: Any) -> Any:
    return outcome


class Requests:
    """Makes the messages of one client."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._codec = session.options.codec
        self.pack_event = session.outbox.pack_event

    def encoded(self, subject: str, message: object) -> tuple[Codec, bytes]:
        """A message's payload.

        Raises:
            CodecError: it cannot be sent; names the subject.
        """
        try:
            return encode(message, self._codec)
        except CodecError as exc:
            exc.subject = subject
            raise

    def publish(
        self, subject: Any, message: object, headers: Headers, confirm: bool, no_echo: bool, timeout: float | None
    ) -> Outgoing | None:
        """What there is still to be done for a publish: None if nothing is, for the message is in the buffer."""
        if type(subject) is not str:
            subject, message = address_of(subject, message)
        seconds = check_timeout(timeout, zero=not confirm)
        codec, payload = self.encoded(subject, message)
        if headers is None and not confirm and not no_echo:
            status = self.pack_event(subject, payload, int(codec))
            if status == PACK_OK:
                return None
            if status == PACK_YIELD:
                return _TURN

        def make(notify: Notify | None) -> Sending:
            return self._session.publish(
                subject,
                codec,
                payload,
                headers=headers,
                confirm=confirm,
                no_echo=no_echo,
                notify=notify,
                timeout=seconds or 0.0,
            )

        return Outgoing(make, seconds, _same if confirm else None)

    def query(self, subject: Any, message: object, response: Any, headers: Headers, timeout: float | None) -> Asking:
        """A query, whose outcome is the decoded answer."""
        return Asking(self._session, *self._asked(subject, message, response, timeout), headers)

    def query_all(
        self, subject: Any, message: object, response: Any, headers: Headers, timeout: float | None
    ) -> Gathering[Any]:
        """A query to everybody, and its replies."""
        subject, codec, payload, decoder, seconds = self._asked(subject, message, response, timeout)

        def make(notify: Notify | None) -> Sending:
            return self._session.query(
                subject, codec, payload, headers=headers, notify=notify, timeout=seconds, many=True
            )

        return Gathering(self._session.correlation, make, decoder, seconds)

    def _asked(
        self, subject: Any, message: object, response: Any, timeout: float | None
    ) -> tuple[str, Codec, bytes, Decoder[Any] | None, float]:
        seconds = check_timeout(timeout) or MAX_QUERY_S
        subject, message = address_of(subject, message)
        if response is None:
            response = response_of(message)
        codec, payload = self.encoded(subject, message)
        decoder = make_decoder(response, self._codec) if response is not Message else None
        return subject, codec, payload, decoder, seconds

    def raise_unreported(self) -> None:
        """After a flush: raises the first error that the server reported since the last one."""
        error = self._session.reports.take_unreported()
        if error is not None:
            raise error


class Publishing:
    """Many messages on their way. Iterating over it publishes them, in order, and stops at what has to be waited for.

    Attributes:
        count: how many were published; known when the iteration has ended.
    """

    def __init__(
        self,
        requests: Requests,
        subject: Any,
        messages: Iterable[object],
        headers: Headers,
        no_echo: bool,
        timeout: float | None,
    ) -> None:
        if isinstance(messages, (str, bytes, bytearray, memoryview, Mapping)):
            raise TypeError(
                f"publish_many takes an iterable of messages, not one of type {type(messages).__qualname__}"
            )
        self.count = 0
        self._requests = requests
        self._subject = subject
        self._messages = messages
        self._headers = headers
        self._no_echo = no_echo
        self._timeout = timeout

    def __iter__(self) -> Iterator[Outgoing]:
        publish, subject, headers, no_echo = self._requests.publish, self._subject, self._headers, self._no_echo
        pack = self._requests.pack_event
        plain = bytes if isinstance(subject, str) and headers is None and not no_echo else None
        count = 0
        for message in self._messages:
            # The short way, for what is published by the million.
            if type(message) is plain:
                status = pack(subject, message, _BYTES)
                if status == PACK_OK:
                    count += 1
                    continue
                if status == PACK_YIELD:
                    yield _TURN
                    count += 1
                    continue
            outgoing = publish(subject, message, headers, False, no_echo, self._timeout)
            if outgoing is not None:
                yield outgoing
            count += 1
        self.count = count
