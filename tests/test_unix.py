"""The server on a Unix domain socket: its file's rights, a stale file, and its end."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from evbus import ConfigError, EventServer, ServerStartError
from evbus._frame import pack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no Unix domain sockets")


@pytest.fixture
def path() -> Iterator[str]:
    # Not tmp_path: with a long test name it can exceed the 107 bytes that such a path may have.
    with TemporaryDirectory() as where:
        yield str(Path(where) / "bus")


def shake_hands(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(pack(23, 1, 1, 0, 0, "s", "hello"))
        return sock.recv(4096)


def test_it_serves_next_to_tcp(path: str) -> None:
    with EventServer(port=0, unix=path) as server:
        assert server.addresses == [server.address, path]
        assert server.port > 0
        assert b"hello" in shake_hands(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not os.path.exists(path)


def test_it_serves_without_tcp_and_starts_again(path: str) -> None:
    server = EventServer(None, unix=Path(path))
    for _ in range(2):
        server.start()
        assert server.address == path
        assert b"hello" in shake_hands(path)
        server.stop()


def test_a_file_that_a_dead_server_left_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with EventServer(None, unix=path):
        assert b"hello" in shake_hands(path)


def test_a_path_in_use_is_refused_and_left_alone(path: str) -> None:
    with EventServer(None, unix=path):
        with pytest.raises(ServerStartError, match="another server listens there"):
            EventServer(None, unix=path).start()
        assert b"hello" in shake_hands(path)
    Path(path).write_text("no socket")
    with pytest.raises(ServerStartError, match="no socket"):
        EventServer(None, unix=path).start()
    assert Path(path).read_text() == "no socket"


def test_a_successor_keeps_its_file(path: str) -> None:
    server = EventServer(None, unix=path).start()
    os.unlink(path)
    with EventServer(None, unix=path):
        server.stop()
        assert b"hello" in shake_hands(path)


def test_bad_paths_and_options() -> None:
    with pytest.raises(ServerStartError, match="100 bytes"):
        EventServer(None, unix="x" * 200).start()
    with pytest.raises(ServerStartError):
        EventServer(None, unix="/no/such/directory/bus").start()
    for unix in ("", 7):
        with pytest.raises(ConfigError, match="unix"):
            EventServer(unix=unix)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="host"):
        EventServer(None)
