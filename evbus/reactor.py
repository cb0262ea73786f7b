"""The event loop: readiness of descriptors, timers and calls from other threads, on one thread.

Theory of operation
===================

A *turn* (`run_once`) is: wait for readiness, then run, in this order, the callbacks of ready descriptors, the calls
that other threads handed over, the calls queued with `call_soon`, the timers that are due, and what asked to run at
the turn's end. Everything runs on the thread that calls `run`; only `call_threadsafe` and `stop` may be called from
others. The loop knows neither sockets nor packets: it gets descriptors and callables.

**Bounded work.** Each phase runs what was there when it began. What callbacks add to their own phase waits for the
next turn, which then does not block. So a callback that re-arms itself without delay shares the loop with everything
else, and no phase can starve another. How much a descriptor's callback does is for its owner to bound (one read, one
write).

**Waiting.** Any `selectors.BaseSelector` will do; the default is the system's best (epoll, kqueue). Readiness is
level-triggered: a callback that leaves bytes behind is called again in the next turn.

**Registration.** One record per descriptor number holds the interest and the callback, so `modify` is one comparison
when nothing changes. Interest 0 takes the descriptor out of the selector (epoll would go on to report errors and
hang-ups, and the loop would spin on them) but keeps the record. Events of a turn are checked against the records when
their turn comes: a callback earlier in the same turn may have dropped the interest, or closed the descriptor and
opened another one with the same number. The new one was registered in this turn and so cannot be meant. Nothing is
lost: it is reported again.

**Time.** The clock is read once per turn, after waiting, and once more before it if a timer decides how long to wait.
Within a turn, `now` is that reading, so a delay counts from the beginning of the turn.

**Timers** are a heap of (when, number, timer); the number keeps equal times in the order of their calls. Cancelling
only empties the timer; it leaves the heap when it comes to the top, or when more than half of the heap is cancelled
ones (most timeouts are cancelled: a client with 100,000 queries a second would otherwise keep all timeouts of the last
seconds).

**Wake-up.** A thread that hands over a call appends it to a deque and, only if the loop is waiting or about to wait,
writes one byte to a socketpair. The loop says that it is about to wait by putting the turn's number into `_asleep`,
and looks at the deque after that; a thread appends and then looks at `_asleep`. Whatever the order, one of them sees
the other. The first thread that woke a turn notes the number in `_woken`, so that a burst costs one byte; it does so
after the write, so that one that is stopped in between (by Ctrl-C) costs a needless byte and not a lost wake-up, and a
late note names a turn long over and hides nothing.
"""

from __future__ import annotations

import heapq
import logging
import math
import selectors
import socket
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = [
    "EVENT_READ",
    "EVENT_WRITE",
    "Cancellable",
    "FileLike",
    "HasFileno",
    "Loop",
    "Reactor",
    "SocketWaker",
    "Timer",
    "Waker",
]

EVENT_READ = selectors.EVENT_READ
EVENT_WRITE = selectors.EVENT_WRITE

# epoll takes its timeout as an int of milliseconds: a longer wait is cut and begun again.
_MAX_WAIT_S = 86_400.0
# Cancelled timers are swept out of the heap only when there are this many: below, it is not worth a thought.
_MIN_SWEEP = 64
# So often in a row lingering may be in vain; then it is tried again with every so manieth wait.
_LUCK = 8
_PROBE = 64
# A failing callback that is called again and again must not make the log the bottleneck.
_MAX_ERROR_LOGS_PER_S = 10

_log = logging.getLogger("evbus.reactor")


class Cancellable(Protocol):
    """A call that was ordered for later."""

    def cancel(self) -> object:
        """Do not make it. Again, or too late: nothing happens."""
        ...


class HasFileno(Protocol):
    """An object with a descriptor, such as a socket or a transport."""

    def fileno(self) -> int:
        """The descriptor's number; -1 once closed."""
        ...


#: What can be registered: a descriptor number or an object that has one.
FileLike = int | HasFileno


class Waker(Protocol):
    """Wakes a reactor that waits. A simulation gives its own."""

    def fileno(self) -> int:
        """The descriptor that becomes readable, or -1 if there is none to watch."""
        ...

    def wake(self) -> None:
        """Make the descriptor readable. Called from any thread, also after `close`; never blocks, never raises."""
        ...

    def drain(self) -> None:
        """Make it unreadable again."""
        ...

    def close(self) -> None:
        """Free the descriptor."""
        ...


