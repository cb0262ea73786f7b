"""`evbus run` as a process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import EVBUS, Program

import evbus
from evbus import EventServer

WORKER = """
import logging, time
from dataclasses import dataclass

import evbus

logging.getLogger("worker").info("imported")
router = evbus.EventRouter("work")
more = evbus.EventRouter()
empty = evbus.EventRouter()
number = 5


class Holder:
    inside = router


@dataclass
class Double(evbus.Query[int], subject="double"):
    value: int


@router.on_query("triple")
def triple(value: int) -> int:
    return 3 * value


@router.on("slow")
def slow(message: evbus.Message) -> None:
    logging.getLogger("worker").info("begun %s", message.decode())
    time.sleep(float(message.headers["seconds"]))
    logging.getLogger("worker").info("finished %s", message.decode())


@router.on("bad")
def bad(message: evbus.Message) -> None:
    raise LookupError("this one fails")


@more.on_query(Double)
def double(query: Double) -> int:
    return 2 * query.value
"""


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def start(tmp_path: Path, server: EventServer) -> Iterator[Callable[..., Program]]:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "broken.py").write_text("import worker\n\n1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_library_here\n")
    (tmp_path / "misled.py").write_text("import evbus\n\nrouter = evbus.EventRouter()\nrouter.on('a..b')\n")
    (tmp_path / "argless.py").write_text(
        "import evbus\n\nrouter = evbus.EventRouter()\n@router.on('a')\ndef f(): ...\n"
    )
    programs: list[Program] = []

    def start(*arguments: str, url: str = server.address, **options: Any) -> Program:
        env = {"EVBUS_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
        programs.append(Program([*EVBUS, "run", *arguments], cwd=tmp_path, env=env, **options))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


READY = r"evbus: running (\d+) handlers? of (.*) on (.*)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_run_until_a_signal(number: int, start: Callable[..., Program], server: EventServer) -> None:
    program = start("worker:router", "worker:more")
    assert program.wait_for(READY).groups() == ("4", "worker:router, worker:more", server.address)
    with evbus.connect(server.address) as client:
        assert client.query("work.triple", 4, int) == 12
        assert client.query("double", {"value": 4}, int) == 8
        client.publish("work.bad", "x", confirm=True)
        program.wait_for("LookupError: this one fails")
        assert client.query("work.triple", 5, int) == 15
        program.interrupt(number)
        code, out, err = program.finish()
        assert (code, out) == (0, "")
        with pytest.raises(evbus.NoRespondersError):
            client.query("work.triple", 4, int)
    assert "INFO worker: imported" in err
    assert f"INFO evbus.run: {signal.Signals(number).name}: stopping" in err
    assert err.count("Traceback") == 1


def test_what_waits_is_handled_before_the_end(start: Callable[..., Program], server: EventServer) -> None:
    program = start("worker:router")
    program.wait_for(READY)
    with evbus.connect(server.address) as client:
        for index in range(3):
            client.publish("work.slow", index, headers={"seconds": "0.2"})
        client.flush()
        program.wait_for("begun 0")
        program.interrupt(signal.SIGTERM)
        code, _, err = program.finish()
    assert code == 0
    assert all(f"finished {index}" in err for index in range(3))


def test_a_drain_that_takes_too_long(start: Callable[..., Program], server: EventServer) -> None:
    program = start("worker:router", "--drain", "200ms")
    program.wait_for(READY)
    with evbus.connect(server.address) as client:
        client.publish("work.slow", 1, headers={"seconds": "60"})
        program.wait_for("begun 1")
        program.interrupt(signal.SIGTERM)
        code, _, err = program.finish()
    assert code == 4
    assert "evbus: handlers did not finish within 0.2 s" in err


def test_another_signal_ends_it_at_once(start: Callable[..., Program], server: EventServer) -> None:
    program = start("worker:router", "--drain", "60")
    program.wait_for(READY)
    with evbus.connect(server.address) as client:
        client.publish("work.slow", 1, headers={"seconds": "60"})
        program.wait_for("begun 1")
        program.interrupt(signal.SIGTERM)
        program.wait_for("another one stops at once")
        program.interrupt(signal.SIGINT)
        assert program.finish().code == 130


def test_a_server_that_goes_away(start: Callable[..., Program], server: EventServer) -> None:
    program = start("worker:router", "--no-reconnect")
    program.wait_for(READY)
    server.stop(0)
    code, _, err = program.finish()
    assert code == 1
    assert "evbus: lost the connection" in err


def test_no_server(start: Callable[..., Program]) -> None:
    with EventServer(port=0) as gone:
        address = gone.address
    code, _, err = start("worker:router", "--log-level", "error", url=address).finish()
    assert code == 1
    assert err.startswith("evbus: ")


def test_the_log_level_does_not_silence_the_ready_line(start: Callable[..., Program]) -> None:
    program = start("worker:more", "--log-level", "error")
    assert program.wait_for(READY)[1] == "1"
    program.interrupt(signal.SIGTERM)
    code, _, err = program.finish()
    assert code == 0
    assert err.count("\n") == 1


def test_another_directory(start: Callable[..., Program], tmp_path: Path, server: EventServer) -> None:
    package = tmp_path / "src" / "shop"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "orders.py").write_text((tmp_path / "worker.py").read_text())
    program = start("shop.orders:Holder.inside", "--app-dir", "src", "-s", server.address, url="127.0.0.1:1")
    assert program.wait_for(READY)[2] == "shop.orders:Holder.inside"
    program.interrupt()
    assert program.finish().code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["worker"], 2, "'worker' is not MODULE:NAME, as in archive:router"),
        (["worker:"], 2, "is not MODULE:NAME"),
        ([":router"], 2, "is not MODULE:NAME"),
        (["worker.py:router"], 2, "there is no module 'worker.py' in"),
        (["./worker:router"], 2, "is not MODULE:NAME"),
        (["nowhere:router"], 2, "there is no module 'nowhere' in"),
        (["nowhere.deep:router"], 2, "there is no module 'nowhere' in"),
        (
            ["worker:ruoter"],
            2,
            "module 'worker' has no 'ruoter'; there is 'worker:router', 'worker:more'",
        ),
        (["needy:router"], 1, "module 'needy' needs 'no_such_library_here', which is not installed"),
        (["worker:number"], 2, "'worker:number' is a int, not an EventRouter"),
        (["worker:empty"], 2, "'worker:empty' declares no handlers"),
        (["worker:router", "--app-dir", "not-there"], 2, "--app-dir not-there: there is no such directory"),
        (["broken:router"], 1, "module 'broken' cannot be imported: ZeroDivisionError: division by zero"),
        (["misled:router"], 2, "module 'misled': invalid subject 'a..b'"),
        (["argless:router"], 2, "argless:router: f() must take one argument"),
        ([], 2, "the following arguments are required: MODULE:NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(arguments: list[str], code: int, words: str, start: Callable[..., Program]) -> None:
    result = start(*arguments, "--log-level", "error").finish()
    assert result.code == code, result
    last = result.err.splitlines()[-1]
    assert last.startswith("evbus: ")
    assert words in last
    assert result.out == ""


def test_the_traceback_of_a_broken_module(start: Callable[..., Program]) -> None:
    """It is the user's own code: what went wrong there, and where, is what they need."""
    err = start("broken:router").finish().err
    assert "broken.py" in err
    assert "1 / 0" in err
