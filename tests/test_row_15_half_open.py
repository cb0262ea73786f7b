"""R15: a peer that is silent on an open connection is noticed by both sides, idle or with data waiting; a busy one with
a held up interpreter is not taken for dead.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers_rows import Row, in_netns, needs_netns
from helpers_server import ServerProcess, wait_for

from evbus import AsyncEventClient, ConnectStatus, EvbusError, EventClient
from evbus.testing import ServerBus

FIGURE = (
    "half-open peer noticed <= 2 heartbeats + 0.5 s by both sides: idle, with unsent data, SIGSTOPped; heartbeat 1 s"
)
HEARTBEAT_S = 1.0
LIMIT_S = 2 * HEARTBEAT_S + 0.5
WAIT = 30.0

Property = Callable[[str, object], None]
KINDS = ["idle", "unsent"]


class Both:
    """A client of each kind, connected, that do not reconnect. A context manager.

    Args:
        busy: they publish without a pause, until their connection is lost.
    """

    def __init__(self, port: int, heartbeat_s: float, *, busy: bool) -> None:
        self._plain = EventClient(port=port, heartbeat=heartbeat_s, reconnect=False)
        self._loop = asyncio.new_event_loop()
        self._async = AsyncEventClient(port=port, heartbeat=heartbeat_s, reconnect=False)
        self._busy = busy
        self._threads = [threading.Thread(target=self._loop.run_forever)]

    def __enter__(self) -> Both:
        self._threads[0].start()
        self._plain.connect()
        self._run(self._async.connect())
        if self._busy:
            self._threads.append(threading.Thread(target=self._publish))
            self._threads[1].start()
            self._publishing = asyncio.run_coroutine_threadsafe(self._publish_async(), self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._plain.disconnect(drain=False)
        self._run(self._async.disconnect(drain=False))
        if self._busy:
            self._publishing.result(WAIT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(WAIT)
        self._loop.close()

    def _run(self, job: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(job, self._loop).result(WAIT)

    def _publish(self) -> None:
        with suppress(EvbusError):
            while True:
                self._plain.publish("busy", b"x" * 1000)
                time.sleep(0.0005)

    async def _publish_async(self) -> None:
        with suppress(EvbusError):
            while True:
                await self._async.publish("busy", b"x" * 1000)
                await asyncio.sleep(0.0005)

    @property
    def lost(self) -> bool:
        """Whether both have noticed."""
        return all(client.status is ConnectStatus.DISCONNECTED for client in (self._plain, self._async))

    @property
    def connected(self) -> bool:
        """Whether both still have their first connection."""
        return all(
            client.status is ConnectStatus.CONNECTED and client.stats().connects == 1
            for client in (self._plain, self._async)
        )


def since(began: float, condition: Callable[[], object]) -> float:
    """Seconds until it is true."""
    wait_for(condition, WAIT)
    return time.monotonic() - began


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", KINDS)
def test_silence_through_a_proxy(record_property: Property, kind: str) -> None:
    heartbeat_s = 0.5
    with ServerBus() as bus, Both(bus.port, heartbeat_s, busy=kind == "unsent") as clients:
        wait_for(lambda: bus.stats()["connections"] == 2, WAIT)
        bus.pause()
        began = time.monotonic()
        client_s = since(began, lambda: clients.lost)
        server_s = since(began, lambda: bus.stats()["closed"].get("stale", 0) == 2)  # type: ignore[attr-defined]
    assert max(client_s, server_s) <= 10 * heartbeat_s  # the figure itself is for a quiet machine: the full rows
    Row(record_property, "R15", FIGURE).measured(
        f"proxy silent, {kind}, heartbeat {heartbeat_s} s: both client kinds after {client_s:.2f} s, the server after "
        f"{server_s:.2f} s"
    )


def half_open(kind: str) -> None:
    """In a network of its own: every segment is dropped, both ways."""
    with ServerProcess() as server, Both(server.port, HEARTBEAT_S, busy=kind == "unsent") as clients:
        wait_for(lambda: server.stats()["connections"] == 2, WAIT)
        began = time.monotonic()
        table = "add table ip half; add chain ip half in {type filter hook input priority 0;}; add rule ip half in tcp"
        rules = "; ".join(f"{table} {end} {server.port} drop" for end in ("dport", "sport"))
        subprocess.run(["nft", rules], check=True)
        client_s = since(began, lambda: clients.lost)
        server_s = since(began, lambda: server.stats()["closed"].get("stale", 0) == 2)
        subprocess.run(["nft", "delete table ip half"], check=True)
    found = f"both client kinds after {client_s:.2f} s, the server after {server_s:.2f} s"
    print(f"segments dropped both ways, {kind}: {found}")
    assert max(client_s, server_s) <= LIMIT_S


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.skipif(shutil.which("nft") is None, reason="nft (nftables) is not installed")
@needs_netns
@pytest.mark.parametrize("kind", KINDS)
def test_segments_dropped_both_ways(record_property: Property, kind: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_row_15_half_open as row\n"
    told = in_netns(f"{program}row.half_open({kind!r})", timeout=90)
    Row(record_property, "R15", FIGURE).measured(told.strip())


@pytest.mark.full
@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_server(record_property: Property, kind: str) -> None:
    with ServerProcess() as server, Both(server.port, HEARTBEAT_S, busy=kind == "unsent") as clients:
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            took = since(time.monotonic(), lambda: clients.lost)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    assert took <= LIMIT_S
    Row(record_property, "R15", FIGURE).measured(f"server stopped, {kind}: both client kinds after {took:.2f} s")


CLIENT = """
import sys, evbus
client = evbus.connect("127.0.0.1:" + sys.argv[1], heartbeat=float(sys.argv[2]))
client.subscribe("flood", lambda message: None)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.full
@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_client(record_property: Property, kind: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess())
        arguments = [sys.executable, "-c", CLIENT, str(server.port), str(HEARTBEAT_S)]
        client = stack.enter_context(
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(os.kill, client.pid, signal.SIGCONT)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        publisher = stack.enter_context(EventClient(port=server.port))
        os.kill(client.pid, signal.SIGSTOP)
        began = time.monotonic()
        if kind == "unsent":
            for _ in range(8):  # more than the kernel keeps
                publisher.publish("flood", b"x" * (1 << 20))
        took = since(began, lambda: server.stats()["closed"].get("stale", 0) == 1)
    assert took <= LIMIT_S
    Row(record_property, "R15", FIGURE).measured(f"client stopped, {kind}: the server after {took:.2f} s")


@pytest.mark.full
@pytest.mark.timeout(90)
def test_no_false_alarm_with_a_held_up_interpreter(record_property: Property) -> None:
    size, took = 1_000_000, 0.0
    while took < 0.3:  # one call in C that gives up the interpreter for nobody
        size = int(size * 1.3)
        began = time.perf_counter()
        sum(range(size))
        took = time.perf_counter() - began
    with ServerProcess() as server, Both(server.port, HEARTBEAT_S, busy=True) as clients:
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            sum(range(size))
            time.sleep(0.3)
        assert clients.connected
        assert server.stats()["closed"].get("stale", 0) == 0
    Row(record_property, "R15", FIGURE).measured(
        f"busy for 20 s (the matrix: 10 min), interpreter held {took * 1e3:.0f} ms at a time: no false alarm"
    )
