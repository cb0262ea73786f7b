"""The one thread of a client that moves bytes. It runs a reactor and no user code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from evbus.client_core import ClientCore
from evbus.reactor import Reactor
from evbus.session import Session

__all__ = ["IoThread"]

T = TypeVar("T")


class IoThread:
    """Starts and stops the thread; makes calls on it. Start and stop are for one thread at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._reactor: Reactor | None = None
        self._core: ClientCore | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> ClientCore:
        """The core, on a running thread; it may run already."""
        if self._core is None:
            self._reactor = Reactor()
            self._core = ClientCore(self._reactor, self._session)
            self._thread = threading.Thread(target=self._reactor.run, name="evbus-io", daemon=True)
            self._thread.start()
        return self._core

    def stop(self) -> None:
        """End the connection and the thread; nothing happens if it does not run."""
        core, reactor, thread = self._core, self._reactor, self._thread
        if core is None or reactor is None or thread is None:
            return
        while not self.call(core.close):
            pass  # a thread that publishes is on its way out of the transport
        reactor.stop()
        thread.join()
        reactor.close()
        self._core = self._reactor = self._thread = None

    def call(self, function: Callable[[], T]) -> T:
        """Make a call on the thread and return, or raise, what it does."""
        assert self._reactor is not None
        done = threading.Lock()
        done.acquire()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as exc:  # noqa: BLE001 - raised below, in the thread that asked
                errors.append(exc)
            finally:
                done.release()

        self._reactor.call_threadsafe(run)
        done.acquire()
        if errors:
            raise errors[0]
        return results[0]
