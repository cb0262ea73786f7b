"""EventClient against a real EventServer, and against servers that are none, or hostile."""

from __future__ import annotations

import gc
import logging
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest

import evbus
from evbus import (
    BufferFullError,
    ClientClosedError,
    ClientLimits,
    CodecError,
    ConfigError,
    ConfirmTimeoutError,
    ConnectError,
    ConnectionLostError,
    ConnectStatus,
    EventClient,
    EventServer,
    Gap,
    InvalidSubjectError,
    Limits,
    Message,
    NoRespondersError,
    NotConnectedError,
    NotEventServerError,
    PayloadTooLargeError,
    QueryTimeoutError,
    Receipt,
    RemoteError,
    ResponderLostError,
    SlowConsumerError,
)
from evbus._frame import Ring, next_packet, pack, unpack
from evbus.wire import Codec

WAIT = 10.0


@dataclass
class Mail:
    subject: str
    size: int


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Search(msgspec.Struct):
    words: list[str]


class Log:
    """Collects what callbacks are told, and waits for it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, *item: Any) -> None:
        with self._changed:
            self.items.append(item[0] if len(item) == 1 else item)
            self._changed.notify_all()

    def wait(self, count: int, timeout: float = WAIT) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.items) >= count, timeout), self.items
            return list(self.items)


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def clients(server: EventServer) -> Iterator[Callable[..., EventClient]]:
    """Makes connected clients; all are disconnected in the end."""
    made: list[EventClient] = []

    def make(**options: Any) -> EventClient:
        client = EventClient("127.0.0.1", server.port, **options).connect()
        made.append(client)
        return client

    yield make
    for client in made:
        client.disconnect(timeout=2.0)


@pytest.fixture(autouse=True)
def _no_threads_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All threads of a client end with it, or soon after."""
    monkeypatch.setattr("evbus.workers.LINGER_S", 0.05)
    before = set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + WAIT
    while left := [t for t in threading.enumerate() if t.name.startswith("evbus-worker") and t not in before]:
        assert time.monotonic() < deadline, left
        time.sleep(0.001)


