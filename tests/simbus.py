"""A bus on the simulated network: the shipped server and client cores, random users, and what they were promised.

A `World` is one seed's server and clients. Its users do random things between the steps of the network; everything that
they are promised is written down when it happens and checked by `World.verdict` once the network has come to rest:

* order: what one publisher connection sends reaches one subscriber connection in the order sent (G1);
* no duplicates, and no loss between two connections that both last (G1, G3, G4);
* each query has exactly one outcome, and its answer is its own (G12);
* a query is put to at most one responder (G13);
* no answer reaches a client that does not wait for one (an answer is sent once);
* in the end nothing is left: no pending query, subscription, or byte in a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from simnet import SimNet, SimTransport

from evbus._inbox import Waiter
from evbus._mailbox import Mailbox
from evbus._outbox import Clock
from evbus.acceptor import Acceptor
from evbus.client_core import ClientCore
from evbus.errors import EvbusError
from evbus.gaps import GapTeller
from evbus.handlers import HandlerRunner
from evbus.limits import Limits
from evbus.message import Message
from evbus.options import SessionOptions
from evbus.plan import Interest
from evbus.reports import Reports
from evbus.server_core import ServerCore
from evbus.session import Session
from evbus.wire import Codec, Role

SUBJECTS = ("a.b", "a.c", "a.b.c", "x")
PATTERNS = ("a.b", "a.*", "a.>", ">", "x", "*.b", "nobody.here")
QUESTIONS = ("ask.one", "ask.plain", "ask.lost", "ask.nobody")


@dataclass
class Published:
    """One message, and the connection that it was published on."""

    when: int
    publisher: tuple[int, int]  # client, number of its connection
    subject: str
    payload: bytes


@dataclass
class Life:
    """One connection of one client, from the moment its subscriptions were active."""

    since: int
    until: int | None = None
    got: dict[int, list[bytes]] = field(default_factory=dict)  # by subscription


@dataclass
class Asked:
    """One query."""

    payload: bytes
    subject: str
    waiter: Waiter | None = None
    outcomes: int = 0


class User:
    """One client and its user."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.lives: list[Life] = []
        self.interests: list[Interest] = []
        self.asked: list[Asked] = []
        self.transport: SimTransport | None = None
        self.connecting: Waiter | None = None
        self.sent = 0
        reactor = world.net.reactor()
        self.session = Session(
            SessionOptions(name=f"user-{number}"),
            Clock(world.net.wall_ms()),
            Reports(reactor.call_soon),
            random=Random(world.net.seed * 100 + number),
        )
        self.session.address = "simulated"
        self.core = ClientCore(reactor, self.session)

    # ---- connections ----

    def begin_connecting(self) -> None:
        self.transport = self.world.net.connect()

    def look(self) -> None:
        """Go on with connecting, as far as the network is; notice a lost connection."""
        if self.transport is not None and self.connecting is None and not self.is_connected:
            if self.transport.broken is not None or self.transport.dead:
                self.transport.close()
                self.begin_connecting()
            elif self.transport.established:
                self.connecting = self.core.attach(self.transport, 30.0)
        if self.connecting is not None and self.connecting.done:
            waiter, self.connecting = self.connecting, None
            try:
                waiter.result()
            except EvbusError:
                self.begin_connecting()
                return
            self.lives.append(Life(self.world.tick()))
        if self.lives and self.lives[-1].until is None and not self.session.is_connected:
            self.lives[-1].until = self.world.tick()
            self.begin_connecting()

    @property
    def is_connected(self) -> bool:
        return bool(self.lives) and self.lives[-1].until is None

    # ---- what a user does ----

    def subscribe(
        self, pattern: str, role: Role = Role.SUBSCRIBER, answer: Callable[[Message], object] | None = None
    ) -> None:
        """Before the first connection, so that the subscription is active in each of its lives."""
        interest = Interest(self.session.registrar.new_sid(), pattern, role=role)
        box = interest.mailbox = Mailbox(interest, interest.sid)
        index = len(self.interests)

        def handler(message: Message) -> object:
            if message.is_query:
                return answer(message) if answer is not None else None
            life = self.lives[-1] if self.lives else None
            if life is None or life.until is not None or self.connecting is not None:
                # Came before this user has heard that the connection is there: it belongs to the next life.
                self.early.setdefault(index, []).append(message.data)
            else:
                life.got.setdefault(index, []).append(message.data)
            return None

        gaps = GapTeller(self.session.reports, box, pattern, None)
        runner = HandlerRunner(self.session, box, pattern, handler, None, gaps, responder=role is Role.RESPONDER)
        box.wake = lambda: self.world.net.reactor().call_soon(runner.run)
        self.interests.append(interest)
        assert self.session.subscribe(interest) is None

    early: dict[int, list[bytes]]

    def publish(self, subject: str) -> None:
        self.sent += 1
        life = len(self.lives) - 1
        payload = b"%d:%d:%d:" % (self.number, life, self.sent) + b"." * self.world.rng.choice((0, 10, 300, 3000))
        self.world.published.append(Published(self.world.tick(), (self.number, life), subject, payload))
        assert self.session.publish(subject, Codec.BYTES, payload).pack()

    def query(self, subject: str) -> None:
        self.sent += 1
        asked = Asked(b"%d?%d" % (self.number, self.sent), subject)

        def outcome() -> None:
            asked.outcomes += 1

        sending = self.session.query(subject, Codec.BYTES, asked.payload, notify=outcome, timeout=20.0)
        asked.waiter = sending.waiter
        assert sending.pack()
        self.asked.append(asked)


