"""A bus on the simulated network whose users lose their connections and get them back by themselves.

`simbus` holds the plain bus against its promises; this one is about what lasts longer than a connection: restored
subscriptions, gaps, kept publishes, groups, restarted servers, queries to all, overflow. Users are `simusers.User`s, so
every attempt to connect is the product's own.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from simnet import SimNet
from simusers import Published, Shell, Sub, Taking, User

from evbus.acceptor import Acceptor
from evbus.limits import Limits
from evbus.message import Gap, Message
from evbus.options import ClientLimits, Reconnect
from evbus.server_core import ServerCore

QUICK = {"first_delay_s": 0.02, "min_delay_s": 0.01, "max_delay_s": 0.1}
SUBJECTS = ("a.b", "a.c", "a.b.c", "x")
PATTERNS = ("a.b", "a.*", "a.>", ">", "x", "*.b")


class World:
    """One seed's server and users.

    Attributes:
        published: what was taken from a user to be published, by payload.
        lost_at: the moment of the last loss of any connection.
    """

    def __init__(self, net: SimNet, limits: Limits | None = None) -> None:
        self.net = net
        self.rng = Random(net.seed ^ 0x1A57)
        self.published: dict[bytes, Published] = {}
        self.users: list[User] = []
        self.lost_at = 0
        self.handled: dict[bytes, list[int]] = {}
        self._moment = 0
        self._limits = limits or Limits(handshake_s=30.0)
        self._start_server()

    def _start_server(self) -> None:
        net = self.net
        self.server = ServerCore(net.reactor(), self._limits, wall_ms=net.wall_ms)
        server = self.server
        self.acceptor = Acceptor(net.reactor(), [net.listen()], lambda transport, _peer: server.add(transport))

    def restart_server(self) -> None:
        """The server goes, with all it knows, and another one comes."""
        self.acceptor.close()
        self.server.close_all()
        self._start_server()

    def user(self, *, keeps: bool = False, limits: ClientLimits | None = None, shell: Shell | None = None) -> User:
        """Another user."""
        policy = Reconnect(**QUICK, buffer_bytes=1 << 20 if keeps else 0)  # type: ignore[arg-type]
        shell = shell or self.rng.choice(list(Shell))
        user = User(self, len(self.users), shell, policy, limits=limits)
        self.users.append(user)
        return user

    def tick(self) -> int:
        """Moments of the record, to compare what came before what."""
        self._moment += 1
        return self._moment

    def answerer(self, user: User) -> Callable[[Message], object]:
        """A responder's handler."""

        def answer(message: Message) -> object:
            self.handled.setdefault(message.data, []).append(user.number)
            if message.data.endswith(b"7"):
                raise ValueError("a question that ends in 7")
            return b"re:" + message.data

        return answer

    def start(self) -> None:
        """Let everybody get connected."""
        for user in self.users:
            user.connect()
        self.net.run_until(lambda: all(user.session.is_ready for user in self.users), 20_000)

    def rest(self) -> list[str]:
        """No more faults: everybody gets connected, and everything is handled. Returns what went wrong on the way."""
        for _ in range(3000):  # with a window of one message there is one in each round
            self.net.settle(seconds=0.5)
            if not self._handle() and all(user.session.is_ready for user in self.users):
                self.net.settle(seconds=25.0)
                if not self._handle():
                    break
        wrong = [f"exception {exc!r} in {where}" for exc, where in self.net.errors]
        wrong += [f"user {user.number} is {user.session.status}" for user in self.users if not user.session.is_ready]
        return wrong + [words for user in self.users for words in user.wrong]

    def _handle(self) -> bool:
        """Let all users take what waits; returns whether there was anything."""
        busy = [user.work() for user in self.users]
        lists = [sub for user in self.users for sub in user.subs if sub.taking is Taking.ITERATED and sub.ended is None]
        taken = [sub.take(1000) for sub in lists]
        return any(busy) or any(taken)

    def end(self) -> list[str]:
        """Everybody goes; returns what is left."""
        for user in self.users:
            user.session.closed()
            user.connector.close()
        self.net.settle(seconds=5.0)
        broker = self.server.broker
        left = {
            "peers": len(broker.peers),
            "subscriptions": broker.router.table.subscriptions,
            "pending queries": broker.router.queries.count,
            "bytes in rings": broker.pool.held_bytes,
        }
        return [f"left in the end: {count} {what}" for what, count in left.items() if count]