class Loop(Protocol):
    """What the core of a client needs of an event loop: the half of a `Reactor` that an asyncio loop has too."""

    def now(self) -> float:
        """See `Reactor`."""
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Cancellable:
        """See `Reactor`."""
        ...

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Cancellable:
        """See `Reactor`."""
        ...

    def call_soon(self, callback: Callable[[], object]) -> None:
        """See `Reactor`."""
        ...

    def call_threadsafe(self, callback: Callable[[], object]) -> None:
        """See `Reactor`."""
        ...

    def register(self, fileobj: HasFileno, events: int, callback: Callable[[int], object]) -> None:
        """See `Reactor`."""
        ...

    def modify(self, fileobj: HasFileno, events: int) -> None:
        """See `Reactor`."""
        ...

    def unregister(self, fileobj: HasFileno) -> None:
        """See `Reactor`."""
        ...


class SocketWaker:
    """A waker over a socketpair: the one means that works with every selector on every system."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """The reading end."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Write one byte. A full buffer is as good as one byte more: the loop will wake up."""
        with suppress(OSError):  # full; or closed, and nobody is waiting any more
            self._writer.send(b"\0")

    def drain(self) -> None:
        """Read the bytes of all bursts that are there."""
        with suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()


class Timer:
    """A call that is due at a time; made by `Reactor.call_later` and `Reactor.call_at`."""

    __slots__ = ("_callback", "_reactor", "when")

    when: float
    """When it is due, in seconds of the reactor's clock."""

    def __init__(self, reactor: Reactor, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self._reactor = reactor
        self._callback: Callable[[], object] | None = callback

    @property
    def active(self) -> bool:
        """Whether it is still to come: neither begun nor cancelled."""
        return self._callback is not None

    def cancel(self) -> None:
        """Take it back; nothing happens if it has run or was cancelled. On the reactor's thread only."""
        if self._callback is not None:
            self._callback = None
            self._reactor._timer_cancelled()

    def __repr__(self) -> str:
        return f"<Timer at {self.when:.6f}{'' if self.active else ', over'}>"


class _Watch:
    """The record of one registered descriptor."""

    __slots__ = ("callback", "events", "fileobj", "turn")

    def __init__(self, fileobj: FileLike, events: int, callback: Callable[[int], object], turn: int) -> None:
        self.fileobj = fileobj
        self.events = events
        self.callback = callback
        self.turn = turn  # in which it was registered


class Reactor:
    """An event loop on one thread; see the module's docstring.

    An `Exception` in a callback is logged with its traceback and given to `on_error`; it never ends the loop. Others
    (KeyboardInterrupt, SystemExit) leave `run` or `run_once` at once; the loop can go on afterwards and has lost
    nothing but the event or call that raised.

    All methods belong to the loop's thread except `call_threadsafe` and `stop`.

    Args:
        selector: waits for readiness; the system's best by default. The reactor closes it.
        clock: monotonic seconds.
        wakeup: wakes the loop from other threads; a socketpair by default. The reactor closes it.
        on_error: called with each exception of a callback and the callback, after it was logged.

    Attributes:
        on_error: as above; may be set later.
        turns: turns begun so far.
        errors: exceptions of callbacks so far.
    """

    def __init__(
        self,
        *,
        selector: selectors.BaseSelector | None = None,
        clock: Callable[[], float] = time.monotonic,
        wakeup: Waker | None = None,
        on_error: Callable[[Exception, object], object] | None = None,
    ) -> None:
        self.on_error = on_error
        self.turns = 0
        self.errors = 0
        self._clock = clock
        self._now = clock()
        self._linger_s = 0.0
        self._luck = _LUCK
        self._in_turn = False
        self._stopping = False
        self._closed = False
        self._watches: dict[int, _Watch] = {}
        self._heap: list[tuple[float, int, Timer]] = []
        self._timers_made = 0
        self._cancelled = 0
        self._soon: deque[Callable[[], object]] = deque()
        self._ending: deque[Callable[[], object]] = deque()
        self._inbox: deque[Callable[[], object]] = deque()
        self._asleep = 0
        self._woken = 0
        self._log_window = -math.inf
        self._logged = 0
        self._selector = selector if selector is not None else selectors.DefaultSelector()
        self._waker: Waker = wakeup if wakeup is not None else SocketWaker()
        if self._waker.fileno() >= 0:
            self.register(self._waker.fileno(), EVENT_READ, self._on_wake)

    # ---- time ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of the clock: within a turn as it was at the turn's beginning, else as it is."""
        return self._now if self._in_turn else self._clock()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call back after a delay in seconds; at most 0 means in the next turn."""
        return self.call_at(self.now() + delay_s, callback)

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call back at a time of the clock. Timers run in the order of their times, equal ones as they were made.

        Raises:
            ValueError: `when` is not a number.
        """
        if when != when:
            raise ValueError("a timer cannot be due at NaN")
        # A time in the past counts as now: it must not overtake what is due already, or it could starve it.
        timer = Timer(self, max(when, self.now()), callback)
        self._timers_made += 1
        heapq.heappush(self._heap, (timer.when, self._timers_made, timer))
        return timer

    def next_timer(self) -> float | None:
        """When the next timer is due; None if there is none."""
        heap = self._heap
        while heap and not heap[0][2].active:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def _timer_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > _MIN_SWEEP and self._cancelled * 2 > len(self._heap):
            # In place: a turn that is running its timers holds on to the list.
            self._heap[:] = [entry for entry in self._heap if entry[2].active]
            heapq.heapify(self._heap)
            self._cancelled = 0

    # ---- descriptors ---------------------------------------------------------------------------------------------

    def register(self, fileobj: FileLike, events: int, callback: Callable[[int], object]) -> None:
        """Call back with the ready events (a mask) whenever a descriptor is ready for one of `events`.

        Args:
            fileobj: a descriptor or an object with one. Unregister it before closing it.
            events: EVENT_READ, EVENT_WRITE, both, or 0 for nothing yet.
            callback: gets the mask; never events that are not asked for at that moment. An error of the descriptor is
                reported as every event asked for.

        Raises:
            ValueError: registered already, closed, or `events` is no mask.
        """
        fd = _fileno(fileobj)
        if fd in self._watches:
            raise ValueError(f"descriptor {fd} is registered already")
        if not 0 <= events <= 3:
            raise ValueError(f"not a mask of events: {events!r}")
        if events:
            self._selector.register(fd, events)
        self._watches[fd] = _Watch(fileobj, events, callback, self.turns if self._in_turn else -1)

    def modify(self, fileobj: FileLike, events: int) -> None:
        """Change what a registered descriptor waits for; 0 keeps it registered but silent. Cheap when nothing changes.

        Raises:
            KeyError: not registered.
        """
        watch = self._watches[fileobj if type(fileobj) is int else fileobj.fileno()]  # type: ignore[union-attr]
        before = watch.events
        if events == before:
            return
        fd = _fileno(fileobj)
        if not 0 <= events <= 3:
            raise ValueError(f"not a mask of events: {events!r}")
        if not before:
            self._selector.register(fd, events)
        elif events:
            self._selector.modify(fd, events)
        else:
            self._selector.unregister(fd)
        watch.events = events

    def unregister(self, fileobj: FileLike) -> None:
        """Forget a descriptor; it gets no further call, not even for events of this turn.

        Raises:
            KeyError: not registered.
        """
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd < 0:  # closed too early: look for the record by the object
            fd = next((n for n, watch in self._watches.items() if watch.fileobj is fileobj), -1)
        watch = self._watches.pop(fd)
        if watch.events:
            self._selector.unregister(fd)

    def registered(self, fileobj: FileLike) -> int | None:
        """The events a descriptor waits for now; None if it is not registered."""
        watch = self._watches.get(fileobj if isinstance(fileobj, int) else fileobj.fileno())
        return watch.events if watch is not None else None

    # ---- calls ---------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call back in the next turn, after the descriptors; that turn does not wait. In the order of the calls."""
        self._soon.append(callback)

    def at_turn_end(self, callback: Callable[[], object]) -> None:
        """Call back once at the end of this turn.

        Called outside a turn, or by such a callback, it means the end of the next turn, which then does not wait.
        """
        self._ending.append(callback)

    def call_threadsafe(self, callback: Callable[[], object]) -> None:
        """Call back on the loop's thread, soon; from any thread, also the loop's own. In the order of the calls.

        A call that was handed over when the loop has ended is not made unless the loop is run again.

        Raises:
            RuntimeError: the reactor is closed.
        """
        if self._closed:
            raise RuntimeError("the reactor is closed")
        self._inbox.append(callback)
        self._wake()

    def _wake(self) -> None:
        turn = self._asleep
        if turn and self._woken != turn:
            self._waker.wake()
            self._woken = turn

    def _on_wake(self, _mask: int) -> None:
        self._waker.drain()

    @property
    def has_work(self) -> bool:
        """Whether a turn would find something to do besides descriptors: a call, or a timer that is due."""
        if self._soon or self._ending or self._inbox:
            return True
        due = self.next_timer() if self._heap else None
        return due is not None and due <= self.now()

    # ---- turns ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run turns until `stop`."""
        try:
            while not self._stopping:
                self.run_once()
        finally:
            self._stopping = False

    def stop(self) -> None:
        """Make `run` return when its current turn is over; if it has not begun, as soon as it begins.

        From any thread, and from a signal handler.
        """
        self._stopping = True
        self._wake()

    def linger(self, seconds: float) -> None:
        """Before the loop sleeps next, look for readiness again and again for so long: something is expected at once.

        It costs processor time, so it is given up for a while when it was in vain a few times.
        """
        self._linger_s = seconds

    def _look_again(self) -> list[tuple[selectors.SelectorKey, int]]:
        if self._luck <= 0:
            self._luck -= 1
            if self._luck > -_PROBE:
                return []
            self._luck = 0
        select, clock = self._selector.select, self._clock
        end = clock() + self._linger_s
        while not self._inbox and not self._stopping:
            events = select(0)
            if events:
                self._luck = _LUCK
                return events
            if clock() >= end:
                break
        self._luck = max(self._luck - 1, 0)
        return []

    def run_once(self, timeout: float | None = None) -> None:
        """One turn; see the module's docstring.

        Args:
            timeout: wait at most so many seconds for something to do; None: as long as it takes.
        """
        if self._in_turn:
            raise RuntimeError("a callback cannot run the loop it is called by")
        self.turns = turn = self.turns + 1
        soon = self._soon
        if soon or self._ending:
            events = self._selector.select(0)
        elif self._linger_s and (events := self._look_again()):
            pass
        else:
            if self._heap:
                due = self.next_timer()
                if due is not None:
                    wait = min(max(due - self._clock(), 0.0), _MAX_WAIT_S)
                    timeout = wait if timeout is None or wait < timeout else timeout
            self._asleep = turn
            # Only now: see "Wake-up" above.
            if self._inbox or self._stopping or (timeout is not None and timeout < 0):
                timeout = 0
            try:
                events = self._selector.select(timeout)
            finally:
                self._asleep = 0
        self._now = now = self._clock()
        self._linger_s = 0.0
        self._in_turn = True
        try:
            soon_count = len(soon)
            if events:
                self._dispatch(events, turn)
            inbox = self._inbox
            if inbox:
                self._call_each(inbox, len(inbox))
            if soon_count:
                self._call_each(soon, soon_count)
            if self._heap and self._heap[0][0] <= now:
                self._run_timers(now)
            if self._ending:
                self._call_each(self._ending, len(self._ending))
        finally:
            self._in_turn = False

    def _dispatch(self, events: list[tuple[selectors.SelectorKey, int]], turn: int) -> None:
        watches = self._watches
        for key, ready in events:
            watch = watches.get(key.fd)
            if watch is None or watch.turn == turn:
                continue  # closed, or another one by now
            mask = ready & watch.events
            if mask:
                try:
                    watch.callback(mask)
                except Exception as exc:  # noqa: BLE001 - reported; one bad callback must not end the loop
                    self.report(exc, watch.callback)

    def _call_each(self, calls: deque[Callable[[], object]], count: int) -> None:
        # One by one off the queue, so that a KeyboardInterrupt leaves the rest in it.
        for _ in range(count):
            callback = calls.popleft()
            try:
                callback()
            except Exception as exc:  # noqa: BLE001 - as in _dispatch
                self.report(exc, callback)

    def _run_timers(self, now: float) -> None:
        heap = self._heap
        newest = self._timers_made
        # Timers made by these timers are due now at the earliest and have higher numbers: they end the loop.
        while heap and heap[0][0] <= now and heap[0][1] <= newest:
            timer = heapq.heappop(heap)[2]
            callback = timer._callback
            if callback is None:
                self._cancelled -= 1
                continue
            timer._callback = None
            try:
                callback()
            except Exception as exc:  # noqa: BLE001 - as in _dispatch
                self.report(exc, callback)

    def report(self, exc: Exception, callback: object) -> None:
        """Log an exception with its traceback and tell `on_error`, as is done for those of callbacks."""
        self.errors += 1
        now = self.now()
        if now - self._log_window >= 1.0:
            self._log_window, self._logged = now, 0
        self._logged += 1
        if self._logged <= _MAX_ERROR_LOGS_PER_S:
            _log.error("error in a callback of the event loop: %r", callback, exc_info=exc)
        elif self._logged == _MAX_ERROR_LOGS_PER_S + 1:
            _log.error("more errors in callbacks of the event loop; the rest of this second is only counted")
        if self.on_error is not None:
            try:
                self.on_error(exc, callback)
            except Exception:  # noqa: BLE001 - as in _dispatch
                _log.exception("error in on_error of the event loop")

    def close(self) -> None:
        """Free the selector and the waker. Registered descriptors stay open; timers and calls are forgotten.

        Raises:
            RuntimeError: the loop runs, here or on another thread; `stop` it first.
        """
        if self._in_turn or self._asleep:
            raise RuntimeError("a loop that runs cannot be closed; stop it first")
        if self._closed:
            return
        self._closed = True
        self._watches.clear()
        self._heap.clear()
        self._cancelled = 0
        self._soon.clear()
        self._ending.clear()
        self._inbox.clear()
        self._selector.close()
        self._waker.close()

    def __enter__(self) -> Reactor:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _fileno(fileobj: FileLike) -> int:
    fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    if fd < 0:
        raise ValueError(f"{fileobj!r} has no descriptor; is it closed?")
    return fd
