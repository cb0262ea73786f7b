"""Starts the demo's processes, tells them what to do, and hears what they have done."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

import msgspec

from evbus.errors import EvbusError

__all__ = ["Actor", "DemoError", "Stage"]

#: Seconds that the next word of an actor may take, which includes starting Python on a busy machine. A safety net only.
_PATIENCE_S: Final = 30.0
#: Seconds for an actor to end when it is no longer needed.
_EXIT_S: Final = 10.0

# The child gets our own module path: with `-m` it would look into the current directory first and might find another
# evbus there.
_CODE: Final = "import sys; sys.path[:] = {path!r}; from evbus.demo.actors import main; main(*sys.argv[1:])"


class DemoError(EvbusError):
    """Something in the demo did not happen as promised. `str()` says what."""


class Actor:
    """One process of the demo.

    Attributes:
        name: what the story calls it.
    """

    def __init__(self, name: str, role: str, *address: str) -> None:
        self.name = name
        self._heard: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path), role, name, *address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the stage, which then ends the actors in order.
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard.put(msgspec.json.decode(line))
        self._heard.put(None)

    def do(self, order: str, **facts: object) -> None:
        """Tell it to do something."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode({"do": order, **facts}) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise DemoError(f"the process of {self.name} is gone; what it said stands above") from error

    def expect(self, event: str) -> dict[str, Any]:
        """Wait for its next word, which must be this event. Returns the facts that came with it.

        Raises:
            DemoError: it said something else, or nothing, or ended.
        """
        try:
            heard = self._heard.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise DemoError(f'{self.name} should say "{event}", but has said nothing for {_PATIENCE_S:g} s') from None
        if heard is None:
            code = self._process.wait()
            raise DemoError(f'{self.name} should say "{event}", but its process ended with {code}; see its words above')
        said = heard.pop("event")
        if said != event:
            raise DemoError(f'{self.name} should say "{event}", but says "{said}" {heard}')
        return heard

    def dismiss(self, last_word: str) -> dict[str, Any]:
        """Let it leave in order. Returns the facts of its last word.

        Raises:
            DemoError: it said anything else, or did not end well.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        facts = self.expect(last_word)
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} does not end") from None
        if code:
            raise DemoError(f"the process of {self.name} ended with {code}; see its words above")
        self._listener.join(_EXIT_S)
        trailing = self._heard.get(timeout=_EXIT_S)
        if trailing is not None:
            raise DemoError(f"{self.name} says something after its last word: {trailing}")
        return facts

    def end(self) -> None:
        """Make sure that the process is gone. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join(_EXIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was still in our buffer has no reader
                    continue


@contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the block. Processes started in it inherit that; see `actors`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stage:
    """All actors; none is left when the `with` block is."""

    def __init__(self) -> None:
        self._actors: list[Actor] = []

    def enter(self, name: str, role: str, *address: str) -> Actor:
        """Start an actor; it says "ready" when it is."""
        # A signal in the middle of this would leave a process that nobody knows of.
        with _signals_later():
            actor = Actor(name, role, *address)
            self._actors.append(actor)
        return actor

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in reversed(self._actors):
            actor.end()
