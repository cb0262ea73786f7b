"""`python -m bench PART`: measure the server and the clients beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.document import markdown
from bench.errors import BenchError
from bench.everything import PARTS, collect, failures, keep_others, write
from bench.machine import facts
from bench.peers import PEERS
from bench.plan import default_workloads, parse_shapes, parse_sizes, workloads
from bench.report import json_lines, table
from bench.throughput import Measurement, available, measure

_DEFAULT_PEERS = "relay,nats,redis,evbus"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benches of evbus; see bench/README.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    throughput = commands.add_parser(
        "throughput",
        help="processor time of the server per delivered message",
        description="Drives each server with the same cheap load, checks that every message arrives once and in order, "
        "then measures the server's processor time per delivery, in turns with the others.",
    )
    throughput.add_argument(
        "--peers", help=f"of {','.join(PEERS)} (default: those of {_DEFAULT_PEERS} that are installed)"
    )
    throughput.add_argument("--sizes", help="payload sizes, e.g. 16,128,4K (default: a table of sizes and shapes)")
    throughput.add_argument("--shapes", help="PUBLISHERSxSUBSCRIBERS, e.g. 1x1,1x100 (default with --sizes: 1x1)")
    throughput.add_argument("--rounds", type=int, help="timed runs of each peer (default 5, with --quick 3)")
    throughput.add_argument("--quick", action="store_true", help="fewer and smaller runs: a look, not a figure")
    throughput.add_argument(
        "--max-seconds", type=float, default=900.0, help="begin nothing new after this (default 900)"
    )
    throughput.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    for name, words in (
        ("scale", "how the server's cost grows with subjects, patterns, connections; what a connection costs"),
        ("latency", "publish to delivery, at fixed rates and at shares of each server's peak"),
        ("clients", "the Python clients: publishing, receiving, asking"),
        ("report", "everything, as a Markdown report with charts"),
    ):
        part = commands.add_parser(name, help=words, description=words)
        part.add_argument("--rounds", type=int, help="timed runs of each peer (default 5, with --quick 3)")
        part.add_argument("--quick", action="store_true", help="fewer and smaller runs: a look, not a figure")
        if name == "report":
            part.add_argument("--into", type=Path, default=Path("bench/results"), metavar="DIRECTORY")
            part.add_argument(
                "--parts",
                default=",".join(PARTS),
                help="of %(default)s (default: all); the others stay as they are there",
            )
        else:
            part.add_argument("--json", action="store_true", help="the figures as one JSON object instead of tables")
    return parser


def _part(options: argparse.Namespace) -> int:
    parts = options.parts.split(",") if options.command == "report" else [options.command]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise BenchError(f"--parts: unknown {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        raise BenchError("--rounds: 1 to 100")
    data = collect(parts, quick=options.quick, rounds=options.rounds, progress=_say)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if options.command == "report":
        keep_others(data, parts, options.into)
        for path in write(data, options.into):
            print(path)
    else:
        print(json.dumps(data) if options.json else markdown(data, ()))
    for failure in failures(data):
        print(f"bench: {failure}", file=sys.stderr)
    return 1 if failures(data) else 0


def _throughput(options: argparse.Namespace) -> int:
    names = [name.strip() for name in (options.peers or _DEFAULT_PEERS).split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise BenchError(f"--peers: unknown {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        raise BenchError("--rounds: 1 to 100")
    versions, missing = available(names)
    for name, why in missing.items():
        if options.peers:  # asked for by name, so it may not be left out silently
            raise BenchError(f"{name}: {why}")
        _say(f"{name} is left out: {why}")
    if options.sizes or options.shapes:
        plan = workloads(parse_shapes(options.shapes or "1x1"), parse_sizes(options.sizes or "128"))
    else:
        plan = default_workloads(options.quick)

    about = facts() | {"peers": versions}
    if options.json:
        print(json.dumps({"machine": about}), flush=True)
    failed, head = False, True
    for measurements in measure(
        list(versions),
        plan,
        rounds=options.rounds or (3 if options.quick else 5),
        scale=0.15 if options.quick else 1.0,
        limit_s=options.max_seconds,
        progress=_say,
    ):
        _show(measurements, as_json=options.json, head=head)
        failed = failed or any(measurement.problem for measurement in measurements)
        head = False
    if not options.json:
        print(f"\n{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}")
        print("server and load on cores of their own" if about["pinned"] else "NOT pinned: figures are unsteady")
        print("; ".join(dict.fromkeys(versions.values())))
    return 1 if failed else 0


def _show(measurements: list[Measurement], *, as_json: bool, head: bool) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(json_lines(measurements) if as_json else table(measurements, head=head), flush=True)


def _say(text: str) -> None:
    """Progress: one line that is written over on a terminal, a log elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line; returns the exit code: 0 done, 1 a peer failed, 2 it could not be run at all."""
    options = _parser().parse_args()
    try:
        return _throughput(options) if options.command == "throughput" else _part(options)
    except BenchError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