class TestLife:
    def test_connect_and_disconnect(self, server: EventServer) -> None:
        statuses = Log()
        client = EventClient("127.0.0.1", server.port, on_status=statuses)
        assert client.status is ConnectStatus.DISCONNECTED
        assert client.connect() is client
        assert client.connect() is client
        assert client.status is ConnectStatus.CONNECTED
        assert client.address == f"127.0.0.1:{server.port}"
        assert "connected" in repr(client)
        client.disconnect()
        client.disconnect()
        assert client.status is ConnectStatus.CLOSED
        assert [status.name for status in statuses.wait(4)] == ["CONNECTING", "CONNECTED", "DRAINING", "CLOSED"]

    def test_by_url(self, server: EventServer) -> None:
        with evbus.connect(f"evbus://127.0.0.1:{server.port}", name="me") as client:
            assert client.rtt() < 5
        for url in ("http://x", "evbus://user:secret@host", "evbus://host:0", "evbus://host:99999", "evbus://h/path"):
            with pytest.raises(ConfigError):
                evbus.connect(url)

    def test_after_closing_every_call_says_so(self, server: EventServer) -> None:
        client = EventClient("127.0.0.1", server.port).connect()
        subscription = client.subscribe("s")
        client.disconnect()
        for call in (
            lambda: client.publish("s", b""),
            lambda: client.publish("s", b"", confirm=True),
            lambda: client.publish("s", {"a": 1}),
            lambda: client.query("s"),
            lambda: client.flush(),
            lambda: client.rtt(),
            lambda: client.subscribe("s"),
            lambda: client.connect(),
        ):
            with pytest.raises(ClientClosedError, match="closed"):
                call()
        assert list(subscription) == []
        subscription.unsubscribe()
        client.unsubscribe("s")
        assert client.stats().subscriptions == 0

    def test_before_connecting_every_call_says_so(self) -> None:
        client = EventClient()
        for call in (lambda: client.publish("s", b""), lambda: client.query("s"), client.flush, client.rtt):
            with pytest.raises(NotConnectedError, match="connect"):
                call()

    def test_subscriptions_made_before_are_active_when_connect_returns(
        self, server: EventServer, clients: Callable[..., EventClient]
    ) -> None:
        got = Log()
        early = EventClient("127.0.0.1", server.port)

        @early.on("before")
        def handler(message: Message) -> None:
            got(message.data)

        @early.on_query("before.q")
        def answer(message: Message) -> str:
            return "here"

        with early:
            publisher = clients()
            publisher.publish("before", b"1")
            assert got.wait(1) == [b"1"]
            assert publisher.query("before.q", response=str) == "here"

    def test_options_are_checked(self) -> None:
        for options in (
            {"host": ""},
            {"host": 5},
            {"port": 0},
            {"port": "9100"},
            {"port": 70_000},
            {"name": 5},
            {"name": "x" * 300},
            {"auth": b"token"},
            {"auth": "x" * 2000},
            {"codec": "pickle"},
            {"heartbeat": 0},
            {"heartbeat": float("nan")},
            {"limits": Limits()},
        ):
            with pytest.raises(ConfigError):
                EventClient(**options)  # type: ignore[arg-type]
        for value in (0, -1, True, 2**70, 1.5):
            with pytest.raises(ConfigError):
                ClientLimits(buffer_bytes=value)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            ClientLimits(packet_bytes=1 << 30)

    def test_secrets_are_not_shown(self) -> None:
        client = EventClient(auth="canary-token")
        with pytest.raises(ConfigError) as caught:
            EventClient(auth="canary-token" * 200)
        assert "canary" not in repr(client) + str(caught.value) + repr(caught.value)

    def test_timeouts_are_checked(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        for value in (-1, "1", float("nan"), True):
            for call in (
                lambda value=value: client.query("s", timeout=value),
                lambda value=value: client.flush(value),
                lambda value=value: client.rtt(value),
                lambda value=value: client.publish("s", "x", timeout=value),
                lambda value=value: client.disconnect(timeout=value),
            ):
                with pytest.raises(ConfigError, match="timeout"):
                    call()

    def test_disconnect_finishes_what_was_begun(self, server: EventServer, clients: Callable[..., EventClient]) -> None:
        handled = Log()
        witness = Log()
        clients().subscribe("drain.echo", witness, type=int)
        client = EventClient("127.0.0.1", server.port).connect()

        def slow(n: int) -> None:
            time.sleep(0.02)
            client.publish("drain.echo", n)
            handled(n)

        client.subscribe("drain.in", slow)
        for n in range(10):
            client.publish("drain.in", n)
        client.flush()
        client.disconnect()
        assert handled.items == list(range(10))
        assert witness.wait(10) == list(range(10))

    def test_disconnect_gives_up_at_its_deadline_and_says_what_was_left(
        self, server: EventServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = threading.Event()
        client = EventClient("127.0.0.1", server.port).connect()
        client.subscribe("stuck", lambda message: release.wait(WAIT))
        for _ in range(5):
            client.publish("stuck", b"")
        client.flush()
        begun = time.monotonic()
        client.disconnect(timeout=0.2)
        assert time.monotonic() - begun < 2
        assert any("4 messages unhandled" in record.getMessage() for record in caplog.records)
        release.set()

    def test_disconnect_without_draining(self, server: EventServer) -> None:
        release = threading.Event()
        client = EventClient("127.0.0.1", server.port).connect()
        client.subscribe("stuck", lambda message: release.wait(WAIT))
        client.publish("stuck", b"")
        client.flush()
        begun = time.monotonic()
        client.disconnect(drain=False)
        assert time.monotonic() - begun < 1
        release.set()

    def test_a_handler_may_disconnect(self, server: EventServer) -> None:
        done = threading.Event()
        client = EventClient("127.0.0.1", server.port).connect()

        def handler(message: Message) -> None:
            client.disconnect()
            done.set()

        client.subscribe("bye", handler)
        client.publish("bye", b"")
        assert done.wait(WAIT)
        assert client.status is ConnectStatus.CLOSED

    def test_the_last_messages_of_a_program_are_sent(
        self, server: EventServer, clients: Callable[..., EventClient]
    ) -> None:
        got = Log()
        clients().subscribe("last.words", got, type=int)
        code = (
            "import evbus\n"
            f"bus = evbus.connect('127.0.0.1:{server.port}')\n"
            "for n in range(1000): bus.publish('last.words', n)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
        assert got.wait(1000) == list(range(1000))


class TestEvents:
    def test_typed_handlers(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        got = Log()

        @client.on("mail")
        def on_mail(mail: Mail) -> None:
            got(mail)

        def on_search(search: Search) -> None:
            got(search)

        client.subscribe("search", on_search)
        client.subscribe("text", got, type=str)
        client.subscribe("raw", got, type=bytes)
        client.subscribe("when", got, type=datetime)
        client.subscribe("any", got, type=object)
        now = datetime.now(timezone.utc)
        values = [("mail", Mail("a", 1)), ("search", Search(["x"])), ("text", "ü"), ("raw", b"\0"), ("when", now)]
        values += [("any", {"k": [1, None]}), ("any", None)]
        for count, (subject, value) in enumerate(values, 1):
            client.publish(subject, value)
            got.wait(count)
        assert got.items == [value for _, value in values]

    def test_json_clients(self, clients: Callable[..., EventClient]) -> None:
        got = Log()
        client = clients(codec="json")
        client.subscribe("json", lambda message: got((message.data, message.decode(Mail))))
        client.publish("json", Mail("a", 1))
        assert got.wait(1) == [(b'{"subject":"a","size":1}', Mail("a", 1))]

    def test_the_envelope(self, clients: Callable[..., EventClient]) -> None:
        got = Log()
        receiver, sender = clients(), clients()
        receiver.subscribe("env.>", got, type=Message)
        before = time.time()
        sender.publish("env.a.b", "text", headers={"trace": "1"})
        (message,) = got.wait(1)
        assert (message.subject, message.data, message.headers) == ("env.a.b", b"text", {"trace": "1"})
        assert message.codec == Codec.TEXT
        assert abs(message.timestamp - before) < 5
        assert message.sender > 0
        assert not message.is_query

    def test_one_message_goes_to_every_matching_subscription_once(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        got = Log()
        for name, pattern in enumerate(("f.a", "f.*", "f.>", "f.a")):
            client.subscribe(pattern, lambda message, name=name: got((name, message.data)))
        client.publish("f.a", b"1")
        assert sorted(got.wait(4)) == [(name, b"1") for name in range(4)]
        client.publish("f.a", b"", confirm=True)
        got.wait(8)
        client.flush()
        assert len(got.items) == 8

    def test_order_is_kept(self, clients: Callable[..., EventClient]) -> None:
        publisher, subscriber = clients(), clients()
        got = Log()
        subscriber.subscribe("order.*", got, type=int)
        for n in range(20_000):
            publisher.publish(f"order.{n % 3}", n)
        assert got.wait(20_000) == list(range(20_000))

    def test_a_slow_handler_delays_nobody_else(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        release = threading.Event()
        got = Log()
        client.subscribe("slow", lambda message: release.wait(WAIT))
        client.subscribe("quick", got)
        client.publish("slow", b"")
        client.publish("quick", b"")
        got.wait(1)
        release.set()

    def test_a_handler_that_raises_is_reported_and_goes_on(
        self, clients: Callable[..., EventClient], caplog: pytest.LogCaptureFixture
    ) -> None:
        errors, got = Log(), Log()
        client = clients(on_error=errors)

        def handler(n: int) -> None:
            if n % 2:
                raise SystemExit(n) if n == 3 else ValueError(n)
            got(n)

        subscription = client.subscribe("bad", handler)
        for n in range(5):
            client.publish("bad", n)
        client.publish("bad", "no number")
        client.publish("bad", 6)
        assert got.wait(4) == [0, 2, 4, 6]
        reported = errors.wait(3)
        assert [type(error) for error, _ in reported] == [ValueError, SystemExit, CodecError]
        assert [message.subject for _, message in reported] == ["bad"] * 3
        assert subscription.errors == client.stats().handler_errors == 3
        assert [record.exc_info is not None for record in caplog.records if "bad" in record.getMessage()] == [
            True,
            True,
            False,
        ]

    def test_an_on_error_that_raises_does_no_harm(self, clients: Callable[..., EventClient]) -> None:
        def on_error(error: BaseException, message: Message | None) -> None:
            raise RuntimeError

        client = clients(on_error=on_error)
        got = Log()

        def handler(data: bytes) -> None:
            got(data)
            raise ValueError

        client.subscribe("s", handler)
        client.publish("s", b"1")
        client.publish("s", b"2")
        assert got.wait(2) == [b"1", b"2"]

    def test_iteration(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        with client.subscribe("it.*") as subscription:
            for n in range(5):
                client.publish(f"it.{n}", n)
            found = []
            for message in subscription:
                found.append(message.decode(int))
                if len(found) == 5:
                    break
            assert found == [0, 1, 2, 3, 4]
            with pytest.raises(TimeoutError):
                subscription.next(0.01)
            with pytest.raises(TimeoutError):
                subscription.next(0)
            assert subscription.is_active
            assert (subscription.subject, subscription.group, subscription.handler) == ("it.*", None, None)
        assert not subscription.is_active
        assert list(subscription) == []
        assert "ended" in repr(subscription)

    def test_an_iteration_ends_when_another_thread_unsubscribes(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        subscription = client.subscribe("it")
        found = Log()

        def consume() -> None:
            for message in subscription:
                found(message.data)
            found("end")

        threads = [threading.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(100):
            client.publish("it", b"%d" % n)
        found.wait(100)
        subscription.unsubscribe()
        for thread in threads:
            thread.join(WAIT)
        assert sorted(item for item in found.items if item != "end") == sorted(b"%d" % n for n in range(100))
        assert found.items.count("end") == 3

    def test_a_subscription_with_a_handler_is_not_iterable(self, clients: Callable[..., EventClient]) -> None:
        subscription = clients().subscribe("s", lambda message: None)
        with pytest.raises(TypeError, match="handler"):
            iter(subscription)
        with pytest.raises(TypeError, match="handler"):
            subscription.next(1)

    def test_unsubscribing(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        first, second = Log(), Log()
        client.subscribe("u", first)
        client.subscribe("u", second)
        client.publish("u", b"1")
        first.wait(1)
        second.wait(1)
        client.unsubscribe("u", first)
        client.publish("u", b"2")
        second.wait(2)
        client.unsubscribe("u")
        client.unsubscribe("u")
        client.unsubscribe("never")
        assert client.publish("u", b"3", confirm=True) == Receipt(0)
        assert (len(first.items), len(second.items)) == (1, 2)

    def test_no_handler_call_begins_after_unsubscribe(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        calls = Log()
        begun, release = threading.Event(), threading.Event()

        def handler(data: bytes) -> None:
            calls(data)
            begun.set()
            release.wait(WAIT)

        subscription = client.subscribe("u", handler)
        for n in range(10):
            client.publish("u", b"%d" % n)
        client.flush()
        assert begun.wait(WAIT)
        subscription.unsubscribe()
        release.set()
        client.flush()
        assert calls.items == [b"0"]
        assert subscription.discarded == 9

    def test_a_handler_may_unsubscribe_itself_and_subscribe_others(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        got = Log()

        def once(data: bytes) -> None:
            client.unsubscribe("once", once)
            client.subscribe("next", got, type=bytes)
            client.publish("next", data + b"!")

        client.subscribe("once", once)
        client.publish("once", b"1")
        client.publish("once", b"2")
        assert got.wait(1) == [b"1!"]

    def test_concurrency(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        barrier = threading.Barrier(4)
        done = Log()

        def handler(n: int) -> None:
            barrier.wait(WAIT)
            done(n)

        client.subscribe("c", handler, concurrency=4)
        for n in range(8):
            client.publish("c", n)
        assert sorted(done.wait(8)) == list(range(8))

    def test_groups_share(self, clients: Callable[..., EventClient]) -> None:
        logs = [Log(), Log()]
        for log in logs:
            clients().subscribe("g", log, type=int, group="workers")
        publisher = clients()
        everyone = Log()
        publisher.subscribe("g", everyone, type=int)
        for n in range(100):
            publisher.publish("g", n)
        everyone.wait(100)
        for log in logs:
            log.wait(1)
        deadline = time.monotonic() + WAIT
        while len(logs[0].items) + len(logs[1].items) < 100 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert sorted(logs[0].items + logs[1].items) == list(range(100))

    def test_a_flooded_subscription_ends_and_others_go_on(self, clients: Callable[..., EventClient]) -> None:
        errors, got = Log(), Log()
        client = clients(on_error=errors)
        release = threading.Event()
        flooded = client.subscribe("flood", lambda message: release.wait(WAIT), max_pending_msgs=10)
        client.subscribe("flood", got)
        for n in range(50):
            client.publish("flood", n)
        got.wait(50)
        ((error, message),) = errors.wait(1)
        assert isinstance(error, SlowConsumerError)
        assert message is None
        assert (error.subject, error.limit) == ("flood", 10)
        assert not flooded.is_active
        release.set()

    def test_a_flooded_iteration_ends_with_the_error(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        subscription = client.subscribe("flood", max_pending_msgs=10)
        for n in range(50):
            client.publish("flood", n)
        client.flush()
        found = []
        with pytest.raises(SlowConsumerError):
            for message in subscription:
                found.append(message.decode())  # noqa: PERF401 - it raises in between
        assert found == list(range(10))
        assert list(subscription) == []
        assert client.stats().dropped == 40

    @pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", range(10)), ("drop_oldest", range(40, 50))])
    def test_dropping_is_counted(self, clients: Callable[..., EventClient], overflow: str, kept: range) -> None:
        client = clients()
        subscription = client.subscribe("flood", max_pending_msgs=10, overflow=overflow)
        for n in range(50):
            client.publish("flood", n)
        client.flush()
        assert [subscription.next(1).decode() for _ in range(10)] == list(kept)
        assert (subscription.dropped, client.stats().dropped) == (40, 40)
        assert subscription.is_active

    @pytest.mark.parametrize(
        ("overflow", "found"),
        [("drop_newest", [0, 1, 2, ("gap", 7), 10]), ("drop_oldest", [("gap", 7), 7, 8, 9, 10])],
    )
    def test_iteration_tells_of_what_was_dropped(
        self, clients: Callable[..., EventClient], overflow: str, found: list[object]
    ) -> None:
        client = clients()
        seen: list[object] = []
        subscription = client.subscribe(
            "flood", max_pending_msgs=3, overflow=overflow, on_gap=lambda gap: seen.append(("gap", gap.count))
        )
        for n in range(10):
            client.publish("flood", n)
        client.flush()
        for _ in range(3):
            seen.append(subscription.next(5).decode())  # noqa: PERF401 - on_gap appends too
        client.publish("flood", 10)
        client.flush()
        seen.append(subscription.next(5).decode())
        assert seen == found
        assert (subscription.missed, client.stats().missed) == (7, 7)

    def test_a_handler_is_told_of_gaps_in_order(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        seen: list[object] = []
        entered, go, done = threading.Event(), threading.Event(), threading.Event()

        def handler(number: int) -> None:
            seen.append(number)
            entered.set()
            assert go.wait(10)
            if number == 99:
                done.set()

        client.subscribe("flood", handler, max_pending_msgs=3, overflow="drop_newest", on_gap=seen.append)
        client.publish("flood", 0)
        assert entered.wait(10)
        for n in range(1, 10):
            client.publish("flood", n)
        client.flush()
        go.set()
        wait_for(lambda: client.stats().pending_msgs == 0)
        client.publish("flood", 99)
        assert done.wait(10)
        assert seen == [0, 1, 2, 3, Gap("flood", 6, "overflow"), 99]

    def test_without_on_gap_on_error_is_told(
        self, clients: Callable[..., EventClient], caplog: pytest.LogCaptureFixture
    ) -> None:
        errors: list[BaseException] = []
        client = clients(on_error=lambda error, message: errors.append(error))
        subscription = client.subscribe("flood", max_pending_msgs=1, overflow="drop_newest")
        for n in range(5):
            client.publish("flood", n)
        client.flush()
        assert subscription.next(5).decode() == 0
        client.publish("flood", 9)
        assert subscription.next(5).decode() == 9
        wait_for(lambda: errors)
        assert isinstance(errors[0], SlowConsumerError)
        assert (errors[0].missed, errors[0].subject) == (4, "flood")
        assert "missed 4 messages" in str(errors[0])
        assert sum("missed 4 messages" in record.getMessage() for record in caplog.records) == 1

    def test_what_on_gap_raises_is_a_handlers_error(self, clients: Callable[..., EventClient]) -> None:
        errors: list[object] = []
        client = clients(on_error=lambda error, message: errors.append((error, message)))
        failure = ValueError("no")

        def on_gap(gap: Gap) -> None:
            raise failure

        subscription = client.subscribe("flood", max_pending_msgs=1, overflow="drop_newest", on_gap=on_gap)
        for n in range(5):
            client.publish("flood", n)
        client.flush()
        assert subscription.next(5).decode() == 0
        client.publish("flood", 9)
        assert subscription.next(5).decode() == 9
        wait_for(lambda: errors)
        assert errors == [(failure, None)]
        assert (subscription.errors, client.stats().handler_errors) == (1, 1)
        with pytest.raises(ConfigError, match="on_gap"):
            client.subscribe("flood", on_gap=5)  # type: ignore[arg-type]

    def test_wrong_options(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        for options in (
            {"overflow": "whatever"},
            {"concurrency": 0},
            {"max_pending_msgs": 0},
            {"max_pending_bytes": -1},
            {"group": ""},
            {"group": 5},
            {"group": "a\nb"},
        ):
            with pytest.raises(ConfigError):
                client.subscribe("s", lambda message: None, **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="type"):
            client.subscribe("s", type=int)
        with pytest.raises(TypeError):
            client.subscribe("s", lambda: None)  # type: ignore[arg-type, misc]
        with pytest.raises(TypeError):
            client.subscribe("s", 5)  # type: ignore[arg-type]
        for subject in ("", "a..b", "a.>.b", "*x"):
            with pytest.raises(InvalidSubjectError):
                client.subscribe(subject)
        assert client.stats().subscriptions == 0

    def test_a_refused_subscription_is_no_subscription(self) -> None:
        limits = Limits(subscriptions_per_connection=2)
        with EventServer(port=0, limits=limits) as server, EventClient("127.0.0.1", server.port) as client:
            client.subscribe("a")
            client.subscribe("b")
            with pytest.raises(evbus.RefusedError, match="too many subscriptions"):
                client.subscribe("c")
            assert client.stats().subscriptions == 2


class TestPublishing:
    def test_receipts(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        assert client.publish("receipt", b"", confirm=True) == Receipt(0)
        clients().subscribe("receipt", lambda message: None)
        clients().subscribe("receipt", lambda message: None)
        assert client.publish("receipt", {"a": 1}, confirm=True, headers={"k": "v"}) == Receipt(2)

    def test_what_cannot_be_sent(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        for subject in ("", "a b.", "a.*", ">", "x" * 257, "\ud800"):
            with pytest.raises(InvalidSubjectError):
                client.publish(subject, b"")
        with pytest.raises(TypeError):
            client.publish(None, b"")  # type: ignore[arg-type]
        with pytest.raises(CodecError) as caught:
            client.publish("s", object())
        assert caught.value.subject == "s"
        for size in ((1 << 20) + 1, 3 << 20):
            with pytest.raises(PayloadTooLargeError):
                client.publish("s", b"x" * size)
            with pytest.raises(PayloadTooLargeError):
                client.publish("s", b"x" * size, confirm=True)
            with pytest.raises(PayloadTooLargeError):
                client.query("s", b"x" * size)
        with pytest.raises(ConfigError):
            client.publish("s", b"", headers={"k": 5})  # type: ignore[dict-item]
        client.flush()

    def test_the_largest_payload(self, clients: Callable[..., EventClient]) -> None:
        client = clients()
        got = Log()
        client.subscribe("large", got, type=bytes)
        payload = random.Random(1).randbytes(1 << 20)
        for _ in range(8):
            client.publish("large", payload)
        assert got.wait(8) == [payload] * 8

    def test_many_threads_on_one_client(self, clients: Callable[..., EventClient]) -> None:
        client, other = clients(), clients()
        got: dict[int, list[int]] = {}
        done = threading.Event()

        def handler(item: tuple[int, int]) -> None:
            got.setdefault(item[0], []).append(item[1])
            if sum(map(len, got.values())) == 8 * 3000:
                done.set()

        other.subscribe("threads.*", handler)
        other.on_query("threads.q")(lambda message: message.decode(int) + 1)
        failures: list[BaseException] = []

        def work(thread: int) -> None:
            try:
                rng = random.Random(thread)
                for n in range(3000):
                    client.publish(f"threads.{rng.randrange(4)}", (thread, n))
                    if n % 300 == 0:
                        assert client.query("threads.q", n, int, timeout=WAIT) == n + 1
                    if n % 1000 == 0:
                        assert client.publish("threads.none", b"x", confirm=True) is not None
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        other.unsubscribe("threads.*")
        other.subscribe("threads.*", handler, type=Any)
        other.unsubscribe("threads.*")
        other.subscribe("threads.0", handler)
        for n in range(1, 4):
            other.subscribe(f"threads.{n}", handler, concurrency=1)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        client.flush()
        deadline = time.monotonic() + WAIT
        while sum(map(len, got.values())) < 8 * 3000 and time.monotonic() < deadline:
            time.sleep(0.01)
        # Four subscriptions, so four threads: order holds within each subject only. All are there, each once.
        assert {thread: sorted(numbers) for thread, numbers in got.items()} == {n: list(range(3000)) for n in range(8)}

    def test_flush_raises_what_the_server_refused(self) -> None:
        script = ScriptedServer(lambda peer: peer.refuse_publishes())
        errors = Log()
        with script, EventClient("127.0.0.1", script.port, on_error=errors) as client:
            client.publish("s", b"")
            with pytest.raises(evbus.PermissionDeniedError):
                client.flush()
            client.flush()
            ((error, message),) = errors.wait(1)
            assert isinstance(error, evbus.PermissionDeniedError)
            assert message is None

    def test_a_server_that_does_not_read_makes_publish_wait(self) -> None:
        limits = ClientLimits(buffer_bytes=100_000)
        release = threading.Event()
        script = ScriptedServer(lambda peer: peer.stall(release))
        with script, EventClient("127.0.0.1", script.port, limits=limits) as client:
            payload = b"x" * 10_000
            with pytest.raises(BufferFullError) as caught:
                for _ in range(10_000):
                    client.publish("s", payload, timeout=0)
            assert caught.value.limit == 100_000
            begun = time.monotonic()
            with pytest.raises(BufferFullError):
                client.publish("s", payload, timeout=0.1)
            assert 0.09 < time.monotonic() - begun < 2
            assert client.stats().pending_bytes <= 100_000
            waited = threading.Thread(target=client.publish, args=("s", payload))
            waited.start()
            waited.join(0.05)
            assert waited.is_alive()
            release.set()
            waited.join(WAIT)
            assert not waited.is_alive()
            client.flush()

    def test_losing_the_connection_ends_the_wait(self) -> None:
        script = ScriptedServer(lambda peer: peer.stall(threading.Event(), until=0.3))
        errors = Log()
        with (
            script,
            EventClient("127.0.0.1", script.port, limits=ClientLimits(buffer_bytes=100_000), on_error=errors) as c,
        ):
            with pytest.raises(NotConnectedError):
                while True:
                    c.publish("s", b"x" * 10_000)
            ((error, _),) = errors.wait(1)
            assert isinstance(error, ConnectionLostError)
            assert "bytes were not sent" in str(error)


class TestQueries:
    def test_typed(self, clients: Callable[..., EventClient]) -> None:
        server, client = clients(), clients()

        @server.on_query("search")
        def search(wanted: Search) -> list[Mail]:
            return [Mail(word, len(word)) for word in wanted.words]

        assert client.query("search", Search(["a", "bb"]), list[Mail]) == [Mail("a", 1), Mail("bb", 2)]
        assert client.query("search", Search([])) == []
        answer = client.query("search", Search(["x"]), Message, headers={"k": "v"})
        assert isinstance(answer, Message)
        assert answer.decode(list[Mail]) == [Mail("x", 1)]
        assert answer.subject == "search"
        with pytest.raises(CodecError) as caught:
            client.query("search", Search(["x"]), int)
        assert caught.value.subject == "search"
        with pytest.raises(CodecError):
            client.query("search", Search(["x"]), threading.Thread)

    def test_every_way_to_end(self, clients: Callable[..., EventClient]) -> None:
        server, client = clients(), clients()
        begun, release = threading.Event(), threading.Event()

        @server.on_query("fails")
        def fails(message: Message) -> None:
            raise KeyError("missing")

        @server.on_query("refuses")
        def refuses(message: Message) -> None:
            message.fail(404, "no such thing")

        @server.on_query("slow")
        def slow(message: Message) -> None:
            begun.set()
            release.wait(WAIT)

        begin = time.monotonic()
        with pytest.raises(NoRespondersError):
            client.query("nobody")
        assert time.monotonic() - begin < 1
        with pytest.raises(RemoteError) as failed:
            client.query("fails")
        assert (failed.value.code, failed.value.text) == (500, "KeyError: 'missing'")
        with pytest.raises(RemoteError) as failed:
            client.query("refuses")
        assert (failed.value.code, failed.value.text) == (404, "no such thing")
        begin = time.monotonic()
        with pytest.raises(QueryTimeoutError) as late:
            client.query("slow", timeout=0.2)
        assert 0.19 < time.monotonic() - begin < 1
        assert late.value.timeout == 0.2
        begun.clear()
        outcome = Log()

        def ask() -> None:
            try:
                client.query("slow2", timeout=WAIT)
            except ResponderLostError as exc:
                outcome(exc)

        leaver = clients()
        leaver.on_query("slow2")(lambda message: (begun.set(), release.wait(WAIT)))
        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(WAIT)
        leaver.disconnect(drain=False)
        outcome.wait(1)
        thread.join(WAIT)
        release.set()
        assert client.stats().pending_queries == 0

    def test_a_handler_may_query(self, clients: Callable[..., EventClient]) -> None:
        client = clients()

        @client.on_query("fib", concurrency=8)
        def fib(n: int) -> int:
            return n if n < 2 else client.query("fib", n - 1, int) + client.query("fib", n - 2, int)

        assert client.query("fib", 5, int, timeout=WAIT) == 5

    def test_plain_subscribers_answer_where_there_is_no_responder(self, clients: Callable[..., EventClient]) -> None:
        one, two = clients(), clients()
        one.subscribe("q", lambda text: f"re: {text}", type=str)
        assert two.query("q", "hello", str) == "re: hello"
        two.on_query("q")(lambda message: "responder")
        assert two.query("q", "hello", str) == "responder"

    def test_publishing_on_the_subject_answers(self, clients: Callable[..., EventClient]) -> None:
        one, two = clients(), clients()
        events = Log()
        two.subscribe("q.other", events)

        def handler(message: Message) -> None:
            one.publish("q.other", b"side effect")
            if message.is_query:
                assert one.publish("q", b"answer", confirm=True) is not None

        one.subscribe("q", handler)
        assert two.query("q", b"?", bytes) == b"answer"
        events.wait(1)
        two.publish("q", b"an event")
        events.wait(2)

    def test_responders_take_turns(self, clients: Callable[..., EventClient]) -> None:
        for name in ("a", "b", "c"):
            clients().on_query("turns")(lambda message, name=name: name)
        client = clients()
        answers = [client.query("turns", response=str) for _ in range(9)]
        assert {answers.count(name) for name in "abc"} == {3}

    def test_many_at_once(self, clients: Callable[..., EventClient]) -> None:
        server, client = clients(), clients()
        server.on_query("echo", concurrency=4)(lambda message: message.data)
        failures = Log()

        def ask(thread: int) -> None:
            for n in range(100):
                question = b"%d/%d" % (thread, n)
                if client.query("echo", question, bytes, timeout=WAIT) != question:
                    failures(question)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures.items == []
        assert client.stats().pending_queries == 0


class Peer:
    """One connection of a scripted server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ring = Ring()

    def receive(self) -> tuple[int, int, int, int, bytes] | None:
        """The next packet; None at the end."""
        while (packet := next_packet(self.ring, 23, 1 << 26)) is None:
            data = self.sock.recv(65536)
            if not data:
                return None
            self.ring.write(data)
        return packet

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def shake(self) -> None:
        """Accept as an evbus server."""
        packet = self.receive()
        assert packet is not None
        task_id = (unpack(packet[4], "b") or ())[0]
        self.send(pack(23, 254, 1, 0, 0, "sBs", task_id, 1, 'evbus/1 {"version": 2, "server": "script"}'))

    def packets(self) -> Iterator[tuple[int, bytes]]:
        """What the client sends; heartbeats are echoed, requests acknowledged."""
        while (packet := self.receive()) is not None:
            object_id, _, _, _, body = packet
            if object_id == 199:
                self.send(pack(23, 199, 1, 0, 0, "i", int.from_bytes(body[:4], "little")))
            elif object_id in (2, 3):
                self.send(pack(23, 254, 1, 0, 0, "sBs", (unpack(body, "b") or ())[0], 1, ""))
            yield object_id, body

    def serve(self) -> None:
        for _ in self.packets():
            pass

    def refuse_publishes(self) -> None:
        self.shake()
        for object_id, _ in self.packets():
            if object_id == 4:
                self.send(pack(23, 1000, 1, 0, 0, "siss", "", 4, "s", "no"))

    def stall(self, release: threading.Event, until: float = WAIT) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.shake()
        packet = self.receive()
        assert packet is not None
        self.send(pack(23, 199, 1, 0, 0, "i", int.from_bytes(packet[4], "little")))
        if release.wait(until):
            self.serve()


class ScriptedServer:
    """A server on a real port whose connections are played by a function."""

    def __init__(self, play: Callable[[Peer], object]) -> None:
        self._play = play
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []

    def __enter__(self) -> ScriptedServer:
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        return self

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        try:
            self._play(Peer(sock))
        except (OSError, AssertionError):
            pass
        finally:
            sock.close()

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            sock.close()


@contextmanager
def connected(play: Callable[[Peer], object], **options: Any) -> Iterator[EventClient]:
    with ScriptedServer(play) as script, EventClient("127.0.0.1", script.port, **options) as client:
        yield client


class TestStrangers:
    def test_nobody_there(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            client = EventClient("127.0.0.1", port)
            with pytest.raises(ConnectError, match=f"127.0.0.1:{port}.*refused.*evbus serve") as caught:
                client.connect()
        assert not isinstance(caught.value, NotEventServerError)
        assert client.status is ConnectStatus.DISCONNECTED

    def test_unknown_hosts(self) -> None:
        with pytest.raises(ConnectError, match="unknown"):
            EventClient("no-such-host.invalid").connect()
        with pytest.raises(ConnectError):
            EventClient("x" * 300).connect()

    @pytest.mark.parametrize(
        "greeting",
        [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"\0" * 100, b"\x16\x03\x01" * 20],
        ids=["http", "ssh", "zeros", "tls"],
    )
    def test_another_protocol(self, greeting: bytes) -> None:
        def play(peer: Peer) -> None:
            peer.send(greeting)
            peer.serve()

        with ScriptedServer(play) as script:
            client = EventClient("127.0.0.1", script.port)
            begun = time.monotonic()
            with pytest.raises(NotEventServerError):
                client.connect()
            assert time.monotonic() - begun < 1
            assert client.status is ConnectStatus.NOT_EVENT_SERVER

    def test_silence(self) -> None:
        with ScriptedServer(lambda peer: peer.serve()) as script:
            begun = time.monotonic()
            with pytest.raises(NotEventServerError, match="did not answer"):
                EventClient("127.0.0.1", script.port).connect(timeout=0.2)
            assert time.monotonic() - begun < 1

    def test_hanging_up(self) -> None:
        with (
            ScriptedServer(lambda peer: peer.receive()) as script,
            pytest.raises(NotEventServerError, match="ended during the handshake"),
        ):
            EventClient("127.0.0.1", script.port).connect()

    def test_after_a_failed_attempt_one_may_try_again(self, server: EventServer) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        client = EventClient("127.0.0.1", port)
        with pytest.raises(NotEventServerError):
            client.connect(timeout=0.05)
        listener.close()
        with pytest.raises(ConnectError):
            client.connect()
        with EventServer(port=port), client:
            assert client.rtt() > 0

    def test_a_refused_token(self) -> None:
        def play(peer: Peer) -> None:
            packet = peer.receive()
            assert packet is not None
            fields = unpack(packet[4], "ss")
            assert fields is not None
            assert fields[1] == "wrong"
            peer.send(pack(23, 254, 1, 0, 0, "sBs", fields[0], 2, "unknown token"))
            peer.serve()

        with ScriptedServer(play) as script, pytest.raises(evbus.AuthError, match="unknown token"):
            EventClient("127.0.0.1", script.port, auth="wrong").connect()

    def test_garbage_from_a_server_never_crashes_a_client(self) -> None:
        rng = random.Random(7)
        good = [
            pack(23, 5, 2, 1, 2, "BBiisssyy", flags, codec, sid, 0, "t", "s", "q", b"", b"data")
            for flags in (0, 8, 16, 255)
            for codec in (0, 3, 200)
            for sid in (0, 1, -1)
        ]
        good += [pack(23, number, 1, 0, 0, "i", 5) for number in (254, 199, 1000, 1001, 1002, 1003, 1005, 1006, 9)]

        def play(peer: Peer) -> None:
            peer.shake()
            for _ in range(2):
                peer.receive()
            for _ in range(rng.randrange(1, 30)):
                packet = bytearray(rng.choice(good))
                for _ in range(rng.randrange(0, 4)):
                    packet[rng.randrange(len(packet))] = rng.randrange(256)
                if rng.random() < 0.7:
                    packet[:4] = struct.pack("<I", len(packet))
                peer.send(bytes(packet))
            peer.send(rng.randbytes(rng.randrange(100)))

        with ScriptedServer(play) as script:
            for _ in range(60):
                errors = Log()
                client = EventClient("127.0.0.1", script.port, on_error=errors)
                client.subscribe("s", lambda message: message.headers)
                client.subscribe("s", lambda mail: None, type=Mail)
                with suppress(ConnectError):
                    client.connect(timeout=1.0)
                deadline = time.monotonic() + WAIT
                while client.status is ConnectStatus.CONNECTED and time.monotonic() < deadline:
                    time.sleep(0.001)
                client.disconnect()

    def test_a_huge_claim_costs_nothing(self) -> None:
        def play(peer: Peer) -> None:
            peer.shake()
            peer.receive()
            peer.send(struct.pack("<I", 60_000_000) + b"x" * 100)
            peer.serve()

        errors = Log()
        with ScriptedServer(play) as script, pytest.raises(ConnectError):
            EventClient("127.0.0.1", script.port, on_error=errors).connect()

    def test_a_connection_that_breaks(self) -> None:
        def play(peer: Peer) -> None:
            peer.shake()
            for object_id, _ in peer.packets():
                if object_id == 6:
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return

        errors, statuses = Log(), Log()
        with ScriptedServer(play) as script:
            client = EventClient(
                "127.0.0.1", script.port, reconnect=False, on_error=errors, on_status=statuses
            ).connect()
            subscription = client.subscribe("it")
            with pytest.raises(ConnectionLostError):
                client.query("q", timeout=WAIT)
            ((error, message),) = errors.wait(1)
            assert isinstance(error, ConnectionLostError)
            assert message is None
            assert statuses.wait(3)[2] is ConnectStatus.DISCONNECTED
            with pytest.raises(ConnectionLostError):
                subscription.next(WAIT)
            with pytest.raises(NotConnectedError, match="DISCONNECTED"):
                client.publish("s", b"")
            client.connect()
            assert client.rtt() > 0
            with pytest.raises(TimeoutError):
                subscription.next(0.01)
            client.disconnect()

    def test_a_silent_server_is_noticed(self) -> None:
        def play(peer: Peer) -> None:
            peer.shake()
            packet = peer.receive()
            assert packet is not None
            peer.send(pack(23, 199, 1, 0, 0, "i", int.from_bytes(packet[4], "little")))
            while peer.receive() is not None:
                pass

        errors = Log()
        with connected(play, heartbeat=0.2, reconnect=False, on_error=errors) as client:
            begun = time.monotonic()
            ((error, _),) = errors.wait(1)
            assert isinstance(error, ConnectionLostError)
            assert time.monotonic() - begun < 2
            assert client.status is ConnectStatus.DISCONNECTED

    def test_a_server_that_never_confirms(self) -> None:
        def play(peer: Peer) -> None:
            peer.shake()
            first = True
            for object_id, body in iter(peer.packets()):
                if object_id == 199 and first:
                    first = False
                del body

        with connected(play) as client:
            with pytest.raises(ConfirmTimeoutError):
                client.publish("s", b"", confirm=True, timeout=0.1)
            assert client.stats().pending_queries == 0

    def test_a_version_1_server(self) -> None:
        """As the C# server does it: no announcement, every request acknowledged, queries by a flag."""
        ticks = 639_000_000_000_000_000

        def play(peer: Peer) -> None:
            for object_id, version, _, _, body in iter(peer.receive, None):
                assert version == 1
                task_id, *rest = unpack(body, "bb" if object_id in (2, 3, 4, 6) else "b") or (b"",)
                if object_id == 199:
                    peer.send(pack(23, 199, 1, ticks, 0, "i", int.from_bytes(body[:4], "little")))
                elif object_id == 6:
                    fields = unpack(body, "bby")
                    assert fields is not None
                    peer.send(pack(23, 5, 1, ticks, 0, "ssBy", task_id, rest[0], 1, fields[2]))
                elif object_id == 4:
                    fields = unpack(body, "bbby")
                    assert fields is not None
                    answered = fields[2]
                    peer.send(pack(23, 5, 1, ticks, 0, "ssBy", answered or task_id, rest[0], 0, fields[3]))
                    peer.send(pack(23, 254, 1, ticks, 0, "sBs", task_id, 1, ""))
                else:
                    peer.send(pack(23, 254, 1, ticks, 0, "sBs", task_id, 1, ""))

        with connected(play) as client:
            got = Log()
            subscription = client.subscribe("s", got, type=bytes)
            client.subscribe("s", got, type=bytes)
            client.publish("s", b"x")
            assert got.wait(2) == [b"x", b"x"]
            assert client.publish("s", b"y", confirm=True, headers={"lost": "here"}) == Receipt(-1)
            client.on_query("q")(lambda message: b"re: " + message.data)
            assert client.query("q", b"?", bytes) == b"re: ?"
            subscription.unsubscribe()
            with pytest.raises(evbus.RefusedError):
                client.subscribe("p.*")
            assert client.rtt() > 0


def test_logging(server: EventServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="evbus.client")
    with EventClient("127.0.0.1", server.port):
        pass
    lines = [record.getMessage() for record in caplog.records if record.name == "evbus.client"]
    assert len(lines) == 2
    assert lines[0].startswith(f"connected to 127.0.0.1:{server.port} (evbus ")
    assert lines[1] == f"disconnected from 127.0.0.1:{server.port}"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, evbus; assert not {'msgspec', 'socket', 'evbus.client'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_shell_names_no_part_of_the_protocol() -> None:
    import inspect

    from evbus import client, endings, io_thread, requests, routers, subscription, sync_replies, waiting, workers

    for module in (client, endings, io_thread, requests, routers, subscription, sync_replies, waiting, workers):
        source = inspect.getsource(module)
        for word in (
            "TaskId",
            "task_id",
            "ObjectId",
            "object_id",
            "back-off",
            "backoff",
            "jitter",
            "random",
            "uniform",
        ):
            assert word not in source, (module, word)
