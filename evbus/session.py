"""The clients' core: what one connection after another says and hears. Knows no socket, thread or clock.

Who calls what. A *shell* (`client.py`, later `aio.py`) starts requests from any thread and waits for their waiters; a
*core* (`client_core.py`) owns the connection and calls `opened`, `received`, `tick` and `lost` on its one thread.
Whatever users want to hear goes through `reports`.

Locking. Messages go through the outbox and the inbox, which need no lock. The plan and the state of the connection
change under `lock`, which the shell gives if it has threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from random import Random, SystemRandom
from typing import Protocol

from evbus._frame import Ring, pack, unpack
from evbus._inbox import Inbox, Waiter
from evbus._outbox import PACK_OK, Clock, Outbox
from evbus.answers import Answers, current_query
from evbus.backlog import Backlog
from evbus.control import Control
from evbus.correlation import Correlation, Notify, Sending, encode_headers
from evbus.errors import (
    ClientClosedError,
    ConnectError,
    ConnectionLostError,
    EvbusError,
    NotConnectedError,
    NotEventServerError,
    PayloadTooLargeError,
    RefusedError,
)
from evbus.handshake import HANDSHAKE_PACKET_BYTES, ServerFacts, handshake_packet, read_answer
from evbus.message import ClientStats, ConnectStatus
from evbus.options import SessionOptions
from evbus.plan import Interest, Plan
from evbus.registrar import Registrar
from evbus.reports import Reports, one_line
from evbus.wire import HEADER_BYTES_23, Codec, Dialect, ErrorCode, Flag, ObjectId

__all__ = ["MAX_QUERY_S", "Session"]

_log = logging.getLogger("evbus.client")

#: What `query` waits for if it is given no timeout; servers remember a query for as long at most.
MAX_QUERY_S = 60.0


class Sink(Protocol):
    """The half of a transport that takes bytes, see `evbus.transport`."""

    def flush(self, ring: Ring) -> int:
        """Write once from the ring; returns the bytes left."""
        ...


class Session:
    """One client's state over all its connections.

    Args:
        options: the user's wishes.
        clock: the time for packet headers.
        reports: what the user wants to hear.
        random: makes ids; a seeded one makes a simulation repeatable.
        lock: a re-entrant lock if several threads use the session.

    Attributes:
        address: the server's, for the words of errors; set by whoever connects.
        status: where the connection stands.
        failure: why the connection must be closed, for the core; None while all is well.
        facts: what the server told of itself; None without a connection.
        unsent_bytes: what connections took with them, or was published for one that never came.
    """

    def __init__(
        self,
        options: SessionOptions,
        clock: Clock,
        reports: Reports,
        *,
        random: Random | None = None,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        random = random or SystemRandom()
        self.options = options
        self.reports = reports
        self.lock: AbstractContextManager[object] = lock if lock is not None else nullcontext()
        self.address = ""
        self.status = ConnectStatus.DISCONNECTED
        self.failure: Exception | None = None
        self.facts: ServerFacts | None = None
        self.unsent_bytes = 0
        high = options.limits.buffer_bytes
        self.outbox = Outbox(clock, high_bytes=high, low_bytes=high // 4)
        self.plan = Plan()
        self.inbox = Inbox(self.plan.match, fallback=int(options.codec))
        self.correlation = Correlation(self.inbox, self.outbox, random, self.not_connected)
        self.answers = self.inbox.answerer = Answers(self.correlation, options.codec)
        self.registrar = Registrar(self.plan, self.correlation, self.lock, reports.error)
        self.control = Control(self.correlation, self.registrar, reports)
        self._client_id = options.client_id or f"{random.getrandbits(128):032x}"
        self._handshake: Waiter | None = None
        self._handshake_s = 0.0
        self._handshake_due = 0.0
        self._heartbeat_s = options.heartbeat_s
        self._next_beat = 0.0
        self._last_heard = 0.0
        self._asked_at: float | None = None
        self._connects = 0
        self._resumes = False  # whether there was a connection that a new one takes the place of
        self._backlog = Backlog(options.reconnect.buffer_bytes if options.reconnect is not None else 0)
        self.correlation.keep = self._keep

    # ---- status ------------------------------------------------------------------------------------------------------

    def set_status(self, status: ConnectStatus) -> None:
        """Change the status, and tell the user if it is another one."""
        if status is not self.status:
            self.status = status
            self.reports.status(status)

    @property
    def is_connected(self) -> bool:
        """Whether messages can be sent."""
        return self.outbox.is_open

    @property
    def is_shaking(self) -> bool:
        """Whether the handshake, with the subscriptions that are restored by it, is under way."""
        return self._handshake is not None and not self._handshake.done

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection with every subscription active."""
        return self._handshake is not None and self._handshake.done and self.outbox.is_open

    @property
    def is_reconnecting(self) -> bool:
        """Whether the connection was lost and a new one is being sought."""
        return self.status is ConnectStatus.RECONNECTING

    @property
    def is_closing(self) -> bool:
        """Whether the user has ended it."""
        return self.status in (ConnectStatus.DRAINING, ConnectStatus.CLOSED)

    def not_connected(self, action: str) -> EvbusError:
        """The exception for an action that needs a connection, when there is none."""
        if self.status is ConnectStatus.CLOSED:
            return ClientClosedError(action)
        return NotConnectedError(action, self.status.name)

    def check_connected(self, action: str) -> None:
        """Raises NotConnectedError or ClientClosedError without a connection."""
        if not self.outbox.is_open:
            raise self.not_connected(action)

    # ---- the connection's life: the core's thread --------------------------------------------------------------------

    def seeking(self, address: str) -> None:
        """An attempt to connect begins."""
        self.address = address
        if not self.is_reconnecting:
            self.set_status(ConnectStatus.CONNECTING)

    def opened(self, transport: Sink, now: float, timeout_s: float, notify: Notify | None = None) -> Waiter:
        """A connection is there: shake hands, and restore the plan.

        Args:
            transport: takes the outgoing bytes.
            now: the time in seconds, of any steady clock.
            timeout_s: how long the server may take to answer.

        Returns:
            the waiter for a usable connection with every subscription active. Flush the outbox next.
        """
        with self.lock:
            self.failure = None
            self.facts = None
            self.control.parting_words = ""
            self.control.retry_after_s = 0.0
            self._asked_at = None
            self.correlation.renew()
            self.inbox.start(HANDSHAKE_PACKET_BYTES)
            self.outbox.attach(transport)
            waiter = self.correlation.waiter("connect", notify=notify)
            self._handshake = waiter
            self._handshake_s = timeout_s
            self._handshake_due = now + timeout_s
            self._last_heard = now
            if not self.is_reconnecting:
                self.set_status(ConnectStatus.CONNECTING)
            self.outbox.pack_control(
                handshake_packet(waiter.task_id, self.options, self._client_id, self.outbox.now_ms())
            )
            return waiter

    def received(self, now: float, dispatch: Callable[[], object]) -> None:
        """Bytes have arrived in `inbox.ring`. Next: flush the outbox, and if `failure` is set, close the connection and
        call `lost`.

        Args:
            dispatch: gives `inbox.take_ready()` to workers. Called before anybody learns from what came with or after
                these messages, such as a flush that has ended, so that whoever waits for workers waits for these too.
        """
        inbox = self.inbox
        self._last_heard = now
        self._asked_at = None
        while True:
            controls = inbox.receive()
            dispatch()
            if not controls:
                break
            for object_id, _, system_id, _, body in controls:
                if self.facts is not None:
                    self.control.handle(object_id, system_id, body)
                elif self._shake(object_id, system_id, body):
                    self._restore(now)
            if self.failure is not None:
                return
        for box in inbox.take_overflows():
            self.registrar.overflowed(box)
        if inbox.fault is not None:
            self.failure = inbox.fault

    def _shake(self, object_id: int, system_id: int, body: bytes) -> bool:
        """A packet before the handshake is through. Returns whether it was the good answer."""
        if object_id == ObjectId.GO_AWAY:
            self.control.handle(object_id, system_id, body)
        answer = unpack(body, "bBs") if object_id == ObjectId.RESPONSE else None
        if answer is None or self._handshake is None or answer[0] != self._handshake.task_id:
            return False
        try:
            self.facts = read_answer(self.address, system_id, *answer[1:])
        except ConnectError as exc:
            self.failure = exc
        return self.facts is not None

    def tick(self, now: float) -> float:
        """Time has passed: send a heartbeat, notice silence.

        Returns:
            when to call again, in the clock's seconds. If `failure` is set, close the connection and call `lost`.
        """
        beat = self._heartbeat_s
        if self.is_shaking:
            if now >= self._handshake_due:
                what = "answer the handshake" if self.facts is None else "confirm the subscriptions"
                self.failure = NotEventServerError(self.address, f"it did not {what} within {self._handshake_s:g} s")
            return self._handshake_due
        if self._asked_at is not None and now - self._next_beat > beat:
            # We were asleep or held up ourselves, so the silence proves nothing: ask again.
            self._asked_at = now
        if self._asked_at is not None and now >= self._stale_at():
            self.failure = ConnectionLostError("", f"no sign of life for {now - self._last_heard:.1f} s")
            return now + beat
        if now >= self._next_beat:
            self._send_beat(0)
            if self._asked_at is None:
                self._asked_at = now
            self._next_beat = now + beat
        return self._next_beat if self._asked_at is None else min(self._next_beat, self._stale_at())

    def _stale_at(self) -> float:
        # Two intervals without a byte, of which at least one after we asked.
        assert self._asked_at is not None
        return max(self._last_heard + 2 * self._heartbeat_s, self._asked_at + self._heartbeat_s)

    def lost(self, error: Exception | None) -> None:
        """The connection is over. The plan stays; everything that waited fails. If a new one is to be sought,
        `is_reconnecting` says so.

        Args:
            error: why; None for an orderly end of the stream.
        """
        with self.lock:
            unsent = self.outbox.drop()
            self.unsent_bytes += unsent
            self.inbox.start(HANDSHAKE_PACKET_BYTES)
            waiter = self._handshake
            self._handshake = None
            answered = self.facts is not None
            self._resumes |= answered and waiter is not None and waiter.done
            self.facts = None
            self.registrar.connection_lost()
            if self._resumes and not self.is_closing and self.options.reconnect is not None:
                # Under the lock: from here on publishes are kept, if they are to be. Also if a connection did not live
                # long enough to restore everything.
                self.set_status(ConnectStatus.RECONNECTING)
        reason = self.control.parting_words or one_line(error or "the server closed the connection")
        if isinstance(error, ConnectionLostError):
            reason = error.reason
        closing = self.is_closing
        gone = ClientClosedError if closing else lambda action: ConnectionLostError(action, reason)
        if waiter is not None and not waiter.done:
            refusal = error if isinstance(error, ConnectError) else self._broken_off(answered, reason)
            waiter.fail(refusal)
            self.correlation.fail_all(gone)
            if not self.is_reconnecting:
                self._stopped_at(refusal)
            return
        self.correlation.fail_all(gone)
        if closing:
            _log.info("disconnected from %s", self.address)
            return
        if unsent:
            reason = f"{reason}; {unsent:,} bytes were not sent"
        lost = ConnectionLostError("", reason)
        if self.is_reconnecting:
            _log.warning("lost the connection to %s: %s; reconnecting", self.address, reason)
        else:
            _log.warning("lost the connection to %s: %s", self.address, reason)
            self.set_status(ConnectStatus.DISCONNECTED)
            self.registrar.tell_all(lost)
        self.reports.tell(lost)

    def _broken_off(self, answered: bool, reason: str) -> ConnectError:
        """The exception for a connection that ended before it was of use."""
        if answered:
            return ConnectError(self.address, f"the connection was lost while subscriptions were restored ({reason})")
        return NotEventServerError(self.address, f"the connection ended during the handshake ({reason})")

    def gave_up(self, error: BaseException) -> None:
        """The search for a connection has ended without one."""
        searched = self.is_reconnecting
        self._resumes = False
        self._stopped_at(error)
        if not searched:
            return
        dropped = self._drop_backlog()
        reason = f"no way back: {one_line(error)}"
        if dropped:
            reason = f"{reason}; {dropped:,} published messages were not sent"
        lost = ConnectionLostError("", reason)
        self.registrar.tell_all(lost)
        self.reports.error(lost)

    def _stopped_at(self, error: BaseException) -> None:
        """There is no connection, for this reason."""
        stranger = isinstance(error, NotEventServerError)
        if not self.is_closing:
            with self.lock:
                self.set_status(ConnectStatus.NOT_EVENT_SERVER if stranger else ConnectStatus.DISCONNECTED)

    def closed(self) -> None:
        """The user has ended it."""
        with self.lock:
            self.set_status(ConnectStatus.CLOSED)
        self._drop_backlog()

    def _drop_backlog(self) -> int:
        """Forget what was published while there was no connection. Returns the number of messages."""
        with self.lock:
            self.unsent_bytes += self._backlog.size
            return len(self._backlog.take())

    def _keep(self, sending: Sending) -> bool | None:
        """A message found no connection: keep it until there is one, if that is wanted.

        Returns:
            whether it was kept; None if there is a connection now.

        Raises:
            BufferFullError: there is no more room.
        """
        with self.lock:
            if self.outbox.is_open:
                return None
            return self.is_reconnecting and self._backlog.add(sending)

    def _restore(self, now: float) -> None:
        """The handshake succeeded: subscribe to what is in the plan, then let messages through."""
        facts, waiter = self.facts, self._handshake
        assert facts is not None
        assert waiter is not None
        resumed = self.is_reconnecting
        with self.lock:
            announced = facts.dialect == Dialect.EVBUS_2
            self.plan.names_targets = announced
            self.inbox.forget_routes()
            self.inbox.open(facts.dialect, min(facts.packet_bytes, self.options.limits.packet_bytes))
            self._connects += 1
            if resumed:
                # Before anything of the new connection can come in.
                self.registrar.tell_gap(None, "reconnect")
            self._heartbeat_s = min(self.options.heartbeat_s, facts.heartbeat_s or self.options.heartbeat_s)
            self.registrar.features = facts.features
            self.registrar.restore()
            # Its echo says that the server has taken all of them.
            self._send_beat(self.correlation.expect_beat(waiter))
            self._next_beat = now + self._heartbeat_s
            # With what was published meanwhile, in one step: no new message can come before it.
            refused = self.outbox.open(facts.dialect, facts.payload_bytes, self._backlog.take())
        server = f" ({one_line(facts.server)}, connection {facts.connection})" if announced else " (version 1)"
        if resumed:
            missed = "; what was published meanwhile is missed" if len(self.plan) else ""
            _log.warning("connected again to %s%s%s", self.address, server, missed)
        else:
            _log.info("connected to %s%s", self.address, server)
        self.set_status(ConnectStatus.CONNECTED)
        for subject, size in refused:
            self.unsent_bytes += size
            self.reports.server_error(PayloadTooLargeError(size, facts.payload_bytes, subject))

    # ---- requests: any thread ------------------------------------------------------------------------------------

    def subscribe(self, interest: Interest, notify: Notify | None = None) -> Waiter | None:
        """Add an interest to the plan, and tell the server if there is one.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for: without a connection, the
            subscription becomes active with the next one.

        Raises:
            ClientClosedError, RefusedError: nothing has changed.
        """
        if self.is_closing:
            raise ClientClosedError("subscribe")
        return self.registrar.add(interest, notify)

    def unsubscribe(self, interest: Interest, notify: Notify | None = None) -> Waiter | None:
        """Take an interest out of the plan; nothing happens if it is gone. Its mailbox takes no more messages.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for.
        """
        return self.registrar.remove(interest, notify)

    def withdraw(self, interest: Interest, notify: Notify | None = None) -> Waiter | None:
        """Tell the server that an interest ends; what is on its way still reaches its mailbox, until `unsubscribe`.

        Returns:
            the waiter for the server's word; None if there is nothing to wait for.
        """
        return self.registrar.withdraw(interest, notify)

    def publish(
        self,
        subject: str,
        codec: Codec,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
        no_echo: bool = False,
        notify: Notify | None = None,
        timeout: float = 0.0,
    ) -> Sending:
        """A publish, to be packed. If the running handler is at a query on that subject, it is the query's answer.

        With `confirm` its waiter's outcome is a Receipt.

        Raises:
            RefusedError: the server does not know `no_echo`.
        """
        key = self.outbox.key(subject)
        if no_echo:
            self._needs_version_2(subject, "publishes without an echo")
        waiter = self.correlation.waiter("publish", subject, notify, timeout=timeout) if confirm else None
        if self.outbox.is_answering:
            query = current_query.get()
            if query is not None and query.subject == subject and not query.answered:
                return self.answers.sending(query, codec, payload, headers, waiter)
        return Sending(
            self.correlation,
            "publish",
            ObjectId.PUBLISH,
            key,
            payload,
            waiter,
            codec=int(codec),
            headers=encode_headers(headers),
            flags=(int(Flag.CONFIRM) if confirm else 0) | (int(Flag.NO_ECHO) if no_echo else 0),
            task_id=waiter.task_id if waiter is not None else b"",
            urgent=confirm,
        )

    def ask(self, subject: str, codec: Codec, payload: bytes, timeout: float, notify: Notify) -> Waiter | None:
        """The short way of `query`, without headers; the query is packed when this returns.

        Returns:
            the waiter for the answer, a Message; None if nothing has happened and `query` must be used instead.

        Raises:
            InvalidSubjectError: nothing was asked.
        """
        return self.correlation.asker.ask(subject, codec, payload, timeout, _deadline_ms(timeout), notify)

    def query(
        self,
        subject: str,
        codec: Codec,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        notify: Notify | None = None,
        timeout: float = MAX_QUERY_S,
        many: bool = False,
    ) -> Sending:
        """A query, to be packed. Its waiter's outcome is the answer, a Message.

        With `many` every responder is asked, each reply is pushed (a Message, or the exception of one that failed), and
        the outcome says only that there will be no more.

        Raises:
            RefusedError: the server does not know queries to many.
        """
        key = self.outbox.key(subject)
        if many:
            self._needs_version_2(subject, "queries to all responders")
        waiter = self.correlation.waiter("query", subject, notify, many=many, timeout=timeout)
        return Sending(
            self.correlation,
            "query",
            ObjectId.QUERY,
            key,
            payload,
            waiter,
            codec=int(codec),
            headers=encode_headers(headers),
            flags=int(Flag.ALL) if many else 0,
            deadline_ms=_deadline_ms(timeout),
            task_id=waiter.task_id,
            urgent=True,
        )

    def _needs_version_2(self, subject: str, what: str) -> None:
        if self.outbox.is_open and not self.inbox.is_announced:
            raise RefusedError(ErrorCode.UNSUPPORTED, subject, f"a version-1 server knows no {what}")

    def flush(self, notify: Notify | None = None) -> Waiter:
        """A heartbeat whose echo says that the server has taken all that was published before. Next, look at
        `reports.take_unreported()`.
        """
        self.check_connected("flush")
        waiter = Waiter(b"", "", "flush", notify)
        if not self._send_beat(self.correlation.expect_beat(waiter), urgent=True):
            self.correlation.forget_beat(waiter)
            raise self.not_connected("flush")
        return waiter

    def drain(self, notify: Notify | None = None) -> Waiter | None:
        """No more messages shall come; those on their way still reach their mailboxes.

        Returns:
            the waiter for the moment when all have come; None without a connection.
        """
        self.set_status(ConnectStatus.DRAINING)
        if not self.outbox.is_open:
            return None
        self.registrar.withdraw_all()
        return self.flush(notify)

    def _send_beat(self, beat: int, *, urgent: bool = False) -> bool:
        packet = pack(HEADER_BYTES_23, ObjectId.HEARTBEAT, 1, 0, self.outbox.now_ms(), "i", beat)
        return self.outbox.pack_control(packet, urgent) == PACK_OK

    # ---- counters ------------------------------------------------------------------------------------------------

    def stats(self, at_work: int = 0) -> ClientStats:
        """Counters, and what waits now. Any thread.

        Args:
            at_work: what runs user code now, which only the shell knows.
        """
        tally, inbox = self.registrar.tally, self.inbox
        return ClientStats(
            published=self.outbox.packed_msgs,
            received=inbox.received_msgs,
            handled=tally.handled,
            handler_errors=tally.errors,
            dropped=tally.dropped,
            server_errors=self.reports.server_errors,
            missed=tally.missed + inbox.missed_late,
            slow_handlers=self.reports.slow_handlers,
            late_answers=self.control.late_answers + inbox.late_answers,
            malformed=self.control.malformed + inbox.malformed,
            connects=self._connects,
            subscriptions=len(self.plan),
            pending_queries=inbox.waiting,
            pending_bytes=self.outbox.pending_bytes + self._backlog.size,
            unsent_bytes=self.unsent_bytes,
            pending_msgs=self.registrar.pending_msgs,
            at_work=at_work,
        )


def _deadline_ms(timeout: float) -> int:
    # Up, so that 0.4 ms do not become the 0 that means "no wish".
    return min(int(timeout * 1000) + 1, int(MAX_QUERY_S * 1000))
