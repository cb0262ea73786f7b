"""What the processes of `evbus bench` have in common: the stamp on each message, its check, and latencies."""

from __future__ import annotations

import math
import struct
import time
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["STAMP_BYTES", "Histogram", "Source", "Tally", "Window", "machine_mark"]

# Publisher, phase, sequence number, and when it was to be sent: nanoseconds of the monotonic clock, which all processes
# of a machine share.
_STAMP: Final = struct.Struct("<HHIQ")
STAMP_BYTES: Final = _STAMP.size
_WARM_UP: Final = 0
_COUNTED: Final = 1
_END: Final = 2  # the sequence number is how many were sent, the time is the machine's mark

_ACK: Final = struct.Struct("<HQ")

#: A publisher makes so many messages at a time; the clock and the window are looked at in between.
_CHUNK: Final = 64
#: Seconds until a publisher that has to wait for subscribers looks again.
_LOOK_AGAIN_S: Final = 0.001
#: Sequence numbers that are missing are remembered up to here, to tell what comes late from what comes twice.
_MISSING_AT_MOST: Final = 1_000_000


def machine_mark() -> int:
    """A number that is the same for all processes of one running system, and hardly for two: whose clock it is."""
    import platform

    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        text = platform.node()
    return zlib.crc32(text.encode())


