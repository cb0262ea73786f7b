"""The event loop: phases and their order, timers, registration, wake-up, errors."""

from __future__ import annotations

import logging
import math
import os
import random
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor, SocketWaker

BOTH = EVENT_READ | EVENT_WRITE


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoWaker:
    """For loops that nobody else wakes; counts."""

    def __init__(self) -> None:
        self.wakes = 0

    def fileno(self) -> int:
        return -1

    def wake(self) -> None:
        self.wakes += 1

    def drain(self) -> None:
        raise AssertionError("there is nothing to drain")

    def close(self) -> None:
        pass


class SpySelector(selectors.SelectSelector):
    """Notes what it is asked; never waits."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: list[float | None] = []
        self.calls: list[tuple[object, ...]] = []
        self.during: Callable[[], None] = lambda: None

    def register(self, fileobj, events, data=None):
        self.calls.append(("register", fileobj, events))
        return super().register(fileobj, events, data)

    def modify(self, fileobj, events, data=None):
        calls, self.calls = self.calls, []  # it modifies by taking out and putting in again
        key = super().modify(fileobj, events, data)
        self.calls = [*calls, ("modify", fileobj, events)]
        return key

    def unregister(self, fileobj):
        self.calls.append(("unregister", fileobj))
        return super().unregister(fileobj)

    def select(self, timeout=None):
        self.timeouts.append(timeout)
        self.during()
        return super().select(0)


SELECTORS = [None, selectors.SelectSelector]
SELECTORS += [getattr(selectors, name) for name in ("PollSelector", "EpollSelector") if hasattr(selectors, name)]


@pytest.fixture(params=SELECTORS, ids=lambda kind: kind.__name__ if kind else "default")
def loop(request: pytest.FixtureRequest) -> Iterator[Reactor]:
    with Reactor(selector=request.param() if request.param else None) as reactor:
        yield reactor
        assert reactor.errors == 0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spy() -> SpySelector:
    return SpySelector()


@pytest.fixture
def fake(clock: Clock, spy: SpySelector) -> Iterator[Reactor]:
    """A loop over a fake clock that never waits."""
    with Reactor(selector=spy, clock=clock, wakeup=NoWaker()) as reactor:
        yield reactor


@pytest.fixture
def pairs() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    opened: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        for sock in pair:
            sock.setblocking(False)
        opened.extend(pair)
        return pair

    yield make
    for sock in opened:
        sock.close()


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_reports_what_is_asked_for(loop, pairs):
    a, b = pairs()
    seen = []
    loop.register(a, EVENT_READ, seen.append)
    loop.run_once(0)
    assert seen == []
    b.send(b"x")
    loop.run_once()
    loop.run_once()
    assert seen == [EVENT_READ, EVENT_READ]  # level-triggered: nobody read
    loop.modify(a, BOTH)
    loop.run_once()
    assert seen[2:] == [BOTH]
    loop.modify(a, EVENT_WRITE)
    loop.run_once()
    assert seen[3:] == [EVENT_WRITE]
    assert loop.registered(a) == EVENT_WRITE
    loop.unregister(a)
    loop.run_once(0)
    assert len(seen) == 4
    assert loop.registered(a) is None


def test_a_descriptor_number_is_as_good_as_its_socket(loop, pairs):
    a, b = pairs()
    seen = []
    loop.register(a.fileno(), EVENT_READ, seen.append)
    b.send(b"x")
    loop.run_once()
    loop.modify(a, 0)
    loop.run_once(0)
    loop.unregister(a.fileno())
    assert seen == [EVENT_READ]


def test_interest_0_is_silent_even_about_hang_up(loop, pairs):
    a, b = pairs()
    seen = []
    loop.register(a, 0, seen.append)
    b.send(b"x")
    b.close()
    loop.run_once(0)
    loop.modify(a, EVENT_READ)
    loop.run_once()
    assert len(seen) == 1
    loop.modify(a, 0)
    loop.run_once(0)
    loop.modify(a, 0)
    loop.unregister(a)
    assert len(seen) == 1


@pytest.mark.parametrize("events", [EVENT_READ, EVENT_WRITE, BOTH])
def test_hang_up_is_reported_as_what_was_asked_for(loop, pairs, events):
    a, b = pairs()
    b.close()
    seen = []
    loop.register(a, events, seen.append)
    loop.run_once()
    assert seen == [events]


def test_modify_asks_the_selector_only_for_changes(fake, spy, pairs):
    a, _ = pairs()
    fd = a.fileno()
    fake.register(a, EVENT_READ, print)
    fake.modify(a, EVENT_READ)
    fake.modify(a, BOTH)
    fake.modify(a, BOTH)
    fake.modify(a, 0)
    fake.modify(a, 0)
    fake.modify(a, EVENT_WRITE)
    fake.unregister(a)
    assert spy.calls == [
        ("register", fd, EVENT_READ),
        ("modify", fd, BOTH),
        ("unregister", fd),
        ("register", fd, EVENT_WRITE),
        ("unregister", fd),
    ]
    spy.calls.clear()
    fake.register(a, 0, print)
    fake.unregister(a)
    assert spy.calls == []


def test_unregistered_in_the_same_turn_is_not_called(loop, pairs):
    ends = [pairs() for _ in range(2)]
    seen = []

    def first_takes_the_other_out(index: int) -> None:
        seen.append(index)
        loop.unregister(ends[1 - index][0])

    for index, (a, b) in enumerate(ends):
        loop.register(a, EVENT_READ, lambda _mask, index=index: first_takes_the_other_out(index))
        b.send(b"x")
    loop.run_once()
    assert len(seen) == 1


def test_interest_dropped_in_the_same_turn_is_not_reported(loop, pairs):
    ends = [pairs() for _ in range(2)]
    seen = []

    def first_silences_the_other(index: int, mask: int) -> None:
        seen.append(mask)
        loop.modify(ends[1 - index][0], EVENT_WRITE)

    for index, (a, b) in enumerate(ends):
        loop.register(a, BOTH, lambda mask, index=index: first_silences_the_other(index, mask))
        b.send(b"x")
    loop.run_once()
    assert seen == [BOTH, EVENT_WRITE]


def test_a_number_that_was_closed_and_opened_again_in_one_turn(loop, pairs):
    """The event of the old descriptor must not reach the new one, but the new one's own must, one turn later."""
    ends = [pairs() for _ in range(2)]
    new_seen: list[int] = []
    fds = []

    def first_replaces_the_other(index: int) -> None:
        loop.unregister(ends[index][0])
        old = ends[1 - index][0]
        fds.append(old.fileno())
        loop.unregister(old)
        old.close()
        a, b = pairs()
        if a.fileno() != fds[0]:
            a, b = b, a
        fds.append(a.fileno())
        b.send(b"x")
        loop.register(a, EVENT_READ, new_seen.append)

    for index, (a, b) in enumerate(ends):
        loop.register(a, EVENT_READ, lambda _mask, index=index: first_replaces_the_other(index))
        b.send(b"x")
    loop.run_once()
    assert fds[0] == fds[1]
    assert new_seen == []
    loop.run_once()
    assert new_seen == [EVENT_READ]


