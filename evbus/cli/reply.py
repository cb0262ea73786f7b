"""`evbus reply`: answer queries with a fixed body, with what they ask, or through a command."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Final

from evbus.cli.common import (
    EXIT_OK,
    EXIT_TIMEOUT,
    CommandError,
    OutputClosed,
    UsageError,
    add_client_options,
    die_in_order_on_sigterm,
    open_client,
    say,
)
from evbus.cli.ending import Ending
from evbus.cli.lasting import add_lasting_options, lasting_error, say_error
from evbus.cli.show import Printer, add_format_options
from evbus.cli.values import add_body_options, body_value, codec_option, count, duration, headers, read_body
from evbus.errors import CodecError
from evbus.message import Message

DESCRIPTION = """\
Answer the queries on a subject until Ctrl-C: with BODY, with the query's own body (--echo), or with what a command
makes of it (--command). Each query is printed, one a line. The line "answering" on standard error says that it is
ready."""
EXAMPLES = """\
examples:
  evbus reply greeting.get 'Hello, whoever you are'
  evbus reply echo --echo
  evbus reply text.upper --command 'tr a-z A-Z'
  evbus reply settings.get --as json '{"colour": "blue"}' --count 1
  evbus reply 'files.*' @answer.txt --group mirrors
"""

#: What the asker is told if the command fails; a command's own exit code follows in the text.
_COMMAND_FAILED: Final = 500
_WORDS: Final = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus reply`."""
    parser.add_argument("subject", metavar="SUBJECT", help="which queries to answer: a subject or a pattern")
    add_body_options(parser, "answer")
    parser.add_argument("--echo", action="store_true", help="answer with the body of the query")
    parser.add_argument(
        "--command",
        metavar="CMD",
        help="answer with the standard output of this command, which gets the query's body on its standard input and "
        "its subject as EVBUS_SUBJECT; run without a shell; if it fails the asker gets its words",
    )
    parser.add_argument(
        "--command-timeout", type=duration, default=30.0, metavar="SECONDS", help="for --command (default: %(default)g)"
    )
    parser.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="a header of the answer")
    parser.add_argument("--count", type=count, metavar="N", help="end after so many queries")
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="SECONDS",
        help="end after this time; exit code 4 if fewer than --count queries, or none at all, have come",
    )
    parser.add_argument("--group", metavar="NAME", help="of the members of a group one is asked")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print the time of asking in front (UTC)")
    add_format_options(parser)
    add_lasting_options(parser)
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer."""
    answer = _answer_of(args)
    several = any(token in ("*", ">") for token in args.subject.split("."))
    printer = Printer(as_json=args.json, raw=args.raw, time=args.timestamps, subject=several)
    header_map = headers(args.header)
    die_in_order_on_sigterm()
    with Ending[Exception | None]() as ending:
        responder = _Responder(printer, answer, header_map, args.count, ending, reconnects=args.reconnect)
        with open_client(args, "reply", codec=codec_option(args.format), on_error=responder.on_error) as client:
            client.on_query(args.subject, group=args.group)(responder.on_query)
            say(f"answering {args.subject}")
            responder.wait(args.timeout)
        return responder.exit_code()


def _answer_of(args: argparse.Namespace) -> Callable[[Message], Any]:
    """What makes the answer to a query."""
    ways = (args.body is not None or args.file is not None, args.echo, args.command is not None)
    if sum(ways) > 1:
        raise UsageError("give one of BODY, --echo and --command")
    if args.echo:
        return _echo
    if args.command is not None:
        return _Command(args.command, args.command_timeout)
    value = body_value(read_body(args), args.format)
    return lambda _message: value


def _echo(message: Message) -> Any:
    try:
        return message.decode()  # text stays text, and a value a value
    except CodecError:
        return message.data


class _Command:
    """Runs a command for a query."""

    def __init__(self, line: str, timeout: float) -> None:
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"--command {line!r}: {error}") from None
        if not self._words:
            raise UsageError("--command is empty")
        self._timeout = timeout

    def __call__(self, message: Message) -> bytes | None:
        """Its standard output; None if it failed, and the asker knows."""
        try:
            done = subprocess.run(
                self._words,
                input=message.data,
                capture_output=True,
                timeout=self._timeout,
                check=False,
                env={**os.environ, "EVBUS_SUBJECT": message.subject},
            )
        except subprocess.TimeoutExpired:
            self._fail(message, f"took longer than {self._timeout:g} s")
        except OSError as error:
            self._fail(message, f"cannot be run: {error.strerror or error}")
        else:
            if not done.returncode:
                return done.stdout
            words = " ".join(done.stderr.decode("utf-8", "replace").split())[:_WORDS]
            self._fail(message, f"ended with {done.returncode}" + (f": {words}" if words else ""))
        return None

    def _fail(self, message: Message, why: str) -> None:
        say(f"{self._words[0]} {why}")
        message.fail(_COMMAND_FAILED, f"{self._words[0]} {why}")


class _Responder:
    """Prints, answers and counts. The handler runs on a thread of the client."""

    def __init__(
        self,
        printer: Printer,
        answer: Callable[[Message], Any],
        header_map: dict[str, str] | None,
        wanted: int | None,
        ending: Ending[Exception | None],
        *,
        reconnects: bool,
    ) -> None:
        self._reconnects = reconnects
        self._printer = printer
        self._answer = answer
        self._headers = header_map
        self._wanted = wanted
        self._seen = 0
        self._lock = threading.Lock()
        self._ending = ending

    def on_query(self, message: Message) -> None:
        with self._lock:
            if self._wanted is not None and self._seen >= self._wanted:
                message.fail(_COMMAND_FAILED, "this responder is ending")
                return
            self._seen += 1
            last = self._seen == self._wanted
        try:
            self._printer.show(message)
            value = self._answer(message)
            if not message.answered:
                message.reply(value, headers=self._headers)
        except (OutputClosed, CommandError) as error:
            message.fail(_COMMAND_FAILED, "this responder is ending")
            self._ending.put(error)
        finally:
            if last:
                self._ending.put(None)

    def on_error(self, error: BaseException, _message: Message | None) -> None:
        lasting = lasting_error(error, reconnects=self._reconnects)
        if lasting is not None:
            self._ending.put(lasting)
        else:
            say_error(error)

    def wait(self, timeout: float | None) -> None:
        """Until the count is reached or the time is up. Raises what ended it otherwise."""
        try:
            error = self._ending.wait(timeout)
        except TimeoutError:
            return
        if error is not None:
            raise error

    def exit_code(self) -> int:
        """After `wait`."""
        return EXIT_OK if self._seen >= (self._wanted or 1) else EXIT_TIMEOUT
