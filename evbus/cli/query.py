"""`evbus query`: ask, and print the answer."""

from __future__ import annotations

import argparse

from evbus.cli.common import EXIT_OK, add_client_options, open_client
from evbus.cli.show import Printer, add_format_options
from evbus.cli.values import add_body_options, body_value, codec_option, duration, headers, read_body
from evbus.message import Message

DESCRIPTION = """\
Ask a query and print the answer. If there are several responders the server asks one of them."""
EXAMPLES = """\
examples:
  evbus query clock.now
  evbus query email.find --as json '{"subject": "lunch"}' --timeout 10
  evbus query text.upper 'make me tall' --json
  cat photo.jpg | evbus query image.shrink - --raw > small.jpg
exit codes: 4 no answer in time, 5 nobody is there to answer (told at once), 6 the responder failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus query`."""
    parser.add_argument("subject", metavar="SUBJECT", help="what is asked, e.g. email.find")
    add_body_options(parser, "query")
    parser.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="a header; may be repeated")
    parser.add_argument(
        "--timeout", type=duration, default=3.0, metavar="SECONDS", help="for the answer (default: %(default)g)"
    )
    parser.add_argument("-t", "--timestamps", action="store_true", help="print the time of answering in front (UTC)")
    add_format_options(parser)
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Ask once."""
    value = body_value(read_body(args), args.format)
    header_map = headers(args.header)
    printer = Printer(as_json=args.json, raw=args.raw, time=args.timestamps)
    with open_client(args, "query", codec=codec_option(args.format)) as client:
        answer = client.query(args.subject, value, Message, timeout=args.timeout, headers=header_map)
    printer.show(answer)
    return EXIT_OK
