"""Classes that name their subject, so that neither a publisher nor a handler has to.

::

    @evbus.event("email.new")
    @dataclass
    class NewEmail:
        title: str

    bus.publish(NewEmail("Lunch"))


    @bus.on(NewEmail)
    def store(email: NewEmail) -> None: ...

A query names the type of its answer as well, where type checkers see it::

    @dataclass
    class EmailQuery(evbus.Query[list[NewEmail]], subject="email.find"):
        word: str

    emails = bus.query(EmailQuery("Lunch"))  # a list[NewEmail]

The subject is an attribute of the class and inherited like any other. Nothing here is registered anywhere, so two
classes may share a subject.
"""

from __future__ import annotations

import functools
import sys
import types
import typing
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, overload

from evbus._frame import check_subject, has_wildcard
from evbus._message import Message
from evbus.errors import ConfigError
from evbus.payload import OMITTED
from evbus.signatures import Handler, wanted_type

__all__ = [
    "Answering",
    "AsyncAnswering",
    "Handling",
    "Query",
    "address_of",
    "event",
    "response_of",
    "subject_of",
    "subscribed",
]

R_co = TypeVar("R_co", covariant=True)
E_co = TypeVar("E_co", covariant=True)
R = TypeVar("R")
C = TypeVar("C", bound="type[Any]")

_MARK = "__evbus_subject__"


# --- marking a class --------------------------------------------------------------------------------------------------


def event(subject: str) -> Callable[[C], C]:
    """A decorator: messages of this class are published on that subject, and `on(Class)` subscribes to it.

    For dataclasses, msgspec Structs, TypedDicts, pydantic models; above `@dataclass` or below it. An instance of a
    TypedDict is a plain dict and does not know its class: publish it as `publish(Class, {...})`.

    Raises:
        ConfigError: the subject has a wildcard, or the class has another subject already.
        InvalidSubjectError: the subject breaks the rules.
        TypeError: there is no subject, or what is decorated is no class.
    """
    if not isinstance(subject, str):
        raise TypeError(f'an event needs a subject: write @evbus.event("some.subject"), not {_shown(subject)}')
    _check(subject)

    def mark(cls: C) -> C:
        _mark(cls, subject)
        return cls

    return mark


