"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import EVBUS, Program, Result, wait_until

import evbus
from evbus import EventServer, Message
from evbus.cli import COMMANDS, main
from evbus.cli import sub as sub_command
from evbus.cli.ending import Ending
from evbus.cli.show import Printer, iso_time, record
from evbus.cli.values import duration, size
from evbus.wire import Codec


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The commands run in this process change what belongs to a process."""
    monkeypatch.delenv("EVBUS_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logger = logging.getLogger("evbus")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    for number, handler in signals.items():
        signal.signal(number, handler)


Run = Callable[..., Result]


@pytest.fixture
def run(server: EventServer, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, with EVBUS_URL as the server's address."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setenv("EVBUS_URL", server.address)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfdbinary.readouterr()
        return Result(code, out.decode(), err.decode())

    return run


@pytest.fixture
def start(server: EventServer, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts a command as a process of its own; all are gone when the test ends."""
    programs: list[Program] = []

    def start(*arguments: str, **options: Any) -> Program:
        env = {"EVBUS_URL": server.address, **options.pop("env", {})}
        programs.append(Program([*EVBUS, *arguments], cwd=tmp_path, env=env, **options))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


@pytest.fixture
def client(server: EventServer) -> Iterator[evbus.EventClient]:
    with evbus.connect(server.address) as connected:
        yield connected


