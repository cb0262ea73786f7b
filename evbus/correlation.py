"""Requests and their outcomes: ids, who waits for what, and messages on their way into the outgoing buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from random import Random

from evbus._asking import Asker
from evbus._frame import pack, pack_headers
from evbus._inbox import Inbox, Waiter
from evbus._message import Message, claim_answer, release_answer
from evbus._outbox import PACK_CLOSED, PACK_OK, Outbox
from evbus.errors import (
    ConfigError,
    ConfirmTimeoutError,
    ConnectError,
    ConnectionLostError,
    EvbusError,
    QueryTimeoutError,
)
from evbus.wire import HEADER_BYTES_23, ObjectId

__all__ = ["AnsweredError", "Correlation", "Kept", "Notify", "Sending", "encode_headers"]

#: Called once when an outcome is there, from whatever thread found it; must be quick and must not raise.
Notify = Callable[[], object]

# A heartbeat's id is an i32; 0 is the one that nobody waits for.
_MAX_BEAT_ID = 2**31 - 1


def encode_headers(headers: Mapping[str, str] | None) -> bytes:
    """Message headers as they go into an envelope.

    Raises:
        ConfigError: not text to text, an empty name, or more than 16 KiB.
    """
    if not headers:
        return b""
    try:
        return pack_headers(dict(headers))
    except (TypeError, ValueError) as exc:
        raise ConfigError("headers", str(exc)) from exc


#: A message that waits for a connection: the subject's UTF-8, payload, headers, flags, codec.
Kept = tuple[bytes, bytes, bytes, int, int]
_KEPT_FIELDS: tuple[tuple[str, int | bytes], ...] = (("headers", b""), ("flags", 0), ("codec", 0))


class AnsweredError(EvbusError):
    """A query was answered here already. Users see it as an EvbusError."""


class Sending:
    """A message on its way into the outgoing buffer. Call `pack` until it returns True.

    Attributes:
        action: what it is, for errors: "publish", "query", "reply".
        waiter: who waits for its outcome; None if nobody does.
        size: bytes of its payload.
    """

    __slots__ = ("_correlation", "_fields", "_key", "_object_id", "_payload", "_query", "action", "size", "waiter")

    def __init__(
        self,
        correlation: Correlation,
        action: str,
        object_id: ObjectId,
        key: bytes,
        payload: bytes,
        waiter: Waiter | None = None,
        query: Message | None = None,
        **fields: int | bytes,
    ) -> None:
        self._correlation = correlation
        self._object_id = int(object_id)
        self._key = key
        self._payload = payload
        self._query = query  # that this answers
        self._fields = fields
        self.action = action
        self.waiter = waiter
        self.size = len(payload)

    def pack(self) -> bool:
        """Put it into the buffer. Returns False if there is no room now; nothing has happened then.

        Raises:
            NotConnectedError, ClientClosedError, PayloadTooLargeError: nothing has happened and never will.
            AnsweredError: it answers a query that was answered here already.
        """
        correlation, waiter = self._correlation, self.waiter
        if self._query is not None and not claim_answer(self._query):
            raise AnsweredError(f"the query on {self._query.subject!r} was answered already")
        if waiter is not None:
            # Before the packet: its outcome may be there before we are back.
            correlation.inbox.add_waiter(waiter)
        status = PACK_CLOSED
        try:
            status = correlation.outbox.pack_message(
                self._object_id,
                self._key,
                self._payload,
                **self._fields,  # type: ignore[arg-type]  # built by the session, with the names of pack_message
            )
        finally:
            if status != PACK_OK:
                if waiter is not None:
                    correlation.inbox.pop_waiter(waiter.task_id)
                if self._query is not None:
                    release_answer(self._query)
        if status != PACK_CLOSED:
            return status == PACK_OK
        if waiter is None and self._query is None and correlation.keep is not None:
            kept = correlation.keep(self)
            if kept is None:  # there is a connection again
                return self.pack()
            if kept:
                return True
        raise correlation.not_connected(self.action)

    def kept(self) -> Kept:
        """The message as `Outbox.open` takes it."""
        headers, flags, codec = (self._fields.get(name, default) for name, default in _KEPT_FIELDS)
        return self._key, self._payload, headers, flags, codec  # type: ignore[return-value]


class Correlation:
    """Ids of requests, and those who wait for their outcomes.

    Args:
        random: makes ids that other connections do not have.
        not_connected: the exception for an action that needs a connection when there is none.

    Attributes:
        asker: asks plain queries, quickly.
        keep: takes a message that found no connection; returns whether it did, or None if there is a connection again.
    """

    def __init__(
        self, inbox: Inbox, outbox: Outbox, random: Random, not_connected: Callable[[str], EvbusError]
    ) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.not_connected = not_connected
        self.keep: Callable[[Sending], bool | None] | None = None
        self._random = random
        self._prefix = ""
        self._ids = itertools.count(1)
        self._beat_ids = itertools.count(1)
        self._beats: dict[int, Waiter] = {}
        self.asker = Asker(inbox, outbox)
        self.renew()

    def renew(self) -> None:
        """A fresh connection: ids that no earlier one had."""
        prefix = f"{self._random.getrandbits(32):08x}"
        self._prefix = f"{prefix}-"
        self.asker.prefix = prefix

    def new_id(self) -> bytes:
        """An id for a request, such as `a1b2c3d4-1f`. Any thread."""
        return b"%s%x" % (self._prefix.encode(), next(self._ids))

    def waiter(
        self, action: str, subject: str = "", notify: Notify | None = None, *, many: bool = False, timeout: float = 0.0
    ) -> Waiter:
        """Somebody to wait for a request's outcome; not yet expected by the inbox."""
        return Waiter(self.new_id(), subject, action, notify, many, timeout)

    def expect_beat(self, waiter: Waiter) -> int:
        """The id of a heartbeat whose echo that one waits for."""
        beat = next(self._beat_ids) % _MAX_BEAT_ID + 1
        self._beats[beat] = waiter
        return beat

    def beat_heard(self, beat: int) -> Waiter | None:
        """The one who waited for that heartbeat's echo."""
        return self._beats.pop(beat, None)

    def forget_beat(self, waiter: Waiter) -> None:
        """That one no longer waits."""
        for beat, other in list(self._beats.items()):
            if other is waiter:
                self._beats.pop(beat, None)

    def expire(self, waiter: Waiter, timeout: float) -> None:
        """Its time is up: unless the outcome has just come, it is a timeout. A query is taken back at the server."""
        self._withdraw(waiter, _timed_out(waiter, timeout))

    def abandon(self, waiter: Waiter) -> None:
        """Nobody waits for it any more, for example because of Ctrl-C. A query is taken back at the server."""
        self._withdraw(waiter, ConnectionLostError(waiter.action, "nobody waits any more"))

    def _withdraw(self, waiter: Waiter, error: EvbusError) -> None:
        if waiter.task_id:
            self.inbox.pop_waiter(waiter.task_id)
        else:
            self.forget_beat(waiter)
        waiter.notify = None
        if waiter.fail(error) and waiter.action == "query" and self.inbox.is_announced:
            cancel = pack(HEADER_BYTES_23, ObjectId.CANCEL_QUERY, 1, 0, self.outbox.now_ms(), "s", waiter.task_id)
            self.outbox.pack_control(cancel)

    def fail_all(self, error: Callable[[str], EvbusError]) -> None:
        """The connection is gone, and every outcome with it.

        Args:
            error: makes the exception for an action that was under way.
        """
        waiters = self.inbox.take_waiters()
        beats, self._beats = self._beats, {}
        for waiter in (*waiters, *beats.values()):
            waiter.fail(error(waiter.action))


def _timed_out(waiter: Waiter, timeout: float) -> EvbusError:
    if waiter.action == "query":
        return QueryTimeoutError(waiter.subject, timeout)
    if waiter.action == "connect":
        return ConnectError(waiter.subject, f"no answer within {timeout:g} s")
    return ConfirmTimeoutError(waiter.subject, timeout)
