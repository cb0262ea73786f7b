"""The codec's own tests: rings and their memory, packets, body fields, headers, subjects.

Against the independent reference, over routers and dialects, it is tested elsewhere.
"""

from __future__ import annotations

import array
import ctypes
import gc
import os
import random
import struct
import sys
import weakref

import frame_c
import pytest
from frame_c import CRing, Envelope, Lender, Span
from hypothesis import given, settings
from hypothesis import strategies as st

from evbus import _frame, wire
from evbus._frame import (
    READ_BYTES,
    Ring,
    RingPool,
    check_subject,
    detect_layout,
    has_wildcard,
    next_packet,
    pack,
    pack_headers,
    pack_raw,
    subject_fault,
    subject_is_valid,
    unpack,
    unpack_headers,
    unpack_strings,
)
from evbus.errors import InvalidSubjectError, ProtocolError

LIMIT = 1 << 20


def pattern(size: int, start: int = 0) -> bytes:
    """Bytes whose place can be told; the period is prime, so that no block size hides a shift."""
    return bytes((start + n) % 251 for n in range(size))


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_compilers_numbers_are_those_of_the_wire():
    numbers = _frame.constants()
    enums = {name: value for name, value in numbers.items() if isinstance(value, dict)}
    assert set(enums) >= {"ObjectId", "Dialect", "Flag", "ErrorCode"}
    for name, members in enums.items():
        assert members == {member.name: member.value for member in getattr(wire, name)}, name
    plain = {name: value for name, value in numbers.items() if isinstance(value, int)}
    assert len(plain) >= 8
    for name, value in plain.items():
        assert value == getattr(wire, name), name


# --- rings: content ---------------------------------------------------------------------------------------------------


def test_a_ring_is_a_queue_that_holds_nothing_while_it_is_empty():
    pool = RingPool()
    ring = Ring(pool)
    assert (len(ring), ring.capacity, pool.held_bytes) == (0, 0, 0)
    ring.write(b"")
    assert ring.capacity == 0
    ring.write(b"hello ")
    ring.write(b"world")
    assert (len(ring), ring.capacity, pool.held_bytes) == (11, 512, 512)
    assert ring.peek() == b"hello world"
    assert ring.peek(5) == b"hello"
    assert ring.peek(100) == b"hello world"
    assert ring.peek(0) == b""
    assert ring.take(6) == b"hello "
    assert ring.take() == b"world"
    assert (len(ring), ring.capacity, pool.held_bytes, pool.kept_bytes) == (0, 0, 0, 512)
    assert ring.take() == ring.peek() == b""


@pytest.mark.parametrize(
    "data",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(bytearray(b"xabcdx"))[1:5],
        array.array("B", b"abcd"),
    ],
    ids=lambda data: type(data).__name__,
)
def test_any_contiguous_buffer_of_bytes_can_be_written(data):
    ring = Ring()
    ring.write(data)
    ring.write(memoryview(b""))
    assert ring.take() == b"abcd"


@pytest.mark.parametrize("data", ["text", 7, memoryview(b"abcdef")[::2]])
def test_other_things_cannot_be_written(data):
    ring = Ring()
    with pytest.raises((TypeError, ValueError, BufferError)):
        ring.write(data)
    assert len(ring) == 0


def test_a_ring_wraps_around_the_end_of_its_block():
    ring = Ring()
    ring.write(pattern(500))
    assert ring.take(490) == pattern(490)
    ring.write(pattern(400, 500))
    assert ring.capacity == 512  # 410 bytes from offset 490
    assert ring.peek() == pattern(410, 490)
    assert ring.peek(15) == pattern(15, 490)
    assert ring.take(30) == pattern(30, 490)
    assert ring.take() == pattern(380, 520)


