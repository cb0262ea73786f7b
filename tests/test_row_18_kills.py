"""R18: connections that are cut at random, half of them at a time; all come back, and the order holds."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_fleet import Fleet, Found
from helpers_rows import KilledServer, Row, in_netns, needs_netns

from evbus.testing import ServerBus

FIGURE = "ss -K on half of 100 clients every second for 60 s: all back <= 5 s after the end, ordering kept"


def check(found: Found) -> None:
    """Connections of subscribers were cut, so what they were sent last may be lost; the rest holds."""
    assert found.duplicates == []
    assert found.reordered == []
    assert found.invented == []
    assert found.confirmed


def brief(found: Found) -> str:
    return (
        f"{found.published} published, {found.deliveries} delivered, {found.confirmed} confirmed "
        f"({len(found.lost)} of them did not reach all, as a receiver was cut off), {found.unknown} unconfirmed, "
        "0 duplicates, 0 reordered"
    )


def all_reached(fleet: Fleet) -> None:
    """When nothing is cut any more, each has everything: the figure's "back" is more than a status."""
    before = {one.number: len(one.confirmed) for one in fleet.members}
    deadline = time.monotonic() + 30.0
    while any(len(one.confirmed) < before[one.number] + 3 for one in fleet.members):
        assert time.monotonic() < deadline, "not all publish again"
        time.sleep(0.01)
    for one in fleet.members:
        assert one.confirmed[max(one.confirmed)] == len(
            {one.number, *((one.number - s) % len(fleet.members) for s in (1, 7, 31))}
        )


@pytest.mark.timeout(120)
def test_a_few_reset_by_the_proxy(record_property: Callable[[str, object], None]) -> None:
    with ServerBus() as bus:
        with Fleet(bus.port, 3, 3, pause_s=0.005, keep=False) as fleet:
            cut = 0
            for _ in range(5):
                time.sleep(0.1)  # traffic for it to fall into
                fleet.forget_back()
                cut += bus.drop_connections()
                fleet.wait_back(time.monotonic())
            all_reached(fleet)
            fleet.stop()
            fleet.settle()
        found = fleet.check()
        check(found)
        assert cut >= 6
    Row(record_property, "R18", FIGURE).measured(f"6 clients, {cut} connections reset by a proxy: {brief(found)}")


def ports_of_clients(server: int) -> list[int]:
    """The clients' ends of the connections to the server."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state = line.split()[1:4]
        if state == "01" and int(remote.rpartition(":")[2], 16) == server:
            found.append(int(local.rpartition(":")[2], 16))
    return found


def kill_half(server: int, dice: random.Random) -> int:
    ports = ports_of_clients(server)
    chosen = dice.sample(ports, len(ports) // 2)
    if chosen:
        which = " or ".join(f"sport = :{port}" for port in chosen)
        subprocess.run(["ss", "-K", "-tn", f"dport = :{server} and ( {which} )"], capture_output=True, check=True)
    return len(chosen)


def storm(seconds: int) -> None:
    """The row, in a network of its own."""
    dice = random.Random(18)
    with KilledServer() as server:
        with Fleet(server.port, 50, 50, pause_s=0.1, keep=False) as fleet:
            cut = 0
            for _ in range(seconds):
                time.sleep(1.0)
                cut += kill_half(server.port, dice)
            ended = time.monotonic()
            while len(ports_of_clients(server.port)) < 100 or any(
                one.client.status.name != "CONNECTED" for one in fleet.members
            ):
                assert time.monotonic() - ended < 30.0
                time.sleep(0.005)
            fleet.each(lambda one: one.client.wait_connected(30.0))
            back_s = time.monotonic() - ended
            all_reached(fleet)
            fleet.stop()
            fleet.settle()
        found = fleet.check()
    print(
        f"100 clients, {cut} connections killed in {seconds} s: all back {back_s:.2f} s after the end; {brief(found)}"
    )
    check(found)
    assert cut >= 30 * seconds, cut
    assert back_s <= 5.0, back_s


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.skipif(shutil.which("ss") is None, reason="ss (iproute2) is not installed")
@needs_netns
def test_a_hundred_killed_by_the_kernel(record_property: Callable[[str, object], None]) -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_row_18_kills\n"
    told = in_netns(program + "test_row_18_kills.storm(60)", timeout=180)
    Row(record_property, "R18", FIGURE).measured(told.strip())
