"""What `evbus bench` prints: figures as text, JSON or CSV, ratios to an earlier run, and a progress bar."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from evbus.cli.bench_check import Histogram
from evbus.cli.bench_spec import Result
from evbus.cli.common import CommandError

__all__ = ["ProgressBar", "as_csv", "comparison", "figures", "text"]

#: What the rows of each role are called.
_NAMES: Final = {
    "publish": "publish",
    "subscribe": "receive",
    "ask": "query",
    "answer": "answer",
    "connect": "connect",
}
_PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999))
_BAR_WIDTH: Final = 30


def _latency(histogram: Histogram) -> dict[str, float]:
    found = {name: histogram.percentile(share) / 1000 for name, share in _PERCENTILES}
    return {**found, "max": max(histogram.counts, default=0) / 1000}


def _merged(lists: Sequence[list[list[int]]]) -> Histogram:
    whole = Histogram()
    for pairs in lists:
        whole.merge(Histogram.from_json(pairs))
    return whole


def figures(asked: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """All figures of a run, as they are written by `--json`.

    Args:
        asked: what was asked for.
        results: of all processes.
    """
    record: dict[str, Any] = dict(asked)
    for role, name in _NAMES.items():
        mine = [result for result in results if result.role == role]
        messages = sum(result.messages for result in mine)
        if not mine:
            continue
        seconds = max(result.seconds for result in mine)
        row: dict[str, Any] = {"messages": messages, "seconds": round(seconds, 4)}
        # The responder's time is mostly that of waiting for the askers to begin and to end.
        if messages and seconds > 0 and role != "answer":
            row["per_s"] = round(messages / seconds, 1)
        if messages:
            row["cpu_us"] = round(sum(result.cpu_s for result in mine) / messages * 1e6, 3)
            row["own_us"] = round(sum(result.own_s for result in mine) / messages * 1e6, 3)
        subscribe_s = max((result.more.get("subscribe_s", 0.0) for result in mine), default=0.0)
        if subscribe_s:
            row["subscribes_per_s"] = round(messages / subscribe_s, 1)
        record[name] = row
    latency = _merged([result.latency for result in results])
    if latency.total:
        record["latency_us"] = _latency(latency)
    late = _merged([result.late for result in results])
    if late.total:
        record["sent_late_us"] = _latency(late)
    check = {
        name: sum(getattr(result, name) for result in results)
        for name in ("lost", "repeated", "reordered", "damaged", "unfinished")
    }
    problems = list(dict.fromkeys(problem for result in results for problem in result.problems))
    record["check"] = {**check, "ok": not any(check.values()) and not problems}
    record["problems"] = problems
    return record


def text(record: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = [record["title"]]
    for name in _NAMES.values():
        row = record.get(name)
        if row is None:
            continue
        line = f"{name:<9}"
        line += f"{row['per_s']:>13,.0f} /s" if "per_s" in row else f"{row['messages']:>13,}   "
        if "per_s" in row and record["size"] and name in ("publish", "receive"):
            line += f"{row['per_s'] * record['size'] / 1e6:>10,.1f} MB/s"
        if "cpu_us" in row:
            line += f"   CPU {row['cpu_us']:.2f} µs each"
            if row["own_us"]:
                line += f", of it {row['own_us']:.2f} the bench's own"
        if "subscribes_per_s" in row:
            line += f"\n{'subscribe':<9}{row['subscribes_per_s']:>13,.0f} /s"
        lines.append(line)
    for key, name in (("latency_us", "latency"), ("sent_late_us", "sent late")):
        if key in record:
            parts = [f"{label.replace('_', '.')} {_duration(value)}" for label, value in record[key].items()]
            lines.append(f"{name:<9}   {'  '.join(parts)}")
    lines.append(f"check       {_verdict(record)}")
    return "\n".join(lines)


def _duration(us: float) -> str:
    if us < 1000:
        return f"{us:.0f} µs"
    return f"{us / 1000:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def _verdict(record: dict[str, Any]) -> str:
    check = record["check"]
    wrong = [f"{count:,} {name}" for name, count in check.items() if name not in ("ok", "unfinished") and count]
    if check["unfinished"]:
        wrong.append(f"the end of {check['unfinished']} publishers has not come")
    if wrong or record["problems"]:
        return "; ".join([f"FAILED: {', '.join(wrong) or 'no loss was seen'}", *record["problems"]])
    seen = next((record[name]["messages"] for name in ("receive", "query", "connect") if name in record), None)
    if seen is None:
        return "the server has taken all messages; nothing was received here"
    if "receive" in record and not record["checked"]:
        return f"{seen:,} messages, as many as were sent; they were not looked at"
    if "receive" in record:
        return f"{seen:,} messages, each once, in order and unharmed"
    if "query" in record:
        return f"{seen:,} queries, each with its own answer"
    return f"{seen:,} connections, each received the message once"


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = "; ".join(value) if isinstance(value, list) else value
    return flat


def as_csv(record: dict[str, Any]) -> str:
    """A line of names and a line of values."""
    out = io.StringIO()
    flat = _flat(record)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(flat)
    writer.writerow(flat.values())
    return out.getvalue()


def comparison(record: dict[str, Any], before: dict[str, Any]) -> str:
    """This run beside an earlier one: both values and the ratio, and what was asked for differently.

    Raises:
        CommandError: the earlier record is none of ours.
    """
    now, then = _flat(record), _flat(before)
    measured = (".per_s", ".cpu_us", ".subscribes_per_s")
    keys = [key for key in now if key.endswith(measured) or key.startswith(("latency_us.", "sent_late_us."))]
    lines = [f"{'compared':<26}{'before':>14}{'now':>14}{'ratio':>9}"]
    for key in keys:
        old, new = then.get(key), now[key]
        if isinstance(old, (int, float)) and old > 0:
            lines.append(f"{key:<26}{old:>14,.2f}{new:>14,.2f}{new / old:>9.2f}")
    if len(lines) == 1:
        raise CommandError("the file of --compare has no figure in common with this run; was it made by --json?")
    differing = [
        key for key in ("mode", "client", "size", "rate", "clients", "at_once", "checked") if now[key] != then.get(key)
    ]
    if differing:
        lines.append("not the same work: " + ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in differing))
    return "\n".join(lines)


class ProgressBar:
    """One line on standard error that is written over, if that is a terminal; else nothing.

    Args:
        total: how many messages there are to be, or None.
        duration: seconds that they are to take, or None.
    """

    def __init__(self, total: int | None, duration: float | None) -> None:
        self.is_shown = sys.stderr is not None and sys.stderr.isatty()
        self._total = total
        self._duration = duration
        self._began: float | None = None

    def show(self, done: int) -> None:
        """So many are done."""
        if not self.is_shown:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = now
        passed = now - self._began
        share = done / self._total if self._total else passed / self._duration if self._duration else 0.0
        full = int(min(share, 1.0) * _BAR_WIDTH)
        rate = f"{done / passed:,.0f} /s" if passed > 0.2 else ""
        bar = "#" * full + "." * (_BAR_WIDTH - full)
        print(f"\r\033[K[{bar}] {min(share, 1.0):>4.0%} {done:>12,} {rate}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the line empty."""
        if self.is_shown and self._began is not None:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