def test_registration_mistakes_are_named(loop, pairs):
    a, b = pairs()
    loop.register(a, EVENT_READ, print)
    with pytest.raises(ValueError, match="registered already"):
        loop.register(a, EVENT_READ, print)
    with pytest.raises(ValueError, match="mask"):
        loop.register(b, 4, print)
    with pytest.raises(ValueError, match="mask"):
        loop.modify(a, 4)
    with pytest.raises(KeyError):
        loop.modify(b, EVENT_READ)
    with pytest.raises(KeyError):
        loop.unregister(b)
    b.close()
    with pytest.raises(ValueError, match="closed"):
        loop.register(b, EVENT_READ, print)


def test_unregister_finds_what_was_closed_too_early(pairs):
    a, _ = pairs()
    with Reactor() as loop:
        loop.register(a, EVENT_READ, print)
        a.close()
        loop.unregister(a)
        with pytest.raises(KeyError):
            loop.unregister(a)


# --- a turn -----------------------------------------------------------------------------------------------------------


def test_phases_come_in_order(fake, clock, pairs):
    a, b = pairs()
    b.send(b"x")
    seen = []
    fake.at_turn_end(lambda: seen.append("end"))
    fake.call_later(0, lambda: seen.append("timer"))
    fake.call_soon(lambda: seen.append("soon"))
    fake.call_threadsafe(lambda: seen.append("threadsafe"))
    fake.register(a, EVENT_READ, lambda _mask: seen.append("ready"))
    fake.run_once()
    assert seen == ["ready", "threadsafe", "soon", "timer", "end"]


