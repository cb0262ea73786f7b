"""The report as Markdown and charts, made from the figures alone: a report can be made again from its results.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.plot import Series, bars, lines

__all__ = ["charts", "markdown"]

_NATS = "nats"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _figure(values: Sequence[float]) -> str:
    """Median and spread: half of what lies between the smallest and the largest, as a share of the median."""
    if not values:
        return "–"
    median = statistics.median(values)
    spread = (max(values) - min(values)) / 2 / median if median else 0.0
    return f"{_short(median)} ±{spread:.0%}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the rounds' ratios, if both have the same rounds."""
    if not mine or len(mine) != len(theirs) or not all(theirs):
        return "–"
    return f"{statistics.median(m / t for m, t in zip(mine, theirs, strict=True)):.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    all_rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in all_rows) + "\n"


def _ordered(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _grid(
    rows: list[dict[str, Any]], place: str, who: str, values: str, against: str, ours: Sequence[str], first: str
) -> str:
    """A table of places by peers, with the ratio of each of ours to one of them."""
    cells = {(row[place], row[who]): row for row in rows}
    places, peers = _ordered(row[place] for row in rows), _ordered(row[who] for row in rows)
    ours = [name for name in ours if name in peers and against in peers]
    out = []
    for at in places:
        line = [f"{at:,}" if isinstance(at, int) else str(at)]
        for peer in peers:
            row = cells.get((at, peer))
            line.append("–" if row is None else f"FAILED: {row['problem']}" if row["problem"] else _figure(row[values]))
        for name in ours:
            mine, theirs = cells.get((at, name)), cells.get((at, against))
            line.append(_ratio(mine[values], theirs[values]) if mine and theirs else "–")
        out.append(line)
    return _table([first, *peers, *(f"{name} / {against}" for name in ours)], out)


def markdown(data: dict[str, Any], pictures: Iterable[str]) -> str:
    """The report.

    Args:
        data: what results.json holds.
        pictures: the names of the charts that lie beside it.
    """
    machine = data["machine"]
    there = set(pictures)

    def picture(name: str, words: str) -> str:
        return f"![{words}]({name})\n\n" if name in there else ""

    cores = "server and load pinned to cores of their own" if machine["pinned"] else "NOT pinned: figures are unsteady"
    parts = [
        "# Bench report\n\n"
        "Made by `python -m bench report`" + (" with `--quick`: a look, not a figure" if data["quick"] else "") + ". "
        "What each figure means, and how to repeat it: [bench/README.md](../README.md).\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; {cores}. "
        f"{'; '.join(_ordered(data['versions'].values()))}. "
        + "".join(f"Left out: {name} ({why}). " for name, why in data["missing"].items())
        + f"{data['rounds']} rounds, the peers in turns; every figure is the median ± half the distance from the "
        "smallest to the largest round; a ratio is the median of the rounds' ratios.\n\n"
        "Each peer was checked first: every message once, in order, byte for byte. One that is not is marked FAILED.\n"
    ]
    if data["throughput"]:
        parts.append(
            "## Server: processor time per delivery (ns)\n\n"
            + picture("size.svg", "processor time by size")
            + picture("fanout.svg", "processor time by number of subscribers")
            + _grid(data["throughput"], "workload", "peer", "rounds", _NATS, ["evbus"], "work")
            + "\n### Deliveries per second\n\n"
            "What came through with one core for the server and one for the load; near the top the load is the "
            "slower one.\n\n" + _grid(data["throughput"], "workload", "peer", "per_s", _NATS, ["evbus"], "work")
        )
    growths = _ordered(row["growth"] for row in data["scale"])
    for growth in growths:
        rows = [row for row in data["scale"] if row["growth"] == growth]
        if growth == "one connection":
            count = rows[0]["x"]
            words = (
                f"## Connections and subscriptions\n\nOver {count:,} connections and {10 * count:,} subscriptions.\n\n"
            )
            parts.append(words + _grid(rows, "unit", "peer", "rounds", _NATS, ["evbus"], "figure"))
        else:
            parts.append(
                f"## Server: processor time per delivery (ns) by number of {growth}\n\n"
                + picture(f"{growth.replace(' ', '-')}.svg", f"processor time by number of {growth}")
                + _grid(rows, "x", "peer", "rounds", _NATS, ["evbus"], growth)
            )
    if data["latency"]:
        parts.append(
            "## Latency from publish to delivery (µs)\n\nFrom when a message was to be sent, at a fixed rate.\n\n"
            + picture("latency.svg", "p50 and p99.9")
        )
        for name in ("p50", "p99.9"):
            rows = [{**row, "us": row["us"][name]} for row in data["latency"]]
            parts.append(f"### {name}\n\n" + _grid(rows, "load", "peer", "us", _NATS, ["evbus"], "rate"))
        peaks = [row for row in data["latency"] if row["load"].startswith("80%")]
        if peaks:
            told = ", ".join(f"{row['peer']} {row['per_s'] / 0.8:,.0f}" for row in peaks)
            parts.append(f"Peaks, with every message checked, in messages a second: {told}.\n")
    if data["clients"]:
        ours = ["evbus-sync", "evbus-async"]
        parts.append(
            "## Python clients: processor time per message (µs)\n\n"
            + picture("clients.svg", "processor time of the clients")
            + _grid(data["clients"], "work", "client", "cpu_us", "nats-py", ours, "work")
            + "\n### Messages or queries per second\n\nBoth clients of a run share one core.\n\n"
            + _grid(data["clients"], "work", "client", "per_s", "nats-py", ours, "work")
        )
        asked = [row for row in data["clients"] if row["p50_us"] or row["problem"]]
        if asked:
            parts.append(
                "### p50 of a query (µs)\n\n" + _grid(asked, "work", "client", "p50_us", "nats-py", ours, "work")
            )
    return "\n".join(parts)


def _series(rows: list[dict[str, Any]], places: list[Any], place: str, who: str, values: str) -> list[Series]:
    cells = {(row[place], row[who]): _median(row[values]) for row in rows if not row["problem"]}
    return [Series(name, [cells.get((at, name)) for at in places]) for name in _ordered(row[who] for row in rows)]


def charts(data: dict[str, Any]) -> dict[str, str]:
    """The charts, by the names of their files."""
    found: dict[str, str] = {}
    label = "server CPU, ns per delivery"
    one = [row for row in data["throughput"] if row["publishers"] == row["subscribers"] == 1]
    fan = [row for row in data["throughput"] if row["publishers"] == 1 and row["size"] == 128]
    for name, rows, place, title, axis in (
        ("size.svg", one, "size", "1 publisher, 1 subscriber", "payload, bytes"),
        ("fanout.svg", fan, "subscribers", "1 publisher, 128 B", "subscribers"),
    ):
        places = sorted({row[place] for row in rows})
        _add(found, name, lines, title, axis, label, places, _series(rows, places, place, "peer", "rounds"))
    for growth in _ordered(row["growth"] for row in data["scale"]):
        if growth != "one connection":
            rows = [row for row in data["scale"] if row["growth"] == growth]
            places = _ordered(row["x"] for row in rows)
            series = _series(rows, places, "x", "peer", "rounds")
            _add(found, f"{growth.replace(' ', '-')}.svg", lines, f"Cost by {growth}", growth, label, places, series)
    rows = [
        {"load": row["load"], "who": f"{row['peer']} {name}", "us": row["us"][name], "problem": row["problem"]}
        for row in data["latency"]
        for name in ("p50", "p99.9")
    ]
    places = _ordered(row["load"] for row in rows if not row["problem"])
    series = [one for one in _series(rows, places, "load", "who", "us") if not one.name.startswith("relay")]
    _add(found, "latency.svg", lines, "Latency, 128 B", "rate", "µs", places, series)
    places = _ordered(row["work"] for row in data["clients"] if not row["problem"])
    series = _series(data["clients"], places, "work", "client", "cpu_us")
    _add(found, "clients.svg", bars, "Python clients, 128 B", "work", "client CPU, µs per message", places, series)
    return found


def _add(
    found: dict[str, str],
    name: str,
    draw: Any,
    title: str,
    axis: str,
    label: str,
    places: list[Any],
    series: list[Series],
) -> None:
    if places and any(value for one in series for value in one.values):
        texts = [f"{place:,}" if isinstance(place, int) else str(place) for place in places]
        found[name] = draw(title, axis, label, texts, series)
