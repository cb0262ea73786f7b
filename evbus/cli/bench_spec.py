"""What `evbus bench` tells each of its processes, and what it hears from them: one JSON object a line."""

from __future__ import annotations

import os
import select
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from evbus.cli.bench_check import STAMP_BYTES, Histogram, Source, Tally, Window

__all__ = ["Link", "Result", "Spec"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The work of one process."""

    role: str
    """"publish", "subscribe", "ask", "answer" or "connect"."""
    url: str
    subject: str
    asynchronous: bool = False
    number: int = 0
    """Of this process among those of its role on its subject."""
    publishers: int = 1
    """On this subject."""
    first_publisher: int = 0
    subscribers: int = 1
    """On this subject; whose progress the publishers wait for."""
    size: int = 128
    count: int | None = None
    duration: float | None = None
    rate: float | None = None
    warm_up: int = 0
    window: int = 10_000
    at_once: int = 1
    """Queries under way at a time."""
    connections: int = 1
    check: bool = True
    progress: bool = False
    patience: float = 30.0
    """Seconds without any progress after which a process gives up on the others."""

    def source(self, window: Window) -> Source:
        """The messages of a publisher."""
        return Source(
            self.number,
            self.size,
            count=self.count,
            duration=self.duration,
            rate=self.rate,
            window=window,
            check=self.check,
            patience=self.patience,
        )

    def tally(self) -> Tally:
        """The check of a subscriber."""
        return Tally(
            self.publishers,
            self.size,
            check=self.check,
            # Often enough that publishers do not stand still.
            ack_every=max(self.window // (4 * self.publishers), 1),
            first=self.first_publisher,
        )


@dataclass(kw_only=True)
class Result:
    """What one process has done."""

    role: str
    messages: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    """Processor time of the process, all its threads, from the first counted message to the last."""
    own_s: float = 0.0
    """About how much of it is the bench's own: stamps and checks."""
    latency: list[list[int]] = field(default_factory=list)
    late: list[list[int]] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    reordered: int = 0
    damaged: int = 0
    unfinished: int = 0
    """Publishers whose end has not come: what they sent last may be lost."""
    problems: list[str] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    def take_tally(self, tally: Tally) -> None:
        """The figures of a subscriber."""
        self.messages = tally.received
        self.seconds = (tally.last_ns - tally.first_ns) / 1e9
        self.cpu_s = max(tally.last_cpu_ns - tally.first_cpu_ns, 0) / 1e9
        self.lost, self.repeated, self.reordered = tally.lost, tally.surplus, tally.reordered
        self.damaged, self.unfinished = tally.damaged, tally.unfinished
        if tally.same_clock:
            self.latency = times(tally.latencies)


def times(nanoseconds: Any) -> list[list[int]]:
    """A histogram, for JSON."""
    histogram = Histogram()
    histogram.add(nanoseconds)
    return histogram.to_json()


def own_cost(spec: Spec, source: bool) -> float:
    """Seconds of processor time that the bench's own work on one message takes, measured on 20,000."""
    bodies: list[bytes] = []
    maker = Source(
        spec.first_publisher,
        max(spec.size, STAMP_BYTES),
        count=20_000,
        duration=None,
        rate=None,
        window=Window(0, 1),
        check=spec.check,
    )
    maker.begin()
    began = time.thread_time()
    while (chunk := maker.take()) is not None:
        assert isinstance(chunk, list)
        bodies += chunk
    made = time.thread_time()
    if source:
        return (made - began) / len(bodies)
    add = spec.tally().add
    for body in bodies:
        add(body)
    return (time.thread_time() - made) / len(bodies)


class Link:
    """The pipe to the parent process: a Spec and "go" come in, progress and a Result go out."""

    def __init__(self) -> None:
        self._in = sys.stdin.fileno()
        self._out = sys.stdout.fileno()
        self._rest = b""
        self._last_progress = 0.0

    def line(self) -> bytes:
        """The next line; b"" when the parent has gone."""
        while b"\n" not in self._rest:
            data = os.read(self._in, 65536)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def spec(self) -> Spec:
        """What to do."""
        return msgspec.json.decode(self.line(), type=Spec)

    def ready(self) -> None:
        """Say that the work can begin, and wait for the parent to say so. Blocks."""
        self._send({"ready": True})
        if not self.line():
            raise SystemExit(1)

    def progress(self, done: int) -> None:
        """Tell how much is done, ten times a second at most."""
        now = time.monotonic()
        if now - self._last_progress > 0.1:
            self._last_progress = now
            self._send({"progress": done})

    @property
    def is_told_to_stop(self) -> bool:
        """Whether the parent has said one more thing, or has gone. Does not block."""
        return bool(self._rest) or bool(select.select([self._in], [], [], 0)[0])

    def result(self, result: Result) -> None:
        """The last word."""
        self._send({"result": asdict(result)})

    def _send(self, record: dict[str, Any]) -> None:
        data = msgspec.json.encode(record) + b"\n"
        while data:
            data = data[os.write(self._out, data) :]
