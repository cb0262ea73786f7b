"""What type checkers make of classes with a subject: good.py is accepted, and of bad.py each marked line is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_cli import ROOT

CASES = Path(__file__).resolve().parent / "typing_cases"
BAD = {
    number
    for number, line in enumerate((CASES / "bad.py").read_text(encoding="utf-8").splitlines(), 1)
    if line.endswith("# BAD")
}

Errors = dict[str, set[int]]


def run(*command: str) -> str:
    # An editable installation is found by a hook that type checkers do not run.
    done = subprocess.run(command, cwd=CASES, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(cache: Path) -> Errors:
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(cache), "--no-pretty"]
    out = run(*command, "good.py", "bad.py")
    errors: Errors = {}
    for file, line in re.findall(r"^(\w+\.py):(\d+): error: ", out, re.M):
        errors.setdefault(file, set()).add(int(line))
    assert re.search(r"^(Found|Success)", out, re.M), out
    return errors


def pyright(directory: Path) -> Errors:
    beside = Path(sys.executable).parent / "pyright"
    program = str(beside) if beside.exists() else shutil.which("pyright")
    if program is None:
        pytest.skip("pyright is not installed")
    settings = {
        "include": [os.path.relpath(CASES, directory)],
        "extraPaths": [os.path.relpath(ROOT, directory)],
        "typeCheckingMode": "strict",
        "reportMissingModuleSource": False,
        "reportUnusedFunction": False,
        # Handlers that get dicts and lambdas without types are among the cases.
        "reportUnknownMemberType": False,
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(settings))
    out = run(program, "--pythonpath", sys.executable, "--outputjson", "--project", str(directory))
    told = json.loads(out)
    assert told["summary"]["filesAnalyzed"] == 2, out
    errors: Errors = {}
    for found in told["generalDiagnostics"]:
        if found["severity"] == "error":
            errors.setdefault(Path(found["file"]).name, set()).add(found["range"]["start"]["line"] + 1)
    return errors


@pytest.fixture(scope="module", params=[mypy, pyright], ids=["mypy", "pyright"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    checker: Callable[[Path], Errors] = request.param
    return checker(tmp_path_factory.mktemp("checker"))


def test_good_cases_are_accepted(errors: Errors) -> None:
    """Also by their `assert_type` lines: the response of a typed query is inferred."""
    assert errors.get("good.py", set()) == set()


def test_bad_cases_are_rejected(errors: Errors) -> None:
    assert len(BAD) >= 14
    assert errors.get("bad.py", set()) == BAD
