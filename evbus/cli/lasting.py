"""Commands that run until they are ended: their options, and what they make of a connection that goes."""

from __future__ import annotations

import argparse

from evbus.cli.common import CommandError, say
from evbus.cli.values import duration
from evbus.errors import ConnectionLostError, SlowConsumerError
from evbus.message import Gap

__all__ = ["add_lasting_options", "lasting_error", "say_error", "say_gap"]


def add_lasting_options(parser: argparse.ArgumentParser) -> None:
    """Their options."""
    parser.add_argument(
        "--wait",
        type=duration,
        metavar="SECONDS",
        help="if no server is there yet, try again for so long (default: end with an error at once)",
    )
    parser.add_argument(
        "--no-reconnect",
        dest="reconnect",
        action="store_false",
        help="end when the connection is lost (default: get a new one, and say so)",
    )


def lasting_error(client_error: BaseException, *, reconnects: bool) -> Exception | None:
    """What an error that the client told by `on_error` means for the command.

    Args:
        reconnects: whether the client gets a new connection by itself.

    Returns:
        the exception to end with; None if the command can go on.
    """
    if isinstance(client_error, ConnectionLostError) and not reconnects:
        return CommandError(f"lost the connection: {client_error.reason}; start again when the server is back")
    if isinstance(client_error, SlowConsumerError):
        return client_error
    return None


def say_error(error: BaseException) -> None:
    """Tell of an error that the command survives."""
    say(f"lost the connection: {error.reason}; reconnecting" if isinstance(error, ConnectionLostError) else str(error))


def say_gap(gap: Gap) -> None:
    """Tell of messages that were missed."""
    if gap.reason == "reconnect":
        say(f"connected again; what was published to {gap.subject} meanwhile is missing")
    else:
        say(f"missed {gap.count} messages on {gap.subject}: they came faster than they were taken")
