"""Who runs a client's reactor, and what becomes of handlers' jobs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from evbus._clock import SystemClock
from evbus.dial import Address, dial
from evbus.io_thread import IoThread
from evbus.options import SessionOptions
from evbus.reports import Reports
from evbus.session import Session
from evbus.transport import TcpTransport
from evbus.workers import WorkerPool

WAIT = 10.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool("io-test", linger_s=0.05)
    yield made
    made.close()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("io-test")])


@pytest.fixture
def io(pool: WorkerPool) -> Iterator[IoThread]:
    session = Session(SessionOptions(), SystemClock(), Reports(lambda call: call()), lock=threading.RLock())
    thread = IoThread(session, (Address(),), dial, pool)
    thread.start()
    yield thread
    thread.stop()
    thread.stop()


def test_calls_are_made_on_the_reading_thread_and_return_or_raise(io: IoThread) -> None:
    assert io.call(threading.get_ident) == io.call(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        io.call(lambda: 1 // 0)


def test_the_reader_does_a_job_itself_while_another_thread_reads_on(io: IoThread, pool: WorkerPool) -> None:
    reader = io.call(threading.get_ident)
    release = threading.Event()
    ran_on: list[int] = []

    def job() -> None:
        ran_on.append(threading.get_ident())
        release.wait(WAIT)

    io.call(lambda: io.submit(job))
    until(lambda: ran_on)
    assert ran_on == [reader]
    assert io.call(threading.get_ident) != reader
    assert pool.busy == 1
    release.set()
    assert pool.wait_idle(WAIT)


def test_several_jobs_of_one_turn_wait_for_no_other(io: IoThread, pool: WorkerPool) -> None:
    barrier = threading.Barrier(4)

    def submit() -> None:
        for _ in range(3):
            io.submit(lambda: barrier.wait(WAIT))

    io.call(submit)
    barrier.wait(WAIT)
    assert pool.wait_idle(WAIT)


def test_jobs_from_other_threads_are_not_the_readers(io: IoThread, pool: WorkerPool) -> None:
    reader = io.call(threading.get_ident)
    ran_on: list[int] = []
    io.submit(lambda: ran_on.append(threading.get_ident()))
    until(lambda: ran_on)
    assert ran_on != [reader]
    assert io.call(threading.get_ident) == reader


def test_a_job_counts_from_the_moment_it_is_taken(io: IoThread, pool: WorkerPool) -> None:
    counted: list[int] = []

    def submit() -> None:
        io.submit(lambda: None)
        counted.append(pool.busy)

    io.call(submit)
    assert counted == [1]
    assert pool.wait_idle(WAIT)


def test_without_a_thread_to_read_on_nothing_stops(
    io: IoThread, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("evbus.io_thread._RETRY_S", 0.001)
    refuse = threading.Event()
    refuse.set()
    start = threading.Thread.start

    def maybe(self: threading.Thread) -> None:
        if refuse.is_set():
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", maybe)
    done = threading.Event()
    io.call(lambda: io.submit(done.set))
    until(lambda: caplog.records)
    assert io.call(threading.get_ident)
    assert not done.is_set()
    refuse.clear()
    assert done.wait(WAIT)
    assert pool.wait_idle(WAIT)


def test_a_job_may_stop_the_reading(io: IoThread) -> None:
    stopped = threading.Event()

    def job() -> None:
        io.stop()
        stopped.set()

    io.call(lambda: io.submit(job))
    assert stopped.wait(WAIT)


def test_stopping_closes_the_connection_even_if_a_thread_is_inside_it(io: IoThread) -> None:
    near, far = socket.socketpair()
    transport = TcpTransport(near)
    core = io.start().core
    io.call(lambda: core.attach(transport, 60.0))
    inside, leave = threading.Event(), threading.Event()

    class Slow:
        def __init__(self) -> None:
            self.closed = False

        def flush(self, ring: object) -> int:
            inside.set()
            leave.wait(WAIT)
            return 0

    outbox = io.call(lambda: core._session.outbox)
    outbox.attach(Slow())  # a flusher that takes its time, as a system call may
    flusher = threading.Thread(target=lambda: outbox.pack_control(b"x", True))
    flusher.start()
    assert inside.wait(WAIT)
    stopper = threading.Thread(target=io.stop)
    stopper.start()
    stopper.join(0.05)
    assert stopper.is_alive()
    assert transport.fileno() >= 0
    leave.set()
    stopper.join(WAIT)
    flusher.join(WAIT)
    assert transport.fileno() == -1
    far.close()
