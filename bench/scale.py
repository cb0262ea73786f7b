"""How the server's cost grows: with subjects, patterns, connections and subscribers, and what a connection costs."""

from __future__ import annotations

import contextlib
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.errors import BenchError, UnavailableError
from bench.machine import cores, cpu_ns, descriptors, pinned, rss_bytes
from bench.native import Frames, Load, Outcome, compile_load
from bench.peers import PEERS, Peer

__all__ = ["GROWTHS", "Point", "scale"]

_SIZE = 128
_WINDOW = 20_000
_LIMIT_S = 60.0
#: Subscriptions on one connection: what evbus allows by default.
_PER_CONNECTION = 10_000
#: What evbus and redis grant by default, less those that the bench itself needs.
_MOST_CONNECTIONS = 9_900
_PAYLOAD = bytes(i * 7 % 251 for i in range(_SIZE))


@dataclass
class Point:
    """One peer at one place of a growth."""

    growth: str
    x: int
    peer: str
    unit: str
    rounds: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds)

    def to_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)


class _Bench:
    """One running server, and the connections to it."""

    def __init__(self, peer: Peer, load: Load, stack: contextlib.ExitStack) -> None:
        self.peer, self.load, self._stack = peer, load, stack
        stack.callback(peer.stop)
        peer.start()
        self.subscribers: list[socket.socket] = []
        self.publishers: list[socket.socket] = []
        self.frames: Frames | None = None
        self.share = False

    def connect(self) -> socket.socket:
        return self._stack.enter_context(self.peer.publisher())

    def subscribe(self, subjects: list[str], connections: int) -> None:
        """Subject i belongs to connection i modulo their number."""
        for index in range(connections):
            connection = self.connect()
            self.peer.subscribe_many(connection, subjects[index::connections])
            self.subscribers.append(connection)
        self.publishers = [self.connect()]
        self.frames = self.peer.many_frames(subjects, _PAYLOAD)
        self.share = connections > 1

    def settle(self) -> None:
        self.peer.settle([*self.subscribers, *self.publishers])

    def run(self, messages: int, *, checked: bool) -> float:
        """Server nanoseconds per delivery."""
        assert self.frames is not None
        before = cpu_ns(self.peer.process.pid)
        done = self.load.run(
            self.frames,
            [connection.fileno() for connection in self.publishers],
            [connection.fileno() for connection in self.subscribers],
            messages=messages,
            window=_WINDOW,
            limit_s=_LIMIT_S,
            checked=checked,
            share=self.share,
        )
        if done.outcome is Outcome.INTERRUPTED:
            raise KeyboardInterrupt
        if done.outcome is not Outcome.DONE:
            raise BenchError(done.trouble)
        cost = (cpu_ns(self.peer.process.pid) - before) / done.delivered
        for connection in (*self.subscribers, *self.publishers):
            self.peer.ping(connection)
        return cost


def _names(count: int) -> list[str]:
    return [f"bench.s{index:06d}.x" for index in range(count)]