class World:
    """One seed: a server, some users, and a record of what they were promised."""

    def __init__(self, net: SimNet, *, users: int = 3, wrap: Callable[[SimTransport], object] | None = None) -> None:
        self.net = net
        self.rng = Random(net.seed ^ 0x5EED)
        self.published: list[Published] = []
        self.handled: dict[bytes, int] = {}
        self._moment = 0
        self.server = ServerCore(net.reactor(), Limits(handshake_s=30.0), wall_ms=net.wall_ms)
        wrap = wrap or (lambda transport: transport)
        self.acceptor = Acceptor(
            net.reactor(),
            [net.listen()],
            lambda transport, _peer: self.server.add(wrap(transport)),  # type: ignore[arg-type]
        )
        self.users = [User(self, number) for number in range(users)]
        for user in self.users:
            user.early = {}
            for pattern in self.rng.sample(PATTERNS, self.rng.randint(0, 3)):
                user.subscribe(pattern)
        for number in range(2):
            self.users[number % users].subscribe("ask.one", Role.RESPONDER, self.answer)
        self.users[-1].subscribe("ask.plain", answer=self.answer)
        self.users[0].subscribe("ask.lost", Role.RESPONDER, self.answer)

    def tick(self) -> int:
        """Moments of the record, to compare what came before what."""
        self._moment += 1
        return self._moment

    def answer(self, message: Message) -> object:
        self.handled[message.data] = self.handled.get(message.data, 0) + 1
        if message.data.endswith(b"7"):
            raise ValueError("a question that ends in 7")
        return b"re:" + message.data

    # ---- the run ----

    def start(self) -> None:
        for user in self.users:
            user.begin_connecting()
        for _ in range(3000):
            if all(user.is_connected for user in self.users):
                return
            self.net.step()
            for user in self.users:
                user.look()
        raise AssertionError(f"{self.net}: not everybody got connected")

    def run(self, steps: int) -> None:
        rng, users = self.rng, self.users
        for _ in range(steps):
            self.net.step()
            for user in users:
                user.look()
            roll = rng.random()
            if roll < 0.35:
                user = users[int(rng.random() * len(users))]
                if user.is_connected:
                    if roll < 0.27:
                        for _ in range(rng.choice((1, 1, 1, 5))):
                            user.publish(rng.choice(SUBJECTS))
                    else:
                        user.query(rng.choice(QUESTIONS))

    def verdict(self) -> list[str]:
        """Let everything come to rest; what was promised and did not hold, in words."""
        self.net.settle(seconds=25.0)
        wrong = [f"exception {exc!r} in {where}" for exc, where in self.net.errors]
        for user in self.users:
            wrong += self._check_deliveries(user)
            wrong += self._check_queries(user)
        wrong += [f"query {data!r} was put to {count} responders" for data, count in self.handled.items() if count > 1]
        return wrong + self._check_rest()

    def _lasted(self, client: int, life: int) -> bool:
        user = self.users[client]
        return user.lives[life].until is None and user.session.is_connected

    def _check_deliveries(self, user: User) -> list[str]:
        wrong = []
        for number, life in enumerate(user.lives):
            for index, interest in enumerate(user.interests):
                if interest.role is Role.RESPONDER or interest.subject.startswith("ask."):
                    continue
                got = life.got.get(index, [])
                where = f"user {user.number}, connection {number}, {interest.subject}"
                by_publisher: dict[bytes, list[int]] = {}
                for payload in got:
                    client, connection, seq = payload.split(b":")[:3]
                    by_publisher.setdefault(client + b":" + connection, []).append(int(seq))
                for publisher, seqs in by_publisher.items():
                    if seqs != sorted(set(seqs)):
                        wrong.append(f"{where}: out of order or twice from {publisher!r}: {seqs}")
                if not self._lasted(user.number, number):
                    continue
                have = set(got)
                wrong += [
                    f"{where}: lost {message.payload[:20]!r} on {message.subject}"
                    for message in self.published
                    if message.when > life.since
                    and self._lasted(*message.publisher)
                    and matches(interest.subject, message.subject)
                    and message.payload not in have
                ]
        return wrong

    def _check_queries(self, user: User) -> list[str]:
        wrong = []
        for asked in user.asked:
            where = f"user {user.number}, query {asked.payload!r} on {asked.subject}"
            assert asked.waiter is not None
            if asked.outcomes != 1 or not asked.waiter.done:
                wrong.append(f"{where}: {asked.outcomes} outcomes")
                continue
            try:
                answer = asked.waiter.result()
            except EvbusError:
                continue
            if answer.data != b"re:" + asked.payload:
                wrong.append(f"{where}: answered by {answer.data!r}")
        inbox = user.session.inbox
        if inbox.late_answers:
            wrong.append(f"user {user.number}: {inbox.late_answers} answers that nobody waited for")
        if user.session.stats().malformed:
            wrong.append(f"user {user.number}: malformed packets")
        return wrong

    def _check_rest(self) -> list[str]:
        wrong = []
        broker = self.server.broker
        if not broker.is_idle:
            wrong.append("the server still has something in flight")
        for user in self.users:
            user.core.close()
            if user.transport is not None:
                user.transport.close()
        self.net.settle()
        router = broker.router
        left = {
            "peers": len(broker.peers),
            "subscriptions": router.table.subscriptions,
            "trie nodes": router.table.nodes,
            "pending queries": router.queries.count,
            "bytes in rings": broker.pool.held_bytes,
        }
        return wrong + [f"left in the end: {count} {what}" for what, count in left.items() if count]


def matches(pattern: str, subject: str) -> bool:
    """The simplest possible matcher."""
    want, have = pattern.split("."), subject.split(".")
    if want[-1] == ">":
        return len(have) >= len(want) and all(w in ("*", h) for w, h in zip(want[:-1], have, strict=False))
    return len(want) == len(have) and all(w in ("*", h) for w, h in zip(want, have, strict=True))
