"""A guard against getting slower that no busy machine can upset: instructions per message, counted by valgrind.

`python -m bench.instructions` counts what the compiled hot paths execute for a message and compares it with what is on
record in `instructions.json`; `--record` writes the record. A time would depend on the machine and on what else it
does; the number of instructions depends on the code, the compiler and the Python, and moves by less than one per cent.

Each count is the difference of two runs of different length, so what starting and ending cost is not in it. Only what
is executed inside the named C function counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from evbus._frame import Ring, RingPool
from evbus._inbox import Inbox
from evbus._mailbox import Mailbox
from evbus._outbox import Clock, Outbox
from evbus._router import FEED_CONTROL, LINK_READY, Link, Router
from evbus.wire import Dialect

RECORD = Path(__file__).with_name("instructions.json")
#: More than this many times the record is clearly worse. Compilers and Pythons differ by less; a lost trick by more.
TOLERANCE = 1.25
MESSAGES = (2_000, 12_000)
SIZE = 128
SUBJECT = "bench.subject"


class Sink:
    """A transport that takes all."""

    def __init__(self) -> None:
        self.data = bytearray()

    def flush(self, ring: Ring) -> int:
        """See `Transport`."""
        self.data += ring.take()
        return 0


def publishes(count: int) -> bytes:
    """That many publishes, as a client sends them."""
    sink = Sink()
    outbox = Outbox(Clock(1))
    outbox.attach(sink)
    outbox.open(Dialect.EVBUS_2, 1 << 20)
    for _ in range(count):
        outbox.pack_event(SUBJECT, b"x" * SIZE, 1)
    outbox.flush(True)
    return bytes(sink.data)


def plane(receivers: int) -> tuple[Router, Link, list[Sink], list[object]]:
    """A data plane with a publisher and its receivers."""
    router = Router(
        RingPool(),
        payload_bytes=1 << 20,
        pending_bytes=1 << 30,
        queries=100,
        query_max_s=60.0,
        query_default_s=30.0,
        cache_subjects=1000,
        ticks=0,
    )
    router.set_time(1.0, 1)
    first = bytes([23, 0, 0, 0]) + bytes(8) + bytes([1, 0, 1]) + bytes(8)
    links, sinks = [], []
    for number in range(receivers + 1):
        sinks.append(Sink())
        link = Link(router, number + 1, sinks[-1].flush)
        link.inp.write(first)
        if router.feed(link) != FEED_CONTROL:
            raise RuntimeError("the first packet was not for the control plane")
        router.take_packet()
        router.feed(link)
        link.dialect, link.state, link.packet_limit = Dialect.EVBUS_2, LINK_READY, 1 << 26
        links.append(link)
    interests: list[object] = [router.subscribe(link, SUBJECT.encode()) for link in links[1:]]
    return router, links[0], sinks[1:], interests


def route(count: int, receivers: int) -> list[Sink]:
    """Let that many publishes through, 64 KiB at a time, as a server reads them."""
    data = publishes(count)
    router, link, sinks, interests = plane(receivers)
    for at in range(0, len(data), 65536):
        link.inp.write(data[at : at + 65536])
        while router.feed(link):
            pass
        router.flush_dirty()
    del interests
    return sinks


def receive(count: int) -> None:
    """Let a client read that many deliveries and hand them out."""
    (sink,) = route(count, 1)
    boxes: list[Mailbox] = []
    inbox = Inbox(lambda _key: (tuple(boxes), ()))
    boxes.append(Mailbox(None, 1, max_msgs=1 << 30, max_bytes=1 << 40))
    inbox.add_mailbox(boxes[0])
    inbox.open(Dialect.EVBUS_2, 1 << 20)
    for at in range(0, len(sink.data), 65536):
        inbox.ring.write(bytes(sink.data[at : at + 65536]))
        inbox.receive()
    if boxes[0].received != count:
        raise RuntimeError(f"{boxes[0].received} of {count} arrived")


#: What is counted: the C function, and the work that calls it.
WORK: dict[str, tuple[str, Callable[[int], object]]] = {
    "server, 1 to 1": ("__pyx_pw_*6Router_*feed", lambda count: route(count, 1)),
    "server, 1 to 10": ("__pyx_pw_*6Router_*feed", lambda count: route(count, 10)),
    "client, publish": ("__pyx_pw_*6Outbox_*pack_event", publishes),
    "client, receive": ("__pyx_pw_*5Inbox_*receive", receive),
}


def count(name: str) -> float:
    """Instructions per message."""
    totals = []
    with TemporaryDirectory() as directory:
        for messages in MESSAGES:
            out = Path(directory) / f"{messages}"
            command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--toggle-collect={WORK[name][0]}"]
            command += [f"--callgrind-out-file={out}", sys.executable, "-m", "bench.instructions"]
            done = subprocess.run(
                [*command, "--work", name, str(messages)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(encoding="utf-8"), re.M)
            if found is None or not int(found[1]):
                raise RuntimeError(f"{name}: nothing was counted; is the extension built with its symbols?")
            totals.append(int(found[1]))
    return (totals[1] - totals[0]) / (MESSAGES[1] - MESSAGES[0])


def main() -> int:
    """Count, and compare or record."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write what is counted into instructions.json")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "MESSAGES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        WORK[args.work[0]][1](int(args.work[1]))
        return 0
    if shutil.which("valgrind") is None:
        print("skipped: valgrind is not installed (Debian: apt-get install valgrind)")
        return 0
    record: dict[str, float] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    counted = {name: count(name) for name in WORK}
    if args.record:
        RECORD.write_text(json.dumps({name: round(value) for name, value in counted.items()}, indent=2) + "\n")
        print(f"recorded with Python {platform.python_version()}")
    worse = []
    for name, value in counted.items():
        before = record.get(name, value)
        ratio = value / before
        print(f"{name:<16} {value:8.0f} instructions per message, {ratio:.2f} of the record")
        if ratio > TOLERANCE and not args.record:
            worse.append(name)
    if worse:
        print(f"slower than on record by more than {TOLERANCE - 1:.0%}: {', '.join(worse)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
