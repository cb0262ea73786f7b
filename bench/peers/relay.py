"""The relay: the floor that only copies bytes."""

from __future__ import annotations

import socket
import time

from bench.errors import BenchError
from bench.native import Frames, compile_relay
from bench.peers.base import Peer, dial, expect

__all__ = ["Relay"]


class Relay(Peer):
    """Copies what its publisher sends to every subscriber. Two publishers would cut into each other's messages."""

    name = "relay"
    max_publishers = 1

    @classmethod
    def version(cls) -> str:
        return "relay.c"

    def start(self) -> None:
        self.launch([str(compile_relay(self.scratch))], r"listening on 127\.0\.0\.1:(\d+)")

    def _join(self, role: bytes) -> socket.socket:
        connection = dial(self.process.port)
        connection.sendall(role)
        expect(connection, role)
        return connection

    def subscriber(self, subject: str) -> socket.socket:  # noqa: ARG002  # it knows no subjects
        return self._join(b"S")

    def publisher(self) -> socket.socket:
        return self._join(b"P")

    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:  # noqa: ARG002
        # As many bytes around the payload as evbus has, so that the relay moves what evbus moves.
        frame = bytes(44 + len(subject)) + payload
        return Frames(frame, len(frame) - len(payload), len(payload), len(frame), len(frame) - len(payload))

    def ping(self, connection: socket.socket) -> None:
        # It answers nothing; but nothing may have been left over either.
        time.sleep(0.002)
        connection.setblocking(False)
        try:
            surplus = connection.recv(64)
        except BlockingIOError:
            return
        finally:
            connection.setblocking(True)
        raise BenchError(f"the relay sent {surplus!r} where nothing was due")