class Histogram:
    """Times in nanoseconds, counted in steps of less than 1 %."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts = counts or {}

    def add(self, values: Iterable[int]) -> None:
        """Count these; negative ones as 0."""
        counts = self.counts
        for value in values:
            shift = max(value.bit_length() - 8, 0)
            step = max(value, 0) >> shift << shift
            counts[step] = counts.get(step, 0) + 1

    def merge(self, other: Histogram) -> None:
        """Count what the other has counted."""
        for step, count in other.counts.items():
            self.counts[step] = self.counts.get(step, 0) + count

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.counts.values())

    def percentile(self, share: float) -> int:
        """The time that `share` (0 to 1) of them stay at or below; 0 if there are none."""
        left = max(math.ceil(self.total * share), 1)
        for step in sorted(self.counts):
            left -= self.counts[step]
            if left <= 0:
                return step
        return 0

    def to_json(self) -> list[list[int]]:
        """For `from_json`."""
        return [[step, count] for step, count in sorted(self.counts.items())]

    @staticmethod
    def from_json(pairs: list[list[int]]) -> Histogram:
        """What `to_json` has written."""
        return Histogram({pair[0]: pair[1] for pair in pairs})


class Window:
    """How far the slowest of several subscribers is, by what they say. The client's threads write, a publisher reads.

    Args:
        subscribers: how many there are; with 0 nobody is waited for.
        messages: how many may be under way to the slowest.
    """

    def __init__(self, subscribers: int, messages: int) -> None:
        self._taken = [0] * subscribers
        self._messages = messages

    def on_ack(self, body: bytes) -> None:
        """A subscriber has said how many it has taken."""
        subscriber, taken = _ACK.unpack(body)
        self._taken[subscriber] = max(self._taken[subscriber], taken)

    def limit(self) -> float:
        """The number of the message that must not be sent yet."""
        return min(self._taken) + self._messages if self._taken else math.inf


class Source:
    """The messages of one publisher, as they become due.

    Args:
        publisher: its number.
        size: bytes of each message, at least STAMP_BYTES.
        count: how many; None: until the time is up.
        duration: seconds; None: until the count is reached.
        rate: messages a second, whether or not anybody keeps up; None: as fast as they are taken.
        window: who has to be waited for.
        check: stamp each message, or send the same bytes over and over.
        patience: seconds after which it ends if the window does not move.
    """

    def __init__(
        self,
        publisher: int,
        size: int,
        *,
        count: int | None,
        duration: float | None,
        rate: float | None,
        window: Window,
        check: bool,
        patience: float = 30.0,
    ) -> None:
        self._publisher = publisher
        self._filler = filler(size)
        self._count = count if count is not None else 2**32 - 1
        self._duration_ns = int(duration * 1e9) if duration is not None else None
        self._interval_ns = 1e9 / rate if rate is not None else None
        self._window = window
        self._check = check
        self._same = _STAMP.pack(publisher, _COUNTED, 0, 0) + self._filler
        self._began_ns = 0
        self._patience_ns = int(patience * 1e9)
        self._stuck_ns = 0  # since when there has been no room
        self.gave_up = False
        self.sent = 0
        self.late = array("q")

    def warm_up(self, count: int) -> list[bytes]:
        """Messages that do not count."""
        return [_STAMP.pack(self._publisher, _WARM_UP, 0, 0) + self._filler] * count

    def begin(self) -> None:
        """From now on the messages of `take` become due."""
        self._began_ns = time.monotonic_ns()

    def take(self) -> list[bytes] | float | None:
        """Messages to publish now, or seconds to wait, or None at the end."""
        now = time.monotonic_ns()
        passed = now - self._began_ns
        room = self._window.limit() - self.sent
        left = min(self._count - self.sent, _CHUNK)
        if self._interval_ns is None:
            if left <= 0 or (self._duration_ns is not None and passed >= self._duration_ns):
                return None
            if room < left:
                return self._no_room(now)
            times = [now] * left
        else:
            if self._duration_ns is not None:
                left = min(left, math.ceil(self._duration_ns / self._interval_ns) - self.sent)
            if left <= 0:
                return None
            due = int(passed / self._interval_ns) + 1 - self.sent
            if due <= 0:
                return (self.sent * self._interval_ns - passed) / 1e9
            if room <= 0:
                return self._no_room(now)
            # When it was to be sent, not when it is: whoever waited for a slow bus has waited, and this is counted.
            first, begin, interval = self.sent, self._began_ns, self._interval_ns
            times = [begin + int((first + index) * interval) for index in range(int(min(due, left, room)))]
            self.late.extend(now - at for at in times)
        number, self._stuck_ns = self.sent, 0
        self.sent += len(times)
        if not self._check:
            return [self._same] * len(times)
        pack, publisher, rest = _STAMP.pack, self._publisher, self._filler
        return [pack(publisher, _COUNTED, number + index, at) + rest for index, at in enumerate(times)]

    def _no_room(self, now: int) -> float | None:
        if not self._stuck_ns:
            self._stuck_ns = now
        self.gave_up = now - self._stuck_ns > self._patience_ns
        return None if self.gave_up else _LOOK_AGAIN_S

    def end(self) -> bytes:
        """The last message: how many there were."""
        return _STAMP.pack(self._publisher, _END, self.sent, machine_mark()) + self._filler


def filler(size: int) -> bytes:
    """What stands behind the stamp; no byte twice in a row."""
    pattern = bytes(index * 7 % 251 for index in range(251))
    return (pattern * (size // 251 + 1))[: size - STAMP_BYTES]


class Tally:
    """Checks what one subscriber receives: each message once, in its publisher's order, unharmed. One thread at a time.

    Args:
        publishers: how many there are, numbered from `first`.
        size: bytes of each message.
        check: look at the stamps, or only count.
        ack_every: `add` is true after so many messages.
    """

    def __init__(self, publishers: int, size: int, *, check: bool, ack_every: int, first: int = 0) -> None:
        self._first = first
        self._filler = filler(size)
        self._size = size
        self._check = check
        self._ack_every = ack_every
        self._next = [0] * publishers
        self._sent: list[int | None] = [None] * publishers
        self._missing: set[tuple[int, int]] = set()
        self._not_kept = 0
        self.received = 0
        self.repeated = 0
        self.reordered = 0
        self.damaged = 0
        self.same_clock = True
        self.first_ns = self.last_ns = 0
        self.first_cpu_ns = self.last_cpu_ns = 0
        self.latencies = array("q")

    def add(self, body: bytes) -> bool:
        """A message has come.

        Returns:
            whether the publishers should be told how far this subscriber is (`ack`).
        """
        if len(body) != self._size or not body.endswith(self._filler):
            self.damaged += 1
            return False
        publisher, phase, number, at = _STAMP.unpack_from(body)
        publisher -= self._first
        if not 0 <= publisher < len(self._next):
            self.damaged += 1
            return False
        if phase != _COUNTED:
            if phase == _END:
                self._sent[publisher] = number
                self.same_clock = self.same_clock and at == machine_mark()
            return False
        now = time.monotonic_ns()
        if not self.received:
            self.first_ns, self.first_cpu_ns = now, time.process_time_ns()
        self.received += 1
        if self._check:
            if number != self._next[publisher]:
                self._odd(publisher, number)
            else:
                self._next[publisher] = number + 1
            self.latencies.append(now - at)
        self.last_ns = now
        return not self.received % self._ack_every

    def _odd(self, publisher: int, number: int) -> None:
        due = self._next[publisher]
        if number > due:  # those between are lost, or still to come
            room = max(_MISSING_AT_MOST - len(self._missing), 0)
            kept = min(number - due, room)
            self._missing.update((publisher, missing) for missing in range(due, due + kept))
            self._not_kept += number - due - kept
            self._next[publisher] = number + 1
        elif (publisher, number) in self._missing:
            self._missing.remove((publisher, number))
            self.reordered += 1
        else:
            self.repeated += 1

    def ack(self, subscriber: int) -> bytes:
        """For `Window.on_ack`."""
        return _ACK.pack(subscriber, self.received)

    def finish(self) -> None:
        """All has come: this is when the measurement ends."""
        self.last_cpu_ns = time.process_time_ns()

    @property
    def is_complete(self) -> bool:
        """Whether every publisher has said that it is at its end."""
        return None not in self._sent

    @property
    def unfinished(self) -> int:
        """Publishers whose end has not come."""
        return self._sent.count(None)

    @property
    def lost(self) -> int:
        """Messages that were sent and have not come, as far as known."""
        if not self._check:
            return max(sum(sent or 0 for sent in self._sent) - self.received, 0) if self.is_complete else 0
        tail = sum(max(sent - due, 0) for sent, due in zip(self._sent, self._next, strict=True) if sent is not None)
        return len(self._missing) + self._not_kept + tail

    @property
    def surplus(self) -> int:
        """Messages that came twice; without stamps, those beyond what was sent."""
        if self._check or not self.is_complete:
            return self.repeated
        return max(self.received - sum(sent or 0 for sent in self._sent), 0)
