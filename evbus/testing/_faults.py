"""Faults, and the streams that they happen to: one rule for the proxy and for memory.

A `Flow` is one direction of a connection: bytes that were written and may not be read yet. It gives out what the faults
let pass. Whoever moves the bytes holds `Faults.lock` meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from evbus.testing._record import Reader, Record

__all__ = ["Faults", "Flow", "Link"]

#: What a flow holds before its writer has to wait, about as much as a socket's buffers.
CAPACITY_BYTES = 256 * 1024


class Flow:
    """One direction of a connection.

    Args:
        link: the connection.
        reader: reads along; None for the direction from the server.
    """

    def __init__(self, link: Link, reader: Reader | None) -> None:
        self.link = link
        self.reader = reader
        self.size = 0
        self.passed = 0  # bytes that have reached the other side
        self.cut_at: int | None = None  # when so many have passed, the connection is cut
        self.ended = False
        self._chunks: deque[tuple[float, bytes]] = deque()  # with the time of arrival; b"" is the end

    @property
    def room(self) -> int:
        """Bytes that may be written now."""
        return 0 if self.ended else max(CAPACITY_BYTES - self.size, 0)

    def put(self, data: bytes, now: float) -> None:
        """Write."""
        self._chunks.append((now, data))
        self.size += len(data)

    def end(self, now: float) -> None:
        """No more comes."""
        if not self.ended:
            self.ended = True
            self._chunks.append((now, b""))

    def peek(self, now: float, limit: int) -> bytes | None:
        """The next bytes that may pass; b"" is the end of the stream; None: none now."""
        faults = self.link.faults
        if not self._chunks or faults.paused or self._chunks[0][0] + faults.delay_s > now:
            return None
        data = self._chunks[0][1]
        if self.cut_at is not None and data:
            limit = min(limit, max(self.cut_at - self.passed, 0))
        return data[:limit] if data else data

    def is_ready(self, now: float) -> bool:
        """Whether something may pass now."""
        return self.peek(now, 1) is not None

    def consume(self, size: int) -> None:
        """So many of the bytes that `peek` gave have passed; of the end, 0."""
        when, data = self._chunks.popleft()
        if self.reader is not None and size:
            self.reader.feed(data[:size])
        if size < len(data):
            self._chunks.appendleft((when, data[size:]))
        self.size -= size
        self.passed += size
        self.link.faults.passed += size

    @property
    def must_cut(self) -> bool:
        """Whether the byte after which the connection is to be cut has passed."""
        return self.cut_at is not None and self.passed >= self.cut_at

    @property
    def due(self) -> float | None:
        """When the next bytes are through their delay; None if none wait for that alone."""
        faults = self.link.faults
        return self._chunks[0][0] + faults.delay_s if self._chunks and not faults.paused else None


class Link:
    """One connection: to the server (`up`) and back (`down`)."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.broken = False
        self.up = Flow(self, Reader(faults.record))
        self.down = Flow(self, None)


class Faults:
    """What is wrong with the connections of one bus, and the connections. Any thread.

    Args:
        record: where the connections write down what is published.
        changed: called, with the lock held, when something may have become possible.
    """

    def __init__(self, record: Record, changed: Callable[[], object]) -> None:
        self.lock = threading.RLock()
        self.record = record
        self.changed = changed
        self.links: set[Link] = set()
        self.paused = False
        self.delay_s = 0.0
        self.passed = 0
        self._cut: tuple[int, bool] | None = None  # for the connection that comes next

    def open(self) -> Link:
        """A new connection."""
        with self.lock:
            link = Link(self)
            if self._cut is not None:
                self._arm(link, *self._cut)
            self.links.add(link)
            return link

    def gone(self, link: Link) -> None:
        """It has ended on both sides."""
        with self.lock:
            self.links.discard(link)

    def drop(self) -> int:
        """Reset all connections; returns how many."""
        with self.lock:
            links = [link for link in self.links if not link.broken]
            for link in links:
                link.broken = True
            self.changed()
            return len(links)

    def pause(self, paused: bool) -> None:
        """Let nothing pass, or let it pass again."""
        with self.lock:
            self.paused = paused
            self.changed()

    def delay(self, seconds: float) -> None:
        """Let bytes pass so long after they came."""
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"a delay is a number of seconds from 0 up, not {seconds!r}")
        with self.lock:
            self.delay_s = float(seconds)
            self.changed()

    def cut_after(self, size: int | None, *, to_server: bool) -> None:
        """Reset the first connection on which `size` more bytes pass; None takes it back."""
        if size is not None and size < 0:
            raise ValueError(f"a connection can be cut after 0 bytes or more, not {size!r}")
        with self.lock:
            self._disarm()
            if size is not None:
                self._cut = (size, to_server)
                for link in self.links:
                    self._arm(link, size, to_server)

    def cut(self, link: Link) -> None:
        """The byte has passed on this connection: it is the one, and the others carry on."""
        link.broken = True
        self._disarm()
        self.changed()

    @staticmethod
    def _arm(link: Link, size: int, to_server: bool) -> None:
        flow = link.up if to_server else link.down
        flow.cut_at = flow.passed + size

    def _disarm(self) -> None:
        self._cut = None
        for link in self.links:
            link.up.cut_at = link.down.cut_at = None

    @property
    def waiting(self) -> int:
        """Bytes on their way."""
        with self.lock:
            return sum(link.up.size + link.down.size for link in self.links)
