"""What lasts longer than a connection, under the simulated network: seeds, faults, replays, and planted bugs.

`EVBUS_SEEDS` raises the number of seeds; `EVBUS_SEED` runs one of them alone, for a failure that is to be replayed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import simworld
from simnet import Faults, SimNet
from simusers import Taking, transport_of
from simworld import PATTERNS, SUBJECTS, World

from evbus.backlog import Backlog
from evbus.correlation import Correlation
from evbus.errors import EvbusError, SlowConsumerError
from evbus.limits import Limits
from evbus.message import Gap, Message
from evbus.options import ClientLimits
from evbus.registrar import Registrar

SEEDS = int(os.environ.get("EVBUS_SEEDS", "500"))
ONLY = os.environ.get("EVBUS_SEED")
STEPS = 400

KINDS = {
    "default": Faults(reset=0.004),
    "rough": Faults(partial_read=0.4, partial_write=0.4, partial_arrival=0.4, delay=0.3, max_delay_s=0.1, reset=0.006),
    "wild": Faults(partial_read=0.6, partial_write=0.6, partial_arrival=0.6, delay=0.5, reset=0.02, spurious=0.1),
}


def kind_of(seed: int) -> Faults:
    return list(KINDS.values())[seed % len(KINDS)]


def seeds_of(part: int, parts: int, share: int) -> list[int]:
    """This test's part of the seeds; `share` of all."""
    return [int(ONLY)] if ONLY else list(range(part, SEEDS * share // 100, parts))


# --- reconnects, restarts, kept publishes, groups, queries ------------------------------------------------------------


def live(seed: int) -> tuple[World, list[str]]:
    """Users come and go with their connections; the server is restarted now and then."""
    world = World(SimNet(seed, kind_of(seed), capacity=(700, 4000, 16384)[seed % 3]))
    rng = world.rng
    for number in range(3 + seed % 2):
        user = world.user(keeps=bool((seed >> 2) + number & 1))
        for pattern in rng.sample(PATTERNS, rng.randint(1, 3)):
            user.subscribe(pattern, rng.choice((Taking.PROMPT, Taking.LAZY)))
        user.subscribe("shared.>", group="g")
    for user in world.users[:2]:
        answer = world.answerer(user)
        user.subscribe("ask.one", Taking.PROMPT, answer, responder=True)
    world.start()
    for _ in range(STEPS):
        world.net.step()
        roll = rng.random()
        user = world.users[int(rng.random() * len(world.users))]
        if roll < 0.20:
            user.publish(rng.choice(SUBJECTS), rng.choice((0, 10, 300)), confirm=roll < 0.03)
        elif roll < 0.26:
            user.publish("shared.work", 5)
        elif roll < 0.30:
            user.query("ask.one", many=roll > 0.28)
        elif roll < 0.32:
            user.work()
        elif roll < 0.325:
            world.restart_server()
        elif roll < 0.333:
            user.subscribe(rng.choice(PATTERNS))
        elif roll < 0.340 and user.subs:
            sub = rng.choice(user.subs)
            if sub.left is None and not sub.wishes.group and not sub.wishes.responder:
                user.unsubscribe(sub)
    wrong = world.rest()
    for user in world.users:
        wrong += simworld.outcomes(user, world)
        for sub in user.subs:
            if sub.wishes.responder:
                continue
            wrong += simworld.out_of_order(world, sub) + simworld.gaps_untold(sub) + simworld.more_after_the_end(sub)
            if not sub.wishes.group:
                wrong += simworld.lost(world, sub)
    wrong += shared_wrongly(world) + answered_wrongly(world)
    there = world.server.broker.router.table.subscriptions
    due = sum(sub.left is None for user in world.users for sub in user.subs)
    if there != due:
        wrong.append(f"the server knows {there} subscriptions; there are {due}")
    return world, wrong + world.end()


def shared_wrongly(world: World) -> list[str]:
    """Each message of a group goes to one member; to none only if a connection was lost since."""
    got: dict[bytes, int] = {}
    for user in world.users:
        for sub in user.subs:
            if sub.wishes.group:
                for payload in sub.messages:
                    got[payload] = got.get(payload, 0) + 1
    wrong = [f"{payload[:12]!r} went to {count} members of a group" for payload, count in got.items() if count > 1]
    # All members have been there without a break since `calm`.
    calm = max([world.lost_at] + [user.lives[-1].ready or 0 for user in world.users])
    wrong += [
        f"{payload[:12]!r} went to no member of a group"
        for payload, message in world.published.items()
        if message.subject.startswith("shared.") and simworld.sent_at(world, message) > calm and payload not in got
    ]
    return wrong


def answered_wrongly(world: World) -> list[str]:
    wrong = []
    # Both responders have been there without a break since `calm`.
    calm = max([world.lost_at] + [user.lives[-1].ready or 0 for user in world.users])
    for user in world.users:
        for asked in user.asked:
            asked_of = world.handled.get(asked.payload, [])
            if len(asked_of) != len(set(asked_of)) or (not asked.many and len(asked_of) > 1):
                wrong.append(f"query {asked.payload!r} was put to {asked_of}")
            replies = asked.waiter.take_replies() if asked.many else []
            good = [reply for reply in replies if isinstance(reply, Message)]
            if any(reply.data != b"re:" + asked.payload for reply in good):
                wrong.append(f"query {asked.payload!r}: a reply of another one")
            senders = [reply.sender for reply in good]
            if len(senders) != len(set(senders)):
                wrong.append(f"query {asked.payload!r}: two replies of one responder")
            try:
                answer = asked.waiter.result()
            except EvbusError:
                continue
            if not asked.many and answer.data != b"re:" + asked.payload:
                wrong.append(f"query {asked.payload!r}: answered by {answer.data!r}")
            if asked.many and asked.when > calm and len(replies) != 2:
                wrong.append(f"query {asked.payload!r} to both: {len(replies)} replies")
    return wrong


@pytest.mark.timeout(170)
@pytest.mark.parametrize("part", range(4))
def test_the_promises_hold_over_reconnects(part: int) -> None:
    seeds = seeds_of(part, 4, 60)
    reconnects = delivered = kept = gaps = asked = 0
    for seed in seeds:
        world, wrong = live(seed)
        assert not wrong, f"EVBUS_SEED={seed} replays it: {wrong[:5]}"
        reconnects += sum(len(user.lives) - 1 for user in world.users)
        delivered += sum(len(sub.messages) for user in world.users for sub in user.subs)
        gaps += sum(len(sub.gaps) for user in world.users for sub in user.subs)
        kept += sum(message.kept for message in world.published.values())
        asked += sum(len(user.asked) for user in world.users)
    if not ONLY:
        # The run must have been about something.
        assert reconnects > 3 * len(seeds)
        assert delivered > 30 * len(seeds)
        assert gaps > 3 * len(seeds)
        assert kept > len(seeds)
        assert asked > 3 * len(seeds)


@pytest.mark.parametrize("seed", [4711, 4712, 4713])
def test_a_seed_replays_bit_for_bit(seed: int) -> None:
    runs = []
    for _ in range(2):
        world, wrong = live(seed)
        assert not wrong
        runs.append((world.net.trace_hash(), [sub.log for user in world.users for sub in user.subs]))
    assert runs[0] == runs[1]


# --- overflow ---------------------------------------------------------------------------------------------------------

SMALL = Limits(
    handshake_s=30.0, payload_bytes=1000, pending_soft_bytes=20_000, pending_soft_s=600.0, write_timeout_s=600.0
)


def flood(seed: int, policy: str) -> tuple[World, list[str]]:
    """One publisher, subscribers that take their time, and too little room for all."""
    world = World(SimNet(seed, Faults(delay=0.3, max_delay_s=0.05, partial_write=0.3), capacity=4000), SMALL)
    rng = world.rng
    publisher, quick = world.user(), world.user()
    quick.subscribe("flood")
    room = ClientLimits(pending_msgs=rng.choice((5, 40, 1000)), pending_bytes=rng.choice((3_000, 1 << 20)))
    slow = world.user(limits=room)
    taking = rng.choice((Taking.LAZY, Taking.ITERATED))
    sub = slow.subscribe("flood", taking, overflow=policy)
    world.start()
    for step in range(700):
        world.net.step()
        roll = rng.random()
        if roll < 0.4 and not publisher.stuck:
            publisher.publish("flood", rng.choice((20, 200, 900)), confirm=policy == "block" or roll < 0.02)
        elif roll < 0.44:
            slow.work()
            if taking is Taking.ITERATED and sub.ended is None:
                sub.take(rng.randint(1, 10))
        if step % 100 == 50 and rng.random() < 0.7:
            server_side = transport_of(slow)
            assert server_side is not None
            world.net.stall(server_side.inp.source, 0.3)
    wrong = world.rest()
    for user in world.users:
        wrong += simworld.outcomes(user, world)
        wrong += [f"user {user.number} lost its connection"] if len(user.lives) != 1 else []
    total = [message.payload for message in world.published.values()]
    (other,) = quick.subs
    if other.messages != total:
        wrong.append(f"the quick subscriber got {len(other.messages)} of {len(total)}")
    missed = sum(gap.count or 0 for gap in sub.gaps)
    if policy == "close":
        error = sub.ended or next((one for one in slow.errors if isinstance(one, SlowConsumerError)), None)
        if sub.messages != total and not isinstance(error, SlowConsumerError):
            wrong.append(f"the slow subscriber missed something and was told {error!r}")
    else:
        wrong += misplaced(sub.log, total)
        if len(sub.messages) + missed != len(total):
            wrong.append(f"{policy}: {len(sub.messages)} came and {missed} were missed of {len(total)}")
        if sub.subscription.missed != missed or slow.session.stats().missed != missed:
            wrong.append(
                f"{policy}: counted {sub.subscription.missed} and {slow.session.stats().missed}, told {missed}"
            )
        if policy == "block" and missed:
            wrong.append(f"block: {missed} missed")
    return world, wrong + world.end()


def misplaced(log: list[bytes | Gap], total: list[bytes]) -> list[str]:
    """Whether what came and what gaps tell of is the whole, in its order."""
    at = 0
    for entry in log:
        if isinstance(entry, Gap):
            at += entry.count or 0
        elif at >= len(total) or total[at] != entry:
            return [f"{entry[:12]!r} stands at {at}, where {total[at][:12] if at < len(total) else None!r} should"]
        else:
            at += 1
    return []


@pytest.mark.timeout(170)
@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest", "block", "close"])
def test_overflow_is_told_exactly(policy: str) -> None:
    seeds = seeds_of(0, 4, 40)
    missed = fewer = 0
    for seed in seeds:
        world, wrong = flood(seed, policy)
        assert not wrong, f"EVBUS_SEED={seed} replays it: {wrong[:5]}"
        (sub,) = world.users[2].subs
        missed += sum(gap.count or 0 for gap in sub.gaps)
        fewer += len(sub.messages) < len(world.published)
    if not ONLY:
        assert (missed > len(seeds)) == (policy in ("drop_newest", "drop_oldest"))
        assert (fewer > len(seeds) // 4) == (policy != "block")


# --- planted bugs: a test that cannot fail shows nothing --------------------------------------------------------------


def found(run: Callable[[int], tuple[World, list[str]]], seeds: int = 12) -> str:
    """What the checks say of some seeds with a bug in them. A bus that cannot even connect any more counts too."""
    words: list[str] = []
    for seed in range(seeds):
        try:
            words += run(seed)[1]
        except AssertionError as exc:
            words.append(str(exc))
    return "; ".join(words)


def test_a_forgotten_subscription_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subscribe = Registrar._subscribe
    calls = 0

    def forgetful(self: Registrar, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return None if calls % 7 == 0 else subscribe(self, *args)

    monkeypatch.setattr(Registrar, "_subscribe", forgetful)
    assert "lost" in found(live)


def test_an_untold_reconnect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registrar, "tell_gap", lambda self, count, reason: None)
    assert "reconnects told after" in found(live)


def test_a_subscription_that_comes_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registrar, "remove", lambda self, interest, notify: None)
    assert "the server knows" in found(live)


def test_kept_publishes_in_the_wrong_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Backlog.take
    monkeypatch.setattr(Backlog, "take", lambda self: take(self)[::-1])
    assert " after " in found(live, 30)


def test_kept_publishes_that_get_lost_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Backlog.take
    monkeypatch.setattr(Backlog, "take", lambda self: take(self)[1:])
    assert "lost" in found(live, 30)


def test_an_outcome_that_never_comes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Correlation, "fail_all", lambda self, error: self.inbox.take_waiters())
    assert "0 outcomes" in found(live)


def test_a_wrong_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evbus.gaps.Gap", lambda subject, count, reason: Gap(subject, (count or 0) + 1, reason))
    assert "were missed of" in found(lambda seed: flood(seed, "drop_oldest"))


def test_credit_that_is_not_renewed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    grant = Registrar._grant
    calls = 0

    def forgetful(self: Registrar, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return grant(self, *args) if calls % 5 else None

    monkeypatch.setattr(Registrar, "_grant", forgetful)
    assert "outcomes" in found(lambda seed: flood(seed, "block"))
