"""Getting a client connected, and connected again: which server is tried, when, and for how long.

Knows no socket and no thread: whoever makes one gives it a `dial`. Everything here belongs to the loop's thread.

A *round* tries each server once, in their order. `connect` makes one round, or with `retry` as many as fit into its
time. When an established connection is lost, rounds go on, with pauses, until there is a new one (see `Backoff`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from random import Random, SystemRandom
from typing import Generic, TypeVar

from evbus._inbox import Waiter
from evbus.backoff import Backoff
from evbus.client_core import ClientCore
from evbus.correlation import Notify
from evbus.errors import (
    AuthError,
    ClientClosedError,
    ConnectError,
    ConnectionLostError,
    EvbusError,
    NotEventServerError,
)
from evbus.options import Reconnect
from evbus.reactor import Cancellable, Loop
from evbus.reports import one_line
from evbus.session import Session
from evbus.transport import Transport

__all__ = ["Connector", "Dial", "Dialled"]

_log = logging.getLogger("evbus.client")

S = TypeVar("S")

#: Takes a new connection, or why there is none. On the loop's thread; once for each `Dial`.
Dialled = Callable[[Transport | BaseException], object]
#: Begins to connect to a server, for so many seconds at most. Later, never at once, it calls what it was given.
Dial = Callable[[S, float, Dialled], object]


class Connector(Generic[S]):
    """Keeps a session connected.

    Args:
        loop: where all of it happens.
        session: what is connected. Its options say what follows a loss.
        servers: the addresses, in the order in which they are tried. `str()` of one is what users read.
        dial: makes connections.
        random: for the pauses.

    Attributes:
        core: drives the connection that there is.
    """

    def __init__(
        self, loop: Loop, session: Session, servers: Sequence[S], dial: Dial[S], random: Random | None = None
    ) -> None:
        self.core = ClientCore(loop, session)
        self.core.on_lost = self._lost
        self._loop = loop
        self._session = session
        self._servers = servers
        self._dial = dial
        policy = session.options.reconnect
        self._policy = policy if policy is not None else Reconnect()
        self._backoff = Backoff(self._policy, random or SystemRandom())
        self._waiters: list[Waiter] = []  # those who wait for a connection
        self._seeking = False
        self._rounds = False  # whether there may be another one
        self._deadline = math.inf  # of the search
        self._index = 0  # in servers
        self._errors: list[BaseException] = []  # of the round
        self._attempt = 0  # its number, so that what comes of an earlier one is known to be late
        self._attempt_s = 0.0
        self._until = 0.0  # what the attempt has
        self._pause: Cancellable | None = None
        self._watch: Cancellable | None = None

    # ---- asked for ---------------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float, retry: bool, notify: Notify) -> Waiter | None:
        """Get a connection with every subscription active.

        Args:
            timeout_s: for all of it. If a search is under way after a loss, it bounds the waiting only.
            retry: go on after a round in which no server was to be had.

        Returns:
            the waiter for it; None if there is one.
        """
        if self._session.is_ready:
            return None
        waiter = self._wait(notify)
        if self._seeking:
            if self._pause is not None:  # somebody asks: no use in waiting any longer
                self._begin_round()
        elif not self.core.is_attached:
            self._seek(self._loop.now() + timeout_s, rounds=retry)
        return waiter

    def expect(self, notify: Notify) -> Waiter | None:
        """Wait for the connection that is being sought.

        Returns:
            the waiter for it; None if there is one.

        Raises:
            NotConnectedError, ClientClosedError: none is being sought.
        """
        if self._session.is_ready:
            return None
        if not self._seeking and not self.core.is_attached:
            raise self._session.not_connected("wait_connected")
        return self._wait(notify)

    def stop(self) -> None:
        """Seek no more. Those who wait are told that the client is closed. The connection that there is stays."""
        if self._seeking:
            self._end_search()
            self._tell(ClientClosedError("connect"))

    def close(self) -> bool:
        """Seek no more and end the connection. Returns whether its transport is closed; if not, call again."""
        self.stop()
        return self.core.close()

    def _wait(self, notify: Notify) -> Waiter:
        waiter = self._session.correlation.waiter("connect", self._session.address, notify)
        # Without those whose time was up: a search may last for days, and somebody may ask every second.
        self._waiters = [*(other for other in self._waiters if not other.done), waiter]
        return waiter

    def _tell(self, error: BaseException | None) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if error is None:
                waiter.resolve()
            else:
                waiter.fail(error)

    # ---- the search --------------------------------------------------------------------------------------------------

    def _seek(self, deadline: float, *, rounds: bool, pause_s: float = 0.0) -> None:
        self._seeking = True
        self._deadline = deadline
        self._rounds = rounds
        if pause_s > 0:
            self._pause_for(pause_s)
        else:
            self._begin_round()

    def _end_search(self) -> None:
        self._seeking = False
        self._attempt += 1
        for timer in (self._pause, self._watch):
            if timer is not None:
                timer.cancel()
        self._pause = self._watch = None

    def _pause_for(self, seconds: float) -> None:
        self._pause = self._loop.call_later(min(seconds, self._left()), self._begin_round)

    def _left(self) -> float:
        return max(self._deadline - self._loop.now(), 0.0)

    def _begin_round(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._index = 0
        self._errors = []
        self._try()

    def _try(self) -> None:
        """The next server of the round."""
        # What is left is shared among those who have not been tried, so that a silent one leaves time for the others.
        share = self._left() / (len(self._servers) - self._index)
        if self._rounds:
            share = min(share, self._policy.timeout_s)
        self._attempt += 1
        number = self._attempt
        server = self._servers[self._index]
        self._session.seeking(str(server))
        self._attempt_s = share
        self._until = self._loop.now() + share
        # The dial may be held up in a look-up of the name that knows no time limit.
        self._watch = self._loop.call_later(share, lambda: self._expired(number))
        self._dial(server, max(share, 0.001), lambda outcome: self._dialled(number, outcome))

    def _expired(self, number: int) -> None:
        self._watch = None
        if number == self._attempt and not self.core.is_attached:
            self._failed(ConnectError(self._session.address, f"no answer within {self._attempt_s:g} s"))

    def _dialled(self, number: int, outcome: Transport | BaseException) -> None:
        if number != self._attempt:
            if not isinstance(outcome, BaseException):
                outcome.close()
            return
        if isinstance(outcome, BaseException):
            self._failed(outcome)
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        left = max(self._until - self._loop.now(), 0.001)
        waiter: Waiter | None = None

        def shaken() -> None:
            if number == self._attempt and waiter is not None:
                self._shaken(waiter)

        waiter = self.core.attach(outcome, left, lambda: self._loop.call_soon(shaken))

    def _shaken(self, waiter: Waiter) -> None:
        """The handshake has ended, well or not."""
        try:
            waiter.result()
        except EvbusError as exc:
            self._failed(exc)
            return
        self._end_search()
        if self.core.is_attached:
            self._tell(None)
        elif self._session.is_reconnecting:
            # It was lost before we heard that it was there. Those who wait go on waiting.
            self._lost()
        else:
            self._tell(ConnectError(self._session.address, "the connection was lost at once"))

    def _failed(self, error: BaseException) -> None:
        """The attempt has failed."""
        self._attempt += 1
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._errors.append(error)
        if self._session.is_reconnecting:
            _log.info("cannot reconnect to %s: %s", self._session.address, one_line(_reason(error)))
        # Of an attempt to get back, even what nobody foresaw (no thread, no memory) is not the end.
        if self._left() > 0 and (isinstance(error, EvbusError) or self._session.is_reconnecting):
            self._index += 1
            if self._index < len(self._servers):
                self._try()
                return
            if self._rounds:
                refused = any(isinstance(one, AuthError) for one in self._errors)
                if refused and self._session.is_reconnecting:
                    # The password may have changed with a restart; those who can mend it must hear of it.
                    self._session.reports.error(_told(self._errors))
                self._pause_for(self._policy.max_delay_s if refused else self._backoff.next())
                return
        told = _told(self._errors)
        self._end_search()
        self._session.gave_up(told)
        self._tell(told)

    # ---- a loss ------------------------------------------------------------------------------------------------------

    def _lost(self) -> None:
        """The core has no connection any more."""
        if self._session.is_reconnecting and not self._seeking:
            self._seek(
                self._loop.now() + self._policy.give_up_after_s,
                rounds=True,
                pause_s=max(self._backoff.first(), self._session.control.retry_after_s),
            )


def _reason(error: BaseException) -> str:
    return error.reason if isinstance(error, (ConnectError, ConnectionLostError)) and error.reason else str(error)


def _told(errors: list[BaseException]) -> BaseException:
    """What the user hears of a round: the error that tells most, or of several alike, all of them."""
    for kind in (AuthError, NotEventServerError):
        for error in errors:
            if isinstance(error, kind):
                return error
    last = errors[-1]
    if len(errors) == 1 or not isinstance(last, ConnectError):
        return last
    where = ", ".join(error.address for error in errors if isinstance(error, ConnectError))
    why = "; ".join(dict.fromkeys(error.reason for error in errors if isinstance(error, ConnectError)))
    return ConnectError(where, why, last.errno)
