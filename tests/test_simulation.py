"""The bus under the simulated network: seeds, faults, replays, and planted bugs that must be found.

`EVBUS_SEEDS` raises the number of seeds; `EVBUS_SEED` runs one of them alone, for a failure that is to be replayed.
"""

from __future__ import annotations

import os

import pytest
from simbus import World
from simnet import Faults, SimNet, SimTransport

from evbus._frame import Ring, next_packet

SEEDS = int(os.environ.get("EVBUS_SEEDS", "500"))
STEPS = 300
ONLY = os.environ.get("EVBUS_SEED")

ROUGH = Faults(partial_read=0.4, partial_write=0.4, partial_arrival=0.4, delay=0.3, max_delay_s=0.1, stall=0.01)
KINDS = {
    "default": Faults(),
    "rough": ROUGH,
    "resets": Faults(reset=0.01, stall=0.005),
    "wild": Faults(partial_read=0.6, partial_write=0.6, partial_arrival=0.6, delay=0.5, reset=0.02, spurious=0.1),
}


def run(seed: int, faults: Faults, wrap=None, steps: int = STEPS) -> tuple[World, list[str]]:
    world = World(SimNet(seed, faults, capacity=(700, 4000, 16384)[seed % 3]), users=2 + seed % 3, wrap=wrap)
    world.start()
    world.run(steps)
    return world, world.verdict()


def kind_of(seed: int) -> Faults:
    return list(KINDS.values())[seed % len(KINDS)]


@pytest.mark.timeout(170)
@pytest.mark.parametrize("part", range(5))
def test_the_promises_hold(part: int) -> None:
    seeds = [int(ONLY)] if ONLY else range(part, SEEDS, 5)
    published = delivered = asked = 0
    for seed in seeds:
        world, wrong = run(seed, kind_of(seed))
        assert not wrong, f"EVBUS_SEED={seed} replays it: {wrong[:5]}"
        published += len(world.published)
        delivered += sum(len(got) for user in world.users for life in user.lives for got in life.got.values())
        asked += sum(len(user.asked) for user in world.users)
    if not ONLY:
        # The run must have been about something.
        assert published > 50 * len(seeds)
        assert delivered > 20 * len(seeds)
        assert asked > 5 * len(seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_replays_bit_for_bit(kind: str) -> None:
    runs = []
    for _ in range(2):
        world, wrong = run(4711, KINDS[kind])
        assert not wrong
        runs.append((world.net.trace_hash(), [life.got for user in world.users for life in user.lives]))
    assert runs[0] == runs[1]
    assert run(4712, KINDS[kind])[0].net.trace_hash() != runs[0][0]


# --- planted bugs: a test that cannot fail shows nothing --------------------------------------------------------------


def found(faults: Faults, wrap=None, seeds: int = 20) -> list[str]:
    """What the checks say of some seeds with a bug in them. A bus that cannot even connect any more counts too."""
    words: list[str] = []
    for seed in range(seeds):
        try:
            words += run(seed, faults, wrap)[1]
        except AssertionError as exc:
            words.append(str(exc))
    return words


@pytest.mark.parametrize("planted", ["swap_chunks", "lose_rest", "duplicate_chunk"])
def test_a_broken_stream_is_found(planted: str) -> None:
    faults = Faults(partial_write=0.5, delay=0.3, **{planted: 0.02})
    assert found(faults), planted


class ServerFault:
    """A server-side transport that does something wrong with whole packets on their way out."""

    def __init__(self, transport: SimTransport) -> None:
        self._transport = transport
        self._unread = Ring()
        self._ready = Ring()

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def flush(self, ring: Ring) -> int:
        self._unread.write(ring.take())
        while (packet := next_packet(self._unread, 23, 1 << 26)) is not None:
            self.take(packet)
        self.done()
        return self._transport.flush(self._ready)

    def put(self, packet: tuple[int, int, int, int, bytes]) -> None:
        object_id, version, system_id, unix_ms, body = packet
        size = (23 + len(body)).to_bytes(4, "little")
        head = system_id.to_bytes(8, "little", signed=True) + object_id.to_bytes(2, "little") + bytes([version])
        self._ready.write(size + head + unix_ms.to_bytes(8, "little", signed=True) + body)

    def take(self, packet: tuple[int, int, int, int, bytes]) -> None:
        self.put(packet)

    def done(self) -> None:
        pass


class AnswersTwice(ServerFault):
    def take(self, packet: tuple[int, int, int, int, bytes]) -> None:
        self.put(packet)
        if packet[0] == 5 and packet[4][0] & 16:
            self.put(packet)


class SwapsDeliveries(ServerFault):
    def __init__(self, transport: SimTransport) -> None:
        super().__init__(transport)
        self._held: list[tuple[int, int, int, int, bytes]] = []

    def take(self, packet: tuple[int, int, int, int, bytes]) -> None:
        if packet[0] == 5 and not packet[4][0]:
            self._held.append(packet)
        else:
            self.done()
            self.put(packet)

    def done(self) -> None:
        for packet in reversed(self._held):
            self.put(packet)
        self._held.clear()


class SwallowsOne(ServerFault):
    def __init__(self, transport: SimTransport) -> None:
        super().__init__(transport)
        self._deliveries = 0

    def take(self, packet: tuple[int, int, int, int, bytes]) -> None:
        self._deliveries += packet[0] == 5
        if packet[0] != 5 or self._deliveries != 3:
            self.put(packet)


# Nothing partial: what a faulty transport keeps back for itself, the server would not know to flush again.
WHOLE = Faults(partial_write=0.0)


def test_a_faultless_wrapper_is_not_blamed() -> None:
    assert not found_in_roomy_net(ServerFault)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(AnswersTwice, "nobody waited for"), (SwapsDeliveries, "out of order"), (SwallowsOne, "lost")],
)
def test_a_server_that_breaks_a_promise_is_found(fault: type[ServerFault], words: str) -> None:
    assert any(words in line for line in found_in_roomy_net(fault))


def found_in_roomy_net(fault: type[ServerFault]) -> list[str]:
    out: list[str] = []
    for seed in range(10):
        world = World(SimNet(seed, WHOLE, capacity=1 << 22), users=3, wrap=fault)
        world.start()
        world.run(STEPS)
        out += world.verdict()
    return out
