"""Which workloads there are, and how large each is made."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.errors import BenchError

__all__ = ["Workload", "default_workloads", "parse_shapes", "parse_sizes", "workloads"]

#: (publishers, subscribers, payload bytes).
_DEFAULT = [
    (1, 1, 16),
    (1, 1, 128),
    (1, 1, 4096),
    (1, 1, 65536),
    (1, 10, 128),
    (1, 100, 128),
    (1, 100, 16384),
    (10, 10, 128),
]
_QUICK = [(1, 1, 16), (1, 1, 128), (1, 1, 4096), (1, 10, 128)]

# One timed run: about a second of the slowest server, whatever the size.
_DELIVERIES = 2_000_000
_BYTES = 1_000_000_000
# What may be under way: enough that no server ever waits for the load, little enough for every server's stock limits on
# what may wait for one subscriber (redis: 8 MiB) and for memory when there are many.
_WINDOW_MESSAGES = 20_000
_WINDOW_SUBSCRIBER_BYTES = 4 << 20
_WINDOW_ALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Workload:
    """So many publishers send payloads of one size to so many subscribers, each of which receives all of them."""

    publishers: int
    subscribers: int
    size: int

    @property
    def name(self) -> str:
        """As in the table: "1 -> 10, 128 B"."""
        for unit, step in (("MiB", 1 << 20), ("KiB", 1 << 10)):
            if self.size >= step and self.size % step == 0:
                return f"{self.publishers} -> {self.subscribers}, {self.size // step} {unit}"
        return f"{self.publishers} -> {self.subscribers}, {self.size} B"

    def messages(self, scale: float) -> int:
        """Messages of each publisher in one timed run; scale 1 is a full run."""
        deliveries = min(_DELIVERIES, _BYTES // self.size) * scale
        return max(int(deliveries / (self.subscribers * self.publishers)), 50)

    @property
    def checked_messages(self) -> int:
        """Messages of each publisher in the run that checks every byte: enough to fill and wrap every buffer."""
        return max(min(self.messages(1.0), 5 * self.window // self.publishers), 20)

    @property
    def window(self) -> int:
        """Messages that may be under way to the slowest subscriber."""
        by_bytes = min(_WINDOW_SUBSCRIBER_BYTES, _WINDOW_ALL_BYTES // self.subscribers) // self.size
        return max(min(_WINDOW_MESSAGES, by_bytes), 16)


def default_workloads(quick: bool) -> list[Workload]:
    """The workloads of a plain call."""
    return [Workload(*row) for row in (_QUICK if quick else _DEFAULT)]


def workloads(shapes: list[tuple[int, int]], sizes: list[int]) -> list[Workload]:
    """Every shape with every size."""
    return [Workload(publishers, subscribers, size) for publishers, subscribers in shapes for size in sizes]


def parse_sizes(text: str) -> list[int]:
    """Payload sizes in bytes: "16,4096,64K,1M"."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([KM]?)\s*", part, re.I)
        size = int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2].upper()] if match else 0
        if not 12 <= size <= 1 << 20:
            raise BenchError(f"--sizes: {part.strip()!r} is not a size from 12 bytes to 1M")
        found.append(size)
    return found


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Publishers and subscribers: "1x1,1x10,10x10"."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        shape = (int(match[1]), int(match[2])) if match else (0, 0)
        if not all(1 <= count <= 500 for count in shape):
            raise BenchError(f"--shapes: {part.strip()!r} is not PUBLISHERSxSUBSCRIBERS with 1 to 500 of each")
        found.append(shape)
    return found