@pytest.mark.parametrize("size", [512, 4096, 256 * 1024, 512 * 1024, 1 << 21])
@pytest.mark.parametrize("head", ["start", "middle", "end"])
def test_a_full_ring_grows_and_keeps_its_bytes(size, head):
    """Small blocks are copied, large ones moved by realloc with the wrapped part put behind."""
    start = {"start": 0, "middle": size // 2 + 1, "end": size - 1}[head]
    pool = RingPool()
    ring = Ring(pool)
    ring.write(bytes(size))
    ring.take(start)
    ring.write(pattern(start))
    assert ring.capacity == size
    ring.write(b"one more")
    assert ring.capacity == 2 * size
    assert pool.held_bytes == 2 * size
    assert ring.take(size - start) == bytes(size - start)
    assert ring.take() == pattern(start) + b"one more"
    assert pool.held_bytes == 0


@pytest.mark.parametrize("keep", [0, 512, 1500, 1 << 22])
@pytest.mark.parametrize("seed", range(4))
def test_rings_against_bytearrays(seed, keep):
    """Any mix of operations on a few rings of one pool, however little the pool keeps."""
    rng = random.Random(seed)
    pool = RingPool(keep)
    rings = [Ring(pool) for _ in range(3)]
    models = [bytearray() for _ in rings]
    written = 0
    for step in range(3000):
        n = rng.randrange(3)
        ring, model = rings[n], models[n]
        what = rng.random()
        if what < 0.45:
            data = pattern(int(10 ** rng.uniform(0, 5.9 if step % 50 == 0 else 3.3)), written)
            written += len(data)
            ring.write(data)
            model += data
        elif what < 0.8:
            size = rng.choice([rng.randrange(2000), len(model) // 2, len(model), -1])
            assert ring.take(size) == (model if size < 0 else model[:size])
            del model[: len(model) if size < 0 else size]
        elif what < 0.9:
            ring.fit()
            assert ring.capacity <= max(8 * len(model), 1024) if model else ring.capacity == 0
        elif what < 0.95:
            room = ring.make_room(LIMIT)
            assert room == ring.capacity - len(model) >= READ_BYTES // 4
        elif what < 0.96:
            ring.clear()
            model.clear()
            assert ring.capacity == 0
        size = rng.randrange(300)
        assert ring.peek(size) == model[:size]
        assert [len(ring) for ring in rings] == [len(model) for model in models]
        assert pool.held_bytes == sum(ring.capacity for ring in rings)
        assert pool.kept_bytes <= keep
        assert all(ring.capacity & (ring.capacity - 1) == 0 for ring in rings)
    for ring, model in zip(rings, models, strict=True):
        assert ring.take() == model


# --- rings: memory ----------------------------------------------------------------------------------------------------


def test_the_block_given_back_last_is_used_next():
    pool = RingPool()
    ring = Ring(pool)
    for _ in range(100):
        ring.write(b"x" * 600)
        ring.take()
    assert (pool.held_bytes, pool.kept_bytes) == (0, 1024)


def test_a_pool_keeps_no_more_than_it_was_told():
    pool = RingPool(4096)
    rings = [Ring(pool) for _ in range(20)]
    for ring in rings:
        ring.write(b"x" * 1000)
    assert pool.held_bytes == 20 * 1024
    for ring in rings:
        ring.clear()
    assert (pool.held_bytes, pool.kept_bytes) == (0, 4096)


def test_blocks_above_256_kib_go_back_to_the_system():
    pool = RingPool(1 << 30)
    ring = Ring(pool)
    ring.write(bytes(256 * 1024))
    ring.take()
    assert pool.kept_bytes == 256 * 1024
    ring.write(bytes(256 * 1024 + 1))
    assert pool.held_bytes == 512 * 1024
    ring.take()
    assert pool.kept_bytes == 256 * 1024


def test_fit_gives_back_what_an_unfinished_packet_does_not_need():
    pool = RingPool()
    ring = Ring(pool)
    ring.make_room(LIMIT)
    ring.write(b"x" * 100)
    assert ring.capacity == READ_BYTES
    ring.fit()
    assert (ring.capacity, pool.held_bytes) == (512, 512)
    ring.write(b"y" * 1900)
    ring.take(1990)  # ten bytes at the end of 2 KiB
    ring.write(b"z" * 100)  # and across it
    ring.fit()
    assert ring.capacity == 512
    assert ring.take() == b"y" * 10 + b"z" * 100
    ring.write(b"x" * 700)
    ring.take(650)
    ring.write(b"x" * 80)
    ring.fit()
    assert ring.capacity == 1024  # more than an eighth is in use
    ring.fit()


def test_room_for_a_read_starts_at_the_front_and_is_one_piece():
    ring = Ring()
    assert ring.make_room(4096) == READ_BYTES
    ring.write(pattern(READ_BYTES))
    ring.take(READ_BYTES - 100)
    ring.write(pattern(50, 7))  # wraps
    assert ring.make_room(4096) == READ_BYTES - 150
    inside = frame_c.ring_inside(ring)
    assert (inside.head, inside.cap) == (0, READ_BYTES)
    assert ring.take() == pattern(100, READ_BYTES - 100) + pattern(50, 7)


def test_room_grows_only_for_bytes_that_have_arrived_and_not_beyond_the_limit():
    """A claimed length takes no memory: `limit` is the largest packet allowed; nothing is taken for it ahead."""
    ring = Ring()
    assert ring.make_room(64 << 20) == READ_BYTES
    capacities = set()
    for _ in range(64):
        room = ring.make_room(LIMIT)
        assert room >= min(READ_BYTES // 4, 2 * (LIMIT + READ_BYTES) - len(ring))
        capacities.add(ring.capacity)
        ring.write(bytes(min(room, READ_BYTES)))
        assert ring.capacity <= 4 * max(len(ring), READ_BYTES)
        if len(ring) >= LIMIT + READ_BYTES:
            break
    assert sorted(capacities) == [READ_BYTES << n for n in range(len(capacities))]
    assert ring.capacity <= 2 * (LIMIT + READ_BYTES)
    ring.write(bytes(ring.capacity - len(ring)))
    assert ring.make_room(LIMIT) == 0  # full: its owner has to take something out first
    ring.take(1000)
    assert ring.make_room(LIMIT) == 1000


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process over this")
def test_memory_that_cannot_be_had_is_an_error_and_changes_nothing():
    ring = CRing()
    ring.put(b"abc")
    assert frame_c.ring_reserve(ring.ref, 1 << 63) == -1
    assert frame_c.ring_reserve(ring.ref, 1 << 61) == -1
    assert (ring.content(), ring.ring.cap, ring.pool.held) == (b"abc", 512, 512)
    big = CRing()
    big.put(bytes(300_000))
    held = big.pool.held
    assert frame_c.ring_reserve(big.ref, 1 << 61) == -1  # by way of realloc
    assert (big.content(), big.pool.held) == (bytes(300_000), held)


def test_a_ring_keeps_its_pool_alive():
    ring = Ring(RingPool())
    ring.write(b"x" * 5000)
    gc.collect()
    ring.write(b"y" * 5000)
    assert ring.take() == b"x" * 5000 + b"y" * 5000


def test_a_ring_in_a_garbage_cycle_still_has_its_pool_when_it_is_freed():
    """The collector may clear a ring's fields before it frees it. Seen to fail under AddressSanitizer only."""

    class Owner:
        pass

    # The ring first, so that the collector clears it first.
    ring = Ring(RingPool())
    owner = Owner()
    owner.self, owner.ring = owner, ring
    ring.write(b"x" * 5000)
    gone = weakref.ref(owner)
    del ring, owner
    gc.collect()
    assert gone() is None


def test_reference_counts_do_not_grow():
    pool = RingPool()
    data = bytes(1000)
    view = bytearray(data)
    before = sys.getrefcount(pool), sys.getrefcount(data), sys.getrefcount(view)
    for _ in range(100):
        ring = Ring(pool)
        ring.write(data)
        ring.write(view)
        ring.take(10)
        with pytest.raises(TypeError):
            ring.write("text")
        del ring
    view += b"not exported any more"
    assert (sys.getrefcount(pool), sys.getrefcount(data), sys.getrefcount(view)) == before
    assert pool.held_bytes == 0


# --- rings: lending ---------------------------------------------------------------------------------------------------


def test_lent_bytes_follow_the_rings_own():
    ring = CRing()
    lender = Lender(b"0123456789")
    ring.put(b"own")
    ring.lend(lender, 2, 3)
    assert ring.content() == b"own234"
    assert (ring.ring.size, ring.ring.lent_size, ring.pool.held) == (3, 3, 512)


def test_an_empty_ring_lends_without_memory():
    ring = CRing()
    lender = Lender(b"0123456789")
    ring.lend(lender, 0, 10)
    assert (ring.content(), ring.ring.cap, ring.pool.held) == (b"0123456789", 0, 0)
    frame_c.ring_sent(ring.ref, 10)
    assert (ring.content(), ring.ring.lent_size, ring.ring.cap) == (b"", 0, 0)


def test_neighbours_are_lent_as_one_and_strangers_settle_the_first():
    ring = CRing()
    lender = Lender(b"0123456789")
    ring.lend(lender, 0, 2)
    ring.lend(lender, 2, 3)
    assert (ring.ring.size, ring.ring.lent_size) == (0, 5)
    ring.lend(lender, 7, 2)
    assert (ring.ring.size, ring.ring.lent_size) == (5, 2)
    assert ring.content() == b"0123478"


def test_settling_copies_and_the_owner_may_move():
    ring = CRing()
    lender = Lender(b"0123456789")
    ring.put(b"own")
    ring.lend(lender, 0, 10)
    assert frame_c.ring_settle(ring.ref) == 0
    lender.spoil()
    assert ring.content() == b"own0123456789"
    assert ring.ring.lent_size == 0
    assert frame_c.ring_settle(ring.ref) == 0  # again: nothing to do
    ring.put(b"!")
    assert ring.content() == b"own0123456789!"


@pytest.mark.parametrize("own", [0, 1, 5])
@pytest.mark.parametrize("sent", range(11))
def test_the_system_takes_any_part_of_own_and_lent_bytes(own, sent):
    ring = CRing()
    lender = Lender(b"01234")
    ring.put(b"abcde"[:own])
    ring.lend(lender, 0, 5)
    total = ring.content()
    sent = min(sent, len(total))
    frame_c.ring_sent(ring.ref, sent)
    assert ring.content() == total[sent:]
    frame_c.ring_settle(ring.ref)
    lender.spoil()
    assert ring.content() == total[sent:]
    frame_c.ring_sent(ring.ref, len(total) - sent)
    assert (ring.ring.cap, ring.pool.held) == (0, 0)  # all gone: no memory


def test_lending_against_bytes():
    """Own and lent bytes in any order, taken in any parts, settled at any time."""
    rng = random.Random(5)
    ring = CRing(keep_limit=1000)
    model = bytearray()
    lender = Lender(pattern(100_000))
    at = 0
    for _ in range(5000):
        what = rng.random()
        if what < 0.3:
            if ring.ring.lent_size:  # as all who write: what is lent comes first
                frame_c.ring_settle(ring.ref)
            ring.put(data := pattern(rng.randrange(700), rng.randrange(251)))
            model += data
        elif what < 0.6:
            if rng.random() < 0.5:
                at = rng.randrange(90_000)
            size = rng.randrange(1, 3000)
            ring.lend(lender, at, size)
            model += pattern(size, at)
            at = (at + size) % 90_000
        elif what < 0.9:
            n = rng.randrange(len(model) + 1)
            frame_c.ring_sent(ring.ref, n)
            del model[:n]
        elif what < 0.95:
            frame_c.ring_settle(ring.ref)
        else:
            frame_c.ring_fit(ring.ref)
        assert ring.ring.size + ring.ring.lent_size == len(model)
        assert ring.content() == model
        assert ring.pool.held == ring.ring.cap


def test_the_python_face_sees_lent_bytes():
    ring = Ring()
    inside = frame_c.ring_inside(ring)
    lender = Lender(b"0123456789")
    ring.write(b"own")
    assert frame_c.ring_lend(ctypes.byref(inside), lender.address, 10) == 0
    assert len(ring) == 13
    assert ring.peek() == b"own0123456789"
    assert ring.peek(5) == b"own01"
    assert ring.take(5) == b"own01"
    assert ring.take(3) == b"234"
    assert len(ring) == 5
    ring.clear()
    assert (len(ring), ring.peek()) == (0, b"")


def test_skip_and_linear():
    ring = CRing()
    ring.put(pattern(500))
    frame_c.ring_skip(ring.ref, 450)
    ring.put(pattern(300, 500))
    assert ring.ring.head + ring.ring.size > ring.ring.cap
    assert frame_c.ring_linear(ring.ref) == 0
    assert (ring.ring.head, ring.content(), ring.pool.held) == (0, pattern(350, 450), 512)
    frame_c.ring_skip(ring.ref, 350)
    assert (ring.ring.size, ring.ring.head, ring.ring.cap) == (0, 0, 512)
    frame_c.ring_fit(ring.ref)
    assert ring.pool.held == 0
    assert frame_c.ring_linear(ring.ref) == 0
    frame_c.ring_release(ring.ref)


# --- packets ----------------------------------------------------------------------------------------------------------


def header(layout: int, size: int, object_id: int, version: int = 1, system_id: int = 0, unix_ms: int = 0) -> bytes:
    if layout == 23:
        return struct.pack("<iqHBq", size, system_id, object_id, version, unix_ms)
    return struct.pack("<iqBBq", size, system_id, object_id, version, unix_ms)


@pytest.mark.parametrize("layout", [22, 23])
def test_a_packet_by_the_byte(layout):
    packet = pack(layout, 4, 2, -5, 1_700_000_000_123, "sByiq", "añ", 255, b"\x00\xff", -2, -(1 << 63))
    body = b"\x03a\xc3\xb1" + b"\xff" + b"\x02\x00\x00\x00\x00\xff" + struct.pack("<iq", -2, -(1 << 63))
    assert packet == header(layout, layout + len(body), 4, 2, -5, 1_700_000_000_123) + body
    assert pack_raw(layout, 4, 2, -5, 1_700_000_000_123, body) == packet
    ring = Ring()
    ring.write(packet)
    assert next_packet(ring, layout, LIMIT) == (4, 2, -5, 1_700_000_000_123, body)
    assert unpack(body, "sByiq") == ("añ", 255, b"\x00\xff", -2, -(1 << 63))
    assert unpack(body, "bByiq", True) == ("añ".encode(), 255, b"\x00\xff", -2, -(1 << 63))
    assert len(ring) == 0
    ring.fit()
    assert ring.capacity == 0


def test_object_ids_have_16_bits_in_one_layout_and_8_in_the_other():
    assert next_of(pack(23, 1006, 1, 0, 0, ""), 23)[0] == 1006
    assert next_of(pack(23, 65535, 255, 0, 0, ""), 23)[:2] == (65535, 255)
    assert next_of(pack(22, 255, 1, 0, 0, ""), 22)[0] == 255
    with pytest.raises(ValueError, match="255"):
        pack(22, 1000, 1, 0, 0, "")


def next_of(data: bytes, layout: int, limit: int = LIMIT) -> tuple[int, int, int, int, bytes]:
    ring = Ring()
    ring.write(data)
    found = next_packet(ring, layout, limit)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("layout", "values", "error"),
    [
        ("s", (), TypeError),
        ("s", ("a", "b"), TypeError),
        ("s", (7,), TypeError),
        ("s", (bytearray(b"x"),), TypeError),
        ("s", ("\ud800",), ValueError),
        ("y", (None,), TypeError),
        ("B", (256,), OverflowError),
        ("B", (-1,), OverflowError),
        ("i", (1 << 31,), OverflowError),
        ("q", (1 << 63,), OverflowError),
        ("i", ("1",), TypeError),
        ("x", (1,), ValueError),
    ],
)
def test_a_value_that_does_not_fit_is_refused(layout, values, error):
    with pytest.raises(error):
        pack(23, 1, 1, 0, 0, layout, *values)


@pytest.mark.parametrize("make", [lambda header: pack(header, 1, 1, 0, 0, ""), lambda h: pack_raw(h, 1, 1, 0, 0, b"")])
@pytest.mark.parametrize("header", [0, 21, 24])
def test_there_are_two_header_layouts(make, header):
    with pytest.raises(ValueError, match="22 or 23"):
        make(header)


@pytest.mark.parametrize("layout", [22, 23])
def test_a_packet_in_pieces(layout):
    """Cut anywhere, and with the ring's wrap anywhere in it: the same packet, and not a byte before the last one."""
    packet = pack(layout, 4, 1, 7, 9, "ssy", "task", "a.b", b"payload")
    for cut in range(len(packet)):
        ring = Ring()
        ring.write(bytes(512))
        ring.take(512 - cut)  # so that the block ends after `cut` bytes of the packet
        ring.write(packet[:cut])
        ring.take(cut)
        assert len(ring) == cut
        assert ring.peek() == packet[:cut]
        if cut < len(packet):
            assert next_packet(ring, layout, LIMIT) is None
            assert len(ring) == cut
        ring.write(packet[cut:])
        ring.write(b"next")
        assert next_packet(ring, layout, LIMIT) == (4, 1, 7, 9, packet[layout:])
        assert ring.peek() == b"next"


def test_packets_stream_through_a_ring_in_any_pieces():
    rng = random.Random(1)
    packets = [
        (rng.randrange(65536), rng.randrange(256), rng.randrange(1 << 60), n, rng.randbytes(rng.randrange(600)))
        for n in range(500)
    ]
    stream = b"".join(pack_raw(23, *packet[:4], packet[4]) for packet in packets)
    ring = Ring(RingPool(2000))
    found = []
    while stream:
        n = rng.randrange(1, 900)
        ring.write(stream[:n])
        stream = stream[n:]
        while (packet := next_packet(ring, 23, LIMIT)) is not None:
            found.append(packet)
        if rng.random() < 0.3:
            ring.fit()
    assert found == packets


@pytest.mark.parametrize("layout", [22, 23])
@pytest.mark.parametrize("size", [0, 1, 21, 22, LIMIT, LIMIT + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFE9, 0xFFFFFFFF])
def test_hostile_sizes_are_judged_by_their_four_bytes_and_take_no_memory(layout, size):
    pool = RingPool()
    ring = Ring(pool)
    ring.write(struct.pack("<I", size))
    if layout <= size <= LIMIT:
        assert next_packet(ring, layout, LIMIT) is None
    else:
        with pytest.raises(ProtocolError, match=f"claims {size} bytes"):
            next_packet(ring, layout, LIMIT)
        with pytest.raises(ProtocolError):  # and again: nothing was taken
            next_packet(ring, layout, LIMIT)
    assert pool.held_bytes == 512


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", 0),
        (struct.pack("<I", 26)[:3], 0),
        (struct.pack("<I", 21), -1),
        (struct.pack("<I", 0), -1),
        (struct.pack("<I", 0x80000000), -1),
        (struct.pack("<I", 0xFFFFFFFF), -1),
        (struct.pack("<I", 4097), -2),
        (struct.pack("<I", 0x7FFFFFFF), -1),
        (struct.pack("<I", wire.MAX_PACKET_CEILING_BYTES), -2),
        (struct.pack("<I", wire.MAX_PACKET_CEILING_BYTES + 1), -1),
        (b"GET ", -1),
        (struct.pack("<I", 4096), 0),
        (struct.pack("<I", 22), 0),
        (header(23, 26, 1), 23),
        (header(22, 26, 1), 22),
        (header(23, 26, 2), -1),
        (header(22, 26, 2), -1),
        (header(23, 26, 257), 22),  # bytes 12 and 13 are what an old client's id 1, version 1 are
        (header(23, 26, 513), -1),
        (header(22, 26, 1, version=2), -1),
        (header(22, 26, 1, version=0), 23),
    ],
)
def test_the_layout_is_told_by_14_bytes(data, result):
    ring = Ring()
    for n, byte in enumerate(data, 1):
        ring.write(bytes([byte]))
        found = detect_layout(ring, 4096)
        if n < 4 or (n < 14 and result >= 0):
            assert found == 0
    assert detect_layout(ring, 4096) == result
    assert ring.peek() == data


# --- body fields ------------------------------------------------------------------------------------------------------

FIELDS = {
    "s": st.text(max_size=300),
    "b": st.binary(max_size=300),
    "y": st.binary(max_size=300),
    "B": st.integers(0, 255),
    "i": st.integers(-(1 << 31), (1 << 31) - 1),
    "q": st.integers(-(1 << 63), (1 << 63) - 1),
}


@st.composite
def bodies(draw):
    layout = draw(st.text(list(FIELDS), max_size=8))
    return layout, [draw(FIELDS[kind]) for kind in layout]


@given(bodies())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_bodies_come_back(case):
    layout, values = case
    body = pack(23, 1, 1, 0, 0, layout.replace("b", "s"), *values)[23:]
    assert unpack(body, layout, True) == tuple(values)
    assert unpack(body + b"more", layout) == tuple(values)
    assert unpack(body + b"x", layout, True) is None
    for cut in range(len(body)):
        assert unpack(body[:cut], layout) is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x00", b""),
        (b"\x80\x00", b""),  # padded
        (b"\x80\x80\x80\x80\x00", b""),
        (b"\x83\x80\x00abc", b"abc"),
        (b"\x80\x01" + bytes(128), bytes(128)),
        (b"\xff\x7f" + bytes(16383), bytes(16383)),
        (b"\x80\x80\x01" + bytes(16384), bytes(16384)),
        (b"", None),
        (b"\x80", None),
        (b"\x01", None),
        (b"\x80\x80\x80\x80\x80\x00", None),  # a sixth byte
        (b"\xff\xff\xff\xff\x07" + bytes(9), None),  # 2^31 - 1, and not there
        (b"\x80\x80\x80\x80\x08", None),  # 2^31
        (b"\x80\x80\x80\x80\x10", None),  # 2^32: must not come out as 0
        (b"\x80\x80\x80\x80\x70", None),
        (b"\xff\xff\xff\xff\xff", None),
    ],
)
def test_the_length_of_a_string(data, text):
    assert unpack(data, "b") == (None if text is None else (text,))
    if text is not None:
        for cut in range(len(data)):
            assert unpack(data[:cut], "b") is None
    assert unpack_strings(data, 1) == (None if text is None else [text])


