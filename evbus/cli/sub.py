"""`evbus sub`: print messages as they come."""

from __future__ import annotations

import argparse
import threading

from evbus.cli.common import (
    EXIT_OK,
    EXIT_TIMEOUT,
    CommandError,
    OutputClosed,
    add_client_options,
    die_in_order_on_sigterm,
    open_client,
    say,
)
from evbus.cli.ending import Ending
from evbus.cli.lasting import add_lasting_options, lasting_error, say_error, say_gap
from evbus.cli.show import Printer, add_format_options
from evbus.cli.values import count, duration
from evbus.message import Message

DESCRIPTION = """\
Print the messages of subjects until Ctrl-C. A pattern has * for one token and > for the rest: 'news.*', 'news.>'.
One message a line: its text, or the JSON of a structured value; with a pattern or several subjects, the subject and a
tab stand in front. The line "subscribed" on standard error says that nothing published from now on is missed."""
EXAMPLES = """\
examples:
  evbus sub greetings
  evbus sub 'news.>' email.new -t
  evbus sub 'news.*' --json
  evbus sub jobs --group workers
  evbus sub photos.new --raw --count 1 > photo.jpg
  evbus sub greetings --count 1 --timeout 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus sub`."""
    parser.add_argument("subject", metavar="SUBJECT", nargs="+", help="subjects or patterns")
    parser.add_argument("--count", type=count, metavar="N", help="end after so many messages")
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="SECONDS",
        help="end after this time; exit code 4 if fewer than --count messages, or none at all, have come",
    )
    parser.add_argument("--group", metavar="NAME", help="share the messages with all other members of this group")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print the time of publishing in front (UTC)")
    add_format_options(parser)
    add_lasting_options(parser)
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print messages."""
    several = len(args.subject) > 1 or any(token in ("*", ">") for token in args.subject[0].split("."))
    printer = Printer(as_json=args.json, raw=args.raw, time=args.timestamps, subject=several)
    die_in_order_on_sigterm()
    with Ending[Exception | None]() as ending:
        tally = _Tally(printer, args.count, ending, reconnects=args.reconnect)
        with open_client(args, "sub", on_error=tally.on_error) as client:
            try:
                for subject in args.subject:
                    client.subscribe(subject, tally.on_message, group=args.group, on_gap=say_gap)
                say(f"subscribed to {', '.join(args.subject)}")
                tally.wait(args.timeout)
            finally:
                # Nothing was published, and what is not printed yet is not wanted any more.
                client.disconnect(drain=False)
        return tally.exit_code()


class _Tally:
    """Prints and counts.

    The handlers run on the client's threads. A slow reader of our output holds them up, and the messages wait within
    the client's limits.
    """

    def __init__(
        self, printer: Printer, wanted: int | None, ending: Ending[Exception | None], *, reconnects: bool
    ) -> None:
        self._reconnects = reconnects
        self._printer = printer
        self._wanted = wanted
        self._seen = 0
        self._is_over = False
        self._lock = threading.Lock()
        self._ending = ending

    def on_message(self, message: Message) -> None:
        with self._lock:
            if self._is_over:
                return
            try:
                self._printer.show(message)
            except (OutputClosed, CommandError) as error:
                self._end(error)
                return
            self._seen += 1
            if self._seen == self._wanted:
                self._end(None)

    def on_error(self, error: BaseException, _message: Message | None) -> None:
        lasting = lasting_error(error, reconnects=self._reconnects)
        if lasting is not None:
            self._ending.put(lasting)
        else:
            say_error(error)

    def _end(self, error: Exception | None) -> None:
        self._is_over = True
        self._ending.put(error)

    def wait(self, timeout: float | None) -> None:
        """Until the count is reached or the time is up; then, and however else this ends, nothing more is printed.

        Raises:
            Exception: what ended it.
        """
        try:
            error = self._ending.wait(timeout)
        except TimeoutError:
            return
        finally:
            # Without the lock, which a handler may hold that waits for our reader.
            self._is_over = True
        if error is not None:
            raise error

    def exit_code(self) -> int:
        """After `wait`."""
        return EXIT_OK if self._seen >= (self._wanted or 1) else EXIT_TIMEOUT
