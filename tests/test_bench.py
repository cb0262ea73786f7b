"""The bench's own correctness: its check must fail on a server that loses, repeats, reorders or damages a message."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The bench is not part of the package: found in the checkout, and last, so that the installed evbus is what is tested.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import machine, plan, report
from bench.errors import BenchError
from bench.native import Frames, Load, Outcome, Run, compile_load
from bench.plan import Workload
from bench.process import ServerProcess
from bench.throughput import Measurement, Sample, measure

HEAD, TAIL, SIZE = b"<<", b">", 40
FRAMES = Frames(HEAD + bytes(range(SIZE)) + TAIL, len(HEAD), SIZE, len(HEAD) + SIZE + len(TAIL), len(HEAD))
UNIT = FRAMES.delivery_len

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the bench's C parts use poll() and sockets of POSIX")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return compile_load(tmp_path_factory.mktemp("load"))


class Server(threading.Thread):
    """Forwards what one publisher sends to two subscribers, after `change` has had its way with it.

    `change` takes the list of whole messages and the number of the subscriber, and returns the bytes that it gets.
    """

    def __init__(self, messages: int, change: Callable[[list[bytes], int], bytes]) -> None:
        super().__init__(daemon=True)
        self.publisher, self._in = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(2)]
        self.subscribers = [mine for mine, _ in pairs]
        self._outs = [theirs for _, theirs in pairs]
        self._messages = messages
        self._change = change

    def run(self) -> None:
        data = bytearray()
        while len(data) < self._messages * UNIT:
            data += self._in.recv(65536)
        whole = [bytes(data[at : at + UNIT]) for at in range(0, len(data), UNIT)]
        for number, out in enumerate(self._outs):
            out.sendall(self._change(whole, number))

    def close(self) -> None:
        self.join(10)
        for connection in (self.publisher, self._in, *self.subscribers, *self._outs):
            connection.close()


def run(load: Load, change: Callable[[list[bytes], int], bytes], *, checked: bool = True, limit_s: float = 20.0) -> Run:
    server = Server(60, change)
    server.start()
    try:
        return load.run(
            FRAMES,
            [server.publisher.fileno()],
            [connection.fileno() for connection in server.subscribers],
            messages=60,
            window=1000,
            limit_s=limit_s,
            checked=checked,
        )
    finally:
        server.close()


def faithful(messages: list[bytes], subscriber: int) -> bytes:
    return b"".join(messages)


def on_the_second(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[list[bytes], int], bytes]:
    """The first subscriber is served well, so the fault must be found on the second."""
    return lambda messages, subscriber: b"".join(change(messages) if subscriber else messages)


@pytest.mark.parametrize("checked", [True, False])
def test_a_faithful_server_passes(load: Load, checked: bool) -> None:
    done = run(load, faithful, checked=checked)
    assert (done.outcome, done.delivered, done.trouble) == (Outcome.DONE, 120, "")


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        (
            lambda m: [*m[:20], m[21], m[20], *m[22:]],
            Outcome.OUT_OF_ORDER,
            "message 21 of publisher 0 where 20 was due",
        ),
        (lambda m: [*m[:20], m[19], *m[20:-1]], Outcome.OUT_OF_ORDER, "message 19 of publisher 0 where 20 was due"),
        (lambda m: [*m[:20], *m[21:], m[59]], Outcome.OUT_OF_ORDER, "message 21 of publisher 0 where 20 was due"),
        (lambda m: [*m[:-1], m[-1][:-2] + b"X" + m[-1][-1:]], Outcome.DAMAGED, "message 59 was due"),
        (lambda m: [m[0], m[1][:2] + b"\x07" + m[1][3:], *m[2:]], Outcome.DAMAGED, "nobody sent"),
        (lambda m: [*m, m[-1]], Outcome.SURPLUS, f"{61 * UNIT:,} bytes where {60 * UNIT:,} were due"),
    ],
    ids=["swapped", "repeated", "lost", "damaged", "of nobody", "surplus"],
)
def test_an_unfaithful_server_is_found_out(
    load: Load, change: Callable[[list[bytes]], list[bytes]], outcome: Outcome, words: str
) -> None:
    done = run(load, on_the_second(change))
    assert done.outcome == outcome
    assert words in done.trouble
    assert "subscriber 1" in done.trouble


@pytest.mark.parametrize("checked", [True, False])
def test_a_message_that_never_comes_ends_the_run(load: Load, checked: bool) -> None:
    done = run(load, on_the_second(lambda m: m[:-1]), checked=checked, limit_s=0.3)
    assert done.outcome == Outcome.TIMED_OUT
    assert "not everything had arrived" in done.trouble


def test_a_server_that_hangs_up_is_reported(load: Load) -> None:
    publisher, other = socket.socketpair()
    subscriber, theirs = socket.socketpair()
    theirs.close()
    with publisher, other, subscriber:
        done = load.run(
            FRAMES, [publisher.fileno()], [subscriber.fileno()], messages=5, window=5, limit_s=5, checked=False
        )
    assert done.outcome == Outcome.CLOSED


@pytest.mark.parametrize(
    "change",
    [{"payload_len": 11}, {"payload_at": 4}, {"payload_at": -1}, {"delivery_payload_at": 4}, {"delivery_len": 20}],
)
def test_frames_that_would_read_outside_are_refused(change: dict[str, int]) -> None:
    facts = {"payload_at": 2, "payload_len": SIZE, "delivery_len": UNIT, "delivery_payload_at": 2}
    Frames(FRAMES.frame, **facts)
    with pytest.raises(BenchError):
        Frames(FRAMES.frame, **(facts | change))


def test_the_relay_from_start_to_table() -> None:
    """A whole bench, as small as it gets: processes, check, rounds and table."""
    said: list[str] = []
    workloads = [Workload(1, 2, 64), Workload(2, 1, 64)]
    found = list(measure(["relay"], workloads, rounds=2, scale=0.001, limit_s=60.0, progress=said.append))
    assert [len(measurements) for measurements in found] == [1, 0], "the relay has one publisher"
    assert found[0][0].problem == ""
    assert len(found[0][0].samples) == 2
    assert all(sample.cpu_ns > 0 and sample.per_s > 0 for sample in found[0][0].samples)
    text = report.table(found[0], head=True)
    assert "1 -> 2, 64 B" in text
    assert any("in order" in line for line in said)


def test_nothing_new_is_begun_when_the_time_is_up() -> None:
    said: list[str] = []
    assert list(measure(["relay"], [Workload(1, 1, 64)], rounds=1, scale=0.1, limit_s=-1.0, progress=said.append)) == []
    assert "the time is up" in said[0]


def test_ratios_are_taken_round_by_round() -> None:
    work = Workload(1, 1, 16)
    nats = Measurement(work, "nats", [Sample(100.0, 1.0), Sample(400.0, 1.0), Sample(200.0, 1.0)])
    mine = Measurement(work, "evbus", [Sample(50.0, 1.0), Sample(200.0, 2.0), Sample(100.0, 3.0)])
    broken = Measurement(work, "redis", [], "lost")
    rows = {m.peer: found for m, found in report.figures([nats, mine, broken])}
    assert rows["redis"] is None
    evbus = rows["evbus"]
    assert evbus is not None
    assert evbus.ratios == {"nats": 0.5}
    assert (evbus.cpu_ns, evbus.per_s, evbus.spread) == (100.0, 2.0, 0.75)
    assert "FAILED: lost" in report.table([nats, mine, broken], head=False)
    assert '"nats": 0.5' in report.json_lines([nats, mine])


def test_plan() -> None:
    assert plan.parse_sizes("16, 4K,1m") == [16, 4096, 1 << 20]
    assert plan.parse_shapes("1x1,10x100") == [(1, 1), (10, 100)]
    for bad in ("", "11", "x", "2M", "16,"):
        with pytest.raises(BenchError, match="--sizes"):
            plan.parse_sizes(bad)
    for bad in ("", "1", "0x1", "1x501", "1x1,"):
        with pytest.raises(BenchError, match="--shapes"):
            plan.parse_shapes(bad)
    assert Workload(1, 100, 16384).name == "1 -> 100, 16 KiB"
    for work in plan.default_workloads(quick=False) + plan.workloads([(500, 500)], [12, 1 << 20]):
        assert work.window >= 16
        assert work.messages(0.15) >= 50
        # What may wait stays below what the servers grant by default.
        assert work.window * work.size <= max(4 << 20, 16 * work.size)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_is_awaited_and_ended() -> None:
    code = "import sys, time; print('hi'); print('listening on 127.0.0.1:4711', file=sys.stderr); time.sleep(60)"
    process = ServerProcess(python(code), re.compile(r"listening on 127\.0\.0\.1:(\d+)"), None)
    assert process.port == 4711
    assert machine.cpu_ns(process.pid) > 0
    process.stop()
    process.stop()


def test_a_process_that_ends_early_is_reported_with_its_last_words() -> None:
    with pytest.raises(BenchError, match=r"(?s)ended before it was ready.*no such luck"):
        ServerProcess(python("print('no such luck')"), re.compile("ready"), None)


@pytest.fixture
def accepted() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with ours, theirs:
        yield ours, theirs


def test_a_peer_that_answers_something_else_is_found_out(
    accepted: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    from bench.peers.evbus import Evbus

    ours, theirs = accepted
    theirs.sendall(struct.pack("<iqHBqi", 27, 1, 199, 1, 0, 4711))
    Evbus(tmp_path, None).ping(ours)
    theirs.sendall(struct.pack("<iqHBqi", 27, 1, 199, 1, 0, 4712))
    with pytest.raises(BenchError, match="echo"):
        Evbus(tmp_path, None).ping(ours)
