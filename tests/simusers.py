"""Users of the simulated bus: the shipped session, connector and subscriptions, and a record of what each was told.

A `User` is what either client's shell is without its threads or its asyncio loop: `Shell` says which. It is connected,
and connected again, by the shipped `Connector` over `dial`; the record is kept by hooks at the seams of the product (a
connection is attached, the plan restored, the connection lost), so that it does not depend on what the product says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import TYPE_CHECKING, Any

from simnet import SERVER, SimTransport

from evbus._inbox import Waiter
from evbus._outbox import PACK_OK, PACK_YIELD, Clock
from evbus.connector import Connector, Dialled
from evbus.correlation import Sending
from evbus.errors import BufferFullError, ConnectError, EvbusError, NotConnectedError
from evbus.message import Gap, Message
from evbus.options import ClientLimits, Reconnect, SessionOptions
from evbus.reactor import EVENT_WRITE
from evbus.reports import Reports
from evbus.session import Session
from evbus.subscription import Subscription, Wishes
from evbus.wire import Codec

if TYPE_CHECKING:
    from simworld import World

BYTES = int(Codec.BYTES)


class Shell(Enum):
    """How the session is run."""

    BARE = "no lock, packets leave by the rules of a burst"
    THREADS = "the same with the lock of the synchronous client"
    ASYNCIO = "packets gather until the loop's next turn"


class Taking(Enum):
    """How a subscription's messages are taken."""

    PROMPT = "the handler runs in the next turn"
    LAZY = "the handler runs some time later"
    ITERATED = "a few messages at a time, by iteration"


@dataclass
class Published:
    """One message, and the connection that it was published on."""

    when: int
    user: int
    seq: int
    subject: str
    payload: bytes
    life: int = -1  # the number of the connection that it went out on; -1: not yet
    kept: bool = False  # there was none when it was published
    waiter: Waiter | None = None  # for its receipt
    outcomes: int = 0


@dataclass
class Asked:
    """One query."""

    when: int
    payload: bytes
    subject: str
    many: bool
    patient: bool
    life: int
    waiter: Waiter
    outcomes: int = 0
    expired: bool = False


@dataclass
class Life:
    """One connection whose handshake was good. Moments, see `World.tick`."""

    attached: int
    restored: int
    ready: int | None = None
    lost: int | None = None


@dataclass
class Sub:
    """One subscription, and what its user was told there."""

    user: User
    pattern: str
    wishes: Wishes
    taking: Taking
    made: int
    log: list[bytes | Gap | None] = field(default_factory=list)  # None: a query
    wanted: dict[int, int] = field(default_factory=dict)  # by connection: from when on the server may know of it
    active: dict[int, int] = field(default_factory=dict)  # by connection: from when on the server knows of it
    restores: list[int] = field(default_factory=list)  # after how many messages a reconnect is to be told
    left: int | None = None
    left_at: int = 0  # entries in the log when it was left
    ended: Exception | None = None  # what the iteration ended with
    subscription: Subscription = field(init=False)

    @property
    def messages(self) -> list[bytes]:
        return [entry for entry in self.log if isinstance(entry, bytes)]

    @property
    def gaps(self) -> list[Gap]:
        return [entry for entry in self.log if isinstance(entry, Gap)]

    def take(self, count: int) -> int:
        """Iterate for so many messages at most; returns how many there were."""
        for taken in range(count):
            try:
                message = self.subscription.next(0)
            except (TimeoutError, StopIteration):
                return taken
            except EvbusError as exc:
                self.ended = exc
                return taken
            self.log.append(message.data)
        return count