def one_line(err: str) -> str:
    """The only line of standard error."""
    assert err.startswith("evbus: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def free_port() -> int:
    """A port that nobody listens on right now. Only for tests of what happens then."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- the program itself -----------------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("version") == Result(0, f"evbus {evbus.__version__}\n", "")
    assert run("--version") == run("version")
    assert json.loads(run("version", "--json").out)["evbus"] == evbus.__version__


def test_python_m_evbus_is_evbus(start: Callable[..., Program]) -> None:
    assert start("version").finish() == Result(0, f"evbus {evbus.__version__}\n", "")


def test_the_overview_lists_every_command(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert not shown.err
    assert re.findall(r"^  (\w+) ", shown.out, re.M) == list(COMMANDS)
    assert run() == Result(2, "", shown.out)
    assert run("help", "pub").out == run("pub", "--help").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pbu"], "there is no command 'pbu'; did you mean 'pub'?"),
        (["xxxxx"], "the commands are serve, pub, sub,"),
        (["-s", "localhost", "ping"], "the command comes first: evbus COMMAND -s"),
        (["pub"], "required: SUBJECT; see `evbus pub --help`"),
        (["ping", "--count", "0"], "'0' is no count"),
        (["ping", "--coun", "1"], "--coun"),
        (["sub", "x", "--timeout", "soon"], "'soon' is no duration"),
        (["sub", "x", "--raw", "--json"], "not allowed with"),
        (["pub", "x", "y", "--header", "z"], "write KEY=VALUE"),
        (["pub", "x", "y", "--header", "a=1", "--header", "a=2"], "given twice"),
        (["pub", "x", "y", "--file", "z"], "given twice"),
        (["pub", "x", "--lines", "--count", "2"], "leave out --count"),
        (["pub", "x", "y", "--lines"], "leave out BODY"),
        (["pub", "x", "{", "--as", "json"], "not JSON"),
        (["pub", "x", "--as", "msgpack"], "needs a body"),
        (["pub", "a..b", "y"], "empty token"),
        (["pub", "a.*", "y"], "wildcards are for subscriptions only"),
        (["reply", "x", "y", "--echo"], "give one of"),
        (["reply", "x", "--command", "'"], "No closing quotation"),
        (["reply", "x", "--command", " "], "is empty"),
        (["ping", "-s", "http://127.0.0.1:1"], "must begin with evbus://"),
        (["ping", "-s", "127.0.0.1:99999"], "url"),
        (["serve", "--port", "99999"], "'99999' is no port"),
        (["serve", "--max-payload", "0"], "'0' is no size"),
        (["serve", "--max-payload", "unlimited"], "--max-payload: cannot be UNLIMITED; nothing was started"),
        (["serve", "--max-payload", "1GiB"], "--max-payload: must be at most"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], "--allow-anonymous-network"),
        (["demo", "--mails", "nowhere.json"], "cannot read 'nowhere.json'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert not result.out
    assert words in one_line(result.err)


def test_what_is_read_from_a_pipe_is_checked_too(run: Run) -> None:
    assert "not UTF-8 text (byte 1)" in one_line(run("pub", "x", "-", "--as", "text", stdin=b"a\xff").err)
    result = run("pub", "x", "--lines", stdin=b"good\nb\xffd\n")
    assert result.code == 2
    assert "line 2: the body is not UTF-8" in one_line(result.err)


def test_nobody_listens(run: Run) -> None:
    for command in (["ping"], ["pub", "x", "y"], ["query", "x"], ["sub", "x"], ["reply", "x", "y"]):
        result = run(*command, "-s", f"127.0.0.1:{free_port()}")
        assert result.code == 1
        assert not result.out
        assert "connection refused" in one_line(result.err)
        assert "`evbus serve` starts one" in result.err


def test_something_else_listens(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        result = run("ping", "-s", f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert result.code == 1
    assert "is not an event server" in one_line(result.err)


def test_the_server_option_goes_before_the_environment(server: EventServer, run: Run) -> None:
    url = f"evbus://{server.address}"
    assert run("pub", "x", "y", "--server", url).code == 0
    assert run("pub", "x", "y", "-s", server.address).code == 0
    assert run("pub", "x", "y", "-s", f"127.0.0.1:{free_port()}").code == 1


def test_verbose_tells_about_the_connection(run: Run) -> None:
    assert "evbus: connected to" in run("pub", "x", "y", "-v").err


def test_standard_output_that_cannot_be_written(start: Callable[..., Program]) -> None:
    """No space left, as on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    shell = Program(["sh", "-c", f"exec {shlex.join([*EVBUS, 'version'])} > /dev/full"], cwd=Path.cwd())
    with shell:
        result = shell.finish()
    assert result.code == 1
    assert "cannot write to standard output: No space left" in one_line(result.err)


def test_closed_standard_streams() -> None:
    for redirection, code in ((">&-", 1), ("2>&-", 0), (">&- 2>&-", 1)):
        with Program(["sh", "-c", f"exec {shlex.join([*EVBUS, 'version'])} {redirection}"], cwd=Path.cwd()) as shell:
            result = shell.finish()
        assert result.code == code
        assert "Traceback" not in result.err


@pytest.mark.parametrize("command", [["version"], ["--help"], ["pub", "--help"]])
def test_start_up_is_lazy(command: list[str], tmp_path: Path) -> None:
    """Help and version need neither the client, nor the server, nor any extension."""
    interesting = ("evbus", "msgspec", "subprocess", "socket")
    code = f"""
import sys
from evbus.cli import main
try:
    main({command!r})
except SystemExit:
    pass
print(*(name for name in sys.modules if name.partition(".")[0] in {interesting!r}), file=sys.stderr)
"""
    with Program([sys.executable, "-c", code], cwd=tmp_path) as program:
        result = program.finish()
    loaded = set(result.err.split())
    assert "evbus.cli" in loaded
    assert not {"evbus.client", "evbus.server", "evbus._frame", "msgspec", "subprocess", "socket"} & loaded


# --- texts as values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("65536", 65536),
        ("8MiB", 8 << 20),
        ("8M", 8 << 20),
        ("8 MB", 8_000_000),
        ("1.5KiB", 1536),
        ("2g", 2 << 30),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "8QiB", "MiB", "1e3", "0x10", "inf", "nan", "١"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(Exception, match="is no size"):
        size(text)


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("0.5", 0.5), ("250ms", 0.25), ("2m", 120), ("1h", 3600), ("3 s", 3)]
)
def test_durations(text: str, value: float) -> None:
    assert duration(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1d", "inf", "nan", "soon"])
def test_no_durations(text: str) -> None:
    with pytest.raises(Exception, match="is no duration"):
        duration(text)


def test_times_in_output() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00.000Z"
    assert iso_time(1_760_000_000.1236) == "2025-10-09T08:53:20.124Z"
    assert iso_time(1e30) == f"{1e30:.3f}"


@pytest.mark.parametrize(
    ("codec", "data", "expected"),
    [
        (Codec.TEXT, "grün".encode(), '"data":"grün"'),
        (Codec.BYTES, b"plain", '"data":"plain"'),
        (Codec.BYTES, b"\xff\x00", '"data_base64":"/wA="'),
        (Codec.UNKNOWN, b"", '"data":""'),
        (Codec.JSON, b'{ "a" : 1.50 }', '"data":{"a":1.50}'),
        (Codec.JSON, b"{broken", '"data":"{broken"'),
        (Codec.MSGPACK, b"\x93\x01\xc0\xa1x", '"data":[1,null,"x"]'),
        (Codec.MSGPACK, b"\xc1", '"data_base64":"wQ=="'),
        (Codec.MSGPACK, b"\xd4\x07\x00", '"data_base64":"1AcA"'),  # an extension type, which JSON does not have
        (99, b"x", '"codec":"codec-99"'),
    ],
)
def test_a_message_as_json(codec: int, data: bytes, expected: str) -> None:
    import msgspec

    line = msgspec.json.encode(record(Message("s", data, codec=codec, headers={"k": "v"}, sender=7))).decode()
    assert expected in line
    assert json.loads(line)["headers"] == {"k": "v"}


# --- pub --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["hello"], b"", "hello"),
        ([], b"not read", b""),
        (["-"], b"from\x00stdin\n", b"from\x00stdin\n"),
        (["-", "--as", "text"], b"text\n", "text\n"),
        (["@body.bin"], b"", b"\xff\x01"),
        (["--file", "body.bin"], b"", b"\xff\x01"),
        (["@body.bin", "--literal"], b"", "@body.bin"),
        (["-", "--literal"], b"", "-"),
        (["hello", "--as", "bytes"], b"", b"hello"),
        (["[1, 2.5, null]", "--as", "json"], b"", [1, 2.5, None]),
        (['{"a": "b"}', "--as", "msgpack"], b"", {"a": "b"}),
        (["--", "-5"], b"", "-5"),
        (["--count", "1", "after the option"], b"", "after the option"),
    ],
)
def test_pub_bodies(
    run: Run, client: evbus.EventClient, tmp_path: Path, arguments: list[str], stdin: bytes, expected: object
) -> None:
    (tmp_path / "body.bin").write_bytes(b"\xff\x01")
    with client.subscribe("body") as messages:
        assert run("pub", "body", *arguments, stdin=stdin) == Result(0, "", "")
        value = messages.next(5).decode()
    assert value == expected
    assert type(value) is type(expected)


