"""Waking threads one after the other: everybody is woken, whoever else gives up, and what they send goes out."""

from __future__ import annotations

import ctypes
import threading
from random import Random

import pytest

from evbus._frame import Ring
from evbus._outbox import Clock, Outbox
from evbus._wake import Chain, Wakeup
from evbus.wire import Dialect

WAIT = 20.0


class Sink:
    """Takes all, and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.data = b""

    def flush(self, ring: Ring) -> int:
        self.calls += 1
        self.data += ring.take()
        return 0


@pytest.fixture
def outbox() -> Outbox:
    return Outbox(Clock())


@pytest.fixture
def chain(outbox: Outbox) -> Chain:
    return Chain(outbox)


def test_called_before_it_waits(chain: Chain) -> None:
    one = Wakeup(chain)
    one()
    one()
    assert one.wait()
    assert not one.wait(0)


def test_not_called_in_time(chain: Chain) -> None:
    one = Wakeup(chain)
    assert not one.wait(0.001)
    one()  # too late, and wakes nobody
    others = [Wakeup(chain) for _ in range(10)]
    for other in others:
        other()
    assert all(other.wait(WAIT) for other in others)


def test_one_is_on_its_way_at_a_time(chain: Chain) -> None:
    wakeups = [Wakeup(chain) for _ in range(10)]
    for wakeup in wakeups:
        wakeup()
    assert len(chain) == 9
    for left in (8, 7, 6, 5, 4, 3, 2, 1, 0, 0):
        assert wakeups.pop(0).wait(0)
        assert len(chain) == left


def test_who_gives_up_while_queued_has_the_outcome_and_leaves_the_queue(chain: Chain) -> None:
    wakeups = [Wakeup(chain) for _ in range(3)]
    for wakeup in wakeups:
        wakeup()
    assert wakeups[2].wait(0)
    assert len(chain) == 1
    assert wakeups[0].wait(0)
    assert len(chain) == 0
    assert wakeups[1].wait(0)


def test_an_interrupt_does_not_break_the_chain(chain: Chain) -> None:
    started = threading.Event()
    raised = threading.Event()
    one = Wakeup(chain)

    class Interrupt(BaseException):
        pass

    def wait() -> None:
        try:
            started.set()
            while True:
                one.wait(0.01)
        except Interrupt:
            raised.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert started.wait(WAIT)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt)) == 1
    assert raised.wait(WAIT)
    thread.join()
    others = [Wakeup(chain) for _ in range(10)]
    for other in others:
        other()
    assert all(other.wait(WAIT) for other in others)


@pytest.mark.parametrize("seed", range(3))
def test_many_threads(chain: Chain, seed: int) -> None:
    random = Random(seed)
    rounds = 200
    slots: list[Wakeup | None] = [None] * 16
    ready = [threading.Semaphore(0) for _ in slots]
    outcomes: list[list[bool]] = [[] for _ in slots]

    def work(index: int) -> None:
        for _ in range(rounds):
            mine = Wakeup(chain)
            slots[index] = mine
            ready[index].release()
            patience = random.choice((-1.0, WAIT, 0.0005))
            outcomes[index].append(mine.wait(patience) or patience == 0.0005)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(slots))]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        for semaphore in ready:
            assert semaphore.acquire(timeout=WAIT)
        for slot in slots:
            assert slot is not None
            slot()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert outcomes == [[True] * rounds for _ in slots]
    assert len(chain) == 0


def test_what_the_woken_send_goes_together_and_nothing_stays(chain: Chain, outbox: Outbox) -> None:
    sink = Sink()
    outbox.attach(sink)
    outbox.open(Dialect.EVBUS_2, 1 << 20)
    packet = b"x" * 23
    outbox.pack_control(packet, True)
    assert sink.calls == 1
    wakeups = [Wakeup(chain) for _ in range(40)]
    for wakeup in wakeups:
        wakeup()
    for wakeup in wakeups:
        assert wakeup.wait(0)
        outbox.pack_control(packet, True)
    # Two good handfuls go at 16, the rest at the end of the chain; the last two one by one.
    assert sink.calls <= 1 + 2 + 1 + 2
    assert len(sink.data) == 41 * 23
    assert outbox.pending_bytes == 0


def test_the_end_of_the_chain_sends_what_gathered(chain: Chain, outbox: Outbox) -> None:
    sink = Sink()
    outbox.attach(sink)
    wakeups = [Wakeup(chain) for _ in range(6)]
    for wakeup in wakeups:
        wakeup()
    assert wakeups[0].wait(0)
    outbox.pack_control(b"y" * 23, True)
    assert sink.calls == 0
    for wakeup in wakeups[1:]:
        assert wakeup.wait(0)
    assert sink.data == b"y" * 23
