"""Accepting connections without being hurt by those that wait: bounded work, and peace when descriptors run out.

A listener with a waiting connection stays readable. When the process has no descriptor left to accept it with
(EMFILE), a level-triggered loop would be told so again at once and for ever, and burn a whole core on it. So the
acceptor takes its listeners out of the loop, tries again after 0.1 s, and waits twice as long after each further
failure, up to 1 s. The owner calls `resume` when it has closed a connection, so that the place is filled without
waiting for the timer. Connections that wait meanwhile stay in the system's backlog.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from evbus.reactor import EVENT_READ
from evbus.transport import accept

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from evbus.reactor import Reactor, Timer

__all__ = ["Acceptor"]

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
_LOG_INTERVAL_S = 1.0

# The process or the system has run out of something.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# The listener itself is no good any more.
_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})

_log = logging.getLogger("evbus.server")


class Acceptor:
    """Accepts connections on a reactor. All methods belong to the reactor's thread.

    Args:
        reactor: the listeners are registered with it at once.
        listeners: nonblocking, listening sockets; `close` closes them.
        on_accept: called with each new socket and its peer's address for logs, and owns the socket from then on. If it
            raises an Exception the socket is closed, and the reactor reports the exception.
        max_per_turn: connections taken per listener and turn of the loop.

    Attributes:
        accepted: connections given to `on_accept`.
        skipped: connections that failed before they could be taken (ECONNABORTED, EPERM, ...).
        exhausted: attempts that failed for want of descriptors or memory.
        pauses: how often errors made accepting pause.
        failed: connections that `on_accept` raised for.
    """

    def __init__(
        self,
        reactor: Reactor,
        listeners: Iterable[socket.socket],
        on_accept: Callable[[socket.socket, str], object],
        *,
        max_per_turn: int = 64,
    ) -> None:
        self.accepted = 0
        self.skipped = 0
        self.exhausted = 0
        self.pauses = 0
        self.failed = 0
        self._reactor = reactor
        self._listeners = list(listeners)
        self._on_accept = on_accept
        self._max_per_turn = max_per_turn
        self._pause_s = FIRST_PAUSE_S
        self._timer: Timer | None = None
        self._last_log = float("-inf")
        for listener in self._listeners:
            self._register(listener)

    @property
    def is_paused(self) -> bool:
        """Whether it waits for descriptors to become free."""
        return self._timer is not None

    def resume(self) -> None:
        """A descriptor may be free again: accept from the next turn on. Cheap if it is not paused."""
        if self._timer is not None:
            self._timer.cancel()
            self._retry()

    def close(self) -> None:
        """Stop accepting and close the listeners; connections that wait are refused by the system."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._listeners:
            self._drop(self._listeners[-1])

    def _register(self, listener: socket.socket) -> None:
        self._reactor.register(listener, EVENT_READ, lambda _mask: self._on_ready(listener))

    def _drop(self, listener: socket.socket) -> None:
        self._listeners.remove(listener)
        self._reactor.unregister(listener)
        listener.close()

    def _on_ready(self, listener: socket.socket) -> None:
        last_error: OSError | None = None
        for _ in range(self._max_per_turn):
            try:
                taken = accept(listener)
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self.exhausted += 1
                    self._pause(exc)
                    return
                if exc.errno in _BROKEN:
                    _log.error("stopped listening: accept failed: %s", exc)
                    self._drop(listener)
                    return
                # Linux also hands out errors of the connection that was waiting (accept(2)): it is gone, the next one
                # waits.
                self.skipped += 1
                last_error = exc
                continue
            if taken is None:
                return
            last_error = None
            self._pause_s = FIRST_PAUSE_S
            self.accepted += 1
            sock, peer = taken
            try:
                self._on_accept(sock, peer)
            except Exception as exc:  # noqa: BLE001 - reported; the connections behind this one must not suffer
                self.failed += 1
                sock.close()
                self._reactor.report(exc, self._on_accept)
            if listener not in self._listeners:
                return  # on_accept closed the acceptor
        if last_error is not None:
            # Nothing but errors at the end of a whole turn: it may go on like that for ever.
            self._pause(last_error)

    def _pause(self, exc: OSError) -> None:
        self.pauses += 1
        for listener in self._listeners:
            self._reactor.modify(listener, 0)
        now = self._reactor.now()
        if now - self._last_log >= _LOG_INTERVAL_S:
            self._last_log = now
            _log.warning("cannot accept connections, trying again in %.1f s: %s", self._pause_s, exc.strerror or exc)
        self._timer = self._reactor.call_later(self._pause_s, self._retry)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _retry(self) -> None:
        self._timer = None
        for listener in self._listeners:
            self._reactor.modify(listener, EVENT_READ)
