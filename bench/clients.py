"""The Python clients side by side: processor time and rates of publishing, receiving and asking."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.errors import BenchError, UnavailableError
from bench.machine import cores, pinned
from bench.peers import PEERS
from bench.process import ServerProcess

__all__ = ["CLIENTS", "ClientPoint", "available_clients", "clients"]

_ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 90.0
#: Client: the server it talks to (None: a proxy of its own), the module that it needs, and its distribution.
CLIENTS: dict[str, tuple[str | None, str, str]] = {
    "nats-py": ("nats", "nats", "nats-py"),
    "redis-py": ("redis", "redis", "redis"),
    "pyzmq": (None, "zmq", "pyzmq"),
    "evbus-sync": ("evbus", "evbus", "evbus"),
    "evbus-async": ("evbus", "evbus", "evbus"),
}
_QUERIES = ("nats-py", "evbus-sync", "evbus-async")


@dataclass
class ClientPoint:
    """One client at one work, one value a round."""

    work: str
    client: str
    cpu_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    problem: str = ""

    def to_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)

    @property
    def median_cpu_us(self) -> float:
        """Over the rounds."""
        return statistics.median(self.cpu_us)


def available_clients(names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the named clients: the versions of those that can be measured, and why the others cannot."""
    here, missing = {}, {}
    for name in names:
        server, module, distribution = CLIENTS[name]
        if importlib.util.find_spec(module) is None:
            missing[name] = f"the Python package {distribution} is not installed"
            continue
        try:
            if server is not None:
                PEERS[server].version()
        except UnavailableError as error:
            missing[name] = str(error)
            continue
        here[name] = f"{distribution} {version(distribution)}"
    return here, missing


class _Process:
    """One process of client_work.py."""

    def __init__(self, client: str, role: str, port: int, count: int, at_once: int = 1) -> None:
        argv = [sys.executable, "-m", "bench.client_work", client, role, str(port), str(count), str(at_once)]
        self._name = f"{client} ({role})"
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        self._watchdog = threading.Timer(_LIMIT_S, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self._name} ended, or took more than {_LIMIT_S:g} s")
        return line.strip()

    def wait_ready(self) -> None:
        line = self._line()
        if line != "ready":
            raise BenchError(f"{self._name}: {json.loads(line).get('problem', line)}")

    def say(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line())
        if found["problem"]:
            raise BenchError(f"{self._name}: {found['problem']}")
        return found

    def close(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def clients(
    names: list[str], *, rounds: int, messages: int, progress: Callable[[str], None]
) -> Iterator[list[ClientPoint]]:
    """Measure each work and yield its points. The server runs on the first core, the clients on the second.

    Args:
        names: the clients.
        rounds: runs of each at each work, in turns.
        messages: of each run; a tenth as many queries.
        progress: is told what is going on.
    """
    server_core, client_core = cores() or (None, None)
    with tempfile.TemporaryDirectory(prefix="evbus-bench-") as scratch, contextlib.ExitStack() as stack:
        stack.enter_context(pinned(client_core))
        ports: dict[str | None, int] = {}
        for name in names:
            server = CLIENTS[name][0]
            if server not in ports:
                ports[server] = _start(server, Path(scratch), server_core, stack)
        port_of = {name: ports[CLIENTS[name][0]] for name in names}
        works: list[tuple[str, list[str], Callable[[str], dict[str, dict[str, Any]]]]] = [
            ("publish and receive", names, lambda name: _pubsub(name, port_of[name], messages)),
        ]
        for at_once in (1, 64):
            able = [name for name in names if name in _QUERIES]
            works.append(
                (
                    f"query, {at_once} at once",
                    able,
                    lambda name, k=at_once: _query(name, port_of[name], messages // 10, k),  # type: ignore[misc]
                )
            )
        for title, able, work in works:
            points: dict[tuple[str, str], ClientPoint] = {}
            for index in range(rounds):
                progress(f"{title}: round {index + 1} of {rounds}")
                for name in able:
                    _round(title, name, work, points)
            yield list(points.values())


def _round(
    title: str,
    name: str,
    work: Callable[[str], dict[str, dict[str, Any]]],
    points: dict[tuple[str, str], ClientPoint],
) -> None:
    if any(point.problem for (_, client), point in points.items() if client == name):
        return
    try:
        found = work(name)
    except BenchError as error:
        points[title, name] = ClientPoint(title, name, problem=str(error))
        return
    for part, figures in found.items():
        point = points.setdefault((part, name), ClientPoint(part, name))
        point.cpu_us.append(figures["cpu_s"] / figures["count"] * 1e6)
        point.per_s.append(figures["count"] / figures["seconds"])
        if "p50_us" in figures:
            point.p50_us.append(figures["p50_us"])


def _start(server: str | None, scratch: Path, core: int | None, stack: contextlib.ExitStack) -> int:
    if server is None:
        argv = [sys.executable, str(_ROOT / "bench" / "client_work.py"), "proxy"]
        proxy = ServerProcess(argv, re.compile(r"listening on 127\.0\.0\.1:(\d+)"), core)
        stack.callback(proxy.stop)
        return proxy.port
    directory = scratch / server
    directory.mkdir(exist_ok=True)
    peer = PEERS[server](directory, core)
    stack.callback(peer.stop)
    peer.start()
    with peer.publisher() as connection:
        return int(connection.getpeername()[1])


def _pubsub(name: str, port: int, count: int) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        receiver = _Process(name, "receive", port, count)
        stack.callback(receiver.close)
        receiver.wait_ready()
        receiver.say()
        publisher = _Process(name, "publish", port, count)
        stack.callback(publisher.close)
        publisher.wait_ready()
        publisher.say()
        return {"publish": publisher.result(), "receive": receiver.result()}


def _query(name: str, port: int, count: int, at_once: int) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        responder = _Process(name, "answer", port, count)
        stack.callback(responder.close)
        responder.wait_ready()
        responder.say()
        asker = _Process(name, "query", port, count, at_once)
        stack.callback(asker.close)
        asker.wait_ready()
        asker.say()
        return {f"query, {at_once} at once": asker.result()}
