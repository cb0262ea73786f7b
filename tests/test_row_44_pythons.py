"""R44: a server that does not read costs the client its buffer and no more, on every Python that evbus supports.

CVE-2024-12254: asyncio of 3.12.1 and 3.13.0 does not hold back who writes by `writelines`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_rows import Row, interpreters

FIGURE = "64 MiB published to a stalled server: client-side buffer <= its limit on 3.10-3.13"
PROGRAM = Path(__file__).with_name("stalled_server.py")
ROOT = PROGRAM.parent.parent
#: What the process may grow by besides the buffer: the allocator, the stack of a thread, the interpreter's own.
SLACK_BYTES = 16 << 20
NOT_COPIED = (".*", "build", "dist", "tests", "*.so", "*.c", "*.egg-info", "__pycache__")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")


def check(python: str, cwd: Path, row: Row, seen: str = "") -> None:
    done = subprocess.run([python, str(PROGRAM)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    version, limit = found.pop("python"), found.pop("limit")
    assert seen in ("", version)
    for case, figures in found.items():
        row.measured(
            f"Python {version}, {case}: {figures['kept']:,} bytes kept at most, the limit is {limit:,}; "
            f"{figures['refused']:,} refused, grown by {figures['grown'] >> 20} MiB"
        )
        assert figures["kept"] <= limit, case
        assert figures["taken"] + figures["refused"] == 64 << 20, case
        assert figures["refused"] > 32 << 20, case  # it was stalled indeed
        assert figures["grown"] <= limit + SLACK_BYTES, case


def test_this_python(record_property: Callable[[str, object], None], tmp_path: Path) -> None:
    check(sys.executable, tmp_path, Row(record_property, "R44", FIGURE))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("minor", range(10, 14))
def test_other_pythons(record_property: Callable[[str, object], None], tmp_path: Path, minor: int) -> None:
    found = {version: path for version, path in interpreters().items() if version.startswith(f"3.{minor}.")}
    if not found:
        pytest.skip(f"no Python 3.{minor} with ensurepip here: put it on PATH or into EVBUS_PYTHONS")
    row = Row(record_property, "R44", FIGURE)
    for version, python in found.items():
        place = tmp_path / version
        # Built from a copy, so that nothing is left in the tree; by this Python, as its users get it.
        source = shutil.copytree(ROOT, place / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
        run(python, "-m", "venv", str(place))
        own = str(place / "bin" / "python")
        run(own, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place / "wheel"), str(source))
        run(own, "-m", "pip", "install", "--quiet", *map(str, (place / "wheel").glob("*.whl")))
        check(own, tmp_path, row, version)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