def test_pub_sends_what_is_said_as_json_as_json(run: Run, client: evbus.EventClient) -> None:
    with client.subscribe("body") as messages:
        run("pub", "body", '{"a": 1}', "--as", "json", "--header", "k=v=w", "--header", "empty=")
        message = messages.next(5)
    assert (message.codec, message.data) == (Codec.JSON, b'{"a":1}')
    assert message.headers == {"k": "v=w", "empty": ""}


def test_pub_an_argument_that_is_no_text(start: Callable[..., Program], client: evbus.EventClient) -> None:
    with client.subscribe("body") as messages:
        assert start("pub", "body", os.fsdecode(b"a\xff")).finish().code == 0
        assert messages.next(5).decode() == b"a\xff"


def test_pub_often(run: Run, client: evbus.EventClient) -> None:
    with client.subscribe("body") as messages:
        result = run("pub", "body", "x", "--count", "3", "--interval", "1ms", "--json")
        assert [messages.next(5).decode() for _ in range(3)] == ["x"] * 3
    assert result == Result(0, '{"subject":"body","published":3}\n', "")


def test_pub_lines(run: Run, client: evbus.EventClient, tmp_path: Path) -> None:
    with client.subscribe("body") as messages:
        result = run("pub", "body", "--lines", "--json", stdin=b"one\n\nthree\r\nno end")
        assert [messages.next(5).decode() for _ in range(4)] == ["one", "", "three\r", "no end"]
        (tmp_path / "lines").write_bytes(b"1\n[2]\n")
        assert run("pub", "body", "--lines", "--file", "lines", "--as", "json").code == 0
        assert [messages.next(5).decode() for _ in range(2)] == [1, [2]]
    assert json.loads(result.out)["published"] == 4
    assert run("pub", "body", "--lines", "--json", stdin=b"").out == '{"subject":"body","published":0}\n'


def test_pub_lines_are_published_as_they_come(start: Callable[..., Program], client: evbus.EventClient) -> None:
    with client.subscribe("body") as messages:
        program = start("pub", "body", "--lines", stdin=None)
        assert program.process.stdin is not None
        for line in (b"one\n", b"two\n"):
            program.process.stdin.write(line)
            program.process.stdin.flush()
            assert messages.next(20).data == line.strip()
        program.process.stdin.close()
        assert program.finish() == Result(0, "", "")


