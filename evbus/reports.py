"""What a client tells its user without being asked: errors, status changes, and counters of both."""

from __future__ import annotations

import logging
from collections.abc import Callable

from evbus._message import Message
from evbus.errors import CodecError, EvbusError
from evbus.message import ConnectStatus

__all__ = ["Reports", "one_line"]

_log = logging.getLogger("evbus.client")

OnError = Callable[[BaseException, "Message | None"], object]
OnStatus = Callable[[ConnectStatus], object]


def one_line(text: object) -> str:
    """A text for the log: one line without control characters, whoever wrote it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


class Reports:
    """Errors and status changes on their way to the user.

    Args:
        defer: runs a callback that may run user code: later, elsewhere, in order.
        on_error: the user's, gets an exception and the message it concerns, or None.
        on_status: the user's, gets each new status.

    Attributes:
        server_errors: how many were reported.
        slow_handlers: the same.
    """

    def __init__(
        self,
        defer: Callable[[Callable[[], object]], object],
        on_error: OnError | None = None,
        on_status: OnStatus | None = None,
    ) -> None:
        self.defer = defer
        self.on_error = on_error
        self.on_status = on_status
        self.server_errors = 0
        self.slow_handlers = 0
        self._unreported: EvbusError | None = None

    def status(self, status: ConnectStatus) -> None:
        """The status has changed."""
        on_status = self.on_status
        if on_status is not None:
            self.defer(lambda: _guarded("on_status", lambda: on_status(status)))

    def error(self, error: BaseException, message: Message | None = None) -> None:
        """Something failed that no call can raise: one line in the log, and `on_error`."""
        _log.error("%s: %s", type(error).__name__, one_line(error))
        self.tell(error, message)

    def tell(self, error: BaseException, message: Message | None = None) -> None:
        """Something failed that is in the log already: `on_error` only."""
        self.defer(lambda: self._tell(error, message))

    def server_error(self, error: EvbusError) -> None:
        """The server refused what nobody waits for, such as a publish without confirmation. The next flush raises
        it.
        """
        self.server_errors += 1
        if self._unreported is None:
            self._unreported = error
        self.error(error)

    def take_unreported(self) -> EvbusError | None:
        """The first error of the server since the last call."""
        error, self._unreported = self._unreported, None
        return error

    def handler_error(self, error: BaseException, message: Message | None, subject: str) -> None:
        """A handler raised, or its message did not fit. Called where user code may run."""
        if isinstance(error, CodecError):
            _log.error("a message for the handler of %s does not fit: %s", one_line(subject), one_line(error))
        else:
            _log.error("the handler of %s failed", one_line(subject), exc_info=error)
        self._tell(error, message)

    def slow_handler(self, subject: str, seconds: float, stack: str) -> None:
        """A call of a handler takes long. Any thread.

        Args:
            seconds: how long it has taken so far.
            stack: where it is.
        """
        self.slow_handlers += 1
        _log.warning("the handler of %s is at one message for %.1f s:\n%s", one_line(subject), seconds, stack.rstrip())

    def _tell(self, error: BaseException, message: Message | None) -> None:
        on_error = self.on_error
        if on_error is not None:
            _guarded("on_error", lambda: on_error(error, message))


def _guarded(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:  # noqa: BLE001 - user code, on a thread that must go on
        _log.exception("%s failed", name)
