"""What every peer offers to the bench."""

from __future__ import annotations

import abc
import dataclasses
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError, UnavailableError
from bench.native import Frames
from bench.process import ServerProcess

__all__ = ["CHUNK", "IO_S", "Peer", "dial", "expect", "program", "receive_exactly", "version_line"]

#: Seconds that any one answer of a server may take outside the timed runs.
IO_S = 10.0
#: Subscriptions that are asked for at a time: their answers fit into what a socket holds.
CHUNK = 500


class Peer(abc.ABC):
    """One server, and how to talk to it.

    Args:
        scratch: a directory for what it needs to write; removed after the bench.
        core: the core to run it on, or None.
    """

    name = ""
    #: The most publishers it can take; 0: any number.
    max_publishers = 0

    def __init__(self, scratch: Path, core: int | None) -> None:
        self.scratch = scratch
        self._core = core
        self._process: ServerProcess | None = None

    @classmethod
    @abc.abstractmethod
    def version(cls) -> str:
        """Its version, for the table's foot. Raises UnavailableError if it is not installed."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start the server and wait until it listens."""

    def launch(self, argv: list[str], ready: str) -> None:
        """For `start`: run a command and wait for the line that a regular expression finds; group 1 is the port."""
        self._process = ServerProcess(argv, re.compile(ready), self._core)

    def stop(self) -> None:
        """End the server. Also after a start that failed."""
        if self._process is not None:
            self._process.stop()

    @property
    def process(self) -> ServerProcess:
        """The server's process."""
        if self._process is None:
            raise BenchError(f"{self.name} is not running")
        return self._process

    @abc.abstractmethod
    def subscriber(self, subject: str) -> socket.socket:
        """A connection whose subscription is active."""

    def subscribe_many(self, connection: socket.socket, subjects: Sequence[str]) -> None:
        """Subscribe a connection of `publisher` to further subjects; returns when all are active."""
        raise UnavailableError(f"{self.name} cannot subscribe {connection.fileno()} to {len(subjects)} subjects")

    def many_frames(self, subjects: Sequence[str], payload: bytes) -> Frames:
        """One message for each subject, for connections of `subscribe_many`. The subjects have the same length."""
        each = [self.frames(subject, payload, 1) for subject in subjects]
        return dataclasses.replace(each[0], frame=b"".join(one.frame for one in each), count=len(each))

    @abc.abstractmethod
    def publisher(self) -> socket.socket:
        """A connection that may publish."""

    @abc.abstractmethod
    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:
        """One message, encoded."""

    def settle(self, connections: list[socket.socket]) -> None:  # noqa: B027  # most servers say nothing
        """Let the server say what it says by itself to new connections, so that it does not fall into a timed run."""

    @abc.abstractmethod
    def ping(self, connection: socket.socket) -> None:
        """A round trip on a quiet connection; BenchError if anything but the answer is there to be read."""


def dial(port: int) -> socket.socket:
    """A connection to a server on this machine, without Nagle's delay."""
    connection = socket.create_connection(("127.0.0.1", port), IO_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """That many bytes, or BenchError."""
    data = bytearray()
    while len(data) < count:
        try:
            more = connection.recv(count - len(data))
        except TimeoutError:
            raise BenchError(f"the server did not answer within {IO_S:g} s (after {bytes(data)!r})") from None
        if not more:
            raise BenchError(f"the server closed the connection (after {bytes(data)!r})")
        data += more
    return bytes(data)


def expect(connection: socket.socket, answer: bytes) -> None:
    """Read an answer whose bytes are known; anything else is a BenchError."""
    found = receive_exactly(connection, len(answer))
    if found != answer:
        raise BenchError(f"the server sent {found!r} where {answer!r} was due")


def program(name: str) -> str:
    """The path of a program, or UnavailableError. System programs are looked for in sbin too."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise UnavailableError(f"{name} is not installed")
    return found


def version_line(argv: list[str]) -> str:
    """The first line that a program prints about its version."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=IO_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UnavailableError(f"{argv[0]}: {e}") from e
    text = (done.stdout + done.stderr).strip()
    if done.returncode or not text:
        raise UnavailableError(f"{' '.join(argv)} failed: {text or 'no output'}")
    return text.splitlines()[0]