def test_pub_confirm(run: Run, client: evbus.EventClient) -> None:
    with client.subscribe("body"):
        assert run("pub", "body", "x", "--confirm").out == "receivers: 1\n"
        line = run("pub", "body", "x", "--confirm", "--json").out
        assert json.loads(line) == {"subject": "body", "receivers": 1, "dropped": 0}
    assert run("pub", "body", "x", "--confirm").out == "receivers: 0\n"


def test_pub_too_large(run: Run) -> None:
    result = run("pub", "body", "-", stdin=bytes(2 << 20))
    assert result.code == 1
    assert "2,097,152 bytes, limit 1,048,576" in one_line(result.err)


def test_pub_unreadable_file(run: Run, tmp_path: Path) -> None:
    assert "--literal" in one_line(run("pub", "body", "@nowhere").err)
    assert run("pub", "body", "--file", str(tmp_path)).code == 1
    assert run("pub", "body", "--lines", "--file", "nowhere").code == 1


# --- sub --------------------------------------------------------------------------------------------------------------


def test_sub_prints_messages_as_they_come(start: Callable[..., Program], client: evbus.EventClient) -> None:
    program = start("sub", "news", "--count", "3")
    program.wait_for("^evbus: subscribed to news\n")
    client.publish("news", "one")
    program.wait_for("^one\n$", "out")
    client.publish("news", {"two": 2})
    client.publish("news", b"\x1b[1mthree")
    client.publish("news", "four")
    assert program.finish() == Result(0, 'one\n{"two":2}\n\x1b[1mthree\n', "evbus: subscribed to news\n")


def test_sub_several_with_times_and_subjects(start: Callable[..., Program], client: evbus.EventClient) -> None:
    program = start("sub", "news.*", "weather", "-t", "--count", "2")
    program.wait_for("subscribed to news.*, weather")
    client.publish("news.sport", "a draw")
    program.wait_for("draw", "out")
    client.publish("weather", "rain")
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(f"{time}\tnews.sport\ta draw\n{time}\tweather\train\n", program.finish().out)


def test_sub_json_and_raw(start: Callable[..., Program], client: evbus.EventClient) -> None:
    as_json = start("sub", ">", "--json", "--count", "1")
    raw = start("sub", "news", "--raw", "--count", "2")
    as_json.wait_for("subscribed")
    raw.wait_for("subscribed")
    client.publish("news", [1], headers={"k": "v"})
    found = json.loads(as_json.finish().out)
    assert (found["subject"], found["data"], found["codec"], found["headers"]) == ("news", [1], "msgpack", {"k": "v"})
    assert found["sender"] > 0
    assert set(found) == {"subject", "data", "codec", "headers", "time", "sender"}
    client.publish("news", "x\n")
    assert os.fsencode(raw.finish().out) == b"\x91\x01x\n"


def test_sub_in_a_group(start: Callable[..., Program], client: evbus.EventClient) -> None:
    members = [start("sub", "job", "--group", "g", "--count", "1") for _ in range(2)]
    for member in members:
        member.wait_for("subscribed")
    for number in range(2):
        client.publish("job", str(number))
    assert sorted(member.finish().out for member in members) == ["0\n", "1\n"]


def test_sub_timeout(run: Run) -> None:
    result = run("sub", "silence", "--timeout", "1ms")
    assert result == Result(4, "", "evbus: subscribed to silence\n")


@pytest.mark.parametrize(("wanted", "code"), [(None, 0), (1, 0), (2, 4)])
def test_sub_timeout_after_a_message(capfdbinary: pytest.CaptureFixture[bytes], wanted: int | None, code: int) -> None:
    with Ending[Any]() as ending:
        tally = sub_command._Tally(Printer(as_json=False), wanted, ending, reconnects=True)
        tally.on_message(Message("news", b"one"))
        tally.wait(0.001)
        tally.on_message(Message("news", b"too late"))
    assert capfdbinary.readouterr().out == b"one\n"
    assert tally.exit_code() == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", [["sub", "x"], ["reply", "x", "y"]])
def test_signals_end_quietly(start: Callable[..., Program], command: list[str], number: int, code: int) -> None:
    program = start(*command)
    program.wait_for("subscribed|answering")
    program.interrupt(number)
    result = program.finish()
    assert result.code == code
    assert not result.out
    one_line(result.err)


