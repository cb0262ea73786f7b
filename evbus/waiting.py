"""How the synchronous client waits: for outcomes, and for room in the outgoing buffer."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from evbus._inbox import Waiter
from evbus._wake import Chain, Wakeup
from evbus.correlation import Notify, Sending
from evbus.errors import BufferFullError, EvbusError
from evbus.requests import Asking, Outgoing
from evbus.session import Session

__all__ = ["Waiting"]

# What an interpreter that ends without `disconnect` gives a client's last messages.
_LAST_FLUSH_S = 1.0


class Waiting:
    """Blocks the calling thread until the session has something for it. Any number of threads."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._outbox = session.outbox
        self._room = threading.Condition()
        self._chain = Chain(session.outbox)
        self._outbox.on_room = self._on_room
        _all.add(self)

    def outcome(self, start: Callable[[Notify], Waiter | None], seconds: float | None) -> Any:
        """Start a request and wait for its outcome.

        Args:
            start: is given what to call when the outcome is there; returns None if there is nothing to wait for.
            seconds: None: as long as it takes.
        """
        done = Wakeup(self._chain)
        waiter = start(done)
        return self._wait(waiter, done, seconds, seconds) if waiter is not None else None

    def exchange(self, make: Callable[[Notify], Sending], seconds: float | None) -> Any:
        """Send a message and wait for its outcome; `seconds` are for both."""
        done = Wakeup(self._chain)
        sending = make(done)
        begun = time.monotonic()
        self.push(sending, seconds)
        assert sending.waiter is not None
        left = None if seconds is None else begun + seconds - time.monotonic()
        return self._wait(sending.waiter, done, left, seconds)

    def ask(self, asking: Asking) -> Any:
        """Ask a query; returns what the user is to get."""
        done = Wakeup(self._chain)
        seconds = asking.seconds
        waiter = asking.start(done)
        if waiter is None:
            return asking.finish(self.exchange(asking.make, seconds))
        return asking.finish(self._wait(waiter, done, seconds, seconds))

    def carry(self, outgoing: Outgoing) -> Any:
        """Send a message; returns what the user is to get."""
        if outgoing.make is None:
            return None
        if outgoing.finish is None:
            self.push(outgoing.make(None), outgoing.seconds)
            return None
        return outgoing.finish(self.exchange(outgoing.make, outgoing.seconds))

    def push(self, sending: Sending, seconds: float | None) -> None:
        """Get a message into the buffer, waiting for room.

        Raises:
            BufferFullError: there was none in time.
        """
        deadline: float | None = None
        while not sending.pack():
            now = time.monotonic()
            if deadline is None:
                deadline = now + (threading.TIMEOUT_MAX / 2 if seconds is None else seconds)
            with self._room:
                if not self._outbox.want_room(sending.size):
                    continue
                if now >= deadline or not self._room.wait(deadline - now):
                    raise BufferFullError(self._outbox.pending_bytes, self._outbox.high_bytes)

    def _on_room(self) -> None:
        with self._room:
            self._room.notify_all()

    def _wait(self, waiter: Waiter, done: Wakeup, left: float | None, seconds: float | None) -> Any:
        try:
            if left is None or seconds is None:
                done.wait()
            elif not done.wait(min(max(left, 0.0), threading.TIMEOUT_MAX)):
                self._session.correlation.expire(waiter, seconds)
        except BaseException:  # Ctrl-C
            self._session.correlation.abandon(waiter)
            raise
        return waiter.result()

    def last_flush(self) -> None:
        """The interpreter ends: if the client was never disconnected, give its last messages a chance to leave."""
        if self._session.is_connected:
            with suppress(EvbusError):
                self.outcome(self._session.flush, _LAST_FLUSH_S)


_all: weakref.WeakSet[Waiting] = weakref.WeakSet()


@atexit.register
def _last_flush() -> None:
    for waiting in list(_all):
        waiting.last_flush()