def test_call_soon_from_a_callback_is_the_next_turn_which_does_not_wait(fake, spy):
    seen = []

    def again() -> None:
        seen.append(len(seen))
        if len(seen) < 3:
            fake.call_soon(again)

    fake.call_soon(again)
    fake.run_once()
    assert seen == [0]
    fake.run_once()
    fake.run_once()
    fake.run_once(5)
    assert seen == [0, 1, 2]
    assert spy.timeouts == [0, 0, 0, 5]


def test_soon_from_a_ready_callback_waits_for_the_next_turn(fake, pairs):
    a, b = pairs()
    b.send(b"x")
    seen = []
    fake.register(a, EVENT_READ, lambda _mask: (a.recv(1), fake.call_soon(lambda: seen.append(1))))
    fake.run_once()
    assert seen == []
    fake.run_once()
    assert seen == [1]


def test_turn_end_runs_once_and_in_this_turn(fake, spy):
    seen = []
    fake.call_soon(lambda: fake.at_turn_end(lambda: seen.append("end")))
    fake.run_once()
    assert seen == ["end"]
    fake.run_once(5)
    assert seen == ["end"]
    assert spy.timeouts == [0, 5]


def test_turn_end_from_a_turn_end_is_the_next_turns_end(fake, spy):
    seen = []
    fake.at_turn_end(lambda: (seen.append(1), fake.at_turn_end(lambda: seen.append(2))))
    fake.run_once()
    assert seen == [1]
    fake.run_once()
    assert seen == [1, 2]
    assert spy.timeouts == [0, 0]


def test_now_is_one_reading_per_turn(fake, clock):
    seen = []

    def slow() -> None:
        clock.now += 7
        seen.append(fake.now())

    assert fake.now() == 1000
    clock.now = 1001  # outside a turn: as it is
    assert fake.now() == 1001
    fake.call_soon(slow)
    fake.run_once()
    assert seen == [1001]
    assert fake.now() == 1008


def test_has_work_is_what_a_turn_would_not_wait_for(fake, clock):
    assert not fake.has_work
    for add in (fake.call_soon, fake.at_turn_end, fake.call_threadsafe):
        add(lambda: None)
        assert fake.has_work
        fake.run_once()
        assert not fake.has_work
    timer = fake.call_later(1, lambda: None)
    assert not fake.has_work
    clock.now += 1
    assert fake.has_work
    timer.cancel()
    assert not fake.has_work


def test_the_turn_is_counted_and_cannot_be_nested(fake, caplog):
    fake.call_soon(fake.run_once)
    fake.call_soon(fake.close)
    fake.run_once()
    assert fake.turns == 1
    assert fake.errors == 2
    assert "cannot run the loop it is called by" in caplog.text
    assert "stop it first" in caplog.text


