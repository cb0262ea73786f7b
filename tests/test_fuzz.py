"""Fuzz and property tests of codec and router against the independent reference.

EVBUS_FUZZ_FRAMES (200,000) says how many frames the conversations have, EVBUS_FUZZ_SEED (1) where they begin. A failure
prints its seed and a conversation made small, and keeps it in a file that `tests/fuzzing.py` plays again.
"""

from __future__ import annotations

import logging
import os
import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import reference as ref
import side_by_side
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from evbus import _frame
from evbus._frame import Ring, RingPool
from evbus.broker import Broker
from evbus.errors import ProtocolError

FRAMES = int(os.environ.get("EVBUS_FUZZ_FRAMES", "200000"))
SEED = int(os.environ.get("EVBUS_FUZZ_SEED", "1"))
PARTS = 8
CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The broker reports every connection that it closes, which is what a fuzz is about."""
    logger = logging.getLogger("evbus.test")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


# --- conversations


@pytest.mark.timeout(60 + FRAMES // PARTS // 400)
@pytest.mark.parametrize("part", range(PARTS))
def test_conversations(part: int) -> None:
    seed = SEED * 1_000_000 + part * 100_000
    frames = 0
    while frames < FRAMES // PARTS:
        count, batches, wrong = fuzzing.converse(seed)
        if wrong is not None:
            pytest.fail(fuzzing.report(seed, batches, wrong))
        frames += count
        seed += 1


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_kept_conversation(path: Path) -> None:
    batches, seed = fuzzing.load(path.read_text(encoding="utf-8"))
    assert fuzzing.play(batches, seed) is None


def plant(name: str, patch: pytest.MonkeyPatch) -> None:
    """Put a bug into the broker, or into the transports under it."""
    if name == "unsubscribe that only says so":
        patch.setattr(side_by_side.Broker, "_on_unsubscribe", lambda self, peer, packet: self.router.acknowledge(
            peer.link, self._readable_task_id(packet[4])
        ))  # fmt: skip
    elif name == "heartbeat that is not echoed":
        patch.setattr(Broker, "_on_heartbeat", lambda self, peer, packet: None)
    elif name == "partial write that loses a byte":
        whole = side_by_side.Wire.flush

        def flush(self: side_by_side.Wire, ring: Ring) -> int:
            left = whole(self, ring)
            return left if not left or self.eager else len(ring.take(1)) * 0 + len(ring)

        patch.setattr(side_by_side.Wire, "flush", flush)
    elif name == "error that is not told":
        patch.setattr(Broker, "_on_error", lambda self, peer, packet: None)


@pytest.mark.parametrize(
    "bug",
    [
        "unsubscribe that only says so",
        "heartbeat that is not echoed",
        "partial write that loses a byte",
        "error that is not told",
    ],
)
def test_a_planted_bug_is_found_made_small_and_played_again(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(bug, monkeypatch)
    for seed in range(20):
        _, batches, wrong = fuzzing.converse(seed)
        if wrong is not None:
            break
    else:
        pytest.fail("not found")
    small = fuzzing.minimise(batches, seed)
    assert sum(map(len, small)) <= 20
    again, same_seed = fuzzing.load(fuzzing.dump(small, seed, "note"))
    wrong = fuzzing.play(small, seed)
    assert wrong is not None
    assert fuzzing.play(again, same_seed) == wrong
    monkeypatch.undo()
    assert fuzzing.play(again, same_seed) is None


# --- rings


@settings(max_examples=60, stateful_step_count=60)
class RingMachine(RuleBasedStateMachine):
    """A ring against a bytearray. Sizes around the smallest block force growth and wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = RingPool(4096)
        self.ring = Ring(self.pool)
        self.model = bytearray()
        self.serial = 0

    @rule(size=st.integers(0, 600) | st.sampled_from([511, 512, 513, 1024]))
    def write(self, size: int) -> None:
        data = bytes((self.serial + at) & 0xFF for at in range(size))
        self.serial += size + 1
        self.ring.write(data if size % 2 else memoryview(data))
        self.model += data

    @rule(size=st.integers(0, 700))
    def take(self, size: int) -> None:
        assert self.ring.take(size) == self.model[:size]
        del self.model[:size]

    @rule()
    def fit(self) -> None:
        self.ring.fit()

    @rule()
    def make_room(self) -> None:
        assert self.ring.make_room(1 << 20) > 0

    @rule()
    def clear(self) -> None:
        self.ring.clear()
        self.model.clear()
        assert self.ring.capacity == 0

    @rule(size=st.integers(-1, 700))
    def peek(self, size: int) -> None:
        assert self.ring.peek(size) == (self.model if size < 0 else self.model[:size])

    @invariant()
    def holds_what_it_says(self) -> None:
        assert len(self.ring) == len(self.model)
        assert self.pool.held_bytes == self.ring.capacity
        assert self.pool.kept_bytes <= 4096
        capacity = self.ring.capacity
        assert capacity == 0 or (capacity >= 512 and capacity & (capacity - 1) == 0)

    def teardown(self) -> None:
        assert self.ring.take() == self.model
        self.ring.clear()
        assert self.pool.held_bytes == 0


