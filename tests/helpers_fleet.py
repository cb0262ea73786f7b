"""Many clients of both kinds that publish to each other while their connections are lost, and a checker of what came.

Every member publishes one numbered stream and subscribes to its own and to some others'. What a member sent, and what
the server said of it, is written down; so is what each subscriber got, in its order. `check` compares the sets: nothing
twice, nothing out of order per (publisher, subscriber), and nothing lost of what the server confirmed.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

from evbus import (
    AsyncEventClient,
    BufferFullError,
    ConfirmTimeoutError,
    ConnectionLostError,
    ConnectStatus,
    EventClient,
    NotConnectedError,
    Reconnect,
)

__all__ = ["Blocking", "Fleet", "Found", "Member", "percentile", "run_blocking"]

PATIENCE_S = 60.0
#: Other members' streams that a member subscribes to, by distance; of few members, some fall together.
NEIGHBOURS = (1, 7, 31)
#: What a member keeps while it is away: a dozen messages.
BUFFER_BYTES = 1024


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * share) - 1, 0)]


def run_blocking(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it suspended")


class Blocking:
    """An EventClient whose blocking methods are awaited, so that one coroutine function drives both kinds."""

    _AWAITED = frozenset({"connect", "wait_connected", "subscribe", "publish", "rtt", "disconnect"})

    def __init__(self, client: EventClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if name not in self._AWAITED:
            return method

        async def awaited(*args: Any, **options: Any) -> Any:
            return method(*args, **options)

        return awaited


@final
@dataclass
class Member:
    """One client, what it sent and what it got."""

    number: int
    client: Any
    sleep: Callable[[float], Coroutine[Any, Any, object]]
    confirmed: dict[int, int] = field(default_factory=dict)
    """Sequence numbers that the server confirmed, with the receivers that it counted."""
    unknown: set[int] = field(default_factory=set)
    """Those whose confirmation was under way when the connection was lost."""
    kept: list[int] = field(default_factory=list)
    """Those published without a connection and kept for the next one."""
    refused: set[int] = field(default_factory=set)
    """Those that raised: never sent."""
    full: int = 0
    """How often the buffer was full, and said so."""
    got: list[tuple[int, int]] = field(default_factory=list)
    """(publisher, sequence number) in the order of arrival; of one publisher, from one subscription."""
    away: threading.Event = field(default_factory=threading.Event)
    """Set when it has lost its connection and filled its buffer."""
    back_at: float = 0.0
    errors: list[BaseException] = field(default_factory=list)
    sent: int = 0

    @property
    def kind(self) -> str:
        """Which client it has."""
        return "plain" if isinstance(self.client, Blocking) else "asyncio"


@dataclass
class Found:
    """What the checker found."""

    published: int = 0
    confirmed: int = 0
    unknown: int = 0
    unknown_delivered: int = 0
    """Unconfirmed messages that reached somebody all the same."""
    kept: int = 0
    full: int = 0
    deliveries: int = 0
    duplicates: list[tuple[int, int, int]] = field(default_factory=list)
    """(publisher, sequence number, subscriber)"""
    reordered: list[tuple[int, int, int]] = field(default_factory=list)
    lost: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(publisher, sequence number, receivers that the server counted, receivers that got it)"""
    lost_kept: list[tuple[int, int]] = field(default_factory=list)
    """Kept messages that their publisher, who is subscribed to its own, did not get."""
    invented: list[tuple[int, int]] = field(default_factory=list)
    """Received, though publishing it had raised."""


