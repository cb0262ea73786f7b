"""redis-server with its stock settings, but without writing to disk."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.native import Frames
from bench.peers.base import CHUNK, Peer, dial, expect, program, version_line

__all__ = ["Redis"]


class Redis(Peer):
    """PUBLISH and SUBSCRIBE of the Redis protocol. Every PUBLISH is answered with the number of receivers."""

    name = "redis"

    def __init__(self, scratch: Path, core: int | None) -> None:
        super().__init__(scratch, core)
        self._port = 0
        self._subscribers: set[socket.socket] = set()  # PING is answered in two ways, by what the connection is

    @classmethod
    def version(cls) -> str:
        return version_line([program("redis-server"), "--version"]).partition(" sha=")[0]

    def start(self) -> None:
        # Port 0 means "no TCP" to redis, so a free one has to be found first. Somebody may take it meanwhile: again.
        for attempt in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
            command = [program("redis-server"), "--port", str(self._port), "--bind", "127.0.0.1"]
            command += ["--save", "", "--appendonly", "no", "--dir", str(self.scratch)]
            try:
                self.launch(command, "Ready to accept connections")
            except BenchError:
                if attempt == 4:
                    raise
            else:
                return

    def publisher(self) -> socket.socket:
        return dial(self._port)

    def subscriber(self, subject: str) -> socket.socket:
        connection = dial(self._port)
        connection.sendall(_command(b"SUBSCRIBE", subject.encode()))
        expect(connection, b"*3\r\n" + _bulk(b"subscribe") + _bulk(subject.encode()) + b":1\r\n")
        self._subscribers.add(connection)
        return connection

    def subscribe_many(self, connection: socket.socket, subjects: Sequence[str]) -> None:
        done = 0
        for at in range(0, len(subjects), CHUNK):
            chunk = [subject.encode() for subject in subjects[at : at + CHUNK]]
            connection.sendall(_command(b"SUBSCRIBE", *chunk))
            for name in chunk:
                done += 1
                expect(connection, b"*3\r\n" + _bulk(b"subscribe") + _bulk(name) + b":%d\r\n" % done)
        self._subscribers.add(connection)

    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:
        frame = _command(b"PUBLISH", subject.encode(), payload)
        delivery = _command(b"message", subject.encode(), payload)
        at, delivered_at = (len(whole) - 2 - len(payload) for whole in (frame, delivery))
        return Frames(frame, at, len(payload), len(delivery), delivered_at, len(b":%d\r\n" % subscribers))

    def ping(self, connection: socket.socket) -> None:
        connection.sendall(_command(b"PING"))
        expect(connection, b"*2\r\n$4\r\npong\r\n$0\r\n\r\n" if connection in self._subscribers else b"+PONG\r\n")


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(map(_bulk, parts))
