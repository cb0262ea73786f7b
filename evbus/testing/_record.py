"""What passes on its way to the server: reads packets beside the stream, changes nothing, remembers what was published.

Reading along, and not a subscription to `>`: a subscriber would be counted in receipts, and queries that nobody answers
would no longer fail at once.
"""

from __future__ import annotations

import threading
import time

from evbus._frame import Ring, check_subject, detect_layout, next_packet, unpack, unpack_headers
from evbus.errors import EvbusError
from evbus.message import Message
from evbus.wire import HEADER_BYTES_22, ObjectId

__all__ = ["Reader", "Record", "matches"]

#: Larger packets are the server's to refuse.
_MOST_BYTES = 64 * 1024 * 1024
#: Messages named in an assertion.
_NAMED = 10


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject fits a pattern; both are valid."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    return len(wanted) == len(tokens) and all(want in ("*", token) for want, token in zip(wanted, tokens, strict=True))


class Record:
    """All messages that were published, in the order in which they went to the server. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: list[Message] = []
        self._taken: dict[str, int] = {}

    def add(self, message: Message) -> None:
        """One more."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def published(self, subject: str) -> list[Message]:
        """Those on a subject or pattern so far."""
        check_subject(subject, True)
        with self._changed:
            return [message for message in self._messages if matches(subject, message.subject)]

    def expect(self, subject: str, timeout: float, count: int) -> list[Message]:
        """The next `count` on a subject or pattern that no earlier call with the same text has returned.

        Raises:
            AssertionError: they were not there in time; says what was.
        """
        check_subject(subject, True)
        if count < 1:
            raise ValueError(f"count must be 1 or more, not {count!r}")
        deadline = time.monotonic() + timeout
        found: list[Message] = []
        with self._changed:
            position = self._taken.get(subject, 0)
            while True:
                while position < len(self._messages) and len(found) < count:
                    message = self._messages[position]
                    position += 1
                    if matches(subject, message.subject):
                        found.append(message)
                if len(found) == count:
                    self._taken[subject] = position
                    return found
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)) and time.monotonic() >= deadline:
                    raise AssertionError(self._complaint(subject, timeout, count, len(found)))

    def _complaint(self, subject: str, timeout: float, count: int, found: int) -> str:
        what = "nothing was published" if not found else f"{found} of {count} messages were published"
        text = f"{what} on {subject!r} within {timeout:g} s"
        before = sum(matches(subject, message.subject) for message in self._messages) - found
        if before:
            text += f" (beyond {before} that expect({subject!r}) has returned already)"
        others = [message for message in self._messages if not matches(subject, message.subject)]
        if not others:
            return f"{text}, nor on any other subject"
        lines = [f"  {message.subject}: {_short(message.data)}" for message in others[-_NAMED:]]
        return "\n".join([f"{text}; of other subjects ({len(others)} messages, the last ones):", *lines])


def _short(data: bytes) -> str:
    return repr(data) if len(data) <= 60 else f"{data[:60]!r}... ({len(data)} bytes)"


class Reader:
    """Reads along one connection's bytes. One thread at a time."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._ring: Ring | None = Ring()
        self._header = 0

    def feed(self, data: bytes) -> None:
        """Bytes that go to the server. What is no event bus stream is left to the server, and not read any further."""
        ring = self._ring
        if ring is None:
            return
        ring.write(data)
        try:
            if not self._header:
                self._header = detect_layout(ring, _MOST_BYTES)
            while self._header > 0:
                packet = next_packet(ring, self._header, _MOST_BYTES)
                if packet is None:
                    return
                object_id, version, _, unix_ms, body = packet
                if object_id == ObjectId.PUBLISH:
                    self._published(version, unix_ms, body)
            if self._header < 0:
                self._ring = None
        except EvbusError:
            self._ring = None

    def _published(self, version: int, unix_ms: int, body: bytes) -> None:
        codec, headers = 0, b""
        if version == 2:
            fields = unpack(body, "BBiisssyy")
            if fields is None:
                return
            _, codec, _, _, _, subject, query, headers, data = fields
        else:
            fields = unpack(body, "sssy") if self._header != HEADER_BYTES_22 else None
            if fields is None:  # the generations before 1.2 have no QueryTaskId
                fields = unpack(body, "ssy")
                if fields is None:
                    return
                fields = (*fields[:2], "", fields[2])
            _, subject, query, data = fields
        if query.strip():
            return  # the answer to a query
        try:
            check_subject(subject)
        except EvbusError:
            return  # the server refuses it too
        self._record.add(
            Message(subject, data, codec=codec, headers=unpack_headers(headers), timestamp=unix_ms / 1000.0)
        )
