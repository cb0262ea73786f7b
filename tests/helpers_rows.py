"""What the tests of the fault matrix share: telling what was measured, servers that can be killed, networks."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, final

import pytest

import evbus

__all__ = ["KilledServer", "Responder", "Row", "in_netns", "interpreters", "needs_netns", "summary_ms", "why_no_netns"]

#: The tree that the tests run, for processes of their own.
TREE = Path(evbus.__file__).resolve().parent.parent


@final
class Row:
    """A row of the fault matrix as one test sees it: prints its id and figure, and what was measured, in the run's end.

    Args:
        record: pytest's `record_property`.
        id: of the row: "R25".
        figure: what must hold, in the matrix's words.
    """

    def __init__(self, record: Callable[[str, object], None], id: str, figure: str) -> None:
        self._record = record
        self.id = id
        self.figure = figure

    def measured(self, what: str) -> None:
        """Tell what was found."""
        self._record("row", f"{self.id}: {self.figure} | {what}")


def summary_ms(seconds: Iterable[float]) -> str:
    """Durations in short."""
    values = sorted(seconds)
    return f"median {statistics.median(values) * 1e3:.2f} ms, worst {values[-1] * 1e3:.2f} ms of {len(values)}"


_SERVER = """
import sys
from evbus.server import EventServer

server = EventServer(port=int(sys.argv[1])).start()
print(server.port, flush=True)
sys.stdin.read()
server.stop()
"""


@final
class KilledServer:
    """A server in a process of its own that can be killed, and started again on the same port. A context manager."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Run it; returns when it accepts connections."""
        assert self._process is None
        self._process = _python(_SERVER, str(self.port))
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """SIGKILL."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        _reap(process)

    def __enter__(self) -> KilledServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()


def _python(program: str, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TREE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _reap(process: subprocess.Popen[str]) -> None:
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@final
class Responder:
    """An EventClient in a process of its own that answers nothing: it prints a line when it is asked."""

    _PROGRAM = """
import sys, threading
from evbus import EventClient

client = EventClient("127.0.0.1", int(sys.argv[1])).connect()
client.on_query(sys.argv[2])(lambda message: (print("asked", flush=True), threading.Event().wait()))
print("ready", flush=True)
sys.stdin.read()
"""

    def __init__(self, port: int, subject: str) -> None:
        self._process = _python(self._PROGRAM, str(port), subject)
        self.line()

    def line(self) -> str:
        """What it prints next."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        _reap(self._process)


def interpreters() -> dict[str, str]:
    """Pythons to test with, by version: python3.10 to python3.13 on PATH, and those that EVBUS_PYTHONS lists, with the
    system's separator of paths between them.
    """
    names = [f"python3.{minor}" for minor in range(10, 14)]
    candidates = [one for one in os.environ.get("EVBUS_PYTHONS", "").split(os.pathsep) if one]
    candidates += [found for name in names if (found := shutil.which(name)) is not None]
    found: dict[str, str] = {}
    for candidate in candidates:
        asked = subprocess.run(
            [candidate, "-c", "import platform, ensurepip; print(platform.python_version())"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode == 0:  # a name on PATH may stand for a Python that is not installed
            found.setdefault(asked.stdout.strip(), candidate)
    return found


def why_no_netns() -> str:
    """Why this process cannot have a network of its own; empty if it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "unshare and ip (util-linux, iproute2) are not installed"
    if os.geteuid() != 0:
        return "a network namespace needs root"
    tried = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"no network namespace: {tried.stderr.decode().strip()}"


def needs_netns(test: Any) -> Any:
    """A test that runs `in_netns`; marked, and skipped with the reason where there can be none."""
    reason = why_no_netns()
    return pytest.mark.netns(pytest.mark.skipif(bool(reason), reason=reason or "never")(test))


def in_netns(program: str, *args: str, setup: str = "", timeout: float = 120.0) -> str:
    """Run a Python program in a network of its own, where `lo` is up, and return what it prints.

    Args:
        setup: shell commands to run first, such as `tc qdisc add dev lo root tbf ...`.

    Raises:
        AssertionError: it failed; says what it printed.
    """
    shell = f'ip link set lo up && {setup or "true"} && exec "$@"'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TREE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", shell, "sh", sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
