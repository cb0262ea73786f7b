"""What passes between a client and its user: messages, receipts, statuses, statistics, options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

from evbus._message import Message
from evbus.options import ClientLimits, Reconnect

__all__ = ["ClientOptions", "ClientStats", "ConnectStatus", "Gap", "Message", "Receipt", "Unfinished"]


class ConnectStatus(Enum):
    """Where a client's connection stands."""

    DISCONNECTED = "disconnected"
    """No connection: not yet, or no longer."""
    CONNECTING = "connecting"
    """`connect` is at work."""
    CONNECTED = "connected"
    """The server has accepted us."""
    RECONNECTING = "reconnecting"
    """The connection was lost and the client is trying to get a new one."""
    NOT_EVENT_SERVER = "not_event_server"
    """The last attempt found something that is no event server."""
    DRAINING = "draining"
    """`disconnect` is at work: what was begun is being finished."""
    CLOSED = "closed"
    """`disconnect` has ended; a closed client is not opened again."""


@dataclass(frozen=True)
class Receipt:
    """The server's word on a publish with confirm=True: it has queued the message for every matching subscriber.

    It does not say that a subscriber has handled it.
    """

    receivers: int
    """Connections and group members that the message was queued for; -1 if the server does not count (a C# server)."""
    dropped: int = 0
    """Matching receivers that do not get it because the server is closing them for being too slow."""


@dataclass(frozen=True)
class Gap:
    """Messages that a subscription missed, told in their place: before the next message that it gets."""

    subject: str
    """The subscription's subject or pattern."""
    count: int | None
    """How many messages; None: nobody knows, and there may be none."""
    reason: str
    """"overflow": they found a queue full, the server's for this client or the subscription's own; "reconnect": the
    connection was lost and made again."""


@dataclass(frozen=True)
class Unfinished:
    """What a client had to leave when it was closed. False, in an `if`, when there was nothing."""

    messages: int = 0
    """Messages that waited for their handlers, or to be taken, and were discarded."""
    handlers: int = 0
    """Subscriptions whose handler was still at work, not counting one that closed the client itself."""
    unsent_bytes: int = 0
    """Bytes that were published and not sent."""
    queries: int = 0
    """Queries and confirmations that were still waited for; they raise ClientClosedError."""

    def __bool__(self) -> bool:
        return bool(self.messages or self.handlers or self.unsent_bytes or self.queries)


@dataclass(frozen=True)
class ClientStats:
    """Counters of one client since it was made, and what waits now."""

    published: int
    """Messages and queries handed to the outgoing buffer."""
    received: int
    """Messages, queries and answers that arrived."""
    handled: int
    """Messages and queries whose handler has returned, or raised."""
    handler_errors: int
    """Handlers that raised, and payloads that did not fit their handler's type."""
    dropped: int
    """Messages that found their subscription's queue full, or its subscription ended."""
    server_errors: int
    """Errors that the server sent without being asked, such as those for publishes without confirmation."""
    slow_handlers: int
    """Calls of handlers that took longer than `warn_after`."""
    missed: int
    """Messages that gaps told of: those that the server had to drop for this client, and those that found the queue of
    their subscription full and were dropped by its `overflow`."""
    late_answers: int
    """Answers, given or got, that came after their query had ended."""
    malformed: int
    """Packets of the server that could not be read."""
    connects: int
    """Connections that were established."""
    subscriptions: int
    """Subscriptions now."""
    pending_queries: int
    """Queries, confirmations and subscribes that wait for the server now."""
    pending_bytes: int
    """Bytes that wait to be sent now."""
    unsent_bytes: int
    """Bytes that a connection took with it, or that were published for one that never came back."""
    pending_msgs: int
    """Messages that wait for handlers now."""
    at_work: int
    """Subscriptions whose handler is at work now, and callbacks (`on_error`, `on_status`) that are."""


class ClientOptions(TypedDict, total=False):
    """What `EventClient` takes besides the address, for functions that pass it on."""

    name: str | None
    auth: str | None
    codec: str
    reconnect: bool | Reconnect
    heartbeat: float
    limits: ClientLimits | None
    warn_after: float | None
    on_error: Callable[[BaseException, Message | None], object] | None
    on_status: Callable[[ConnectStatus], object] | None
