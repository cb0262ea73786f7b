"""The search for a connection: which server, when, and what everybody is told. On simulated time and network."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from simnet import SimNet, SimTransport

from evbus._inbox import Waiter
from evbus._outbox import Clock
from evbus.acceptor import Acceptor
from evbus.backoff import Backoff
from evbus.connector import Connector, Dialled
from evbus.errors import (
    AuthError,
    BufferFullError,
    ClientClosedError,
    ConfigError,
    ConnectError,
    ConnectionLostError,
    EvbusError,
    NotConnectedError,
    PayloadTooLargeError,
)
from evbus.limits import Limits
from evbus.message import ConnectStatus, Gap
from evbus.options import Reconnect, SessionOptions
from evbus.reports import Reports
from evbus.server_core import ServerCore
from evbus.session import Session
from evbus.subscription import Subscription, Wishes
from evbus.wire import Codec


class Setting:
    """A server, a client whose connector dials it, and what it dialled when."""

    def __init__(
        self, *servers: str, reconnect: Reconnect | None = None, seed: int = 1, payload: int = 1 << 20
    ) -> None:
        self.net = SimNet(seed)
        self.loop = self.net.reactor()
        self.server = ServerCore(self.loop, Limits(payload_bytes=payload), wall_ms=self.net.wall_ms)
        self.published: list[tuple[str, bytes]] = []
        self.acceptor = Acceptor(self.loop, [self.net.listen()], lambda transport, _peer: self.server.add(transport))
        self.errors: list[BaseException] = []
        self.statuses: list[ConnectStatus] = []
        self.dialled: list[tuple[float, str]] = []
        self.transports: list[SimTransport] = []
        self.answers: dict[str, Exception | None] = {}  # by server: why there is no connection; None: never any answer
        reports = Reports(self.loop.call_soon, lambda error, _: self.errors.append(error), self.statuses.append)
        options = SessionOptions(reconnect=reconnect)
        self.session = Session(options, Clock(self.net.wall_ms()), reports, random=Random(seed))
        self.connector = Connector(self.loop, self.session, servers or ("one",), self.dial, Random(seed))

    def dial(self, server: str, _timeout_s: float, dialled: Dialled) -> None:
        self.dialled.append((self.loop.now(), server))
        if server not in self.answers:
            transport = self.net.connect()
            self.transports.append(transport)
            self.loop.call_soon(lambda: dialled(transport))
        else:
            answer = self.answers[server]
            if answer is not None:
                self.loop.call_soon(lambda: dialled(answer))

    def connect(self, timeout_s: float = 3.0, *, retry: bool = False) -> Waiter:
        waiter = self.connector.connect(timeout_s, retry, lambda: None)
        assert waiter is not None
        return waiter

    def until(self, condition: Any) -> None:
        self.net.run_until(condition, 100_000)

    def up(self) -> Setting:
        waiter = self.connect()
        self.until(lambda: waiter.done)
        waiter.result()
        return self

    def lose(self) -> None:
        self.transports[-1].reset()
        self.until(lambda: self.session.status is not ConnectStatus.CONNECTED)

    def publish(self, payload: bytes, subject: str = "it") -> bool:
        return self.session.publish(subject, Codec.BYTES, payload).pack()


def refused(name: str) -> ConnectError:
    return ConnectError(name, "connection refused", 111)


def outcome(waiter: Waiter) -> BaseException | None:
    try:
        waiter.result()
    except EvbusError as exc:
        return exc
    return None


class TestBackoff:
    def test_the_bounds_double_up_to_the_longest(self) -> None:
        class Top(Random):
            def uniform(self, a: float, b: float) -> float:
                assert a == 0.0
                return b

        backoff = Backoff(Reconnect(), Top())
        assert backoff.first() == 0.6
        assert [round(backoff.next(), 1) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        assert backoff.first() == 0.6
        assert backoff.next() == 0.2

    def test_the_jitter_is_full(self) -> None:
        backoff = Backoff(Reconnect(), Random(3))
        first = [backoff.first() for _ in range(2000)]
        assert min(first) < 0.01
        assert max(first) > 0.59
        assert 0.27 < sum(first) / len(first) < 0.33

    @pytest.mark.parametrize(
        "wrong",
        [
            {"first_delay_s": -1},
            {"min_delay_s": 0},
            {"max_delay_s": float("inf")},
            {"min_delay_s": 2.0, "max_delay_s": 1.0},
            {"timeout_s": True},
            {"give_up_after_s": 0},
            {"give_up_after_s": float("nan")},
            {"buffer_bytes": -1},
            {"buffer_bytes": 1.5},
        ],
    )
    def test_policies_that_make_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"reconnect\."):
            Reconnect(**wrong)


class TestFirstConnection:
    def test_it_fails_fast_unless_asked_to_go_on(self) -> None:
        setting = Setting()
        setting.answers["one"] = refused("one")
        waiter = setting.connect()
        setting.until(lambda: waiter.done)
        assert isinstance(outcome(waiter), ConnectError)
        assert len(setting.dialled) == 1
        assert setting.session.status is ConnectStatus.DISCONNECTED

    def test_with_retry_it_goes_on_until_a_server_is_there(self) -> None:
        setting = Setting()
        setting.answers["one"] = refused("one")
        waiter = setting.connect(60.0, retry=True)
        setting.until(lambda: len(setting.dialled) == 4)
        assert not waiter.done
        del setting.answers["one"]
        setting.until(lambda: waiter.done)
        assert outcome(waiter) is None
        assert setting.session.is_ready

    def test_with_retry_its_time_is_kept(self) -> None:
        setting = Setting()
        setting.answers["one"] = refused("one")
        begun = setting.loop.now()
        waiter = setting.connect(7.0, retry=True)
        setting.until(lambda: waiter.done)
        assert isinstance(outcome(waiter), ConnectError)
        assert 6.9 <= setting.loop.now() - begun <= 7.5
        assert len(setting.dialled) > 4

    def test_several_servers_in_order(self) -> None:
        setting = Setting("one", "two", "three")
        setting.answers = {"one": refused("one"), "two": refused("two")}
        setting.up()
        assert [name for _, name in setting.dialled] == ["one", "two", "three"]
        assert setting.session.address == "three"

    def test_a_silent_server_leaves_time_for_the_next(self) -> None:
        setting = Setting("silent", "good")
        setting.answers["silent"] = None
        begun = setting.loop.now()
        setting.up()
        assert 1.4 <= setting.loop.now() - begun <= 1.7  # half of the 3 s

    def test_the_words_name_all_servers(self) -> None:
        setting = Setting("one", "two")
        setting.answers = {"one": refused("one"), "two": ConnectError("two", "no route")}
        waiter = setting.connect()
        setting.until(lambda: waiter.done)
        assert "one, two: connection refused; no route" in str(outcome(waiter))

    def test_refused_credentials_tell_more_than_a_refused_connection(self) -> None:
        setting = Setting("one", "two")
        setting.answers = {"one": AuthError("one", "wrong token"), "two": refused("two")}
        waiter = setting.connect()
        setting.until(lambda: waiter.done)
        assert isinstance(outcome(waiter), AuthError)

    def test_a_late_connection_is_closed(self) -> None:
        setting = Setting("slow", "good")
        kept: list[Dialled] = []
        dial = setting.dial

        def slow(server: str, timeout_s: float, dialled: Dialled) -> None:
            if server == "slow":
                kept.append(dialled)
            else:
                dial(server, timeout_s, dialled)

        setting.connector._dial = slow
        setting.up()
        late = setting.net.connect()
        kept[0](late)
        assert late.fileno() == -1
        assert setting.session.is_ready

    def test_stopping_tells_those_who_wait(self) -> None:
        setting = Setting()
        setting.answers["one"] = None
        waiters = [setting.connect(60.0), setting.connect(60.0)]
        setting.connector.stop()
        assert all(isinstance(outcome(waiter), ClientClosedError) for waiter in waiters)
        setting.net.settle(seconds=100.0)
        assert len(setting.dialled) == 1


class TestReconnecting:
    def test_off(self) -> None:
        setting = Setting().up()
        setting.lose()
        assert setting.session.status is ConnectStatus.DISCONNECTED
        setting.net.settle(seconds=60.0)
        assert len(setting.dialled) == 1
        with pytest.raises(NotConnectedError):
            setting.connector.expect(lambda: None)

    def test_it_comes_back(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        for _ in range(3):
            setting.lose()
            assert setting.session.status is ConnectStatus.RECONNECTING
            lost_at = setting.loop.now()
            waiter = setting.connector.expect(lambda: None)
            assert waiter is not None
            setting.until(lambda waiter=waiter: waiter.done)
            assert outcome(waiter) is None
            assert setting.dialled[-1][0] - lost_at <= 0.6
        assert setting.session.stats().connects == 4
        assert setting.statuses == [ConnectStatus.CONNECTING, ConnectStatus.CONNECTED] + 3 * [
            ConnectStatus.RECONNECTING,
            ConnectStatus.CONNECTED,
        ]
        assert all(isinstance(error, ConnectionLostError) for error in setting.errors)

    @pytest.mark.parametrize("first", [True, False])
    def test_a_connection_that_goes_in_the_moment_in_which_it_is_there(self, first: bool) -> None:
        setting = Setting(reconnect=Reconnect())
        core, spoilt = setting.connector.core, []
        attach = core.attach

        def lost_at_once(transport: Any, timeout_s: float, notify: Any) -> Waiter:
            def done() -> None:
                if not spoilt and (first or setting.session.stats().connects == 2):
                    spoilt.append(1)
                    setting.loop.call_soon(lambda: core.close(ConnectionResetError("gone")))
                notify()

            return attach(transport, timeout_s, done)

        core.attach = lost_at_once  # type: ignore[method-assign, assignment]
        setting.up()
        if not first:
            setting.lose()
        setting.until(lambda: setting.session.stats().connects == (2 if first else 3) and setting.session.is_ready)

    def test_it_goes_on_for_ever(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.answers["one"] = refused("one")
        setting.lose()
        setting.until(lambda: setting.loop.now() > 3600)
        pauses = [
            after - before for (before, _), (after, _) in zip(setting.dialled[1:], setting.dialled[2:], strict=False)
        ]
        assert len(pauses) > 1000
        assert max(pauses) <= 5.01
        assert setting.session.status is ConnectStatus.RECONNECTING
        del setting.answers["one"]
        setting.until(lambda: setting.session.is_ready)

    def test_it_gives_up_if_it_is_told_to(self) -> None:
        setting = Setting(reconnect=Reconnect(give_up_after_s=20.0, buffer_bytes=10_000)).up()
        setting.answers["one"] = refused("one")
        setting.lose()
        assert setting.publish(b"x")
        waiter = setting.connector.expect(lambda: None)
        assert waiter is not None
        lost_at = setting.loop.now()
        setting.until(lambda: waiter.done)
        assert isinstance(outcome(waiter), ConnectError)
        assert 19.9 <= setting.loop.now() - lost_at <= 20.5
        assert setting.session.status is ConnectStatus.DISCONNECTED
        setting.net.settle()
        assert "1 published messages were not sent" in str(setting.errors[-1])
        assert setting.session.stats().unsent_bytes > 0
        setting.answers.clear()
        setting.up()

    def test_an_attempt_that_fails_in_an_unforeseen_way_is_not_the_last(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.answers["one"] = RuntimeError("can't start new thread")
        setting.lose()
        setting.until(lambda: len(setting.dialled) == 4)
        assert setting.session.status is ConnectStatus.RECONNECTING
        del setting.answers["one"]
        setting.until(lambda: setting.session.is_ready)

    def test_those_who_waited_in_vain_are_not_kept(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.answers["one"] = refused("one")
        setting.lose()
        for _ in range(100):
            waiter = setting.connector.expect(lambda: None)
            assert waiter is not None
            setting.session.correlation.expire(waiter, 0.1)
            assert "one: no answer within 0.1 s" in str(outcome(waiter))
        assert len(setting.connector._waiters) == 1

    def test_a_round_tries_each_server_at_once_and_in_order(self) -> None:
        setting = Setting("one", "two", reconnect=Reconnect()).up()
        setting.answers["one"] = refused("one")
        setting.lose()
        setting.until(lambda: setting.session.is_ready)
        (first, one), (second, two) = setting.dialled[1:]
        assert (one, two) == ("one", "two")
        assert second - first < 0.01

    def test_refused_credentials_are_told_and_tried_slowly(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.answers["one"] = AuthError("one", "wrong token")
        setting.lose()
        setting.until(lambda: len(setting.dialled) == 4)
        assert all(isinstance(error, AuthError) for error in setting.errors[1:])
        assert len(setting.errors) >= 3
        assert setting.dialled[3][0] - setting.dialled[2][0] >= 4.99

    def test_a_server_that_goes_says_when_to_come_back(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.session.control.retry_after_s = 2.0
        setting.lose()
        lost_at = setting.loop.now()
        setting.until(lambda: setting.session.is_ready)
        assert 2.0 <= setting.dialled[1][0] - lost_at <= 2.7

    def test_connect_does_not_wait_for_the_pause(self) -> None:
        setting = Setting(reconnect=Reconnect(first_delay_s=1000.0)).up()
        setting.lose()
        lost_at = setting.loop.now()
        setting.connect()
        setting.until(lambda: setting.session.is_ready)
        assert setting.loop.now() - lost_at < 1.0

    def test_closing_ends_it(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.lose()
        setting.session.closed()
        assert setting.connector.close()
        setting.net.settle(seconds=60.0)
        assert len(setting.dialled) == 1
        assert setting.session.status is ConnectStatus.CLOSED


class TestBacklog:
    def test_off(self) -> None:
        setting = Setting(reconnect=Reconnect()).up()
        setting.lose()
        with pytest.raises(NotConnectedError, match="RECONNECTING"):
            setting.publish(b"x")

    def test_before_the_first_connection_nothing_is_kept(self) -> None:
        setting = Setting(reconnect=Reconnect(buffer_bytes=1000))
        with pytest.raises(NotConnectedError, match="DISCONNECTED"):
            setting.publish(b"x")

    def test_what_was_kept_is_sent_first_and_in_order(self) -> None:
        setting = Setting(reconnect=Reconnect(buffer_bytes=1 << 20)).up()
        got: list[bytes] = []
        gaps: list[Gap] = []
        subscription = Subscription.make(
            setting.session,
            "it",
            lambda message: got.append(message.data),
            Wishes(on_gap=gaps.append),
            setting.loop.call_soon,
            lambda _: None,
        )
        setting.session.subscribe(subscription.interest)
        setting.lose()
        for number in range(100):
            assert setting.publish(b"%d" % number)
        assert setting.session.stats().pending_bytes > 100
        setting.until(lambda: setting.session.is_connected)
        # The very moment in which there is a connection: what was kept is on its way already.
        assert setting.publish(b"100")
        setting.net.settle()
        assert got == [b"%d" % number for number in range(101)]
        assert gaps == [Gap("it", None, "reconnect")]

    def test_a_full_one_says_so_and_keeps_what_it_has(self) -> None:
        setting = Setting(reconnect=Reconnect(buffer_bytes=1000)).up()
        setting.lose()
        kept = 0
        with pytest.raises(BufferFullError):
            while setting.publish(b"x" * 100):
                kept += 1
        assert 3 < kept < 10
        setting.until(lambda: setting.session.is_ready)
        setting.net.settle()
        assert setting.server.broker.router.counters()["published"] == kept

    def test_what_the_next_server_does_not_take_is_told(self) -> None:
        setting = Setting(reconnect=Reconnect(buffer_bytes=10_000), payload=100).up()
        setting.lose()
        assert setting.publish(b"x" * 101)
        assert setting.publish(b"y" * 100)
        setting.until(lambda: setting.session.is_ready)
        setting.net.settle()
        assert setting.server.broker.router.counters()["published"] == 1
        assert isinstance(setting.errors[-1], PayloadTooLargeError)
        assert isinstance(setting.session.reports.take_unreported(), PayloadTooLargeError)

    def test_queries_and_confirmed_publishes_are_not_kept(self) -> None:
        setting = Setting(reconnect=Reconnect(buffer_bytes=10_000)).up()
        setting.lose()
        with pytest.raises(NotConnectedError):
            setting.session.publish("it", Codec.BYTES, b"", confirm=True).pack()
        with pytest.raises(NotConnectedError):
            setting.session.query("it", Codec.BYTES, b"").pack()


def test_a_message_after_a_burst_that_was_blocked_does_not_wait() -> None:
    setting = Setting().up()
    pack_event = setting.session.outbox.pack_event
    for _ in range(10):
        pack_event("a", b"small", 1)
    assert setting.session.outbox.is_polling
    for _ in range(200):
        pack_event("a", b"." * 1000, 1)
    assert setting.session.outbox.is_blocked
    setting.net.settle(seconds=0.5)
    assert setting.server.broker.stats()["published"] == 210
    pack_event("a", b"alone", 1)
    setting.net.settle(seconds=0.1)
    assert setting.server.broker.stats()["published"] == 211