# --- timers -----------------------------------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_times(fake, clock):
    seen = []
    for n, delay in enumerate((3, 1, 2, 1)):
        fake.call_later(delay, lambda delay=delay, n=n: seen.append((delay, n)))
    fake.run_once(0)
    assert seen == []
    clock.now += 1
    fake.run_once(0)
    assert seen == [(1, 1), (1, 3)]  # equal ones as they were made
    clock.now += 10
    fake.run_once(0)
    assert seen[2:] == [(2, 2), (3, 0)]


def test_a_timer_is_active_until_it_runs_or_is_cancelled(fake, clock):
    seen = []
    runs = fake.call_later(1, lambda: seen.append(runs.active))
    never = fake.call_at(1001, lambda: seen.append("never"))
    assert (runs.when, runs.active, never.active) == (1001, True, True)
    never.cancel()
    never.cancel()
    clock.now += 1
    fake.run_once(0)
    assert seen == [False]
    assert not never.active
    runs.cancel()  # over: nothing happens
    assert fake._cancelled == 0
    assert fake.next_timer() is None


def test_a_timer_can_cancel_one_that_is_due_in_the_same_turn(fake, clock):
    seen = []
    fake.call_later(1, lambda: (seen.append(1), second.cancel()))
    second = fake.call_later(1, lambda: seen.append(2))
    fake.call_later(1, lambda: seen.append(3))
    clock.now += 1
    fake.run_once(0)
    assert seen == [1, 3]


@pytest.mark.parametrize("delay", [0, -5, -math.inf])
def test_a_timer_that_starts_itself_again_runs_once_a_turn_and_starves_nobody(fake, spy, delay):
    seen = []

    def again() -> None:
        seen.append("again")
        fake.call_later(delay, again)

    fake.call_later(delay, again)
    fake.call_later(0, lambda: seen.append("other"))
    fake.call_soon(lambda: seen.append("soon"))
    fake.run_once()
    assert seen == ["soon", "again", "other"]
    fake.run_once()
    assert seen[3:] == ["again"]
    assert spy.timeouts[-1] == 0


def test_the_wait_ends_with_the_next_timer(fake, spy, clock):
    fake.run_once()
    first = fake.call_later(2.5, print)
    fake.call_later(9, print)
    fake.run_once()
    fake.run_once(1)
    fake.run_once(4)
    clock.now += 1
    fake.run_once()
    first.cancel()
    fake.run_once()
    fake.run_once(-1)
    assert spy.timeouts == [None, 2.5, 1, 2.5, 1.5, 8.0, 0]
    assert fake.next_timer() == 1009


def test_far_timers_are_waited_for_in_pieces(fake, spy):
    fake.call_later(math.inf, print)
    fake.run_once()
    assert spy.timeouts == [86_400]
    with Reactor() as real:  # what epoll would refuse is cut
        real.call_later(1e12, print)
        real.call_soon(lambda: None)
        real.run_once()
        real.call_threadsafe(lambda: None)
        real.run_once()


def test_a_timer_cannot_be_due_at_nan(fake):
    with pytest.raises(ValueError, match="NaN"):
        fake.call_at(math.nan, print)
    with pytest.raises(ValueError, match="NaN"):
        fake.call_later(math.nan, print)


def test_delays_count_from_the_beginning_of_the_turn(fake, clock):
    timers = []

    def slow() -> None:
        clock.now += 3
        timers.append(fake.call_later(5, print))

    fake.call_soon(slow)
    fake.run_once()
    assert timers[0].when == 1005
    assert fake.call_later(5, print).when == 1008


def test_cancelled_timers_do_not_pile_up(fake):
    """As with queries that are answered in time: each has a timeout that is cancelled."""
    keep = [fake.call_later(1000 + n, print) for n in range(50)]
    for n in range(20_000):
        fake.call_later(3 + n / 1000, print).cancel()
        assert len(fake._heap) <= 250
    assert fake.next_timer() == keep[0].when
    for timer in keep:
        timer.cancel()
    assert fake.next_timer() is None
    assert fake._cancelled == 0


