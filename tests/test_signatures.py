"""What handlers are given, found out from their first parameter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

import pytest

from evbus.message import Message
from evbus.signatures import decoder_for, wanted_type
from evbus.wire import Codec

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


@dataclass
class Mail:
    subject: str


class Method:
    def plain(self, mail: Mail) -> None: ...
    def bare(self, message) -> None: ...  # type: ignore[no-untyped-def]

    @classmethod
    def of_class(cls, mail: Mail) -> None: ...

    @staticmethod
    def static(mail: Mail) -> None: ...


class Callable_:
    def __call__(self, mail: Mail) -> None: ...


def function(mail: Mail) -> None: ...
def envelope(message: Message) -> None: ...
def unannotated(message, other=None): ...  # type: ignore[no-untyped-def]
def returns_missing(mail: Mail) -> Missing: ...
def second_missing(mail: Mail, other: Missing = None) -> None: ...
def optional(mail: Optional[Mail]) -> None: ...  # noqa: UP045 - as people write it
def generic(mails: list[Mail]) -> None: ...
def annotated(mail: Annotated[Mail, "note"]) -> None: ...
def anything(value: Any) -> None: ...
def none(value: None) -> None: ...
def variable(*mails: Mail) -> None: ...
def keywords(mail: Mail, *, option: int = 1, **more: int) -> None: ...
def two(prefix: str, mail: Mail) -> None: ...


def decorated(f: Any) -> Any:
    @functools.wraps(f)
    def wrapper(*args: Any) -> Any:
        return f(*args)

    return wrapper


@pytest.mark.parametrize(
    ("handler", "wanted"),
    [
        (function, Mail),
        (envelope, Message),
        (unannotated, Message),
        (returns_missing, Mail),
        (second_missing, Mail),
        (optional, Optional[Mail]),  # noqa: UP045
        (generic, list[Mail]),
        (annotated, Annotated[Mail, "note"]),
        (anything, Any),
        (none, type(None)),
        (variable, Mail),
        (keywords, Mail),
        (functools.partial(two, "x"), Mail),
        (decorated(function), Mail),
        (Method().plain, Mail),
        (Method().bare, Message),
        (Method.of_class, Mail),
        (Method().static, Mail),
        (Callable_(), Mail),
        (lambda message: None, Message),
        ([].append, Message),
        (print, Message),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_the_first_parameter_decides(handler: Any, wanted: object) -> None:
    assert wanted_type(handler) == wanted


def test_types_of_the_surrounding_function() -> None:
    @dataclass
    class Local:
        n: int

    def handler(local: Local) -> None: ...

    assert wanted_type(handler) is Local


def test_types_of_a_finished_function_that_the_handler_uses() -> None:
    def make() -> Any:
        @dataclass
        class Local:
            n: int

        def handler(local: Local) -> object:
            return Local

        return handler, Local

    handler, local = make()
    assert wanted_type(handler) is local


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (lambda: None, "one argument"),
        (two, "one argument"),
        (5, "function"),
        (None, "function"),
    ],
)
def test_what_cannot_be_called(handler: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        wanted_type(handler)


def test_coroutine_functions_are_for_the_other_client() -> None:
    async def handler(message: Message) -> None: ...

    class Object:
        async def __call__(self, message: Message) -> None: ...

    for bad in (handler, functools.partial(handler), Object()):
        with pytest.raises(TypeError, match="coroutine"):
            decoder_for(bad, None, Codec.MSGPACK)


def test_annotations_that_lead_nowhere() -> None:
    def handler(missing: Missing) -> None: ...

    with pytest.raises(TypeError, match=r"Missing.*type="):
        wanted_type(handler)
    assert decoder_for(handler, bytes, Codec.MSGPACK) is not None


def test_types_that_cannot_be_decoded() -> None:
    def handler(thread: Method) -> None: ...

    with pytest.raises(TypeError, match="Method"):
        decoder_for(handler, None, Codec.MSGPACK)


def test_decoders() -> None:
    assert decoder_for(unannotated, None, Codec.MSGPACK) is None
    assert decoder_for(function, Message, Codec.MSGPACK) is None
    decode = decoder_for(function, None, Codec.JSON)
    assert decode is not None
    assert decode(Codec.UNKNOWN, b'{"subject":"x"}') == Mail("x")
    text = decoder_for(unannotated, str, Codec.MSGPACK)
    assert text is not None
    assert text(Codec.TEXT, b"x") == "x"
