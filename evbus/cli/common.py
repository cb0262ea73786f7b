"""What the commands share: parser, exit codes, standard output and error, the connection."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from evbus.errors import (
    ConfigError,
    EvbusError,
    InvalidSubjectError,
    NoRespondersError,
    RemoteError,
)

if TYPE_CHECKING:
    from types import FrameType

    from evbus.client import EventClient

__all__ = [
    "EXIT_ERROR",
    "EXIT_NO_RESPONDERS",
    "EXIT_OK",
    "EXIT_PIPE",
    "EXIT_REMOTE",
    "EXIT_TERMINATED",
    "EXIT_TIMEOUT",
    "EXIT_USAGE",
    "CommandError",
    "Output",
    "OutputClosed",
    "Parser",
    "UsageError",
    "add_client_options",
    "connect_options",
    "die_in_order_on_sigterm",
    "exit_code",
    "open_client",
    "run_guarded",
    "say",
]

EXIT_OK: Final = 0
EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_TIMEOUT: Final = 4
EXIT_NO_RESPONDERS: Final = 5
EXIT_REMOTE: Final = 6
#: 128 + SIGPIPE, 128 + SIGTERM: what a shell reports for programs that these signals end.
EXIT_PIPE: Final = 141
EXIT_TERMINATED: Final = 143

DEFAULT_URL: Final = "evbus://127.0.0.1:9100"


class CommandError(Exception):
    """The command failed for a reason that is no EvbusError. `str()` is the line for the user."""

    code = EXIT_ERROR


class UsageError(CommandError):
    """The command line makes no sense, in a way that only shows after parsing."""

    code = EXIT_USAGE


class OutputClosed(Exception):  # noqa: N818 - not an error: whoever read our output has had enough
    """Nobody reads standard output any more."""


class Parser(argparse.ArgumentParser):
    """One line for an error, and help texts that keep their line breaks."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # An abbreviation that works today would be ambiguous after the next option.
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        """The help text on standard output."""
        if file is None:
            Output().write(self.format_help().encode())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """End with the exit code for wrong usage."""
        say(f"{message}; see `{self.prog} --help`")
        raise SystemExit(EXIT_USAGE)


def say(text: str) -> None:
    """One line on standard error; `text` may come from elsewhere and hold anything."""
    if sys.stderr is None:  # started with standard error closed
        return
    line = " ".join(text.split("\n"))
    try:
        print(f"evbus: {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # closed meanwhile: there is nobody to tell
        return


def exit_code(error: EvbusError) -> int:
    """What a script is told about an error."""
    if isinstance(error, (ConfigError, InvalidSubjectError)):
        return EXIT_USAGE
    if isinstance(error, NoRespondersError):
        return EXIT_NO_RESPONDERS
    if isinstance(error, RemoteError):
        return EXIT_REMOTE
    if isinstance(error, TimeoutError):
        return EXIT_TIMEOUT
    return EXIT_ERROR


def run_guarded(run: Callable[[], int]) -> int:
    """Run a command; whatever can be expected to go wrong becomes one line and an exit code."""
    try:
        return run()
    except OutputClosed:
        return EXIT_PIPE
    except EvbusError as error:
        say(str(error))
        return exit_code(error)
    except CommandError as error:
        say(str(error))
        return error.code


# --- standard output --------------------------------------------------------------------------------------------------


class Output:
    """Standard output, in bytes, past Python's buffer. Any thread; what one call writes stays together.

    A buffer would be flushed once more at the interpreter's end, and hang or complain there if a reader has stopped or
    gone away.

    Raises:
        OutputClosed: by all methods that write: nobody reads any more.
        CommandError: there is no standard output, or it cannot be written to, e.g. as the disk is full.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise CommandError("standard output is closed; send it to a file or /dev/null instead")
        self._lock = threading.Lock()
        self._fd = sys.stdout.fileno()
        self.is_terminal = sys.stdout.isatty()

    def write(self, data: bytes) -> None:
        """These bytes, now."""
        rest = memoryview(data)
        with self._lock:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # somebody has made our terminal or pipe nonblocking
                    select.select([], [self._fd], [])
                except BrokenPipeError:
                    raise OutputClosed from None
                except OSError as error:
                    raise CommandError(f"cannot write to standard output: {error.strerror or error}") from error

    def line(self, text: str) -> None:
        """A line of text."""
        self.write(text.encode("utf-8", "backslashreplace") + b"\n")

    def json(self, record: dict[str, Any]) -> None:
        """An object as one line of JSON."""
        import msgspec  # with the first object, as `evbus version` should not wait for it

        self.write(msgspec.json.encode(record) + b"\n")


# --- the client -------------------------------------------------------------------------------------------------------


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that talks to a server."""
    parser.add_argument(
        "-s",
        "--server",
        metavar="URL",
        help="HOST:PORT, or several as HOST:PORT,HOST:PORT, or unix:///PATH; "
        "else the environment's EVBUS_URL, else " + DEFAULT_URL,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="tell about the connection on standard error")


def server_url(args: argparse.Namespace) -> str:
    """The server's address as a URL: from the option, the environment or the default."""
    given: str = args.server or os.environ.get("EVBUS_URL", "").strip() or DEFAULT_URL
    return given if "://" in given else f"evbus://{given}"


def open_client(args: argparse.Namespace, command: str, **options: Any) -> EventClient:
    """A connected client; leaving its `with` block disconnects in order.

    Args:
        args: parsed, with the options of `add_client_options`.
        command: its name, which the server's log shows.
        options: as for EventClient.
    """
    import evbus

    _log_to_stderr(verbose=args.verbose)
    return evbus.connect(server_url(args), name=f"evbus {command}", **connect_options(args), **options)


def connect_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `evbus.connect` is told of the options of `add_lasting_options`. A command without them tries once."""
    options: dict[str, Any] = {"reconnect": getattr(args, "reconnect", False)}
    if getattr(args, "wait", None) is not None:
        options |= {"timeout": args.wait, "retry": True}
    return options


def _log_to_stderr(*, verbose: bool) -> None:
    logger = logging.getLogger("evbus")
    logger.handlers = [logging.StreamHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.handlers[0].setFormatter(logging.Formatter("evbus: %(message)s"))
    if not verbose:
        # What goes wrong reaches the command as an exception or by `on_error`, and is told once. What is left are
        # tracebacks of our own handlers, which must not get lost.
        logger.handlers[0].addFilter(lambda record: record.exc_info is not None)


def die_in_order_on_sigterm() -> None:
    """SIGTERM leaves the `with` blocks, so that what was begun is finished, and ends with its usual exit code."""

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, on_sigterm)