def test_a_sweep_in_the_midst_of_running_timers(fake, clock):
    seen = []
    others = [fake.call_later(100, print) for _ in range(300)]
    fake.call_later(1, lambda: (seen.append(1), [timer.cancel() for timer in others]))
    fake.call_later(1, lambda: seen.append(2))
    clock.now += 1
    fake.run_once(0)
    assert seen == [1, 2]
    assert fake.next_timer() is None
    assert (fake._heap, fake._cancelled) == ([], 0)


def test_timers_against_a_sorted_list(fake, clock):
    """Any mix of new, cancelled and due timers runs what a plain list would, in its order."""
    rng = random.Random(20)
    ran: list[int] = []
    expected: list[int] = []
    alive: dict[int, tuple[float, object]] = {}
    for n in range(3000):
        timer = fake.call_later(rng.choice([0, 1, 1, 2, 30, 500]) + rng.random(), lambda n=n: ran.append(n))
        alive[n] = (timer.when, timer)
        if rng.random() < 0.6:
            alive.pop(rng.choice(list(alive)))[1].cancel()
        if rng.random() < 0.1:
            clock.now += rng.random() * 3
            due = sorted((when, n) for n, (when, _) in alive.items() if when <= clock.now)
            expected += [n for _, n in due]
            for _, n in due:
                del alive[n]
            fake.run_once(0)
            assert ran == expected
    assert len(expected) > 100


# --- other threads ----------------------------------------------------------------------------------------------------


class CountingWaker(SocketWaker):
    def __init__(self) -> None:
        super().__init__()
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1
        super().wake()


def test_a_call_from_a_thread_wakes_a_waiting_loop(loop):
    done = threading.Event()
    thread = threading.Thread(target=loop.run)
    thread.start()
    for _ in range(100):
        done.clear()
        loop.call_threadsafe(done.set)
        assert done.wait(30)
    loop.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_burst_costs_one_byte(spy):
    waker = CountingWaker()
    with Reactor(selector=spy, wakeup=waker) as loop:
        seen = []

        def burst() -> None:  # as if other threads called while the loop waits
            spy.during = lambda: None
            for n in range(1000):
                loop.call_threadsafe(lambda n=n: seen.append(n))

        spy.during = burst
        loop.run_once()
        assert waker.wakes == 1
        assert seen == list(range(1000))
        spy.during = burst
        loop.run_once()
        assert waker.wakes == 2
        assert len(seen) == 2000
        loop.run_once()  # the bytes are drained: nothing is ready
        assert len(seen) == 2000


def test_no_byte_is_written_to_a_loop_that_does_not_wait(spy):
    waker = CountingWaker()
    with Reactor(selector=spy, wakeup=waker) as loop:
        seen = []
        loop.call_threadsafe(lambda: seen.append(1))
        loop.call_soon(lambda: loop.call_threadsafe(lambda: seen.append(2)))
        loop.run_once()
        assert seen == [1]
        loop.run_once()
        assert seen == [1, 2]
        assert waker.wakes == 0
        assert spy.timeouts == [0, 0]


def test_a_call_handed_over_just_before_the_wait_is_not_slept_through(spy):
    """The loop looks at the deque after it has said that it will wait."""
    with Reactor(selector=spy, wakeup=NoWaker()) as loop:
        loop.call_threadsafe(lambda: None)
        loop.run_once()
        assert spy.timeouts == [0]
        loop.run_once()
        assert spy.timeouts == [0, None]


def test_calls_from_many_threads_arrive_all_and_in_their_order():
    with Reactor() as loop:
        seen: dict[int, list[int]] = {n: [] for n in range(4)}

        def caller(thread: int) -> None:
            for n in range(3000):
                loop.call_threadsafe(partial(seen[thread].append, n))
            loop.call_threadsafe(stop_after_the_last)

        def stop_after_the_last() -> None:
            if sum(map(len, seen.values())) == 4 * 3000:
                loop.stop()

        threads = [threading.Thread(target=caller, args=(n,)) for n in seen]
        for thread in threads:
            thread.start()
        loop.run()
        for thread in threads:
            thread.join(30)
        assert all(calls == list(range(3000)) for calls in seen.values())


