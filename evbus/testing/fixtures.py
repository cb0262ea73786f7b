"""The fixtures for pytest; the one module of evbus that imports it. PYTEST_DONT_REWRITE: nothing here asserts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from evbus.client import EventClient
from evbus.testing._bus import MemoryBus, ServerBus

__all__ = ["evbus_client", "evbus_memory", "evbus_server"]


@pytest.fixture
def evbus_server() -> Iterator[ServerBus]:
    """A real event server on a free port: connect to `evbus_server.url`."""
    with ServerBus() as bus:
        yield bus


@pytest.fixture
def evbus_client(evbus_server: ServerBus) -> EventClient:
    """A client that is connected to `evbus_server`."""
    return evbus_server.client()


@pytest.fixture
def evbus_memory() -> Iterator[MemoryBus]:
    """A server and clients (`evbus_memory.client()`) in memory, without any socket."""
    with MemoryBus() as bus:
        yield bus
