"""A client that speaks bytes, and the examples of `docs/protocol.md`, for tests over real sockets.

Nothing here knows evbus: packets are made and read by `reference`, so that a test with these helpers holds the server
to the protocol document and not to its own codec.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import reference

PROTOCOL_MD = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
#: Time of every packet that these helpers make up.
TIME_MS = 1_760_000_000_000
#: The announcement of a test's client.
CLIENT_FACTS = 'evbus/1 {"versions":[2,2],"name":"raw","client":"raw 1","heartbeat":60.0,"features":[]}'


@dataclass(frozen=True)
class Example:
    """A packet of the protocol document: its bytes as printed, and the text of the whole block."""

    name: str
    dialect: str
    sender: str  # "client" or "server"
    data: bytes
    block: str

    @property
    def packet(self) -> reference.Packet:
        """The packet as values."""
        (packet,) = reference.packets(self.data, self.dialect)
        return packet


def doc_examples(document: Path = PROTOCOL_MD) -> dict[str, Example]:
    """The blocks ```hex name=... dialect=... from=...``` of the protocol document, by name.

    In a block, what follows a `#` is a comment; all the rest is hexadecimal.
    """
    examples: dict[str, Example] = {}
    pattern = r"^```hex name=(\S+) dialect=(\S+) from=(client|server)\n(.*?)^```$"
    for name, dialect, sender, block in re.findall(
        pattern, document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        assert name not in examples, name
        data = bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))
        examples[name] = Example(name, dialect, sender, data, block)
    return examples


def render(data: bytes, dialect: str) -> str:
    """One packet as the protocol document prints it: a line per field, its bytes and its value as JSON.

    Bytes that are no printable ASCII are shown as hexadecimal.
    """
    (packet,) = reference.packets(data, dialect)
    object_id = "B" if reference.layout_of(dialect) == 22 else "H"
    head = (("PackSize", "i"), ("SystemId", "q"), ("ObjectId", object_id), ("ObjectVersion", "B"))
    values = (len(data), packet.system_id, packet.object_id, packet.version, packet.time)
    rows: list[tuple[bytes, str, Any]] = []
    for (name, kind), number in zip((*head, ("UnixTimeMilliseconds", "q")), values, strict=True):
        rows.append((struct.pack("<" + kind, number), name, number))
    kinds = dict(reference.schema(dialect, packet.object_id, packet.version) or ())
    for name, value in packet.fields.items():
        rows.append((reference.encode_value(kinds.get(name, "s"), value), name, value))
    lines = []
    for octets, name, value in rows:
        if isinstance(value, bytes):
            value = value.decode("ascii") if re.fullmatch(rb"[ -~]*", value) else f"hex {value.hex()}"
        parts = [octets[at : at + 16].hex() for at in range(0, len(octets), 16)]
        lines += [f"{parts[0]:<32}  # {name} {json.dumps(value, ensure_ascii=False)}", *parts[1:]]
    return "\n".join(lines) + "\n"


@final
class RawClient:
    """One connection over which a test sends bytes and reads whole packets. A context manager.

    `dialect` says how what the server sends is read. Every wait ends at a deadline with an AssertionError, so that a
    silent server fails a test instead of hanging it.
    """

    def __init__(self, host: str, port: int, dialect: str = reference.EVBUS_2, timeout: float = 5.0) -> None:
        self.dialect = dialect
        self.timeout = timeout
        self.sock = socket.create_connection((host, port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.decoder = reference.Decoder(reference.layout_of(dialect))
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close in order."""
        self.sock.close()

    def reset(self) -> None:
        """Close by a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.settimeout(self.timeout)
        self.sock.sendall(data)

    def send(self, object_id: int, fields: Mapping[str, Any] | None = None, *, version: int = 1, **more: Any) -> None:
        """Send one packet; fields by mapping or by name."""
        values = {**(fields or {}), **more}
        self.send_bytes(reference.encode(self.dialect, object_id, values, version=version, time=TIME_MS))

    def read(self, timeout: float | None = None) -> reference.Packet:
        """The next whole packet."""
        packet = self._read(self.timeout if timeout is None else timeout)
        assert packet is not None, f"no packet, but the end of the stream after {bytes(self.decoder.buffer)!r}"
        return packet

    def read_end(self, timeout: float | None = None) -> list[reference.Packet]:
        """What still comes until the server has closed the connection (in order or by a reset)."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        packets = []
        while (packet := self._read(deadline - time.monotonic())) is not None:
            packets.append(packet)
        return packets

    def _read(self, timeout: float) -> reference.Packet | None:
        deadline = time.monotonic() + timeout
        while True:
            item = self.decoder.next()
            if isinstance(item, reference.Frame):
                return reference.decode(item, self.dialect)
            assert item is None, f"the server's stream cannot be read: {item}, {bytes(self.decoder.buffer[:64])!r}"
            left = deadline - time.monotonic()
            assert left > 0, f"no packet within {timeout} s; {len(self.decoder.buffer)} bytes of one"
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                return None
            if not data:
                return None
            self.decoder.feed(data)

    def handshake(self, task_id: str = "hello", token: str = "") -> reference.Packet:
        """Open the connection in its dialect and return the answer; `facts` is what an evbus server announced."""
        fields = {"TaskId": task_id}
        if self.dialect == reference.EVBUS_2:
            fields |= {"AuthenticationToken": token, "ClientId": "", "Announcement": CLIENT_FACTS}
        elif self.dialect == reference.H23_199 and token:
            fields |= {"AuthenticationToken": token}
        # 0 is what tells H23_199 from H23_255, whose clients send the time there.
        system_id = 0 if self.dialect in (reference.EVBUS_2, reference.H23_199) else 134_000_000_000_000_000
        self.send_bytes(reference.encode(self.dialect, reference.HANDSHAKE, fields, system_id=system_id, time=TIME_MS))
        answer = self.read()
        assert (answer.object_id, answer.fields["TaskId"]) == (reference.RESPONSE, task_id), answer
        message = answer.fields["Message"]
        if message.startswith(reference.ANNOUNCEMENT) and answer.fields["Status"] == reference.SUCCESS:
            self.facts = json.loads(message[len(reference.ANNOUNCEMENT) :])
        return answer

    def heartbeat(self, number: int = 1) -> list[reference.Packet]:
        """Send a heartbeat and return what comes before its echo: everything that the server had for this peer."""
        old = self.dialect in reference.OLD
        object_id = reference.HEARTBEAT_OLD if old else reference.HEARTBEAT
        fields = {} if old else {"TaskId": number}
        self.send(object_id, fields)
        before: list[reference.Packet] = []
        while True:
            packet = self.read()
            if packet.object_id == object_id and packet.fields == fields:
                return before
            before.append(packet)
