"""`evbus demo`: a server and several clients at work."""

from __future__ import annotations

import argparse
from pathlib import Path

from evbus.cli.common import EXIT_OK, Output, die_in_order_on_sigterm

DESCRIPTION = """\
Watch an event bus at work: a server, a mail service, two subscribers of which one leaves on the way, an archive that
answers queries, and somebody who asks. All are processes of their own and talk over a real port. Everything is checked;
exit code 1 means that something was not as promised."""
EXAMPLES = """\
examples:
  evbus demo
  evbus demo --find coffee
  evbus demo --mails my-mails.json

A file of mails looks like this:
  [{"subject": "Lunch", "content": "At noon?", "send_time": "2026-11-23T09:30:00Z"}, ...]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evbus demo`."""
    parser.add_argument("--mails", type=Path, metavar="FILE", help="play it with the mails of this JSON file")
    parser.add_argument("--find", metavar="TEXT", help="what to look for in the subjects (default: the first)")


def run(args: argparse.Namespace) -> int:
    """Play it."""
    from evbus.demo.mails import default_mails
    from evbus.demo.story import play

    die_in_order_on_sigterm()
    out = Output()
    play(out.line, args.mails or default_mails(), args.find)
    return EXIT_OK