def matches(pattern: str, subject: str) -> bool:
    """The simplest possible matcher."""
    want, have = pattern.split("."), subject.split(".")
    if want[-1] == ">":
        return len(have) >= len(want) and all(w in ("*", h) for w, h in zip(want[:-1], have, strict=False))
    return len(want) == len(have) and all(w in ("*", h) for w, h in zip(want, have, strict=True))


# --- what was promised ------------------------------------------------------------------------------------------------


def name(sub: Sub) -> str:
    group = f" in {sub.wishes.group}" if sub.wishes.group else ""
    return f"user {sub.user.number} ({sub.user.shell.name}), {sub.pattern}{group}"


def out_of_order(world: World, sub: Sub) -> list[str]:
    """G1: what one connection of a publisher has sent comes in its order, and once."""
    wrong, last = [], {}
    seen: set[bytes] = set()
    for payload in sub.messages:
        message = world.published[payload]
        key = (message.user, message.life)
        if payload in seen:
            wrong.append(f"{name(sub)}: twice {payload[:12]!r}")
        elif last.get(key, 0) > message.seq:
            wrong.append(
                f"{name(sub)}: {message.seq} after {last[key]} of user {message.user}, connection {message.life}"
            )
        seen.add(payload)
        last[key] = message.seq
    return wrong


def sent_at(world: World, message: Published) -> int:
    """The moment from which on it was on its way."""
    return max(message.when, world.users[message.user].lives[message.life].restored) if message.kept else message.when


def on_its_way(world: World, message: Published) -> bool:
    """Whether the connection that it was sent on has lasted to the end."""
    return world.users[message.user].lasts(message.life)


def expected(world: World, sub: Sub) -> list[Published]:
    """G3, G4: what must have come, as both connections have lasted since."""
    life = len(sub.user.lives) - 1
    since = sub.active.get(life)
    if since is None or not sub.user.lasts(life) or sub.left is not None:
        return []
    return [
        message
        for message in world.published.values()
        if matches(sub.pattern, message.subject) and sent_at(world, message) > since and on_its_way(world, message)
    ]


def lost(world: World, sub: Sub) -> list[str]:
    have = set(sub.messages)
    return [
        f"{name(sub)}: lost {message.payload[:12]!r} on {message.subject}"
        for message in expected(world, sub)
        if message.payload not in have
    ]


def gaps_untold(sub: Sub) -> list[str]:
    """Each reconnect is told once, in its place."""
    if sub.left is not None:
        return []
    places, count = [], 0
    for entry in sub.log:
        if isinstance(entry, Gap):
            if entry.reason == "reconnect":
                places.append(count)
        else:
            count += 1
    # Two reconnects with no message between them may be told as one.
    if sorted(set(places)) == sorted(set(sub.restores)) and len(places) <= len(sub.restores):
        return []
    return [f"{name(sub)}: reconnects told after {places} messages, not {sub.restores}"]


def more_after_the_end(sub: Sub) -> list[str]:
    """An unsubscribed subscription gets nothing more, whatever is restored."""
    if sub.left is None or len(sub.log) <= sub.left_at:
        return []
    return [f"{name(sub)}: {len(sub.log) - sub.left_at} more after it was left"]


def outcomes(user: User, world: World) -> list[str]:
    """G12: each query and each confirmed publish has one outcome, and its own."""
    wrong = [
        f"user {user.number}, query {asked.payload!r}: {asked.outcomes} outcomes"
        for asked in user.asked
        if asked.outcomes != 1 or not asked.waiter.done
    ]
    wrong += [
        f"user {user.number}, publish {message.payload[:12]!r}: {message.outcomes} outcomes"
        for message in world.published.values()
        if message.user == user.number and message.waiter is not None and message.outcomes != 1
    ]
    if user.session.stats().malformed:
        wrong.append(f"user {user.number}: malformed packets")
    return wrong