@pytest.mark.parametrize("count", [-1, -(1 << 31), 4, 5, (1 << 31) - 1])
def test_a_count_of_bytes_that_are_not_there(count):
    assert unpack(struct.pack("<i", count) + b"abc", "y") is None
    assert unpack(struct.pack("<i", 3) + b"abc", "y", True) == (b"abc",)


def test_text_that_is_no_utf8_is_repaired_as_the_csharp_readers_do():
    assert unpack(b"\x03a\xffb", "s") == ("a�b",)
    assert unpack(b"\x03a\xffb", "b") == (b"a\xffb",)


def test_an_unknown_field_type_is_a_mistake():
    with pytest.raises(ValueError, match="field type"):
        unpack(b"", "x")


def test_some_strings():
    body = pack(23, 1, 1, 0, 0, "ssss", "task", "token", "", "evbus/1 {}")[23:]
    assert unpack_strings(body, 4) == unpack_strings(body, 9) == [b"task", b"token", b"", b"evbus/1 {}"]
    assert unpack_strings(body, 2) == [b"task", b"token"]
    assert unpack_strings(body + b"\x05no", 4) == [b"task", b"token", b"", b"evbus/1 {}"]
    assert unpack_strings(body + b"\x05no", 5) is None
    assert unpack_strings(body[:-1], 4) is None
    assert unpack_strings(b"", 4) is None


