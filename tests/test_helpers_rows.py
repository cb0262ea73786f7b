"""The tools of the fault matrix do what they say: a server that comes back, a network of its own."""

from __future__ import annotations

import platform
import sys

import pytest
from helpers_rows import KilledServer, in_netns, interpreters, needs_netns

from evbus import ConnectError, EventClient


def test_a_killed_server_comes_back_on_its_port() -> None:
    with KilledServer() as server:
        port = server.port
        for _ in range(2):
            with EventClient(port=port) as client:
                assert client.rtt() > 0
                server.kill()
            with pytest.raises(ConnectError):
                EventClient(port=port).connect()
            server.start()
            assert server.port == port


def test_interpreters_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVBUS_PYTHONS", sys.executable)
    assert interpreters()[platform.python_version()] == sys.executable


@needs_netns
def test_a_network_of_its_own() -> None:
    program = """
from evbus import EventClient, EventServer
with EventServer(port=9100) as server, EventClient(port=9100) as client:
    print(client.rtt() >= 0.0)
"""
    assert in_netns(program) == "True\n"
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_netns("1 / 0")