def test_one_call_at_a_time_is_never_slept_through():
    """Two sides that wait for each other: a lost wake-up would end it."""
    with Reactor() as loop:
        turn = threading.Semaphore(0)
        thread = threading.Thread(target=loop.run)
        thread.start()
        for _ in range(3000):
            loop.call_threadsafe(turn.release)
            assert turn.acquire(timeout=30)
        loop.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_stop_before_run_ends_it_at_once_and_only_that_one(fake):
    seen = []
    fake.stop()
    fake.run()
    assert fake.turns == 0
    fake.call_soon(lambda: (seen.append(1), fake.stop(), fake.call_soon(lambda: seen.append(2))))
    fake.run()
    assert seen == [1]
    fake.call_soon(fake.stop)
    fake.run()
    assert seen == [1, 2]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_stop_from_a_signal_handler_ends_a_wait():
    with Reactor() as loop:
        old = signal.signal(signal.SIGALRM, lambda *_: loop.stop())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            loop.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


def test_waker_may_be_full_or_closed():
    waker = SocketWaker()
    for _ in range(5000):
        waker.wake()
    with selectors.DefaultSelector() as selector:
        selector.register(waker, selectors.EVENT_READ)
        assert selector.select(0)
    waker.drain()
    waker.close()
    waker.wake()
    assert waker.fileno() == -1


def test_wakeups_left_over_are_drained_in_the_next_turns(loop):
    for _ in range(5000):
        loop._waker.wake()
    for _ in range(10):
        loop.run_once(0)
    ready = []
    selector = selectors.SelectSelector()
    selector.register(loop._waker.fileno(), EVENT_READ)
    ready = selector.select(0)
    selector.close()
    assert ready == []


# --- errors and ends --------------------------------------------------------------------------------------------------


def test_an_exception_is_logged_and_told_and_ends_nothing(fake, clock, caplog, pairs):
    told = []
    fake.on_error = lambda exc, callback: told.append((str(exc), callback))
    seen = []

    def bad(name: str) -> None:
        raise RuntimeError(name)

    a, b = pairs()
    b.send(b"x")
    callbacks = {
        "ready": lambda _mask: bad("ready"),
        "threadsafe": lambda: bad("threadsafe"),
        "soon": lambda: bad("soon"),
        "timer": lambda: bad("timer"),
        "end": lambda: bad("end"),
    }
    fake.register(a, EVENT_READ, callbacks["ready"])
    fake.call_threadsafe(callbacks["threadsafe"])
    fake.call_soon(callbacks["soon"])
    fake.call_later(0, callbacks["timer"])
    fake.at_turn_end(callbacks["end"])
    for add in (fake.call_threadsafe, fake.call_soon, fake.at_turn_end, lambda call: fake.call_later(0, call)):
        add(lambda: seen.append(1))
    fake.run_once()
    assert seen == [1, 1, 1, 1]
    assert told == list(callbacks.items())
    assert fake.errors == 5
    assert caplog.text.count("Traceback") == 5
    assert {record.name for record in caplog.records} == {"evbus.reactor"}


def test_on_error_may_fail_too(fake, caplog):
    def worse(exc: Exception, callback: object) -> None:
        raise KeyError("worse")

    fake.on_error = worse
    fake.call_soon(lambda: 1 / 0)
    fake.run_once()
    assert "ZeroDivisionError" in caplog.text
    assert "error in on_error" in caplog.text


