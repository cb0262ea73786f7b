"""A client for the simulated network: the shipped session and core, with handlers run as calls of the one loop.

client = SimClient(net, seed=1)
client.connect()
client.subscribe("a.*", handler)
client.publish("a.b", b"...")
outcome = client.query("q", b"?")      # look at outcome.done later
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from simnet import SimNet

from evbus._inbox import Waiter
from evbus._outbox import Clock
from evbus.client_core import ClientCore
from evbus.correlation import Sending
from evbus.message import ConnectStatus, Message
from evbus.options import SessionOptions
from evbus.payload import encode
from evbus.reports import Reports
from evbus.session import Session
from evbus.subscription import Subscription, Wishes


class SimClient:
    """One client.

    Attributes:
        errors: what `on_error` was told.
        statuses: what `on_status` was told.
        stuck: messages that found the buffer full; they are packed when there is room.
    """

    def __init__(self, net: SimNet, seed: int, **options: Any) -> None:
        self.net = net
        self.errors: list[tuple[BaseException, Message | None]] = []
        self.statuses: list[ConnectStatus] = []
        self.stuck: list[Sending] = []
        self.clock = Clock(net.wall_ms())
        reports = Reports(
            net.reactor().call_soon, lambda error, message: self.errors.append((error, message)), self.statuses.append
        )
        self.session = Session(SessionOptions(**options), self.clock, reports, random=random.Random(seed))
        self.session.address = "10.0.0.1:9100"
        self.session.answers.send = self.push
        self.session.outbox.on_room = lambda: net.reactor().call_soon(self._retry)
        self.core = ClientCore(net.reactor(), self.session)
        self.transport: Any = None

    def connect(self, timeout: float = 5.0) -> Waiter:
        """Begin to connect; the waiter's outcome says how it went."""
        self._tick()
        self.transport = self.net.connect()
        return self.core.attach(self.transport, timeout, _nobody)

    def close(self) -> None:
        """Go without a word."""
        self.session.set_status(ConnectStatus.CLOSED)
        self.core.close()

    def subscribe(
        self, subject: str, handler: Callable[[Any], Any], **wishes: Any
    ) -> tuple[Subscription, Waiter | None]:
        """Subscribe; the waiter's outcome is the server's word."""
        self._tick()
        subscription = Subscription.make(
            self.session, subject, handler, Wishes(**wishes), self.net.reactor().call_soon, self.unsubscribe
        )
        return subscription, self.session.subscribe(subscription.interest, _nobody)

    def unsubscribe(self, subscription: Subscription) -> Waiter | None:
        """End a subscription."""
        self._tick()
        waiter = self.session.unsubscribe(subscription.interest, _nobody)
        subscription.interest.mailbox.clear()
        return waiter

    def publish(self, subject: str, value: object, *, confirm: bool = False, headers: Any = None) -> Waiter | None:
        """Publish, if need be as soon as there is room."""
        self._tick()
        codec, payload = encode(value)
        if not confirm and headers is None and not self.session.outbox.pack_event(subject, payload, int(codec)):
            return None
        sending = self.session.publish(
            subject, codec, payload, confirm=confirm, headers=headers, notify=_nobody if confirm else None
        )
        self.push(sending)
        return sending.waiter

    def query(self, subject: str, value: object = b"", *, timeout: float = 3.0, many: bool = False) -> Waiter:
        """Ask; the client's own deadline is kept too."""
        self._tick()
        codec, payload = encode(value)
        sending = self.session.query(subject, codec, payload, timeout=timeout, many=many, notify=_nobody)
        self.push(sending)
        waiter = sending.waiter
        assert waiter is not None
        self.net.reactor().call_later(timeout, lambda: self.session.correlation.expire(waiter, timeout))
        return waiter

    def flush(self) -> Waiter:
        """Ask whether the server has taken everything."""
        self._tick()
        return self.session.flush(_nobody)

    def push(self, sending: Sending) -> None:
        """Pack now, or in its turn when there is room."""
        if self.stuck or not sending.pack():
            self.stuck.append(sending)
            if not self.session.outbox.want_room():
                self._retry()

    def _retry(self) -> None:
        while self.stuck:
            if not self.stuck[0].pack():
                if self.session.outbox.want_room():
                    return
                continue
            self.stuck.pop(0)

    def _tick(self) -> None:
        self.clock.unix_ms = self.net.wall_ms()


def _nobody() -> None:
    """Whoever waits here looks at the waiter."""
