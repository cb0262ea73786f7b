"""The synchronous client: a thin shell that waits and wakes. What is said and heard is the session's business.

Threads. A connected client has a pool of threads. One of them moves bytes; handlers and callbacks run on the others,
one per subscription that has something to do. The parts change hands (see `io_thread`), but the thread that reads never
runs user code. Idle threads go after some seconds. All are daemons.

A client does not survive `os.fork()`: connect in the process that uses it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from evbus._clock import SystemClock
from evbus._message import Message
from evbus.declaring import Declaring
from evbus.dial import DEFAULT_HOST, DEFAULT_PORT, Server, check_servers, dial
from evbus.endings import Closing, Ending
from evbus.errors import ClientClosedError, ConfigError, EvbusError
from evbus.events import Answering, Handling, Query, subscribed
from evbus.gaps import OnGap
from evbus.io_thread import IoThread
from evbus.message import ClientOptions, ClientStats, ConnectStatus, Receipt, Unfinished
from evbus.options import ClientLimits, Reconnect, SessionOptions, check_reconnect, check_timeout
from evbus.payload import OMITTED, codec_from_name
from evbus.plan import Interest
from evbus.reactor import Reactor
from evbus.reports import Reports
from evbus.requests import Publishing, Requests
from evbus.routers import EventRouter
from evbus.session import Session
from evbus.signatures import Handler
from evbus.subscription import Subscription, Wishes, matching
from evbus.sync_replies import Replies
from evbus.transport import Transport
from evbus.waiting import Waiting
from evbus.wire import Codec
from evbus.workers import SerialQueue, WorkerPool

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EventClient", "connect"]

T = TypeVar("T")
E = TypeVar("E")
Q = TypeVar("Q", bound=Query[Any])
F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("evbus.client")

_BYTES = int(Codec.BYTES)
# What stands for "no limit" where the time has to be counted.
_LONG_S = 3600.0 * 24 * 365


class EventClient(Declaring):
    """A client of an event bus server.

    ::

        with EventClient("127.0.0.1", 9100) as bus:
            bus.publish("email.new", Email("hello", "..."))

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

    Both callbacks run one call at a time, in order, on a worker thread, except that handlers' errors are told on the
    handler's own thread.

    Raises:
        ConfigError: an option makes no sense.

    Every method may be called from any thread, and from handlers and callbacks.
    """

    # The network: what the testing kit puts its memory in the place of.
    _dial: Callable[[Server, float], Transport] = staticmethod(dial)
    _make_reactor: Callable[[], Reactor] = Reactor

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
    ) -> None:
        places = check_servers(host, port, servers)
        self._options = SessionOptions(
            name=name if name is not None else "",
            token=auth if auth is not None else "",
            heartbeat_s=heartbeat,
            codec=codec_from_name(codec),
            limits=limits if limits is not None else ClientLimits(),
            reconnect=check_reconnect(reconnect),
            warn_after_s=warn_after,
        )
        self._pool = WorkerPool("evbus-worker")
        reports = Reports(SerialQueue(self._pool).post, on_error, on_status)
        self._session = Session(self._options, SystemClock(), reports, lock=threading.RLock())
        self._session.address = str(places[0])
        self._waiting = Waiting(self._session)
        self._requests = Requests(self._session)
        self._session.answers.send = lambda sending: self._waiting.push(sending, None)
        self._pack_event = self._session.outbox.pack_event
        self._io = IoThread(self._session, places, self._dial_now, self._pool, self._make_reactor)
        self._life = threading.RLock()  # connect and disconnect, one at a time
        self._subscriptions: dict[Interest, Subscription] = {}

    def _dial_now(self, server: Server, timeout_s: float) -> Transport:
        return self._dial(server, timeout_s)  # looked up each time: tests replace it

    # ---- connecting --------------------------------------------------------------------------------------------------

    def connect(self, timeout: float | None = 3.0, *, retry: bool = False) -> EventClient:
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
        with self._life:
            if self._session.is_closing:
                raise ClientClosedError("connect")
            if self._session.is_ready:
                return self
            seeking = self._session.is_reconnecting
            try:
                connector = self._io.start()
                # The connector keeps the deadline; what comes on top is for a thread that stands still.
                self._waiting.outcome(
                    lambda notify: self._io.call(lambda: connector.connect(seconds, retry, notify)),
                    seconds if seeking else seconds + 5.0,
                )
            except BaseException as exc:
                if not seeking:
                    self._io.stop()
                    self._session.gave_up(exc)
                raise
        return self

    def wait_connected(self, timeout: float | None = None) -> EventClient:
        """Return, with the client itself, as soon as there is a connection with every subscription active.

        Raises:
            ConnectError: there was none in time; the client goes on trying.
            NotConnectedError: none is being sought: call `connect`.
            ClientClosedError, ConnectionLostError: there will be none.
        """
        seconds = check_timeout(timeout)
        connector = self._io.connector
        if connector is None:
            raise self._session.not_connected("wait_connected")
        self._waiting.outcome(lambda notify: self._io.call(lambda: connector.expect(notify)), seconds)
        return self

    def disconnect(self, drain: bool = True, timeout: float = 5.0) -> Unfinished:
        """Close the client for good; another one must be made to connect again. Again: nothing happens.

        Args:
            drain: finish what was begun: no more messages are taken in, handlers finish those that wait, and the server
                takes everything published. False: whatever waits is discarded.
            timeout: seconds for the drain; what was not finished by then is logged and discarded.

        Returns:
            what was left; nothing if another call closes the client, or has closed it.

        A handler may call it; it does not wait for itself.
        """
        seconds = check_timeout(timeout, zero=True)
        if self._session.is_closing:  # by another thread, or by the one whose handler this is
            return Unfinished()
        self._io.interrupt()  # whoever is connecting need not wait for the end of it
        with self._life:
            if self._session.is_closing:
                return Unfinished()
            if drain and self._session.is_connected:
                self._drain(time.monotonic() + (_LONG_S if seconds is None else seconds))
            end = Closing(self._session)
            self._session.closed()
            self._io.stop()
            left = end.finish(list(self._subscriptions.values()), drain, threading.get_ident())
            self._subscriptions.clear()
            self._pool.close()
        return left

    def _drain(self, deadline: float) -> None:
        with suppress(EvbusError):  # no time left, or no connection: then there is nothing more to do
            self._waiting.outcome(self._session.drain, deadline - time.monotonic())
            self._pool.wait_idle(deadline - time.monotonic())
            self._waiting.outcome(self._session.flush, deadline - time.monotonic())

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
        return self._session.stats(self._pool.busy)

    @property
    def name(self) -> str:
        """What the server calls this client; empty if it was given no name."""
        return self._options.name

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """The subscriptions that were not unsubscribed yet, in the order in which they were made."""
        return tuple(self._subscriptions.values())

    def rtt(self, timeout: float | None = 3.0) -> float:
        """Seconds that the server takes to answer, everything sent before included.

        Raises:
            ConfirmTimeoutError: it did not answer in time.
            NotConnectedError, ConnectionLostError: no connection, or none any more.
        """
        begun = time.perf_counter()
        self._waiting.outcome(self._session.flush, check_timeout(timeout))
        return time.perf_counter() - begun

    def __enter__(self) -> EventClient:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def __repr__(self) -> str:
        return f"<EventClient of {self.address}, {self.status.value}>"

    # ---- subscribing -------------------------------------------------------------------------------------------------

    # Overloads: a subject as text; a class and its own type, or the Message; a class and another type.
    @overload
    def subscribe(
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
    ) -> Subscription: ...
    @overload
    def subscribe(
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
    ) -> Subscription: ...
    @overload
    def subscribe(
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
    ) -> Subscription: ...
    @overload
    def subscribe(
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
    ) -> Subscription: ...
    def subscribe(
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
    ) -> Subscription:
        """Subscribe to a subject, or a pattern: `*` stands for one token, a final `>` for one or more.

        On a connected client the subscription is active when this returns. Otherwise it becomes active with `connect`.

        Args:
            subject: text, or a class that has one (see `evbus.event`), which is then what the handler gets, unless it
                is annotated `Message`.
            handler: called with each message, in order, on a worker thread. Its first parameter decides what it gets:
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
        return self._subscribe(subject, handler, wishes)

    @overload
    def on_query(
        self, subject: str, *, type: Any = None, group: str | None = None, concurrency: int = 1
    ) -> Callable[[F], F]: ...
    @overload
    def on_query(  # type: ignore[overload-overlap]  # a query class is a class with a subject, and more is known of it
        self, subject: type[Q], *, group: str | None = None, concurrency: int = 1
    ) -> Answering[Q]: ...
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

        Args and errors: as for `subscribe`.
        """
        return self._declare(subject, Wishes(type, group, concurrency, responder=True))

    def _declare(self, subject: Any, wishes: Wishes) -> Callable[[F], F]:
        def decorate(handler: F) -> F:
            self._subscribe(subject, handler, wishes)
            return handler

        return decorate

    def include(self, router: EventRouter) -> list[Subscription]:
        """Subscribe all handlers that the router has by now; all or none. Returns their subscriptions.

        Raises:
            Exception: as `subscribe`, for the first handler that cannot be subscribed.
        """
        made: list[Subscription] = []
        try:
            for one in router.declared():
                made.append(self._subscribe(one.subject, one.handler, one.wishes))  # noqa: PERF401 - for the except
        except BaseException:
            for subscription in made:
                subscription.unsubscribe()
            raise
        return made

    def unsubscribe(
        self,
        subject: str | type[Any] | Subscription,
        handler: Handler | None = None,
        *,
        drain: bool = False,
        timeout: float | None = 5.0,
    ) -> int:
        """End subscriptions: one, or those on exactly that subject or pattern, or of them those with that handler.

        Returns when the server has confirmed, with the number of messages that were waiting and are not handled. If
        there is no such subscription nothing happens.

        Args:
            drain, timeout: as for `Subscription.unsubscribe`; the seconds are for each one.
        """
        seconds = check_timeout(timeout, zero=True)
        unhandled = 0
        for subscription in matching(self._subscriptions, subject, handler):
            unhandled += self._end(subscription, drain, seconds)
        return unhandled

    def _subscribe(self, subject: str | type, handler: Handler | None, wishes: Wishes) -> Subscription:
        if not isinstance(subject, str):
            subject, wanted = subscribed(subject, handler, wishes.type)
            wishes = replace(wishes, type=wanted)
        subscription = Subscription.make(self._session, subject, handler, wishes, self._io.submit, self._end)
        interest = subscription.interest
        self._subscriptions[interest] = subscription
        try:
            self._waiting.outcome(lambda notify: self._session.subscribe(interest, notify), None)
        except BaseException:
            self._subscriptions.pop(interest, None)
            self._session.unsubscribe(interest)
            subscription.ended()
            raise
        return subscription

    def _end(self, subscription: Subscription, drain: bool, seconds: float | None) -> int:
        if subscription.interest not in self._subscriptions:
            return 0
        ending = Ending(self._session, subscription, drain, seconds, threading.get_ident())
        try:
            with closing(ending.steps()) as steps:
                for start, left in steps:
                    with suppress(EvbusError):  # without the connection, or late, it is over too
                        self._waiting.outcome(start, left)
        finally:
            self._subscriptions.pop(subscription.interest, None)
        return ending.unhandled

    # ---- publishing and asking ---------------------------------------------------------------------------------------

    # Overloads: a subject as text; a class and one of its messages; a message whose class has a subject.
    @overload
    def publish(
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
    def publish(
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
    def publish(
        self,
        subject: object,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> Receipt | None: ...
    def publish(
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
        """
        # The short way, for what is published by the million.
        if (
            type(message) is bytes
            and headers is None
            and not confirm
            and not no_echo
            and not self._pack_event(subject, message, _BYTES)
        ):
            return None
        outgoing = self._requests.publish(subject, message, headers, confirm, no_echo, timeout)
        receipt: Receipt | None = self._waiting.carry(outgoing) if outgoing is not None else None
        return receipt

    @overload
    def publish_many(
        self,
        subject: str,
        messages: Iterable[object],
        *,
        headers: Mapping[str, str] | None = None,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> int: ...
    @overload
    def publish_many(
        self,
        subject: type[E],
        messages: Iterable[E],
        *,
        headers: Mapping[str, str] | None = None,
        no_echo: bool = False,
        timeout: float | None = None,
    ) -> int: ...
    def publish_many(
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
        """
        publishing = Publishing(self._requests, subject, messages, headers, no_echo, timeout)
        for outgoing in publishing:
            self._waiting.carry(outgoing)
        return publishing.count

    def flush(self, timeout: float | None = None) -> None:
        """Return when the server has taken everything that this client published so far.

        Raises:
            EvbusError: the first error that the server reported, since the last flush, for a publish without `confirm`,
                for example PermissionDeniedError.
            ConfirmTimeoutError: the server did not answer within `timeout` seconds.
            NotConnectedError, ConnectionLostError: no connection, or none any more.
        """
        self._waiting.outcome(self._session.flush, check_timeout(timeout))
        self._requests.raise_unreported()

    # Overloads: a query class, which says its response; text and a response; a class with a subject, and a response.
    @overload
    def query(
        self,
        subject: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    def query(
        self,
        subject: str,
        message: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    def query(
        self,
        subject: str,
        message: object = ...,
        response: type[T] = ...,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    def query(
        self,
        subject: str,
        message: object = ...,
        response: Any = None,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Any: ...
    @overload
    def query(
        self,
        subject: type[E],
        message: E,
        response: type[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    @overload
    def query(
        self,
        subject: object,
        *,
        response: type[T],
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> T: ...
    def query(
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
        """
        return self._waiting.ask(self._requests.query(subject, message, response, headers, timeout))

    # Overloads: as for query.
    @overload
    def query_all(
        self,
        subject: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: Query[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: object = ...,
        response: type[T] = ...,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[T]: ...
    @overload
    def query_all(
        self,
        subject: str,
        message: object = ...,
        response: Any = None,
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[Any]: ...
    @overload
    def query_all(
        self,
        subject: type[E],
        message: E,
        response: type[T],
        *,
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[T]: ...
    @overload
    def query_all(
        self,
        subject: object,
        *,
        response: type[T],
        timeout: float | None = ...,
        headers: Mapping[str, str] | None = ...,
    ) -> Replies[T]: ...
    def query_all(
        self,
        subject: Any,
        message: object = OMITTED,
        response: Any = None,
        *,
        timeout: float | None = 3.0,
        headers: Mapping[str, str] | None = None,
    ) -> Replies[Any]:
        """Ask everybody who answers, and take the replies as they come.

        If the subject has responders (`on_query`) all of them are asked, else all plain subscribers. Those that handle
        it but have no answer are waited for until the time is up.

        Args and errors: as for `query`; `timeout` is for all of it. The query is asked by the call itself; what becomes
        of it is raised by the iteration. A failure of one responder is a `Reply` with an error.

        Raises:
            NotConnectedError, InvalidSubjectError, CodecError, PayloadTooLargeError, BufferFullError, RefusedError:
                nothing was asked. RefusedError: a version-1 server does not know it.
        """
        return Replies(self._waiting, self._requests.query_all(subject, message, response, headers, timeout))


def connect(
    url: str = f"evbus://{DEFAULT_HOST}:{DEFAULT_PORT}",
    *,
    timeout: float | None = 3.0,
    retry: bool = False,
    **options: Unpack[ClientOptions],
) -> EventClient:
    """A connected client.

    Args:
        url: `evbus://host:port`, or several servers as `evbus://one:9100,two:9100`, or `unix:///path`. The scheme
            `evbus` and the port may be left out.
        timeout, retry: as for `EventClient.connect`.
        options: as for EventClient.

    Raises:
        ConfigError: the URL or an option makes no sense.
        ConnectError, NotEventServerError, AuthError: as for `EventClient.connect`.
    """
    for name in ("host", "port", "servers"):
        if name in options:
            raise ConfigError(name, "is part of the URL here: evbus.connect('host:port'), or EventClient(host, port)")
    return EventClient(servers=[url], **options).connect(timeout, retry=retry)