class Query(Generic[R_co]):
    """A base class for queries: of what type the answer is, and on which subject to ask.

    `class EmailQuery(evbus.Query[list[NewEmail]], subject="email.find")`, with `@dataclass` above it. A msgspec Struct
    cannot take `subject=`: put `@evbus.event("email.find")` above `class EmailQuery(evbus.Query[...], msgspec.Struct)`.
    """

    __slots__ = ()

    def __init_subclass__(cls, subject: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if subject is not None:
            _check(subject)
            _mark(cls, subject)


def _check(subject: str) -> None:
    if has_wildcard(check_subject(subject, pattern=True)):
        raise ConfigError("subject", f"a class stands for one subject, so without * and >, not {subject!r}")


def _mark(cls: object, subject: str) -> None:
    if not isinstance(cls, type):
        raise TypeError(f"only a class can have a subject, not {cls!r}")
    before = vars(cls).get(_MARK, subject)
    if before != subject:
        raise ConfigError("subject", f"{cls.__qualname__} has the subject {before!r} already, so not {subject!r} too")
    setattr(cls, _MARK, subject)


# --- using the mark ---------------------------------------------------------------------------------------------------


def subject_of(cls: object) -> str:
    """The subject that a class is marked with.

    Raises:
        TypeError: it is no class, or has none.
    """
    if not isinstance(cls, type):
        raise TypeError(f"a subject is text, or a class that has one, not {_shown(cls)}")
    subject = getattr(cls, _MARK, None)
    if not isinstance(subject, str):
        way = (
            f'class {cls.__name__}(evbus.Query[...], subject="...")'
            if issubclass(cls, Query)
            else '@evbus.event("...")'
        )
        raise TypeError(f"{cls.__qualname__} has no subject: give one, or name it where the class is made: {way}")
    return subject


def address_of(subject: object, message: object) -> tuple[str, object]:
    """Where a message goes, and the message, of the arguments of `publish` or `query`.

    Raises:
        TypeError: there is no subject, or two messages.
    """
    if isinstance(subject, str):
        return subject, message
    if isinstance(subject, type):
        text = subject_of(subject)
        if not _is_one(message, subject):
            name = subject.__qualname__
            given = "there is none" if message is OMITTED else f"this is {_shown(message)}"
            raise TypeError(f"with the class {name} as the subject, the message must be one of its objects: {given}")
        return text, message
    text = subject_of(type(subject))
    if message is not OMITTED:
        raise TypeError(f"{_shown(subject)} is a message already; there is no room for {_shown(message)}")
    return text, subject


def _is_one(message: object, cls: type) -> bool:
    try:
        return isinstance(message, cls)
    except TypeError:  # a TypedDict
        return isinstance(message, dict)


def subscribed(subject: object, handler: Handler | None, wanted: Any) -> tuple[str, Any]:
    """The subject, and the type that the handler is to be given, of the arguments of `subscribe`.

    Raises:
        TypeError: there is no subject, or the handler takes something else than the class.
    """
    if isinstance(subject, str):
        return subject, wanted
    text = subject_of(subject)
    if handler is None or wanted is not None:
        return text, wanted
    assert isinstance(subject, type)
    found = wanted_type(handler, subject)
    if found is Message:
        return text, Message
    # Any is a class from Python 3.11 on.
    if isinstance(found, type) and found is not Any and not _is_subclass(subject, found):
        raise TypeError(
            f"{getattr(handler, '__qualname__', handler)!s} takes {found.__qualname__}, and messages on {text!r} are "
            f"{subject.__qualname__}; annotate it so, or as Message, or say type=..."
        )
    return text, subject


def _is_subclass(cls: type, base: type) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:  # a TypedDict, or a generic class with its arguments: for the type checker to judge
        return True


def response_of(message: object) -> Any:
    """What the answer to a query is to be decoded into; None if the message does not say.

    Raises:
        TypeError: it is a Query that does not say it either, or what it says cannot be resolved.
    """
    return _remembered(type(message)) if isinstance(message, Query) else None


def _response_of(cls: type) -> Any:
    found = _find_response(cls)
    if found is None or isinstance(found, TypeVar):
        raise TypeError(f"{cls.__qualname__} does not say what its answer is: derive it from evbus.Query[SomeType]")
    return found


_remembered: Callable[[type], Any] = functools.lru_cache(1024)(_response_of)


def _find_response(cls: type) -> Any:
    """The argument of Query, through generic classes between."""
    for base in vars(cls).get("__orig_bases__", cls.__bases__):
        origin = typing.get_origin(base) or base
        if origin is Query:
            arguments = typing.get_args(base)
            return _resolve(cls, arguments[0]) if arguments else None
        if isinstance(origin, type) and issubclass(origin, Query):
            found = _find_response(origin)
            given = dict(zip(getattr(origin, "__parameters__", ()), typing.get_args(base), strict=False))
            if isinstance(found, TypeVar):
                return _resolve(cls, given.get(found, found))
            free = getattr(found, "__parameters__", ())
            if free and given and not isinstance(found, type):
                found = found[tuple(given.get(one, one) for one in free)]
            return found
    return None


def _resolve(cls: type, wanted: object) -> Any:
    """A type whose parts may be text."""
    holder = types.SimpleNamespace(__annotations__={"response": wanted})
    names = {**vars(sys.modules.get(cls.__module__, typing)), cls.__name__: cls}
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)["response"]
    except Exception as exc:
        raise TypeError(
            f"the answer {wanted!r} of {cls.__qualname__} cannot be resolved ({type(exc).__name__}: {exc}); "
            "define it before the query, in the same module or imported there"
        ) from exc


def _shown(value: object) -> str:
    return value.__qualname__ if isinstance(value, type) else f"a value of type {type(value).__qualname__}"


# --- for type checkers ------------------------------------------------------------------------------------------------


class Handling(Generic[E_co]):
    """What `on(Class)` returns: decorates a function of one such message, or of the Message around it."""

    @overload
    def __call__(self, handler: Callable[[E_co], R], /) -> Callable[[E_co], R]: ...
    @overload
    def __call__(self, handler: Callable[[Message], R], /) -> Callable[[Message], R]: ...
    def __call__(self, handler: Any, /) -> Any:
        """Return the handler as it is."""
        raise NotImplementedError  # the decorators are plain functions; this class only describes them


class Answering(Generic[E_co]):
    """What `on_query(Class)` returns: decorates a function that returns what the query says, or takes the Message."""

    @overload
    def __call__(self: Answering[Query[R]], handler: Callable[[E_co], R], /) -> Callable[[E_co], R]: ...
    @overload
    def __call__(self, handler: Callable[[Message], R], /) -> Callable[[Message], R]: ...
    def __call__(self, handler: Any, /) -> Any:
        """Return the handler as it is."""
        raise NotImplementedError  # as above


class AsyncAnswering(Generic[E_co]):
    """As Answering, where handlers may be coroutine functions too."""

    @overload
    def __call__(
        self: AsyncAnswering[Query[R]], handler: Callable[[E_co], Coroutine[Any, Any, R]], /
    ) -> Callable[[E_co], Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self: AsyncAnswering[Query[R]], handler: Callable[[E_co], R], /) -> Callable[[E_co], R]: ...
    @overload
    def __call__(self, handler: Callable[[Message], R], /) -> Callable[[Message], R]: ...
    def __call__(self, handler: Any, /) -> Any:
        """Return the handler as it is."""
        raise NotImplementedError  # as above
