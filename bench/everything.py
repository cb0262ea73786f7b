"""`python -m bench report`: all benches after one another, their figures, and the report made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.clients import CLIENTS, available_clients, clients
from bench.document import charts, markdown
from bench.errors import BenchError
from bench.latency import latency
from bench.machine import facts
from bench.plan import Workload, default_workloads
from bench.scale import scale
from bench.throughput import available, measure

__all__ = ["PARTS", "collect", "failures", "keep_others", "write"]

PARTS = ("throughput", "scale", "latency", "clients")
_PEERS = ("relay", "nats", "redis", "evbus")


def collect(parts: list[str], *, quick: bool, rounds: int | None, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts and return their figures, as results.json holds them.

    Args:
        parts: of PARTS.
        quick: fewer and smaller runs.
        rounds: instead of 5, or 3 with `quick`.
        progress: is told what is going on.
    """
    rounds = rounds or (3 if quick else 5)
    peers, missing = available(list(_PEERS))
    libraries, without = available_clients(list(CLIENTS))
    machine = facts()
    # "Linux 6.1" says as much as the name that somebody has given to a kernel.
    system, release, processor = str(machine["system"]).split(" ", 2)
    machine["system"] = f"{system} {'.'.join(release.split('.')[:2])} {processor}"
    data: dict[str, Any] = {
        "machine": machine,
        "quick": quick,
        "rounds": rounds,
        "versions": {**peers, **libraries},
        "missing": {**missing, **without},
        **{part: [] for part in PARTS},
    }
    for name, why in data["missing"].items():
        progress(f"{name} is left out: {why}")
    names = list(peers)
    if "throughput" in parts:
        plan = [*default_workloads(quick), *([] if quick else [Workload(1, 1000, 128)])]
        scale_of_run = 0.15 if quick else 1.0
        for found in measure(names, plan, rounds=rounds, scale=scale_of_run, limit_s=1800, progress=progress):
            for one in found:
                work = one.workload
                data["throughput"].append(
                    {
                        "workload": work.name,
                        "publishers": work.publishers,
                        "subscribers": work.subscribers,
                        "size": work.size,
                        "peer": one.peer,
                        "rounds": [round(sample.cpu_ns, 2) for sample in one.samples],
                        "per_s": [round(sample.per_s) for sample in one.samples],
                        "problem": one.problem,
                    }
                )
    messages, largest = (100_000, 5_000) if quick else (500_000, 100_000)
    if "scale" in parts:
        for points in scale(names, rounds=rounds, messages=messages, largest=largest, progress=progress):
            data["scale"] += [point.to_json() for point in points]
    if "latency" in parts:
        for rates in latency(names, rounds=rounds, seconds=0.3 if quick else 2.0, progress=progress):
            data["latency"] += [rate.to_json() for rate in rates]
    if "clients" in parts:
        count = 20_000 if quick else 200_000
        for works in clients(list(libraries), rounds=rounds, messages=count, progress=progress):
            data["clients"] += [work.to_json() for work in works]
    return data


def keep_others(data: dict[str, Any], parts: list[str], directory: Path) -> None:
    """Take the parts that were not run from the report that is there, if it is of the same machine and versions.

    Raises:
        BenchError: it is of others, so that one report would mix what cannot be compared.
    """
    there = directory / "results.json"
    if set(parts) == set(PARTS) or not there.exists():
        return
    before = json.loads(there.read_text(encoding="utf-8"))
    same = ("machine", "versions", "quick", "rounds")
    differing = [key for key in same if before[key] != data[key]]
    if differing:
        raise BenchError(f"{directory} holds a report with other {', '.join(differing)}; use another --into")
    data.update({part: before[part] for part in PARTS if part not in parts})


def write(data: dict[str, Any], directory: Path) -> list[Path]:
    """Write report.md, its charts and results.json; returns their paths.

    Raises:
        BenchError: the directory cannot be written to.
    """
    pictures = charts(data)
    files = {
        **pictures,
        "report.md": markdown(data, pictures),
        "results.json": json.dumps(data, ensure_ascii=False, indent=1) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write the report: {error}") from error
    return [directory / name for name in files]


def failures(data: dict[str, Any]) -> list[str]:
    """What went wrong in any part, one line each."""
    found = []
    for part in PARTS:
        for row in data[part]:
            if row["problem"]:
                who = row.get("peer") or row.get("client")
                found.append(f"{part}: {who}: {row['problem']}")
    return list(dict.fromkeys(found))