# --- headers ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1, max_size=50), st.text(max_size=100), max_size=20))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_headers_come_back_in_their_order(headers):
    data = pack_headers(headers)
    assert unpack_headers(data) == headers
    assert list(unpack_headers(data)) == list(headers)


def test_headers_over_the_limit_or_of_another_kind_are_refused():
    fits = {"k": "v" * (wire.MAX_HEADERS_BYTES - 2 - 2)}
    assert len(pack_headers(fits)) == wire.MAX_HEADERS_BYTES
    with pytest.raises(ValueError, match="limit is 16384"):
        pack_headers({"k": fits["k"] + "v"})
    with pytest.raises(ValueError, match="empty"):
        pack_headers({"": "v"})
    with pytest.raises(ValueError, match="surrogates"):
        pack_headers({"k": "\udc80"})
    for wrong in ({"k": b"v"}, {1: "v"}, {"k": None}):
        with pytest.raises(TypeError):
            pack_headers(wrong)


@pytest.mark.parametrize(
    "data", [b"\x01k", b"\x01k\x01", b"\x00\x01v", b"\x01\xff\x01v", b"\x01k\x01\xff", b"\x01k\x01v\x00"]
)
def test_malformed_headers(data):
    assert unpack_headers(data) is None
    assert frame_c.headers_check(frame_c.span_of(data)) == -1


