"""One subscription of the synchronous client, as its user holds it, and what both clients' subscriptions share."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from evbus._mailbox import (
    OVERFLOW_BLOCK,
    OVERFLOW_CLOSE,
    OVERFLOW_DROP_NEWEST,
    OVERFLOW_DROP_OLDEST,
    Batch,
    Mailbox,
)
from evbus._message import Message
from evbus.errors import ConfigError
from evbus.events import subscribed
from evbus.gaps import GapTeller, OnGap
from evbus.handlers import HandlerRunner
from evbus.options import check_timeout
from evbus.payload import Decoder
from evbus.plan import Interest
from evbus.session import Session
from evbus.signatures import Handler, decoder_for
from evbus.watch import watcher
from evbus.wire import Overflow, Role

__all__ = ["Subscription", "SubscriptionFacts", "Wishes", "look_after", "matching", "prepare"]


# What they mean for our own queue, and for the server's.
_OVERFLOWS = {
    "close": (OVERFLOW_CLOSE, Overflow.CLOSE),
    "block": (OVERFLOW_BLOCK, Overflow.BLOCK),
    "drop_newest": (OVERFLOW_DROP_NEWEST, Overflow.DROP_NEWEST),
    "drop_oldest": (OVERFLOW_DROP_OLDEST, Overflow.CLOSE),
}


@dataclass(frozen=True)
class Wishes:
    """The options of a subscription, see `EventClient.subscribe`."""

    type: Any = None
    group: str | None = None
    concurrency: int = 1
    max_pending_msgs: int | None = None
    max_pending_bytes: int | None = None
    overflow: str = "close"
    responder: bool = False
    on_gap: OnGap | None = None


def _positive(option: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not 1 <= value < 2**31:
        raise ConfigError(option, f"must be a whole number from 1 up, not {value!r}")
    return value


def prepare(
    session: Session, subject: str, handler: Handler | None, wishes: Wishes, *, coroutines: bool = False
) -> tuple[Interest, Decoder[Any] | None]:
    """An interest that no server knows yet, with its mailbox, and what makes the handler's argument.

    Args:
        coroutines: whether the handler may be a coroutine function.

    Raises:
        InvalidSubjectError, ConfigError, TypeError: something makes no sense.
    """
    limits = session.options.limits
    if wishes.overflow not in _OVERFLOWS:
        raise ConfigError("overflow", f"must be one of {', '.join(_OVERFLOWS)}, not {wishes.overflow!r}")
    if wishes.on_gap is not None and not callable(wishes.on_gap):
        raise ConfigError("on_gap", f"must be a function of one argument, not {wishes.on_gap!r}")
    if handler is None and wishes.type is not None:
        raise ConfigError("type", "needs a handler; messages that are iterated over are decoded by Message.decode")
    codec = session.options.codec
    decoder = decoder_for(handler, wishes.type, codec, coroutines=coroutines) if handler is not None else None
    role = Role.RESPONDER if wishes.responder else Role.SUBSCRIBER
    own, servers = _OVERFLOWS[wishes.overflow]
    interest = Interest(session.registrar.new_sid(), subject, role=role, group=wishes.group, overflow=servers)
    interest.mailbox = Mailbox(
        interest,
        interest.sid,
        tally=session.registrar.tally,
        max_msgs=_positive("max_pending_msgs", wishes.max_pending_msgs, limits.pending_msgs),
        max_bytes=_positive("max_pending_bytes", wishes.max_pending_bytes, limits.pending_bytes),
        overflow=own,
        concurrency=_positive("concurrency", wishes.concurrency, 1),
    )
    return interest, decoder


def look_after(session: Session, runner: HandlerRunner) -> None:
    """Let slow calls of a handler be reported, as its client's options say."""
    limit = session.options.warn_after_s
    if limit is not None:
        watcher.add(runner, limit)


