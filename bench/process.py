"""One server process: started on its core, awaited, and ended by its own pid."""

from __future__ import annotations

import collections
import queue
import re
import subprocess
import threading
import time
from collections.abc import Sequence

from bench.errors import BenchError
from bench.machine import pinned

__all__ = ["ServerProcess"]

START_S = 15.0
STOP_S = 5.0


class ServerProcess:
    """A process that says when it is ready.

    Args:
        argv: the command.
        ready: what the line says that tells it is ready; group 1, if there is one, is the port.
        core: the core to run it on, or None.

    Raises:
        BenchError: it ended, or did not get ready in time; with its last lines.
    """

    def __init__(self, argv: Sequence[str], ready: re.Pattern[str], core: int | None) -> None:
        with pinned(core):
            # Its output goes through one pipe that a thread keeps empty, so that a chatty server never waits for us.
            self._process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        self._last: collections.deque[str] = collections.deque(maxlen=20)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"output of {argv[0]}", daemon=True)
        self._reader.start()
        try:
            self._ready = self._wait_for(ready, argv)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process id; valid until `stop` returns."""
        return self._process.pid

    @property
    def port(self) -> int:
        """The port that the ready line named."""
        return int(self._ready[1])

    def stop(self) -> None:
        """Ask the process to end, insist after 5 s, and wait until it is gone. May be called twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._last.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _wait_for(self, ready: re.Pattern[str], argv: Sequence[str]) -> re.Match[str]:
        deadline = time.monotonic() + START_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise BenchError(f"{argv[0]} was not ready after {START_S:g} s; it said:\n{self._said()}") from None
            if line is None:
                raise BenchError(f"{' '.join(argv)} ended before it was ready; it said:\n{self._said()}")
            match = ready.search(line)
            if match:
                return match

    def _said(self) -> str:
        return "\n".join(f"  {line}" for line in self._last) or "  (nothing)"
