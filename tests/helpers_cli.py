"""Programs as processes of their own, for tests of the command line, the demo, the documents and the examples."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EVBUS = [sys.executable, "-m", "evbus"]

#: Seconds after which a test gives up. Never the expected path: starting Python on a busy machine takes one or two.
PATIENCE_S = 30.0


class Result(NamedTuple):
    code: int
    out: str
    err: str


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another thread or process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


class Program:
    """A running process whose output is read as it comes.

    A context manager: the process is gone at its end, whatever happens.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = b"",
        preexec: Callable[[], object] | None = None,
    ) -> None:
        """`stdin` is what it can read; None leaves a pipe open, for `process.stdin`."""
        self.argv = argv
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec,
        )
        self.out = b""
        self.err = b""
        self._threads = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in ("out", "err")]
        for thread in self._threads:
            thread.start()
        if stdin is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it may not want it
                self.process.stdin.write(stdin)
                self.process.stdin.close()

    def _read(self, name: str) -> None:
        pipe = self.process.stdout if name == "out" else self.process.stderr
        assert pipe is not None
        while data := os.read(pipe.fileno(), 65536):
            setattr(self, name, getattr(self, name) + data)

    def wait_for(self, pattern: str, name: str = "err") -> re.Match[str]:
        """Wait until its output has the pattern."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            ended = self.process.poll() is not None and not any(thread.is_alive() for thread in self._threads)
            match = re.search(pattern, getattr(self, name).decode())
            if match:
                found.append(match)
            assert match or not ended, f"ended with {self.process.returncode} and without {pattern!r}: {self}"
            return match is not None

        wait_until(look, f"{pattern!r} of {self}")
        return found[0]

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def finish(self) -> Result:
        """Wait for its end."""
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self}") from None
        for thread in self._threads:
            thread.join(PATIENCE_S)
        return Result(code, self.out.decode(errors="surrogateescape"), self.err.decode())

    def __repr__(self) -> str:
        return f"{self.argv}, out {self.out[-2000:]!r}, err {self.err[-2000:]!r}"

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def make_commands(directory: Path) -> dict[str, str]:
    """`evbus` and `python` as commands in `directory`/venv/bin, as an installation makes them.

    Returns:
        the environment in which a shell in `directory` finds them.
    """
    programs = directory / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in (("python", ""), ("evbus", " -m evbus")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}"}
