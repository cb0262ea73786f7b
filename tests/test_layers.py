"""The layers of evbus, checked: imports go strictly downward, and what is sans-IO stays so.

The table below is the one statement of which module stands where. The checks read the sources (Python by its syntax
tree, Cython by its import lines) and import nothing. Each rule is also tried on a snippet that breaks it, so that a
checker that has gone blind fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "evbus"

#: From the bottom up. A module may import modules of lower layers only, so not its neighbours either. A package
#: (`cli/`) is one module here; `__init__` is the package root with its public names.
LAYERS: list[set[str]] = [
    {"wire", "_version"},
    {"errors"},
    {"limits", "payload", "ratelog", "reasons"},
    {"_frame", "announcement"},
    {"_message", "_outbox", "_subjects", "options"},
    {"_flow", "_mailbox", "_queries", "message", "signatures"},
    {"_inbox", "_router", "events"},
    {"_asking", "backoff", "handshake", "peer", "plan"},
    {"correlation"},
    {"answers", "backlog", "registrar", "replies", "reports"},
    {"broker", "control", "gaps"},
    {"session"},
    {"handlers", "requests"},
    {"endings"},
    {"_clock", "_io", "_wake", "reactor", "watch", "workers"},
    {"transport"},
    {"acceptor", "client_core", "dial", "server_core", "subscription", "waiting"},
    {"connector", "declaring"},
    {"aio_loop", "io_thread", "routers", "sync_replies"},
    {"aio_handlers", "aio_replies"},
    {"aio_subscription"},
    {"server", "client"},
    {"aio"},
    {"testing"},
    {"__init__"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
REACTOR = LEVEL["reactor"]

#: May import inside functions: the root and the command line, so that `evbus --help` and `import evbus` stay quick.
LAZY = {"__init__", "cli", "__main__"}

#: Below the reactor nothing may reach for these; bytes, events and the time come in as arguments.
IMPURE = {
    "_socket",
    "_thread",
    "asyncio",
    "concurrent",
    "multiprocessing",
    "queue",
    "sched",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "threading",
    "time",
}
IMPURE_HEADER = re.compile(
    r"(sys/|netinet/|arpa/)?(epoll|fcntl|poll|pthread|select|socket|threads|time|unistd|win\w*)\.h"
)

#: Nowhere: they run or rebuild what a peer may have written.
NEVER_IMPORTED = {"cloudpickle", "dill", "imp", "jsonpickle", "marshal", "pickle", "_pickle", "shelve"}
NEVER_CALLED = {"eval", "exec"}


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """The name in the table: `_frame` for _frame.pyx, _frame.pxd and _frame.pyi; `cli` for cli/serve.py."""
    return path.relative_to(package).parts[0].split(".")[0]


class Imported:
    """One import: of which module, on which line, and whether it stands inside a function."""

    def __init__(self, name: str, line: int, inside_function: bool) -> None:
        self.name = name  # absolute and dotted: "evbus._frame", "socket", "evbus.errors.CodecError"
        self.line = line
        self.inside_function = inside_function


# --- reading Python ---------------------------------------------------------------------------------------------------


def python_imports(tree: ast.AST) -> Iterator[Imported]:
    """Imports anywhere, also under TYPE_CHECKING: an upward import for a type is still a dependency of thought."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(below) for below in ast.walk(node) if below is not node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(alias.name, node.lineno, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative; the package is flat but for cli/, whose modules count as one
                base = f"evbus.{base}" if base else "evbus"
            for alias in node.names:
                yield Imported(f"{base}.{alias.name}", node.lineno, id(node) in inside)


