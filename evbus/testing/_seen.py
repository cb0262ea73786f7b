"""The two kinds of clients as a bus looks at them, from any thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from evbus.aio import AsyncEventClient
from evbus.client import EventClient
from evbus.errors import ConfirmTimeoutError, ConnectionLostError
from evbus.message import ClientStats, ConnectStatus
from evbus.subscription import SubscriptionFacts

__all__ = ["Seen", "SeenAsync", "SeenSync", "seen"]

T = TypeVar("T")

#: A loop that takes longer to look at its client is busy with something else.
_TURN_S = 1.0


class Seen(ABC):
    """What both kinds have in common."""

    client: EventClient | AsyncEventClient

    @property
    def name(self) -> str:
        """For messages."""
        name = self.client._options.name
        return f"client {name!r}" if name else "a client"

    @property
    def status(self) -> ConnectStatus:
        """Where its connection stands."""
        return self.client.status

    def stats(self) -> ClientStats:
        """Its counters."""
        return self.client.stats()

    @abstractmethod
    def rtt(self, timeout: float) -> None:
        """Have it ask the server. Raises what the client raises."""

    @abstractmethod
    def at_work(self) -> str | None:
        """What it is still doing."""

    def _doing(self, subscriptions: Iterable[SubscriptionFacts], busy: bool) -> str | None:
        figures = self.client.stats()
        if figures.pending_queries or figures.pending_bytes:
            return (
                f"{self.name} waits for the server: {figures.pending_queries} queries or confirmations, "
                f"{figures.pending_bytes} bytes to send"
            )
        for subscription in subscriptions:
            if subscription.handler is not None and not subscription.is_idle:
                waiting = subscription.pending_msgs
                more = f", {waiting} messages wait for it" if waiting else ""
                return f"a handler on {subscription.subject!r} of {self.name} is at work{more}"
        return f"a handler or callback of {self.name} is at work" if busy else None


class SeenSync(Seen):
    """An `EventClient`."""

    def __init__(self, client: EventClient) -> None:
        self.client: EventClient = client

    def rtt(self, timeout: float) -> None:
        """See `Seen`."""
        self.client.rtt(timeout)

    def at_work(self) -> str | None:
        """See `Seen`."""
        return self._doing(self.client.subscriptions, bool(self.client.stats().at_work))


class SeenAsync(Seen):
    """An `AsyncEventClient`; what concerns it is done on its loop."""

    def __init__(self, client: AsyncEventClient) -> None:
        self.client: AsyncEventClient = client

    @property
    def status(self) -> ConnectStatus:
        """See `Seen`; with its loop, a connection has ended too."""
        loop = self._loop
        return self.client.status if loop is not None else ConnectStatus.DISCONNECTED

    @property
    def _loop(self) -> asyncio.AbstractEventLoop | None:
        loop = self.client._loop
        return loop if loop is not None and loop.is_running() else None

    def rtt(self, timeout: float) -> None:
        """See `Seen`."""
        self._run(lambda: self.client.rtt(timeout), timeout + _TURN_S)

    def at_work(self) -> str | None:
        """See `Seen`."""

        async def look() -> str | None:
            return self._doing(self.client.subscriptions, bool(self.client.stats().at_work))

        try:
            return self._run(look, _TURN_S)
        except ConfirmTimeoutError:
            return f"the loop of {self.name} stands still"

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T | None:
        loop = self._loop
        if loop is None:
            return None
        if _is_running_here(loop):
            raise RuntimeError("this waits for the loop that it was called on: await asyncio.to_thread(...) instead")
        future = asyncio.run_coroutine_threadsafe(make(), loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise ConfirmTimeoutError("", timeout) from None
        except concurrent.futures.CancelledError:
            raise ConnectionLostError("a look at the client", "its loop has ended") from None


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def seen(client: EventClient | AsyncEventClient) -> Seen:
    """A client as the bus looks at it."""
    return SeenAsync(client) if isinstance(client, AsyncEventClient) else SeenSync(client)