def test_no_headers_are_no_bytes():
    assert pack_headers({}) == b""
    assert unpack_headers(b"") == {}


# --- the envelope of version 2 ----------------------------------------------------------------------------------------

ENVELOPE = "BBiisssyy"


def envelope(
    task: str | bytes = "t", subject: str | bytes = "a.b", query: str = "", headers: bytes = b"", payload: bytes = b"p"
) -> bytes:
    return pack(23, 4, 2, 0, 0, ENVELOPE, 8, 3, 77, 5000, task, subject, query, headers, payload)[23:]


def read_envelope(body: bytes) -> tuple[int, Envelope]:
    """The result, and the envelope that borrows from `body`."""
    found = Envelope()
    return frame_c.envelope_read(frame_c.span_of(body).ptr, len(body), ctypes.byref(found)), found


def test_an_envelope():
    headers = pack_headers({"k": "v"})
    body = envelope("task", "a.b", "query", headers, b"payload")
    result, found = read_envelope(body)
    assert result == 0
    assert (found.flags, found.codec, found.subscription_id, found.deadline_ms) == (8, 3, 77, 5000)
    spans = (found.task_id, found.subject, found.query_task_id, found.headers, found.payload)
    assert [span.text() for span in spans] == [b"task", b"a.b", b"query", headers, b"payload"]
    longer = body + b"x"
    assert read_envelope(longer)[0] == -1  # it ends with its payload
    for cut in range(len(body)):
        part = body[:cut]
        result, found = read_envelope(part)
        assert result == -1
        # What the error names is the field or nothing, never a part of it.
        assert found.task_id.text() in (b"", b"task")
        assert found.subject.text() in (b"", b"a.b")


