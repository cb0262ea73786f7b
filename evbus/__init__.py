"""evbus: a distributed event bus over plain TCP that needs no message broker.

::

    import evbus

    with evbus.EventServer(), evbus.EventClient() as bus:
        bus.subscribe("greeting", lambda text: print(text), type=str)
        bus.publish("greeting", "hello")

Importing the package costs next to nothing: a name's module is loaded when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from evbus._version import __version__

if TYPE_CHECKING:
    from evbus.aio import AsyncEventClient
    from evbus.aio_replies import AsyncReplies
    from evbus.aio_subscription import AsyncSubscription
    from evbus.client import EventClient, connect
    from evbus.errors import (
        AuthError,
        BufferFullError,
        ClientClosedError,
        CodecError,
        ConfigError,
        ConfirmTimeoutError,
        ConnectError,
        ConnectionLostError,
        EvbusError,
        InvalidSubjectError,
        LimitError,
        NoRespondersError,
        NotConnectedError,
        NotEventServerError,
        PayloadTooLargeError,
        PermissionDeniedError,
        ProtocolError,
        QueryError,
        QueryTimeoutError,
        RefusedError,
        RemoteError,
        ResponderLostError,
        ServerStartError,
        SlowConsumerError,
    )
    from evbus.events import Query, event
    from evbus.limits import UNLIMITED, Limits
    from evbus.message import ClientStats, ConnectStatus, Gap, Message, Receipt, Unfinished
    from evbus.options import ClientLimits, Reconnect
    from evbus.replies import Reply
    from evbus.routers import EventRouter
    from evbus.server import EventServer
    from evbus.subscription import Subscription
    from evbus.sync_replies import Replies

__all__ = [
    "UNLIMITED",
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
    "EvbusError",
    "EventClient",
    "EventRouter",
    "EventServer",
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
    "Unfinished",
    "__version__",
    "connect",
    "event",
]

_HOMES = {
    "AsyncEventClient": "aio",
    "AsyncReplies": "aio_replies",
    "AsyncSubscription": "aio_subscription",
    "ClientLimits": "options",
    "ClientStats": "message",
    "ConnectStatus": "message",
    "EventClient": "client",
    "EventRouter": "routers",
    "EventServer": "server",
    "Gap": "message",
    "Limits": "limits",
    "Message": "message",
    "Query": "events",
    "Receipt": "message",
    "Reconnect": "options",
    "Replies": "sync_replies",
    "Reply": "replies",
    "Subscription": "subscription",
    "UNLIMITED": "limits",
    "Unfinished": "message",
    "connect": "client",
    "event": "events",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"evbus.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
