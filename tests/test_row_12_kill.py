"""R12: the server is killed and started again under a hundred clients that publish; who is back when, and what is lost.

Without the part on durable messages, which evbus does not have.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from helpers_fleet import Fleet, Found, percentile
from helpers_rows import KilledServer, Row

FIGURE = (
    "kill -9, same port, 50 + 50 clients, 20 rounds: 95 % back and resubscribed <= 2 s after the port, all <= 5 s; "
    "lost: of the unconfirmed only; 0 duplicates, 0 reordered; a full buffer raises"
)


def play(
    plain: int, asynchronous: int, rounds: int, pause_s: float
) -> tuple[Found, list[list[float]], list[float], dict[str, int]]:
    """Kill the server so often; returns what the checker found, the times until back per round, the outages, gaps."""
    dice = random.Random(12)
    times: list[list[float]] = []
    outages: list[float] = []
    with KilledServer() as server, Fleet(server.port, plain, asynchronous, pause_s=pause_s) as fleet:
        for _ in range(rounds):
            time.sleep(dice.uniform(0.3, 0.8))  # traffic for the kill to fall into
            fleet.forget_back()
            killed = time.monotonic()
            server.kill()
            fleet.wait_away()
            server.start()
            up = time.monotonic()
            outages.append(up - killed)
            times.append(fleet.wait_back(up))
            fleet.settle()
        fleet.stop()
        fleet.settle()
    return fleet.check(), times, outages, dict(fleet.gaps)


def check(found: Found, members: int, rounds: int) -> None:
    assert found.duplicates == []
    assert found.reordered == []  # kept ones before new ones, too: one stream has all of a publisher's
    assert found.lost == []
    assert found.lost_kept == []
    assert found.invented == []
    assert found.full == members * rounds
    assert found.kept >= members * rounds
    assert found.confirmed


def tell(
    row: Row, found: Found, times: list[list[float]], outages: list[float], gaps: dict[str, int], members: int
) -> None:
    every = [one for some in times for one in some]
    row.measured(
        f"{members} clients, {len(times)} rounds, outage {min(outages):.1f} to {max(outages):.1f} s: back after median "
        f"{percentile(every, 0.5):.2f} s, 95 % {percentile(every, 0.95):.2f} s (worst round "
        f"{max(percentile(some, 0.95) for some in times):.2f} s), all {max(every):.2f} s"
    )
    row.measured(
        f"{found.published} published, {found.deliveries} delivered, {found.confirmed} confirmed and 0 of them lost, "
        f"{found.unknown} unconfirmed ({found.unknown_delivered} delivered all the same), {found.kept} kept and 0 of "
        f"them lost, {found.full} times BufferFullError, 0 duplicates, 0 reordered, "
        f"{gaps.get('reconnect', 0)} gaps told"
    )


@pytest.mark.timeout(120)
def test_a_few(record_property: Callable[[str, object], None]) -> None:
    found, times, outages, gaps = play(3, 3, 3, 0.005)
    check(found, 6, 3)
    tell(Row(record_property, "R12", FIGURE), found, times, outages, gaps, 6)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_hundred(record_property: Callable[[str, object], None]) -> None:
    found, times, outages, gaps = play(50, 50, 20, 0.05)
    tell(Row(record_property, "R12", FIGURE), found, times, outages, gaps, 100)
    check(found, 100, 20)
    every = [one for some in times for one in some]
    assert percentile(every, 0.95) <= 2.0
    assert max(every) <= 5.0
