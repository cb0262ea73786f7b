"""Servers for tests: one in a process of its own that can be measured, and waiting for a condition with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psutil
import reference as ref
from helpers_raw import RawClient

import evbus
from evbus.server import EventServer

HOST = "127.0.0.1"

_PROGRAM = """
import json, os, sys
from evbus.limits import Limits
from evbus.server import EventServer

server = EventServer(port=0, limits=Limits(**json.loads(sys.argv[1]))).start()
print(server.port, flush=True)
held = []
for line in sys.stdin:
    word = line.strip()
    answer = None
    if word == "stats":
        answer = server.stats()
    elif word == "exhaust":
        try:
            while True:
                held.append(os.dup(0))
        except OSError as error:
            answer = error.errno
    elif word == "free":
        while held:
            os.close(held.pop())
    print(json.dumps(answer), flush=True)
server.stop(0)
"""


def wait_for(condition: Callable[[], Any], timeout: float = 5.0, what: str = "") -> Any:
    """Wait until a condition is true, looking often, and return its value; an AssertionError at the deadline."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.002)
    return value


@final
class ServerProcess:
    """An `EventServer` with these limits in a process of its own. A context manager."""

    def __init__(self, **limits: Any) -> None:
        tree = str(Path(evbus.__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.measured = psutil.Process(self.process.pid)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()

    def tell(self, word: str) -> Any:
        """stats | exhaust (all descriptors; returns errno) | free"""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stats(self) -> dict[str, Any]:
        """The server's counters."""
        found: dict[str, Any] = self.tell("stats")
        return found

    @property
    def rss(self) -> int:
        """Bytes of memory that the process has now."""
        return int(self.measured.memory_info().rss)

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time that it has used."""
        times = self.measured.cpu_times()
        return float(times.user + times.system)


def connect(server: EventServer | ServerProcess, dialect: str = ref.EVBUS_2, handshake: bool = True) -> RawClient:
    """A raw client of a server, after its handshake."""
    client = RawClient(HOST, server.port, dialect)
    if handshake:
        assert client.handshake().fields["Status"] == ref.SUCCESS
    return client


def exchange(server: EventServer | ServerProcess) -> None:
    """Two clients that have nothing to do with the others get a message across."""
    with connect(server) as one, connect(server, ref.H22) as two:
        two.send(ref.SUBSCRIBE, TaskId="s", Subject="good.*")
        assert two.read().fields["TaskId"] == "s"
        one.send(ref.PUBLISH, {"Subject": "good.news", "Buffer": b"!"}, version=2)
        assert two.read().fields["Buffer"] == b"!"


def v1(object_id: int, dialect: str = ref.H23_199, **fields: Any) -> bytes:
    """A packet of version 1."""
    return ref.encode(dialect, object_id, fields)


def v2(object_id: int, **fields: Any) -> bytes:
    """A packet of version 2."""
    return ref.encode(ref.EVBUS_2, object_id, fields, version=2)
