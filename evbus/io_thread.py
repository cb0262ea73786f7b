"""What moves a client's bytes: a reactor that is always run by one of the worker threads.

Whoever reads a message that a handler waits for gives the reactor to another thread and runs the handler itself. So
user
code never holds up the reading, and yet a message reaches its handler without waiting for a thread to wake up: the
thread that has to wake up is the one that goes on reading.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from evbus.connector import Connector, Dialled
from evbus.dial import Server
from evbus.reactor import Reactor
from evbus.session import Session
from evbus.transport import Transport
from evbus.workers import Job, WorkerPool

__all__ = ["IoThread"]

T = TypeVar("T")

_log = logging.getLogger("evbus.client")

# When the system gives no thread, this is when we ask again.
_RETRY_S = 0.1


class IoThread:
    """Starts and stops the reactor; makes calls on its thread. Start and stop are for one thread at a time.

    Args:
        session: what is said and heard.
        servers: where to connect to.
        dial: connects, and blocks meanwhile; on a thread of its own.
        pool: gives the threads.
        make_reactor: gives the loop that one of them runs.
    """

    def __init__(
        self,
        session: Session,
        servers: Sequence[Server],
        dial: Callable[[Server, float], Transport],
        pool: WorkerPool,
        make_reactor: Callable[[], Reactor] = Reactor,
    ) -> None:
        self._session = session
        self._servers = servers
        self._dial = dial
        self._pool = pool
        self._make_reactor = make_reactor
        self._reactor: Reactor | None = None
        self._connector: Connector[Server] | None = None
        self._handing = threading.Lock()  # held where the reactor is given something to do, so that nothing gets lost
        self._ended = threading.Event()
        self._stopping = False
        self._reader = 0  # the thread that runs the reactor
        self._kept: Job | None = None  # what that thread will do next

    def start(self) -> Connector[Server]:
        """The connector, on a running reactor; it may run already."""
        if self._connector is None:
            self._reactor = self._make_reactor()
            self._stopping = False
            self._connector = Connector(self._reactor, self._session, self._servers, self._begin_dial)
            self._ended.clear()
            self._pool.submit(self._read, counts=False)
        return self._connector

    @property
    def connector(self) -> Connector[Server] | None:
        """The connector; None if the reactor does not run."""
        return self._connector

    def stop(self) -> None:
        """End the connection, or the search for one, and the reactor; nothing happens if it does not run."""
        connector, reactor = self._connector, self._reactor
        if connector is None or reactor is None:
            return
        while not self.call(connector.close):
            pass  # a thread that publishes is on its way out of the transport
        self._stopping = True
        reactor.stop()
        self._ended.wait()
        with self._handing:
            self._connector = self._reactor = None
        # What was handed over too late for it is done now: calls that somebody waits for, connections to be closed.
        reactor.call_soon(_nothing)
        reactor.run_once()
        reactor.close()

    def interrupt(self) -> None:
        """End the search for a connection, if there is one, soon; whoever waits for it is told. Any thread."""
        with self._handing:
            if self._connector is not None and self._reactor is not None:
                self._reactor.call_threadsafe(self._connector.stop)

    def _begin_dial(self, server: Server, timeout_s: float, dialled: Dialled) -> None:
        """Connect on a thread of the pool, as that may take its time."""
        reactor = self._reactor
        assert reactor is not None

        def job() -> None:
            outcome: Transport | BaseException
            try:
                outcome = self._dial(server, timeout_s)
            except BaseException as exc:  # noqa: BLE001 - told where the connection is waited for
                outcome = exc
            with self._handing:
                if self._reactor is reactor:
                    reactor.call_threadsafe(lambda: dialled(outcome))
                elif not isinstance(outcome, BaseException):
                    outcome.close()

        try:
            self._pool.submit(job, counts=False)
        except RuntimeError as exc:  # the system gives no more threads
            error = exc
            reactor.call_soon(lambda: dialled(error))

    def submit(self, job: Job) -> None:
        """Run a handler's job soon, on a thread where user code may run.

        Raises:
            RuntimeError: the system gives no more threads; the job was not taken.
        """
        if self._kept is None and self._reader == threading.get_ident():
            self._pool.begin()
            self._kept = job
        else:
            self._pool.submit(job)

    def _read(self) -> None:
        """Run the reactor, on a thread of the pool, until there is a job for this thread."""
        reactor = self._reactor
        assert reactor is not None
        self._reader = threading.get_ident()
        while not self._stopping:
            reactor.run_once()
            job, self._kept = self._kept, None
            if job is not None and self._hand_over(reactor, job):
                return
        self._reader = 0
        self._ended.set()

    def _hand_over(self, reactor: Reactor, job: Job) -> bool:
        """Give the reactor to another thread and do a job. False if there is no thread to be had: then nothing is done
        and the job comes up again.
        """
        self._reader = 0
        try:
            self._pool.submit(self._read, counts=False)
        except RuntimeError as exc:
            self._reader = threading.get_ident()
            self._pool.end()
            _log.error("no thread to read on while a handler runs (%s); trying again", exc)
            reactor.call_later(_RETRY_S, lambda: self.submit(job))
            return False
        try:
            job()
        finally:
            self._pool.end()
        return True

    def call(self, function: Callable[[], T]) -> T:
        """Make a call on the reactor's thread and return, or raise, what it does.

        Raises:
            NotConnectedError, ClientClosedError: the reactor does not run.
        """
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

        with self._handing:
            if self._reactor is None:
                raise self._session.not_connected("reach the server")
            self._reactor.call_threadsafe(run)
        done.acquire()
        if errors:
            raise errors[0]
        return results[0]


def _nothing() -> None:
    """Keeps a turn of the reactor from waiting."""
