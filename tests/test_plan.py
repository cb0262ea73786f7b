"""What a client is interested in, and which of it a subject concerns."""

from __future__ import annotations

import itertools
import random

import pytest
import reference

from evbus._mailbox import Mailbox
from evbus.errors import ConfigError, InvalidSubjectError
from evbus.plan import Interest, Plan, token_match
from evbus.wire import Role


def interest(sid: int, subject: str, **options: object) -> Interest:
    made = Interest(sid, subject, **options)  # type: ignore[arg-type]
    made.mailbox = Mailbox(made, sid)
    return made


def matched(plan: Plan, subject: str) -> list[int]:
    plain, _ = plan.match(subject.encode())
    return sorted(box.sid for box in plain)


@pytest.mark.parametrize(
    ("pattern", "covered", "others"),
    [
        ("a.*", ["a.b", "a.ü"], ["a", "a.b.c", "b.a"]),
        ("*", ["a"], ["a.b"]),
        (">", ["a", "a.b", "a.b.c"], []),
        ("a.>", ["a.b", "a.b.c"], ["a", "b.a"]),
        ("*.b.>", ["a.b.c", "x.b.c.d"], ["a.b", "b.b"]),
        ("a.b", ["a.b"], ["a", "a.b.c", "a.B"]),
    ],
)
def test_patterns(pattern: str, covered: list[str], others: list[str]) -> None:
    plan = Plan()
    plan.add(interest(1, pattern))
    for subject in covered:
        assert matched(plan, subject) == [1]
    for subject in others:
        assert matched(plan, subject) == []


def test_against_the_reference() -> None:
    tokens = ["a", "b", "*"]
    patterns = [".".join(t) for n in (1, 2, 3) for t in itertools.product(tokens, repeat=n)]
    patterns += [f"{head}.>" for head in patterns if head.count(".") < 2] + [">"]
    subjects = [".".join(t) for n in (1, 2, 3, 4) for t in itertools.product(["a", "b"], repeat=n)]
    for pattern, subject in itertools.product(patterns, subjects):
        split = tuple(token.encode() for token in pattern.split("."))
        mine = token_match(split, subject.encode().split(b"."))
        assert mine == reference.matches(pattern.split("."), subject.split(".")), (pattern, subject)


def test_changes() -> None:
    rng = random.Random(3)
    plan = Plan()
    alive: dict[int, Interest] = {}
    subjects = ["a", "b", "a.b", "a.*", "*", ">"]
    for sid in range(1, 2000):
        if alive and rng.random() < 0.5:
            gone = alive.pop(rng.choice(list(alive)))
            last = not any(other.subject == gone.subject for other in alive.values())
            assert plan.remove(gone) == last
            assert not gone.active
            assert not plan.remove(gone)
        else:
            new = interest(sid, rng.choice(subjects))
            first = not any(other.subject == new.subject for other in alive.values())
            assert plan.add(new) == first
            alive[sid] = new
        assert len(plan) == len(alive)
        assert [found.sid for found in plan] == list(alive)
    for subject in ("a", "b", "a.b"):
        tokens = subject.split(".")
        expected = sorted(sid for sid, it in alive.items() if reference.matches(it.subject.split("."), tokens))
        assert matched(plan, subject) == expected
    some = next(iter(alive.values()))
    assert plan.find(some.sid) is some
    assert plan.find(999_999) is None
    assert some in plan.with_subject(some.subject)


def test_deliveries_that_name_their_subscription_concern_no_other() -> None:
    plan = Plan()
    plan.add(interest(1, "a"))
    plan.add(interest(2, "a", group="g"))
    plan.add(interest(3, "a", role=Role.RESPONDER))
    plain, asked = plan.match(b"a")
    assert [box.sid for box in plain] == [box.sid for box in asked] == [1]
    plan.names_targets = False
    plain, asked = plan.match(b"a")
    assert [box.sid for box in plain] == [1]
    assert [box.sid for box in asked] == [3]


def test_wrong_subjects_and_groups() -> None:
    for subject in ("", "a..b", ">.a", "a*"):
        with pytest.raises(InvalidSubjectError):
            Interest(1, subject)
    for group in ("", "x" * 200, "a\nb", 5):
        with pytest.raises(ConfigError):
            Interest(1, "a", group=group)  # type: ignore[arg-type]
    assert Interest(1, "a", group="workers ü").group == "workers ü"
