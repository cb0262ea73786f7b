"""`on` and `on_query`: the decorators that clients and routers have in common, with the types that users see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, overload

from evbus.events import AsyncAnswering, Handling, Query
from evbus.gaps import OnGap
from evbus.subscription import Wishes

__all__ = ["AsyncDeclaring", "Declaring"]

E = TypeVar("E")
Q = TypeVar("Q", bound=Query[Any])
F = TypeVar("F", bound=Callable[..., Any])


class Declaring(ABC):
    """Whatever handlers can be declared to."""

    @abstractmethod
    def _declare(self, subject: Any, wishes: Wishes) -> Callable[[F], F]:
        """What takes the handler, and returns it."""

    # Overloads: a subject as text; a class with a subject and its own type; a class and another type.
    @overload
    def on(
        self,
        subject: str,
        *,
        type: Any = None,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> Callable[[F], F]: ...
    @overload
    def on(
        self,
        subject: type[E],
        *,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> Handling[E]: ...
    @overload
    def on(
        self,
        subject: type[Any],
        *,
        type: Any,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> Callable[[F], F]: ...
    def on(
        self,
        subject: Any,
        *,
        type: Any = None,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> Any:
        """A decorator: the function is subscribed as `subscribe` does it, and stays as it is. `unsubscribe(subject,
        function)` ends it.

        A synchronous client that is connected has the subscription when this returns. An asyncio client has it after
        the next `await flush()`, which raises what the server has against it. A client that is not connected has it
        from `connect` on, a router's handlers are subscribed by `include`.

        Args and errors: as for `EventClient.subscribe`. A router checks the subject; what else there is to check is
        checked by `include` of a client.
        """
        return self._declare(
            subject, Wishes(type, group, concurrency, max_pending_msgs, max_pending_bytes, overflow, on_gap=on_gap)
        )


class AsyncDeclaring(Declaring):
    """Whatever takes coroutine functions as well."""

    @overload
    def on_query(
        self, subject: str, *, type: Any = None, group: str | None = None, concurrency: int = 1
    ) -> Callable[[F], F]: ...
    @overload
    def on_query(  # type: ignore[overload-overlap]  # a query class is a class with a subject, and more is known of it
        self, subject: type[Q], *, group: str | None = None, concurrency: int = 1
    ) -> AsyncAnswering[Q]: ...
    @overload
    def on_query(self, subject: type[E], *, group: str | None = None, concurrency: int = 1) -> Handling[E]: ...
    @overload
    def on_query(
        self, subject: type[Any], *, type: Any, group: str | None = None, concurrency: int = 1
    ) -> Callable[[F], F]: ...
    def on_query(self, subject: Any, *, type: Any = None, group: str | None = None, concurrency: int = 1) -> Any:
        """A decorator: the function answers queries on the subject, and gets no events.

        What it returns is the answer, None included, unless it has answered by `Message.reply` or `Message.fail`. If it
        raises, the asker gets a RemoteError. Of several responders the server asks one at a time, in turn.

        When it is active, args and errors: as for `on`.
        """
        return self._declare(subject, Wishes(type, group, concurrency, responder=True))
