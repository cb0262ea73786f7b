"""`evbus ping`: the round trip to the server."""

from __future__ import annotations

import argparse
import time

from evbus.cli.common import EXIT_OK, Output, add_client_options, open_client
from evbus.cli.values import count, duration, positive

DESCRIPTION = """\
Measure the round trip to the server: a heartbeat there and back, through the server's event loop."""
EXAMPLES = """\
examples:
  evbus ping
  evbus ping --count 10 --interval 100ms
  evbus ping -s 127.0.0.1:9100 --count 1 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evbus ping`."""
    parser.add_argument("--count", type=count, default=4, metavar="N", help="round trips (default: %(default)s)")
    parser.add_argument(
        "--interval", type=positive, default=1.0, metavar="SECONDS", help="from one to the next (default: %(default)g)"
    )
    parser.add_argument(
        "--timeout", type=duration, default=3.0, metavar="SECONDS", help="for each round trip (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per round trip, then one for all")
    add_client_options(parser)


def run(args: argparse.Namespace) -> int:
    """Ping."""
    out = Output()
    times: list[float] = []
    with open_client(args, "ping") as client:
        due = time.monotonic()
        for number in range(1, args.count + 1):
            if number > 1:
                due += args.interval
                time.sleep(max(0.0, due - time.monotonic()))
            rtt_ms = client.rtt(timeout=args.timeout) * 1000
            times.append(rtt_ms)
            if args.json:
                out.json({"seq": number, "rtt_ms": round(rtt_ms, 3)})
            else:
                out.line(f"{client.address}: seq={number} time={rtt_ms:.3f} ms")
    low, mean, high = min(times), sum(times) / len(times), max(times)
    if args.json:
        figures = {"min": low, "avg": mean, "max": high}
        out.json({"count": len(times), "rtt_ms": {name: round(value, 3) for name, value in figures.items()}})
    else:
        out.line(f"{len(times)} round trips, min/avg/max = {low:.3f}/{mean:.3f}/{high:.3f} ms")
    return EXIT_OK