def test_limits_of_an_envelope():
    limit = wire.MAX_TASK_ID_BYTES
    assert read_envelope(envelope(task="t" * limit, query="q" * limit))[0] == 0
    result, found = read_envelope(envelope(task="t" * (limit + 1)))
    assert (result, found.task_id.size) == (-1, 0)
    assert read_envelope(envelope(query="q" * (limit + 1)))[0] == -1
    full = pack_headers({"k": "v" * (wire.MAX_HEADERS_BYTES - 4)})
    assert read_envelope(envelope(headers=full))[0] == 0
    assert read_envelope(envelope(headers=full + b"\x01k\x01v"))[0] == -1
    assert read_envelope(envelope(headers=b"\x01k"))[0] == -1
    assert read_envelope(envelope(payload=b""))[0] == 0


# --- text and subjects ------------------------------------------------------------------------------------------------


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_utf8_as_python_sees_it():
    edges = [
        0x00,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
        0xFF,
    ]
    for a in range(256):
        for b in edges:
            for c in (0x41, 0x7F, 0x80, 0xBF, 0xC0):
                for d in (0x41, 0x80, 0xBF, 0xC0):
                    for data in (bytes([a]), bytes([a, b]), bytes([a, b, c]), bytes([a, b, c, d])):
                        assert (frame_c.utf8_check(data, len(data)) == 0) == is_utf8(data), data