class Fleet:
    """The members and their traffic. A context manager; leaving it ends everything.

    Args:
        port: the server's, on 127.0.0.1.
        plain: number of EventClients, each with a thread that publishes.
        asynchronous: number of AsyncEventClients, on one loop in a thread of its own.
        pause_s: between two publishes of one member, on average.
        keep: publish while away, until the buffer is full, and then wait for `go`. False: only wait for a connection.
    """

    def __init__(
        self, port: int, plain: int, asynchronous: int, *, pause_s: float = 0.1, keep: bool = True, **options: Any
    ) -> None:
        self.pause_s = pause_s
        self.keep = keep
        self.stopping = False
        self.patience_s = PATIENCE_S
        self.gaps: Counter[str] = Counter()
        self._options: dict[str, Any] = {"reconnect": Reconnect(buffer_bytes=BUFFER_BYTES if keep else 0), **options}
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="fleet-loop")
        self._loop_thread.start()
        self.members = [self._plain(number) for number in range(plain)]
        self.members += [self._asynchronous(number) for number in range(plain, plain + asynchronous)]
        self._threads = [
            threading.Thread(target=run_blocking, args=(self._live(one),), name=f"fleet-{one.number}")
            for one in self.members
            if one.kind == "plain"
        ]
        self._tasks: list[Any] = []

    def _plain(self, number: int) -> Member:
        async def sleep(seconds: float) -> None:
            time.sleep(seconds)  # noqa: ASYNC251 - of the blocking kind

        return Member(number, Blocking(EventClient(port=self._port, name=f"m{number}", **self._options)), sleep)

    def _asynchronous(self, number: int) -> Member:
        async def make() -> AsyncEventClient:
            return AsyncEventClient(port=self._port, name=f"m{number}", **self._options)

        return Member(number, self.on_loop(make()), asyncio.sleep)

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the fleet's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(self.patience_s)

    def each(self, function: Callable[[Member], Coroutine[Any, Any, Any]]) -> None:
        """For each member: run it where the member lives, and wait for all."""
        for one in self.members:
            if one.kind == "plain":
                run_blocking(function(one))

        async def rest() -> None:
            await asyncio.gather(*(function(one) for one in self.members if one.kind != "plain"))

        self.on_loop(rest())

    def __enter__(self) -> Fleet:
        self.each(self._begin)
        for thread in self._threads:
            thread.start()
        for one in self.members:
            if one.kind != "plain":
                self._tasks.append(asyncio.run_coroutine_threadsafe(self._live(one), self._loop))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
            self.each(lambda one: one.client.disconnect(kind is None))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(self.patience_s)
            self._loop.close()

    def stop(self) -> None:
        """No more is published."""
        self.stopping = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(self.patience_s)
        for task in self._tasks:
            task.result(self.patience_s)

    async def _begin(self, one: Member) -> None:
        count = len(self.members)
        await one.client.connect(10.0)

        def take(data: bytes) -> None:
            publisher, _, sequence = data.partition(b" ")
            one.got.append((int(publisher), int(sequence)))

        for publisher in sorted({one.number} | {(one.number + step) % count for step in NEIGHBOURS}):
            await one.client.subscribe(
                f"fleet.{publisher}", take, type=bytes, on_gap=lambda gap: self.gaps.update([gap.reason])
            )

    # ---- a member's life ---------------------------------------------------------------------------------------------

    async def _live(self, one: Member) -> None:
        dice = random.Random(one.number)
        try:
            while not self.stopping:
                await self._publish(one)
                await one.sleep(dice.uniform(0, 2 * self.pause_s))
        except BaseException as exc:
            one.errors.append(exc)
            raise

    def _next(self, one: Member) -> tuple[str, bytes]:
        one.sent += 1
        return f"fleet.{one.number}", b"%d %d" % (one.number, one.sent)

    async def _publish(self, one: Member) -> None:
        subject, data = self._next(one)
        sequence = one.sent
        try:
            receipt = await one.client.publish(subject, data, confirm=True, timeout=20.0)
        except NotConnectedError:
            one.refused.add(sequence)
        except (ConnectionLostError, ConfirmTimeoutError):
            one.unknown.add(sequence)
        else:
            one.confirmed[sequence] = receipt.receivers
            return
        await self._return(one)

    async def _return(self, one: Member) -> None:
        while self.keep and one.client.status is ConnectStatus.RECONNECTING:
            subject, data = self._next(one)
            try:
                await one.client.publish(subject, data)
            except BufferFullError:
                one.refused.add(one.sent)
                one.full += 1
                break
            one.kept.append(one.sent)
        one.away.set()
        await one.client.wait_connected(self.patience_s)
        one.back_at = time.monotonic()

    # ---- what the test does ------------------------------------------------------------------------------------------

    def forget_back(self) -> None:
        """Before a loss."""
        for one in self.members:
            one.away.clear()
            one.back_at = 0.0

    def wait_away(self) -> None:
        """Until each has noticed the loss."""
        for one in self.members:
            assert one.away.wait(self.patience_s), (one.number, one.client.status, one.errors)

    def wait_back(self, since: float) -> list[float]:
        """Until each is connected with all its subscriptions active; the seconds that it took them."""
        deadline = time.monotonic() + self.patience_s
        while not all(one.back_at for one in self.members):
            assert time.monotonic() < deadline, [one.number for one in self.members if not one.back_at]
            time.sleep(0.01)
        return [one.back_at - since for one in self.members]

    def settle(self) -> None:
        """Until all that the server confirmed has been handled, or cannot come any more."""
        self.each(lambda one: one.client.rtt(20.0))
        deadline = time.monotonic() + 10.0
        while any(one.client.stats().pending_msgs for one in self.members) and time.monotonic() < deadline:
            time.sleep(0.01)

    def check(self) -> Found:
        """Compare what was sent, what was confirmed and what came. After the end."""
        for one in self.members:
            assert not one.errors, (one.number, one.errors)
        found = Found()
        receivers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for one in self.members:
            last: dict[int, int] = {}
            for publisher, sequence in one.got:
                if one.number in receivers[publisher, sequence]:
                    found.duplicates.append((publisher, sequence, one.number))
                elif sequence < last.get(publisher, 0):
                    found.reordered.append((publisher, sequence, one.number))
                receivers[publisher, sequence].add(one.number)
                last[publisher] = max(sequence, last.get(publisher, 0))
                found.deliveries += 1
        for one in self.members:
            found.published += one.sent - len(one.refused)
            found.confirmed += len(one.confirmed)
            found.unknown += len(one.unknown)
            found.unknown_delivered += sum((one.number, sequence) in receivers for sequence in one.unknown)
            found.kept += len(one.kept)
            found.full += one.full
            for sequence, counted in one.confirmed.items():
                reached = len(receivers[one.number, sequence])
                if reached < counted:
                    found.lost.append((one.number, sequence, counted, reached))
            found.lost_kept += [
                (one.number, sequence) for sequence in one.kept if one.number not in receivers[one.number, sequence]
            ]
            found.invented += [
                (one.number, sequence) for sequence in one.refused if (one.number, sequence) in receivers
            ]
        return found
