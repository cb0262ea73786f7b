"""R13: a thousand subscriptions come back with each connection, and those that were ended meanwhile do not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers_fleet import Blocking, run_blocking
from helpers_rows import KilledServer, Row, summary_ms

from evbus import AsyncEventClient, ConnectStatus, EventClient, Reconnect

FIGURE = "1,000 subscriptions x 10 reconnects: each gets its probe; unsubscribed during the outage stays so"
WAIT = 30.0
QUICK = Reconnect(first_delay_s=0.05, min_delay_s=0.02, max_delay_s=0.1)
#: Subscriptions ended during each outage.
ENDED = 5


class Probes:
    """What arrived, and where."""

    def __init__(self) -> None:
        self.got: Counter[tuple[int, bytes]] = Counter()
        self._changed = threading.Condition()

    def handler(self, number: int) -> Callable[[bytes], None]:
        def take(data: bytes) -> None:
            with self._changed:
                self.got[number, data] += 1
                self._changed.notify_all()

        return take

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.got.total() >= count, WAIT), (count, self.got.total())


def lose(server: KilledServer, lost: threading.Event) -> None:
    lost.clear()
    server.kill()
    assert lost.wait(WAIT)


async def scenario(new: Callable[..., Any], row: Row, kind: str, subscriptions: int, rounds: int) -> None:
    probes, lost = Probes(), threading.Event()

    def on_status(status: ConnectStatus) -> None:
        if status is ConnectStatus.RECONNECTING:
            lost.set()

    took: list[float] = []
    with KilledServer() as server:
        client = new(port=server.port, reconnect=QUICK, on_status=on_status)
        await client.connect(WAIT)
        live = {
            number: await client.subscribe(f"probe.{number}.{number % 7}", probes.handler(number), type=bytes)
            for number in range(subscriptions)
        }
        gone: set[int] = set()
        expected: Counter[tuple[int, bytes]] = Counter()
        for turn in range(rounds):
            # Blocking: the loop of an asyncio client has to run meanwhile.
            await off_loop(kind, lose, server, lost)
            for number in list(live)[turn::97][:ENDED]:
                subscription = live.pop(number)
                gone.add(number)
                result = subscription.unsubscribe()
                if kind == "asyncio":
                    await result
            await off_loop(kind, server.start)
            up = time.perf_counter()
            await client.wait_connected(WAIT)
            took.append(time.perf_counter() - up)
            await off_loop(kind, probe, server.port, turn, set(live), gone)
            for number in live:
                expected[number, b"%d" % turn] += 1
            await off_loop(kind, probes.wait, expected.total())
            await client.rtt(WAIT)
            assert probes.got == expected
        await client.disconnect()
        assert probes.got == expected
    row.measured(
        f"{kind}: {subscriptions} subscriptions x {rounds} reconnects, {expected.total()} probes where they belong, "
        f"{len(gone)} ended and silent; back after {summary_ms(took)}"
    )


async def off_loop(kind: str, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(function, *args) if kind == "asyncio" else function(*args)


def probe(port: int, turn: int, live: set[int], gone: set[int]) -> None:
    """Somebody else publishes to all of them; the server knows exactly those that are there."""
    with EventClient(port=port) as other:
        for number in sorted(live | gone):
            other.publish(f"probe.{number}.{number % 7}", b"%d" % turn)
        for number in gone:
            assert other.publish(f"probe.{number}.{number % 7}", b"%d" % turn, confirm=True).receivers == 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["plain", "asyncio"])
def test_resubscribing(record_property: Callable[[str, object], None], kind: str) -> None:
    subscriptions, rounds = 1000, 10
    row = Row(record_property, "R13", FIGURE)
    if kind == "plain":
        run_blocking(scenario(lambda **options: Blocking(EventClient(**options)), row, kind, subscriptions, rounds))
    else:
        asyncio.run(asyncio.wait_for(scenario(AsyncEventClient, row, kind, subscriptions, rounds), 180))
