"""Latency from publish to delivery at fixed rates: each message has its time, and its latency counts from then."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.errors import BenchError
from bench.machine import cores, pinned
from bench.native import Load, Outcome, Run, compile_load
from bench.peers import PEERS, Peer

__all__ = ["LatencyPoint", "latency"]

_SIZE = 128
_SUBJECT = "bench.subject"
_LIMIT_S = 60.0
#: Messages a second: an idle bus, and rates that every peer can take.
_FIXED = (1_000, 20_000, 100_000)
_SHARES = (0.5, 0.8)
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass
class LatencyPoint:
    """One peer at one rate: microseconds, one value for each round."""

    load: str
    peer: str
    per_s: float
    us: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _PERCENTILES})
    problem: str = ""

    def to_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)


class _Bench:
    """A running server with one publisher and one subscriber."""

    def __init__(self, peer: Peer, load: Load, stack: contextlib.ExitStack) -> None:
        self.peer, self._load = peer, load
        stack.callback(peer.stop)
        peer.start()
        self._subscriber: socket.socket = stack.enter_context(peer.subscriber(_SUBJECT))
        self._publisher: socket.socket = stack.enter_context(peer.publisher())
        self._frames = peer.frames(_SUBJECT, bytes(i * 7 % 251 for i in range(_SIZE)), 1)
        peer.settle([self._subscriber, self._publisher])

    def run(self, messages: int, rate: float) -> Run:
        self.peer.ping(self._publisher)
        run = self._load.run(
            self._frames,
            [self._publisher.fileno()],
            [self._subscriber.fileno()],
            messages=messages,
            window=20_000,
            limit_s=_LIMIT_S,
            checked=True,
            rate=rate,
        )
        if run.outcome is Outcome.INTERRUPTED:
            raise KeyboardInterrupt
        if run.outcome is not Outcome.DONE:
            raise BenchError(run.trouble)
        self.peer.ping(self._subscriber)
        return run


def latency(
    names: list[str], *, rounds: int, seconds: float, progress: Callable[[str], None]
) -> Iterator[list[LatencyPoint]]:
    """Measure each rate and yield its points, one for each peer. Every message is checked.

    Args:
        names: the peers.
        rounds: runs of each at each rate, in turns.
        seconds: how long one takes.
        progress: is told what is going on.
    """
    server_core, load_core = cores() or (None, None)
    with (
        tempfile.TemporaryDirectory(prefix="evbus-bench-") as scratch,
        pinned(load_core),
        contextlib.ExitStack() as stack,
    ):
        load = compile_load(Path(scratch))
        benches: list[_Bench] = []
        for name in names:
            directory = Path(scratch) / name
            directory.mkdir(exist_ok=True)
            try:
                benches.append(_Bench(PEERS[name](directory, server_core), load, stack))
            except (BenchError, OSError) as error:
                yield [LatencyPoint("start", name, 0, problem=str(error))]
        progress("latency: the peak of each, with every message checked")
        peaks: dict[str, float] = {}
        for bench in benches:
            try:
                bench.run(50_000, 0.0)
                peaks[bench.peer.name] = max(_rate(bench.run(200_000, 0.0)) for _ in range(3))
            except BenchError as error:
                yield [LatencyPoint("peak", bench.peer.name, 0, problem=str(error))]
        ready = [bench for bench in benches if bench.peer.name in peaks]
        plan = [(f"{rate:,} /s", {name: float(rate) for name in peaks}) for rate in _FIXED]
        plan += [
            (f"{share:.0%} of its peak", {name: peak * share for name, peak in peaks.items()}) for share in _SHARES
        ]
        for title, rates in plan:
            progress(f"latency: {title}")
            points = {b.peer.name: LatencyPoint(title, b.peer.name, rates[b.peer.name]) for b in ready}
            for _ in range(rounds):
                for bench in ready:
                    _round(bench, points[bench.peer.name], seconds)
            yield list(points.values())


def _rate(run: Run) -> float:
    return run.delivered / run.seconds


def _round(bench: _Bench, point: LatencyPoint, seconds: float) -> None:
    if point.problem:
        return
    try:
        found = sorted(bench.run(max(int(point.per_s * seconds), 200), point.per_s).latencies_s)
    except BenchError as error:
        point.problem = str(error)
        return
    for name, share in _PERCENTILES.items():
        point.us[name].append(found[min(int(len(found) * share), len(found) - 1)] * 1e6)