def _subjects(bench: _Bench, count: int) -> None:
    bench.subscribe(_names(count), max(-(-count // _PER_CONNECTION), 1))


def _patterns(bench: _Bench, count: int) -> None:
    bench.subscribe(_names(1), 1)
    # Of every shape that has a wildcard, and none matches what is published.
    shapes = ("other.a{:06d}.*", "other.*.b{:06d}", "other.c{:06d}.>", "*.d{:06d}.y")
    patterns = [shapes[index % len(shapes)].format(index) for index in range(count)]
    for at in range(0, count, _PER_CONNECTION):
        bench.peer.subscribe_many(bench.connect(), patterns[at : at + _PER_CONNECTION])


def _idle(bench: _Bench, count: int) -> None:
    bench.subscribe(_names(1), 1)
    for _ in range(count):
        bench.connect()


#: Growth: its unit, its places, how a server is brought there, and which peers take part.
GROWTHS: dict[str, tuple[tuple[int, ...], Callable[[_Bench, int], None], tuple[str, ...]]] = {
    "subjects": ((1, 100, 5_000, 100_000), _subjects, ("nats", "redis", "evbus")),
    "unrelated patterns": ((0, 1_000, 10_000, 100_000), _patterns, ("nats", "evbus")),
    "idle connections": ((0, 1_000, 10_000), _idle, ("nats", "redis", "evbus")),
}
_NS = "ns/delivery"


def scale(
    names: list[str],
    *,
    rounds: int,
    messages: int,
    largest: int,
    progress: Callable[[str], None],
) -> Iterator[list[Point]]:
    """Measure each place of each growth and yield its points, one for each peer.

    Args:
        names: the peers; those that cannot take part in a growth are left out of it.
        rounds: timed runs of each; one more comes first and is checked.
        messages: of each timed run.
        largest: places beyond this are left out.
        progress: is told what is going on.
    """
    server_core, load_core = cores() or (None, None)
    most = min(_MOST_CONNECTIONS, descriptors() - 200)
    with tempfile.TemporaryDirectory(prefix="evbus-bench-") as scratch, pinned(load_core):
        load = compile_load(Path(scratch))

        def make(name: str) -> Peer:
            directory = Path(scratch) / name
            directory.mkdir(exist_ok=True)
            return PEERS[name](directory, server_core)

        for growth, (places, prepare, able) in GROWTHS.items():
            for asked in places:
                place = min(asked, most) if growth == "idle connections" else asked
                if asked > largest:
                    progress(f"{growth}: {asked:,} left out (--largest)")
                    continue
                progress(f"{growth}: {place:,}")
                peers = [make(name) for name in names if name in able]
                # The connections of one server after the other: those of all would be more than descriptors.
                groups = [[peer] for peer in peers] if growth == "idle connections" else [peers]
                found = [_place(growth, place, group, prepare, load, rounds, messages) for group in groups]
                yield [point for points in found for point in points]
        count = min(1_000, largest, most)
        progress(f"one connection: memory and processor time, over {count:,}")
        for name in names:
            if name != "relay":
                yield _one_connection(make(name), load, count, rounds)


def _place(
    growth: str,
    place: int,
    peers: list[Peer],
    prepare: Callable[[_Bench, int], None],
    load: Load,
    rounds: int,
    messages: int,
) -> list[Point]:
    points = {peer.name: Point(growth, place, peer.name, _NS) for peer in peers}
    with contextlib.ExitStack() as stack:
        benches: list[_Bench] = []
        for peer in peers:
            with _told(points[peer.name]):
                bench = _Bench(peer, load, stack)
                prepare(bench, place)
                bench.settle()
                benches.append(bench)
        # Enough to meet every subject twice in the check.
        for bench in benches:
            with _told(points[bench.peer.name]):
                bench.run(max(20_000, 2 * place if growth == "subjects" else 0), checked=True)
        for _ in range(rounds):
            for bench in benches:
                point = points[bench.peer.name]
                if not point.problem:
                    with _told(point):
                        point.rounds.append(bench.run(messages, checked=False))
    return list(points.values())


@contextlib.contextmanager
def _told(point: Point) -> Iterator[None]:
    """What goes wrong is one point's problem."""
    try:
        yield
    except (BenchError, OSError) as error:
        point.problem = str(error) or type(error).__name__


def _one_connection(peer: Peer, load: Load, count: int, rounds: int) -> list[Point]:
    """Memory of an idle connection, and the server's processor time for making one and for one subscription."""
    units = ("KiB/connection", "us/connect", "us/subscribe", "connects/s", "subscribes/s")
    points = {unit: Point("one connection", count, peer.name, unit) for unit in units}
    try:
        for _ in range(rounds):
            with contextlib.ExitStack() as stack:
                bench = _Bench(peer, load, stack)
                pid = bench.peer.process.pid
                for _ in range(20):  # what the first connections alone cost
                    bench.connect()
                memory, cpu, began = rss_bytes(pid), cpu_ns(pid), time.monotonic()
                for _ in range(count):
                    # Subscribed by nobody yet, and known to the server: each has had an answer.
                    connection = bench.connect()
                    if peer.name == "redis":
                        peer.ping(connection)
                seconds = time.monotonic() - began
                points["us/connect"].rounds.append((cpu_ns(pid) - cpu) / count / 1000)
                points["connects/s"].rounds.append(count / seconds)
                points["KiB/connection"].rounds.append((rss_bytes(pid) - memory) / count / 1024)
                names, connection = _names(10 * count), bench.connect()
                cpu, began = cpu_ns(pid), time.monotonic()
                peer.subscribe_many(connection, names)
                points["subscribes/s"].rounds.append(len(names) / (time.monotonic() - began))
                points["us/subscribe"].rounds.append((cpu_ns(pid) - cpu) / len(names) / 1000)
    except (BenchError, UnavailableError, OSError) as error:
        for point in points.values():
            point.problem = str(error)
    return list(points.values())
