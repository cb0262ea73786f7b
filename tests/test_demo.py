"""The demo: that it tells its story, in order, with any mails; and that it fails loudly when something is wrong."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
from helpers_cli import EVBUS, ROOT, Program, Result, wait_until

import evbus
from evbus.cli import main
from evbus.demo import mails as demo_mails
from evbus.demo.mails import EmailQuery, NewEmailCommand, default_mails, load_mails, matches, topic_of
from evbus.demo.stage import Actor, DemoError, Stage

EXAMPLES = ROOT / "examples" / "mails.json"
PACKAGED = Path(demo_mails.__file__).with_name("mails.json")


def demo(directory: Path, *arguments: str) -> Result:
    with Program([*EVBUS, "demo", *arguments], cwd=directory) as program:
        return program.finish()


def lines_of(story: str) -> list[tuple[str, str]]:
    """Who says what; "" goes on with what was said before."""
    return re.findall(r"^  (?:([\w ]+):|    ) +(.*)$", story, re.M)


def test_the_story(tmp_path: Path) -> None:
    """In an empty directory, with the default mails."""
    result = demo(tmp_path)
    assert result.code == 0, result
    assert not result.err
    said = lines_of(result.out)
    assert said[0][0] == "server"
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+", said[0][1])
    assert said[1:14] == [
        ("Anna", "I subscribe to email.new"),
        ("Ben", "I subscribe to email.new, too"),
        ("archive", "I store what comes on email.new, and answer queries on email.query"),
        ("mail service", "I am connected"),
        ("requester", "So am I"),
        ("mail service", 'new email "Release party", queued for 3 receivers'),
        ("Anna", 'I got "Release party", sent 2026-11-16 09:05 UTC'),
        ("Ben", 'I got "Release party", sent 2026-11-16 09:05 UTC'),
        ("archive", "stored, 1 in all"),
        ("mail service", 'new email "Broken coffee machine", queued for 3 receivers'),
        ("Anna", 'I got "Broken coffee machine", sent 2026-11-16 10:40 UTC'),
        ("Ben", 'I got "Broken coffee machine", sent 2026-11-16 10:40 UTC'),
        ("archive", "stored, 2 in all"),
    ]
    left = said.index(("Ben", "I unsubscribe from email.new"))
    assert ("mail service", 'new email "Tickets for Shenzhen", queued for 2 receivers') in said[left:]
    assert [words for name, words in said[left + 1 :] if name == "Ben"] == ["I have heard nothing of that", "goodbye"]
    assert ("requester", 'which emails have "Release party" in their subject?') in said
    assert ("archive", 'a query for "Release party": I have 3 emails') in said
    assert ("requester", "I got 3 emails:") in said
    assert any(re.search(r"told after [\d.]+ ms, without waiting", words) for _, words in said)
    assert ("", "nobody answers queries on 'calendar.query'") in said
    assert said[-1] == ("server", "stopped; 5 connections served, nothing dropped, nothing left undelivered")


def test_the_story_is_the_same_every_time(tmp_path: Path) -> None:
    def timeless(story: str) -> str:
        return re.sub(r"127\.0\.0\.1:\d+|[\d.]+ ms", "-", story)

    assert timeless(demo(tmp_path).out) == timeless(demo(tmp_path).out)


def test_the_mails_of_the_examples_and_of_the_package_are_the_same() -> None:
    assert EXAMPLES.read_bytes() == PACKAGED.read_bytes()


def test_a_checkout_plays_the_mails_of_its_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_mails() in (EXAMPLES, PACKAGED)
    installed = tmp_path / "site-packages" / "evbus" / "demo" / "mails.py"
    monkeypatch.setattr(demo_mails, "__file__", str(installed))
    assert default_mails() == installed.with_name("mails.json")


def test_the_readers_own_mails(tmp_path: Path) -> None:
    own = [
        {"subject": "Re: re: Grüße  aus\nDelft", "content": "x" * 500, "send_time": "2026-01-02T03:04:05+08:00"},
        {"subject": "\x1b[31mred", "content": "", "send_time": "2026-01-02T03:04:05"},
    ]
    (tmp_path / "own.json").write_text(json.dumps(own))
    result = demo(tmp_path, "--mails", "own.json")
    assert result.code == 0, result
    said = lines_of(result.out)
    assert ("Anna", 'I got "Re: re: Grüße aus Delft", sent 2026-01-01 19:04 UTC') in said
    assert ("Anna", 'I got "?[31mred", sent 2026-01-02 03:04') in said
    assert ("requester", "I got 1 email:") in said
    assert ("", "x" * 69 + "...") in said

    nothing = demo(tmp_path, "--mails", "own.json", "--find", "Zürich")
    assert nothing.code == 0
    assert ("requester", "I got no emails") in lines_of(nothing.out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("", "does not fit"),
        ("[", "does not fit"),
        ("{}", "Expected `array`, got `object`"),
        ('[{"subject": "a", "content": "b"}]', "missing required field `send_time` - at `$[0]`"),
        ('[{"subject": "a", "content": "b", "send_time": "yesterday"}]', "Invalid RFC3339 encoded datetime"),
        ("[]", "holds 0 mails; the story needs at least 2"),
        ('[{"subject": "a", "content": "b", "send_time": "2026-01-01T00:00:00Z"}]', "holds 1 mails"),
        (" " * (513 * 1024), "larger than 512 KiB"),
        ("\ud800", "cannot read"),
    ],
)
def test_a_bad_file_of_mails(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str | None, words: str) -> None:
    path = tmp_path / "own.json"
    if text == "\ud800":
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["demo", "--mails", str(path)]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("evbus: mails: ")
    assert err.count("\n") == 1
    assert words in err
    if "does not fit" in err:
        assert '[{"subject": "...", "content": "...", "send_time": "2026-11-23T09:30:00Z"}, ...]' in err


def test_what_is_looked_for() -> None:
    mails = load_mails(PACKAGED)
    assert topic_of(mails) == "Release party"
    assert sum(matches(mail, EmailQuery("RELEASE")) for mail in mails) == 3
    blank = NewEmailCommand(" ", "", mails[0].send_time)
    answer = NewEmailCommand("RE: Re:  Lunch ", "", mails[0].send_time)
    assert topic_of([blank, answer]) == "Lunch"
    assert topic_of([blank]) == ""


# --- when something is wrong ------------------------------------------------------------------------------------------


def test_an_actor_that_says_something_else() -> None:
    with Stage() as stage:
        server = stage.enter("server", "server")
        with pytest.raises(DemoError, match='server should say "silence", but says "ready"'):
            server.expect("silence")


def test_an_actor_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with Stage() as stage:
        lost = stage.enter("Anna", "reader", "127.0.0.1", "1")
        with pytest.raises(DemoError, match='Anna should say "ready", but its process ended with 1'):
            lost.expect("ready")
    assert "ConnectError" in capfd.readouterr().err


def test_an_actor_that_has_more_to_say() -> None:
    with Stage() as stage:
        server = stage.enter("server", "server")
        address = server.expect("ready")
        reader = stage.enter("Anna", "reader", address["host"], str(address["port"]))
        reader.expect("ready")
        with evbus.connect(address["address"]) as client:
            client.publish(
                "email.new", NewEmailCommand("unexpected", "", load_mails(PACKAGED)[0].send_time), confirm=True
            )
        with pytest.raises(DemoError, match='Anna should say "left", but says "got"'):
            reader.dismiss("left")


def test_an_actor_that_is_killed() -> None:
    with Stage() as stage:
        server = stage.enter("server", "server")
        server.expect("ready")
        server._process.kill()
        with pytest.raises(DemoError, match='server should say "stopped", but its process ended with -9'):
            server.dismiss("stopped")


def test_no_process_is_left_behind() -> None:
    actors: list[Actor] = []
    with pytest.raises(RuntimeError, match="the story breaks off"), Stage() as stage:
        actors.append(stage.enter("server", "server"))
        actors[0].expect("ready")
        raise RuntimeError("the story breaks off")
    assert not psutil.pid_exists(actors[0]._process.pid)


def test_a_demo_that_fails_says_so(tmp_path: Path) -> None:
    """With one promise broken: the archive answers with fewer emails than it has."""
    code = """
import sys
from evbus.cli import main
from evbus.demo import story
story.matches = lambda mail, query: True  # what the stage expects; the archive is another process
sys.exit(main(["demo"]))
"""
    with Program([EVBUS[0], "-c", code], cwd=tmp_path) as program:
        result = program.finish()
    assert result.code == 1
    assert result.err.startswith("evbus: the requester got [")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_demo_that_is_ended_takes_its_processes_along(tmp_path: Path, number: int, code: int) -> None:
    with Program([*EVBUS, "demo"], cwd=tmp_path) as program:
        program.wait_for("listening on", "out")
        family = psutil.Process(program.process.pid).children(recursive=True)
        assert family
        program.interrupt(number)
        result = program.finish()
        assert result.code in (code, 0)  # it may have been done
        if number != signal.SIGKILL:
            assert not result.err
        wait_until(lambda: not any(process.is_running() for process in family), "the end of the actors")
