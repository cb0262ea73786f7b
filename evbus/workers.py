"""Threads that run user code: as many as there are subscriptions at work, given back when they are idle."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["LINGER_S", "Job", "SerialQueue", "WorkerPool"]

_log = logging.getLogger("evbus.client")

Job = Callable[[], object]

#: Seconds that an idle thread waits for another job before it goes.
LINGER_S = 5.0


class _Worker:
    """One thread: its next job, whether that counts as busy, and the lock it sleeps on."""

    __slots__ = ("counts", "job", "wake")

    def __init__(self, job: Job, counts: bool) -> None:
        self.job: Job | None = job
        self.counts = counts
        self.wake = threading.Lock()
        self.wake.acquire()


class WorkerPool:
    """Daemon threads that run jobs. A job waits for no other: if no thread is idle, a new one is started.

    The pool has no lock on the way of a job: taking an idle worker off the list is one atomic step, so it belongs to
    whoever took it, be that a job's giver or the worker itself that leaves after `linger_s`.

    Args:
        name: prefix of the threads' names.
        linger_s: how long an idle thread waits for another job; LINGER_S by default.
    """

    def __init__(self, name: str, linger_s: float | None = None) -> None:
        self._name = name
        self._linger_s = LINGER_S if linger_s is None else linger_s
        self._idle: list[_Worker] = []
        self._busy = 0
        self._count = threading.Condition()
        self._local = threading.local()
        self._started = 0
        self._threads: set[threading.Thread] = set()
        self._closed = False

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is one of the pool's."""
        return getattr(self._local, "is_worker", False)

    @property
    def busy(self) -> int:
        """Number of jobs at work, of those that count."""
        return self._busy

    def submit(self, job: Job, *, counts: bool = True) -> None:
        """Run a job soon. Any thread.

        Args:
            counts: whether `busy` and `wait_idle` count it.

        Raises:
            RuntimeError: the system gives no more threads; the job was not taken.
        """
        if counts:
            self.begin()
        try:
            worker = self._idle.pop()
        except IndexError:
            self._start(job, counts)
            return
        worker.counts = counts
        worker.job = job
        worker.wake.release()

    def begin(self) -> None:
        """A job counts from now on, though it may run later, and elsewhere; `end` is its end."""
        with self._count:
            self._busy += 1

    def end(self) -> None:
        """The end of a job that counted."""
        with self._count:
            self._busy -= 1
            self._count.notify_all()

    def _start(self, job: Job, counts: bool) -> None:
        self._started += 1
        name = f"{self._name}-{self._started}"
        thread = threading.Thread(target=self._run, args=(_Worker(job, counts),), name=name, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            if counts:
                self.end()
            raise

    def _run(self, worker: _Worker) -> None:
        self._local.is_worker = True
        while True:
            job, worker.job = worker.job, None
            assert job is not None
            try:
                job()
            except BaseException:  # noqa: BLE001 - jobs catch what user code raises; this is our own fault, and is seen
                _log.exception("a worker's job failed")
            del job
            counts = worker.counts
            self._idle.append(worker)
            if counts:
                self.end()
            if worker.wake.acquire(timeout=0 if self._closed else self._linger_s):
                continue
            try:
                self._idle.remove(worker)
                self._threads.discard(threading.current_thread())
                return
            except ValueError:
                worker.wake.acquire()  # somebody has just taken this worker and will hand over a job

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no job is at work, the caller's own not counted. Returns whether that came true in time."""
        own = 1 if self.is_worker else 0
        with self._count:
            return self._count.wait_for(lambda: self._busy <= own, max(timeout, 0.0))

    def close(self) -> None:
        """Let threads go as soon as they are idle. Jobs are still taken."""
        self._closed = True
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return
            worker.counts = False
            worker.job = _nothing
            worker.wake.release()

    def join(self, timeout: float) -> bool:
        """After `close`: wait until the threads have ended, the caller's own not counted. Returns whether they have."""
        deadline = time.monotonic() + timeout
        own = threading.current_thread()
        for thread in list(self._threads):
            if thread is not own:
                thread.join(max(deadline - time.monotonic(), 0.0))
        return not self._threads - {own}


def _nothing() -> None:
    pass


class SerialQueue:
    """Calls that are made one after the other, in order, on the pool's threads."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._calls: deque[Job] = deque()
        self._lock = threading.Lock()
        self._running = False

    def post(self, call: Job) -> None:
        """Make a call soon. Any thread."""
        with self._lock:
            self._calls.append(call)
            if self._running:
                return
            self._running = True
        try:
            self._pool.submit(self._run)
        except RuntimeError:
            with self._lock:
                self._running = False  # the next post tries again
            _log.exception("no thread for a callback; it is late")

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._running = False
                    return
                call = self._calls.popleft()
            try:
                call()
            except BaseException:  # noqa: BLE001 - the callbacks guard themselves
                _log.exception("a callback failed")
