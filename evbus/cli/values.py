"""Texts of the command line as values: sizes, durations, counts, headers, bodies."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evbus.cli.common import CommandError, UsageError

if TYPE_CHECKING:
    from evbus.wire import Codec

__all__ = [
    "FORMATS",
    "MAX_BODY_BYTES",
    "add_body_options",
    "body_value",
    "codec_name",
    "codec_option",
    "count",
    "duration",
    "headers",
    "positive",
    "read_body",
    "size",
]

_SIZE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_TIME_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)

#: No message is larger than this (64 MiB), so no body is read further.
MAX_BODY_BYTES: Final = 1 << 26

#: What a body is sent as.
FORMATS: Final = ("text", "bytes", "json", "msgpack")


def _number(text: str, units: dict[str, float] | dict[str, int]) -> float | None:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        return None
    return float(match[1]) * units[match[2].lower()]


def size(text: str) -> int:
    """Bytes: "1048576", "8MiB", "8M" (the same), "8MB" (8,000,000)."""
    value = _number(text, _SIZE_UNITS)
    if value is None or not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 65536, 512KiB or 8MiB")
    return int(value)


def duration(text: str) -> float:
    """Seconds: "5", "0.5", "250ms", "2m", "1h"."""
    value = _number(text, _TIME_UNITS)
    if value is None or value <= 0 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write e.g. 5, 0.5, 250ms or 2m")
    return value


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; write a whole number from 1 up")
    return int(text)


def positive(text: str) -> float:
    """Seconds from 0 up."""
    return 0.0 if text.strip() in ("0", "0s") else duration(text)


def headers(pairs: list[str]) -> dict[str, str] | None:
    """The headers of repeated `--header KEY=VALUE` options; None if there are none."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--header {pair!r}: write KEY=VALUE")
        if key in found:
            raise UsageError(f"--header {key!r} is given twice")
        found[key] = value
    return found or None


# --- bodies -----------------------------------------------------------------------------------------------------------


def add_body_options(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument BODY and the options that concern it."""
    parser.add_argument(
        "body",
        metavar="BODY",
        nargs="?",
        help=f"the {what}: a text, or - for standard input, or @FILE for a file; without it the {what} is empty",
    )
    parser.add_argument("--file", metavar="FILE", help="take the body from this file")
    parser.add_argument("--literal", action="store_true", help="BODY is text even if it is - or begins with @")
    parser.add_argument(
        "--as",
        dest="format",
        choices=FORMATS,
        help="what the body is sent as. By default BODY is text, and what is read is bytes; json and msgpack take the "
        "body for JSON and send the value, for typed handlers",
    )


def read_body(args: argparse.Namespace) -> str | bytes | None:
    """The body as it was given: text for an argument, bytes for what was read, None for nothing at all.

    Raises:
        UsageError: given twice.
        CommandError: it cannot be read.
    """
    body: str | None = args.body
    if args.file is not None:
        if body is not None:
            raise UsageError("the body is given twice, by BODY and by --file; leave one out")
        return _read_file(args.file)
    if body is None or args.literal:
        return _argument(body)
    if body == "-":
        if sys.stdin is None:
            raise CommandError("standard input is closed; there is nothing to read")
        return _bounded(sys.stdin.buffer.read(MAX_BODY_BYTES + 1), "standard input")
    if body.startswith("@"):
        return _read_file(body[1:])
    return _argument(body)


def _argument(body: str | None) -> str | bytes | None:
    if body is None:
        return None
    try:
        body.encode()
    except UnicodeEncodeError:  # arguments are bytes to the system, and these are not UTF-8
        return os.fsencode(body)
    return body


def _read_file(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return _bounded(file.read(MAX_BODY_BYTES + 1), name)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        hint = "; --literal sends a BODY that begins with @ as it is" if isinstance(error, FileNotFoundError) else ""
        raise CommandError(f"cannot read {name!r}: {why}{hint}") from error


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > MAX_BODY_BYTES:
        raise CommandError(f"{where} holds more than 64 MiB, which no message can carry; send it in parts")
    return data


def body_value(body: str | bytes | None, form: str | None) -> Any:
    """What to publish for a body: str, bytes, or the value that its JSON stands for.

    Args:
        body: as `read_body` gives it.
        form: one of FORMATS, or None for what suits the body's type.

    Raises:
        UsageError: it is not what it is to be sent as.
    """
    from evbus.payload import OMITTED

    if body is None:
        if form in ("json", "msgpack"):
            raise UsageError(f"--as {form} needs a body; null is one")
        return OMITTED
    if form is None:
        return body
    if form == "bytes":
        return body.encode() if isinstance(body, str) else body
    if form == "text":
        try:
            return body if isinstance(body, str) else body.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"the body is not UTF-8 text (byte {error.start}); send it --as bytes") from None
    import msgspec

    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"the body is not JSON, which --as {form} needs: {error}") from None


def codec_option(form: str | None) -> str:
    """The client's option `codec` for a format."""
    return "json" if form == "json" else "msgpack"


def codec_name(codec: int) -> str:
    """A codec's name in JSON output."""
    from evbus.wire import Codec as Known

    try:
        known: Codec = Known(codec)
    except ValueError:
        return f"codec-{codec}"
    return known.name.lower()
