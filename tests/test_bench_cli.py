"""`evbus bench`: what it prints, and that it notices what a bus does wrong."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers_cli import EVBUS, Program, Result

import evbus
from evbus import EventServer
from evbus.cli import bench_show
from evbus.cli.bench_check import Histogram, Source, Tally, Window
from evbus.cli.bench_spec import Result as WorkResult

Bench = Callable[..., Result]


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def bench(server: EventServer, tmp_path: Path) -> Bench:
    def run(*arguments: str) -> Result:
        env = {"EVBUS_URL": server.address}
        with Program([*EVBUS, "bench", *arguments], cwd=tmp_path, env=env) as program:
            return program.finish()

    return run


@pytest.mark.parametrize("client", [[], ["--async"]], ids=["sync", "asyncio"])
@pytest.mark.parametrize(
    ("mode", "role", "messages"),
    [
        (["pubsub", "--clients", "2"], "receive", 4000),
        (["fanout", "--clients", "2"], "receive", 4000),
        (["pub"], "publish", 2000),
        (["query", "--at-once", "8"], "query", 2000),
        (["connections", "--connections", "20"], "connect", 20),
    ],
    ids=["pubsub", "fanout", "pub", "query", "connections"],
)
def test_each_mode(bench: Bench, mode: list[str], role: str, messages: int, client: list[str]) -> None:
    result = bench(*mode, *client, "--count", "2000", "--warm-up", "20", "--json")
    assert (result.code, result.err) == (0, "")
    record = json.loads(result.out)
    assert record["check"] == {"lost": 0, "repeated": 0, "reordered": 0, "damaged": 0, "unfinished": 0, "ok": True}
    assert record["problems"] == []
    assert record[role]["messages"] == messages
    assert record[role]["per_s"] > 0
    assert record[role]["cpu_us"] > 0
    if role != "publish":
        latency = record["latency_us"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]


def test_text_and_comparison(bench: Bench, tmp_path: Path) -> None:
    before = bench("pubsub", "--count", "500", "--json")
    (tmp_path / "before.json").write_text(before.out)
    result = bench("pubsub", "--count", "500", "--size", "1KiB", "--compare", "before.json")
    assert result.code == 0, result.err
    assert re.search(r"^receive +[\d,]+ /s +[\d.,]+ MB/s   CPU [\d.]+ µs each", result.out, re.M)
    assert "500 messages, each once, in order and unharmed" in result.out
    assert re.search(r"^receive\.per_s +[\d.,]+ +[\d.,]+ +\d+\.\d\d$", result.out, re.M)
    assert "not the same work: size 128 -> 1024" in result.out


def test_csv_has_one_line_of_values(bench: Bench) -> None:
    names, values = csv.reader(bench("fanout", "--count", "300", "--csv").out.splitlines())
    row = dict(zip(names, values, strict=True))
    assert (row["mode"], row["receive.messages"], row["check.lost"]) == ("fanout", "1200", "0")


def test_a_rate_is_kept_and_the_duration_too(bench: Bench) -> None:
    record = json.loads(bench("pubsub", "--rate", "500", "--duration", "1", "--json").out)
    assert record["receive"]["messages"] == 500
    assert record["publish"]["seconds"] >= 0.99
    assert "sent_late_us" in record


def test_pub_and_sub_in_processes_of_their_own(server: EventServer, tmp_path: Path) -> None:
    env = {"EVBUS_URL": server.address}
    with evbus.connect(server.address) as client:
        more = ["--duration", "20", "--json"]
        with Program([*EVBUS, "bench", "sub", *more], cwd=tmp_path, env=env) as receiving:
            until_somebody_hears(client, "bench.messages")
            with Program([*EVBUS, "bench", "pub", "--count", "3000"], cwd=tmp_path, env=env) as publishing:
                assert publishing.finish().code == 0
            result = receiving.finish()
    assert json.loads(result.out)["receive"]["messages"] == 3000
    # The bench's own probe was no message of a publisher, and this is told.
    assert (result.code, json.loads(result.out)["check"]["damaged"] > 0) == (1, True)


def until_somebody_hears(client: evbus.EventClient, subject: str) -> None:
    from helpers_cli import wait_until

    def heard() -> bool:
        receipt = client.publish(subject, b"?", confirm=True)
        return receipt is not None and receipt.receivers > 0

    wait_until(heard, f"a subscriber of {subject}")


@pytest.mark.parametrize("mode", ["pubsub", "sub"])
def test_a_publisher_that_is_never_heard(server: EventServer, tmp_path: Path, mode: str) -> None:
    if mode == "pubsub":
        with Program([*EVBUS, "bench", mode, "-s", "127.0.0.1:1"], cwd=tmp_path) as program:
            result = program.finish()
        assert result.code == 1
        assert result.err.startswith("evbus: ")
        assert result.err.count("\n") == 1
    else:
        with Program([*EVBUS, "bench", mode, "-s", server.address, "--duration", "0.2"], cwd=tmp_path) as program:
            result = program.finish()
        assert result.code == 1
        assert "the end of 1 publishers has not come" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pubsub", "--size", "8"], "at least 16 bytes"),
        (["pubsub", "--rate", "-5"], "--rate"),
        (["pubsub", "--clients", "65"], "at most 64"),
        (["pubsub", "--json", "--csv"], "one of them"),
        (["pubsub", "--no-check", "--rate", "5"], "--no-check"),
        (["nonsense"], "invalid choice"),
        (["connections", "--connections", "1", "--clients", "2"], "at least one"),
    ],
)
def test_wrong_usage(bench: Bench, arguments: list[str], words: str) -> None:
    result = bench(*arguments)
    assert result.code == 2
    assert words in result.err


def test_a_file_that_cannot_be_compared_with(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name in ("none.json", "list.json"):
        result = bench("pubsub", "--count", "10", "--compare", name)
        assert (result.code, result.out) == (1, "")
        assert name in result.err


def test_the_bar_is_shown_on_a_terminal(server: EventServer, tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    command = "import os,sys; os.dup2(int(sys.argv[1]), 2); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    argv = [sys.executable, "-c", command, str(theirs), "-m", "evbus", "bench", "pubsub", "--duration", "0.7"]
    os.set_inheritable(theirs, True)
    import subprocess

    env = {**os.environ, "EVBUS_URL": server.address}
    with subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, close_fds=False) as process:
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(mine, 4096):
                seen += data
        except OSError:  # what a terminal says when nobody is left at its other end
            pass
        os.close(mine)
        assert process.stdout is not None
        process.stdout.read()
    assert re.search(rb"\[#+\.*\] +\d+% +[\d,]+", seen)
    assert seen.endswith(b"\r\x1b[K")


# --- the check --------------------------------------------------------------------------------------------------------


def messages(count: int, publisher: int = 0, size: int = 40) -> list[bytes]:
    source = Source(publisher, size, count=count, duration=None, rate=None, window=Window(0, 1), check=True)
    source.begin()
    found: list[bytes] = []
    while (chunk := source.take()) is not None:
        assert isinstance(chunk, list)
        found += chunk
    return [*found, source.end()]


def tallied(bodies: list[bytes], publishers: int = 1, check: bool = True) -> Tally:
    tally = Tally(publishers, 40, check=check, ack_every=1000)
    for body in bodies:
        tally.add(body)
    return tally


def wrong(tally: Tally) -> dict[str, int]:
    names = {"lost": tally.lost, "repeated": tally.surplus, "reordered": tally.reordered, "damaged": tally.damaged}
    return {name: count for name, count in {**names, "unfinished": tally.unfinished}.items() if count}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m, {}),
        (lambda m: m[:50] + m[53:], {"lost": 3}),
        (lambda m: m[:98] + m[100:], {"lost": 2}),
        (lambda m: m[3:], {"lost": 3}),
        (lambda m: [*m[:50], m[49], *m[50:]], {"repeated": 1}),
        (lambda m: [*m[:50], m[51], m[50], *m[52:]], {"reordered": 1}),
        (lambda m: [*m[:50], m[51], m[50], m[50], *m[52:]], {"reordered": 1, "repeated": 1}),
        (lambda m: [*m[:50], m[50][:-1] + b"X", *m[51:]], {"damaged": 1, "lost": 1}),
        (lambda m: [*m[:50], m[50] + b"X", *m[51:]], {"damaged": 1, "lost": 1}),
        (lambda m: [*m, messages(1, publisher=7)[0]], {"damaged": 1}),
        (lambda m: m[:-1], {"unfinished": 1}),
    ],
)
def test_what_is_wrong_is_noticed(change: Callable[[list[bytes]], list[bytes]], expected: dict[str, int]) -> None:
    assert wrong(tallied(change(messages(100)))) == expected


def test_each_publisher_has_an_order_of_its_own() -> None:
    one, two = messages(50), messages(50, publisher=1)
    mixed = [body for pair in zip(one, two, strict=True) for body in pair]
    assert wrong(tallied(mixed, publishers=2)) == {}
    assert wrong(tallied([*one, *two[1:]], publishers=2)) == {"lost": 1}


def test_counting_alone_notices_loss_and_surplus() -> None:
    whole = messages(100)
    assert wrong(tallied(whole, check=False)) == {}
    assert wrong(tallied(whole[1:], check=False)) == {"lost": 1}
    assert wrong(tallied([whole[0], *whole], check=False)) == {"repeated": 1}


def test_a_broken_bus_is_told_by_the_verdict() -> None:
    tally = tallied(messages(100)[5:])
    tally.finish()
    result = WorkResult(role="subscribe")
    result.take_tally(tally)
    asked: dict[str, Any] = {"title": "t", "size": 40, "checked": True}
    record = bench_show.figures(asked, [result])
    assert record["check"]["ok"] is False
    assert "FAILED: 5 lost" in bench_show.text(record)


def test_latency_counts_from_when_a_message_was_due() -> None:
    window = Window(1, 10)
    source = Source(0, 16, count=20, duration=None, rate=1e6, window=window, check=True)
    source.begin()
    sent: list[bytes] = []
    while len(sent) < 10:
        taken = source.take()
        sent += taken if isinstance(taken, list) else []
    assert isinstance(source.take(), float)  # the window is full: nobody has taken anything
    stalled = 0.02
    import time

    began = time.monotonic()
    while time.monotonic() - began < stalled:
        assert isinstance(source.take(), float)
    window.on_ack(Tally(1, 16, check=True, ack_every=1).ack(0)[:2] + (10).to_bytes(8, "little"))
    late = source.take()
    assert isinstance(late, list)
    tally = Tally(1, 16, check=True, ack_every=1000)
    for body in [*sent, *late]:
        tally.add(body)
    # The stall was the subscriber's, and stands in the latency of what had to wait for it.
    assert tally.latencies[10] >= stalled * 1e9 * 0.9


def test_a_publisher_gives_up_on_a_window_that_does_not_move() -> None:
    source = Source(0, 16, count=None, duration=60, rate=None, window=Window(1, 64), check=True, patience=0.01)
    source.begin()
    assert isinstance(source.take(), list)
    while source.take() is not None:
        pass
    assert (source.gave_up, source.sent) == (True, 64)


def test_percentiles() -> None:
    histogram = Histogram()
    histogram.add(range(1, 100_001))
    for share in (0.5, 0.9, 0.99, 0.999):
        assert histogram.percentile(share) == pytest.approx(100_000 * share, rel=0.01)
    again = Histogram.from_json(msgspec.json.decode(msgspec.json.encode(histogram.to_json())))
    again.merge(histogram)
    assert (again.total, again.percentile(0.5)) == (200_000, histogram.percentile(0.5))
    assert Histogram().percentile(0.5) == 0