TestRing = RingMachine.TestCase


def test_a_large_ring_grows_and_wraps() -> None:
    rng = random.Random(1)
    pool = RingPool()
    ring, model = Ring(pool), bytearray()
    for _ in range(300):
        data = rng.randbytes(rng.choice([1, 70_000, 300_000]))
        ring.write(data)
        model += data
        size = rng.choice([1, 60_000, 290_000, 310_000])
        assert ring.take(size) == model[:size]
        del model[:size]
    assert ring.take() == model
    assert pool.held_bytes == 0
    assert pool.kept_bytes <= 4 << 20


# --- streams


LIMIT = 700
HEADERS = {22: "<iqBBq", 23: "<iqHBq"}


def frames_of(ring: Ring, layout: int) -> tuple[list[Any], bool]:
    """What evbus's codec takes out of a ring: (frames, whether the stream is refused)."""
    found: list[Any] = []
    try:
        while (item := _frame.next_packet(ring, layout, LIMIT)) is not None:
            found.append(item)
    except ProtocolError:
        return found, True
    return found, False


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


STREAMS = st.lists(
    st.tuples(st.integers(0, 65535), st.integers(0, 255), st.binary(max_size=120), st.none() | st.integers(-5, 800)),
    max_size=12,
)


@given(STREAMS, st.sampled_from([22, 23]), st.lists(st.integers(0, 2000), max_size=8), st.integers(0, 511), st.binary())
def test_streams(frames: list[Any], layout: int, cuts: list[int], turn: int, rest: bytes) -> None:
    """The same frames, the same refusal and the same bytes left, in whatever pieces and wherever the ring stands."""
    data = b"".join(
        ref.encode_frame(layout, number & (0xFF if layout == 22 else 0xFFFF), version, body, 5, 6, size)
        for number, version, body, size in frames
    )
    data += rest
    ring = Ring()
    if turn:
        ring.write(bytes(turn + 1))
        ring.take(turn)  # the head stands somewhere in the block, so that what follows wraps around its end
    decoder = ref.Decoder(layout, LIMIT)
    expected: list[ref.Frame] = []
    actual: list[Any] = []
    refused = False
    for number, piece in enumerate(in_pieces(data, cuts)):
        ring.write(piece)
        if turn and number == 0:
            ring.take(1)
        decoder.feed(piece)
        if refused:
            break
        while isinstance(item := decoder.next(), ref.Frame):
            expected.append(item)
        found, refused = frames_of(ring, layout)
        actual += found
        assert refused is isinstance(item, ref.Refuse)
        assert len(ring) == len(decoder.buffer)
    assert [(item[0], item[1], item[2], item[3], item[4]) for item in actual] == [tuple(item) for item in expected]


