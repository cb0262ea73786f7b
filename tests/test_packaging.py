"""What is tested is what the sources say: one version, a typed package, no extension older than its source."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
from pathlib import Path

import pytest

import evbus
from evbus._version import __version__

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = sorted(path.stem for path in (ROOT / "evbus").glob("*.pyx"))


def test_the_installed_version_is_that_of_the_source() -> None:
    assert importlib.metadata.version("evbus") == __version__


def test_the_version_stands_in_one_place() -> None:
    """A second place would be forgotten at the next release. (Docstrings speak of other programs' versions too.)"""
    written = re.compile(rf"(evbus[\w-]* )?{re.escape(__version__)}")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "evbus").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and written.fullmatch(node.value.strip())
    ]
    assert found == ["evbus/_version.py"]
    assert __version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(evbus.__path__[0]) / "py.typed").exists()


def test_there_are_extensions() -> None:
    assert "_frame" in EXTENSIONS


@pytest.mark.parametrize("name", EXTENSIONS)
def test_no_extension_is_older_than_its_source(name: str) -> None:
    """A stale build would pass tests of code that is no longer there, or fail those of code that now is."""
    built = importlib.import_module(f"evbus.{name}").__file__
    assert built is not None
    assert not built.endswith(".py")
    for suffix in ("pyx", "pxd"):
        source = ROOT / "evbus" / f"{name}.{suffix}"
        if source.exists():
            assert Path(built).stat().st_mtime >= source.stat().st_mtime, f"{source.name} changed: build again"


def test_the_tree_under_test_is_the_one_that_was_asked_for() -> None:
    """`make sanitize` and `make debug` build a tree of their own; testing another one would prove nothing."""
    tree = os.environ.get("EVBUS_TESTED_TREE")
    if tree:
        assert Path(evbus.__path__[0]).resolve().parent == (ROOT / tree).resolve()
