"""Subscriptions as the server is told of them: on request, again after a reconnect, and until they end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

from evbus._frame import pack
from evbus._inbox import Inbox, Waiter
from evbus._mailbox import Mailbox, Tally
from evbus._outbox import PACK_OK
from evbus.correlation import Correlation, Notify
from evbus.errors import EvbusError, RefusedError, SlowConsumerError
from evbus.plan import Interest, Plan
from evbus.wire import HEADER_BYTES_23, ErrorCode, ObjectId, Overflow, Role

__all__ = ["Registrar"]


class Registrar:
    """Keeps the plan, the inbox's mailboxes and the server's subscriptions in step.

    A version-2 server is told of each interest by its id. A version-1 server knows subjects only: it is told of the
    first interest in a subject and of the end of the last.

    Args:
        lock: held while these change.
        report: tells the user of an error that no call can raise.

    Attributes:
        plan: the interests.
        features: what the server of this connection has.
        tally: to be given to all mailboxes.
    """

    def __init__(
        self,
        plan: Plan,
        correlation: Correlation,
        lock: AbstractContextManager[object],
        report: Callable[[BaseException], object],
    ) -> None:
        self.plan = plan
        self.features: frozenset[str] = frozenset()
        self.tally = Tally()
        self._correlation = correlation
        self._inbox: Inbox = correlation.inbox
        self._outbox = correlation.outbox
        self._lock = lock
        self._report = report
        self._sids = itertools.count(1)
        self._asked: dict[bytes, Interest] = {}  # subscribes that the server has not answered, by their ids

    def new_sid(self) -> int:
        """An id for a subscription."""
        return next(self._sids)

    def add(self, interest: Interest, notify: Notify | None) -> Waiter | None:
        """Add an interest, and tell the server if there is one.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for.

        Raises:
            RefusedError: the server cannot have it.
        """
        with self._lock:
            first = self.plan.add(interest)
            self._inbox.add_mailbox(interest.mailbox)
            if not self._outbox.is_open:
                return None
            try:
                return self._subscribe(interest, first, notify)
            except RefusedError:
                self._forget(interest)
                raise

    def restore(self) -> None:
        """A new connection: tell the server of all interests, in their order."""
        told: set[bytes] = set()
        for interest in self.plan:
            if interest.leaving:
                continue
            try:
                self._subscribe(interest, interest.key not in told, None)
            except RefusedError as error:
                self._end(interest, error)
                self._report(error)
            told.add(interest.key)

    def _subscribe(self, interest: Interest, first: bool, notify: Notify | None) -> Waiter | None:
        waiter = self._correlation.waiter("subscribe", interest.subject, notify)
        now_ms = self._outbox.now_ms()
        overflow = self._overflow(interest)
        if self._inbox.is_announced:
            packet = pack(
                HEADER_BYTES_23,
                ObjectId.SUBSCRIBE,
                2,
                0,
                now_ms,
                "ssiBBs",
                waiter.task_id,
                interest.key,
                interest.sid,
                interest.role,
                overflow,
                interest.group,
            )
        elif interest.group or interest.tokens is not None:
            what = "groups" if interest.group else "patterns"
            raise RefusedError(ErrorCode.UNSUPPORTED, interest.subject, f"a version-1 server knows no {what}")
        elif not first:
            return None
        else:
            packet = pack(HEADER_BYTES_23, ObjectId.SUBSCRIBE, 1, 0, now_ms, "ss", waiter.task_id, interest.key)
        self._inbox.add_waiter(waiter)
        self._asked[waiter.task_id] = interest
        if overflow == Overflow.BLOCK:
            credit = interest.mailbox.open_window(self._inbox.limit_bytes)
            interest.mailbox.grant = lambda msgs: self._grant(interest, msgs)
            packet += self._credit_packet(interest, credit)
        if self._outbox.pack_control(packet, notify is not None) == PACK_OK:
            return waiter
        # The connection has just gone; the next one will be told.
        self._inbox.pop_waiter(waiter.task_id)
        self._asked.pop(waiter.task_id, None)
        return None

    def _overflow(self, interest: Interest) -> Overflow:
        """What to ask of the server; what it does not have is done in our own queue, if that is possible."""
        if interest.overflow == Overflow.BLOCK and "credit" not in self.features:
            raise RefusedError(
                ErrorCode.UNSUPPORTED, interest.subject, 'this server cannot hold messages back (overflow="block")'
            )
        if interest.overflow == Overflow.DROP_NEWEST and "drop_newest" not in self.features:
            return Overflow.CLOSE
        return interest.overflow

    def _grant(self, interest: Interest, msgs: int) -> None:
        """Messages are done with, so the server may send as many more. Any thread."""
        if interest.active and self._outbox.is_open:
            self._outbox.pack_control(self._credit_packet(interest, msgs))

    def _credit_packet(self, interest: Interest, msgs: int) -> bytes:
        if not msgs:
            return b""
        return pack(HEADER_BYTES_23, ObjectId.CREDIT, 1, 0, self._outbox.now_ms(), "ii", interest.sid, msgs)

    def remove(self, interest: Interest, notify: Notify | None) -> Waiter | None:
        """Take an interest out; nothing happens if it is gone. Its mailbox takes no more messages.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for.
        """
        with self._lock:
            if not interest.active:
                return None
            last = self._forget(interest)
            return None if interest.leaving else self._tell_end(interest, last, notify)

    def withdraw(self, interest: Interest, notify: Notify | None) -> Waiter | None:
        """Tell the server that an interest ends. What is on its way still finds its mailbox, until it is removed.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for.
        """
        with self._lock:
            if not interest.active or interest.leaving:
                return None
            interest.leaving = True
            others = (other for other in self.plan if other.key == interest.key)
            return self._tell_end(interest, all(other.leaving for other in others), notify)

    def _tell_end(self, interest: Interest, last: bool, notify: Notify | None) -> Waiter | None:
        if not self._outbox.is_open:
            return None
        waiter = self._correlation.waiter("unsubscribe", interest.subject, notify)
        packet = self._unsubscribe_packet(interest, last, waiter.task_id)
        if packet is None:
            return None
        self._inbox.add_waiter(waiter)
        if self._outbox.pack_control(packet, notify is not None) == PACK_OK:
            return waiter
        self._inbox.pop_waiter(waiter.task_id)
        return None

    def withdraw_all(self) -> None:
        """Tell the server that no more messages are wanted. What is on its way still finds its mailbox."""
        with self._lock:
            told: set[bytes] = set()
            for interest in self.plan:
                if interest.leaving:
                    continue
                packet = self._unsubscribe_packet(interest, interest.key not in told, b"")
                told.add(interest.key)
                if packet is not None:
                    self._outbox.pack_control(packet)

    def _unsubscribe_packet(self, interest: Interest, last: bool, task_id: bytes) -> bytes | None:
        now_ms = self._outbox.now_ms()
        if self._inbox.is_announced:
            return pack(HEADER_BYTES_23, ObjectId.UNSUBSCRIBE, 2, 0, now_ms, "si", task_id, interest.sid)
        if not last:
            return None
        return pack(HEADER_BYTES_23, ObjectId.UNSUBSCRIBE, 1, 0, now_ms, "ss", task_id, interest.key)

    def answered(self, task_id: bytes, error: EvbusError | None) -> None:
        """The server has spoken on a request; it may have been a subscribe. A refused one leaves the plan, or every new
        connection would be refused it again.
        """
        interest = self._asked.pop(task_id, None)
        if interest is not None and error is not None:
            self._end(interest, error)

    def overflowed(self, box: Mailbox) -> None:
        """A subscription with overflow="close" is full: it ends, and with it the flood."""
        interest = self.plan.find(box.sid)
        if interest is None:
            return
        if box.pending_msgs >= box.max_msgs:
            error = SlowConsumerError(interest.subject, box.pending_msgs, box.max_msgs, "messages")
        else:
            error = SlowConsumerError(interest.subject, box.pending_bytes, box.max_bytes)
        self.remove(interest, None)
        if interest.on_lost is not None:
            interest.on_lost(error)
        self._report(error)

    def tell_gap(self, count: int | None, reason: str) -> None:
        """Every subscriber may have missed messages; each is told before the next message that comes. Responders get no
        events, so they have missed none. On the core's thread; look at `inbox.take_ready` next.

        Args:
            count: how many; None if nobody knows.
            reason: "overflow" or "reconnect".
        """
        with self._lock:
            for interest in self.plan:
                if interest.role == Role.SUBSCRIBER:
                    self._inbox.put_gap(interest.mailbox, count, reason)

    def connection_lost(self) -> None:
        """What was asked is not answered any more."""
        self._asked.clear()

    def tell_all(self, error: Exception) -> None:
        """Tell every interest that no more messages will come for now."""
        for interest in self.plan:
            if interest.on_lost is not None:
                interest.on_lost(error)

    def _end(self, interest: Interest, error: Exception) -> None:
        with self._lock:
            self._forget(interest)
        if interest.on_lost is not None:
            interest.on_lost(error)

    def _forget(self, interest: Interest) -> bool:
        """Returns whether it was the last of its subject."""
        last = self.plan.remove(interest)
        box = interest.mailbox
        self._inbox.remove_mailbox(box)
        box.end()
        return last

    @property
    def pending_msgs(self) -> int:
        """Messages that wait for handlers now."""
        return sum(interest.mailbox.pending_msgs for interest in self.plan)
