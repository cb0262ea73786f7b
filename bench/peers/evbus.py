"""evbus itself: `evbus serve` as a process of its own, with its stock settings, so with every limit on."""

from __future__ import annotations

import importlib.util
import socket
import struct
import sys
from collections.abc import Sequence

from bench.errors import BenchError, UnavailableError
from bench.native import Frames
from bench.peers.base import CHUNK, Peer, dial, receive_exactly
from evbus._version import __version__
from evbus.wire import ANNOUNCEMENT_PREFIX, Codec, ObjectId, Status

__all__ = ["Evbus", "EvbusVersion1"]

_HEADER = struct.Struct("<iqHBq")  # PackSize, SystemId, ObjectId, ObjectVersion, UnixTimeMilliseconds
_WHEN_MS = 1_767_225_600_000
# The load sends no heartbeats: ask for an interval that outlasts a workload. The bench pings between rounds.
_ANNOUNCEMENT = (
    ANNOUNCEMENT_PREFIX + '{"versions":[2,2],"name":"bench","client":"bench","heartbeat":60.0,"features":[]}'
)


class Evbus(Peer):
    """Version 2 of the protocol, as evbus's own clients speak it."""

    name = "evbus"
    _last = 1  # number of the last subscription of `subscribe_many`
    _announcement: str | None = _ANNOUNCEMENT

    @classmethod
    def version(cls) -> str:
        if importlib.util.find_spec("evbus.cli") is None:
            raise UnavailableError("evbus has no command line here")
        return f"evbus {__version__}"

    def start(self) -> None:
        self.launch([sys.executable, "-m", "evbus", "serve", "--port", "0"], r"listening on 127\.0\.0\.1:(\d+)")

    def publisher(self) -> socket.socket:
        connection = dial(self.process.port)
        body = _string("hello")
        if self._announcement is not None:
            body += _string("") + _string("") + _string(self._announcement)
        connection.sendall(_packet(ObjectId.HANDSHAKE, 1, body))
        _expect_success(connection, "hello")
        return connection

    def subscriber(self, subject: str) -> socket.socket:
        connection = self.publisher()
        connection.sendall(self._subscribe(subject))
        _expect_success(connection, "subscribe")
        return connection

    def subscribe_many(self, connection: socket.socket, subjects: Sequence[str]) -> None:
        for at in range(0, len(subjects), CHUNK):
            chunk = subjects[at : at + CHUNK]
            requests = [self._subscribe(subject, self._last + index) for index, subject in enumerate(chunk, 1)]
            self._last += len(chunk)
            connection.sendall(b"".join(requests))
            for _ in chunk:
                _expect_success(connection, "subscribe")

    def _subscribe(self, subject: str, number: int = 1) -> bytes:
        fields = struct.pack("<iBB", number, 0, 0)  # SubscriptionId, Role, Overflow
        return _packet(ObjectId.SUBSCRIBE, 2, _string("subscribe") + _string(subject) + fields + _string(""))

    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:  # noqa: ARG002
        # Flags, Codec, SubscriptionId, DeadlineMs; TaskId (empty: no acknowledgement), Subject, QueryTaskId; Headers
        head = struct.pack("<BBii", 0, Codec.BYTES, 0, 0) + _string("") + _string(subject) + _string("")
        head += struct.pack("<ii", 0, len(payload))
        frame = _packet(ObjectId.PUBLISH, 2, head + payload)
        # A delivery has the same layout as the publish that it comes from.
        at = len(frame) - len(payload)
        return Frames(frame, at, len(payload), len(frame), at)

    def ping(self, connection: socket.socket) -> None:
        beat = _packet(ObjectId.HEARTBEAT, 1, struct.pack("<i", 4711))
        connection.sendall(beat)
        answer = receive_exactly(connection, len(beat))
        # The echo has the server's own SystemId and time.
        if (answer[:4], answer[12:15], answer[23:]) != (beat[:4], beat[12:15], beat[23:]):
            raise BenchError(f"evbus sent {answer!r} where the echo of a heartbeat was due")


class EvbusVersion1(Evbus):
    """Version 1 of the protocol, as C# peers speak it."""

    name = "evbus-v1"
    _announcement = None

    def _subscribe(self, subject: str, number: int = 1) -> bytes:  # noqa: ARG002  # version 1 has no numbers
        return _packet(ObjectId.SUBSCRIBE, 1, _string("subscribe") + _string(subject))

    def frames(self, subject: str, payload: bytes, subscribers: int) -> Frames:  # noqa: ARG002
        tail = struct.pack("<i", len(payload)) + payload
        frame = _packet(ObjectId.PUBLISH, 1, _string("") + _string(subject) + _string("") + tail)
        delivery = _packet(ObjectId.DELIVERY, 1, _string("") + _string(subject) + b"\0" + tail)
        at, delivered_at = len(frame) - len(payload), len(delivery) - len(payload)
        return Frames(frame, at, len(payload), len(delivery), delivered_at)


def _string(text: str) -> bytes:
    data = text.encode()
    length, out = len(data), bytearray()
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(out) + bytes([length]) + data


def _packet(object_id: int, version: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), 0, object_id, version, _WHEN_MS) + body


def _expect_success(connection: socket.socket, task_id: str) -> None:
    head = receive_exactly(connection, _HEADER.size)
    size, _, object_id, _, _ = _HEADER.unpack(head)
    body = receive_exactly(connection, size - _HEADER.size)
    if object_id != ObjectId.RESPONSE or not body.startswith(_string(task_id) + bytes([Status.SUCCESS])):
        raise BenchError(f"evbus did not accept {task_id!r}: {body!r}")
