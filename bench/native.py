"""Compiles the C parts when they are needed, and calls the load."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from bench.errors import BenchError, UnavailableError

__all__ = ["Frames", "Load", "Outcome", "Run", "compile_load", "compile_relay"]

HERE = Path(__file__).resolve().parent
STAMP_BYTES = 12


class Outcome(IntEnum):
    """How a run of the load ended; `enum outcome` in load.c."""

    DONE = 0
    TIMED_OUT = 1
    CLOSED = 2
    OUT_OF_ORDER = 3
    DAMAGED = 4
    SURPLUS = 5
    INTERRUPTED = 6
    NO_MEMORY = 7


@dataclass(frozen=True)
class Frames:
    """One message as a protocol writes it: what the publisher sends, and what comes of it.

    The payload must be at least 12 bytes: a checked run writes publisher and sequence number there.
    """

    frame: bytes
    payload_at: int
    payload_len: int
    delivery_len: int
    delivery_payload_at: int
    reply_len: int = 0
    count: int = 1  # frames that stand one behind the other in `frame`, one for each subject

    def __post_init__(self) -> None:
        """Refuse what would make the C code read outside the frame."""
        if self.payload_len < STAMP_BYTES:
            raise BenchError(
                f"a payload of {self.payload_len} bytes has no room for the stamp: use {STAMP_BYTES} or more"
            )
        if not 0 <= self.payload_at <= len(self.frame) // self.count - self.payload_len:
            raise BenchError("the payload lies outside the frame")
        if not 0 <= self.delivery_payload_at <= self.delivery_len - self.payload_len:
            raise BenchError("the payload lies outside the delivery")


@dataclass(frozen=True)
class Run:
    """What one run of the load did."""

    outcome: Outcome
    seconds: float
    delivered: int
    trouble: str
    latencies_s: list[float] = field(default_factory=list)


class _CFrames(ctypes.Structure):
    _fields_ = (
        ("frame", ctypes.c_char_p),
        ("frame_len", ctypes.c_int64),
        ("payload_at", ctypes.c_int64),
        ("payload_len", ctypes.c_int64),
        ("delivery_len", ctypes.c_int64),
        ("delivery_payload_at", ctypes.c_int64),
        ("reply_len", ctypes.c_int64),
        ("n_frames", ctypes.c_int64),
    )


class _CPlan(ctypes.Structure):
    _fields_ = (
        ("publishers", ctypes.POINTER(ctypes.c_int)),
        ("subscribers", ctypes.POINTER(ctypes.c_int)),
        ("n_publishers", ctypes.c_int32),
        ("n_subscribers", ctypes.c_int32),
        ("messages", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("limit_s", ctypes.c_double),
        ("share", ctypes.c_int32),
        ("interval_s", ctypes.c_double),
        ("latencies_s", ctypes.POINTER(ctypes.c_double)),
    )


class _CResult(ctypes.Structure):
    _fields_ = (
        ("seconds", ctypes.c_double),
        ("delivered", ctypes.c_int64),
        ("subscriber", ctypes.c_int32),
        ("publisher", ctypes.c_int32),
        ("expected", ctypes.c_int64),
        ("found", ctypes.c_int64),
    )


class Load:
    """The compiled load. ctypes gives the GIL back during a run, so threads that drain logs go on."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        frames: Frames,
        publishers: Sequence[int],
        subscribers: Sequence[int],
        *,
        messages: int,
        window: int,
        limit_s: float,
        checked: bool,
        share: bool = False,
        rate: float = 0.0,
    ) -> Run:
        """Send `messages` from each publisher and wait until each subscriber has each of them.

        Args:
            frames: what to send.
            publishers: descriptors of connections that are ready to publish.
            subscribers: descriptors of connections that are subscribed.
            messages: number of messages of each publisher.
            window: number of messages that may be under way to the slowest subscriber.
            limit_s: seconds after which the run is given up.
            checked: number the messages and check every byte of every payload; or only count.
            share: subscriber s of n gets messages s, s + n, ... and not all of them.
            rate: messages a second, sent at their time whoever keeps up; checked, with one publisher and one
                subscriber, and the latencies are in the Run. 0: as fast as the window allows.
        """
        c_frames = _CFrames(
            frames.frame,
            len(frames.frame) // frames.count,
            frames.payload_at,
            frames.payload_len,
            frames.delivery_len,
            frames.delivery_payload_at,
            frames.reply_len,
            frames.count,
        )
        latencies = (ctypes.c_double * (messages * len(subscribers)))() if rate else None
        plan = _CPlan(
            (ctypes.c_int * len(publishers))(*publishers),
            (ctypes.c_int * len(subscribers))(*subscribers),
            len(publishers),
            len(subscribers),
            messages,
            window,
            limit_s,
            share,
            1 / rate if rate else 0.0,
            ctypes.cast(latencies, ctypes.POINTER(ctypes.c_double)) if latencies is not None else None,
        )
        result = _CResult()
        name = "load_paced" if rate else "load_check" if checked else "load_time"
        function = getattr(self._library, name)
        outcome = Outcome(function(ctypes.byref(c_frames), ctypes.byref(plan), ctypes.byref(result)))
        trouble = "" if outcome is Outcome.DONE else _trouble(outcome, result)
        return Run(outcome, result.seconds, result.delivered, trouble, list(latencies) if latencies is not None else [])


def _trouble(outcome: Outcome, result: _CResult) -> str:
    who = f"subscriber {result.subscriber}" if result.subscriber >= 0 else f"publisher {result.publisher}"
    if outcome is Outcome.TIMED_OUT:
        return f"not everything had arrived in time ({result.delivered:,} deliveries after {result.seconds:.1f} s)"
    if outcome is Outcome.CLOSED:
        return f"the server closed the connection of {who} after {result.delivered:,} deliveries"
    if outcome is Outcome.OUT_OF_ORDER:
        return (
            f"{who} received message {result.found} of publisher {result.publisher} where {result.expected} was due: "
            "lost, repeated or overtaken"
        )
    if outcome is Outcome.DAMAGED:
        return f"{who} received a payload that nobody sent (message {result.expected} was due)"
    if outcome is Outcome.SURPLUS:
        return f"{who} received {result.found:,} bytes where {result.expected:,} were due"
    return outcome.name.lower().replace("_", " ")


def compile_load(into: Path) -> Load:
    """The load, compiled into a directory."""
    return Load(_compile("load.c", into / "load.so", ["-shared", "-fPIC"]))


def compile_relay(into: Path) -> Path:
    """The relay's executable, compiled into a directory."""
    return _compile("relay.c", into / "relay", [])


def _compile(source: str, target: Path, flags: list[str]) -> Path:
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise UnavailableError(
            "the bench needs a C compiler (cc, gcc or clang, or the variable CC) for its load and its relay; "
            "Debian: apt-get install build-essential, macOS: xcode-select --install"
        )
    command = [*compiler.split(), "-O2", "-Wall", *flags, "-o", str(target), str(HERE / source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except OSError as e:
        raise UnavailableError(f"cannot run the C compiler {compiler!r}: {e}") from e
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed:\n{done.stderr}")
    return target