@given(st.one_of(st.binary(max_size=20), st.text(max_size=10).map(str.encode)))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_utf8_of_any_bytes(data):
    assert (frame_c.utf8_check(data, len(data)) == 0) == is_utf8(data)


@pytest.mark.parametrize("text", ["", " ", "\t\n\v\f\r ", "  "])
def test_blank(text):
    assert frame_c.span_blank(frame_c.span_of(text.encode()))


@pytest.mark.parametrize("text", ["x", " x", "\0", "\x08", "\x0e", "\x1f", "\x7f", "é"])
def test_not_blank(text):
    data = text.encode()
    assert not frame_c.span_blank(frame_c.span_of(data))
    assert frame_c.span_blank(Span(None, 0))


GOOD = [
    "a",
    "a.b",
    "a.b.c",
    "email.new-one",
    "é.ü",
    "日本",
    "a b",
    " ",
    "a" * 256,
    "é" * 128,
    ".".join("a" * 32),
    "a,b",
    "$x",
]
PATTERNS = ["*", ">", "a.*", "*.b", "a.>", "*.*", "*.>", "a.*.c", ".".join("*" * 32), "a." + "*." * 30 + ">"]
BAD = {
    "": "empty",
    "a" * 257: "longer than 256",
    "é" * 128 + "a": "longer than 256",
    ".": "empty token",
    "a.": "empty token",
    ".a": "empty token",
    "a..b": "empty token",
    ">.": "empty token",
    "a\nb": "control",
    "a\x00": "control",
    "\x1f": "control",
    "\x7f": "control",
    ".".join("a" * 33): "more than 32 tokens",
    ".".join("*" * 33): "more than 32 tokens",
    "a*": "whole tokens",
    "*a": "whole tokens",
    "a*b": "whole tokens",
    "**": "whole tokens",
    ">>": "whole tokens",
    "*>": "whole tokens",
    "a>": "whole tokens",
    ">a": "whole tokens",
    ">.a": "the last one",
    "a.>.b": "the last one",
    ">.>": "the last one",
}


