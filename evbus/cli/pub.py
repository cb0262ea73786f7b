"""`evbus pub`: publish messages."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from evbus.cli.common import EXIT_OK, CommandError, Output, UsageError, add_client_options, open_client
from evbus.cli.values import (
    MAX_BODY_BYTES,
    add_body_options,
    body_value,
    codec_option,
    count,
    duration,
    headers,
    positive,
    read_body,
)

if TYPE_CHECKING:
    from evbus.client import EventClient

DESCRIPTION = """\
Publish a message, or many. Exit code 0 means that the server has taken all of them."""
EXAMPLES = """\
examples:
  evbus pub greetings 'Hello, world'
  evbus pub email.new --as json '{"subject": "Lunch", "content": "At noon?", "send_time": "2026-11-23T09:30:00Z"}'
  echo hello | evbus pub greetings -
  evbus pub photos.new @photo.jpg --header type=image/jpeg
  evbus pub greetings hello --confirm
  evbus pub ticks tick --count 3 --interval 250ms
  seq 1000 | evbus pub numbers --lines
"""

_STDIN: Final = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus pub`."""
    parser.add_argument("subject", metavar="SUBJECT", help="where to publish, e.g. news.sport")
    add_body_options(parser, "message")
    parser.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="a header; may be repeated")
    parser.add_argument("--count", type=count, metavar="N", help="publish it so many times")
    parser.add_argument("--interval", type=positive, default=0.0, metavar="SECONDS", help="pause between two messages")
    parser.add_argument(
        "--lines",
        action="store_true",
        help="one message per line of standard input (or --file), as text unless --as says otherwise",
    )
    parser.add_argument(
        "--confirm", action="store_true", help="print how many receivers the server has queued each message for"
    )
    parser.add_argument(
        "--timeout", type=duration, default=10.0, metavar="SECONDS", help="for the server's word (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print what was done, one JSON object a line")
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Publish."""
    bodies = _lines(args) if args.lines else _copies(args)
    header_map = headers(args.header)
    out = Output()
    published = 0
    # The body is read before the connection is made: a server should not wait for a keyboard.
    first = next(bodies, None)
    with ExitStack() as stack:
        client = stack.enter_context(open_client(args, "pub", codec=codec_option(args.format)))
        due = time.monotonic()
        while first is not None:
            if published and args.interval:
                due += args.interval
                time.sleep(max(0.0, due - time.monotonic()))
            _publish(client, args, first[0], header_map, out)
            published += 1
            first = next(bodies, None)
        client.flush(timeout=args.timeout)
    if args.json and not args.confirm:
        out.json({"subject": args.subject, "published": published})
    return EXIT_OK


def _publish(
    client: EventClient, args: argparse.Namespace, value: Any, header_map: dict[str, str] | None, out: Output
) -> None:
    if not args.confirm:
        client.publish(args.subject, value, headers=header_map)
        return
    receipt = client.publish(args.subject, value, headers=header_map, confirm=True, timeout=args.timeout)
    assert receipt is not None
    if args.json:
        out.json({"subject": args.subject, "receivers": receipt.receivers, "dropped": receipt.dropped})
    else:
        dropped = f", {receipt.dropped} dropped" if receipt.dropped else ""
        known = receipt.receivers if receipt.receivers >= 0 else "unknown"
        out.line(f"receivers: {known}{dropped}")


def _copies(args: argparse.Namespace) -> Iterator[tuple[Any]]:
    """The body, as often as it is to be published; in a tuple, as a body may be None."""
    value = body_value(read_body(args), args.format)
    for _ in range(args.count or 1):
        yield (value,)


def _lines(args: argparse.Namespace) -> Iterator[tuple[Any]]:
    if args.count is not None:
        raise UsageError("--lines publishes each line once; leave out --count")
    if args.body not in (None, _STDIN):
        raise UsageError("--lines reads standard input or --file; leave out BODY")
    if args.file is None:
        if sys.stdin is None:
            raise CommandError("standard input is closed; there is nothing to read")
        yield from _each_line(sys.stdin.buffer, args.format)
        return
    try:
        with Path(args.file).open("rb") as file:
            yield from _each_line(file, args.format)
    except OSError as error:
        raise CommandError(f"cannot read {args.file!r}: {error.strerror or error}") from error


def _each_line(file: BinaryIO, form: str | None) -> Iterator[tuple[Any]]:
    number = 0
    while line := file.readline(MAX_BODY_BYTES + 1):
        number += 1
        if len(line) > MAX_BODY_BYTES:
            raise CommandError(f"line {number} is longer than 64 MiB, which no message can carry")
        try:
            yield (body_value(line.removesuffix(b"\n"), form or "text"),)
        except UsageError as error:
            raise UsageError(f"line {number}: {error}") from None
