"""Looks after handlers that take too long: from outside, one thread for all clients of the process, now and then.

Handlers and messages carry no clock for it. Whoever runs a handler leaves the batch that it is at in `at_work`, and a
batch counts the messages taken from it: as long as both stay the same, it is the same call.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from evbus._mailbox import Batch

__all__ = ["Watch", "Watched", "Watcher", "stack_of", "watcher"]

_log = logging.getLogger("evbus.client")

# Between two looks, in seconds: a quarter of the shortest limit, within these.
_SHORTEST_S, _LONGEST_S = 0.01, 2.5
# The modules that call handlers; what is below them in a stack is the user's.
_CALLERS = ("evbus.handlers", "evbus.aio_handlers")


class Watched(Protocol):
    """What runs a handler."""

    at_work: dict[object, Batch]

    def slow(self, seconds: float, stack: str) -> None:
        """A call takes long: how many seconds by now, and where it is."""
        ...


@dataclass
class _Call:
    batch: Batch  # kept, so that no other one can come to lie in its place
    taken: int
    since: float
    reported: bool = False


class Watch:
    """What was seen of the handlers so far. Has no thread and no clock."""

    def __init__(self) -> None:
        # Weak: a client that was never connected need not be closed.
        self._watched: weakref.WeakKeyDictionary[Watched, float] = weakref.WeakKeyDictionary()
        self._calls: dict[tuple[Watched, object], _Call] = {}

    def add(self, watched: Watched, limit_s: float) -> None:
        """Look after one, too."""
        self._watched[watched] = limit_s

    def remove(self, watched: Watched) -> None:
        """Look after it no more; nothing happens if nobody did."""
        self._watched.pop(watched, None)

    @property
    def interval_s(self) -> float | None:
        """Seconds from one look to the next; None if there is nothing to look at."""
        limits = list(self._watched.values())
        return min(max(min(limits) / 4, _SHORTEST_S), _LONGEST_S) if limits else None

    def look(self, now: float) -> None:
        """Report each call that has taken too long and was not reported yet.

        Args:
            now: the time in seconds, of any steady clock.
        """
        calls: dict[tuple[Watched, object], _Call] = {}
        for watched, limit in list(self._watched.items()):
            for worker, batch in list(watched.at_work.items()):
                call = self._calls.get((watched, worker))
                if call is None or call.batch is not batch or call.taken != batch.taken:
                    call = _Call(batch, batch.taken, now)
                elif not call.reported and now - call.since >= limit:
                    call.reported = True
                    watched.slow(now - call.since, stack_of(worker))
                calls[watched, worker] = call
        self._calls = calls


def stack_of(worker: object) -> str:
    """Where a handler is, from its own first line on.

    Args:
        worker: who runs it: a thread, by its id, or an asyncio task.
    """
    frames = sys._current_frames()
    found = list(_inward(frames.get(worker)) if isinstance(worker, int) else _frames_of(worker, frames))
    start = max(
        (at for at, (frame, _) in enumerate(found, 1) if frame.f_globals.get("__name__") in _CALLERS), default=0
    )
    summary = traceback.StackSummary.extract(iter(found[start:] or found))
    return "".join(summary.format()) or "  (it has just ended)\n"


def _inward(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """A thread's frames, and at which lines they are, from the outermost on."""
    found: list[tuple[FrameType, int]] = []
    while frame is not None:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]


def _frames_of(task: Any, threads: Mapping[int, FrameType]) -> Iterator[tuple[FrameType, int]]:
    """A task that waits: along what it awaits. One that runs: what its thread is at."""
    awaited: Any = task.get_coro()
    first: FrameType | None = getattr(awaited, "cr_frame", None)
    if getattr(awaited, "cr_running", False):
        for top in threads.values():
            stack = _inward(top)
            if any(frame is first for frame, _ in stack):
                yield from stack
                return
    while awaited is not None:
        frame: FrameType | None = None
        following: Any = None
        for prefix, inner in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
            frame = frame or getattr(awaited, f"{prefix}_frame", None)
            following = following or getattr(awaited, inner, None)
        if frame is None:
            return
        yield frame, frame.f_lineno
        awaited = following


class Watcher:
    """A Watch and its thread, which lives as long as there is something to look at. Any thread may use it."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, watched: Watched, limit_s: float) -> None:
        """Look after one, too."""
        with self._changed:
            self._watch.add(watched, limit_s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="evbus-watch", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None  # the next one tries again
                    _log.warning("no thread to look after slow handlers")
            self._changed.notify()

    def remove(self, watched: Watched) -> None:
        """Look after it no more; nothing happens if nobody did."""
        with self._changed:
            self._watch.remove(watched)
            self._changed.notify()

    @property
    def thread(self) -> threading.Thread | None:
        """The thread, if there is one."""
        return self._thread

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                interval = self._watch.interval_s
                if interval is None:
                    self._thread = None
                    return
                # Whoever is added or removed meanwhile does not put the look off.
                if self._changed.wait(max(due - time.monotonic(), 0.0)):
                    due = min(due, time.monotonic() + interval)
                    continue
            now = time.monotonic()
            due = now + interval
            try:
                self._watch.look(now)
            except Exception:  # noqa: BLE001 - the user's logging, for example; the others are looked after all the same
                _log.exception("looking after slow handlers failed")


#: The one of this process.
watcher = Watcher()

# A child process has the handlers' data, but neither their threads nor ours.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watcher.__init__)  # type: ignore[misc]  # as new