class SubscriptionFacts:
    """What the subscriptions of both clients tell of themselves."""

    def __init__(
        self, interest: Interest, handler: Handler | None, gaps: GapTeller, runner: HandlerRunner | None
    ) -> None:
        self.interest = interest
        self.runner = runner
        self._gaps = gaps
        self._mailbox = interest.mailbox
        self._handler = handler

    @property
    def subject(self) -> str:
        """The subject or pattern."""
        return self.interest.subject

    @property
    def group(self) -> str | None:
        """The group that shares the messages; None if there is none."""
        return self.interest.group or None

    @property
    def handler(self) -> Handler | None:
        """The handler; None if messages are taken by iteration."""
        return self._handler

    @property
    def is_active(self) -> bool:
        """Whether it was neither unsubscribed nor ended by an error. While the client is not connected, an active
        subscription waits to be restored.
        """
        return self.interest.active

    @property
    def received(self) -> int:
        """Messages that came in so far; those dropped do not count."""
        return self._mailbox.received

    @property
    def handled(self) -> int:
        """Messages that the handler has finished with, or that were taken by iteration. Counted in batches, so it lags
        behind a little while messages come.
        """
        return self._mailbox.handled

    @property
    def dropped(self) -> int:
        """Messages that found the queue full, or the subscription ended."""
        return self._mailbox.dropped

    @property
    def missed(self) -> int:
        """Messages that gaps told of: dropped by `overflow` here, or by the server. Gaps of unknown size count none."""
        return self._mailbox.missed

    @property
    def discarded(self) -> int:
        """Messages that were waiting when the subscription was unsubscribed."""
        return self._mailbox.discarded

    @property
    def errors(self) -> int:
        """Messages whose handler raised, or that did not fit its type."""
        return self._mailbox.errors

    @property
    def pending_msgs(self) -> int:
        """Messages that wait for the handler or the iteration."""
        return self._mailbox.pending_msgs

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and the handler is not at work."""
        return self._mailbox.is_idle

    @property
    def pending_bytes(self) -> int:
        """Bytes of payload and headers that are kept for it."""
        return self._mailbox.pending_bytes

    def __repr__(self) -> str:
        state = "" if self.is_active else ", ended"
        group = f" in group {self.group!r}" if self.group else ""
        return f"<Subscription to {self.subject!r}{group}, {self.pending_msgs} waiting{state}>"


S = TypeVar("S", bound=SubscriptionFacts)


def matching(subscriptions: Mapping[Interest, S], subject: str | type | S, handler: Handler | None) -> list[S]:
    """Those that the arguments of `unsubscribe` mean.

    Raises:
        TypeError: there is no subject.
    """
    if isinstance(subject, SubscriptionFacts):
        return [one for one in list(subscriptions.values()) if one is subject]
    text, _ = subscribed(subject, None, None)
    return [
        one
        for one in list(subscriptions.values())
        if one.subject == text and (handler is None or one.handler == handler)
    ]


class Subscription(SubscriptionFacts):
    """What `EventClient.subscribe` returns.

    Without a handler it is an iterator of `Message`: `for message in subscription` waits for each next one and ends
    when the subscription does. If the connection is lost, the iterator raises ConnectionLostError once the messages
    received before are taken; if messages came faster than they were taken, SlowConsumerError.

    As a context manager it unsubscribes at the end. Any thread may use it; each message goes to one of the threads that
    iterate.
    """

    def __init__(
        self,
        interest: Interest,
        handler: Handler | None,
        gaps: GapTeller,
        runner: HandlerRunner | None,
        unsubscribe: Callable[[Subscription, bool, float | None], int],
    ) -> None:
        super().__init__(interest, handler, gaps, runner)
        self._unsubscribe = unsubscribe
        self._taking = threading.RLock()  # held while `on_gap` runs, which may ask for the next message itself
        # What happens to an iterator: True, there are messages and it is our turn to take them; an exception; None, the
        # end.
        self._news: queue.SimpleQueue[bool | Exception | None] = queue.SimpleQueue()
        self._batch: Batch | None = None
        self._may_take = False
        if handler is None:
            interest.mailbox.wake = lambda: self._news.put(True)
            interest.on_lost = self._on_lost

    @classmethod
    def make(
        cls,
        session: Session,
        subject: str,
        handler: Handler | None,
        wishes: Wishes,
        submit: Callable[[Callable[[], None]], object],
        unsubscribe: Callable[[Subscription, bool, float | None], int],
    ) -> Subscription:
        """A subscription that no server knows yet.

        Args:
            submit: runs a handler over what waits for it, on a thread where user code may run.
            unsubscribe: what the subscription's own method of that name is to do.

        Raises:
            InvalidSubjectError, ConfigError, TypeError: something makes no sense.
        """
        interest, decoder = prepare(session, subject, handler, wishes)
        mailbox = interest.mailbox
        gaps = GapTeller(session.reports, mailbox, subject, wishes.on_gap)
        if handler is None:
            return cls(interest, None, gaps, None, unsubscribe)
        runner = HandlerRunner(session, mailbox, subject, handler, decoder, gaps, responder=wishes.responder)

        def work() -> None:
            runner.run(threading.get_ident())

        mailbox.wake = lambda: submit(work)
        look_after(session, runner)
        return cls(interest, handler, gaps, runner, unsubscribe)

    # ---- use ---------------------------------------------------------------------------------------------------------

    def unsubscribe(self, *, drain: bool = False, timeout: float | None = 5.0) -> int:
        """End it. Returns when the server has confirmed, with the number of messages that were waiting and are not
        handled.

        Without `drain` no handler call begins after that, and what was waiting is discarded (counted in `discarded`);
        a handler call at work finishes. Again: nothing happens.

        Args:
            drain: no more messages come, and the handler finishes those that wait first. Its own handler does not wait
                for itself: what waits is handled after it. Of a subscription without a handler, what waits can still be
                taken; then the iteration ends.
            timeout: seconds for the drain; what is not handled by then is discarded. None: as long as it takes.
        """
        return self._unsubscribe(self, drain, check_timeout(timeout, zero=True))

    def next(self, timeout: float | None = None) -> Message:
        """The next message.

        Args:
            timeout: seconds to wait for it; None: as long as it takes. 0 takes one that is there.

        Raises:
            TimeoutError: none came in time.
            StopIteration: the subscription has ended.
            ConnectionLostError, SlowConsumerError: no more messages came because of that.
            TypeError: this subscription has a handler.
        """
        if self._handler is not None:
            raise TypeError(f"the subscription on {self.subject!r} has a handler, so there is nothing to iterate over")
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._taking.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            raise TimeoutError(f"no message on {self.subject!r} within {timeout:g} s")
        try:
            while True:
                if self._batch is not None:
                    message = next(self._batch, None)
                    if message is not None:
                        return message
                if self._may_take:
                    self._batch = self._mailbox.take(self._batch)
                    self._may_take = self._batch is not None
                    if self._batch is not None and not self._batch.plain:
                        self._gaps.tell(self._batch)
                else:
                    self._wait(deadline, timeout)
        finally:
            self._taking.release()

    def _wait(self, deadline: float | None, timeout: float | None) -> None:
        try:
            news = self._news.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError(f"no message on {self.subject!r} within {timeout:g} s") from None
        if news is True:
            self._may_take = True
            return
        if isinstance(news, Exception):
            raise news
        self._news.put(None)  # for whoever asks next
        raise StopIteration

    def _on_lost(self, error: Exception) -> None:
        self._news.put(error)
        if not self.interest.active:
            self._news.put(None)

    def ended(self, discard: bool = True) -> int:
        """See `endings.Endable`."""
        count = self._mailbox.clear() if discard else 0
        self._news.put(None)
        if self.runner is not None:
            watcher.remove(self.runner)
        return count

    def __iter__(self) -> Iterator[Message]:
        if self._handler is not None:
            self.next(0)  # says why not
        return self

    def __next__(self) -> Message:
        return self.next()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unsubscribe()
