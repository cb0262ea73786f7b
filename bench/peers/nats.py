"""nats-server with its stock settings."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence

from bench.errors import BenchError
from bench.native import Frames
from bench.peers.base import CHUNK, Peer, dial, expect, program, version_line

__all__ = ["Nats"]

# The server sends INFO with a length that varies; it ends its first line.
_HELLO = b'CONNECT {"verbose":false,"pedantic":false,"echo":true}\r\nPING\r\n'


class Nats(Peer):
    """The text protocol of NATS: PUB, SUB, MSG."""

    name = "nats"
    _last = 0  # number of the last subscription of `subscribe_many`

    @classmethod
    def version(cls) -> str:
        return version_line([program("nats-server"), "--version"])

    def start(self) -> None:
        # The interval is the one setting that is not stock: a PING of the server in the middle of a timed run would
        # be bytes that no message accounts for. It costs or saves no processor time worth naming.
        config = self.scratch / "nats.conf"
        config.write_text('ping_interval: "1h"\n', encoding="ascii")
        argv = [program("nats-server"), "-a", "127.0.0.1", "-p", "-1", "-c", str(config)]
        self.launch(argv, r"Listening for client connections on 127\.0\.0\.1:(\d+)")

    def publisher(self) -> socket.socket:
        connection = dial(self.process.port)
        if not _line(connection).startswith(b"INFO "):
            raise BenchError("nats-server did not send INFO first")
        connection.sendall(_HELLO)
        expect(connection, b"PONG\r\n")
        return connection

    def subscriber(self, subject: str) -> socket.socket:
        connection = self.publisher()
        connection.sendall(b"SUB %s 1\r\nPING\r\n" % subject.encode())
        expect(connection, b"PONG\r\n")
        return connection

    def subscribe_many(self, connection: socket.socket, subjects: Sequence[str]) -> None:
        for at in range(0, len(subjects), CHUNK):
            # Every delivery must have the same length, so every number has six digits.
            lines = [
                b"SUB %s %06d\r\n" % (name.encode(), self._last + i)
                for i, name in enumerate(subjects[at : at + CHUNK], 1)
            ]
            self._last += len(lines)
            connection.sendall(b"".join(lines) + b"PING\r\n")
            expect(connection, b"PONG\r\n")

    def many_frames(self, subjects: Sequence[str], payload: bytes) -> Frames:
        frames = super().many_frames(subjects, payload)
        width = len("000001") - len("1")
        return dataclasses.replace(
            frames, delivery_len=frames.delivery_len + width, delivery_payload_at=frames.delivery_payload_at + width
        )

    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:  # noqa: ARG002
        head = b"PUB %s %d\r\n" % (subject.encode(), len(payload))
        delivered = b"MSG %s 1 %d\r\n" % (subject.encode(), len(payload))
        return Frames(
            head + payload + b"\r\n", len(head), len(payload), len(delivered) + len(payload) + 2, len(delivered)
        )

    def settle(self, connections: list[socket.socket]) -> None:
        # Whatever the interval, the first PING comes 2 to 2.4 s after a connection was made, to measure its round trip.
        for connection in connections:
            expect(connection, b"PING\r\n")
            connection.sendall(b"PONG\r\n")

    def ping(self, connection: socket.socket) -> None:
        connection.sendall(b"PING\r\n")
        expect(connection, b"PONG\r\n")


def _line(connection: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise BenchError("nats-server closed the connection")
        line += byte
    return bytes(line)
