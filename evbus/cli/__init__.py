"""The command line: `evbus COMMAND ...`, also `python -m evbus COMMAND ...`.

Data goes to standard output, everything else to standard error. Exit codes:

    0    done
    1    it failed; one line on standard error says why and what to do
    2    the command line, or a setting, makes no sense; nothing was done
    4    timeout
    5    nobody answers the query
    6    the responder answered with a failure
    130  ended by Ctrl-C
    141  the reader of standard output went away, as with `evbus sub news | head -1`
    143  ended by SIGTERM (the server and `run` drain and end with 0)

A command's module is imported only when that command runs, and imports client or server only in `run`, so that help and
version are quick. Each module has DESCRIPTION, EXAMPLES, `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

__all__ = ["COMMANDS", "main"]

#: Command: what it does, in the order of the help text. The module has the command's name.
COMMANDS: Final = {
    "serve": "run an event server",
    "pub": "publish messages",
    "sub": "print the messages of subjects or patterns",
    "query": "ask a query and print the answer",
    "reply": "answer queries",
    "run": "run the handlers that a module declares",
    "ping": "measure the round trip to the server",
    "bench": "measure a server and the clients, with every message checked",
    "demo": "watch a server and several clients at work",
    "version": "print the version",
}

_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code. Wrong usage, `--help` and SIGTERM raise SystemExit with it instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from evbus.cli.common import run_guarded

        return run_guarded(lambda: _run(arguments))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(arguments: list[str]) -> int:
    from evbus.cli.common import EXIT_OK, EXIT_USAGE, Output

    if not arguments:
        print(_overview(), file=sys.stderr)
        return EXIT_USAGE
    name = arguments[0]
    if name == "help" and len(arguments) == 2 and arguments[1] in COMMANDS:
        return _command(arguments[1], ["--help"])
    if name in ("-h", "--help", "help"):
        Output().line(_overview())
        return EXIT_OK
    if name in ("-V", "--version"):
        name = "version"
    if name not in COMMANDS:
        return _unknown(name)
    return _command(name, arguments[1:])


def _command(name: str, arguments: list[str]) -> int:
    from evbus.cli.common import Parser

    module = importlib.import_module(f"evbus.cli.{name}")
    parser = Parser(prog=f"evbus {name}", description=module.DESCRIPTION, epilog=module.EXAMPLES)
    module.add_arguments(parser)
    # Intermixed: `evbus pub news --count 3 hello` is as good as `evbus pub news hello --count 3`.
    code: int = module.run(parser.parse_intermixed_args(arguments))
    return code


def _overview() -> str:
    commands = "\n".join(f"  {name:<9}{summary}" for name, summary in COMMANDS.items())
    return f"""\
usage: evbus COMMAND [options]

A distributed event bus over plain TCP. Start a server with `evbus serve`, then publish, subscribe and query.

commands:
{commands}

`evbus COMMAND --help` explains a command, with examples. The server's address is given by -s/--server or EVBUS_URL;
evbus://127.0.0.1:9100 is the default."""


def _unknown(name: str) -> int:
    from evbus.cli.common import EXIT_USAGE, say

    if name.startswith("-"):
        say(f"the command comes first: evbus COMMAND {name} ...; `evbus --help` lists the commands")
        return EXIT_USAGE
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    say(f"there is no command {name!r}; {hint}")
    return EXIT_USAGE
