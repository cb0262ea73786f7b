"""The clients' core: handshake, plan, correlation, heartbeats, queries; scripted, and over the simulated network."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
from simclient import SimClient
from simnet import CALM, Faults, SimNet

from evbus import wire
from evbus._frame import Ring, next_packet, pack, unpack
from evbus._inbox import Waiter
from evbus._mailbox import Mailbox
from evbus._outbox import Clock
from evbus.acceptor import Acceptor
from evbus.correlation import Sending
from evbus.errors import (
    AuthError,
    ClientClosedError,
    ConfigError,
    ConfirmTimeoutError,
    ConnectionLostError,
    NoRespondersError,
    NotConnectedError,
    NotEventServerError,
    PermissionDeniedError,
    ProtocolError,
    QueryTimeoutError,
    RefusedError,
    RemoteError,
    ResponderLostError,
    SlowConsumerError,
)
from evbus.limits import Limits
from evbus.message import ConnectStatus, Message, Receipt
from evbus.options import ClientLimits, SessionOptions
from evbus.plan import Interest
from evbus.reports import Reports
from evbus.server_core import ServerCore
from evbus.session import Session
from evbus.subscription import Subscription, Wishes
from evbus.wire import ErrorCode, ObjectId

TICKS = 639_000_000_000_000_000  # SystemId of a C# server


class Script:
    """A session, and the server's half played by the test."""

    def __init__(self, **options: Any) -> None:
        self.errors: list[tuple[BaseException, Message | None]] = []
        self.statuses: list[ConnectStatus] = []
        reports = Reports(
            lambda call: call(), lambda error, message: self.errors.append((error, message)), self.statuses.append
        )
        self.session = Session(SessionOptions(**options), Clock(77), reports, random=random.Random(1))
        self.session.address = "there:9100"
        self.out = Ring()
        self.now = 100.0
        self.ready: list[Any] = []
        self.notes: list[str] = []
        self.features: list[str] = []

    def flush(self, ring: Ring) -> int:
        self.out.write(ring.take())
        return 0

    def note(self) -> None:
        self.notes.append("done")

    def open(self) -> Waiter:
        return self.session.opened(self, self.now, 3.0, self.note)

    def said(self) -> list[tuple[int, int, int, int, bytes]]:
        """What the client has sent since the last call."""
        self.session.outbox.flush(True)
        found = []
        while (packet := next_packet(self.out, 23, 1 << 26)) is not None:
            found.append(packet)
        return found

    def hear(self, data: bytes) -> None:
        self.session.inbox.ring.write(data)
        self.session.received(self.now, lambda: self.ready.extend(self.session.inbox.take_ready()))

    def shake(self, dialect: int = wire.Dialect.EVBUS_2, **limits: int) -> Waiter:
        waiter = self.open()
        ((_, _, _, _, body),) = self.said()
        task_id = (unpack(body, "b") or ())[0]
        if dialect == wire.Dialect.EVBUS_2:
            facts = {"version": 2, "server": "test 1", "connection": 5, "limits": limits, "features": self.features}
            self.hear(response(task_id, text="evbus/1 " + json.dumps(facts)))
        else:
            self.hear(response(task_id, system_id=TICKS))
        return waiter

    def connect(self, dialect: int = wire.Dialect.EVBUS_2, **limits: int) -> Waiter:
        """Shake hands and echo the first heartbeat."""
        waiter = self.shake(dialect, **limits)
        self.echo()
        assert waiter.done
        waiter.result()
        return waiter

    def echo(self) -> list[tuple[int, int, int, int, bytes]]:
        """Echo heartbeats; returns the other packets."""
        others = []
        for packet in self.said():
            if packet[0] == ObjectId.HEARTBEAT:
                self.hear(pack(23, 199, 1, 0, 0, "i", int.from_bytes(packet[4], "little")))
            else:
                others.append(packet)
        return others

    def interest(self, subject: str, handler: Callable[[Any], Any] | None = None, **wishes: Any) -> Interest:
        return Subscription.make(
            self.session, subject, handler, Wishes(**wishes), lambda job: job(), lambda *_: 0
        ).interest

    def subscribe(self, subject: str, handler: Callable[[Any], Any] | None = None, **wishes: Any) -> Interest:
        """Subscribe, and have it acknowledged."""
        interest = self.interest(subject, handler, **wishes)
        waiter = self.session.subscribe(interest, self.note)
        if waiter is not None:
            self.said()
            self.hear(response(waiter.task_id))
            assert waiter.done
        return interest

    def run_handlers(self) -> None:
        boxes, self.ready = self.ready, []
        for box in boxes:
            box.wake()


def response(task_id: bytes, status: int = 1, text: str = "", system_id: int = 0) -> bytes:
    return pack(23, 254, 1, system_id, 0, "sBs", task_id, status, text)


def error(task_id: bytes, code: int, subject: str = "", text: str = "", sender: int = 0) -> bytes:
    return pack(23, 1000, 1, sender, 0, "siss", task_id, code, subject, text)


def delivery(
    subject: str, data: bytes = b"", *, flags: int = 0, sid: int = 0, task_id: bytes = b"", sender: int = 3
) -> bytes:
    return pack(23, 5, 2, sender, 0, "BBiisssyy", flags, 1, sid, 0, task_id, subject, "", b"", data)


def waiter_of(sending: Sending) -> Waiter:
    assert sending.pack()
    assert sending.waiter is not None
    return sending.waiter