def python_problems(module: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    yield from import_problems(module, python_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in NEVER_CALLED | {f"builtins.{name}" for name in NEVER_CALLED}:
                yield f"line {node.lineno}: {called}() is used nowhere in evbus"
            if called in ("__import__", "importlib.import_module", "import_module") and module not in LAZY:
                yield f"line {node.lineno}: {called}() hides an import from this test"
            if called.rpartition(".")[2] in ("now", "utcnow", "today") and "date" in called and below_reactor(module):
                yield f"line {node.lineno}: {called}() reads a clock; the time comes in as an argument"


# --- reading Cython ---------------------------------------------------------------------------------------------------

_CYTHON_NOISE = re.compile(
    r"""(?P<string>[rbufRBUF]{0,2}(?:\"\"\".*?\"\"\"|'''.*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))|(?P<comment>\#[^\n]*)""",
    re.S,
)
_EXTERN = re.compile(r"^[ \t]*cdef\s+extern\s+from\s+[\"'<]+([^\"'>]+)", re.M)
_FROM = re.compile(r"^([ \t]*)from\s+([.\w]+)\s+c?import\s+(\([^)]*\)|[^\n]*)", re.M)
_IMPORT = re.compile(r"^([ \t]*)c?import\s+([^\n]+)", re.M)


def without_strings_and_comments(source: str) -> str:
    """The same source with strings and comments emptied; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0]) if match["comment"] else '""' + "\n" * match[0].count("\n")

    return _CYTHON_NOISE.sub(blank, source)


def cython_imports(code: str) -> Iterator[Imported]:
    for match in _FROM.finditer(code):
        base = match[2]
        if base.startswith("."):
            base = f"evbus.{base.lstrip('.')}".rstrip(".")
        names = [name.split(" as ")[0].strip() for name in re.sub(r"[()\\]", " ", match[3]).split(",")]
        for name in names:
            if name:
                yield Imported(f"{base}.{name}", code.count("\n", 0, match.start(2)) + 1, bool(match[1]))
    for match in _IMPORT.finditer(code):
        for name in match[2].split(","):
            line = code.count("\n", 0, match.start(2)) + 1
            yield Imported(name.split(" as ")[0].strip(), line, bool(match[1]))


def cython_problems(module: str, source: str) -> Iterator[str]:
    code = without_strings_and_comments(source)
    yield from import_problems(module, cython_imports(code))
    for match in re.finditer(r"(?<![\w.])(eval|exec|__import__)\s*\(", code):
        yield f"line {code.count(chr(10), 0, match.start()) + 1}: {match[1]}() is used nowhere in evbus"
    for match in _EXTERN.finditer(source):  # the name of the header is a string
        if below_reactor(module) and IMPURE_HEADER.fullmatch(match[1]):
            line = source.count("\n", 0, match.start(1)) + 1
            yield f"line {line}: <{match[1]}> is for the reactor layer and above"


# --- the rules about imports ------------------------------------------------------------------------------------------


def below_reactor(module: str) -> bool:
    return LEVEL.get(module, REACTOR) < REACTOR


def import_problems(module: str, imports: Iterator[Imported]) -> Iterator[str]:
    if module not in LEVEL:
        yield f"module {module!r} has no place in LAYERS of {Path(__file__).name}: give it one"
        return
    for imported in imports:
        where, parts = f"line {imported.line}", imported.name.split(".")
        if imported.inside_function and module not in LAZY:
            yield f"{where}: import of {imported.name} inside a function"
        if parts[0] == "evbus":
            target = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
            if len(parts) > 1 and target == "__init__" and any(PACKAGE.glob(f"{parts[1]}.*")):
                yield f"{where}: evbus.{parts[1]} has no place in LAYERS of {Path(__file__).name}"
            elif target != module and LEVEL[target] >= LEVEL[module]:
                yield f"{where}: {module} (layer {LEVEL[module]}) imports {target} (layer {LEVEL[target]})"
            continue
        if parts[0] in NEVER_IMPORTED:
            yield f"{where}: {imported.name} is used nowhere in evbus"
        if below_reactor(module) and (
            parts[0] in IMPURE
            or parts[0] == "posix"
            or parts[:2] == ["libc", "time"]
            or parts[:2] == ["cpython", "time"]
        ):
            yield f"{where}: {imported.name} is for the reactor layer and above"


def problems(module: str, source: str, suffix: str) -> list[str]:
    check = python_problems if suffix in (".py", ".pyi") else cython_problems
    return list(dict.fromkeys(check(module, source)))  # one line can import many names


# --- the tests --------------------------------------------------------------------------------------------------------

SOURCES = sorted(path for suffix in ("py", "pyi", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))


def test_the_walk_finds_the_package() -> None:
    modules = {module_of(path) for path in SOURCES}
    assert modules >= {"wire", "errors", "limits", "payload", "_frame"}
    assert {".py", ".pyx", ".pxd"} <= {path.suffix for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_layers(path: Path) -> None:
    found = problems(module_of(path), path.read_text(encoding="utf-8"), path.suffix)
    assert found == [], "\n".join(f"{path.relative_to(PACKAGE.parent)} {problem}" for problem in found)


def test_no_module_stands_twice() -> None:
    assert sum(map(len, LAYERS)) == len(LEVEL)


def test_every_extension_has_a_stub() -> None:
    missing = [path.name for path in PACKAGE.glob("*.pyx") if not path.with_suffix(".pyi").exists()]
    assert missing == []


# Each of these must be found: (module, kind of file, source, a word of the complaint).
PLANTED = [
    # upward, sideways, through the root, relative, for a type only, and without a place in the table
    ("wire", ".py", "from evbus.errors import EvbusError", "imports errors"),
    ("wire", ".py", "import evbus.errors", "imports errors"),
    ("errors", ".py", "from evbus import limits", "imports limits"),
    ("errors", ".py", "from .limits import Limits", "imports limits"),
    ("errors", ".py", "from . import limits", "imports limits"),
    ("broker", ".py", "from evbus.session import Session", "imports session"),
    ("session", ".py", "import evbus", "imports __init__"),
    ("session", ".py", "from evbus import connect", "imports __init__"),
    ("session", ".py", "if TYPE_CHECKING:\n    from evbus.client import EventClient", "imports client"),
    ("session", ".py", "try:\n    import evbus.client\nexcept ImportError:\n    pass", "imports client"),
    ("server", ".py", "from evbus.client import EventClient", "imports client"),
    ("client", ".pyi", "from evbus.cli import main", "imports cli"),
    ("nowhere", ".py", "x = 1", "no place"),
    ("nowhere", ".pyx", "x = 1", "no place"),
    ("_frame", ".pyx", "from evbus._router cimport Router", "imports _router"),
    ("_frame", ".pyx", "from evbus._router cimport (\n    Link,\n    Router,\n)", "imports _router"),
    ("_frame", ".pxd", "from ._router cimport Router", "imports _router"),
    ("_frame", ".pyx", "cimport evbus._router as r", "imports _router"),
    ("_frame", ".pyx", "from evbus import wire, broker", "imports broker"),
    # inside a function
    ("client", ".py", "def f():\n    from evbus import errors", "inside a function"),
    ("client", ".py", "class C:\n    async def f(self):\n        import json", "inside a function"),
    ("client", ".py", "def f():\n    if x:\n        import evbus.errors", "inside a function"),
    ("_router", ".pyx", "def f():\n    from evbus._frame import Ring", "inside a function"),
    ("_router", ".pyx", "cdef int f():\n    import json\n", "inside a function"),
    ("client", ".py", "import importlib\nx = importlib.import_module('evbus.cli')", "hides an import"),
    ("client", ".py", "x = __import__('socket')", "hides an import"),
    ("_frame", ".pyx", "x = __import__('socket')", "nowhere"),
    # sockets, threads and clocks below the reactor
    *(
        (module, ".py", f"import {name}", "reactor layer")
        for module in ("broker", "session")
        for name in sorted(IMPURE)
    ),
    ("session", ".py", "import os, time as t", "reactor layer"),
    ("session", ".py", "from time import monotonic", "reactor layer"),
    ("session", ".py", "import concurrent.futures", "reactor layer"),
    ("session", ".py", "if TYPE_CHECKING:\n    import socket", "reactor layer"),
    ("session", ".py", "import datetime\nx = datetime.datetime.now()", "reads a clock"),
    ("_frame", ".pyx", "import time", "reactor layer"),
    ("_frame", ".pyx", "import os, threading", "reactor layer"),
    ("_frame", ".pyx", "from libc.time cimport time", "reactor layer"),
    ("_frame", ".pyx", "from posix.unistd cimport write", "reactor layer"),
    ("_frame", ".pxd", 'cdef extern from "sys/socket.h" nogil:\n    pass', "reactor layer"),
    ("_frame", ".pyx", "cdef extern from '<time.h>':\n    pass", "reactor layer"),
    ("_frame", ".pyx", "cdef extern from <pthread.h>:\n    pass", "reactor layer"),
    # nowhere at all
    ("cli", ".py", "import pickle", "nowhere"),
    ("cli", ".py", "from marshal import loads", "nowhere"),
    ("cli", ".py", "def f():\n    import _pickle", "nowhere"),
    ("_router", ".pyx", "import pickle", "nowhere"),
    ("cli", ".py", "eval('1')", "nowhere"),
    ("cli", ".py", "import builtins\nbuiltins.exec('1')", "nowhere"),
    ("_router", ".pyx", "x = eval ('1')", "nowhere"),
]


@pytest.mark.parametrize(("module", "suffix", "source", "word"), PLANTED)
def test_a_planted_violation_is_found(module: str, suffix: str, source: str, word: str) -> None:
    found = problems(module, source, suffix)
    assert any(word in problem for problem in found), found
    # and it is the planted line that is found, not something about every file
    assert problems("cli", "", suffix) == []


# None of these may be found.
INNOCENT = [
    ("errors", ".py", "from evbus.wire import ErrorCode"),
    ("errors", ".pyi", "from evbus import wire"),
    ("client", ".py", "import threading, time, socket\nfrom evbus import errors, transport"),
    ("reactor", ".py", "import selectors\nx = time.monotonic()"),
    ("cli", ".py", "def main():\n    from evbus.client import EventClient"),
    ("__init__", ".py", "def __getattr__(name):\n    return importlib.import_module('evbus.client')"),
    ("cli", ".py", "from evbus.cli.common import fail\nimport evbus"),
    ("session", ".py", "'import socket'\n# import time\nx = self.now()"),
    ("session", ".py", "import datetime\nx = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)"),
    (
        "_frame",
        ".pyx",
        '"""\nimport socket\nfrom evbus.broker import x\n"""\n# import time\ncdef int evaluate(): return 1',
    ),
    ("_frame", ".pyx", "x = 'a # b'\ny = \"import time\"\nself.eval(3)"),
    ("_router", ".pyx", "from evbus._frame cimport Ring, span  # and not from evbus.broker"),
    ("_frame", ".pyx", 'cdef extern from "Python.h":\n    pass'),
    ("_io", ".pyx", 'cdef extern from "sys/socket.h" nogil:\n    pass'),
    ("_frame", ".pyx", "from libc.string cimport memcpy\ncimport cython"),
]


@pytest.mark.parametrize(("module", "suffix", "source"), INNOCENT)
def test_what_is_allowed_is_not_found(module: str, suffix: str, source: str) -> None:
    assert problems(module, source, suffix) == []


def test_line_numbers_are_those_of_the_file() -> None:
    source = '"""\nline 2\n"""\n# comment\n\nfrom evbus import broker\n'
    assert problems("_frame", source, ".pyx")[0].startswith("line 6:")
    assert problems("_frame", source, ".py")[0].startswith("line 6:")
