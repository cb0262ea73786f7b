"""`evbus serve` as a process, and the examples of all commands' help texts."""

from __future__ import annotations

import importlib
import json
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers_cli import EVBUS, Program, Result, make_commands

import evbus
from evbus import EventServer, Limits, Message
from evbus.cli import COMMANDS
from evbus.cli import serve as serve_command
from evbus.cli.common import Parser
from evbus.limits import UNLIMITED


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts a command as a process of its own; all are gone when the test ends."""
    programs: list[Program] = []

    def start(*arguments: str, **options: Any) -> Program:
        programs.append(Program([*EVBUS, *arguments], cwd=tmp_path, **options))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def client(server: EventServer) -> Iterator[evbus.EventClient]:
    with evbus.connect(server.address) as connected:
        yield connected


def one_line(err: str) -> str:
    """The only line of standard error."""
    assert err.startswith("evbus: ")
    assert err.count("\n") == 1
    return err


def ready(program: Program) -> str:
    """The address of a server that listens."""
    return program.wait_for(r"listening on (127\.0\.0\.1:\d+)")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_and_stop(start: Callable[..., Program], number: int) -> None:
    program = start("serve", "--port", "0")
    address = ready(program)
    with evbus.connect(address) as connected:
        connected.publish("x", "y")
        connected.flush()
    program.interrupt(number)
    result = program.finish()
    assert result.code == 0
    assert not result.out
    assert "1 connections served, 0 messages delivered" in result.err.splitlines()[-1]


def test_serve_on_a_unix_socket_too(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start("serve", "--port", "0", "--unix", "bus")
    program.wait_for("listening on 127.0.0.1")
    with evbus.connect(f"unix://{tmp_path}/bus") as client:
        assert client.rtt() > 0
    assert start("serve", "--port", "0", "--unix", "bus").finish().code != 0  # the other one is alive


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_drain(start: Callable[..., Program], number: int, code: int) -> None:
    program = start("serve", "--port", "0", "--drain", "1h")
    address = ready(program)
    asked, release = threading.Event(), threading.Event()
    with evbus.connect(address) as responder, evbus.connect(address) as asker:

        @responder.on_query("q")
        def never(message: Message) -> None:
            asked.set()
            release.wait(60)

        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                asker.query("q", timeout=60)
            except evbus.EvbusError as error:
                outcome.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(30)
        program.interrupt(signal.SIGTERM)
        program.wait_for("stopping: 2 connections")
        program.interrupt(number)
        result = program.finish()
        thread.join()
        release.set()
    assert result.code == code
    assert isinstance(outcome[0], ConnectionError)


def test_the_ready_line_comes_at_every_log_level(start: Callable[..., Program]) -> None:
    program = start("serve", "--port", "0", "--log-level", "error")
    address = ready(program)
    program.interrupt(signal.SIGTERM)
    assert program.finish() == Result(0, "", f"evbus: listening on {address}\n")


def test_serve_logs_statistics(start: Callable[..., Program]) -> None:
    program = start("serve", "--port", "0", "--stats", "20ms")
    found = json.loads(program.wait_for(r"stats (\{.*\})\n")[1])
    assert found["connections"] == 0
    program.interrupt(signal.SIGTERM)
    assert program.finish().code == 0


def test_serve_on_a_port_in_use(server: EventServer, start: Callable[..., Program]) -> None:
    result = start("serve", "--port", str(server.port)).finish()
    assert result.code == 1
    assert f"cannot listen on {server.address}: the port is in use" in one_line(result.err)


def test_serve_raises_the_limit_of_descriptors(start: Callable[..., Program]) -> None:
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 2048)
    program = start("serve", "--port", "0", preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)))
    ready(program)
    if hasattr(psutil.Process, "rlimit"):
        assert psutil.Process(program.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)
    program.interrupt(signal.SIGTERM)
    program.finish()


def limits_of(*arguments: str) -> Limits:
    parser = Parser(prog="evbus serve", description="", epilog="")
    serve_command.add_arguments(parser)
    return serve_command._limits(parser.parse_args(arguments))


def test_limits_of_serve() -> None:
    assert limits_of() == Limits()
    assert limits_of("--max-payload", "8MiB", "--max-connections", "unlimited", "--write-timeout", "500ms") == Limits(
        payload_bytes=8 << 20, connections=UNLIMITED, write_timeout_s=0.5
    )
    # What stands below a lowered limit follows.
    assert limits_of("--max-pending", "2MiB") == Limits(pending_hard_bytes=2 << 20, pending_soft_bytes=2 << 20)
    assert limits_of("--query-timeout", "5") == Limits(query_s=5.0, query_default_s=5.0)
    assert limits_of("--max-pending", "unlimited").pending_soft_bytes == Limits().pending_soft_bytes


def test_a_limit_of_serve_takes_effect(start: Callable[..., Program]) -> None:
    program = start("serve", "--port", "0", "--max-payload", "10")
    with evbus.connect(ready(program)) as connected, pytest.raises(evbus.PayloadTooLargeError):
        connected.publish("x", "eleven byte")
    program.interrupt(signal.SIGTERM)
    program.finish()


# --- the examples of the help texts -----------------------------------------------------------------------------------

EXAMPLES = [
    (name, line.strip())
    for name in COMMANDS
    for line in importlib.import_module(f"evbus.cli.{name}").EXAMPLES.splitlines()
    if line.startswith("  ") and "evbus " in line
]


def test_every_command_has_examples() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_of_the_help_texts(
    name: str, line: str, server: EventServer, client: evbus.EventClient, tmp_path: Path
) -> None:
    env = {**make_commands(tmp_path), "EVBUS_URL": server.address}
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8photo")
    (tmp_path / "answer.txt").write_text("forty-two")
    mail = {"subject": "Lunch", "content": "At noon?", "send_time": "2026-11-23T09:30:00Z"}
    (tmp_path / "my-mails.json").write_text(json.dumps([mail, mail]))
    router = "import evbus\n\nrouter = evbus.EventRouter()\nrouter.on('greetings')(print)\n"
    for module in ("archive.py", "shop/orders.py", "shop/mails.py", "src/archive.py"):
        (tmp_path / module).parent.mkdir(exist_ok=True)
        (tmp_path / module).write_text(router)
    line = line.replace("127.0.0.1:9100", server.address)
    if name == "serve":  # tests stay on the loopback and off fixed ports
        line = line.replace("--host 0.0.0.0", "--host 127.0.0.1") + " --port 0"
    if name == "query":
        client.on_query(">")(lambda message: message.data)
    if name == "bench":  # no longer than it takes to see that it works
        line = line.replace("--duration 10", "").replace("--count 100000", "").replace("2000", "20")
        if "connections" not in line:
            line = line.replace("evbus bench", "evbus bench --duration 0.2")
    # `exec` so that signals reach the command itself; where there is a pipe, it ends by itself.
    command = line if "|" in line else f"exec {line}"
    if "--compare" in line:  # with what the example before it has written
        command = f"{line.replace('--compare', '--json >')}; {command}"
    with Program(["sh", "-c", command], cwd=tmp_path, env=env) as program:
        if name == "serve":
            ready(program)
            program.interrupt(signal.SIGTERM)
        elif name == "run":
            program.wait_for("running")
            program.interrupt(signal.SIGTERM)
        elif name == "sub":
            program.wait_for("subscribed")
            for subject in ("greetings", "news.sport", "email.new", "jobs", "photos.new"):
                client.publish(subject, "hello")
            if "--count" not in line:
                program.wait_for("hello", "out")
                program.interrupt()
        elif name == "reply":
            subject = program.wait_for(r"answering (\S+)")[1].replace("*", "any")
            client.query(subject, "hello", timeout=20)
            if "--count" not in line:
                program.interrupt()
        result = program.finish()
    interrupted = name in ("sub", "reply") and "--count" not in line
    assert result.code == (130 if interrupted else 0), result
    assert "Traceback" not in result.err
