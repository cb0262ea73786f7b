"""Handlers that are declared where they are written, and subscribed where there is a client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from evbus._frame import check_subject
from evbus.declaring import AsyncDeclaring
from evbus.errors import ConfigError
from evbus.events import subject_of
from evbus.signatures import Handler
from evbus.subscription import Wishes

__all__ = ["Declared", "EventRouter"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Declared:
    """One handler of a router: what it is to be subscribed to, and how."""

    subject: str | type
    handler: Handler
    wishes: Wishes


class EventRouter(AsyncDeclaring):
    """Declares handlers without a client, for example while a module is imported.

    ::

        router = EventRouter()

        @router.on("email.new")
        def store(email: NewEmail) -> None: ...

        client.include(router)  # or on the command line: evbus run module:router

    Args:
        prefix: tokens in front of all subjects that are given as text, here and in the routers it includes: with
            "shop", `on("order.new")` is for "shop.order.new". The subject of a class is what the class says.

    Raises:
        InvalidSubjectError: the prefix is no subject.
    """

    def __init__(self, prefix: str = "") -> None:
        if prefix:
            check_subject(prefix)
        self._prefix = prefix
        self._parts: list[Declared | EventRouter] = []

    @property
    def prefix(self) -> str:
        """The tokens in front of all subjects; empty for none."""
        return self._prefix

    def _declare(self, subject: Any, wishes: Wishes) -> Callable[[F], F]:
        if isinstance(subject, str):
            check_subject(self._placed(subject), pattern=True)
        else:
            subject_of(subject)

        def decorate(handler: F) -> F:
            if not callable(handler):
                raise TypeError(f"a handler is a function of one argument, not {handler!r}")
            self._parts.append(Declared(subject, handler, wishes))
            return handler

        return decorate

    def include(self, other: EventRouter) -> None:
        """Take in the handlers of another router, also those that it gets later.

        Raises:
            ConfigError: it includes this one, or is it.
            TypeError: it is no router.
        """
        if not isinstance(other, EventRouter):
            raise TypeError(f"a router includes routers, not a value of type {type(other).__qualname__}")
        if other is self or self in other._below():
            raise ConfigError("include", "a router cannot include itself, nor one that includes it")
        self._parts.append(other)

    def _below(self) -> Iterator[EventRouter]:
        for part in self._parts:
            if isinstance(part, EventRouter):
                yield part
                yield from part._below()

    def declared(self) -> Iterator[Declared]:
        """All handlers, those of included routers too, in the order of their declaration, with whole subjects.

        Raises:
            InvalidSubjectError: a subject has become too long by the prefixes.
        """
        for part in self._parts:
            for one in [part] if isinstance(part, Declared) else part.declared():
                if isinstance(one.subject, str) and self._prefix:
                    subject = self._placed(one.subject)
                    check_subject(subject, pattern=True)
                    yield Declared(subject, one.handler, one.wishes)
                else:
                    yield one

    def _placed(self, subject: str) -> str:
        return f"{self._prefix}.{subject}" if self._prefix else subject

    def __repr__(self) -> str:
        prefix = f"prefix {self._prefix!r}, " if self._prefix else ""
        return f"<EventRouter, {prefix}{sum(1 for _ in self.declared())} handlers>"
