"""Messages as users see them, and the values of `evbus.message`."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

import evbus
from evbus import _message, wire
from evbus._frame import pack
from evbus._inbox import Inbox
from evbus._mailbox import Mailbox
from evbus.errors import CodecError, EvbusError
from evbus.message import ConnectStatus, Message, Receipt
from evbus.payload import encode


@dataclass
class Mail:
    subject: str
    size: int


class Answerer:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def reply(self, message: Message, value: object, headers: Any) -> None:
        self.calls.append(("reply", message, value, headers))

    def fail(self, message: Message, code: int, text: str) -> None:
        self.calls.append(("fail", message, code, text))


def arrived(*, flags: int = 0, headers: bytes = b"", codec: int = 1, data: bytes = b"", unix_ms: int = 0) -> Message:
    """A message that came over the wire."""
    box = Mailbox(None, 1)
    inbox = Inbox(lambda key: ((box,), (box,)))
    inbox.answerer = Answerer()
    inbox.open(wire.Dialect.EVBUS_2, 1 << 20)
    inbox.ring.write(pack(23, 5, 2, 7, unix_ms, "BBiisssyy", flags, codec, 0, 250, b"id-1", "a.b", "", headers, data))
    assert inbox.receive() == []
    (message,) = box.take()
    return message


def test_an_event_has_what_its_publisher_sent() -> None:
    message = arrived(data=b"payload", headers=evbus_headers(a="1", b=""), unix_ms=1_700_000_000_123)
    assert message.subject == "a.b"
    assert message.data == b"payload"
    assert message.headers == {"a": "1", "b": ""}
    assert message.timestamp == 1_700_000_000.123
    assert message.sender == 7
    assert message.codec == wire.Codec.BYTES
    assert not message.is_query
    assert not message.answered
    assert "'a.b'" in repr(message)


def evbus_headers(**headers: str) -> bytes:
    from evbus._frame import pack_headers

    return pack_headers(headers)


def test_headers_are_empty_without_any_and_the_same_object_again() -> None:
    message = arrived()
    assert message.headers == {}
    assert message.headers is message.headers


def test_decode_goes_by_the_codec_and_names_the_subject_when_it_cannot() -> None:
    codec, data = encode(Mail("hi", 3))
    message = arrived(codec=codec, data=data)
    assert message.decode(Mail) == Mail("hi", 3)
    assert message.decode() == {"subject": "hi", "size": 3}
    assert message.decode(bytes) == data
    with pytest.raises(CodecError) as caught:
        message.decode(int)
    assert caught.value.subject == "a.b"


def test_an_unknown_codec_counts_as_what_the_client_is_set_to() -> None:
    inbox = Inbox(lambda key: ((box,), (box,)), fallback=wire.Codec.JSON)
    box = Mailbox(None, 1)
    inbox.open(wire.Dialect.EVBUS_2, 1 << 20)
    inbox.ring.write(pack(23, 5, 2, 0, 0, "BBiisssyy", 0, 0, 0, 0, "", "s", "", b"", b'{"subject":"x","size":1}'))
    inbox.receive()
    (message,) = box.take()
    assert message.decode(Mail) == Mail("x", 1)


def test_a_query_is_answered_through_its_client() -> None:
    message = arrived(flags=wire.Flag.QUERY)
    answerer = message_answerer(message)
    assert message.is_query
    assert message.deadline_ms == 250
    message.reply({"x": 1}, headers={"h": "v"})
    message.fail(7, "no")
    assert answerer.calls == [("reply", message, {"x": 1}, {"h": "v"}), ("fail", message, 7, "no")]
    assert "query" in repr(message)


def message_answerer(message: Message) -> Answerer:
    """The answerer of a query, through a call that it notes."""
    found: list[Answerer] = []

    class Probe(Exception):
        pass

    class Value:
        pass

    original = Answerer.reply

    def reply(self: Answerer, *args: Any) -> None:
        found.append(self)
        raise Probe

    Answerer.reply = reply  # type: ignore[method-assign]
    try:
        message.reply(Value())
    except Probe:
        pass
    finally:
        Answerer.reply = original  # type: ignore[method-assign]
    return found[0]


def test_only_a_query_can_be_answered() -> None:
    for message in (arrived(), Message("s")):
        with pytest.raises(EvbusError, match="only a query"):
            message.reply(1)
        with pytest.raises(EvbusError, match="only a query"):
            message.fail(1, "x")


def test_the_right_to_answer_exists_once() -> None:
    message = arrived(flags=wire.Flag.QUERY)
    assert _message.query_id(message) == b"id-1"
    assert _message.claim_answer(message)
    assert message.answered
    assert not _message.claim_answer(message)
    _message.release_answer(message)
    assert _message.claim_answer(message)
    assert not _message.claim_answer(Message("event"))
    assert _message.query_id(Message("event")) == b""


def test_the_first_failure_is_told_when_the_last_of_several_handlers_is_done() -> None:
    boxes = tuple(Mailbox(None, sid) for sid in (1, 2, 3))
    inbox = Inbox(lambda key: (boxes, boxes))
    inbox.answerer = Answerer()
    inbox.open(wire.Dialect.EVBUS_2, 1 << 20)
    inbox.ring.write(pack(23, 5, 2, 0, 0, "BBiisssyy", wire.Flag.QUERY, 0, 0, 0, "q", "s", "", b"", b""))
    inbox.receive()
    messages = [next(box.take()) for box in boxes]
    assert messages[0] is messages[1] is messages[2]
    assert _message.handler_done(messages[0], (500, "first")) is None
    assert _message.handler_done(messages[1], (500, "second")) is None
    assert _message.handler_done(messages[2], None) == (500, "first")


def test_a_message_can_be_made_for_the_test_of_a_handler() -> None:
    message = Message("a.b", b"x", codec=2, headers={"k": "v"}, timestamp=12.5, sender=3)
    assert (message.subject, message.data, message.codec, message.sender) == ("a.b", b"x", 2, 3)
    assert message.headers == {"k": "v"}
    assert message.timestamp == 12.5
    assert message.decode() == "x"
    assert Message("s").data == b""
    with pytest.raises(AttributeError):
        message.subject = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Message(None)  # type: ignore[arg-type]


def test_times_outside_the_calendar_are_just_numbers() -> None:
    for unix_ms in (-(2**63), 2**63 - 1):
        assert arrived(unix_ms=unix_ms).timestamp == pytest.approx(unix_ms / 1000)


def test_receipts_and_statuses_are_values() -> None:
    assert Receipt(2) == Receipt(2, 0)
    assert copy.copy(Receipt(2, 1)) == Receipt(2, 1)
    with pytest.raises(FrozenInstanceError):
        Receipt(1).receivers = 2  # type: ignore[misc]
    assert {status.name for status in ConnectStatus} == {
        "CONNECTING",
        "CONNECTED",
        "RECONNECTING",
        "DISCONNECTED",
        "NOT_EVENT_SERVER",
        "DRAINING",
        "CLOSED",
    }
    assert evbus.Message is Message
