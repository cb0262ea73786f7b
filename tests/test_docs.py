"""What the documents say is true: their code runs, their commands print what stands there, their tables are complete.

Marks in the Markdown, as comments on the line before a block of code: `<!-- sketch -->`, this is only read;
`<!-- start -->`, start these commands and let them run during the next block.
"""

from __future__ import annotations

import argparse
import builtins
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from helpers_cli import ROOT, Program, make_commands, wait_until

import evbus
from evbus import EventServer, Limits
from evbus.cli import COMMANDS, common
from evbus.cli import serve as serve_command
from evbus.testing import Bus, fixtures
from evbus.wire import CloseReason

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FIRST_STEPS = ROOT / "examples" / "first_steps"
DEFAULT = "evbus://127.0.0.1:9100"
#: Roots of others, which stand in the tree in errors.py only.
ABSTRACT_ERRORS = {"EvbusError", "QueryError", "LimitError"}


@dataclass
class Block:
    document: str
    line: int
    language: str
    mark: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks_of(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:^<!-- (\w+) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, match.start(3)) + 1
        yield Block(name_of(document), line, match[2], match[1] or "", match[3])


#: Of all documents but the protocol, whose examples have tests of their own.
BLOCKS = {name_of(document): list(blocks_of(document)) for document in DOCUMENTS if document.name != "protocol.md"}


def file_of(block: Block) -> str | None:
    """The name of the file that a block is, by its first line: `# emails.py: ...`."""
    match = re.match(r"# (\w+\.py): ", block.text)
    return match[1] if match else None


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


# --- Python -----------------------------------------------------------------------------------------------------------


WITH_PYTHON = [
    "README.md",
    "docs/asyncio.md",
    "docs/events.md",
    "docs/flow.md",
    "docs/from-nats.md",
    "docs/from-redis.md",
    "docs/from-zeromq.md",
    "docs/guide.md",
    "docs/queries.md",
    "docs/reconnecting.md",
    "docs/server.md",
    "docs/testing.md",
    "docs/workers.md",
]


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_in_the_documents(document: str, server: EventServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as one program; `# -> text` is what a line prints."""
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)  # where dataclasses look up their annotations
    printed: list[str] = []
    module.__dict__["print"] = lambda *values: printed.append(" ".join(map(str, values)))
    for block in BLOCKS[document]:
        if block.language != "python" or file_of(block):
            continue
        text = "\n" * (block.line - 1) + block.text.replace(DEFAULT, f"evbus://{server.address}")
        text = text.replace('"127.0.0.1", 9100', f'"127.0.0.1", {server.port}')
        code = compile(text, document, "exec")
        if block.mark == "sketch":
            continue
        builtins.exec(code, module.__dict__)
        expected = re.findall(r"# -> (.*)$", block.text, re.M)
        if expected:
            wait_for_words(printed, expected, block.name)
        printed.clear()


def wait_for_words(printed: list[str], expected: list[str], where: str) -> None:
    """Handlers print from their own threads."""
    wait_until(lambda: len(printed) >= len(expected), f"{where} prints {expected}")
    assert printed == expected, where


def test_every_document_with_python_is_tried() -> None:
    with_python = {b.document for blocks in BLOCKS.values() for b in blocks if b.language == "python"}
    assert with_python == set(WITH_PYTHON)


def test_the_files_of_the_readme_are_those_of_the_examples() -> None:
    written = {file_of(block): block.text for block in BLOCKS["README.md"] if file_of(block)}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in FIRST_STEPS.glob("*.py")}


def test_the_first_steps_of_the_readme(tmp_path: Path, server: EventServer) -> None:
    """The files and the commands of the README, in a new directory, with the server on another port."""
    env = make_commands(tmp_path)
    for block in BLOCKS["README.md"]:
        name = file_of(block)
        if name:
            text = block.text.replace("evbus.connect()", f'evbus.connect("evbus://{server.address}")')
            (tmp_path / name).write_text(text, encoding="utf-8")
    commands = [block.text.strip() for block in BLOCKS["README.md"] if not block.language]
    assert "venv/bin/evbus serve" in commands
    assert "venv/bin/evbus run archive:router" in commands
    (session,) = [block for block in BLOCKS["README.md"] if "$ venv/bin/python mail.py" in block.text]
    env["EVBUS_URL"] = server.address
    with Program(["venv/bin/evbus", "run", "archive:router"], cwd=tmp_path, env=env) as archive:
        archive.wait_for("running 2 handlers")
        check_session(session, tmp_path, env, before_each=lambda seen: archive_has(archive, seen))
        archive.interrupt(signal.SIGINT)
        result = archive.finish()
    assert result.code == 0
    assert re.fullmatch(r"stored 'Lunch on Friday', sent at \d\d:\d\d UTC\n", result.out)
    with Program(["venv/bin/python", "mail.py", "find", "Lunch"], cwd=tmp_path, env=env) as nobody:
        assert "NoRespondersError" in nobody.finish().err
    with Program(["venv/bin/python", "mail.py"], cwd=tmp_path, env=env) as usage:
        assert usage.finish().out.startswith("usage: ")


def test_the_test_of_the_readme(tmp_path: Path) -> None:
    for path in FIRST_STEPS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_archive.py"]
    with Program(command, cwd=tmp_path) as program:
        result = program.finish()
    assert result.code == 0, result.out + result.err
    assert "1 passed" in result.out


def test_the_tests_of_the_testing_document(tmp_path: Path) -> None:
    """They pass, as they stand there, where nothing else is; a warning is an error."""
    files = {file_of(block): block.text for block in BLOCKS["docs/testing.md"] if file_of(block)}
    assert set(files) == {"conftest.py", "shop.py", "test_shop.py"}
    for name, text in files.items():
        (tmp_path / str(name)).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    with Program(command, cwd=tmp_path) as program:
        result = program.finish()
    assert result.code == 0, result.out + result.err
    tests = len(re.findall(r"^def test_", files["test_shop.py"], re.M))
    assert f"{tests} passed" in result.out


def test_the_methods_and_fixtures_of_the_testing_document() -> None:
    told = words([row[0] for row in table("docs/testing.md", "Fixture")])
    assert told == set(fixtures.__all__)
    text = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    methods = {name for name in vars(Bus) if not name.startswith("_")} - {"close"}
    assert methods <= set(re.findall(r"`(\w+)\(", text))


def archive_has(archive: Program, seen: int) -> None:
    """A reader is slower than the archive's handler; a test must wait for it."""
    if seen:
        archive.wait_for("stored", "out")


# --- commands ---------------------------------------------------------------------------------------------------------


def session_of(block: Block) -> list[tuple[str, str]]:
    """Commands and what they print."""
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.M)
    assert not parts[0], block.name
    return list(zip(parts[1::2], parts[2::2], strict=True))


