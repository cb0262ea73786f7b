"""The table, and the same as JSON lines."""

from __future__ import annotations

import json
import statistics

from bench.throughput import Measurement, Sample

__all__ = ["Figures", "figures", "json_lines", "table"]

#: The peers that the others are compared with.
REFERENCES = ("relay", "nats")


class Figures:
    """What is printed of one measurement.

    Attributes:
        cpu_ns: median over the rounds of the server's processor nanoseconds per delivery.
        spread: half the distance from the smallest to the largest round, as a share of the median.
        per_s: median of the deliveries per second.
        ratios: by reference, the median over the rounds of this peer's cpu_ns divided by the reference's in the
            same round, so that a machine that slows down for a while does not shift it.
    """

    def __init__(self, mine: list[Sample], references: dict[str, list[Sample]]) -> None:
        costs = [sample.cpu_ns for sample in mine]
        self.cpu_ns = statistics.median(costs)
        self.spread = (max(costs) - min(costs)) / 2 / self.cpu_ns if self.cpu_ns else 0.0
        self.per_s = statistics.median(sample.per_s for sample in mine)
        self.ratios = {
            name: statistics.median(m.cpu_ns / r.cpu_ns for m, r in zip(mine, theirs, strict=True))
            for name, theirs in references.items()
            if len(theirs) == len(mine) and all(sample.cpu_ns > 0 for sample in theirs)
        }


def figures(measurements: list[Measurement]) -> list[tuple[Measurement, Figures | None]]:
    """Each measurement of one workload with its figures; None where it failed."""
    references = {m.peer: m.samples for m in measurements if m.peer in REFERENCES and m.samples and not m.problem}
    return [(m, Figures(m.samples, references) if m.samples and not m.problem else None) for m in measurements]


_HEAD = f"{'work':<18} {'peer':<10} {'ns/delivery':>11} {'spread':>8} {'deliveries/s':>13} {'x relay':>8} {'x nats':>8}"


def table(measurements: list[Measurement], *, head: bool) -> str:
    """The rows of one workload."""
    lines = [_HEAD, "-" * len(_HEAD)] if head else []
    for measurement, found in figures(measurements):
        start = f"{measurement.workload.name:<18} {measurement.peer:<10}"
        if found is None:
            lines.append(f"{start} FAILED: {measurement.problem}")
            continue
        ratios = "".join(f" {f'{found.ratios[name]:.2f}' if name in found.ratios else '-':>8}" for name in REFERENCES)
        lines.append(f"{start} {_short(found.cpu_ns):>11} {f'±{found.spread:.0%}':>8} {found.per_s:>13,.0f}{ratios}")
    return "\n".join(lines)


def _short(ns: float) -> str:
    return f"{ns:,.0f}" if ns >= 100 else f"{ns:.1f}"


def json_lines(measurements: list[Measurement]) -> str:
    """One object a line: the figures and the rounds that they come from."""
    lines = []
    for measurement, found in figures(measurements):
        workload = measurement.workload
        item: dict[str, object] = {
            "workload": workload.name,
            "publishers": workload.publishers,
            "subscribers": workload.subscribers,
            "size": workload.size,
            "peer": measurement.peer,
        }
        if found is None:
            item["problem"] = measurement.problem
        else:
            item["server_cpu_ns_per_delivery"] = round(found.cpu_ns, 1)
            item["spread"] = round(found.spread, 3)
            item["deliveries_per_s"] = round(found.per_s)
            item["ratio"] = {name: round(value, 3) for name, value in found.ratios.items()}
            item["rounds"] = [round(sample.cpu_ns, 1) for sample in measurement.samples]
        lines.append(json.dumps(item))
    return "\n".join(lines)