@given(st.binary(max_size=20) | st.tuples(st.integers(18, 30) | st.integers(), st.binary(min_size=10, max_size=10)).map(
    lambda parts: struct.pack("<I", parts[0] & 0xFFFFFFFF) + parts[1][:8] + bytes(b & 3 for b in parts[1][8:])
))  # fmt: skip
def test_layout_is_told_by_the_first_bytes(data: bytes) -> None:
    for size in range(len(data) + 1):
        ring, decoder = Ring(), ref.Decoder(None, LIMIT)
        ring.write(data[:size])
        decoder.feed(data[:size])
        item = decoder.next()
        found = _frame.detect_layout(ring, LIMIT)
        if isinstance(item, ref.Refuse) and item.reason != ref.CLOSES["PROTOCOL_ERROR"]:
            assert found == (-2 if item.reason == ref.CLOSES["PACKET_TOO_LARGE"] else -1)
        else:
            assert found == (decoder.layout or 0)


# --- bodies

LETTERS = {"s": "b", "b": "y", "B": "B", "?": "B", "i": "i", "q": "q"}
SCHEMAS: list[tuple[str, int, int, Any]] = [
    (dialect, number, version, fields)
    for dialect in ref.DIALECTS
    for number in (*ref.VERSION_1, *ref.EXTENSIONS)
    for version in (1, 2)
    if (fields := ref.schema(dialect, number, version)) is not None
]


def letters(fields: Any) -> str:
    return "".join(LETTERS[kind] for _, kind in fields)


def by_reference(fields: Any, body: bytes) -> tuple[tuple[Any, ...], int] | None:
    """(values as evbus gives them, bytes used), or None for a malformed body; without limits of fields."""
    cursor = ref.Cursor(body)
    try:
        values = [cursor.value(kind if kind != "?" else "B") for _, kind in fields]
    except ref.Malformed:
        return None
    return tuple(ref.raw(value) if isinstance(value, str) else value for value in values), cursor.at


def check_body(fields: Any, body: bytes) -> None:
    expected = by_reference(fields, body)
    layout = letters(fields)
    assert _frame.unpack(body, layout) == (expected and expected[0])
    exact = expected is not None and expected[1] == len(body)
    assert (_frame.unpack(body, layout, True) is not None) is exact
    texts = _frame.unpack(body, layout.replace("b", "s"))
    if expected is not None:
        assert texts == tuple(
            value.decode("utf-8", "replace") if kind == "s" else value
            for value, (_, kind) in zip(expected[0], fields, strict=True)
        )


def test_many_bodies() -> None:
    """Bodies cut, spliced, with flipped bits and hostile lengths, in every shape that a body can have."""
    rng = random.Random(SEED)
    makers: dict[str, Any] = {
        "s": lambda: rng.choice(["", "a", "ü😀", "\udcff", "x" * rng.choice([127, 128, 300])]),
        "b": lambda: rng.randbytes(rng.choice([0, 1, 5, 200])),
        "B": lambda: rng.randrange(256),
        "?": lambda: rng.random() < 0.5,
        "i": lambda: rng.choice([0, -1, 2**31 - 1, -(2**31), rng.getrandbits(20)]),
        "q": lambda: rng.choice([0, -1, 2**63 - 1, -(2**63)]),
    }
    last = b""
    for _ in range(20_000):
        dialect, number, version, fields = rng.choice(SCHEMAS)
        good = ref.encode_body(dialect, number, version, {name: makers[kind]() for name, kind in fields})
        body = bytearray(good)
        how = rng.random()
        if how < 0.2:
            del body[rng.randrange(len(body) + 1) :]
        elif how < 0.4:
            at = rng.randrange(len(body) + 1)
            hostile = bytes.fromhex(rng.choice(fuzzing.HOSTILE))
            body[at : at + rng.choice([0, 1, len(hostile)])] = hostile
        elif how < 0.6 and body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif how < 0.7:
            body = body[: rng.randrange(len(body) + 1)] + last[rng.randrange(len(last) + 1) :]
        elif how < 0.8:
            body += rng.randbytes(3)
        check_body(fields, bytes(body))
        last = good