def check_session(
    block: Block, directory: Path, env: dict[str, str], before_each: Callable[[int], object] = int
) -> None:
    for seen, (command, expected) in enumerate(session_of(block)):
        before_each(seen)
        with Program(["bash", "-c", f"{{ {command}; }} 2>&1"], cwd=directory, env=env) as shell:
            assert shell.finish().out == expected, f"{block.name}: {command}"


CONSOLE = [
    (blocks[number - 1] if number and blocks[number - 1].mark == "start" else None, block)
    for blocks in ([b for b in found if b.language == "console"] for found in BLOCKS.values())
    for number, block in enumerate(blocks)
    if block.mark != "start" and "venv/bin" not in block.text
]


@pytest.mark.parametrize(("started", "block"), CONSOLE, ids=[block.name for _, block in CONSOLE])
def test_commands_in_the_documents(started: Block | None, block: Block, tmp_path: Path, server: EventServer) -> None:
    """They print what stands there, on standard output and error together."""
    env = {**make_commands(tmp_path), "EVBUS_URL": server.address}
    if started is None:
        check_session(block, tmp_path, env)
        return
    ((command, expected),) = session_of(started)
    with Program(["bash", "-c", f"exec {command}"], cwd=tmp_path, env=env) as running:
        running.wait_for("subscribed|answering")
        check_session(block, tmp_path, env)
        assert running.finish()[:2] == (0, expected), started.name


def test_the_script_of_the_cli_document(tmp_path: Path, server: EventServer) -> None:
    env = {**make_commands(tmp_path), "EVBUS_URL": server.address}
    (block,) = [block for block in BLOCKS["docs/cli.md"] if block.language == "bash"]
    with Program(["bash", "-c", block.text], cwd=tmp_path, env=env) as script:
        assert script.finish().out == "nobody is there\n"
    with evbus.connect(server.address) as client:
        client.on_query("settings.get")(lambda message: "blue")
        with Program(["bash", "-c", block.text], cwd=tmp_path, env=env) as script:
            assert script.finish().out == "colour: blue\n"


