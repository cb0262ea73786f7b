"""How a command that runs until something happens waits for it."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Ending"]

T = TypeVar("T")


class Ending(Generic[T]):
    """Values from other threads and from signal handlers, for the main thread to wait for.

    The waiting is a `select` on a socket that the interpreter's own signal handler writes to. Any wait for a lock, so
    also that of a queue, has a gap: a signal that comes just before it goes unnoticed until something else ends it.

    A context manager; main thread only, except for `put`.
    """

    def __init__(self) -> None:
        self._values: deque[T] = deque()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._before = -1

    def put(self, value: T) -> None:
        """Hand over a value. Any thread, and signal handlers."""
        self._values.append(value)
        with suppress(OSError):  # full: the waiter will wake up anyway; closed: nobody waits any more
            self._theirs.send(b"\0")

    def wait(self, timeout: float | None = None) -> T:
        """The next value.

        Raises:
            TimeoutError: there was none for `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._values:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            ready, _, _ = select.select([self._ours], [], [], left)
            if not ready:
                raise TimeoutError
            with suppress(BlockingIOError):
                self._ours.recv(4096)
        return self._values.popleft()

    def __enter__(self) -> Ending[T]:
        self._before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._before)
        self._ours.close()
        self._theirs.close()
