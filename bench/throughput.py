"""Runs the workloads: every peer started side by side, checked first, then timed in turns."""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import BenchError, UnavailableError
from bench.machine import cores, cpu_ns, pinned
from bench.native import Load, Outcome, compile_load
from bench.peers import PEERS, Peer
from bench.plan import Workload

__all__ = ["Measurement", "Sample", "available", "measure"]

#: Seconds after which one run is given up. The runs are made to take about one.
RUN_LIMIT_S = 30.0

_SUBJECT = "bench.subject"


@dataclass(frozen=True)
class Sample:
    """One timed run."""

    cpu_ns: float  # processor time of the server per delivery
    per_s: float  # deliveries per second


@dataclass
class Measurement:
    """One peer at one workload."""

    workload: Workload
    peer: str
    samples: list[Sample] = field(default_factory=list)
    problem: str = ""


class _Contestant:
    """One peer at one workload. Once something has failed it does nothing more; the others go on."""

    def __init__(self, peer: Peer, workload: Workload, load: Load, stack: contextlib.ExitStack) -> None:
        self.measurement = Measurement(workload, peer.name)
        self._peer = peer
        self._workload = workload
        self._load = load
        self._stack = stack
        self._subscribers: list[socket.socket] = []
        self._publishers: list[socket.socket] = []
        # Not one byte twice in a row, so that a payload that slipped is seen; the same in each run.
        pattern = bytes(i * 7 % 251 for i in range(251))
        payload = (pattern * (workload.size // len(pattern) + 1))[: workload.size]
        self._frames = peer.frames(_SUBJECT, payload, workload.subscribers)

    def attempt(self, phase: Callable[[], None]) -> None:
        """Go through one phase; a failure is kept for the table."""
        if self.measurement.problem:
            return
        try:
            phase()
        except (BenchError, OSError) as e:
            self.measurement.problem = str(e)

    def start(self) -> None:
        """Start the server and make the connections; the stack ends them."""
        self._stack.callback(self._peer.stop)
        self._peer.start()
        for _ in range(self._workload.subscribers):
            self._subscribers.append(self._stack.enter_context(self._peer.subscriber(_SUBJECT)))
        for _ in range(self._workload.publishers):
            self._publishers.append(self._stack.enter_context(self._peer.publisher()))

    def settle(self) -> None:
        """Let the server say what it says by itself."""
        self._peer.settle([*self._subscribers, *self._publishers])

    def check(self) -> None:
        """Every message reaches every subscriber once, in order and unharmed; or BenchError."""
        self._run(self._workload.checked_messages, checked=True)

    def warm_up(self, scale: float) -> None:
        """A run that does not count: memory, caches and the server's own adaptations."""
        self._run(self._workload.messages(scale / 4), checked=False)

    def time(self, scale: float) -> None:
        """One timed run."""
        pid = self._peer.process.pid
        before = cpu_ns(pid)
        seconds, deliveries = self._run(self._workload.messages(scale), checked=False)
        self.measurement.samples.append(Sample((cpu_ns(pid) - before) / deliveries, deliveries / seconds))

    def _run(self, messages: int, *, checked: bool) -> tuple[float, int]:
        # The round trips before and after show that nothing is left over from the run before, nor more than was due
        # came of this one; they also keep connections alive that have to wait for their turn.
        self._ping()
        run = self._load.run(
            self._frames,
            [connection.fileno() for connection in self._publishers],
            [connection.fileno() for connection in self._subscribers],
            messages=messages,
            window=self._workload.window,
            limit_s=RUN_LIMIT_S,
            checked=checked,
        )
        if run.outcome is Outcome.INTERRUPTED:
            raise KeyboardInterrupt
        if run.outcome is not Outcome.DONE:
            raise BenchError(f"{'the check' if checked else 'a timed run'} failed: {run.trouble}")
        self._ping()
        expected = messages * self._workload.publishers * self._workload.subscribers
        if run.delivered != expected:
            raise BenchError(f"{run.delivered:,} deliveries where {expected:,} were due")
        return run.seconds, expected

    def _ping(self) -> None:
        for connection in (*self._subscribers, *self._publishers):
            self._peer.ping(connection)


def available(names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the named peers: the versions of those that are here, and why the others are not."""
    here, missing = {}, {}
    for name in names:
        try:
            here[name] = PEERS[name].version()
        except UnavailableError as e:
            missing[name] = str(e)
    return here, missing


def measure(
    names: list[str],
    plan: list[Workload],
    *,
    rounds: int,
    scale: float,
    limit_s: float,
    progress: Callable[[str], None],
) -> Iterator[list[Measurement]]:
    """Measure each workload and yield its measurements, one per peer that can do it.

    Args:
        names: the peers.
        plan: the workloads.
        rounds: timed runs of each peer, taken in turns; one more comes first and does not count.
        scale: size of a timed run; 1 is a full one.
        limit_s: seconds after which no further workload is begun.
        progress: is told what is going on.
    """
    server_core, load_core = cores() or (None, None)
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="evbus-bench-") as scratch, pinned(load_core):
        load = compile_load(Path(scratch))
        for workload in plan:
            if time.monotonic() > deadline:
                progress(f"{workload.name}: left out, the time is up")
                continue
            yield _one(names, workload, load, Path(scratch), server_core, rounds, scale, progress)


def _one(
    names: list[str],
    workload: Workload,
    load: Load,
    scratch: Path,
    server_core: int | None,
    rounds: int,
    scale: float,
    progress: Callable[[str], None],
) -> list[Measurement]:
    with contextlib.ExitStack() as stack:
        contestants = []
        for name in names:
            if not PEERS[name].max_publishers or workload.publishers <= PEERS[name].max_publishers:
                directory = scratch / name
                directory.mkdir(exist_ok=True)
                contestants.append(_Contestant(PEERS[name](directory, server_core), workload, load, stack))
        progress(f"{workload.name}: starting {', '.join(names)}")
        for contestant in contestants:
            contestant.attempt(contestant.start)
        for contestant in contestants:
            contestant.attempt(contestant.settle)
        progress(f"{workload.name}: checking that every message arrives once, in order and unharmed")
        for contestant in contestants:
            contestant.attempt(contestant.check)
        progress(f"{workload.name}: warming up")
        for contestant in contestants:
            contestant.attempt(functools.partial(contestant.warm_up, scale))
        for index in range(rounds):
            progress(f"{workload.name}: round {index + 1} of {rounds}")
            for contestant in contestants:
                contestant.attempt(functools.partial(contestant.time, scale))
        return [contestant.measurement for contestant in contestants]
