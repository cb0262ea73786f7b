"""evbus.errors: the tree, the texts, and that errors survive pickling and copying."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
import re

import pytest

from evbus import errors, wire
from evbus.errors import EvbusError

# Each public class with one way to make it, the builtin it also is, and words that its text must contain.
SAMPLES: list[tuple[EvbusError, type[BaseException], list[str]]] = [
    (errors.ConfigError("port", "must be 0 to 65535"), ValueError, ["port", "0 to 65535"]),
    (
        errors.ServerStartError("127.0.0.1:9100", "the port is in use", "try port 0", errno.EADDRINUSE),
        OSError,
        ["127.0.0.1:9100", "in use", "try port 0"],
    ),
    (
        errors.ConnectError("127.0.0.1:9100", "Connection refused", errno.ECONNREFUSED),
        ConnectionError,
        ["127.0.0.1:9100", "Connection refused", "evbus serve"],
    ),
    (errors.NotEventServerError("h:80", "it speaks HTTP"), ConnectionError, ["h:80", "not an event server", "HTTP"]),
    (errors.AuthError("h:9100", "unknown token"), ConnectionError, ["credentials", "unknown token", "auth"]),
    (errors.NotConnectedError("publish", "DISCONNECTED"), ConnectionError, ["publish", "DISCONNECTED", "connect()"]),
    (errors.NotConnectedError("ask", "RECONNECTING"), ConnectionError, ["ask", "RECONNECTING", "wait_connected()"]),
    (errors.ClientClosedError("publish"), ConnectionError, ["publish", "closed", "EventClient"]),
    (errors.ConnectionLostError("query", "reset by peer"), ConnectionError, ["query", "reset by peer", "unknown"]),
    (errors.ProtocolError("a PackSize of 3"), ConnectionError, ["PackSize of 3"]),
    (errors.QueryError("a.b"), Exception, ["'a.b'"]),
    (errors.QueryTimeoutError("a.b", 2.5), TimeoutError, ["'a.b'", "2.5 s"]),
    (errors.NoRespondersError("a.b"), LookupError, ["'a.b'", "on_query"]),
    (errors.ResponderLostError("a.b"), ConnectionError, ["'a.b'", "went away"]),
    (errors.RemoteError(404, "no such mail", "a.b", 17), RuntimeError, ["404", "no such mail", "'a.b'"]),
    (errors.ConfirmTimeoutError("a.b", 3.0), TimeoutError, ["'a.b'", "3 s", "may have been delivered"]),
    (errors.PermissionDeniedError("publish", "a.b", "read only"), PermissionError, ["publish", "'a.b'", "read only"]),
    (errors.InvalidSubjectError("a..b", "empty token"), ValueError, ["'a..b'", "empty token", "256"]),
    (
        errors.CodecError("decode", "Mail", "missing field `to`", codec="msgpack", subject="a.b"),
        ValueError,
        ["Mail", "missing field `to`", "msgpack", "'a.b'"],
    ),
    (errors.RefusedError(wire.ErrorCode.DRAINING, "a.b", "stopping"), RuntimeError, ["draining", "'a.b'", "stopping"]),
    (errors.LimitError(11, 10), Exception, ["11", "10"]),
    (errors.PayloadTooLargeError(2_000_000, 1_048_576, "a.b"), ValueError, ["2,000,000", "1,048,576", "'a.b'"]),
    (errors.BufferFullError(9000, 8000), BlockingIOError, ["9,000", "8,000", "nothing was sent"]),
    (errors.SlowConsumerError("a.>", 600, 500, "messages"), RuntimeError, ["'a.>'", "600 messages", "500"]),
]
IDS = [type(error).__name__ for error, _, _ in SAMPLES]


def public_classes() -> list[type[EvbusError]]:
    found = [getattr(errors, name) for name in errors.__all__]
    return [item for item in found if inspect.isclass(item)]


def test_samples_cover_every_public_class() -> None:
    assert {type(error) for error, _, _ in SAMPLES} == set(public_classes()) - {EvbusError}


def test_everything_defined_is_public() -> None:
    defined = {
        name for name, item in vars(errors).items() if inspect.isclass(item) and item.__module__ == "evbus.errors"
    }
    assert defined == {cls.__name__ for cls in public_classes()}


def test_module_docstring_draws_the_tree() -> None:
    """Each class stands in the drawing, below the class that it derives from, with the builtin that it is."""
    assert errors.__doc__ is not None
    stack: list[tuple[int, str]] = []
    drawn: dict[str, tuple[str, str]] = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error)(?: \((\w+)\))?", line)
        if match is None:
            continue
        depth, name, builtin = len(match[1]), match[2], match[3] or ""
        while stack and stack[-1][0] >= depth:
            stack.pop()
        drawn[name] = (stack[-1][1] if stack else "", builtin)
        stack.append((depth, name))
    assert set(drawn) == {cls.__name__ for cls in public_classes()}
    for cls in public_classes():
        parent, builtin = drawn[cls.__name__]
        ours = [base.__name__ for base in cls.__bases__ if issubclass(base, EvbusError)]
        theirs = [base.__name__ for base in cls.__bases__ if not issubclass(base, EvbusError) and base is not Exception]
        assert ours == ([parent] if parent else [])
        assert theirs == ([builtin] if builtin else [])


@pytest.mark.parametrize(("error", "builtin", "words"), SAMPLES, ids=IDS)
def test_is_the_builtin_and_says_what_it_knows(
    error: EvbusError, builtin: type[BaseException], words: list[str]
) -> None:
    assert isinstance(error, EvbusError)
    assert isinstance(error, builtin)
    text = str(error)
    for word in words:
        assert word in text
    assert "\n" not in text


@pytest.mark.parametrize(("error", "builtin", "words"), SAMPLES, ids=IDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickling(error: EvbusError, builtin: type[BaseException], words: list[str], protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert again.__dict__ == error.__dict__
    assert str(again) == str(error)
    assert repr(again) == repr(error)
    assert again.args == error.args
    if isinstance(error, OSError):
        assert again.errno == error.errno


@pytest.mark.parametrize(("error", "builtin", "words"), SAMPLES, ids=IDS)
def test_survives_copying(error: EvbusError, builtin: type[BaseException], words: list[str]) -> None:
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert again is not error
        assert str(again) == str(error)


@pytest.mark.parametrize(("error", "builtin", "words"), SAMPLES, ids=IDS)
def test_text_follows_the_attributes(error: EvbusError, builtin: type[BaseException], words: list[str]) -> None:
    """Attributes first: a text attribute changed later shows in str()."""
    for name, value in vars(error).items():
        if isinstance(value, str) and value and name not in ("action", "unit"):
            setattr(error, name, "changed-here")
            assert "changed-here" in str(error), name
            setattr(error, name, value)


def test_a_subclass_of_a_user_survives_pickling_too() -> None:
    error = errors.RemoteError(7, "x")
    error.extra = [1, 2]  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).extra == [1, 2]


def test_errno_is_that_of_the_system() -> None:
    error = errors.ServerStartError("a:1", "in use", errno=errno.EADDRINUSE)
    assert error.errno == errno.EADDRINUSE
    assert errors.ServerStartError("a:1", "unknown host").errno is None
    assert errors.ConnectError("a:1", errno=errno.ECONNREFUSED).errno == errno.ECONNREFUSED


def test_one_except_clause_for_a_failing_connect() -> None:
    for cls in (errors.NotEventServerError, errors.AuthError):
        assert issubclass(cls, errors.ConnectError)


def test_closed_by_us_and_lost_are_different() -> None:
    assert not issubclass(errors.ClientClosedError, errors.ConnectionLostError)
    assert not issubclass(errors.ConnectionLostError, errors.NotConnectedError)


def test_cause_is_kept() -> None:
    with pytest.raises(errors.ConnectError) as caught:
        try:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except OSError as e:
            raise errors.ConnectError("a:1", str(e), e.errno) from e
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_limit_errors_carry_size_and_limit() -> None:
    for error, _, _ in SAMPLES:
        if isinstance(error, errors.LimitError):
            assert error.size > error.limit > 0
    slow = errors.SlowConsumerError("a", 6, 5)
    assert slow.pending == slow.size == 6
    assert "(" not in str(errors.LimitError())


def test_unknown_sizes_are_left_out_of_the_text() -> None:
    assert "-1" not in str(errors.PayloadTooLargeError())
    assert "limit 10" in str(errors.PayloadTooLargeError(limit=10))


def test_a_long_subject_is_cut() -> None:
    error = errors.InvalidSubjectError("x" * 100_000, "too long")
    assert len(error.subject) == 256
    assert len(str(error)) < 1000
    assert errors.InvalidSubjectError("x" * 256, "?").subject == "x" * 256


def test_control_characters_of_a_subject_are_escaped() -> None:
    text = str(errors.InvalidSubjectError("a\r\nb\x1b", "control character"))
    assert "\r" not in text
    assert "\n" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (wire.ErrorCode.NO_RESPONDERS, errors.NoRespondersError),
        (wire.ErrorCode.RESPONDER_LOST, errors.ResponderLostError),
        (wire.ErrorCode.QUERY_TIMEOUT, errors.QueryTimeoutError),
        (wire.ErrorCode.PAYLOAD_TOO_LARGE, errors.PayloadTooLargeError),
        (wire.ErrorCode.INVALID_SUBJECT, errors.InvalidSubjectError),
        (wire.ErrorCode.PERMISSION_DENIED, errors.PermissionDeniedError),
        (wire.ErrorCode.TOO_MANY_SUBSCRIPTIONS, errors.RefusedError),
        (wire.ErrorCode.DRAINING, errors.RefusedError),
        (99_999, errors.RefusedError),
        (-1, errors.RefusedError),
    ],
)
def test_error_from_server(code: int, expected: type[EvbusError]) -> None:
    error = errors.error_from_server(code, "a.b", "the server's words", timeout=1.5, action="publish")
    assert type(error) is expected
    assert "a.b" in str(error)


def test_every_code_of_the_server_becomes_an_error_with_a_text() -> None:
    for code in wire.ErrorCode:
        assert str(errors.error_from_server(code, "a", "b"))


def test_an_error_of_a_responder_is_remote_whatever_its_code() -> None:
    error = errors.error_from_server(wire.ErrorCode.NO_RESPONDERS, "a.b", "mine", sender=9)
    assert isinstance(error, errors.RemoteError)
    assert (error.code, error.text, error.subject, error.sender) == (5, "mine", "a.b", 9)
