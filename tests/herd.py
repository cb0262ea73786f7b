"""R14's program: a server in a process, 1,000 asyncio clients in four more, and all their connections lost at once.

Run by test_row_14_herd.py, if it can in a network of its own, as the counters of `/proc/net/netstat` are the network's.
Prints one JSON object per loss.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from evbus import AsyncEventClient, ConnectStatus
from evbus.dial import Server
from evbus.transport import TcpTransport

PATIENCE_S = 60.0

_SERVER = """
import sys
from evbus.limits import UNLIMITED, Limits
from evbus.server import EventServer
from evbus.wire import CloseReason

server = EventServer(port=int(sys.argv[1])).start()
print(server.port, flush=True)

def drop():
    for peer in list(server._core.broker.peers.values()):
        server._core.close(peer, CloseReason.CONNECTION_LOST)

for line in sys.stdin:
    if line.strip() == "drop":
        server._reactor.call_threadsafe(drop)
    print(server.stats()["connections"], flush=True)
"""


def listen_overflows() -> int:
    """Connections that a full backlog has turned away in this network, so far."""
    lines = Path("/proc/net/netstat").read_text().splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        if names.startswith("TcpExt:"):
            found = dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
            return found["ListenOverflows"] + found["ListenDrops"]
    raise AssertionError("no TcpExt")


def start_server(port: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def ask(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline()


# ---- a process of clients --------------------------------------------------------------------------------------------


async def clients(port: int, count: int) -> None:
    """Connect, say so; then for each line of input tell, when all have come back: when each attempt and return was."""
    attempts: list[float] = []
    back: list[float] = []
    losses = 0
    lost: dict[int, asyncio.Event] = {}

    async def dial(server: Server, timeout_s: float) -> TcpTransport:
        attempts.append(time.monotonic())
        return await real(server, timeout_s)

    def on_status(number: int, status: ConnectStatus) -> None:
        nonlocal losses
        if status is ConnectStatus.RECONNECTING:
            losses += 1
            lost[number].set()

    async def follow(number: int, client: AsyncEventClient) -> None:
        lost[number] = asyncio.Event()
        await lost[number].wait()
        await client.wait_connected(PATIENCE_S)
        back.append(time.monotonic())

    members = [AsyncEventClient(port=port, on_status=partial(on_status, number)) for number in range(count)]
    real = members[0]._dial
    for one in members:
        await one.connect(10.0)
        await one.subscribe("herd", print)
        one._dialler._dial = dial
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        attempts.clear()
        back.clear()
        losses = 0
        followers = [asyncio.ensure_future(follow(number, one)) for number, one in enumerate(members)]
        await asyncio.sleep(0.1)
        print("armed", flush=True)
        await asyncio.wait_for(asyncio.gather(*followers), PATIENCE_S)
        print(json.dumps({"attempts": attempts, "back": back, "losses": losses}), flush=True)
    for one in members:
        await one.disconnect(drain=False)


# ---- the whole -------------------------------------------------------------------------------------------------------


def densest(times: list[float], window_s: float) -> float:
    """The largest share of them in any such window."""
    times = sorted(times)
    first, most = 0, 0
    for last, when in enumerate(times):
        while when - times[first] > window_s:
            first += 1
        most = max(most, last - first + 1)
    return most / len(times)


def lose(server: subprocess.Popen[str], port: int, fleets: list[subprocess.Popen[str]], how: str) -> Any:
    """One loss; returns the server that runs now and what was measured."""
    overflows = listen_overflows()
    for fleet in fleets:
        assert ask(fleet, "go") == "armed\n"
    began = time.monotonic()
    if how == "reset":
        ask(server, "drop")
        up = began
    else:
        server.kill()
        server.wait()
        time.sleep(float(how))
        server, _ = start_server(port)
        up = time.monotonic()
    told = []
    for fleet in fleets:
        assert fleet.stdout is not None
        told.append(json.loads(fleet.stdout.readline()))
    attempts = [when for one in told for when in one["attempts"]]
    back = [when for one in told for when in one["back"]]
    # Also of those alone that a listening server saw, as refused ones cost it nothing.
    seen = [when for when in attempts if when >= up]
    print(
        json.dumps(
            {
                "how": how,
                "clients": len(back),
                "attempts": len(attempts),
                "densest": densest(attempts, 0.1),
                "densest_seen": densest(seen, 0.1),
                "overflows": listen_overflows() - overflows,
                "back_s": sorted(when - up for when in back),
                "outage_s": up - began,
                "losses": sum(one["losses"] for one in told),
            }
        ),
        flush=True,
    )
    return server


def main(processes: int, each: int, hows: list[str]) -> None:
    server, port = start_server(0)
    fleets = [
        subprocess.Popen(
            [sys.executable, __file__, "clients", str(port), str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for fleet in fleets:
            assert fleet.stdout is not None
            assert fleet.stdout.readline() == "ready\n"
        for how in hows:
            server = lose(server, port, fleets, how)
    finally:
        for process in (*fleets, server):
            process.kill()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "clients":
        asyncio.run(clients(int(sys.argv[2]), int(sys.argv[3])))
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
