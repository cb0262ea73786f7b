"""R42: through send buffers that take a packet only in many pieces, every byte arrives as it was."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from helpers_rows import Row

from evbus import AsyncEventClient, EventClient, EventServer, Limits
from evbus.dial import Server, dial
from evbus.transport import TcpTransport

SEND_BUFFER_BYTES = 4608
PAYLOAD_BYTES = 1 << 20
#: Messages on their way at a time: less than the server keeps for a subscriber.
WINDOW = 8
COUNTS = [50, pytest.param(1000, marks=pytest.mark.full)]
FIGURE = "SO_SNDBUF=4608, 1,000 x 1 MiB, SHA-256 equal, both client kinds"

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_SNDBUF"), reason="no SO_SNDBUF")


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0, limits=Limits(payload_bytes=PAYLOAD_BYTES)) as running:
        assert running._acceptor is not None
        for listener in running._acceptor._listeners:  # what it accepts inherits it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        yield running


def narrow(address: Server, timeout_s: float) -> TcpTransport:
    """A connection whose kernel buffer takes a small piece at a time."""
    transport = dial(address, timeout_s)
    with socket.socket(fileno=socket.dup(transport.fileno())) as sock:  # type: ignore[attr-defined]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return transport


async def narrow_async(address: Server, timeout_s: float) -> TcpTransport:
    """The same, for asyncio; a loopback address is connected to at once."""
    return narrow(address, timeout_s)


class Payloads:
    """Messages of random bytes, each one different, and the digest of all."""

    def __init__(self) -> None:
        self._base = random.Random(42).randbytes(PAYLOAD_BYTES)
        self.sent = hashlib.sha256()

    def make(self, number: int) -> bytes:
        data = number.to_bytes(8, "little") + self._base[number + 8 :] + self._base[:number]
        assert len(data) == PAYLOAD_BYTES
        self.sent.update(data)
        return data


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
def test_plain(server: EventServer, record_property: Callable[[str, object], None], count: int) -> None:
    payloads, got, arrived = Payloads(), hashlib.sha256(), queue.SimpleQueue[int]()

    def take(data: bytes) -> None:
        got.update(data)
        arrived.put(len(data))

    client = EventClient(port=server.port)
    client._dial = narrow
    at = time.perf_counter()
    with client:
        client.subscribe("big", take)
        for number in range(count):
            if number >= WINDOW:
                assert arrived.get(timeout=30) == PAYLOAD_BYTES
            client.publish("big", payloads.make(number))
        for _ in range(min(count, WINDOW)):
            assert arrived.get(timeout=30) == PAYLOAD_BYTES
    assert got.digest() == payloads.sent.digest()
    Row(record_property, "R42", FIGURE).measured(f"EventClient: {count} x 1 MiB in {time.perf_counter() - at:.1f} s")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
def test_asyncio(server: EventServer, record_property: Callable[[str, object], None], count: int) -> None:
    payloads, got = Payloads(), hashlib.sha256()

    async def main() -> None:
        room = asyncio.Semaphore(WINDOW)

        async def take(data: bytes) -> None:
            got.update(data)
            room.release()

        client = AsyncEventClient(port=server.port)
        client._dial = narrow_async
        async with client:
            await client.subscribe("big", take)
            for number in range(count):
                await asyncio.wait_for(room.acquire(), 30)
                await client.publish("big", payloads.make(number))
            for _ in range(WINDOW):
                await asyncio.wait_for(room.acquire(), 30)

    at = time.perf_counter()
    asyncio.run(main())
    assert got.digest() == payloads.sent.digest()
    Row(record_property, "R42", FIGURE).measured(
        f"AsyncEventClient: {count} x 1 MiB in {time.perf_counter() - at:.1f} s"
    )