class TestHandshake:
    def test_the_first_packet_is_what_c_sharp_servers_read_and_an_announcement(self) -> None:
        script = Script(name="me", token="secret", heartbeat_s=2.5)
        script.open()
        ((object_id, version, system_id, unix_ms, body),) = script.said()
        assert (object_id, version, system_id, unix_ms) == (1, 1, 0, 77)
        fields = unpack(body, "ssss", True)
        assert fields is not None
        task_id, token, client_id, announcement = fields
        assert task_id
        assert token == "secret"
        assert len(client_id) == 32
        int(client_id, 16)
        assert announcement.startswith("evbus/1 {")
        facts = json.loads(announcement[8:])
        assert facts.keys() == {"versions", "name", "client", "heartbeat", "features"}
        assert (facts["versions"], facts["name"], facts["heartbeat"]) == ([2, 2], "me", 2.5)
        assert "secret" not in announcement
        assert "secret" not in repr(script.session.options)

    def test_the_client_id_stays_and_request_ids_do_not(self) -> None:
        script = Script()
        script.open()
        first = unpack(script.said()[0][4], "sss")
        script.session.lost(None)
        script.open()
        second = unpack(script.said()[0][4], "sss")
        assert first is not None
        assert second is not None
        assert first[2] == second[2]
        assert first[0].split("-")[0] != second[0].split("-")[0]

    def test_an_evbus_server_is_spoken_to_in_version_2_within_its_limits(self) -> None:
        script = Script(heartbeat_s=9.0)
        waiter = script.shake(payload=1000, packet=70_000)
        assert not waiter.done
        assert [packet[0] for packet in script.echo()] == []
        waiter.result()
        facts = script.session.facts
        assert facts is not None
        assert (facts.connection, facts.server) == (5, "test 1")
        assert script.session.outbox.payload_limit_bytes == 1000
        assert script.session.inbox.limit_bytes == 70_000
        assert script.session.is_connected
        assert script.statuses == [ConnectStatus.CONNECTING, ConnectStatus.CONNECTED]

    def test_a_c_sharp_server_is_spoken_to_in_version_1(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        facts = script.session.facts
        assert facts is not None
        assert facts.dialect == wire.Dialect.H23_199
        script.session.publish("s", wire.Codec.BYTES, b"x").pack()
        ((object_id, version, _, _, body),) = script.said()
        assert (object_id, version) == (4, 1)
        assert unpack(body, "bbby", True) == (b"", b"s", b"", b"x")

    @pytest.mark.parametrize(
        ("status", "text", "system_id", "kind", "words"),
        [
            (2, "wrong token", 0, AuthError, "wrong token"),
            (2, "this server speaks protocol versions 3 to 4, the client 2 to 2", 0, NotEventServerError, "3 to 4"),
            (0, "", TICKS, NotEventServerError, "status 0"),
            (1, "", 134_000_000_000_000_000, NotEventServerError, "before 1.2"),
            (1, "evbus/1 {", 0, NotEventServerError, "not readable"),
            (1, "evbus/1 " + "[" * 30_000, 0, NotEventServerError, "not readable"),
            (1, "evbus/1 []", 0, NotEventServerError, "another version"),
            (1, 'evbus/1 {"version": 3}', 0, NotEventServerError, "another version"),
            (1, 'evbus/1 {"version": true}', 0, NotEventServerError, "another version"),
        ],
    )
    def test_refusals(self, status: int, text: str, system_id: int, kind: type[Exception], words: str) -> None:
        script = Script()
        waiter = script.open()
        script.hear(response(waiter.task_id, status, text, system_id))
        assert isinstance(script.session.failure, kind)
        script.session.lost(script.session.failure)
        with pytest.raises(kind, match=words):
            waiter.result()
        assert script.statuses[-1] is (
            ConnectStatus.DISCONNECTED if kind is AuthError else ConnectStatus.NOT_EVENT_SERVER
        )
        assert script.errors == []  # connect() raises it

    def test_what_a_server_claims_is_not_taken_on_trust(self) -> None:
        script = Script(limits=ClientLimits(packet_bytes=100_000))
        waiter = script.open()
        facts = {
            "version": 2,
            "server": ["?"],
            "connection": -1,
            "heartbeat": "often",
            "limits": {"payload": 2**70, "packet": 2**40, "subject": None},
            "features": {"x": 1},
            "surprise": [1, 2],
        }
        script.hear(response(waiter.task_id, text="evbus/1 " + json.dumps(facts)))
        script.echo()
        waiter.result()
        assert script.session.outbox.payload_limit_bytes == 1 << 20
        assert script.session.inbox.limit_bytes == 100_000
        script.hear(b"\xff\xff\xff\x7f")
        assert isinstance(script.session.failure, ProtocolError)

    @pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2p1\r\n", b"\0" * 40])
    def test_another_protocol_is_told_apart_at_once(self, garbage: bytes) -> None:
        script = Script()
        waiter = script.open()
        script.hear(garbage)
        assert script.session.failure is not None
        script.session.lost(script.session.failure)
        with pytest.raises(NotEventServerError, match="there:9100"):
            waiter.result()

    def test_silence_ends_it_at_the_deadline(self) -> None:
        script = Script()
        waiter = script.open()
        assert script.session.tick(script.now) == 103.0
        script.session.tick(103.0)
        script.session.lost(script.session.failure)
        with pytest.raises(NotEventServerError, match="within 3 s"):
            waiter.result()

    def test_so_does_a_server_that_never_confirms_the_subscriptions(self) -> None:
        script = Script()
        waiter = script.shake()
        script.now = 103.0
        script.session.tick(103.0)
        script.session.lost(script.session.failure)
        with pytest.raises(NotEventServerError, match="confirm the subscriptions"):
            waiter.result()

    @pytest.mark.parametrize("reason", [None, ConnectionResetError(104, "Connection reset by peer")])
    def test_so_does_a_connection_that_ends(self, reason: Exception | None) -> None:
        script = Script()
        waiter = script.open()
        script.session.lost(reason)
        with pytest.raises(NotEventServerError, match="ended during the handshake"):
            waiter.result()

    def test_answers_to_others_and_deliveries_before_it_are_skipped(self) -> None:
        script = Script()
        waiter = script.open()
        script.hear(response(b"other", 2, "no") + delivery("s") + pack(23, 199, 1, 0, 0, "i", 1) + error(b"", 4))
        assert script.session.failure is None
        script.hear(response(waiter.task_id, text='evbus/1 {"version": 2}'))
        script.echo()
        waiter.result()

    def test_the_answer_may_come_in_pieces_with_more_behind_it(self) -> None:
        script = Script()
        got: list[bytes] = []
        script.subscribe("s", lambda message: got.append(message.data))
        waiter = script.open()
        data = response(waiter.task_id, text='evbus/1 {"version": 2}') + delivery("s", b"1") + delivery("s", b"2")
        for byte in data:
            script.hear(bytes([byte]))
        script.run_handlers()
        assert got == [b"1", b"2"]

    def test_going_away_during_the_handshake_is_the_reason(self) -> None:
        script = Script()
        waiter = script.open()
        script.hear(pack(23, 1001, 1, 0, 0, "iis", 13, 0, "the server stops"))
        script.session.lost(None)
        with pytest.raises(NotEventServerError, match="the server stops"):
            waiter.result()


class TestSubscriptions:
    def test_version_2_names_each_by_its_id(self) -> None:
        script = Script()
        script.connect()
        first = script.interest("a.*", lambda m: None)
        waiter = script.session.subscribe(first, script.note)
        assert waiter is not None
        second = script.interest("q", lambda m: None, group="g", responder=True)
        script.session.subscribe(second, script.note)
        bodies = [packet[4] for packet in script.said() if packet[:2] == (2, 2)]
        assert [unpack(body, "bbiBBb", True) for body in bodies] == [
            (waiter.task_id, b"a.*", first.sid, 0, 0, b""),
            ((unpack(bodies[1], "b") or ())[0], b"q", second.sid, 1, 0, b"g"),
        ]
        ended = script.session.unsubscribe(first, script.note)
        assert ended is not None
        ((_, version, _, _, body),) = script.said()
        assert (version, unpack(body, "bi", True)) == (2, (ended.task_id, first.sid))
        assert script.session.unsubscribe(first, script.note) is None

    def test_version_1_counts_subjects(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        first, second = script.interest("a", lambda m: None), script.interest("a", lambda m: None)
        assert script.session.subscribe(first, script.note) is not None
        assert script.session.subscribe(second, script.note) is None
        ((object_id, version, _, _, body),) = script.said()
        assert (object_id, version) == (2, 1)
        assert (unpack(body, "bb", True) or ())[1] == b"a"
        assert script.session.unsubscribe(first, script.note) is None
        assert script.session.unsubscribe(second, script.note) is not None
        ((object_id, version, _, _, _),) = script.said()
        assert (object_id, version) == (3, 1)

    def test_version_1_has_no_groups_and_no_patterns(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        for interest in (script.interest("a.*", lambda m: None), script.interest("a", lambda m: None, group="g")):
            with pytest.raises(RefusedError, match="version-1"):
                script.session.subscribe(interest, script.note)
            assert not interest.active
        assert len(script.session.plan) == 0

    def test_version_1_asks_a_responder_before_plain_subscribers(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        plain: list[bool] = []
        asked: list[bytes] = []
        script.subscribe("q", lambda message: plain.append(message.is_query))
        script.subscribe("q", lambda message: asked.append(message.data) or b"answer", responder=True)

        def v1(is_query: int, data: bytes) -> bytes:
            return pack(23, 5, 1, TICKS, 0, "ssBy", "id", "q", is_query, data)

        script.hear(v1(1, b"?") + v1(0, b"event"))
        script.run_handlers()
        assert asked == [b"?"]
        assert plain == [False]
        ((_, version, _, _, body),) = [packet for packet in script.said() if packet[0] == 4]
        assert version == 1
        assert unpack(body, "bbby", True) == (b"", b"q", b"id", b"answer")

    def test_a_plan_made_before_is_restored_before_anything_else(self) -> None:
        script = Script()
        for subject in ("a", "b", "c"):
            assert script.session.subscribe(script.interest(subject, lambda m: None), script.note) is None
        script.shake()
        said = script.said()
        assert [packet[0] for packet in said] == [2, 2, 2, 199]
        assert [(unpack(packet[4], "bb") or ())[1] for packet in said[:3]] == [b"a", b"b", b"c"]

    def test_after_a_loss_too_and_what_was_unsubscribed_meanwhile_stays_so(self) -> None:
        script = Script()
        script.connect()
        kept, gone = script.subscribe("kept", lambda m: None), script.subscribe("gone", lambda m: None)
        script.session.lost(None)
        assert script.session.unsubscribe(gone, script.note) is None
        script.shake()
        assert [(unpack(packet[4], "bbi") or ())[1:] for packet in script.said()[:-1]] == [(b"kept", kept.sid)]

    def test_a_refused_subscription_leaves_the_plan(self) -> None:
        script = Script()
        script.connect()
        interest = script.interest("secret.>", lambda m: None)
        waiter = script.session.subscribe(interest, script.note)
        assert waiter is not None
        script.hear(error(waiter.task_id, ErrorCode.PERMISSION_DENIED, "secret.>", "no"))
        with pytest.raises(PermissionDeniedError) as caught:
            waiter.result()
        assert caught.value.action == "subscribe"
        assert not interest.active
        assert script.errors == []

    def test_refused_when_it_was_restored_it_is_told_to_on_error(self) -> None:
        script = Script()
        interest = script.subscribe("secret.>")
        lost: list[Exception] = []
        interest.on_lost = lost.append
        waiter = script.shake()
        task_id = (unpack(script.said()[0][4], "b") or ())[0]
        script.hear(error(task_id, ErrorCode.PERMISSION_DENIED, "secret.>", "no"))
        assert not interest.active
        assert [type(exc) for exc, _ in script.errors] == [PermissionDeniedError]
        assert [type(exc) for exc in lost] == [PermissionDeniedError]
        assert not waiter.done

    def test_a_flooded_subscription_is_closed_and_told(self) -> None:
        script = Script()
        script.connect()
        interest = script.subscribe("s", lambda m: None, max_pending_msgs=3)
        script.said()
        script.hear(delivery("s") * 5)
        assert [type(exc) for exc, _ in script.errors] == [SlowConsumerError]
        slow = script.errors[0][0]
        assert isinstance(slow, SlowConsumerError)
        assert (slow.subject, slow.pending, slow.limit, slow.unit) == ("s", 3, 3, "messages")
        assert [packet[0] for packet in script.said()] == [3]
        assert not interest.active
        script.run_handlers()
        stats = script.session.stats()
        assert (stats.handled, stats.dropped, stats.subscriptions) == (3, 2, 0)

    def test_a_withdrawn_interest_takes_what_is_on_its_way_and_is_not_restored(self) -> None:
        script = Script()
        script.connect()
        leaving, staying = script.subscribe("a"), script.subscribe("a")
        waiter = script.session.withdraw(leaving, script.note)
        assert waiter is not None
        assert script.session.withdraw(leaving) is None
        ((object_id, version, *_),) = script.said()
        assert (object_id, version) == (ObjectId.UNSUBSCRIBE, 2)
        script.hear(delivery("a", b"on its way") + response(waiter.task_id))
        assert waiter.done
        assert (leaving.mailbox.received, leaving.active) == (1, True)
        script.session.lost(None)
        script.shake()
        assert [packet[0] for packet in script.echo()] == [ObjectId.SUBSCRIBE]  # of the one that stays
        assert script.session.unsubscribe(leaving) is None  # the server has nothing to be told
        script.hear(delivery("a"))
        assert (leaving.mailbox.received, staying.mailbox.received) == (1, 2)

    def test_a_version_1_server_is_told_of_the_last_one_that_leaves(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        first, second = script.subscribe("a"), script.subscribe("a")
        assert script.session.withdraw(first) is None
        assert script.said() == []
        assert script.session.withdraw(second) is not None
        ((object_id, version, *_),) = script.said()
        assert (object_id, version) == (ObjectId.UNSUBSCRIBE, 1)

    def test_drain_withdraws_everything_and_still_takes_what_comes(self) -> None:
        script = Script()
        script.connect()
        got: list[bytes] = []
        script.subscribe("s", lambda message: got.append(message.data))
        waiter = script.session.drain(script.note)
        assert waiter is not None
        said = script.said()
        assert [packet[0] for packet in said] == [3, 199]
        script.hear(delivery("s", b"late") + pack(23, 199, 1, 0, 0, "i", int.from_bytes(said[1][4], "little")))
        assert waiter.done
        script.run_handlers()
        assert got == [b"late"]
        with pytest.raises(ClientClosedError):
            script.session.subscribe(script.interest("x", lambda m: None))


class TestRequests:
    def test_a_query_carries_its_deadline_and_gets_its_answer(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(
            script.session.query("q", wire.Codec.TEXT, b"?", timeout=1.5, headers={"k": "v"}, notify=script.note)
        )
        ((object_id, version, _, _, body),) = script.said()
        assert (object_id, version) == (6, 2)
        assert unpack(body, "BBiibbbyy", True) == (0, 2, 0, 1501, waiter.task_id, b"q", b"", b"\x01k\x01v", b"?")
        script.hear(delivery("q", b"!", flags=wire.Flag.ANSWER, task_id=waiter.task_id))
        assert waiter.result().data == b"!"

    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (lambda q: error(q, ErrorCode.NO_RESPONDERS, "q"), NoRespondersError),
            (lambda q: error(q, ErrorCode.PERMISSION_DENIED, "q"), PermissionDeniedError),
            (lambda q: error(q, 500, "q", "ValueError: x", sender=9), RemoteError),
            (lambda q: error(q, 5, "q", "mine", sender=9), RemoteError),
            (lambda q: pack(23, 1005, 1, 0, 0, "sBi", q, wire.EndReason.RESPONDER_LOST, 0), ResponderLostError),
            (lambda q: pack(23, 1005, 1, 0, 0, "sBi", q, wire.EndReason.DEADLINE, 0), QueryTimeoutError),
            (lambda q: response(q, 2, "version 1"), RefusedError),
        ],
    )
    def test_a_query_ends_in_exactly_one_way(self, make: Callable[[bytes], bytes], kind: type[Exception]) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", timeout=2.0, notify=script.note))
        notes = len(script.notes)
        script.hear(make(waiter.task_id) + make(waiter.task_id))
        script.hear(delivery("q", b"late", flags=wire.Flag.ANSWER, task_id=waiter.task_id))
        with pytest.raises(kind):
            waiter.result()
        assert len(script.notes) == notes + 1
        assert script.session.inbox.late_answers == 1
        script.session.lost(None)
        with pytest.raises(kind):
            waiter.result()

    def test_the_clients_own_deadline_takes_the_query_back(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", notify=script.note))
        script.said()
        script.session.correlation.expire(waiter, 1.0)
        with pytest.raises(QueryTimeoutError):
            waiter.result()
        ((object_id, version, _, _, body),) = script.said()
        assert (object_id, version, unpack(body, "b", True)) == (1004, 1, (waiter.task_id,))
        assert script.session.inbox.waiting == 0

    def test_an_answer_that_beats_the_deadline_counts(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", notify=script.note))
        script.said()
        script.hear(delivery("q", b"!", flags=wire.Flag.ANSWER, task_id=waiter.task_id))
        script.session.correlation.expire(waiter, 1.0)
        assert waiter.result().data == b"!"
        assert script.said() == []

    def test_query_all_collects_until_the_end_is_told(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", many=True, notify=script.note))
        ((*_, body),) = script.said()
        assert body[0] == wire.Flag.ALL
        script.hear(
            delivery("q", b"1", flags=wire.Flag.ANSWER, task_id=waiter.task_id)
            + error(waiter.task_id, 500, "q", "x", sender=4)
            + delivery("q", b"2", flags=wire.Flag.ANSWER, task_id=waiter.task_id)
        )
        replies = waiter.take_replies()  # of different responders, so in no order
        assert [reply.data for reply in replies if isinstance(reply, Message)] == [b"1", b"2"]
        assert [type(reply) for reply in replies if not isinstance(reply, Message)] == [RemoteError]
        script.hear(pack(23, 1005, 1, 0, 0, "sBi", waiter.task_id, wire.EndReason.COMPLETE, 3))
        assert waiter.done
        assert waiter.result() is None

    def test_query_all_is_told_of_each_responder_that_is_lost(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", many=True))
        end = wire.EndReason.RESPONDER_LOST
        script.hear(pack(23, 1005, 1, 9, 0, "sBi", waiter.task_id, end, 0))
        (lost,) = waiter.take_replies()
        assert isinstance(lost, ResponderLostError)
        assert (lost.subject, lost.sender, waiter.done) == ("q", 9, False)
        script.hear(pack(23, 1005, 1, 0, 0, "sBi", waiter.task_id, end, 0))
        assert waiter.result() is None
        script.hear(pack(23, 1005, 1, 9, 0, "sBi", waiter.task_id, end, 0))  # nobody waits any more
        assert waiter.take_replies() == []

    def test_what_a_version_1_server_does_not_know(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        with pytest.raises(RefusedError, match="version-1"):
            script.session.query("q", wire.Codec.BYTES, b"", many=True)
        with pytest.raises(RefusedError, match="version-1"):
            script.session.publish("s", wire.Codec.BYTES, b"", no_echo=True)
        assert script.said() == []

    def test_a_publish_without_an_echo(self) -> None:
        script = Script()
        script.connect()
        assert script.session.publish("s", wire.Codec.BYTES, b"", no_echo=True).pack()
        ((*_, body),) = script.said()
        assert body[0] == wire.Flag.NO_ECHO

    def test_a_confirmed_publish_gets_a_receipt(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.publish("s", wire.Codec.BYTES, b"x", confirm=True, notify=script.note))
        ((*_, body),) = script.said()
        assert body[0] == wire.Flag.CONFIRM
        script.hear(pack(23, 1003, 1, 0, 0, "sii", waiter.task_id, 4, 1))
        assert waiter.result() == Receipt(4, 1)

    def test_and_on_a_version_1_server_an_acknowledgement(self) -> None:
        script = Script()
        script.connect(wire.Dialect.H23_199)
        waiter = waiter_of(script.session.publish("s", wire.Codec.BYTES, b"x", confirm=True, notify=script.note))
        script.hear(response(waiter.task_id))
        assert waiter.result() == Receipt(-1)

    def test_an_unconfirmed_one_may_be_refused_later(self) -> None:
        script = Script()
        script.connect()
        script.hear(error(b"", ErrorCode.PERMISSION_DENIED, "s", "no") + error(b"", ErrorCode.INVALID_SUBJECT, "t"))
        assert [type(exc).__name__ for exc, _ in script.errors] == ["PermissionDeniedError", "InvalidSubjectError"]
        unreported = script.session.reports.take_unreported()
        assert isinstance(unreported, PermissionDeniedError)
        assert script.session.reports.take_unreported() is None
        assert script.session.stats().server_errors == 2

    def test_flush_waits_for_its_own_echo(self) -> None:
        script = Script()
        script.connect()
        first, second = script.session.flush(script.note), script.session.flush(script.note)
        beats = [int.from_bytes(packet[4], "little") for packet in script.said()]
        assert len(set(beats)) == 2
        assert 0 not in beats
        script.hear(pack(23, 199, 1, 0, 0, "i", 0) + pack(23, 199, 1, 0, 0, "i", beats[1]))
        assert (first.done, second.done) == (False, True)
        script.session.correlation.expire(first, 1.0)
        with pytest.raises(ConfirmTimeoutError):
            first.result()

    def test_a_loss_fails_everything_that_waits(self) -> None:
        script = Script()
        script.connect()
        interest = script.interest("s", lambda m: None)
        waiters = [
            waiter_of(script.session.query("q", wire.Codec.BYTES, b"", notify=script.note)),
            waiter_of(script.session.publish("s", wire.Codec.BYTES, b"", confirm=True, notify=script.note)),
            script.session.subscribe(interest, script.note),
            script.session.flush(script.note),
        ]
        script.session.lost(ConnectionResetError(104, "Connection reset by peer"))
        for waiter in waiters:
            assert waiter is not None
            with pytest.raises(ConnectionLostError, match="reset") as caught:
                waiter.result()
            assert caught.value.action == waiter.action
        assert script.statuses[-1] is ConnectStatus.DISCONNECTED
        assert [type(exc) for exc, _ in script.errors] == [ConnectionLostError]
        assert interest.active  # restored by the next connection, unless its shell gives up
        with pytest.raises(NotConnectedError, match="DISCONNECTED"):
            script.session.query("q", wire.Codec.BYTES, b"", notify=script.note).pack()
        with pytest.raises(NotConnectedError):
            script.session.flush()

    def test_after_closing_everything_says_so(self) -> None:
        script = Script()
        script.connect()
        waiter = waiter_of(script.session.query("q", wire.Codec.BYTES, b"", notify=script.note))
        script.session.set_status(ConnectStatus.CLOSED)
        script.session.lost(None)
        with pytest.raises(ClientClosedError):
            waiter.result()
        with pytest.raises(ClientClosedError):
            script.session.publish("s", wire.Codec.BYTES, b"").pack()
        with pytest.raises(ClientClosedError):
            script.session.flush()
        assert script.errors == []

    def test_the_servers_parting_words_are_the_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        script = Script()
        script.connect()
        caplog.set_level(logging.INFO)
        script.hear(pack(23, 1001, 1, 0, 0, "iis", 13, 0, "the server\nstops"))
        script.session.lost(None)
        assert str(script.errors[0][0].reason) == "the server\\x0astops"  # type: ignore[attr-defined]
        lines = [record.getMessage() for record in caplog.records if "lost the connection" in record.getMessage()]
        assert len(lines) == 1
        assert "\n" not in lines[0]

    def test_gaps_are_counted(self) -> None:
        script = Script()
        script.connect()
        script.hear(pack(23, 1002, 1, 0, 0, "iqB", 0, 12, 1) + pack(23, 1002, 1, 0, 0, "iqB", 0, -5, 1))
        assert script.session.stats().missed == 12

    def test_every_subscription_can_be_told_of_a_gap(self) -> None:
        script = Script()
        script.connect()
        boxes = []
        for subject in ("a", "b.*"):
            interest = Interest(script.session.registrar.new_sid(), subject)
            interest.mailbox = Mailbox(interest, interest.sid, tally=script.session.registrar.tally)
            script.session.subscribe(interest)
            boxes.append(interest.mailbox)
        script.session.registrar.tell_gap(None, "reconnect")
        assert script.session.inbox.take_ready() == boxes
        for box in boxes:
            batch = box.take()
            assert batch is not None
            assert batch.take_gaps() == [(None, "reconnect")]

    def test_malformed_control_packets_are_counted(self) -> None:
        script = Script()
        script.connect()
        for object_id in (254, 199, 1000, 1001, 1002, 1003, 1005):
            script.hear(pack(23, object_id, 1, 0, 0, "B", 200))
        assert script.session.stats().malformed == 7
        assert script.session.failure is None

    def test_headers_must_be_text(self) -> None:
        script = Script()
        script.connect()
        for headers in ({"k": 1}, {"": "v"}, {"k": "v" * 20_000}):
            with pytest.raises(ConfigError, match="headers"):
                script.session.publish("s", wire.Codec.BYTES, b"", headers=headers)


class TestOverflow:
    def flow(self, script: Script) -> list[tuple[Any, ...]]:
        """The subscribes (subject, overflow) and credits (sid, messages) that were sent."""
        found: list[tuple[Any, ...]] = []
        for packet in script.echo():
            if packet[0] == ObjectId.SUBSCRIBE:
                fields = unpack(packet[4], "ssiBBs")
                assert fields is not None
                found.append((fields[1], wire.Overflow(fields[4])))
                script.hear(response(fields[0].encode()))
            elif packet[0] == ObjectId.CREDIT:
                found.append(unpack(packet[4], "ii", True) or ())
        return found

    def test_each_policy_as_the_server_is_told_of_it(self) -> None:
        script = Script()
        script.features = ["drop_newest", "credit"]
        script.connect()
        for overflow in ("close", "drop_newest", "drop_oldest"):
            script.session.subscribe(script.interest(overflow, overflow=overflow), script.note)
        assert self.flow(script) == [
            ("close", wire.Overflow.CLOSE),
            ("drop_newest", wire.Overflow.DROP_NEWEST),
            ("drop_oldest", wire.Overflow.CLOSE),
        ]

    def test_credit_is_granted_as_handlers_finish_and_anew_with_each_connection(self) -> None:
        script = Script()
        script.features = ["credit"]
        seen: list[bytes] = []
        limits = {"payload": 1000, "packet": 70_000}
        script.connect(**limits)
        interest = script.interest("a", lambda message: seen.append(message.data), overflow="block", max_pending_msgs=8)
        script.session.subscribe(interest, script.note)
        sid = interest.sid
        assert self.flow(script) == [("a", wire.Overflow.BLOCK), (sid, 8)]
        script.hear(b"".join(delivery("a", b"%d" % n, sid=sid) for n in range(3)))
        script.run_handlers()
        assert self.flow(script) == []
        script.hear(delivery("a", b"3", sid=sid))
        script.run_handlers()
        assert self.flow(script) == [(sid, 4)]
        # A delivery that names no subscription is not for it.
        script.hear(delivery("a", b"plain"))
        assert script.session.inbox.unmatched == 1
        # What waits when the connection goes takes its room of the next window, and is granted when it is handled.
        script.hear(b"".join(delivery("a", b"%d" % n, sid=sid) for n in range(4, 9)))
        script.session.lost(None)
        waiter = script.shake(**limits)
        assert self.flow(script) == [("a", wire.Overflow.BLOCK), (sid, 3)]
        assert waiter.done
        script.run_handlers()
        assert self.flow(script) == [(sid, 4)]
        assert seen == [b"%d" % n for n in range(9)]
        script.session.unsubscribe(interest)
        script.session.lost(None)
        assert interest.mailbox.grant is not None
        interest.mailbox.grant(5)  # by a worker that comes late
        assert script.said() == []

    def test_the_window_fits_into_the_bytes_that_may_wait(self) -> None:
        script = Script()
        script.features = ["credit"]
        script.connect(payload=1000, packet=70_000)
        interests = [
            script.interest("a", overflow="block", max_pending_bytes=size) for size in (1, 700_000, 1_000_000_000)
        ]
        for interest in interests:
            script.session.subscribe(interest, script.note)
        assert [fields for fields in self.flow(script) if isinstance(fields[0], int)] == [
            (interests[0].sid, 1),
            (interests[1].sid, 10),
            (interests[2].sid, 4096),
        ]

    def test_more_than_the_window_is_taken_up_to_a_point(self) -> None:
        script = Script()
        script.features = ["credit"]
        script.connect()
        interest = script.interest("a", overflow="block", max_pending_msgs=2)
        script.session.subscribe(interest, script.note)
        self.flow(script)
        script.hear(delivery("a", sid=interest.sid) * 4098)
        assert interest.active
        script.hear(delivery("a", sid=interest.sid))
        assert not interest.active

    @pytest.mark.parametrize("dialect", [wire.Dialect.EVBUS_2, wire.Dialect.H23_199])
    def test_what_the_server_does_not_have(self, dialect: int) -> None:
        script = Script()
        script.connect(dialect)
        with pytest.raises(RefusedError, match="block") as caught:
            script.session.subscribe(script.interest("a", overflow="block"), script.note)
        assert caught.value.code == ErrorCode.UNSUPPORTED
        dropping = script.interest("b", overflow="drop_newest")
        script.session.subscribe(dropping, script.note)
        (packet,) = script.echo()
        fields = unpack(packet[4], "ssiBB" if dialect == wire.Dialect.EVBUS_2 else "ss")
        assert fields is not None
        assert fields[1] == "b"
        assert dialect == wire.Dialect.H23_199 or fields[4] == wire.Overflow.CLOSE
        assert list(script.session.plan) == [dropping]

    def test_a_later_server_that_cannot_hold_back_ends_the_subscription(self) -> None:
        script = Script()
        lost: list[Exception] = []
        interest = script.interest("a", overflow="block")
        interest.on_lost = lost.append
        assert script.session.subscribe(interest) is None
        script.connect()
        assert not interest.active
        assert [type(error) for error in lost] == [RefusedError]
        assert [type(error) for error, _ in script.errors] == [RefusedError]


class TestQueriesToUs:
    def ask(self, script: Script, subject: str, data: bytes = b"?", *, sid: int = 0, task_id: bytes = b"q7") -> None:
        script.hear(delivery(subject, data, flags=wire.Flag.QUERY, task_id=task_id, sid=sid))
        script.run_handlers()

    def answers(self, script: Script) -> list[tuple[Any, ...]]:
        """(query id, payload) of answers, (query id, code, text) of failures, (None, subject, payload) of events."""
        found: list[tuple[Any, ...]] = []
        for object_id, _, _, _, body in script.said():
            if object_id == ObjectId.PUBLISH:
                fields = unpack(body, "BBiibbbyy")
                assert fields is not None
                found.append((fields[6], fields[8]) if fields[6] else (None, fields[5], fields[8]))
            elif object_id == ObjectId.ERROR:
                fields = unpack(body, "biss")
                assert fields is not None
                found.append((fields[0], fields[1], fields[3]))
        return found

    def test_a_plain_handler_answers_by_returning(self) -> None:
        script = Script()
        script.connect()
        script.subscribe("q", lambda data: b"re: " + data, type=bytes)
        self.ask(script, "q")
        assert self.answers(script) == [(b"q7", b"re: ?")]

    def test_one_that_returns_nothing_has_not_answered(self) -> None:
        script = Script()
        script.connect()
        script.subscribe("q", lambda message: None)
        self.ask(script, "q")
        assert self.answers(script) == []

    def test_a_responder_always_answers(self) -> None:
        script = Script()
        script.connect()
        interest = script.subscribe("q", lambda message: None, responder=True)
        self.ask(script, "q", sid=interest.sid)
        assert self.answers(script) == [(b"q7", b"\xc0")]  # msgpack's nil

    def test_publishing_on_the_same_subject_is_the_answer_once(self) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> None:
            for subject, data in (("other", b"1"), ("q", b"2"), ("q", b"3")):
                code = script.session.outbox.pack_event(subject, data, 1)
                assert code
                script.session.publish(subject, wire.Codec.BYTES, data).pack()

        script.subscribe("q", handler)
        self.ask(script, "q")
        assert self.answers(script) == [(None, b"other", b"1"), (b"q7", b"2"), (None, b"q", b"3")]
        assert not script.session.outbox.is_answering

    def test_not_so_in_a_responder_or_for_an_event(self) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> None:
            script.session.publish("q", wire.Codec.BYTES, b"event").pack()

        interest = script.subscribe("q", handler, responder=True)
        self.ask(script, "q", sid=interest.sid)
        assert self.answers(script) == [(None, b"q", b"event"), (b"q7", b"\xc0")]
        script.session.unsubscribe(interest)
        script.subscribe("q", handler)
        script.said()
        script.hear(delivery("q"))
        script.run_handlers()
        assert self.answers(script) == [(None, b"q", b"event")]

    def test_reply_and_fail_on_the_message(self) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> str | None:
            if message.data == b"fail":
                message.fail(41, "x" * 2000)
                return "ignored"
            message.reply("yes", headers={"h": "1"})
            with pytest.raises(Exception, match="answered already"):
                message.reply("twice")
            with pytest.raises(Exception, match="answered already"):
                message.fail(1, "twice")
            return None

        script.subscribe("q", handler)
        self.ask(script, "q")
        assert self.answers(script) == [(b"q7", b"yes")]
        self.ask(script, "q", b"fail")
        ((task_id, code, text),) = self.answers(script)
        assert (task_id, code, len(text)) == (b"q7", 41, 1024)
        with pytest.raises(ConfigError, match="32 bits"):
            script.session.answers.fail(Message("q"), 2**31, "")

    def test_a_query_can_be_answered_after_its_handler(self) -> None:
        script = Script()
        script.connect()
        kept: list[Message] = []
        script.subscribe("q", kept.append)
        self.ask(script, "q")
        assert self.answers(script) == []
        kept[0].reply({"late": True})
        assert self.answers(script)[0][0] == b"q7"

    def test_a_handler_that_raises_is_told_to_the_asker(self) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> None:
            raise ValueError("bad ü" + "x" * 2000)

        script.subscribe("q", handler)
        self.ask(script, "q")
        ((task_id, code, text),) = self.answers(script)
        assert (task_id, code) == (b"q7", 500)
        assert text.startswith("ValueError: bad ü")
        assert text.endswith("...")
        assert len(text.encode()) <= 1024
        assert [type(exc) for exc, _ in script.errors] == [ValueError]
        assert script.errors[0][1] is not None

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_so_is_one_that_tries_to_end_the_thread(self, kind: type[BaseException]) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> None:
            raise kind

        script.subscribe("q", handler)
        self.ask(script, "q")
        script.hear(delivery("q") * 3)
        script.run_handlers()
        assert self.answers(script) == [(b"q7", 500, f"{kind.__name__}: ")]
        assert len(script.errors) == 4

    def test_a_question_or_answer_that_does_not_fit_is_told_to_the_asker(self) -> None:
        script = Script()
        script.connect(payload=100)
        script.subscribe("typed", lambda n: n, type=int)
        script.subscribe("unsendable", lambda message: object())
        script.subscribe("huge", lambda message: b"x" * 101)
        for subject, word in (("typed", "CodecError"), ("unsendable", "CodecError"), ("huge", "PayloadTooLargeError")):
            self.ask(script, subject)
            ((task_id, code, text),) = self.answers(script)
            assert (task_id, code) == (b"q7", 500)
            assert text.startswith(word)
        assert len(script.errors) == 3
        assert script.session.stats().handler_errors == 3

    def test_several_handlers_of_one_query(self) -> None:
        script = Script()
        script.connect()

        def bad(message: Message) -> None:
            raise RuntimeError("first")

        script.subscribe("q", bad)
        script.subscribe("q", lambda message: b"answer")
        script.subscribe("*", lambda message: b"too late")
        self.ask(script, "q")
        assert self.answers(script) == [(b"q7", b"answer")]
        assert len(script.errors) == 1

    def test_when_all_of_them_fail_the_asker_hears_of_the_first(self) -> None:
        script = Script()
        script.connect()

        def bad(message: Message) -> None:
            raise RuntimeError("boom")

        script.subscribe("q", bad)
        script.subscribe("q", lambda message: None)
        script.subscribe("q", bad)
        self.ask(script, "q")
        assert self.answers(script) == [(b"q7", 500, "RuntimeError: boom")]

    def test_an_answer_after_the_connection_is_nobodys_fault(self) -> None:
        script = Script()
        script.connect()

        def handler(message: Message) -> bytes:
            script.session.lost(None)
            return b"x"

        def fails(message: Message) -> bytes:
            script.session.lost(None)
            raise ValueError

        script.subscribe("q", handler)
        self.ask(script, "q")
        assert [type(exc) for exc, _ in script.errors] == [ConnectionLostError]
        script.connect()
        script.subscribe("f", fails)
        self.ask(script, "f")

    def test_too_late_answers_are_counted_not_reported(self) -> None:
        script = Script()
        script.connect()
        script.hear(error(b"", ErrorCode.UNKNOWN_QUERY, "q", "late") + error(b"gone", 500, "q", "x", sender=4))
        assert script.errors == []
        assert script.session.stats().late_answers == 2


class TestHeartbeats:
    def test_they_go_out_on_time(self) -> None:
        script = Script(heartbeat_s=2.0)
        script.connect()
        now = script.now
        due = script.session.tick(now)
        assert due == now + 2.0
        for _ in range(10):
            now = due
            script.now = now
            due = script.session.tick(now)
            assert [unpack(packet[4], "i") for packet in script.said()] == [(0,)]
            script.hear(pack(23, 199, 1, 0, 0, "i", 0))
            due = script.session.tick(now)
            assert due == now + 2.0
        assert script.session.failure is None

    def test_the_server_may_ask_for_them_more_often(self) -> None:
        script = Script(heartbeat_s=60.0)
        waiter = script.open()
        script.hear(response(waiter.task_id, text='evbus/1 {"version": 2, "heartbeat": 0.5}'))
        assert script.session.tick(script.now) == script.now + 3.0  # the handshake's deadline, until it is through
        script.echo()
        assert script.session.tick(script.now) == script.now + 0.5

    def test_a_silent_server_is_found_within_two_intervals(self) -> None:
        script = Script(heartbeat_s=2.0)
        script.connect()
        start = script.now
        now = due = start
        while script.session.failure is None:
            now = due
            due = script.session.tick(now)
        assert now == start + 4.0
        assert isinstance(script.session.failure, ConnectionLostError)
        assert "no sign of life for 4.0 s" in str(script.session.failure)

    def test_any_byte_is_a_sign_of_life(self) -> None:
        script = Script(heartbeat_s=2.0)
        script.connect()
        due = script.now
        for _ in range(50):
            due = min(script.session.tick(due), due + 1.0)
            script.now = due
            script.hear(delivery("x")[:5] if _ == 0 else b"")
        assert script.session.failure is None

    def test_our_own_sleep_proves_nothing(self) -> None:
        script = Script(heartbeat_s=2.0)
        script.connect()
        due = script.session.tick(script.now)
        due = script.session.tick(due)  # asked
        due = script.session.tick(due + 3600.0)
        assert script.session.failure is None
        script.session.tick(due)
        assert script.session.failure is not None


#: How queries ended in the runs over all seeds.
KINDS: set[str] = set()

ROUGH = Faults(partial_read=0.4, partial_write=0.4, partial_arrival=0.4, delay=0.3, max_delay_s=0.1, stall=0.01)


class World:
    """A real server and real clients on a simulated network."""

    def __init__(self, seed: int, clients: int, faults: Faults = ROUGH, **options: Any) -> None:
        self.net = SimNet(seed, faults)
        self.server = ServerCore(self.net.reactor(), Limits(), wall_ms=self.net.wall_ms)
        self.acceptor = Acceptor(
            self.net.reactor(), [self.net.listen()], lambda transport, peer: self.server.add(transport)
        )
        self.clients = [SimClient(self.net, seed * 100 + n, **options) for n in range(clients)]
        self.rng = random.Random(seed)

    def connect(self) -> None:
        waiters = [client.connect(timeout=60.0) for client in self.clients]
        self.wait(*waiters)
        for waiter in waiters:
            waiter.result()

    def wait(self, *waiters: Waiter | None) -> None:
        self.net.run_until(lambda: all(waiter is None or waiter.done for waiter in waiters), 200_000)

    def check(self) -> None:
        assert self.net.errors == [], self.net.errors


@pytest.mark.parametrize("seed", range(25))
def test_order_without_loss_or_duplicates(seed: int) -> None:
    world = World(seed, 3)
    world.connect()
    got: dict[int, list[tuple[int, int]]] = {n: [] for n in range(3)}
    for n, client in enumerate(world.clients):
        _, waiter = client.subscribe("e.*", got[n].append, type=tuple[int, int])
        world.wait(waiter)
    sent = [0, 0, 0]
    for _ in range(150):
        n = world.rng.randrange(3)
        for _ in range(world.rng.randrange(1, 20)):
            world.clients[n].publish(f"e.{world.rng.randrange(5)}", (n, sent[n]))
            sent[n] += 1
        world.net.run(world.rng.randrange(4))
    world.wait(*(client.flush() for client in world.clients))
    world.net.settle(1.0)
    for received in got.values():
        for n in range(3):
            assert [number for sender, number in received if sender == n] == list(range(sent[n]))
    world.check()
    assert all(client.errors == [] for client in world.clients)


@pytest.mark.parametrize("seed", range(25))
def test_each_query_has_exactly_one_outcome_while_connections_break(seed: int) -> None:
    world = World(1000 + seed, 4)
    world.connect()
    asker = world.clients[0]

    def answer(data: bytes) -> bytes:
        if data[-1:] == b"7":
            raise ValueError("seven")
        return b"re:" + data

    for client in world.clients[1:]:
        _, waiter = client.subscribe("q", answer, type=bytes, responder=True)
        world.wait(waiter)
    outcomes: list[tuple[bytes, Waiter]] = []
    counts: dict[int, int] = {}
    for n in range(100):
        question = str(n).encode()
        if asker.core.is_attached:
            waiter = asker.query("q" if n % 10 else "nobody", question, timeout=2.0)
            waiter.notify = lambda n=n: counts.__setitem__(n, counts.get(n, 0) + 1)
            outcomes.append((question, waiter))
        world.net.run(world.rng.randrange(30))
        if n in (40, 70):
            world.net.break_one(world.clients[n // 30].transport)
        if n == 90:
            world.net.break_one(asker.transport)
    world.net.settle(5.0)
    kinds = set()
    for question, waiter in outcomes:
        assert waiter.done, question
        try:
            assert waiter.result().data == b"re:" + question
            kinds.add("answer")
        except RemoteError:
            assert question.endswith(b"7")
        except (
            NoRespondersError,
            ResponderLostError,
            ConnectionLostError,
            QueryTimeoutError,
            NotConnectedError,
        ) as exc:
            kinds.add(type(exc).__name__)
    assert kinds
    KINDS.update(kinds)
    assert all(count == 1 for count in counts.values())
    assert asker.session.inbox.waiting == 0
    world.check()


def test_those_queries_ended_in_every_way() -> None:
    if len(KINDS) < 4:
        pytest.skip("needs the runs before it")
    assert {"answer", "NoRespondersError", "ResponderLostError", "ConnectionLostError"} <= KINDS


@pytest.mark.parametrize("seed", range(10))
def test_a_new_connection_has_every_subscription(seed: int) -> None:
    world = World(2000 + seed, 2)
    world.connect()
    publisher, subscriber = world.clients
    got: list[str] = []
    subscriptions = []
    for n in range(20):
        subscription, waiter = subscriber.subscribe(f"s.{n}", lambda message: got.append(message.subject))
        subscriptions.append(subscription)
        world.wait(waiter)
    for round_ in range(3):
        world.net.break_one(subscriber.transport)
        world.net.run_until(lambda: not subscriber.core.is_attached, 100_000)
        if round_ == 1:
            subscriber.unsubscribe(subscriptions[3])
        waiter = subscriber.connect(60.0)
        world.wait(waiter)
        waiter.result()
        got.clear()
        for n in range(20):
            publisher.publish(f"s.{n}", b"")
        world.wait(publisher.flush())
        world.net.settle(0.5)
        world.net.faults = Faults()
        assert got == [f"s.{n}" for n in range(20) if round_ < 1 or n != 3]
    assert [type(exc) for exc, _ in subscriber.errors] == [ConnectionLostError] * 3
    world.check()


def test_a_server_that_falls_silent_is_noticed() -> None:
    world = World(1, 1, CALM, heartbeat_s=1.0)
    world.connect()
    (client,) = world.clients
    world.net.settle(10.0)
    assert client.core.is_attached
    transport = client.transport
    world.net.stall(transport, 1e9)
    before = world.net.clock.now
    world.net.run_until(lambda: not client.core.is_attached, 100_000)
    assert world.net.clock.now - before <= 2.0 + 1.0
    world.net.settle()
    assert [type(exc) for exc, _ in client.errors] == [ConnectionLostError]


def test_a_burst_fills_the_buffer_and_drains_in_order() -> None:
    world = World(5, 2, limits=ClientLimits(buffer_bytes=20_000))
    world.connect()
    publisher, subscriber = world.clients
    got: list[int] = []
    _, waiter = subscriber.subscribe("s", got.append, type=int)
    world.wait(waiter)
    stuck = 0
    for n in range(3000):
        publisher.publish("s", n)
        stuck = max(stuck, len(publisher.stuck))
        assert publisher.session.outbox.pending_bytes <= 20_000
    assert stuck > 0
    world.net.run_until(lambda: not publisher.stuck, 200_000)
    world.wait(publisher.flush())
    world.net.settle(1.0)
    assert got == list(range(3000))
    world.check()
