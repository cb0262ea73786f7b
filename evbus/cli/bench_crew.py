"""The processes of `evbus bench`: started together, let go together, and gone at the end."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Final

import msgspec

from evbus.cli.bench_spec import Result, Spec
from evbus.cli.common import CommandError

__all__ = ["Crew"]

#: Seconds that Python may take to start, on a busy machine, and to connect.
_START_S: Final = 30.0
#: Roles that end by themselves; the others follow.
_LEADING: Final = ("publish", "ask", "connect")


class _Worker:
    """One process."""

    def __init__(self, spec: Spec, news: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        self.spec = spec
        self.done = 0
        self.result: Result | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evbus.cli.bench_work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._news = news
        self._reader = threading.Thread(target=self._read, name="bench", daemon=True)
        self._reader.start()
        self.say(msgspec.json.encode(asdict(spec)))

    def say(self, line: bytes) -> None:
        """One line for its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which its output tells
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                record: dict[str, Any] = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            self._news.put((self, record))
        self._news.put((self, None))

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._reader.join(2.0)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Crew:
    """Runs processes, one for each spec. A context manager; leaving it ends those that are still there."""

    def __init__(self, specs: Sequence[Spec], progress: Callable[[int], None]) -> None:
        self._news: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._specs = specs
        self._progress = progress
        self._workers: list[_Worker] = []

    def run(self) -> list[Result]:
        """Let them work, and return their results in the order of the specs.

        Raises:
            CommandError: one could not begin, or has come to nothing.
        """
        for spec in self._specs:
            self._workers.append(_Worker(spec, self._news))
        self._until(lambda record: "ready" in record, self._workers, _START_S, "get ready")
        for worker in self._workers:
            worker.say(b"go")
        leading = [worker for worker in self._workers if worker.spec.role in _LEADING]
        following = [worker for worker in self._workers if worker.spec.role not in _LEADING]
        if leading:
            self._until(self._is_result, leading, self._patience(leading), "end")
        for worker in following:
            if worker.spec.role == "answer":
                worker.say(b"done")
        self._until(self._is_result, following, self._patience(following), "end")
        return [worker.result for worker in self._workers if worker.result is not None]

    @staticmethod
    def _is_result(record: dict[str, Any]) -> bool:
        return "result" in record

    @staticmethod
    def _patience(workers: list[_Worker]) -> float:
        # A count without a duration may take its time; it ends with Ctrl-C, or when nothing more comes of it.
        specs = [worker.spec for worker in workers]
        asked = [spec.duration or (3600.0 if spec.count is not None else 0.0) for spec in specs]
        return max((time_s + 2 * spec.patience + 5.0 for time_s, spec in zip(asked, specs, strict=True)), default=0.0)

    def _until(
        self, is_it: Callable[[dict[str, Any]], bool], workers: list[_Worker], timeout: float, what: str
    ) -> None:
        waiting = {id(worker) for worker in workers if worker.result is None}
        deadline = time.monotonic() + timeout
        while waiting:
            try:
                worker, record = self._news.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                raise CommandError(f"{len(waiting)} of the bench's processes did not {what} in time") from None
            if record is None:
                if worker.result is None:
                    raise CommandError("a process of the bench ended before its work was done")
                continue
            if "progress" in record:
                worker.done = record["progress"]
                self._progress(max(self._done(True), self._done(False)))
            if "result" in record:
                worker.result = msgspec.convert(record["result"], Result)
                if what != "end" and worker.result.problems:
                    raise CommandError(worker.result.problems[0])
            if is_it(record) or worker.result is not None:
                waiting.discard(id(worker))

    def _done(self, leading: bool) -> int:
        return sum(worker.done for worker in self._workers if (worker.spec.role in _LEADING) is leading)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
