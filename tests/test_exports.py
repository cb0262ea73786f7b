"""The public names: exactly these, each from where it is at home, and cheap to import."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest
from helpers_cli import Program

import evbus

PUBLIC = [
    "AsyncEventClient",
    "AsyncReplies",
    "AsyncSubscription",
    "AuthError",
    "BufferFullError",
    "ClientClosedError",
    "ClientLimits",
    "ClientStats",
    "CodecError",
    "ConfigError",
    "ConfirmTimeoutError",
    "ConnectError",
    "ConnectStatus",
    "ConnectionLostError",
    "EventClient",
    "EventRouter",
    "EventServer",
    "EvbusError",
    "Gap",
    "InvalidSubjectError",
    "LimitError",
    "Limits",
    "Message",
    "NoRespondersError",
    "NotConnectedError",
    "NotEventServerError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "ProtocolError",
    "Query",
    "QueryError",
    "QueryTimeoutError",
    "Receipt",
    "Reconnect",
    "RefusedError",
    "RemoteError",
    "Replies",
    "Reply",
    "ResponderLostError",
    "ServerStartError",
    "SlowConsumerError",
    "Subscription",
    "UNLIMITED",
    "Unfinished",
    "__version__",
    "connect",
    "event",
]


def test_the_public_names() -> None:
    """A name that is added or lost here is a decision, and stands in the changelog."""
    assert sorted(evbus.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(evbus))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(evbus, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.partition(".")[0] == "evbus"
        assert value.__doc__


def test_every_error_is_public() -> None:
    errors = importlib.import_module("evbus.errors")
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert {name for name in classes if getattr(errors, name).__module__ == "evbus.errors"} <= set(evbus.__all__)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'evbus' has no attribute 'nothing'"):
        evbus.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from evbus import nothing  # noqa: F401


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from evbus import *", names)
    assert set(PUBLIC) <= set(names)


def test_importing_the_package_loads_next_to_nothing(tmp_path: Path) -> None:
    code = "import sys, json, evbus; print(json.dumps(sorted(sys.modules)))"
    with Program([sys.executable, "-c", code], cwd=tmp_path) as program:
        loaded = json.loads(program.finish().out)
    assert {name for name in loaded if name.partition(".")[0] == "evbus"} == {"evbus", "evbus._version"}
    assert "msgspec" not in loaded