@pytest.mark.parametrize("subject", GOOD, ids=repr)
def test_good_subjects(subject):
    data = subject.encode()
    assert check_subject(subject) == check_subject(data) == check_subject(subject, True) == data
    assert not has_wildcard(data)
    assert subject_is_valid(data) is subject_is_valid(data, True) is True


@pytest.mark.parametrize("subject", PATTERNS, ids=repr)
def test_patterns_are_for_subscriptions(subject):
    data = subject.encode()
    assert check_subject(subject, True) == data
    assert has_wildcard(data)
    assert subject_is_valid(data, True)
    assert not subject_is_valid(data)
    with pytest.raises(InvalidSubjectError, match="subscriptions only"):
        check_subject(subject)


@pytest.mark.parametrize("is_pattern", [False, True])
@pytest.mark.parametrize("subject", BAD, ids=repr)
def test_bad_subjects_say_why(subject, is_pattern):
    with pytest.raises(InvalidSubjectError, match=BAD[subject]):
        check_subject(subject, is_pattern)
    assert not subject_is_valid(subject.encode(), is_pattern)


def test_subjects_of_other_kinds():
    with pytest.raises(InvalidSubjectError, match="surrogate"):
        check_subject("a\ud800")
    with pytest.raises(InvalidSubjectError, match="UTF-8"):
        check_subject(b"a\xff")
    for wrong in (None, 7, bytearray(b"a")):
        with pytest.raises(TypeError, match="subject"):
            check_subject(wrong)
    assert subject_fault(frame_c.subject_check(b"", 0)) == "it is empty"


def subject_oracle(data: bytes) -> str:
    """The rules, token by token: "" if it is invalid."""
    tokens = data.split(b".")
    if not data or len(data) > 256 or len(tokens) > 32 or b"" in tokens or not is_utf8(data):
        return ""
    if any(byte < 0x20 or byte == 0x7F for byte in data) or b">" in tokens[:-1]:
        return ""
    if any(token not in (b"*", b">") and (b"*" in token or b">" in token) for token in tokens):
        return ""
    return "pattern" if b"*" in tokens or b">" in tokens else "plain"


@given(
    st.one_of(
        st.lists(st.sampled_from([b"a", b"bc", b"*", b">", b"", b" ", "é".encode(), b"\xff", b"\0"]), max_size=36).map(
            b".".join
        ),
        st.text("ab.*>é", max_size=12).map(str.encode),
        st.binary(max_size=12),
    )
)
@settings(derandomize=True, deadline=None, max_examples=1000)
def test_subjects_against_the_rules(data):
    kind = subject_oracle(data)
    assert subject_is_valid(data) == (kind == "plain")
    assert subject_is_valid(data, True) == (kind != "")
    if kind:
        assert has_wildcard(data) == (kind == "pattern")