class User:
    """One client and its user.

    Attributes:
        lives: its connections, in order.
        jobs: handlers that are to be run some time later.
        stuck: messages that found the buffer full.
        wrong: promises that were broken in a way that can only be seen at the time.
    """

    def __init__(
        self,
        world: World,
        number: int,
        shell: Shell,
        reconnect: Reconnect,
        *,
        limits: ClientLimits | None = None,
        servers: tuple[tuple[str, int], ...] = (SERVER,),
    ) -> None:
        self.world = world
        self.number = number
        self.shell = shell
        self.lives: list[Life] = []
        self.subs: list[Sub] = []
        self.asked: list[Asked] = []
        self.jobs: list[Callable[[], None]] = []
        self.stuck: deque[tuple[Sending, Published | None]] = deque()
        self.errors: list[BaseException] = []
        self.wrong: list[str] = []
        self.sent = 0
        self.keeps = reconnect.buffer_bytes > 0
        self.was_ready = False
        net = self.net = world.net
        self.clock = Clock(net.wall_ms())
        self.session = Session(
            SessionOptions(name=f"user-{number}", reconnect=reconnect, limits=limits or ClientLimits()),
            self.clock,
            Reports(net.reactor().call_soon, lambda error, _: self.errors.append(error)),
            random=Random(net.seed * 100 + number),
            lock=threading.RLock() if shell is Shell.THREADS else nullcontext(),
        )
        if shell is Shell.ASYNCIO:
            self.session.outbox.gather()
        self.session.answers.send = lambda sending: self.push(sending, None)
        self.session.outbox.on_room = lambda: net.reactor().call_soon(self._unstick)
        self.connector = Connector(net.reactor(), self.session, servers, self.dial, Random(net.seed * 101 + number))
        self._watch()

    # ---- connections -------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        self.connector.connect(1000.0, True, lambda: None)

    def dial(self, server: tuple[str, int], timeout_s: float, dialled: Dialled) -> None:
        """Connect as a socket does: writable once there is a connection, or none."""
        reactor = self.net.reactor()
        transport = self.net.connect(server)

        def done(error: str) -> None:
            reactor.unregister(transport)
            watch.cancel()
            if error:
                transport.close()
                dialled(ConnectError(str(server), error))
            else:
                dialled(transport)

        def ready(_mask: int) -> None:
            if transport.broken is not None:
                done(transport.broken.strerror or "broken")
            elif transport.established:
                done("")

        reactor.register(transport, EVENT_WRITE, ready)
        watch = reactor.call_later(timeout_s, lambda: done("timed out"))

    def _watch(self) -> None:
        """Write down what happens to the connection, at the product's seams."""
        core, registrar, world = self.connector.core, self.session.registrar, self.world
        attach, restore, lost = core.attach, registrar.restore, core.on_lost
        assert lost is not None
        attached = 0

        def on_attach(transport: Any, timeout_s: float, notify: Callable[[], object]) -> Waiter:
            nonlocal attached
            attached = world.tick()
            before = len(self.lives)

            def shaken() -> None:
                # Failed is the waiter if the connection was lost meanwhile.
                if len(self.lives) > before and self.session.is_ready:
                    self._ready()
                notify()

            return attach(transport, timeout_s, shaken)

        def on_restore() -> None:
            number = len(self.lives)
            self.lives.append(Life(attached, world.tick()))
            for sub in self.subs:
                if sub.subscription.is_active:
                    sub.wanted[number] = world.tick()
                    if self.was_ready:
                        sub.restores.append(sub.subscription.received)
            restore()

        def on_lost() -> None:
            world.lost_at = world.tick()
            if self.lives and self.lives[-1].lost is None:
                self.lives[-1].lost = world.lost_at
            lost()

        core.attach = on_attach  # type: ignore[method-assign, assignment]
        registrar.restore = on_restore  # type: ignore[method-assign]
        core.on_lost = on_lost

    def _ready(self) -> None:
        number = len(self.lives) - 1
        life = self.lives[number]
        life.ready = self.world.tick()
        self.was_ready = True
        for sub in self.subs:
            if number in sub.wanted and sub.wanted[number] < life.ready:
                sub.active.setdefault(number, life.ready)

    def lasts(self, life: int) -> bool:
        """Whether that connection is the one that there is."""
        return life == len(self.lives) - 1 and self.lives[life].lost is None and self.session.is_ready

    # ---- subscriptions -----------------------------------------------------------------------------------------------

    def subscribe(
        self,
        pattern: str,
        taking: Taking = Taking.PROMPT,
        answer: Callable[[Message], object] | None = None,
        **wishes: Any,
    ) -> Sub:
        """Subscribe, connected or not."""
        sub = Sub(self, pattern, Wishes(**wishes), taking, self.world.tick())
        sub.wishes = Wishes(**wishes, on_gap=sub.log.append)

        def handler(message: Message) -> object:
            if message.is_query:
                sub.log.append(None)
                return answer(message) if answer is not None else None
            sub.log.append(message.data)
            return None

        submit = self.net.reactor().call_soon if taking is Taking.PROMPT else lambda job: self.jobs.append(job)
        sub.subscription = Subscription.make(
            self.session,
            pattern,
            handler if taking is not Taking.ITERATED else None,
            sub.wishes,
            submit,
            lambda *_: 0,
        )
        self.subs.append(sub)
        life = len(self.lives) - 1

        def told() -> None:
            if waiter is not None and error_of(waiter) is None:
                sub.active[life] = self.world.tick()

        waiter = self.session.subscribe(sub.subscription.interest, told)
        if waiter is not None:
            sub.wanted[life] = self.world.tick()
        return sub

    def unsubscribe(self, sub: Sub) -> None:
        """End a subscription, connected or not."""
        sub.left = self.world.tick()
        sub.left_at = len(sub.log)
        self.session.unsubscribe(sub.subscription.interest, lambda: None)
        sub.subscription.ended()

    # ---- messages ----------------------------------------------------------------------------------------------------

    def publish(self, subject: str, size: int, *, confirm: bool = False) -> None:
        """Publish, as the clients do: the short way if there is nothing special to it."""
        self.sent += 1
        session = self.session
        payload = b"%d:%d:" % (self.number, self.sent) + b"." * size
        message = Published(self.world.tick(), self.number, self.sent, subject, payload)
        if (
            not confirm
            and not self.stuck
            and session.outbox.pack_event(subject, payload, BYTES) in (PACK_OK, PACK_YIELD)
        ):
            self._sent(message)
            return

        def outcome() -> None:
            message.outcomes += 1

        sending = session.publish(subject, Codec.BYTES, payload, confirm=confirm, notify=outcome if confirm else None)
        message.waiter = sending.waiter
        self.push(sending, message)

    def _sent(self, message: Published) -> None:
        message.kept = not self.session.is_connected
        message.life = len(self.lives) - 1 + message.kept
        self.world.published[message.payload] = message

    def query(self, subject: str, *, many: bool = False, timeout: float = 20.0) -> None:
        """Ask, and keep the deadline as the shells do."""
        self.sent += 1
        payload = b"%d?%d" % (self.number, self.sent)
        number = len(self.lives) - 1

        def outcome() -> None:
            asked.outcomes += waiter is not None and waiter.done

        sending = self.session.query(subject, Codec.BYTES, payload, notify=outcome, timeout=timeout, many=many)
        waiter = sending.waiter
        assert waiter is not None
        asked = Asked(self.world.tick(), payload, subject, many, timeout > 1, number, waiter)

        def expire() -> None:
            if not asked.waiter.done:
                asked.expired = True
                asked.outcomes += 1
                self.session.correlation.expire(asked.waiter, timeout)

        try:
            if not sending.pack():
                return
        except NotConnectedError:
            return
        self.asked.append(asked)
        self.net.reactor().call_later(timeout, expire)

    def push(self, sending: Sending, message: Published | None) -> None:
        """Pack now, or in its turn when there is room."""
        if self.stuck or not self._pack(sending, message):
            self.stuck.append((sending, message))
            if not self.session.outbox.want_room():
                self._unstick()

    def _pack(self, sending: Sending, message: Published | None) -> bool:
        """False: there is no room."""
        try:
            if not sending.pack():
                return False
        except BufferFullError:
            return True
        except NotConnectedError:
            if self.session.is_connected or (self.keeps and self.was_ready and message and not message.waiter):
                self.wrong.append(f"user {self.number}: a publish was refused ({self.session.status.name})")
            return True
        if message is not None:
            self._sent(message)
        return True

    def _unstick(self) -> None:
        while self.stuck:
            if not self._pack(*self.stuck[0]):
                if self.session.outbox.want_room():
                    return
                continue
            self.stuck.popleft()

    # ---- time --------------------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """Run the handlers that are to be run some time; returns whether there was anything."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()
        return bool(jobs)


def error_of(waiter: Waiter) -> EvbusError | None:
    """The exception that it ended with; None if it ended well."""
    try:
        waiter.result()
    except EvbusError as exc:
        return exc
    return None


def transport_of(user: User) -> SimTransport | None:
    """The connection that it has, for faults by hand."""
    transport = user.connector.core._transport
    assert transport is None or isinstance(transport, SimTransport)
    return transport
