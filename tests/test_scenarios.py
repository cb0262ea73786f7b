"""Every scenario with both clients over every network; and that the scenarios leave nothing out."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scenarios
import scenarios_beyond
from scenario_bus import NETWORKS, AsyncStage, PlainStage, Stage
from scenarios import SCENARIOS, Scenario

import evbus
from evbus import AsyncEventClient, AsyncSubscription, EventClient, EventRouter, Message, Subscription, errors

KINDS: dict[str, type[Stage]] = {"plain": PlainStage, "asyncio": AsyncStage}
PLACES = [name for name in NETWORKS if name != "unix" or sys.platform != "win32"]


@pytest.mark.parametrize("network", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario, kind: str, network: str) -> None:
    with NETWORKS[network](limits=scenario.limits) as bus:
        KINDS[kind](bus).run(scenario.body)


# --- nothing is left out ----------------------------------------------------------------------------------------------

#: What no scenario names, and why.
EXEMPT = {
    "ServerStartError": "of the server, which starts before any scenario: test_server, test_unix",
    "servers": "a scenario has one server: test_reconnect",
    "executor": "for asyncio only: test_executor",
    "ProtocolError": "told as a ConnectionLostError in its words: a_server_that_breaks_the_protocol_is_left",
}

SOURCE = ast.Module(
    [
        node
        for module in (scenarios, scenarios_beyond)
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    ],
    [],
)
#: Attributes, keywords, and keys of options that are passed on.
NAMED = (
    {node.attr for node in ast.walk(SOURCE) if isinstance(node, ast.Attribute)}
    | {node.arg for node in ast.walk(SOURCE) if isinstance(node, ast.keyword) and node.arg}
    | {
        node.value
        for dictionary in ast.walk(SOURCE)
        if isinstance(dictionary, ast.Dict)
        for node in dictionary.keys
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
)
#: Names within the scenarios, so without the imports.
USED = {
    node.id
    for one in SOURCE.body
    if isinstance(one, ast.AsyncFunctionDef)
    for node in ast.walk(one)
    if isinstance(node, ast.Name)
}


def public(kind: type) -> set[str]:
    """The public methods and properties of a class."""
    return {name for name in dir(kind) if not name.startswith("_")}


def options(function: Callable[..., object]) -> set[str]:
    """What it takes by name only."""
    return {
        one.name
        for one in inspect.signature(function).parameters.values()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }


def arguments(function: Callable[..., object]) -> list[tuple[str, object, object]]:
    """Name, kind and default of each parameter."""
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


def missing(wanted: set[str], found: set[str]) -> set[str]:
    return wanted - found - set(EXEMPT)


def test_every_error_is_named() -> None:
    assert missing(set(errors.__all__) - {"error_from_server"}, USED) == set()


@pytest.mark.parametrize("kind", [EventClient, AsyncEventClient, Subscription, AsyncSubscription, EventRouter, Message])
def test_every_method_is_named(kind: type) -> None:
    assert missing(public(kind) - {"interest", "make", "ended", "declared", "prefix"}, NAMED) == set()


@pytest.mark.parametrize("kind", [EventClient, AsyncEventClient])
def test_every_option_is_named(kind: type) -> None:
    wanted = options(kind).union(
        *(options(getattr(kind, name)) for name in public(kind) if callable(getattr(kind, name)))
    )
    assert missing(wanted, NAMED) == set()


def test_every_status_counter_and_fact_is_named() -> None:
    assert missing({status.name for status in evbus.ConnectStatus}, NAMED) == set()
    for kind in (evbus.ClientStats, evbus.Receipt):
        assert missing({one.name for one in dataclasses.fields(kind)}, NAMED) == set()


def test_every_exemption_is_needed() -> None:
    assert [name for name in EXEMPT if name in USED | NAMED] == []


def test_both_clients_have_the_same_names() -> None:
    assert public(EventClient) == public(AsyncEventClient)
    assert public(Subscription) == public(AsyncSubscription)
    # An executor is for handlers that would hold up the loop; the others have threads anyway.
    assert arguments(EventClient) == [one for one in arguments(AsyncEventClient) if one[0] != "executor"]
    for one, other in ((EventClient, AsyncEventClient), (Subscription, AsyncSubscription)):
        for name in sorted(public(one)):
            if callable(getattr(one, name)) and name != "make":
                assert arguments(getattr(one, name)) == arguments(getattr(other, name)), name


def test_scenarios_have_names_of_their_own() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(names) == len(set(names)) >= 60