@given(st.binary(max_size=80), st.sampled_from(SCHEMAS))
def test_bodies(body: bytes, schema: Any) -> None:
    check_body(schema[3], body)


@given(st.binary(max_size=60), st.integers(1, 5))
def test_strings_of_a_handshake(body: bytes, at_most: int) -> None:
    cursor = ref.Cursor(body)
    expected: list[bytes] | None = []
    try:
        while cursor.at < len(body) and len(expected) < at_most:
            expected.append(ref.raw(cursor.string()))
    except ref.Malformed:
        expected = None
    assert _frame.unpack_strings(body, at_most) == (expected or None)


VALUES = {
    "s": st.text(max_size=200),
    "b": st.binary(max_size=300),
    "B": st.integers(0, 255),
    "?": st.booleans(),
    "i": st.integers(-(2**31), 2**31 - 1),
    "q": st.integers(-(2**63), 2**63 - 1),
}


@given(st.sampled_from(SCHEMAS), st.data())
def test_encoding(schema: Any, data: st.DataObject) -> None:
    dialect, number, version, fields = schema
    if dialect == ref.H22 and number > 255:
        return
    values = {name: data.draw(VALUES[kind]) for name, kind in fields}
    system_id, time = data.draw(VALUES["q"]), data.draw(VALUES["q"])
    layout = ref.layout_of(dialect)
    expected = ref.encode(dialect, number, values, version=version, system_id=system_id, time=time)
    given_ = [int(value) if isinstance(value, bool) else value for value in values.values()]
    kinds = letters(fields).replace("b", "s")
    assert _frame.pack(layout, number, version, system_id, time, kinds, *given_) == expected
    raw = [value.encode() if isinstance(value, str) else value for value in given_]
    assert _frame.pack(layout, number, version, system_id, time, kinds, *raw) == expected
    assert _frame.pack_raw(layout, number, version, system_id, time, expected[layout:]) == expected


@pytest.mark.parametrize(
    ("header", "object_id", "layout", "values"),
    [
        (21, 1, "", ()),
        (24, 1, "", ()),
        (22, 256, "", ()),
        (23, 1, "s", ()),
        (23, 1, "", ("a",)),
        (23, 1, "x", (1,)),
        (23, 1, "s", ("a\udc80",)),
        (23, 1, "s", (None,)),
        (23, 1, "y", (5,)),
        (23, 1, "i", (2**31,)),
        (23, 1, "i", (-(2**31) - 1,)),
        (23, 1, "i", ("1",)),
        (23, 1, "q", (2**63,)),
        (23, 1, "B", (256,)),
        (23, 1, "B", (-1,)),
        (23, 2**32, "", ()),
        (23, -1, "", ()),
    ],
)
def test_values_that_do_not_fit(header: int, object_id: int, layout: str, values: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        _frame.pack(header, object_id, 1, 0, 0, layout, *values)


# --- headers


@given(st.binary(max_size=60))
def test_headers_of_any_bytes(data: bytes) -> None:
    try:
        expected = dict(ref.decode_headers(data))
    except ref.Malformed:
        expected = None
    assert _frame.unpack_headers(data) == expected


@given(st.dictionaries(st.text(min_size=1, max_size=30), st.text(max_size=30), max_size=6))
def test_headers(headers: dict[str, str]) -> None:
    data = _frame.pack_headers(headers)
    assert data == ref.encode_headers(headers.items())
    assert _frame.unpack_headers(data) == headers


def test_headers_that_cannot_be_written() -> None:
    for headers in ({"": "a"}, {"a": "x" * 16_381}, {"\udc80": ""}, {"a": "\udc80"}):
        with pytest.raises(ValueError):
            _frame.pack_headers(headers)
    for wrong in ({1: "a"}, {"a": b"b"}, {"a": None}):
        with pytest.raises(TypeError):
            _frame.pack_headers(wrong)  # type: ignore[arg-type]
    assert len(_frame.pack_headers({"a": "x" * 16_380})) == 16_384
