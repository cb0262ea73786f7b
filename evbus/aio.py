"""The asyncio client: a thin shell that suspends and resumes. What is said and heard is the session's business.

All of a client belongs to the event loop on which it connects, its handlers and callbacks too, except plain handlers if
it is given an executor for them. Nothing here may be called from other threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar, overload

from evbus._clock import SystemClock
from evbus._message import Message
from evbus._outbox import PACK_YIELD
from evbus.aio_loop import AsyncDialler, AsyncWaiting, Callbacks, LoopReactor, Tasks, dial_async
from evbus.aio_replies import AsyncReplies
from evbus.aio_subscription import AsyncSubscription
from evbus.connector import Connector
from evbus.declaring import AsyncDeclaring
from evbus.dial import DEFAULT_HOST, DEFAULT_PORT, Server, check_servers
from evbus.endings import Closing, Ending
from evbus.errors import ClientClosedError, EvbusError
from evbus.events import Query, subscribed
from evbus.gaps import OnGap
from evbus.message import ClientStats, ConnectStatus, Receipt, Unfinished
from evbus.options import ClientLimits, Reconnect, SessionOptions, check_reconnect, check_timeout
from evbus.payload import OMITTED, codec_from_name
from evbus.plan import Interest
from evbus.reactor import Loop
from evbus.reports import Reports
from evbus.requests import Publishing, Requests
from evbus.routers import EventRouter
from evbus.session import Session
from evbus.signatures import Handler
from evbus.subscription import Wishes, matching
from evbus.transport import Transport
from evbus.wire import Codec

__all__ = ["AsyncEventClient"]

T = TypeVar("T")
E = TypeVar("E")
Q = TypeVar("Q", bound=Query[Any])
F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("evbus.client")

_BYTES = int(Codec.BYTES)
# What stands for "no limit" where the time has to be counted.
_LONG_S = 3600.0 * 24 * 365


class AsyncEventClient(AsyncDeclaring):
    """A client of an event bus server, for asyncio.

    ::

        async with AsyncEventClient("127.0.0.1", 9100) as bus:
            await bus.publish("email.new", Email("hello", "..."))

    Args:
        host, port: the server's.
        servers: URLs, instead of host and port: tried in their order each time a connection is needed.
        name: what the server calls this client in its logs.
        auth: the token that the server asks for.
        codec: "msgpack" or "json", for structured values; bytes and str go as they are.
        reconnect: True: when the connection is lost a new one is sought until there is one, and every subscription
            restored. False: it is not. `Reconnect(...)` for other pauses, or a buffer for what is published meanwhile.
        heartbeat: seconds between heartbeats. A server silent for twice as long is taken for lost.
        limits: what this client keeps in memory, and takes from a server.
        warn_after: seconds; a call of a handler that takes longer is reported once, by a warning with its stack in the
            log, and counted (`ClientStats.slow_handlers`). None: never.
        on_error: `on_error(error, message)` gets what no call can raise: a handler's exception (with the message it was
            given), an error the server reports, a lost connection (with None).
        on_status: `on_status(status)` gets each change of `status`.

        executor: runs handlers that are plain functions, so that one that takes its time holds up nothing else; for
            example a ThreadPoolExecutor, which the user shuts down. It must run them in this process.

    Handlers and both callbacks may be coroutine functions or plain functions. They run on the loop, except that plain
    handlers run on the `executor`, if there is one: still one message after the other for each subscription, with the
    context variables of its task. The client belongs to the loop all the same. A handler on the executor may return an
    answer, and call `Message.reply` and `Message.fail`; to publish from there, use
    `asyncio.run_coroutine_threadsafe(client.publish(...), loop).result()`.

    Raises:
        ConfigError: an option makes no sense.

    Any await of a client may be cancelled. Works on every loop that can watch sockets (`add_reader`), uvloop's among
    them.
    """

    # The network: what the testing kit puts its memory in the place of.
    _dial: Callable[[Server, float], Coroutine[Any, Any, Transport]] = staticmethod(dial_async)
    _make_reactor: Callable[[asyncio.AbstractEventLoop], Loop] = LoopReactor

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        servers: Sequence[str] | None = None,
        name: str | None = None,
        auth: str | None = None,
        codec: str = "msgpack",
        reconnect: bool | Reconnect = True,
        heartbeat: float = 5.0,
        limits: ClientLimits | None = None,
        warn_after: float | None = 10.0,
        on_error: Callable[[BaseException, Message | None], object] | None = None,
        on_status: Callable[[ConnectStatus], object] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._servers = check_servers(host, port, servers)
        self._options = SessionOptions(
            name=name if name is not None else "",
            token=auth if auth is not None else "",
            heartbeat_s=heartbeat,
            codec=codec_from_name(codec),
            limits=limits if limits is not None else ClientLimits(),
            reconnect=check_reconnect(reconnect),
            warn_after_s=warn_after,
        )
        self._tasks = Tasks()
        callbacks = Callbacks(self._tasks)
        reports = Reports(callbacks.defer, callbacks.wrap(on_error), callbacks.wrap(on_status))
        self._session = Session(self._options, SystemClock(), reports)
        self._session.address = str(self._servers[0])
        self._session.outbox.gather()
        self._waiting = AsyncWaiting(self._session)
        self._requests = Requests(self._session)
        self._session.answers.send = self._waiting.send
        self._session.answers.call = self._waiting.call
        self._executor = executor
        self._pack_event = self._session.outbox.pack_event
        self._dialler = AsyncDialler(self._dial_now)
        self._connector: Connector[Server] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that it connects on
        self._life = asyncio.Lock()  # connect and disconnect, one at a time
        self._subscriptions: dict[Interest, AsyncSubscription] = {}

    async def _dial_now(self, server: Server, timeout_s: float) -> Transport:
        return await self._dial(server, timeout_s)  # looked up each time: tests replace it

    # ---- connecting --------------------------------------------------------------------------------------------------

    async def connect(self, timeout: float | None = 3.0, *, retry: bool = False) -> AsyncEventClient:
        """Connect, and restore the subscriptions made before. Returns the client itself; nothing happens if it is
        connected already. If the client is reconnecting, it tries at once, and this waits for it.

        Args:
            timeout: seconds for all of it; None: as long as it takes.
            retry: if no server is to be had, try again until the time is up.

        Raises:
            ConnectError: no server can be reached.
            NotEventServerError: something answered, but no event server.
            AuthError: the server refused the credentials.
            ClientClosedError: the client was disconnected; make a new one.
        """
        seconds = check_timeout(timeout) or _LONG_S
        async with self._life:
            if self._session.is_closing:
                raise ClientClosedError("connect")
            if self._session.is_ready:
                return self
            seeking = self._session.is_reconnecting
            connector = self._connector
            if connector is None:
                self._loop = asyncio.get_running_loop()
                self._waiting.belong_to(self._loop)
                reactor = self._make_reactor(self._loop)
                connector = self._connector = Connector(reactor, self._session, self._servers, self._dialler)
            try:
                # The connector keeps the deadline; what comes on top is for a connection that is lost at once.
                await self._waiting.outcome(
                    lambda notify: connector.connect(seconds, retry, notify), seconds if seeking else seconds + 5.0
                )
            except BaseException as exc:
                if not seeking:
                    connector.close()
                    self._connector = None
                    await self._dialler.cancel()
                    self._session.gave_up(exc)
                raise
        return self

    async def wait_connected(self, timeout: float | None = None) -> AsyncEventClient:
        """Return, with the client itself, as soon as there is a connection with every subscription active.

        Raises:
            ConnectError: there was none in time; the client goes on trying.
            NotConnectedError: none is being sought: call `connect`.
            ClientClosedError, ConnectionLostError: there will be none.
        """
        seconds = check_timeout(timeout)
        connector = self._connector
        if connector is None:
            raise self._session.not_connected("wait_connected")
        await self._waiting.outcome(connector.expect, seconds)
        return self

    async def disconnect(self, drain: bool = True, timeout: float = 5.0) -> Unfinished:
        """Close the client for good; another one must be made to connect again. Again: nothing happens.

        Args:
            drain: finish what was begun: no more messages are taken in, handlers finish those that wait, and the server
                takes everything published. False: whatever waits is discarded.
            timeout: seconds for the drain; what was not finished by then is logged and
                discarded, and handlers still at work are cancelled.

        Returns:
            what was left; nothing if another call closes the client, or has closed it.

        A handler may call it; it does not wait for itself. Cancelled, it closes the client all the same, at once.
        """
        seconds = check_timeout(timeout, zero=True)
        if self._session.is_closing:  # by another task, or by the one whose handler this is
            return Unfinished()
        if self._connector is not None:
            self._connector.stop()  # whoever is connecting need not wait for the end of it
        async with self._life:
            if self._session.is_closing:
                return Unfinished()
            try:
                if drain and self._session.is_connected:
                    await self._drain(time.monotonic() + (_LONG_S if seconds is None else seconds))
            finally:
                left = self._close(drain)
                await self._dialler.cancel()
                await self._tasks.cancel()
        return left

    async def _drain(self, deadline: float) -> None:
        with suppress(EvbusError):  # no time left, or no connection: then there is nothing more to do
            await self._waiting.outcome(self._session.drain, deadline - time.monotonic())
            await self._tasks.wait_idle(deadline - time.monotonic())
            await self._waiting.outcome(self._session.flush, deadline - time.monotonic())

    def _close(self, drain: bool) -> Unfinished:
        end = Closing(self._session)
        self._session.closed()
        if self._connector is not None:
            self._connector.close()
        left = end.finish(list(self._subscriptions.values()), drain, asyncio.current_task())
        self._subscriptions.clear()
        return left

    @property
    def status(self) -> ConnectStatus:
        """Where the connection stands."""
        return self._session.status

    @property
    def address(self) -> str:
        """The server's address, as "host:port" or a path; of several servers the one that was tried last."""
        return self._session.address

    def stats(self) -> ClientStats:
        """Counters since the client was made, and what waits now."""
        return self._session.stats(self._tasks.busy)

    @property
    def name(self) -> str:
        """What the server calls this client; empty if it was given no name."""
        return self._options.name

    @property
    def subscriptions(self) -> tuple[AsyncSubscription, ...]:
        """The subscriptions that were not unsubscribed yet, in the order in which they were made."""
        return tuple(self._subscriptions.values())

    async def rtt(self, timeout: float | None = 3.0) -> float:
        """Seconds that the server takes to answer, everything sent before included.

        Raises:
            ConfirmTimeoutError: it did not answer in time.
            NotConnectedError, ConnectionLostError: no connection, or none any more.
        """
        begun = time.perf_counter()
        await self._waiting.outcome(self._session.flush, check_timeout(timeout))
        return time.perf_counter() - begun

    async def __aenter__(self) -> AsyncEventClient:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    def __repr__(self) -> str:
        return f"<AsyncEventClient of {self.address}, {self.status.value}>"

    # ---- subscribing -------------------------------------------------------------------------------------------------

    # Overloads: a subject as text; a class and its own type, or the Message; a class and another type.
    @overload
    async def subscribe(
        self,
        subject: str,
        handler: Handler | None = None,
        *,
        type: Any = None,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> AsyncSubscription: ...
    @overload
    async def subscribe(
        self,
        subject: type[E],
        handler: Callable[[E], Any] | None = None,
        *,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> AsyncSubscription: ...
    @overload
    async def subscribe(
        self,
        subject: type[Any],
        handler: Callable[[Message], Any],
        *,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> AsyncSubscription: ...
    @overload
    async def subscribe(
        self,
        subject: type[Any],
        handler: Handler,
        *,
        type: Any,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> AsyncSubscription: ...
    async def subscribe(
        self,
        subject: Any,
        handler: Handler | None = None,
        *,
        type: Any = None,
        group: str | None = None,
        concurrency: int = 1,
        max_pending_msgs: int | None = None,
        max_pending_bytes: int | None = None,
        overflow: str = "close",
        on_gap: OnGap | None = None,
    ) -> AsyncSubscription:
        """Subscribe to a subject, or a pattern: `*` stands for one token, a final `>` for one or more.

        On a connected client the subscription is active when this returns. Otherwise it becomes active with `connect`.

        Args:
            subject: text, or a class that has one (see `evbus.event`), which is then what the handler gets, unless it
                is annotated `Message`.
            handler: called, and awaited, with each message, in order. Its first parameter decides what it gets:
                the payload decoded into the type it is annotated with, or the `Message` if it has no annotation. If the
                message is a query, a value that it returns, or publishes on the query's subject meanwhile, is the
                answer. Without a handler, iterate over the subscription.
            type: what the handler gets, instead of what its annotation says.
            group: each message goes to one member of the group.
            concurrency: how many messages are handled at the same time; more than 1 gives up their order.
            max_pending_msgs, max_pending_bytes: what may wait for the handler; by default as `limits` say.
            overflow: what becomes of a message that finds no room: "close" ends the subscription with SlowConsumerError
                (given to `on_error`); "drop_newest" and "drop_oldest" drop a message and count it; with "block" the
                server holds messages back until there is room, and publishers with `confirm` wait for that.
            on_gap: `on_gap(gap)` is told what the subscription missed (see `Gap`), where the handler runs, in order
                with the messages; without a handler, by the iteration before it gives the next message. Without it,
                `on_error` gets a SlowConsumerError for messages that were dropped.

        Raises:
            InvalidSubjectError, ConfigError, TypeError: the subject, an option or the handler makes no sense.
            PermissionDeniedError, RefusedError: the server does not allow it.
            ConnectionLostError: the connection was lost meanwhile; there is no subscription.
            ClientClosedError: the client is closed.
        """
        wishes = Wishes(type, group, concurrency, max_pending_msgs, max_pending_bytes, overflow, on_gap=on_gap)
        return await self._subscribe(subject, handler, wishes)

    async def unsubscribe(
        self,
        subject: str | type | AsyncSubscription,
        handler: Handler | None = None,
        *,
        drain: bool = False,
        timeout: float | None = 5.0,
    ) -> int:
        """End subscriptions: one, or those on exactly that subject or pattern, or of them those with that handler.

        Returns when the server has confirmed, with the number of messages that were waiting and are not handled. If
        there is no such subscription nothing happens.

        Args:
            drain, timeout: as for `AsyncSubscription.unsubscribe`; the seconds are for each one.
        """
        seconds = check_timeout(timeout, zero=True)
        unhandled = 0
        for subscription in matching(self._subscriptions, subject, handler):
            unhandled += await self._end(subscription, drain, seconds)
        return unhandled

    def _declare(self, subject: Any, wishes: Wishes) -> Callable[[F], F]:
        def decorate(handler: F) -> F:
            subscription = self._prepare(subject, handler, wishes)
            try:
                self._session.subscribe(subscription.interest)
            except BaseException:
                self._forget(subscription)
                raise
            return handler

        return decorate

    async def include(self, router: EventRouter) -> list[AsyncSubscription]:
        """Subscribe all handlers that the router has by now; all or none. Returns their subscriptions.

        Raises:
            Exception: as `subscribe`, for the first handler that cannot be subscribed.
        """
        made: list[AsyncSubscription] = []
        try:
            for one in router.declared():
                made.append(await self._subscribe(one.subject, one.handler, one.wishes))  # noqa: PERF401
        except BaseException:
            for subscription in made:
                await subscription.unsubscribe()
            raise
        return made

    async def _subscribe(self, subject: Any, handler: Handler | None, wishes: Wishes) -> AsyncSubscription:
        subscription = self._prepare(subject, handler, wishes)
        interest = subscription.interest
        try:
            await self._waiting.outcome(lambda notify: self._session.subscribe(interest, notify), None)
        except BaseException:
            self._forget(subscription)
            raise
        return subscription

    def _prepare(self, subject: Any, handler: Handler | None, wishes: Wishes) -> AsyncSubscription:
        if not isinstance(subject, str):
            subject, wanted = subscribed(subject, handler, wishes.type)
            wishes = replace(wishes, type=wanted)
        subscription = AsyncSubscription.make(
            self._session, subject, handler, wishes, self._waiting, self._tasks, self._end, self._executor
        )
        self._subscriptions[subscription.interest] = subscription
        return subscription

    def _forget(self, subscription: AsyncSubscription) -> None:
        self._subscriptions.pop(subscription.interest, None)
        self._session.unsubscribe(subscription.interest)
        subscription.ended()

    async def _end(self, subscription: AsyncSubscription, drain: bool, seconds: float | None) -> int:
        if subscription.interest not in self._subscriptions:
            return 0
        ending = Ending(self._session, subscription, drain, seconds, asyncio.current_task())
        try:
            with closing(ending.steps()) as steps:
                for start, left in steps:
                    with suppress(EvbusError):  # without the connection, or late, it is over too
                        await self._waiting.outcome(start, left)
        finally:
            self._subscriptions.pop(subscription.interest, None)
        return ending.unhandled

    # ---- publishing and asking ---------------------------------------------------------------------------------------

    # Overloads: a subject as text; a class and one of its messages; a message whose class has a subject.
    @overload
    async def publish(
        self,
        subject: str,
        message: object = ...,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> Receipt | None: ...
    @overload
    async def publish(
        self,
        subject: type[E],
        message: E,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> Receipt | None: ...
    @overload
    async def publish(
        self,
        subject: object,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> Receipt | None: ...
    async def publish(
        self,
        subject: Any,
        message: object = OMITTED,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> Receipt | None:
        """Publish a message. It is sent soon, in the order of the calls; `flush` waits until the server has it.

        Called by a handler of `subscribe` that is at a query, on the query's subject, it is the answer to the query.

        Args:
            subject: text; or the message itself, if its class has a subject (see `evbus.event`); or that class.
            message: bytes and str go as they are; dataclasses, Structs and containers are encoded. Nothing: no payload.
            headers: text to text, 16 KiB at most.
            confirm: wait until the server has queued the message for every matching subscriber, and return its Receipt.
            no_echo: not for this client's own subscriptions. A version-1 server does not know it.
            timeout: seconds to wait for room in a full buffer, and for the receipt; None: as long as the connection
                lasts. 0 without `confirm` never waits.

        Raises:
            NotConnectedError, ClientClosedError, InvalidSubjectError, CodecError, PayloadTooLargeError,
            BufferFullError:
                nothing was published.
            PermissionDeniedError, RefusedError: the server refused it (only with `confirm`, else see `flush`), or is of
                version 1 and does not know `no_echo`.
            ConfirmTimeoutError, ConnectionLostError: the outcome is unknown (only with `confirm`).

        Every 64 KiB the loop gets a turn, so that a task that only publishes holds up nobody. If the publish is
        cancelled, its outcome is unknown.
        """
        # The short way, for what is published by the million.
        if type(message) is bytes and headers is None and not confirm and not no_echo:
            status = self._pack_event(subject, message, _BYTES)
            if not status:
                return None
            if status == PACK_YIELD:
                await asyncio.sleep(0)
                return None
        outgoing = self._requests.publish(subject, message, headers, confirm, no_echo, timeout)
        receipt: Receipt | None = await self._waiting.carry(outgoing) if outgoing is not None else None
        return receipt

    @overload
    async def publish_many(
        self,
        subject: str,
        messages: Iterable[object],
        *,
        headers: Mapping[str, str] | None = None,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> int: ...
    @overload
    async def publish_many(
        self,
        subject: type[E],
        messages: Iterable[E],
        *,
        headers: Mapping[str, str] | None = None,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> int: ...
    async def publish_many(
        self,
        subject: Any,
        messages: Iterable[Any],
        *,
        headers: Mapping[str, str] | None = None,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish messages one after the other, as `publish` does each. Returns how many.

        Args:
            subject: text, or a class that has a subject (see `evbus.event`).
            messages: any iterable.
            headers, no_echo: for each of them, as for `publish`.
            timeout: seconds to wait for room, each time that the buffer is full; None: as long as the connection lasts.

        Raises:
            TypeError: `messages` is a single message, or there is no subject.
            Exception: as `publish`, for the first message that cannot be published, or from `messages` itself. Those
                before it are published.

        The loop gets its turns as with `publish`. Cancelled, some may have been published.
        """
        publishing = Publishing(self._requests, subject, messages, headers, no_echo, timeout)
        for outgoing in publishing:
            await self._waiting.carry(outgoing)
        return publishing.count

    async def flush(self, timeout: float | None = None) -> None:
        """Return when the server has taken everything that this client published so far.

        Raises:
            EvbusError: the first error that the server reported, since the last flush, for a publish without `confirm`,
                for example PermissionDeniedError.
            ConfirmTimeoutError: the server did not answer within `timeout` seconds.
            NotConnectedError, ConnectionLostError: no connection, or none any more.
        """
        await self._waiting.outcome(self._session.flush, check_timeout(timeout))
        self._requests.raise_unreported()

    # Overloads: a query class, which says its response; text and a response; a class with a subject, and a response.
    @overload
    async def query(
        self,
        subject: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    async def query(
        self,
        subject: str,
        message: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    async def query(
        self,
        subject: str,
        message: object = ...,
        response: type[T] = ...,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    async def query(
        self,
        subject: str,
        message: object = ...,
        response: Any = None,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Any: ...
    @overload
    async def query(
        self,
        subject: type[E],
        message: E,
        response: type[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    async def query(
        self,
        subject: object,
        *,
        response: type[T],
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    async def query(
        self,
        subject: Any,
        message: object = OMITTED,
        response: Any = None,
        *,
        timeout: float | None = 3.0,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask, and wait for the answer.

        Args:
            subject, message: as for `publish`.
            response: the type to decode the answer into; `Message` for the answer as it came; None for what a `Query`
                class says, and else the value as it was sent, in plain containers.
            timeout: seconds; None: a minute, which is also as long as servers wait at most.

        Raises:
            NoRespondersError: nobody is there to answer; told at once.
            RemoteError: the responder failed.
            ResponderLostError: the responder went away before it answered.
            QueryTimeoutError: no answer in time. The responder may have acted all the same.
            ConnectionLostError: so did our connection.
            CodecError: the answer does not fit `response`.
            NotConnectedError, InvalidSubjectError, PayloadTooLargeError, BufferFullError: nothing was asked.

        Cancelled, the query is taken back at the server.
        """
        return await self._waiting.ask(self._requests.query(subject, message, response, headers, timeout))

    # Overloads: as for query.
    @overload
    def query_all(
        self,
        subject: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: object = ...,
        response: type[T] = ...,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: object = ...,
        response: Any = None,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[Any]: ...
    @overload
    def query_all(
        self,
        subject: type[E],
        message: E,
        response: type[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[T]: ...
    @overload
    def query_all(
        self,
        subject: object,
        *,
        response: type[T],
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> AsyncReplies[T]: ...
    def query_all(
        self,
        subject: Any,
        message: object = OMITTED,
        response: Any = None,
        *,
        timeout: float | None = 3.0,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncReplies[Any]:
        """Ask everybody who answers, and take the replies as they come.

        If the subject has responders (`on_query`) all of them are asked, else all plain subscribers. Those that handle
        it but have no answer are waited for until the time is up.

        Args and errors: as for `query`; `timeout` is for all of it. Not awaited; the query is asked by the first step
        of the iteration, which raises what becomes of it. A failure of one responder is a `Reply` with an error.

        Raises:
            CodecError: nothing was asked.
        """
        return AsyncReplies(self._waiting, self._requests.query_all(subject, message, response, headers, timeout))
