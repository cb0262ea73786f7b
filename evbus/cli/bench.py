"""`evbus bench`: measure a running server and the clients, with every message checked."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evbus.cli.common import (
    EXIT_ERROR,
    EXIT_OK,
    CommandError,
    Output,
    UsageError,
    add_client_options,
    die_in_order_on_sigterm,
    open_client,
    server_url,
)
from evbus.cli.values import count, duration, size

if TYPE_CHECKING:
    from evbus.cli.bench_spec import Spec

DESCRIPTION = """\
Measure a running server and the clients. Every message is numbered and checked: lost, repeated, reordered or damaged
ones are counted, and the exit code is 1 then. Ends after 3 seconds unless --count or --duration say otherwise.

  pubsub       each client process publishes to a receiving process of its own
  fanout       one process publishes, --clients processes receive everything
  pub, sub     one half of it, to be started by itself: first sub, then pub
  query        --clients processes ask, one process answers
  connections  --clients processes make --connections connections in all, and subscribe on each

Latency is counted from when a message was to be sent. Without --rate messages are sent as fast as they are taken, and
their latency is mostly that of waiting in line; with --rate they are sent at their time whoever keeps up or not, and
"sent late" is how far the bench itself was behind."""
EXAMPLES = """\
examples:
  evbus bench pubsub
  evbus bench pubsub --async --size 1KiB --rate 20000 --duration 10
  evbus bench fanout --clients 8 --count 100000
  evbus bench query --at-once 64 --json > before.json
  evbus bench query --at-once 64 --compare before.json
  evbus bench connections --connections 2000
