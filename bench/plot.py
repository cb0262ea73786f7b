"""Charts as SVG: lines over a logarithmic or ordinal axis, and groups of bars. No dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Series", "bars", "lines"]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 46, 84
# Told apart by those too who see colours differently (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Series:
    """One line, or one bar in each group; None where there is no value."""

    name: str
    values: Sequence[float | None]


class _Scale:
    """A logarithmic axis from bottom to top."""

    def __init__(self, series: Sequence[Series]) -> None:
        found = [value for one in series for value in one.values if value is not None and value > 0]
        if not found:
            raise ValueError("a chart needs at least one value above zero")
        self.low = math.floor(math.log10(min(found)))
        self.high = max(math.ceil(math.log10(max(found))), self.low + 1)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _frame(title: str, y_label: str, x_label: str, scale: _Scale, series: Sequence[Series]) -> list[str]:
    style = 'font-family="sans-serif" font-size="12" role="img"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {style}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 24, title, more=' font-size="15" font-weight="bold"'),
        _text(
            16,
            (_HEIGHT - _BOTTOM + _TOP) / 2,
            y_label,
            more=f' transform="rotate(-90 16 {(_HEIGHT - _BOTTOM + _TOP) / 2})"',
        ),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - _BOTTOM + 38, x_label),
    ]
    for power in range(scale.low, scale.high + 1):
        y = scale.y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, _number(10.0**power), "end"))
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(series), 1)
    for index, one in enumerate(series):
        x = _LEFT + index * step
        parts.append(f'<rect x="{x:.1f}" y="{_HEIGHT - 26}" width="12" height="12" fill="{_colour(index)}"/>')
        parts.append(_text(x + 18, _HEIGHT - 16, one.name, "start"))
    return parts


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _check(places: Sequence[str], series: Sequence[Series]) -> None:
    if not places or any(len(one.values) != len(places) for one in series):
        raise ValueError("a chart needs places, and a value or None of each series for each")


def lines(title: str, x_label: str, y_label: str, places: Sequence[str], series: Sequence[Series]) -> str:
    """A line for each series, its values at evenly spaced places; the y axis is logarithmic."""
    _check(places, series)
    scale = _Scale(series)
    parts = _frame(title, y_label, x_label, scale, series)
    step = (_WIDTH - _LEFT - _RIGHT) / len(places)
    xs = [_LEFT + step * (index + 0.5) for index in range(len(places))]
    parts += [_text(x, _HEIGHT - _BOTTOM + 18, place) for x, place in zip(xs, places, strict=True)]
    for index, one in enumerate(series):
        there = [(x, scale.y(v), v) for x, v in zip(xs, one.values, strict=True) if v is not None and v > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in there)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>')
        for x, y, value in there:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_colour(index)}">'
                f"<title>{escape(one.name)}: {_number(value)}</title></circle>"
            )
    return "\n".join([*parts, "</svg>\n"])


def bars(title: str, x_label: str, y_label: str, places: Sequence[str], series: Sequence[Series]) -> str:
    """A group of bars at each place, one bar for each series; the y axis is logarithmic."""
    _check(places, series)
    scale = _Scale(series)
    parts = _frame(title, y_label, x_label, scale, series)
    step = (_WIDTH - _LEFT - _RIGHT) / len(places)
    width = step * 0.8 / max(len(series), 1)
    for at, place in enumerate(places):
        parts.append(_text(_LEFT + step * (at + 0.5), _HEIGHT - _BOTTOM + 18, place))
        for index, one in enumerate(series):
            value = one.values[at]
            if value is None or value <= 0:
                continue
            x, y = _LEFT + step * (at + 0.1) + index * width, scale.y(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_HEIGHT - _BOTTOM - y:.1f}" '
                f'fill="{_colour(index)}"><title>{escape(one.name)}: {_number(value)}</title></rect>'
            )
            parts.append(_text(x + width / 2, y - 3, _number(value), more=' font-size="9"'))
    return "\n".join([*parts, "</svg>\n"])
