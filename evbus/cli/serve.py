"""`evbus serve`: an event server in the foreground."""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from evbus.cli.common import EXIT_OK, EXIT_USAGE, say
from evbus.cli.ending import Ending
from evbus.cli.values import count, duration, positive, size
from evbus.errors import ConfigError
from evbus.limits import UNLIMITED, Limits

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from evbus.server import EventServer

DESCRIPTION = """\
Run an event server until SIGTERM or Ctrl-C, which let it deliver what is in flight first; a second one ends it at once.
The log goes to standard error; its line "listening on HOST:PORT" says that the server is ready."""
EXAMPLES = """\
examples:
  evbus serve
  evbus serve --port 0
  evbus serve --port 9200 --max-payload 8MiB --log-level warning
  evbus serve --host 0.0.0.0 --allow-anonymous-network --stats 60
"""

_LOG_LEVELS: Final = ("debug", "info", "warning", "error")

#: Option, field of Limits, reader of the text, help.
_LIMITS: Final[tuple[tuple[str, str, Callable[[str], float], str], ...]] = (
    ("--max-payload", "payload_bytes", size, "largest payload of a message"),
    ("--max-connections", "connections", count, "connections at a time"),
    ("--max-handshakes", "handshakes", count, "connections at a time that have not introduced themselves"),
    ("--max-subscriptions", "subscriptions_per_connection", count, "subscriptions of one connection"),
    ("--max-subscriptions-total", "subscriptions", count, "subscriptions of all connections together"),
    ("--max-queries", "queries_per_connection", count, "queries of one connection that wait for an answer"),
    ("--max-pending", "pending_hard_bytes", size, "bytes waiting for a subscriber at which it is cut off"),
    ("--max-pending-soft", "pending_soft_bytes", size, "bytes that may wait for a subscriber for long"),
    ("--pending-soft-time", "pending_soft_s", duration, "how long more than that may wait"),
    ("--write-timeout", "write_timeout_s", duration, "how long a subscriber may take nothing while data waits for it"),
    ("--query-timeout", "query_s", duration, "longest time that a query may wait for its answer"),
    ("--handshake-timeout", "handshake_s", duration, "time in which a new connection must introduce itself"),
    ("--silence-timeout", "silence_s", duration, "silence after which a C# client is taken for dead"),
)

#: Among the numbers of signals: the server has stopped.
_STOPPED: Final = 0

#: What `_unlimited` takes besides numbers. Limits itself knows which fields may have it.
_UNLIMITED_WORD: Final = "unlimited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evbus serve`."""
    parser.add_argument("--host", default="127.0.0.1", help="name or address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=9100, help="TCP port; 0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--unix", metavar="PATH", help="listen on a Unix domain socket too, which only this user may connect to"
    )
    parser.add_argument(
        "--allow-anonymous-network",
        action="store_true",
        help="listen on an address that other machines can reach; anyone there may then publish, subscribe and answer",
    )
    parser.add_argument(
        "--drain",
        type=positive,
        default=5.0,
        metavar="SECONDS",
        help="how long what is in flight may take when the server stops (default: %(default)g)",
    )
    parser.add_argument("--log-level", choices=_LOG_LEVELS, default="info", help="default: %(default)s")
    parser.add_argument("--stats", type=duration, metavar="SECONDS", help="log the counters this often, as JSON")
    limits = parser.add_argument_group(
        "limits",
        "Sizes may be written as 65536, 512KiB or 8MiB, times as 5, 250ms or 2m. Where it makes sense, 'unlimited' is "
        "taken too.",
    )
    defaults = Limits()
    for option, field, reader, text in _LIMITS:
        limits.add_argument(
            option,
            dest=field,
            type=_unlimited(reader),
            metavar="SIZE" if reader is size else "N" if reader is count else "SECONDS",
            help=f"{text} (default: {_shown(getattr(defaults, field), reader)})",
        )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from evbus.server import EventServer

    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.WARNING,
    )
    log = logging.getLogger("evbus.server")
    log.setLevel(args.log_level.upper())
    _raise_descriptor_limit()
    with Ending[int]() as ending:
        try:
            server = EventServer(
                args.host,
                args.port,
                unix=args.unix,
                limits=_limits(args),
                allow_anonymous_network=args.allow_anonymous_network,
                drain=args.drain,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _frame: ending.put(number))
            server.start()
        except ConfigError as error:
            say(f"{_option_of(error.option)}: {error.problem}; nothing was started")
            return EXIT_USAGE
        if not log.isEnabledFor(logging.INFO):
            # The ready line comes whatever the log level is: whoever started us waits for it.
            say(f"listening on {', '.join(server.addresses)}")
        return _serve(server, ending, args.stats, log)


def _serve(server: EventServer, ending: Ending[int], stats_s: float | None, log: logging.Logger) -> int:
    number = _first_signal(server, ending, stats_s, log)
    log.info("%s: stopping; another one stops at once", signal.Signals(number).name)

    def stop() -> None:
        server.stop()
        ending.put(_STOPPED)

    threading.Thread(target=stop, daemon=True).start()
    number = ending.wait()
    if number == _STOPPED:
        return EXIT_OK
    server.stop()  # the second stop ends the drain
    return 128 + number


def _first_signal(server: EventServer, ending: Ending[int], stats_s: float | None, log: logging.Logger) -> int:
    while True:
        try:
            return ending.wait(stats_s)
        except TimeoutError:
            log.info("stats %s", json.dumps(server.stats(), default=str))


# --- options ----------------------------------------------------------------------------------------------------------


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; ports are 1 to 65535, and 0 takes a free one")
    return int(text)


def _unlimited(reader: Callable[[str], float]) -> Callable[[str], float]:
    return lambda text: UNLIMITED if text.lower() == _UNLIMITED_WORD else reader(text)


def _shown(value: float, reader: Callable[[str], float]) -> str:
    """A default as the user would write it."""
    if value in (UNLIMITED, math.inf):
        return _UNLIMITED_WORD
    if reader is size:
        return f"{value / (1 << 20):g}MiB" if value >= 1 << 20 else f"{value / (1 << 10):g}KiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _limits(args: argparse.Namespace) -> Limits:
    given: dict[str, Any] = {}
    for _, field, _, _ in _LIMITS:
        value = getattr(args, field)
        if value is not None:
            given[field] = value
    # A lower ceiling lowers what stands below it, unless that was asked for too.
    for above, below in (("pending_hard_bytes", "pending_soft_bytes"), ("query_s", "query_default_s")):
        if above in given and below not in given:
            given[below] = min(given[above], getattr(Limits(), below))
    return Limits(**given)


def _option_of(field: str) -> str:
    """The option that sets what an error of the server calls by its own name."""
    names = {name: option for option, name, _, _ in _LIMITS}
    return names.get(field, f"--{field.replace('_', '-')}" if field in ("host", "port", "drain") else field)


def _raise_descriptor_limit() -> None:
    """One descriptor per connection: take as many as this user may have."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports no hard limit, and refuses more than 10,240 (OPEN_MAX).
    wanted = 10_240 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            logging.getLogger("evbus.server").warning(
                "cannot raise the limit of %d open descriptors; it bounds the number of connections", soft
            )
