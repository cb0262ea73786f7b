"""The parts of `python -m bench` beyond throughput: shared subjects, paced runs, clients, charts and the report."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

# As in test_bench.py: found in the checkout, and last.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import client_work, clients, document, everything, latency, plot, scale
from bench.errors import BenchError
from bench.native import Frames, Load, Outcome, Run, compile_load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the bench's C parts use poll() and sockets of POSIX")

SIZE, COUNT = 40, 4
#: Four frames, one for each of four subjects; a delivery is as long as a frame.
FRAME = b"<<%d" + bytes(range(SIZE)) + b">"
FRAMES = Frames(b"".join(FRAME.replace(b"%d", b"%d" % i) for i in range(COUNT)), 3, SIZE, SIZE + 4, 3, count=COUNT)
UNIT = FRAMES.delivery_len


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return compile_load(tmp_path_factory.mktemp("load"))


def silent(_text: str) -> None:
    pass


def play(
    load: Load, deal: Callable[[list[bytes]], list[bytes]], *, messages: int, share: bool, rate: float = 0.0
) -> Run:
    """Run the load against a server that gives each of two subscribers (one, if paced) what `deal` says."""
    mine, theirs = zip(*(socket.socketpair() for _ in range(2 if rate else 3)), strict=True)

    def serve() -> None:
        if rate:  # at once, as a latency is measured
            done = 0
            while done < messages * UNIT:
                data = theirs[0].recv(65536)
                if not data:
                    return
                done += len(data)
                with contextlib.suppress(OSError):  # the load has seen enough
                    theirs[1].sendall(deal([data])[0])
            return
        data = bytearray()
        while len(data) < messages * UNIT:
            more = theirs[0].recv(65536)
            if not more:
                return
            data += more
        for sock, part in zip(
            theirs[1:], deal([bytes(data[at : at + UNIT]) for at in range(0, len(data), UNIT)]), strict=True
        ):
            with contextlib.suppress(OSError):
                sock.sendall(part)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        return load.run(
            FRAMES,
            [mine[0].fileno()],
            [sock.fileno() for sock in mine[1:]],
            messages=messages,
            window=1000,
            limit_s=5,
            checked=True,
            share=share,
            rate=rate,
        )
    finally:
        for sock in (*mine, *theirs):
            sock.close()
        thread.join(10)


def by_turns(whole: list[bytes]) -> list[bytes]:
    return [b"".join(whole[0::2]), b"".join(whole[1::2])]


@pytest.mark.parametrize("messages", [60, 61])
def test_subscribers_that_share_the_subjects(load: Load, messages: int) -> None:
    done = play(load, by_turns, messages=messages, share=True)
    assert (done.outcome, done.delivered, done.trouble) == (Outcome.DONE, messages, "")


def test_each_subject_has_its_frame(load: Load) -> None:
    seen: list[bytes] = []

    def look(whole: list[bytes]) -> list[bytes]:
        seen.extend(message[2:3] for message in whole)
        return by_turns(whole)

    play(load, look, messages=8, share=True)
    assert seen == [b"0", b"1", b"2", b"3"] * 2


@pytest.mark.parametrize(
    "deal",
    [
        lambda m: by_turns([*m[:20], m[22], m[21], m[20], *m[23:]]),
        lambda m: by_turns([*m[:20], *m[22:], *m[20:22]]),
        lambda m: by_turns([*m[:22], m[20], *m[23:]]),
        lambda m: by_turns(m)[::-1],
    ],
    ids=["swapped", "late", "repeated for another", "of the other subscriber"],
)
def test_a_share_that_is_wrong_is_found_out(load: Load, deal: Callable[[list[bytes]], list[bytes]]) -> None:
    assert play(load, deal, messages=60, share=True).outcome is Outcome.OUT_OF_ORDER


def test_a_paced_run_keeps_its_rate(load: Load) -> None:
    done = play(load, lambda data: data, messages=200, share=False, rate=2000.0)
    assert done.outcome is Outcome.DONE
    assert len(done.latencies_s) == 200
    assert done.seconds >= 199 / 2000
    assert all(0 < one < 5 for one in done.latencies_s)


def test_a_stall_of_the_server_stands_in_every_latency_that_it_made_longer(load: Load) -> None:
    stall_s, rate, due = 0.1, 2000.0, threading.Event()

    def once(data: list[bytes]) -> list[bytes]:
        if not due.is_set():
            due.wait(stall_s)  # nobody sets it meanwhile: this is the stall that the test is about
            due.set()
        return data

    done = play(load, once, messages=400, share=False, rate=rate)
    assert done.outcome is Outcome.DONE
    # Those that were due during the stall were sent during it, or late: their latencies fall by 1 / rate each.
    late = [one for one in done.latencies_s if one > stall_s / 2]
    assert len(late) >= stall_s / 2 * rate * 0.8


def test_a_paced_run_checks_too(load: Load) -> None:
    done = play(load, lambda data: [data[0][:3] + b"\x09" + data[0][4:]], messages=5, share=False, rate=1000.0)
    assert done.outcome is Outcome.DAMAGED


# --- scale, latency, clients, on evbus alone --------------------------------------------------------------------------


def test_scale_of_evbus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scale,
        "GROWTHS",
        {
            "subjects": ((1, 10_100), scale.GROWTHS["subjects"][1], ("evbus",)),  # over two connections
            "unrelated patterns": ((12,), scale.GROWTHS["unrelated patterns"][1], ("evbus",)),
            "idle connections": ((20,), scale.GROWTHS["idle connections"][1], ("evbus",)),
        },
    )
    told = list(scale.scale(["evbus"], rounds=1, messages=2_000, largest=50_000, progress=silent))
    points = [point for points in told for point in points]
    assert [point.problem for point in points] == [""] * len(points)
    assert [(point.growth, point.x) for point in points[:4]] == [
        ("subjects", 1),
        ("subjects", 10_100),
        ("unrelated patterns", 12),
        ("idle connections", 20),
    ]
    assert {point.unit for point in points[4:]} == {
        "KiB/connection",
        "us/connect",
        "us/subscribe",
        "connects/s",
        "subscribes/s",
    }
    assert all(point.median > 0 for point in points)


def test_latency_of_evbus() -> None:
    found = [
        point for points in latency.latency(["evbus"], rounds=1, seconds=0.05, progress=silent) for point in points
    ]
    assert [point.problem for point in found] == [""] * 5
    assert [point.per_s for point in found[:3]] == [1_000, 20_000, 100_000]
    assert found[3].per_s / found[4].per_s == pytest.approx(0.5 / 0.8)
    for point in found:
        assert 0 < point.us["p50"][0] <= point.us["p99.9"][0]


def test_both_clients_of_evbus() -> None:
    names = ["evbus-sync", "evbus-async"]
    found = [p for points in clients.clients(names, rounds=1, messages=2_000, progress=silent) for p in points]
    assert [point.problem for point in found] == [""] * len(found)
    works = ("publish", "receive", "query, 1 at once", "query, 64 at once")
    assert {(point.work, point.client) for point in found} == {(work, name) for work in works for name in names}
    assert all(point.median_cpu_us > 0 for point in found)


def test_a_receiver_of_the_clients_notices_what_is_out_of_order() -> None:
    for numbers, problem in (
        ([0, 1, 2], ""),
        ([0, 2, 1], "message 2 came where 1"),
        ([0, 0], "message 0 came where 1"),
    ):
        done = threading.Event()
        got = client_work.Receiving(3, done.set)
        for number in numbers:
            if not done.is_set():
                got.take(client_work.payload(number))
        assert done.is_set()
        assert problem in got.problem
        assert bool(got.problem) == bool(problem)


def test_clients_that_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zmq" else real(name))
    here, missing = clients.available_clients(["pyzmq", "evbus-sync"])
    assert list(here) == ["evbus-sync"]
    assert missing == {"pyzmq": "the Python package pyzmq is not installed"}


# --- charts and the report --------------------------------------------------------------------------------------------


def test_a_chart_is_svg_with_every_value() -> None:
    series = [plot.Series("a <b>", [1.0, 10.0, None]), plot.Series("c", [5.0, 500.0, 50.0])]
    for draw, shape, values in ((plot.lines, "circle", 5), (plot.bars, "rect", 5 + 1 + 2)):
        root = ET.fromstring(draw("Title", "x", "y", ["1", "2", "3"], series))
        assert len(list(root.iter(f"{{http://www.w3.org/2000/svg}}{shape}"))) == values
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"Title", "x", "y", "1", "2", "3", "a <b>", "c"} <= set(texts)


def test_a_larger_value_stands_higher() -> None:
    root = ET.fromstring(plot.lines("t", "x", "y", ["1", "2"], [plot.Series("a", [1.0, 10.0])]))
    low, high = (float(dot.attrib["cy"]) for dot in root.iter("{http://www.w3.org/2000/svg}circle"))
    assert high < low


def test_a_chart_without_values_is_an_error() -> None:
    for places, values in ((["1"], [None]), ([], []), (["1", "2"], [1.0])):
        with pytest.raises(ValueError, match="a chart needs"):
            plot.lines("t", "x", "y", places, [plot.Series("a", values)])


DATA: dict[str, Any] = {
    "machine": {"system": "Linux 6.1 x86_64", "cpu": "a cpu", "cores": 2, "pinned": [0, 1], "python": "3.12.1"},
    "quick": True,
    "rounds": 3,
    "versions": {"nats": "nats-server 2", "evbus": "evbus 1"},
    "missing": {"redis": "not installed"},
    "throughput": [
        {"workload": "1 -> 1, 128 B", "publishers": 1, "subscribers": 1, "size": 128, "peer": peer, "rounds": rounds}
        | {"per_s": [10, 20, 30], "problem": ""}
        for peer, rounds in (("nats", [200.0, 100.0, 400.0]), ("evbus", [50.0, 50.0, 60.0]))
    ],
    "scale": [
        {"growth": "subjects", "x": x, "peer": peer, "unit": "ns/delivery", "rounds": [50.0 * x] * 3, "problem": ""}
        for x in (1, 100)
        for peer in ("nats", "evbus")
    ],
    "latency": [
        {"load": "1,000 /s", "peer": "evbus", "per_s": 1000, "us": {"p50": [50.0], "p99.9": [90.0]}, "problem": ""}
    ],
    "clients": [
        {"work": "publish", "client": "nats-py", "cpu_us": [2.0], "per_s": [5.0], "p50_us": [], "problem": ""},
        {"work": "publish", "client": "evbus-sync", "cpu_us": [0.5], "per_s": [9.0], "p50_us": [], "problem": ""},
    ],
}


def test_the_report(tmp_path: Path) -> None:
    paths = everything.write(DATA, tmp_path / "new" / "results")
    assert {path.name for path in paths} == {
        *("report.md", "results.json"),
        *("size.svg", "fanout.svg", "subjects.svg", "latency.svg", "clients.svg"),
    }
    text = (tmp_path / "new/results/report.md").read_text(encoding="utf-8")
    # Median, spread, and the median of the rounds' ratios: of 0.25, 0.5 and 0.15.
    assert "| 1 -> 1, 128 B | 200 ±75% | 50.0 ±10% | 0.25 |" in text
    assert "Left out: redis (not installed)." in text
    assert set(re.findall(r"\]\((\w+\.svg)\)", text)) == {path.name for path in paths if path.suffix == ".svg"}
    again = json.loads((tmp_path / "new/results/results.json").read_text(encoding="utf-8"))
    assert document.markdown(again, document.charts(again)) == text
    assert everything.failures(DATA) == []


def test_a_peer_that_failed_has_no_figure() -> None:
    data = copy.deepcopy(DATA)
    data["throughput"][0] |= {"problem": "subscriber 0 received message 2 where 1 was due", "rounds": []}
    assert "FAILED: subscriber 0 received message 2 where 1 was due" in document.markdown(data, ())
    assert everything.failures(data) == ["throughput: nats: subscriber 0 received message 2 where 1 was due"]


def test_one_part_again_keeps_the_others_of_the_same_machine_only(tmp_path: Path) -> None:
    everything.write(DATA, tmp_path)
    again = {**copy.deepcopy(DATA), **{part: [] for part in everything.PARTS}}
    again["latency"] = [{**DATA["latency"][0], "per_s": 2000}]
    everything.keep_others(again, ["latency"], tmp_path)
    assert again == {**DATA, "latency": again["latency"]}
    again["versions"] = {"evbus": "evbus 2"}
    with pytest.raises(BenchError, match="a report with other versions"):
        everything.keep_others(again, ["latency"], tmp_path)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write the report"):
        everything.write(DATA, tmp_path / "file")


RESULTS = Path(document.__file__).parent / "results"


@pytest.mark.skipif(not (RESULTS / "results.json").exists(), reason="the source distribution has no results")
def test_the_report_in_the_repository_is_what_its_figures_say() -> None:
    data = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    pictures = document.charts(data)
    assert (RESULTS / "report.md").read_text(encoding="utf-8") == document.markdown(data, pictures)
    for name, text in pictures.items():
        assert (RESULTS / name).read_text(encoding="utf-8") == text
    everything_written = "".join(path.read_text(encoding="utf-8") for path in RESULTS.iterdir())
    assert not re.search(r"/(home|root|work|Users|tmp)/", everything_written)
    assert socket.gethostname() not in everything_written
    assert everything.failures(data) == []