def test_a_reader_that_goes_away_ends_sub_quietly(
    server: EventServer, client: evbus.EventClient, tmp_path: Path
) -> None:
    pipeline = f"{shlex.join([*EVBUS, 'sub', 'news'])} | head -1"
    with Program(["sh", "-c", pipeline], cwd=tmp_path, env={"EVBUS_URL": server.address}) as shell:
        shell.wait_for("subscribed")
        client.publish("news", "two")
        shell.wait_for("two", "out")

        def ended() -> bool:
            client.publish("news", "three")  # a writer only notices when it writes
            return shell.process.poll() is not None

        wait_until(ended, "the end of the pipeline")
        assert shell.finish() == Result(0, "two\n", "evbus: subscribed to news\n")


def test_the_exit_code_of_a_broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run([*EVBUS, "version"], stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_sub_ends_when_the_server_does_if_it_is_told_to(tmp_path: Path) -> None:
    command = [*EVBUS, "sub", "x", "--no-reconnect", "-s"]
    with EventServer(port=0) as own, Program([*command, own.address], cwd=tmp_path) as program:
        program.wait_for("subscribed")
        own.stop()
        result = program.finish()
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith("evbus: lost the connection")
    assert result.err.count("\n") == 2


def test_sub_outlives_its_server(tmp_path: Path) -> None:
    server = EventServer(port=0).start()
    address = server.address
    with Program([*EVBUS, "sub", "x", "--count", "1", "-s", address], cwd=tmp_path) as program:
        program.wait_for("subscribed")
        server.stop(0)
        program.wait_for("reconnecting")
        host, _, port = address.rpartition(":")
        with EventServer(host, int(port)):
            program.wait_for("connected again; what was published to x meanwhile is missing")
            with evbus.connect(address) as client:
                client.publish("x", "after")
            result = program.finish()
    assert (result.code, result.out) == (0, "after\n")


def test_sub_waits_for_its_server(tmp_path: Path) -> None:
    with EventServer(port=0) as server:
        address, port = server.address, server.port
    command = [*EVBUS, "sub", "x", "--wait", "30", "--count", "1", "-s", address]
    with Program(command, cwd=tmp_path) as program, EventServer(port=port):
        program.wait_for("subscribed")
        with evbus.connect(address) as client:
            client.publish("x", "there")
        assert program.finish().out == "there\n"
    with Program([*EVBUS, "sub", "x", "--wait", "0.1", "-s", address], cwd=tmp_path) as program:
        assert program.finish().code == 1


def test_control_characters_on_a_terminal_are_shown(client: evbus.EventClient, server: EventServer) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*EVBUS, "sub", "news", "--count", "1", "-s", server.address], stdout=theirs, stderr=subprocess.PIPE
        )
        with process:
            assert process.stderr is not None
            assert b"subscribed" in process.stderr.readline()
            client.publish("news", "\x1b[31mred\x07\tgr\u00fcn")
            assert os.read(ours, 1000) == "\\x1b[31mred\\x07\tgrün\r\n".encode()
            assert process.wait(30) == 0
    finally:
        os.close(ours)
        os.close(theirs)


# --- query and reply --------------------------------------------------------------------------------------------------


def test_query_outcomes(run: Run, client: evbus.EventClient) -> None:
    release = threading.Event()

    @client.on_query("q.>", concurrency=2)
    def answer(message: Message) -> object:
        if message.subject == "q.slow":
            release.wait(30)
        if message.subject == "q.bad":
            message.fail(7, "no\nway")
        return message.decode()

    assert run("query", "q.echo", "hello") == Result(0, "hello\n", "")
    assert run("query", "q.echo", "[1]", "--as", "msgpack").out == "[1]\n"
    assert run("query", "q.echo", "a\nb", "--raw").out == "a\nb"
    found = json.loads(run("query", "q.echo", "hello", "--json").out)
    assert (found["subject"], found["data"]) == ("q.echo", "hello")

    nobody = run("query", "nobody.there", "x")
    assert (nobody.code, nobody.out) == (5, "")
    assert "nobody answers queries on 'nobody.there'" in one_line(nobody.err)
    slow = run("query", "q.slow", "x", "--timeout", "50ms")
    assert (slow.code, slow.out) == (4, "")
    assert "within 0.05 s" in one_line(slow.err)
    release.set()
    bad = run("query", "q.bad", "x")
    assert (bad.code, bad.out) == (6, "")
    assert "code 7: no way" in one_line(bad.err)


