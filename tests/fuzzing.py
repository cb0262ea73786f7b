"""Random conversations with a broker, held step by step against the oracle; failing ones are made small.

`Maker` invents what the peers do. A conversation is a list of batches of steps for a `World`, plain data that `dump`
writes and `load` reads, so that a failing one can be kept (`tests/corpus/`) and played again.

    python tests/fuzzing.py FILE...      # play kept conversations
    python tests/fuzzing.py SEED FRAMES  # a conversation of its own
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import reference as ref
from side_by_side import FUZZ_LIMITS, START_MS, Batch, Mismatch, Step, World

PAYLOAD = FUZZ_LIMITS.payload_bytes

# --- what peers do ---------------------------------------------------------------------------------------------------

SUBJECTS = ["a", "a", "b.c", "b.c", "b.d", "b.c.e", "x.y.z", "ü.😀", ".".join("t" * 32), "s" * 256, "a b"]
PATTERNS = [
    "a",
    "a",
    "a.>",
    "b.c.>",
    "b.*",
    ">",
    "b.>",
    "*.c",
    "*.*.*",
    "*",
    "b.c",
    "b.c.e",
    "*.y.>",
    "ü.*",
    ".".join("t*" * 16),
    "t.>",
]
INVALID = ["", ".", "a..b", "a.", "a*", "b.c>", ">.a", "a\x1f", "a\x7f", "a\udc80", "s" * 257, ".".join("u" * 33)]
HOSTILE = [
    "ffffffff0f", "ffffffff07", "8080808000", "8080808080", "808000", "ffffff7f", "ffffffff", "00000080", "7f", "80",
    "8080808010", "8280808020", "ff01", "00", "c080", "eda080", "f4908080",
]  # fmt: skip
GOOD_FACTS = 'evbus/1 {"versions":[2,2],"name":"fuzz","client":"fuzz 1","heartbeat":3600,"features":[]}'
FACTS = [
    'evbus/1 {"versions":[1,3]}',
    'evbus/1 {"versions":[2,2],"heartbeat":-1}',
    'evbus/1 {"versions":[2,2],"heartbeat":"x","name":5}',
    'evbus/1 {"versions":[2,2],"more":{"a":[1,2,{}]}}',
    'evbus/1 {"versions":[3,4]}',
    'evbus/1 {"versions":[1,1]}',
    'evbus/1 {"versions":[2,1]}',
    'evbus/1 {"versions":[2,2,2]}',
    'evbus/1 {"versions":[2.0,2]}',
    'evbus/1 {"versions":[true,2]}',
    'evbus/1 {"versions":"22"}',
    "evbus/1 {}",
    "evbus/1 [2,2]",
    "evbus/1 " + '{"a":' * 500,
    "evbus/1 " + "[" * 3000,
    "evbus/2 {}",
    "evbus/1",
    "",
]


class Maker:
    """Invents batches for a world. The same seed makes the same batches, as long as the broker behaves the same."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.frames = 0
        self.serial = 0
        self.dialects: dict[int, str] = {}
        #: Connections whose stream was broken on purpose.
        self.spoilt: set[int] = set()
        self.pending_ids: list[tuple[int, str]] = []
        self.last: dict[int, bytes] = {}

    def batch(self) -> Batch:
        """Some peers do something, at the same time."""
        rng = self.rng
        steps: Batch = []
        alive = [conn for conn in self.world.broker.peers if conn in self.dialects]
        while len(alive) < 4 or (len(alive) < 7 and rng.random() < 0.05):
            conn = len(self.world.wires) + sum(step[0] == "open" for step in steps) + 1
            steps.append(("open",))
            steps += [("data", conn, piece) for piece in self._pieces(self._hello(conn))]
            alive.append(conn)
        streams: list[list[Step]] = []
        for conn in rng.sample(alive, rng.randrange(1, 4)):
            if (conn in self.spoilt and rng.random() < 0.3) or rng.random() < 0.004:
                streams.append([("close", conn)])
                continue
            data = b"".join(self._action(conn) for _ in range(rng.choice((1, 1, 2, 4, 8))))
            streams.append([("data", conn, piece) for piece in self._pieces(data)])
        if rng.random() < 0.03:
            streams.append([("wait", rng.choice((0.0013, 0.0107, 0.0503)))])
        while streams:
            stream = rng.choice(streams)
            steps.append(stream.pop(0))
            streams = [stream for stream in streams if stream]
        return steps

    def _pieces(self, data: bytes) -> list[bytes]:
        """The bytes of one connection as they arrive: whole, or cut somewhere."""
        how = self.rng.random()
        if how < 0.6 or len(data) < 2:
            return [data] if data else []
        if how < 0.61 and len(data) < 300:
            return [data[at : at + 1] for at in range(len(data))]
        cuts = sorted(self.rng.randrange(len(data) + 1) for _ in range(1 if how < 0.9 else 3))
        ends = [*cuts, len(data)]
        return [data[start:end] for start, end in zip([0, *cuts], ends, strict=True) if end > start]

    def _encode(self, conn: int, object_id: int, version: int = 1, **fields: Any) -> bytes:
        self.frames += 1
        self.serial += 1
        dialect = self.dialects[conn]
        if (version == 1 and object_id < 1000) or dialect == ref.EVBUS_2:
            body = ref.encode_body(dialect, object_id, version, fields)
        else:
            body = ref.encode_body(ref.EVBUS_2, object_id, version, fields)
            if dialect == ref.H22:
                object_id &= 0xFF
        return ref.encode_frame(ref.layout_of(dialect), object_id, version, body, 0, START_MS + self.serial)

    def _hello(self, conn: int) -> bytes:
        """The first bytes of a connection; a few of them never get anywhere."""
        rng = self.rng
        self.frames += 1
        dialect = rng.choice((ref.EVBUS_2,) * 5 + (ref.H23_199,) * 2 + (ref.H23_255,) * 2 + (ref.H22,))
        self.dialects[conn] = dialect
        fields: dict[str, Any] = {"TaskId": rng.choice(("", "h", "3f2504e0-4f89-41d3-9a0c-0305e82c3301"))}
        system_id = rng.choice((1, 134_044_736_000_000_000, -1)) if dialect in ref.OLD else 0
        if dialect == ref.EVBUS_2:
            fields["Announcement"] = GOOD_FACTS
        elif dialect == ref.H23_199 and rng.random() < 0.5:
            fields |= {"AuthenticationToken": "t"} if rng.random() < 0.5 else {"ClientId": "c"}
        odd = rng.random()
        if odd < 0.06:
            fields |= {"Announcement": rng.choice(FACTS)} if dialect != ref.H22 else {}
        data = ref.encode(dialect, ref.HANDSHAKE, fields, system_id=system_id, time=START_MS)
        if 0.06 < odd < 0.09:
            field = rng.choice(("TaskId", "AuthenticationToken", "ClientId"))
            long = fields | {field: "x" * rng.choice((128, 129, 1024, 1025))}
            data = ref.encode(ref.H23_199, ref.HANDSHAKE, long) + ref.encode(ref.H23_199, ref.HANDSHAKE, fields)
            self.dialects[conn] = ref.H23_199
        elif odd < 0.11:
            early = self._encode(conn, ref.PUBLISH, Subject="a", TaskId="early")
            bad = ref.encode_frame(ref.layout_of(dialect), ref.HANDSHAKE, 1, rng.choice((b"", b"\x05ab", b"\xff" * 6)))
            data = bad + early + data
        elif odd < 0.125:
            data = ref.encode_frame(22, ref.HANDSHAKE, 1, rng.randbytes(rng.choice((3, 4, 5))))
        elif odd < 0.14:
            sizes = (0, 21, 22, 23, 4096, 4097, 1 << 26, (1 << 26) + 1, 1 << 31, (1 << 32) - 1)
            data = rng.choice(sizes).to_bytes(4, "little") + data[4:]
        elif odd < 0.155:
            data = data[:12] + rng.randbytes(2) + data[14:]
        return data

    def _task_id(self) -> str:
        rng = self.rng
        how = rng.random()
        if how < 0.4:
            return ""
        if how < 0.97:
            return f"t{self.serial}"
        return rng.choice((" ", "\t\r\n", "x" * 128, "x" * 129, "\udcff\udc80", "\x00"))

    def _payload(self) -> bytes:
        self.serial += 1
        head = b"%d;" % self.serial
        how = self.rng.random()
        if how < 0.9:
            return head
        size = self.rng.choice((100, 127, 128, 1000, 3000, 9000) if how < 0.995 else (PAYLOAD, PAYLOAD + 1))
        return head + bytes(size - len(head))

    def _subject(self) -> str:
        rng = self.rng
        how = rng.random()
        return rng.choice(SUBJECTS if how < 0.96 else INVALID if how < 0.98 else PATTERNS)

    def _headers(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.7:
            return b""
        if rng.random() < 0.1:
            return bytes.fromhex(
                rng.choice(("01", "0161", "0000", "0161e4b801", "016101c3", "01610161016200", "0161016202"))
            )
        return ref.encode_headers([("k", "v" * rng.randrange(5))] * rng.randrange(1, 4))

    def _action(self, conn: int) -> bytes:
        rng = self.rng
        new = self.dialects[conn] == ref.EVBUS_2
        v2 = (new and rng.random() < 0.75) or rng.random() < 0.01
        how = rng.random()
        if how < 0.10:
            data = self._subscribe(conn, v2)
        elif how < 0.15:
            number = rng.randrange(8)
            more = {"SubscriptionId": number} if v2 else {"Subject": rng.choice(PATTERNS + INVALID[:3])}
            data = self._encode(conn, ref.UNSUBSCRIBE, 2 if v2 else 1, TaskId=self._task_id(), **more)
        elif how < 0.45:
            data = self._publish(conn, v2)
        elif how < 0.52:
            data = self._burst(conn, v2)
        elif how < 0.68:
            data = self._query(conn, v2)
        elif how < 0.88:
            data = self._answer(conn, v2)
        elif how < 0.90 and self.pending_ids:
            owner, number = rng.choice(self.pending_ids)
            data = self._encode(
                conn, ref.CANCEL_QUERY, TaskId=number if owner == conn or rng.random() < 0.2 else "none"
            )
        elif how < 0.95:
            heartbeat = (ref.HEARTBEAT_OLD, {}) if rng.random() < 0.3 else (ref.HEARTBEAT, {"TaskId": self.serial})
            data = self._encode(conn, heartbeat[0], **heartbeat[1])
            if v2:
                msgs = rng.choice((1, 2, 3, 50, 0, -1, 2**31 - 1))
                data += self._encode(conn, ref.CREDIT, SubscriptionId=rng.randrange(0, 8), Msgs=msgs)
        elif how < 0.96:
            more = {"Announcement": rng.choice(FACTS)} if rng.random() < 0.5 and new else {}
            data = self._encode(conn, ref.HANDSHAKE, TaskId=rng.choice(("again", "abc")), **more)
        else:
            data = self._stranger(conn)
        return self._mutate(conn, data) if rng.random() < 0.15 else data

    def _subscribe(self, conn: int, v2: bool) -> bytes:
        rng = self.rng
        subject = rng.choice(PATTERNS if rng.random() < 0.95 else INVALID)
        if not v2:
            return self._encode(conn, ref.SUBSCRIBE, TaskId=self._task_id(), Subject=subject)
        return self._encode(
            conn,
            ref.SUBSCRIBE,
            2,
            TaskId=self._task_id(),
            Subject=subject,
            SubscriptionId=rng.randrange(-1, 8) if rng.random() < 0.9 else rng.getrandbits(31),
            Role=rng.choice((0, 0, 0, 1, 1, 1, 2)) if rng.random() < 0.95 else rng.randrange(256),
            Overflow=rng.choice((0, 0, 0, 1, 2, 2)) if rng.random() < 0.97 else rng.randrange(3, 256),
            Group=rng.choice(("", "", "g", "h", "\udcff")) if rng.random() < 0.98 else "g" * rng.choice((128, 129)),
        )

    def _publish(self, conn: int, v2: bool, subject: str | None = None, **more: Any) -> bytes:
        rng = self.rng
        fields = {"TaskId": self._task_id(), "Subject": subject or self._subject(), "Buffer": self._payload()} | more
        if v2:
            # The bits that mean nothing in a publish, and the fields that are not looked at, take any value.
            fields["Flags"] = rng.choice((0, 0, 1, 2, 3)) | (rng.getrandbits(8) & 0xFC if rng.random() < 0.1 else 0)
            fields |= {"Codec": rng.randrange(6), "Headers": self._headers()}
            if rng.random() < 0.1:
                fields |= {"SubscriptionId": rng.getrandbits(31), "DeadlineMs": rng.getrandbits(31)}
        elif self.dialects[conn] in ref.OLD:
            fields.pop("QueryTaskId", None)
        elif rng.random() < 0.01:
            fields.setdefault("QueryTaskId", rng.choice((" ", " " * 129, "x" * 129)))
        return self._encode(conn, ref.PUBLISH, 2 if v2 else 1, **fields)

    def _burst(self, conn: int, v2: bool) -> bytes:
        """Several on one subject, as the data plane likes them."""
        subject = self._subject()
        return b"".join(self._publish(conn, v2, subject) for _ in range(self.rng.randrange(2, 8)))

    def _query(self, conn: int, v2: bool) -> bytes:
        rng = self.rng
        number = rng.choice(("q1", "q2", "q3")) if rng.random() < 0.3 else f"q{self.serial}"
        if rng.random() < 0.03:
            number = rng.choice(("", " ", "\t ", "x" * 128, "x" * 129, "evbus-1", "evbus-2"))
        self.pending_ids = [*self.pending_ids[-20:], (conn, number)]
        fields: dict[str, Any] = {"TaskId": number, "Subject": self._subject(), "Buffer": self._payload()}
        if v2:
            fields["Flags"] = rng.choice((0, ref.ALL, ref.NO_ECHO, rng.getrandbits(8)))
            fields["DeadlineMs"] = rng.choice((0, 5, 50, 4007, 60_000, 60_001, -1, rng.getrandbits(16)))
            fields |= {"Codec": rng.randrange(6), "Headers": self._headers()}
        return self._encode(conn, ref.QUERY, 2 if v2 else 1, **fields)

    def _answer(self, conn: int, v2: bool) -> bytes:
        """An answer or a failure, mostly to something that this connection was asked."""
        rng = self.rng
        mine = [asked for asked in self.world.asked[-40:] if asked[0] == conn]
        if not mine or rng.random() < 0.05:
            mine = self.world.asked[-10:] or [(conn, "none", "a")]
        _, number, subject = rng.choice(mine[-3:])
        if rng.random() < 0.04:
            subject = self._subject()
        if rng.random() < 0.2 and (self.dialects[conn] == ref.EVBUS_2 or rng.random() < 0.05):
            text = rng.choice(("", "no", "x" * 1025, "a\udcffb"))
            code = rng.choice((500, -1, 7))
            return self._encode(conn, ref.ERROR, TaskId=number, Code=code, Subject=subject, Text=text)
        return self._publish(conn, v2, subject, QueryTaskId=number)

    def _stranger(self, conn: int) -> bytes:
        """An object that has no business here."""
        self.frames += 1
        layout = ref.layout_of(self.dialects[conn])
        ids = (0, 5, 7, 77, 198, 254, 257, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 65535)
        object_id = self.rng.choice(ids) & (0xFF if layout == 22 else 0xFFFF)
        body = self.rng.randbytes(self.rng.choice((0, 1, 4, 30)))
        return ref.encode_frame(layout, object_id, self.rng.choice((0, 1, 1, 2, 3, 255)), body)

    def _mutate(self, conn: int, data: bytes) -> bytes:
        """The packet with something wrong. Mostly its framing stays good, so that what follows can be read."""
        rng = self.rng
        layout = ref.layout_of(self.dialects[conn])
        size = int.from_bytes(data[:4], "little")
        first, rest = data[:size], data[size:]
        head, body = first[:layout], bytearray(first[layout:])
        how = rng.random()
        if how < 0.3 and body:
            for _ in range(rng.choice((1, 1, 2, 5))):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif how < 0.5:
            del body[rng.randrange(len(body) + 1) :]
        elif how < 0.6:
            body += rng.randbytes(rng.choice((1, 1, 4, 20)))
        elif how < 0.7:
            other = self.last.get(conn, b"")[layout:]
            body = body[: rng.randrange(len(body) + 1)] + other[rng.randrange(len(other) + 1) :]
        elif how < 0.88:
            at = rng.randrange(len(body) + 1)
            hostile = bytes.fromhex(rng.choice(HOSTILE))
            body[at : at + rng.choice((0, 1, len(hostile)))] = hostile
        elif how < 0.96:
            at = rng.randrange(4, layout)
            head = head[:at] + bytes([head[at] ^ 1 << rng.randrange(8)]) + head[at + 1 :]
        else:
            # From here on the stream is out of step.
            self.spoilt.add(conn)
            if how < 0.98:
                sizes = (0, layout - 1, layout, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, PAYLOAD + 65536, PAYLOAD + 65537)
                return rng.choice(sizes).to_bytes(4, "little") + first[4:] + rest
            at = rng.randrange(len(first))
            return first[:at] + first[at + rng.randrange(1, 9) :] + rest
        self.last[conn] = first
        return (layout + len(body)).to_bytes(4, "little") + head[4:] + bytes(body) + rest


# --- runs ------------------------------------------------------------------------------------------------------------

#: Frames after which a conversation ends and another begins: enough for state to build up, few enough to make small.
CONVERSATION = 1500


def converse(seed: int, frames: int = CONVERSATION) -> tuple[int, list[Batch], str | None]:
    """One conversation: (frames sent, its batches, what went wrong or None)."""
    world = World(seed)
    maker = Maker(world, seed)
    batches: list[Batch] = []
    try:
        while maker.frames < frames:
            batches.append(maker.batch())
            world.run(batches[-1])
        world.end()
    except Mismatch as error:
        return maker.frames, batches, str(error)
    return maker.frames, batches, None


def play(batches: Sequence[Batch], seed: int = 0) -> str | None:
    """What goes wrong when these batches are played; None if nothing does."""
    world = World(seed)
    try:
        for batch in batches:
            world.run(batch)
        world.end()
    except Mismatch as error:
        return str(error)
    return None


def minimise(batches: list[Batch], seed: int) -> list[Batch]:
    """A smaller conversation that still goes wrong: batches, then steps, are left out while it does."""

    def fails(some: Sequence[Batch]) -> bool:
        try:
            return play([batch for batch in some if batch], seed) is not None
        except Exception:
            return False  # steps for a connection that is not there any more

    if not fails(batches):
        return batches
    current = _shrink(batches, fails)
    # One step per batch is the easiest to read, if it still goes wrong.
    single = [[step] for step in chain.from_iterable(current)]
    if fails(single):
        return _shrink(single, fails)
    for index in range(len(current)):

        def with_these(steps: Sequence[Batch], index: int = index) -> bool:
            return fails([*current[:index], list(chain.from_iterable(steps)), *current[index + 1 :]])

        current[index] = list(chain.from_iterable(_shrink([[step] for step in current[index]], with_these)))
    return [batch for batch in current if batch]


def _shrink(items: list[Batch], fails: Callable[[Sequence[Batch]], bool]) -> list[Batch]:
    """Delta debugging: leave out ever smaller parts."""
    if not fails(items):
        return items
    size = max(len(items) // 2, 1)
    while True:
        at = 0
        removed = False
        while at < len(items):
            fewer = items[:at] + items[at + size :]
            if fails(fewer):
                items, removed = fewer, True
            else:
                at += size
        if size == 1 and not removed:
            return items
        size = max(size // 2, 1)


def dump(batches: Sequence[Batch], seed: int, note: str = "") -> str:
    """A conversation as JSON."""
    plain = [[[item.hex() if isinstance(item, bytes) else item for item in step] for step in b] for b in batches]
    return json.dumps({"note": note, "seed": seed, "batches": plain}, indent=None)


def load(text: str) -> tuple[list[Batch], int]:
    """The way back from `dump`: (batches, seed)."""
    kept = json.loads(text)
    batches = [
        [tuple([*step[:2], bytes.fromhex(step[2])] if step[0] == "data" else step) for step in batch]
        for batch in kept["batches"]
    ]
    return batches, kept["seed"]


def report(seed: int, batches: list[Batch], wrong: str) -> str:
    """Make a failing conversation small, keep it in a file, and say all about it."""
    small = minimise(batches, seed)
    now = play(small, seed) or wrong
    path = Path(tempfile.gettempdir()) / f"evbus-fuzz-{seed}.json"
    path.write_text(dump(small, seed, now))
    steps = [
        f"  {step[0]} " + " ".join(s.hex() if isinstance(s, bytes) else str(s) for s in step[1:])
        for b in small
        for step in b
    ]
    shown = "\n".join(step if len(step) < 600 else step[:600] + "..." for step in steps[:40])
    return (
        f"seed {seed}: {now}\n{shown}\nkept in {path}; play it again with `python tests/fuzzing.py {path}`, "
        f"and keep it for ever in tests/corpus/"
    )


def main(arguments: list[str]) -> int:
    """The command line, see the module's docstring."""
    if len(arguments) == 2 and arguments[0].isdigit():
        seed, frames = int(arguments[0]), int(arguments[1])
        count, batches, wrong = converse(seed, frames)
        print(f"{count} frames: {'as expected' if wrong is None else report(seed, batches, wrong)}")
        return wrong is not None
    bad = 0
    for name in arguments:
        wrong = play(*load(Path(name).read_text()))
        print(f"{name}: {wrong or 'as expected'}")
        bad += wrong is not None
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