# --- examples ---------------------------------------------------------------------------------------------------------

OUTPUT = {
    "embedded_server.py": "reading.roof: 21.5 degrees\nreading.cellar: 12.0 degrees\n2 messages delivered\n",
    "ask_everybody.py": "load 3\nno load: the responder on 'worker.load' failed with code 503: out of order\n",
    "lasting_publisher.py": "got 1\nmissed: None reconnect\ngot 2\n",
    "work_group.py": "worker 1 did [0, 2, 4]\nworker 2 did [1, 3, 5]\nthe boss saw [0, 1, 2, 3, 4, 5]\n",
    "query_outcomes.py": (
        "6 / 3 = 2.0\nroot of 16 = 4.0\nthe responder says no: 422 no real root of a negative number\n"
        "no answer within 0.1 s\nnobody answers maths.divide\n"
    ),
}


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_examples(example: str, tmp_path: Path) -> None:
    with Program([sys.executable, str(ROOT / "examples" / example)], cwd=tmp_path) as program:
        result = program.finish()
    assert result == (0, OUTPUT[example], "")


def test_the_index_of_the_examples_is_complete() -> None:
    listed = set(re.findall(r"\]\(([\w./]+)\)", (ROOT / "examples/README.md").read_text(encoding="utf-8")))
    there = {path.name for path in (ROOT / "examples").iterdir() if path.name not in ("README.md", "__pycache__")}
    assert listed == there


# --- what stands in tables --------------------------------------------------------------------------------------------


def table(document: str, header: str) -> list[list[str]]:
    """The cells of the table with this header."""
    text = (ROOT / document).read_text(encoding="utf-8")
    start = text.index(f"| {header} |")
    rows = text[start:].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def words(cells: list[str]) -> set[str]:
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_the_limits_of_the_server_document() -> None:
    rows = table("docs/server.md", "Option")
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    options = {action.dest: action.option_strings[0] for action in parser._actions}
    limits = Limits()
    named = {field.name for field in fields(Limits)} & set(options)
    assert words([row[1] for row in rows]) == named
    for row in rows:
        for option, field in zip(re.findall(r"`([^`]+)`", row[0]), re.findall(r"`([^`]+)`", row[1]), strict=True):
            assert options[field] == option
        numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", row[2])]
        for field, number in zip(re.findall(r"`([^`]+)`", row[1]), numbers, strict=False):
            value = getattr(limits, field)
            assert number == (value >> 20 if field.endswith("_bytes") else value), row


def test_the_statistics_of_the_server_document(server: EventServer) -> None:
    assert words([row[0] for row in table("docs/server.md", "Key")]) == set(server.stats())


def test_the_close_reasons_of_the_server_document() -> None:
    told = words([row[0] for row in table("docs/server.md", "Reason")])
    # Nothing asks for credentials yet.
    assert told == {reason.name.lower() for reason in CloseReason} - {"auth_failed"}


def test_the_commands_of_the_cli_document() -> None:
    rows = table("docs/cli.md", "Command")
    assert [row[0].split()[1].rstrip("`") for row in rows] == list(COMMANDS)


def test_the_exit_codes_of_the_cli_document() -> None:
    told = {int(code) for row in table("docs/cli.md", "Code") for code in row[0].split(",")}
    assert told == {130, *(value for name, value in vars(common).items() if name.startswith("EXIT_"))}
    assert evbus.cli.__doc__ is not None
    assert {int(code) for code in re.findall(r"^    (\d+) ", evbus.cli.__doc__, re.M)} == told


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_errors_of_the_documents_exist(document: Path) -> None:
    for name in set(re.findall(r"`(\w+Error)`", document.read_text(encoding="utf-8"))):
        assert hasattr(evbus, name) or hasattr(builtins, name), name


def test_the_errors_table_of_the_guide_is_complete() -> None:
    """All that a program can catch; the abstract ones stand in the tree only."""
    told = words([row[0] for row in table("docs/guide.md", "Error")])
    concrete = {name for name in evbus.__all__ if name.endswith("Error")}
    assert concrete - told == ABSTRACT_ERRORS


def test_the_index_of_the_guide_is_complete() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)[)#]", (ROOT / "docs/guide.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"guide.md"}


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_blocks_are_closed(document: Path) -> None:
    assert document.read_text(encoding="utf-8").count("\n```") % 2 == 0