def test_reply_with_a_body(start: Callable[..., Program], client: evbus.EventClient) -> None:
    program = start("reply", "settings", '{"colour": "blue"}', "--as", "json", "--count", "2", "--header", "k=v")
    program.wait_for("^evbus: answering settings\n")
    answer = client.query("settings", "which?", Message, timeout=20)
    assert (answer.decode(), answer.headers) == ({"colour": "blue"}, {"k": "v"})
    client.query("settings", 5)
    assert program.finish() == Result(0, "which?\n5\n", "evbus: answering settings\n")


def test_reply_echo_of_a_pattern(start: Callable[..., Program], client: evbus.EventClient) -> None:
    program = start("reply", "echo.*", "--echo", "--count", "3")
    program.wait_for("answering")
    assert client.query("echo.text", "text", timeout=20) == "text"
    assert client.query("echo.value", {"a": 1}) == {"a": 1}
    assert client.query("echo.bytes", b"\xff") == b"\xff"
    assert program.finish().out.splitlines()[:2] == ["echo.text\ttext", 'echo.value\t{"a":1}']


def test_reply_through_a_command(start: Callable[..., Program], client: evbus.EventClient) -> None:
    program = start("reply", "upper", "--command", "sh -c 'echo $EVBUS_SUBJECT; tr a-z A-Z'", "--count", "1")
    program.wait_for("answering")
    assert client.query("upper", "make me tall; $(rm)", bytes, timeout=20) == b"upper\nMAKE ME TALL; $(RM)"
    assert program.finish().code == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sh -c 'echo one >&2; echo two >&2; exit 3'", "sh ended with 3: one two"),
        ("/nowhere/at/all", "cannot be run: No such file"),
        ("sleep 60", "took longer than 0.05 s"),
    ],
)
def test_reply_through_a_command_that_fails(
    start: Callable[..., Program], client: evbus.EventClient, command: str, words: str
) -> None:
    patience = "50ms" if command.startswith("sleep") else "30"
    program = start("reply", "q", "--command", command, "--command-timeout", patience, "--count", "1")
    program.wait_for("answering")
    with pytest.raises(evbus.RemoteError) as caught:
        client.query("q", "x", timeout=20)
    assert words in caught.value.text
    result = program.finish()
    assert result.code == 0
    assert words in result.err


def test_reply_timeout(run: Run) -> None:
    assert run("reply", "silence", "x", "--timeout", "1ms").code == 4


# --- ping -------------------------------------------------------------------------------------------------------------


def test_ping(server: EventServer, run: Run) -> None:
    result = run("ping", "--count", "3", "--interval", "1ms")
    assert result.code == 0
    lines = result.out.splitlines()
    address = re.escape(server.address)
    assert all(re.fullmatch(rf"{address}: seq=[123] time=\d+\.\d{{3}} ms", line) for line in lines[:3])
    assert re.fullmatch(r"3 round trips, min/avg/max = [\d.]+/[\d.]+/[\d.]+ ms", lines[3])
    objects = [json.loads(line) for line in run("ping", "--count", "2", "--interval", "0", "--json").out.splitlines()]
    assert [found.get("seq") for found in objects] == [1, 2, None]
    assert objects[2]["count"] == 2
    assert objects[2]["rtt_ms"]["min"] <= objects[2]["rtt_ms"]["avg"] <= objects[2]["rtt_ms"]["max"]


def test_a_reader_that_stops_does_not_keep_sub_from_ending(
    server: EventServer, client: evbus.EventClient, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb") as out:
        process = subprocess.Popen(
            [*EVBUS, "sub", "news", "-s", server.address], stdout=out, stderr=subprocess.PIPE, cwd=tmp_path
        )
        try:
            assert process.stderr is not None
            assert b"subscribed" in process.stderr.readline()
            for _ in range(10):
                client.publish("news", bytes(100_000))  # more than any pipe holds
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr.read() == b""
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("command", ["--help", "pub --help", "version"])
def test_help_for_a_reader_that_went_away(command: str, tmp_path: Path) -> None:
    with Program(
        ["bash", "-c", f"{shlex.join(EVBUS)} {command} | true; echo ${{PIPESTATUS[0]}}"], cwd=tmp_path
    ) as shell:
        result = shell.finish()
    assert result.out in ("0\n", "141\n")
    assert not result.err
