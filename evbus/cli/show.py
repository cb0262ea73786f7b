"""Messages as lines of output."""

from __future__ import annotations

import base64
from argparse import ArgumentParser
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

import msgspec

from evbus.cli.common import Output
from evbus.cli.values import codec_name
from evbus.errors import CodecError
from evbus.payload import decode
from evbus.wire import Codec

if TYPE_CHECKING:
    from evbus.message import Message

__all__ = ["Printer"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: Control characters but tab and line feed. On a terminal they would move the cursor, or worse.
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Printer:
    """Prints messages the way the options want it. Any thread.

    Args:
        as_json: one JSON object per message.
        raw: the payload's bytes alone, nothing added.
        time: the publisher's time in front.
        subject: the subject in front.
    """

    def __init__(self, *, as_json: bool, raw: bool = False, time: bool = False, subject: bool = False) -> None:
        self.out = Output()
        self._as_json = as_json
        self._raw = raw
        self._time = time
        self._subject = subject

    def show(self, message: Message) -> None:
        """Print one message."""
        if self._as_json:
            self.out.json(record(message))
        elif self._raw:
            self.out.write(message.data)
        else:
            fields = [iso_time(message.timestamp)] if self._time else []
            if self._subject:
                fields.append(message.subject)
            self.out.write(self._clean("\t".join((*fields, ""))).encode() + self._body(message) + b"\n")

    def _body(self, message: Message) -> bytes:
        """The payload as a person reads it: text as it is, values as JSON."""
        data = message.data
        value = _value(message)
        if value is not None:
            data = value
        if self.out.is_terminal:
            return self._clean(data.decode("utf-8", "replace")).encode()
        return data

    def _clean(self, text: str) -> str:
        return text.translate(_CONTROL) if self.out.is_terminal else text


def add_format_options(parser: ArgumentParser) -> None:
    """--json and --raw, of which only one makes sense."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--json", action="store_true", help="print one JSON object a line, with everything known")
    either.add_argument("--raw", action="store_true", help="print the payload's bytes and nothing else, no line ends")


def record(message: Message) -> dict[str, Any]:
    """A message as an object for JSON output."""
    found: dict[str, Any] = {"subject": message.subject}
    value = _value(message)
    if value is not None:
        found["data"] = msgspec.Raw(value)
    else:
        try:
            found["data"] = message.data.decode()
        except UnicodeDecodeError:
            found["data_base64"] = base64.b64encode(message.data).decode()
    found["codec"] = codec_name(message.codec)
    found["headers"] = message.headers
    found["time"] = iso_time(message.timestamp)
    found["sender"] = message.sender
    if message.is_query:
        found["query"] = True
    return found


def _value(message: Message) -> bytes | None:
    """The compact JSON of a structured payload; None for any other, also for one that is broken."""
    try:
        if message.codec == Codec.JSON:
            decode(message.codec, message.data)  # is it JSON at all?
            return msgspec.json.format(message.data, indent=-1)
        if message.codec == Codec.MSGPACK:
            return msgspec.json.encode(decode(message.codec, message.data))
    except (CodecError, ValueError, TypeError, msgspec.MsgspecError, RecursionError):
        return None
    return None


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as UTC with milliseconds; a clock that is far off gives its number."""
    try:
        moment = _EPOCH + timedelta(milliseconds=round(seconds * 1000))
    except OverflowError:
        return f"{seconds:.3f}"
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