def test_a_flood_of_errors_does_not_flood_the_log(fake, clock, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(100):
        fake.call_soon(lambda: 1 / 0)
    fake.run_once()
    assert fake.errors == 100
    assert len(caplog.records) == 11
    assert "only counted" in caplog.records[-1].message
    clock.now += 1
    fake.call_soon(lambda: 1 / 0)
    fake.run_once()
    assert len(caplog.records) == 12


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_loop_and_loses_no_call(fake, stop):
    seen = []

    def interrupt() -> None:
        raise stop

    fake.call_soon(interrupt)
    fake.call_soon(lambda: seen.append("soon"))
    fake.call_later(0, lambda: seen.append("timer"))
    fake.at_turn_end(lambda: seen.append("end"))
    with pytest.raises(stop):
        fake.run()
    assert seen == []
    fake.run_once()
    assert seen == ["soon", "timer", "end"]
    assert fake.errors == 0


def test_close_frees_descriptors_and_refuses_calls(pairs):
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    before = count()
    loop = Reactor()
    loop.call_soon(print)
    loop.call_later(0, print)
    loop.close()
    loop.close()
    assert count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_threadsafe(print)
    loop.stop()


def test_a_loop_that_waits_on_another_thread_cannot_be_closed(spy):
    with Reactor(selector=spy, wakeup=NoWaker()) as loop:
        refused = []

        def close() -> None:  # as if another thread called it
            with pytest.raises(RuntimeError, match="stop it first"):
                loop.close()
            refused.append(True)

        spy.during = close
        loop.run_once()
        assert refused == [True]
        spy.during = lambda: None


def test_the_injected_selector_and_waker_are_closed(spy):
    waker = CountingWaker()
    Reactor(selector=spy, wakeup=waker).close()
    assert waker.fileno() == -1
    assert spy.get_map() is None


# ---- lingering -------------------------------------------------------------------------------------------------------


class TestLingering:
    """Looking again before sleeping, where something is expected at once."""

    def setup_method(self) -> None:
        self.clock, self.selector = Clock(), SpySelector()
        self.selector.during = self.tick
        self.reactor = Reactor(selector=self.selector, clock=self.clock, wakeup=NoWaker())
        self.at = 0

    def tick(self) -> None:
        self.clock.now += 1e-6

    def turn(self) -> list[float | None]:
        """Linger in a turn that finds nothing; what the selector was asked."""
        self.selector.timeouts.clear()
        self.reactor.linger(5e-6)
        self.reactor.run_once(0.25)
        return list(self.selector.timeouts)

    def test_in_vain_it_sleeps_after_the_time(self) -> None:
        assert self.turn() == [0, 0, 0, 0, 0, 0.25]

    def test_it_is_for_one_wait(self) -> None:
        self.turn()
        self.selector.timeouts.clear()
        self.reactor.run_once(0.25)
        assert self.selector.timeouts == [0.25]

    def test_what_comes_meanwhile_is_taken_without_sleeping(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            got: list[int] = []
            self.reactor.register(ours, EVENT_READ, got.append)

            def tick() -> None:
                self.tick()
                if len(self.selector.timeouts) == 3:
                    theirs.send(b"x")

            self.selector.during = tick
            self.reactor.linger(5e-6)
            self.reactor.run_once(0.25)
            assert got == [EVENT_READ]
            assert self.selector.timeouts == [0, 0, 0]
            self.reactor.unregister(ours)

    def test_it_is_given_up_for_a_while(self) -> None:
        for _ in range(8):
            assert len(self.turn()) == 6
        lingered = [turn for turn in range(300) if len(self.turn()) > 1]
        assert lingered == [63, 127, 191, 255]

    def test_a_call_from_another_thread_is_not_kept_waiting(self) -> None:
        called: list[int] = []

        def tick() -> None:
            self.tick()
            if not called and len(self.selector.timeouts) == 2:
                self.reactor.call_threadsafe(lambda: called.append(1))

        self.selector.during = tick
        assert self.turn() == [0, 0, 0]  # the last one instead of the sleep
        assert called == [1]
