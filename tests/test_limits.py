"""evbus.limits: defaults, what is refused, and that every field says its unit and where its value comes from."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import math
import pickle

import pytest

from evbus import limits, wire
from evbus.errors import ConfigError
from evbus.limits import UNLIMITED, Limits

COUNTS = [f.name for f in dataclasses.fields(Limits) if not f.name.endswith("_s")]
DURATIONS = [f.name for f in dataclasses.fields(Limits) if f.name.endswith("_s")]
MAY_BE_UNLIMITED = {
    "connections",
    "handshakes",
    "subscriptions_per_connection",
    "subscriptions",
    "queries_per_connection",
    "pending_soft_bytes",
    "pending_soft_s",
    "pending_hard_bytes",
    "write_timeout_s",
    "silence_s",
}


def unlimited(name: str) -> Limits:
    """Limits with one field off; the soft limit cannot stay off when the hard one is on."""
    values = {name: UNLIMITED}
    if name == "pending_soft_bytes":
        values["pending_hard_bytes"] = UNLIMITED
    return Limits(**values)  # type: ignore[arg-type]


def test_defaults() -> None:
    default = Limits()
    assert default == Limits()
    assert default.payload_bytes == 1 << 20
    assert default.packet_bytes == (1 << 20) + 65536
    assert default.handshake_bytes == 4096
    assert default.handshake_s == 5.0
    assert default.connections == 10_000
    assert default.handshakes == 512
    assert default.subscriptions_per_connection == 10_000
    assert default.subscriptions == 500_000
    assert default.queries_per_connection == 10_000
    assert default.query_s == 60.0
    assert default.query_default_s == 30.0
    assert default.pending_soft_bytes == 8 << 20
    assert default.pending_soft_s == 10.0
    assert default.pending_hard_bytes == 64 << 20
    assert default.write_timeout_s == 10.0
    assert default.match_cache == 65_536
    assert default.silence_s == 180.0


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("bad", [0, -1, None, True, False, 1.5, "10", b"1", 2**63, 2**100, math.inf, [], object()])
def test_counts_refuse(name: str, bad: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**{name: bad})  # type: ignore[arg-type]
    assert caught.value.option == name
    assert name in str(caught.value)


@pytest.mark.parametrize("name", DURATIONS)
@pytest.mark.parametrize("bad", [0, 0.0, -0.0, -1, -0.5, None, True, "5", math.nan, -math.inf, [], object()])
def test_durations_refuse(name: str, bad: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**{name: bad})  # type: ignore[arg-type]
    assert caught.value.option == name


@pytest.mark.parametrize("name", sorted(MAY_BE_UNLIMITED))
def test_zero_points_to_unlimited_where_it_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="UNLIMITED"):
        Limits(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COUNTS + DURATIONS)
def test_unlimited_must_be_spelt_out_and_make_sense(name: str) -> None:
    if name in MAY_BE_UNLIMITED:
        value = getattr(unlimited(name), name)
        assert value == (math.inf if name in DURATIONS else UNLIMITED)
        assert dataclasses.replace(unlimited(name)) == unlimited(name)
    else:
        with pytest.raises(ConfigError, match=r"cannot be UNLIMITED"):
            Limits(**{name: UNLIMITED})  # type: ignore[arg-type]


def test_unlimited_is_a_name_and_not_a_number_that_happens_to_be_large() -> None:
    with pytest.raises(ConfigError):
        Limits(connections=2**63 - 1)
    assert repr(UNLIMITED) == "UNLIMITED"
    assert "connections=UNLIMITED" in repr(Limits(connections=UNLIMITED))
    assert isinstance(UNLIMITED, int)


def test_unlimited_survives_copies() -> None:
    value = Limits(connections=UNLIMITED, silence_s=UNLIMITED)
    for again in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), dataclasses.replace(value)):
        assert again == value
        assert dataclasses.replace(again, handshakes=1).connections == UNLIMITED


def test_durations_become_floats() -> None:
    assert isinstance(Limits(query_s=60).query_s, float)
    assert Limits(handshake_s=1).handshake_s == 1.0


def test_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        Limits(1024)  # type: ignore[misc]
    value = Limits()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.connections = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(conections=5)  # type: ignore[call-arg]


def test_payload_ceiling() -> None:
    largest = Limits(payload_bytes=wire.MAX_PAYLOAD_CEILING_BYTES)
    assert largest.packet_bytes == wire.MAX_PACKET_CEILING_BYTES == 64 << 20
    with pytest.raises(ConfigError) as caught:
        Limits(payload_bytes=wire.MAX_PAYLOAD_CEILING_BYTES + 1)
    assert caught.value.option == "payload_bytes"
    assert Limits(payload_bytes=1).packet_bytes == 65537


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"handshake_bytes": 511}, "handshake_bytes"),
        ({"handshake_bytes": 65538, "payload_bytes": 1}, "handshake_bytes"),
        ({"query_default_s": 61.0}, "query_default_s"),
        ({"query_s": 10.0}, "query_default_s"),
        ({"pending_soft_bytes": (64 << 20) + 1}, "pending_soft_bytes"),
        ({"pending_hard_bytes": (8 << 20) - 1}, "pending_soft_bytes"),
        ({"pending_hard_bytes": 1 << 20, "pending_soft_bytes": 1 << 20}, "packet_bytes"),
    ],
)
def test_contradictions(values: dict[str, float], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**values)  # type: ignore[arg-type]
    assert caught.value.option == option
    assert "at " in caught.value.problem


@pytest.mark.parametrize(
    "values",
    [
        {"handshake_bytes": 512},
        {"query_s": 10.0, "query_default_s": 10.0},
        {"pending_soft_bytes": 64 << 20},
        {"pending_hard_bytes": (1 << 20) + 65536, "pending_soft_bytes": 1},
        {"connections": 1, "handshakes": 1, "subscriptions": 1, "match_cache": 1},
        {"write_timeout_s": 0.001},
    ],
)
def test_edges_are_allowed(values: dict[str, float]) -> None:
    value = Limits(**values)  # type: ignore[arg-type]
    for name, given in values.items():
        assert getattr(value, name) == given


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(Limits(), connections=0)


def test_every_field_says_its_unit_and_whether_it_may_be_unlimited() -> None:
    """The docstring below each field names what it counts, and UNLIMITED exactly where UNLIMITED is accepted."""
    tree = ast.parse(inspect.getsource(limits))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Limits").body
    docs: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(following, ast.Expr), f"{node.target.id} has no docstring"
            assert isinstance(following.value, ast.Constant)
            docs[node.target.id] = " ".join(str(following.value.value).split())
    assert list(docs) == [f.name for f in dataclasses.fields(Limits)]
    for name, text in docs.items():
        unit = "bytes" if name.endswith("_bytes") else "second" if name.endswith("_s") else "Number of"
        assert unit.lower() in text.lower(), f"{name} does not say its unit"
        assert ("May be UNLIMITED" in text) == (name in MAY_BE_UNLIMITED), name
