"""One connection of a client on a reactor: readiness in, packets to the session, bytes out.

Everything here belongs to the reactor's thread, except what the session's outbox calls to wake it. The synchronous
client runs it on a thread of its own; a simulation runs many on one.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from evbus.reactor import EVENT_READ, EVENT_WRITE, Cancellable, Loop
from evbus.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from evbus._inbox import Waiter
    from evbus._mailbox import Mailbox
    from evbus.correlation import Notify
    from evbus.transport import Transport

__all__ = ["ClientCore"]

_log = logging.getLogger("evbus.client")

# Reads after a failed write: what the server said before it went is worth knowing.
_LAST_READS = 16
# When the system gives no thread for a handler, this is when we ask again.
_RETRY_S = 0.1
# How often a burst of publishes is looked after; the longest that one of its last messages waits.
_POLL_S = 0.001


class ClientCore:
    """Drives a session's connections, one after the other.

    Args:
        reactor: the loop.
        session: what is said and heard. Its mailboxes' `wake` is called when they have messages and need a worker.

    Attributes:
        on_lost: called when a connection has ended, by whatever cause.
    """

    def __init__(self, reactor: Loop, session: Session) -> None:
        self._reactor = reactor
        self._session = session
        self._transport: Transport | None = None
        self._leaving: list[Transport] = []
        self._events = 0
        self._shaking = False
        self._timer: Cancellable | None = None
        self._poll_timer: Cancellable | None = None
        self._flushes = 0
        self.on_lost: Callable[[], object] | None = None
        session.outbox.wake = self._wake

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is gone, and the connection with it
            self._reactor.call_threadsafe(self._on_wake)

    def _on_wake(self) -> None:
        outbox = self._session.outbox
        if not outbox.is_polling or outbox.is_blocked or outbox.broken is not None:
            self._flush()
        # Also if it was blocked: the burst must end some time, or what comes later would wait for other packets.
        if outbox.is_polling and self._poll_timer is None and self._transport is not None:
            self._flushes = outbox.flushes
            self._poll_timer = self._reactor.call_later(_POLL_S, self._poll)

    def _poll(self) -> None:
        """A burst is on. As long as packers send by themselves they are left alone."""
        self._poll_timer = None
        outbox = self._session.outbox
        if outbox.flushes != self._flushes:
            self._flushes = outbox.flushes
            self._poll_timer = self._reactor.call_later(_POLL_S, self._poll)
        else:
            outbox.end_polling()
            self._flush()

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection, or one that is being made."""
        return self._transport is not None

    def attach(self, transport: Transport, timeout_s: float, notify: Notify | None = None) -> Waiter:
        """A new connection: shake hands and restore the subscriptions.

        Returns:
            the waiter for a usable connection; it fails with a ConnectError after at most `timeout_s`.
        """
        assert self._transport is None, "one connection at a time"
        self._transport = transport
        waiter = self._session.opened(transport, self._reactor.now(), timeout_s, notify)
        self._shaking = True
        self._events = EVENT_READ
        self._reactor.register(transport, self._events, self._on_ready)
        self._arm()
        self._flush()
        return waiter

    def close(self, error: Exception | None = None) -> bool:
        """End the connection, if there is one.

        Returns:
            whether its transport is closed. If not, another thread is just leaving it: call again.
        """
        if self._transport is not None:
            self._flush()
            self._lost(error)
        return not self._leaving

    def _on_ready(self, mask: int) -> None:
        transport, session = self._transport, self._session
        if transport is None:
            return
        session.outbox.hold()
        if mask & EVENT_READ:
            try:
                size = transport.fill(session.inbox.ring, session.inbox.limit_bytes)
            except (OSError, MemoryError) as exc:
                self._lost(exc)
                return
            if size == 0:
                self._lost(None)
                return
            if size > 0:
                session.received(self._reactor.now(), self._dispatch)
                if session.failure is not None:
                    self._lost(session.failure)
                    return
                if self._shaking:
                    # The next deadline is another one once the handshake is through.
                    self._shaking = session.is_shaking
                    self._arm()
        self._flush()

    def _dispatch(self) -> None:
        for box in self._session.inbox.take_ready():
            self._hand_over(box)

    def _hand_over(self, box: Mailbox) -> None:
        try:
            if box.wake is not None:
                box.wake()
        except RuntimeError as exc:
            _log.error("no thread for a handler (%s); trying again", exc)
            self._reactor.call_later(_RETRY_S, lambda: self._hand_over(box))

    def _flush(self) -> None:
        transport, outbox = self._transport, self._session.outbox
        if transport is None:
            return
        outbox.flush(True)
        if outbox.broken is not None:
            self._broken(transport, outbox.broken)
            return
        events = EVENT_READ | EVENT_WRITE if outbox.is_blocked else EVENT_READ
        if events != self._events:
            self._events = events
            self._reactor.modify(transport, events)

    def _broken(self, transport: Transport, error: OSError) -> None:
        """Writing has failed. What the server sent before may still be read, and may say why."""
        session = self._session
        try:
            for _ in range(_LAST_READS):
                if transport.fill(session.inbox.ring, session.inbox.limit_bytes) <= 0:
                    break
                session.received(self._reactor.now(), self._dispatch)
                if session.failure is not None:
                    break
        except (OSError, MemoryError):
            pass  # the first error is the one that tells
        self._lost(session.failure or error)

    def _lost(self, error: Exception | None) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        self._reactor.unregister(transport)
        self._session.lost(error)
        self._leaving.append(transport)
        self._close_left()
        if self.on_lost is not None:
            self.on_lost()

    def _close_left(self) -> None:
        # A thread that is still in its system call must not find the descriptor closed, or worse, taken by another
        # file.
        if self._session.outbox.flusher_inside:
            self._reactor.call_soon(self._close_left)
            return
        while self._leaving:
            self._leaving.pop().close()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_at(self._session.tick(self._reactor.now()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._session.outbox.hold()
        self._arm()
        if self._session.failure is not None:
            self._lost(self._session.failure)
        else:
            self._flush()
