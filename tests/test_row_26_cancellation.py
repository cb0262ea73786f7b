"""R26: a query that is cancelled at any await point takes itself back, and disturbs no other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from helpers_rows import Row

from evbus import AsyncEventClient, ClientLimits, EventServer

QUERIES = 10_000
AT_ONCE = 100


@pytest.mark.parametrize("buffer_bytes", [4 << 20, 8192], ids=["roomy", "full"])
def test_queries_cancelled_anywhere(record_property: Callable[[str, object], None], buffer_bytes: int) -> None:
    row = Row(
        record_property, "R26", "10,000 queries cancelled at random: 0 wrong answers, pending 0, connection alive"
    )
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    counts = {"answered": 0, "cancelled": 0, "wrong": 0}

    async def ask(client: AsyncEventClient, number: int) -> None:
        # With a small buffer many are cancelled while they wait for room.
        answer = await client.query("echo", f"{number:>200}", str, timeout=30)
        counts["answered" if int(answer) == number else "wrong"] += 1

    async def main(port: int) -> None:
        limits = ClientLimits(buffer_bytes=buffer_bytes)
        async with AsyncEventClient(port=port) as responder, AsyncEventClient(port=port, limits=limits) as client:

            @responder.on_query("echo")
            async def echo(text: str) -> str:
                if int(text) % 3 == 0:
                    await asyncio.sleep(0)
                return text

            await responder.flush()
            for first in range(0, QUERIES, AT_ONCE):
                tasks = [asyncio.create_task(ask(client, first + number)) for number in range(AT_ONCE)]
                left = list(tasks)
                choose.shuffle(left)
                while left:
                    for _ in range(choose.randrange(4)):
                        await asyncio.sleep(choose.choice([0, 0, 0, 0.0002]))
                    for _ in range(choose.randrange(1, 20)):
                        if left:
                            left.pop().cancel()
                await asyncio.wait(tasks)
                counts["cancelled"] += sum(task.cancelled() for task in tasks)
                assert client.stats().pending_queries == 0
            assert await client.query("echo", "7", str) == "7"
            stats = client.stats()
            assert (stats.connects, stats.pending_queries, stats.malformed) == (1, 0, 0)
            await responder.flush()
            await client.flush()

    with EventServer(port=0) as server:
        asyncio.run(main(server.port))
        assert server.stats()["queries_pending"] == 0
    row.measured(f"seed {seed}, buffer {buffer_bytes}: {counts}")
    assert counts["wrong"] == 0
    assert counts["cancelled"] >= QUERIES // 10
    assert counts["answered"] + counts["cancelled"] == QUERIES
