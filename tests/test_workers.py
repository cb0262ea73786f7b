"""The threads that run user code."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from evbus.workers import SerialQueue, WorkerPool

WAIT = 10.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_a_job_waits_for_no_other() -> None:
    pool = WorkerPool("pool-a")
    barrier = threading.Barrier(10)
    for _ in range(10):
        pool.submit(lambda: barrier.wait(WAIT))
    assert pool.wait_idle(WAIT)
    pool.close()


def test_threads_are_used_again_and_go_when_idle() -> None:
    pool = WorkerPool("pool-b", linger_s=0.05)
    seen: set[int] = set()
    for _ in range(50):
        pool.submit(lambda: seen.add(threading.get_ident()))
        assert pool.wait_idle(WAIT)
    assert len(seen) <= 3
    until(lambda: not threads_of("pool-b"))
    done = threading.Event()
    pool.submit(done.set)
    assert done.wait(WAIT)
    pool.close()


def test_taking_a_thread_that_is_just_leaving() -> None:
    pool = WorkerPool("pool-c", linger_s=0.0005)
    count = 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal count
        with lock:
            count += 1

    for n in range(3000):
        pool.submit(job)
        if n % 10 == 0:
            time.sleep(0.0005)
    assert pool.wait_idle(WAIT)
    assert count == 3000
    until(lambda: not threads_of("pool-c"))


def test_a_job_that_fails_does_not_end_its_thread(caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool("pool-d")

    def bad() -> None:
        raise SystemExit

    pool.submit(bad)
    assert pool.wait_idle(WAIT)
    ok = threading.Event()
    pool.submit(ok.set)
    assert ok.wait(WAIT)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    pool.close()


def test_waiting_from_inside_does_not_wait_for_oneself() -> None:
    pool = WorkerPool("pool-e")
    result: list[bool] = []
    pool.submit(lambda: result.append(pool.wait_idle(WAIT)))
    until(lambda: result)
    assert result == [True]
    assert not pool.is_worker
    pool.close()


def test_waiting_has_a_limit() -> None:
    pool = WorkerPool("pool-f")
    release = threading.Event()
    pool.submit(lambda: release.wait(WAIT))
    assert pool.busy == 1
    assert not pool.wait_idle(0.01)
    release.set()
    assert pool.wait_idle(WAIT)
    pool.close()


def test_closing_lets_threads_go_at_once() -> None:
    pool = WorkerPool("pool-g", linger_s=60.0)
    release = threading.Event()
    pool.submit(lambda: None)
    pool.submit(lambda: release.wait(WAIT))
    until(lambda: pool.busy == 1)
    pool.close()
    release.set()
    until(lambda: not threads_of("pool-g"))
    late = threading.Event()
    pool.submit(late.set)
    assert late.wait(WAIT)
    until(lambda: not threads_of("pool-g"))


def test_without_threads_to_be_had_the_job_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool("pool-h")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        pool.submit(lambda: None)
    assert pool.busy == 0
    queue = SerialQueue(pool)
    calls: list[int] = []
    queue.post(lambda: calls.append(1))
    monkeypatch.undo()
    queue.post(lambda: calls.append(2))
    assert pool.wait_idle(WAIT)
    assert calls == [1, 2]
    pool.close()


def test_serial_calls_keep_their_order_and_survive_each_other(caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool("pool-i")
    queue = SerialQueue(pool)
    calls: list[int] = []

    def call(n: int) -> None:
        calls.append(n)
        if n % 100 == 0:
            raise ValueError(n)

    def post(start: int) -> None:
        for n in range(start, start + 500):
            queue.post(lambda n=n: call(n))

    threads = [threading.Thread(target=post, args=(start,)) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(calls) == 1500)
    for start in (0, 1000, 2000):
        assert [n for n in calls if start <= n < start + 1000] == list(range(start, start + 500))
    assert len(caplog.records) == 15
    pool.close()
