"""What all tests share: hypothesis tries the same examples every time, no clock decides whether it is content, and at
its end a run says what it measured and what it left out.

`HYPOTHESIS_PROFILE=default pytest` looks for new examples.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_deselected: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count what a run leaves out, by the marker that says why."""
    for item in items:
        marks = [name for name in ("full", "netns") if item.get_closest_marker(name) is not None]
        _deselected[", ".join(marks) or "not asked for"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """So that a run with holes cannot look whole: what was skipped and what was left out, with the reason and count."""
    skipped: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        skipped[reason.removeprefix("Skipped: ")] += 1
    measured: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "row":
                row, _, what = str(value).partition(" | ")
                measured.setdefault(row, []).append(what)
    if measured:
        terminalreporter.section("rows of the fault matrix")
    for row, lines in sorted(measured.items()):
        terminalreporter.write_line(row)
        for line in lines:
            terminalreporter.write_line(f"    {line}")
    if not skipped and not _deselected:
        return
    terminalreporter.section("not run")
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"{count:5d} skipped: {reason}")
    for reason, count in sorted(_deselected.items()):
        where = " (make test-full runs them)" if reason != "not asked for" else ""
        terminalreporter.write_line(f"{count:5d} left out: {reason}{where}")