exit codes: 1 a message was lost, repeated, reordered or damaged, or it could not be run
"""

MODES: Final = ("pubsub", "fanout", "pub", "sub", "query", "connections")

_DEFAULT_S: Final = 3.0
#: Time for somebody to start `bench pub` by hand.
_SUB_S: Final = 60.0
_PATIENCE_S: Final = 15.0
_WINDOW_BYTES: Final = 16 << 20
_MAX_CLIENTS: Final = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evbus bench`."""
    parser.add_argument("mode", metavar="MODE", choices=MODES, help=", ".join(MODES))
    parser.add_argument("--subject", help="default: one of its own; for pub and sub bench.messages")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="use the asyncio client")
    parser.add_argument("--clients", type=count, metavar="N", help="processes (default: 1, of fanout 4); at most 64")
    parser.add_argument("--publishers", type=count, default=1, metavar="N", help="sub: how many to expect (default 1)")
    parser.add_argument("--size", type=size, default=128, metavar="BYTES", help="of a message (default 128, least 16)")
    parser.add_argument("--rate", type=float, metavar="N", help="messages or queries a second of each process")
    parser.add_argument("--count", type=count, metavar="N", help="messages or queries of each process")
    parser.add_argument(
        "--duration",
        type=duration,
        metavar="SECONDS",
        help="default 3, unless there is a --count; sub: at most, default 60",
    )
    parser.add_argument("--warm-up", type=int, default=1000, metavar="N", help="first, uncounted (default %(default)s)")
    parser.add_argument(
        "--window", type=count, metavar="N", help="messages on their way to the slowest (default 10000, or 16 MiB)"
    )
    parser.add_argument("--at-once", type=count, default=1, metavar="N", help="query: under way at a time, per process")
    parser.add_argument("--connections", type=count, default=1000, metavar="N", help="connections: in all")
    parser.add_argument("--no-check", dest="check", action="store_false", help="count messages, do not look at them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--csv", action="store_true", help="print a line of names and one of values")
    parser.add_argument("--compare", metavar="FILE", help="print ratios to an earlier --json")
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and tell by the exit code whether every message came as it should."""
    before = _before(args.compare)
    _check(args)
    from evbus.cli.bench_crew import Crew
    from evbus.cli.bench_show import ProgressBar, as_csv, comparison, figures, text

    out = Output()
    die_in_order_on_sigterm()
    with open_client(args, "bench"):
        pass  # one line about a server that is not there, instead of one from each process
    total = args.count * args.clients if args.count else args.connections if args.mode == "connections" else None
    bar = ProgressBar(total, args.duration)
    specs = _specs(args, progress=bar.is_shown)
    try:
        with Crew(specs, bar.show) as crew:
            results = crew.run()
    finally:
        bar.clear()
    record = figures(_asked(args), results)
    if args.json:
        out.json(record)
    elif args.csv:
        out.write(as_csv(record).encode())
    else:
        out.line(text(record))
    if before is not None and not (args.json or args.csv):
        out.line(comparison(record, before))
    return EXIT_OK if record["check"]["ok"] else EXIT_ERROR


def _check(args: argparse.Namespace) -> None:
    from evbus.cli.bench_check import STAMP_BYTES

    if args.clients is None:
        args.clients = 4 if args.mode == "fanout" else 1
    if args.clients > _MAX_CLIENTS:
        raise UsageError(f"--clients: at most {_MAX_CLIENTS} processes")
    if args.size < STAMP_BYTES:
        raise UsageError(f"--size: at least {STAMP_BYTES} bytes, the stamp that each message carries")
    if args.rate is not None and not 0 < args.rate <= 1e8:
        raise UsageError("--rate: a positive number of messages a second")
    if args.warm_up < 0:
        raise UsageError("--warm-up: from 0 up")
    if args.json and args.csv:
        raise UsageError("--json and --csv: one of them")
    if args.compare and (args.json or args.csv):
        raise UsageError("--compare prints text, so neither --json nor --csv goes with it")
    if args.mode == "connections" and args.connections < args.clients:
        raise UsageError("--connections: at least one for each of --clients")
    if not args.check and args.rate is not None:
        raise UsageError("--rate measures latency, which --no-check cannot")
    if args.duration is None and (args.count is None or args.mode == "sub"):
        args.duration = _SUB_S if args.mode == "sub" else _DEFAULT_S
    if args.window is None:
        args.window = max(min(10_000, _WINDOW_BYTES // args.size), 16)


def _before(name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    import msgspec

    try:
        record = msgspec.json.decode(Path(name).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise CommandError(f"--compare {name!r}: {error}") from error
    if not isinstance(record, dict):
        raise CommandError(f"--compare {name!r}: this is not what --json has written")
    return record


def _specs(args: argparse.Namespace, *, progress: bool) -> list[Spec]:
    from evbus.cli.bench_spec import Spec

    subject = args.subject or ("bench.messages" if args.mode in ("pub", "sub") else f"bench.{secrets.token_hex(8)}")

    def make(role: str, number: int = 0, **more: Any) -> Spec:
        shared: dict[str, Any] = {
            "url": server_url(args),
            "subject": subject,
            "asynchronous": args.asynchronous,
            "size": args.size,
            "count": args.count,
            "duration": args.duration,
            "rate": args.rate,
            "window": args.window,
            "warm_up": args.warm_up,
            "at_once": args.at_once,
            "check": args.check,
            "progress": progress,
            "patience": _PATIENCE_S,
        }
        return Spec(role=role, number=number, **{**shared, **more})

    clients = range(args.clients)
    if args.mode == "pubsub":
        pairs: list[dict[str, Any]] = [{"subject": f"{subject}.{number}"} for number in clients]
        return [make("subscribe", **pair) for pair in pairs] + [make("publish", **pair) for pair in pairs]
    if args.mode == "fanout":
        receivers = [make("subscribe", number) for number in clients]
        return [*receivers, make("publish", subscribers=args.clients)]
    if args.mode == "pub":
        return [make("publish", number, subscribers=0) for number in clients]
    if args.mode == "sub":
        # A count is the publishers' affair: what ends a subscriber is their last message.
        alone: dict[str, Any] = {"publishers": args.publishers, "count": None, "patience": 0.0}
        return [make("subscribe", number, **alone) for number in clients]
    if args.mode == "query":
        warm_up = min(args.warm_up, 100)
        return [make("answer"), *(make("ask", number, warm_up=warm_up) for number in clients)]
    share, rest = divmod(args.connections, args.clients)
    return [
        make(
            "connect",
            number,
            asynchronous=True,
            subject=f"{subject}.{number}",
            connections=share + (number < rest),
        )
        for number in clients
    ]


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    client = "asyncio" if args.asynchronous or args.mode == "connections" else "sync"
    parts = [args.mode, f"{client} client", f"{args.clients} client processes" if args.clients > 1 else ""]
    if args.mode == "connections":
        parts.append(f"{args.connections:,} connections")
    else:
        parts.append(f"{args.size:,} B")
        parts.append(f"{args.rate:,g} /s from each" if args.rate else "as fast as they are taken")
    if args.mode == "query":
        parts.append(f"{args.at_once} at once")
    return {
        "title": ", ".join(part for part in parts if part),
        "mode": args.mode,
        "client": client,
        "clients": args.clients,
        "size": args.size,
        "rate": args.rate or 0,
        "at_once": args.at_once,
        "checked": args.check,
    }
