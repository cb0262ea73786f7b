"""The guard against getting slower: its work is what it says, and it fails when it should."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers_cli import ROOT

sys.path.insert(0, str(ROOT))

from bench import instructions


def test_the_work_is_done() -> None:
    assert len(instructions.publishes(100)) == 100 * len(instructions.publishes(1))
    sinks = instructions.route(100, 3)
    assert len(sinks) == 3
    assert {len(sink.data) for sink in sinks} == {len(instructions.publishes(100))}
    instructions.receive(100)


def test_every_work_has_a_record() -> None:
    record = json.loads(instructions.RECORD.read_text(encoding="utf-8"))
    assert record.keys() == instructions.WORK.keys()


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.2, 0), (1.3, 1), (0.5, 0)])
def test_clearly_worse_fails(
    factor: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "instructions.json"
    record.write_text(json.dumps(dict.fromkeys(instructions.WORK, 1000)))
    monkeypatch.setattr(instructions, "RECORD", record)
    monkeypatch.setattr(instructions, "count", lambda name: 1000 * factor if "publish" in name else 1000.0)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["instructions"])
    assert instructions.main() == code
    assert ("client, publish" in capsys.readouterr().err) == bool(code)


def test_without_valgrind_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["instructions"])
    assert instructions.main() == 0
    assert "skipped: valgrind is not installed" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_counting() -> None:
    assert 100 < instructions.count("client, publish") < 10_000
