"""A broker in the test's own thread, and clients that speak packets to it: every test on it is held against the oracle.

`Bus(check=False)` leaves the oracle out, for what it does not know: receivers that take nothing.
"""

from __future__ import annotations

from typing import Any, final

import reference as ref
from helpers_raw import CLIENT_FACTS
from side_by_side import START_MS, World

from evbus.limits import Limits
from evbus.wire import CloseReason

_TELLING = ("TaskId", "Status", "Code", "Reason", "Receivers", "Replies", "Flags", "SubscriptionId", "IsQueryRequest")


def brief(packet: ref.Packet) -> tuple[Any, ...]:
    """An object's id and the fields that tell what happened."""
    return packet.object_id, *(packet.fields[name] for name in _TELLING if name in packet.fields)


@final
class Client:
    """One connection to a `Bus`."""

    def __init__(self, bus: Bus, dialect: str) -> None:
        self.bus = bus
        self.dialect = dialect
        bus.world.run([("open",)])
        self.id = len(bus.world.wires)
        self.wire = bus.world.wires[self.id]
        self._taken = 0

    def handshake(self, **fields: Any) -> None:
        """Open in the dialect; what comes in answer is left to be taken."""
        fields = {"TaskId": "h"} | fields
        if self.dialect == ref.EVBUS_2:
            fields.setdefault("Announcement", CLIENT_FACTS)
        self.send(ref.HANDSHAKE, system_id=1 if self.dialect in ref.OLD else 0, **fields)

    def send(self, object_id: int, version: int = 1, system_id: int = 0, time: int = START_MS, **fields: Any) -> None:
        """Send one packet."""
        self.send_bytes(ref.encode(self.dialect, object_id, fields, version=version, system_id=system_id, time=time))

    def send_bytes(self, *pieces: bytes) -> None:
        """Send bytes as they are, in these pieces."""
        self.bus.world.run([("data", self.id, piece) for piece in pieces])

    def publish(self, subject: str, buffer: bytes = b"", task_id: str = "", version: int = 1, **fields: Any) -> None:
        """Publish."""
        self.send(ref.PUBLISH, version, TaskId=task_id, Subject=subject, Buffer=buffer, **fields)

    def subscribe(self, subject: str, sid: int = 0, role: int = 0, group: str = "") -> None:
        """Subscribe without an acknowledgement; version 2 if there is an id."""
        if sid:
            self.send(ref.SUBSCRIBE, 2, Subject=subject, SubscriptionId=sid, Role=role, Group=group)
        else:
            self.send(ref.SUBSCRIBE, Subject=subject)

    def take(self) -> list[ref.Packet]:
        """The packets that came since the last call."""
        self.wire.read(self.bus.world.ticks)
        new, self._taken = self.wire.packets[self._taken :], len(self.wire.packets)
        return new

    def brief(self) -> list[tuple[Any, ...]]:
        """The packets that came since the last call, in short."""
        return [brief(packet) for packet in self.take()]

    def close(self) -> None:
        """Go away."""
        self.bus.world.run([("close", self.id)])

    @property
    def is_open(self) -> bool:
        """Whether the server still has it."""
        return self.id in self.bus.world.broker.peers

    @property
    def closed(self) -> CloseReason | None:
        """Why the server closed it, if it did."""
        reason = self.bus.world.closed.get(self.id)
        return None if reason is None else CloseReason(reason)


@final
class Bus:
    """A broker with limits of its own."""

    def __init__(self, check: bool = True, seed: int = 0, **limits: Any) -> None:
        self.world = World(seed, Limits(**limits), check)
        self.broker = self.world.broker
        self.router = self.broker.router

    def open(self, dialect: str = ref.EVBUS_2, **handshake: Any) -> Client:
        """A client that has shaken hands."""
        client = Client(self, dialect)
        client.handshake(**handshake)
        (answer,) = client.take()
        assert brief(answer) == (ref.RESPONSE, handshake.get("TaskId", "h"), ref.SUCCESS), answer
        return client

    def fresh(self, dialect: str = ref.EVBUS_2) -> Client:
        """A connection that has sent nothing yet."""
        return Client(self, dialect)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.world.run([("wait", seconds)])

    def errors(self) -> dict[str, int]:
        """What the server counted as errors, by name."""
        errors: dict[str, int] = self.router.counters()["errors"]
        return errors
