"""An asyncio loop as the client's core sees it, and how the asyncio client waits: for outcomes, room, a server.

The core is the one of the synchronous client: the socket is the loop's to watch (`add_reader`, `add_writer`) and ours
to read and write. No stream of asyncio's comes between, so what waits to be sent is in our own outbox, counted and
bounded. (`StreamWriter.drain` never waits after `writelines` on some versions of Python: CVE-2024-12254.) A loop that
cannot watch sockets, which is the proactor loop of Windows, will not do.

Everything here belongs to the loop's thread, but what says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from evbus._inbox import Waiter
from evbus._wake import Resume
from evbus.connector import Dialled
from evbus.correlation import Notify, Sending
from evbus.dial import Server, UnixAddress, no_connection, unix_socket, unknown_host
from evbus.errors import BufferFullError
from evbus.reactor import EVENT_READ, EVENT_WRITE, Cancellable, HasFileno
from evbus.requests import Asking, Outgoing
from evbus.session import Session
from evbus.transport import TcpTransport, Transport

__all__ = ["AsyncDialler", "AsyncWaiting", "Callbacks", "LoopReactor", "Tasks", "dial_async", "wake_future"]

T = TypeVar("T")

_log = logging.getLogger("evbus.client")

# Ended waits that may be kept behind one that takes its time.
_SWEEP_WAITS = 1024
# What a handler that was cancelled gets to clean up.
_CANCEL_S = 1.0


def wake_future(future: asyncio.Future[None]) -> None:
    """Let whoever awaits it go on."""
    if not future.done():
        future.set_result(None)


class LoopReactor:
    """The loop with the methods of a `reactor.Loop`. Made on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._callbacks: dict[int, tuple[int, Callable[[int], object]]] = {}
        self.now = loop.time
        self.call_at: Callable[[float, Callable[[], object]], Cancellable] = loop.call_at
        self.call_later: Callable[[float, Callable[[], object]], Cancellable] = loop.call_later

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Make a call in the loop's next turn."""
        self._loop.call_soon(callback)

    def call_threadsafe(self, callback: Callable[[], object]) -> None:
        """Make a call in the loop's next turn. Any thread."""
        if threading.get_ident() == self._thread:  # nobody has to be woken
            self._loop.call_soon(callback)
        else:
            self._loop.call_soon_threadsafe(callback)

    def register(self, fileobj: HasFileno, events: int, callback: Callable[[int], object]) -> None:
        """Watch a descriptor."""
        self._watch(fileobj.fileno(), 0, events, callback)

    def modify(self, fileobj: HasFileno, events: int) -> None:
        """Watch it for something else."""
        before, callback = self._callbacks[fileobj.fileno()]
        self._watch(fileobj.fileno(), before, events, callback)

    def unregister(self, fileobj: HasFileno) -> None:
        """Watch it no more."""
        fd = fileobj.fileno()
        before, callback = self._callbacks[fd]
        self._watch(fd, before, 0, callback)
        del self._callbacks[fd]

    def _watch(self, fd: int, before: int, events: int, callback: Callable[[int], object]) -> None:
        loop = self._loop
        self._callbacks[fd] = (events, callback)
        if (before ^ events) & EVENT_READ:
            if events & EVENT_READ:
                loop.add_reader(fd, callback, EVENT_READ)
            else:
                loop.remove_reader(fd)
        if (before ^ events) & EVENT_WRITE:
            if events & EVENT_WRITE:
                loop.add_writer(fd, callback, EVENT_WRITE)
            else:
                loop.remove_writer(fd)


class Deadlines:
    """Time limits of many waits with one timer of the loop, as nearly all of them end before. A timer for each would be
    a fifth of what a query costs.

    Waits with the same limit run out in the order in which they began, so each limit has a queue.

    Args:
        expire: is given a waiter whose time is up, and the limit.
    """

    def __init__(self, expire: Callable[[Waiter, float], object]) -> None:
        self._expire = expire
        self._queues: dict[float, deque[tuple[float, Waiter]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._swept = 0

    def add(self, loop: asyncio.AbstractEventLoop, seconds: float, waiter: Waiter) -> None:
        """A wait begins."""
        queue = self._queues.get(seconds)
        if queue is None:
            queue = self._queues[seconds] = deque()
        # What has ended must not be kept for the rest of its time: with it goes the answer.
        while queue and queue[0][1].done:
            queue.popleft()
        due = loop.time() + seconds
        queue.append((due, waiter))
        if len(queue) >= 2 * self._swept + _SWEEP_WAITS:
            self._sweep(seconds, queue)
        if self._timer is None or due < self._due:
            self._arm(loop, due)

    def _sweep(self, seconds: float, queue: deque[tuple[float, Waiter]]) -> None:
        """The first one takes its time; the others that have ended go all the same."""
        left = self._queues[seconds] = deque(item for item in queue if not item[1].done)
        self._swept = len(left)

    def _arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = loop.call_at(due, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for seconds, queue in list(self._queues.items()):
            while queue and (queue[0][1].done or queue[0][0] <= now):
                _, waiter = queue.popleft()
                if not waiter.done:
                    self._expire(waiter, seconds)
            if not queue:
                del self._queues[seconds]
        if self._queues:
            self._arm(loop, min(queue[0][0] for queue in self._queues.values()))


class AsyncWaiting:
    """Suspends a coroutine until the session has something for it. Any of its waits may be cancelled."""

    def __init__(self, session: Session) -> None:
        self._correlation = session.correlation
        self._outbox = session.outbox
        self._outbox.on_room = self._on_room
        self._room: list[asyncio.Future[None]] = []
        self._deadlines = Deadlines(self._expire_query)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def belong_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on this is the client's loop; called on it."""
        self._loop = loop
        self._thread = threading.get_ident()

    @property
    def is_elsewhere(self) -> bool:
        """Whether the caller is on another thread than the client's loop."""
        return self._loop is not None and threading.get_ident() != self._thread

    def post(self, function: Callable[[], object]) -> None:
        """Make a call on the loop, soon; at once if this is its thread. Any thread."""
        if self._loop is None or not self.is_elsewhere:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

    def call(self, function: Callable[[], T]) -> T:
        """Make a call on the loop and return, or raise, what it does. Any thread."""
        if self._loop is None or not self.is_elsewhere:
            return function()

        async def make() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def send(self, sending: Sending) -> None:
        """Get an answer into the buffer. On the loop it does not wait for room; elsewhere the calling thread does.

        Raises:
            BufferFullError: there is no room.
        """
        if self._loop is not None and self.is_elsewhere:
            asyncio.run_coroutine_threadsafe(self.push(sending, None), self._loop).result()
        else:
            self._push_now(sending)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not None and loop is not self._loop:
            raise RuntimeError(
                "an AsyncEventClient belongs to the event loop on which it connected; from another thread, use "
                "asyncio.run_coroutine_threadsafe(...) with that loop"
            )
        return loop

    async def outcome(self, start: Callable[[Notify], Waiter | None], seconds: float | None) -> Any:
        """Start a request and wait for its outcome.

        Args:
            start: is given what to call when the outcome is there; returns None if there is nothing to wait for.
            seconds: None: as long as it takes.
        """
        future = self._own_loop().create_future()
        waiter = start(partial(wake_future, future))
        return await self._wait(waiter, future, seconds, seconds) if waiter is not None else None

    async def exchange(self, make: Callable[[Notify], Sending], seconds: float | None) -> Any:
        """Send a message and wait for its outcome; `seconds` are for both."""
        loop = self._own_loop()
        future = loop.create_future()
        sending = make(partial(wake_future, future))
        left = seconds
        if not sending.pack():
            begun = loop.time()
            await self.push(sending, seconds)
            left = None if seconds is None else begun + seconds - loop.time()
        assert sending.waiter is not None
        return await self._wait(sending.waiter, future, left, seconds)

    async def ask(self, asking: Asking) -> Any:
        """Ask a query; returns what the user is to get."""
        loop = self._own_loop()
        future = loop.create_future()
        seconds = asking.seconds
        waiter = asking.start(Resume(future))
        if waiter is None:
            return asking.finish(await self.exchange(asking.make, seconds))
        self._deadlines.add(loop, seconds, waiter)
        try:
            await future
        except BaseException:  # cancelled
            self._correlation.abandon(waiter)
            raise
        return asking.finish(waiter.result())

    async def carry(self, outgoing: Outgoing) -> Any:
        """Send a message; returns what the user is to get."""
        if outgoing.make is None:
            await asyncio.sleep(0)
            return None
        if outgoing.finish is None:
            await self.push(outgoing.make(None), outgoing.seconds)
            return None
        return outgoing.finish(await self.exchange(outgoing.make, outgoing.seconds))

    async def push(self, sending: Sending, seconds: float | None) -> None:
        """Get a message into the buffer, waiting for room.

        Raises:
            BufferFullError: there was none in time.
        """
        loop = self._own_loop()
        deadline: float | None = None
        while not sending.pack():
            if not self._outbox.want_room(sending.size):
                continue
            now = loop.time()
            if deadline is None and seconds is not None:
                deadline = now + seconds
            if deadline is not None and now >= deadline:
                raise self._full()
            await self._wait_for_room(loop, deadline)

    def _push_now(self, sending: Sending) -> None:
        while not sending.pack():
            if self._outbox.want_room(sending.size):
                raise self._full()

    def _full(self) -> BufferFullError:
        return BufferFullError(self._outbox.pending_bytes, self._outbox.high_bytes)

    async def _wait_for_room(self, loop: asyncio.AbstractEventLoop, deadline: float | None) -> None:
        future = loop.create_future()
        self._room.append(future)
        timer = loop.call_at(deadline, wake_future, future) if deadline is not None else None
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            with suppress(ValueError):  # there was room, and the list is a new one
                self._room.remove(future)

    def _on_room(self) -> None:
        self.post(self._wake_all)

    def _wake_all(self) -> None:
        waiting, self._room = self._room, []
        for future in waiting:
            wake_future(future)

    async def _wait(
        self, waiter: Waiter, future: asyncio.Future[None], left: float | None, seconds: float | None
    ) -> Any:
        timer: asyncio.TimerHandle | None = None
        if left is not None and seconds is not None:
            timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._expire, waiter, future, seconds)
        try:
            await future
        except BaseException:  # cancelled
            self._correlation.abandon(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return waiter.result()

    def _expire(self, waiter: Waiter, future: asyncio.Future[None], seconds: float) -> None:
        self._correlation.expire(waiter, seconds)
        wake_future(future)

    def _expire_query(self, waiter: Waiter, seconds: float) -> None:
        notify = waiter.notify
        self._correlation.expire(waiter, seconds)
        if notify is not None:
            notify()


class Tasks:
    """The tasks that run a client's handlers."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        """Run it, soon."""
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def busy(self) -> int:
        """How many there are."""
        return len(self._tasks)

    def _others(self) -> set[asyncio.Task[None]]:
        return self._tasks - {asyncio.current_task()}

    @property
    def is_inside(self) -> bool:
        """Whether the caller is one of them."""
        return asyncio.current_task() in self._tasks

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until none is at work, the caller's own not counted. Returns whether that came true in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while others := self._others():
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.wait(others, timeout=left)
        return True

    async def cancel(self) -> None:
        """End those that are at work, but the caller's own."""
        others = self._others()
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_CANCEL_S)


class Callbacks:
    """The user's `on_error` and `on_status`, which may be coroutine functions: those run one at a time, in order.

    Args:
        tasks: where they run.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._waiting: deque[Awaitable[object]] = deque()
        self._running = False

    def defer(self, call: Callable[[], object]) -> None:
        """Make a call in the loop's next turn."""
        asyncio.get_running_loop().call_soon(call)

    def wrap(self, callback: Callable[..., object] | None) -> Callable[..., object] | None:
        """The callback as a plain function."""
        return None if callback is None else partial(self._call, callback)

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        result = callback(*args)
        if isinstance(result, Awaitable):
            self._waiting.append(result)
            if not self._running:
                self._running = True
                self._tasks.spawn(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                try:
                    await self._waiting.popleft()
                except Exception:  # noqa: BLE001 - the user's code
                    _log.exception("a callback failed")
        finally:
            self._running = False
            while self._waiting:  # cancelled
                left = self._waiting.popleft()
                if isinstance(left, Coroutine):
                    left.close()


class AsyncDialler:
    """Makes a connector's connections, each in a task of its own.

    Args:
        dial: a coroutine function that connects.
    """

    def __init__(self, dial: Callable[[Server, float], Coroutine[Any, Any, Transport]]) -> None:
        self._dial = dial
        self._tasks: set[asyncio.Task[Transport]] = set()

    def __call__(self, server: Server, timeout_s: float, dialled: Dialled) -> None:
        """See `connector.Dial`."""
        task = asyncio.get_running_loop().create_task(self._dial(server, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, dialled))

    def _done(self, dialled: Dialled, task: asyncio.Task[Transport]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        dialled(error if error is not None else task.result())

    async def cancel(self) -> None:
        """End those that are at work; what they have is closed."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)


async def dial_async(server: Server, timeout_s: float) -> TcpTransport:
    """Connect to a server; to the first of a host's addresses that answers. Whoever asks keeps the time.

    Raises:
        ConnectError: names the address, the reason, and what to do.
    """
    loop = asyncio.get_running_loop()
    if isinstance(server, UnixAddress):
        try:
            return await _connected(loop, unix_socket(server), server.path)
        except OSError as exc:
            raise no_connection(server, _as_system_error(exc), timeout_s) from exc
    try:
        found = await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise unknown_host(server, exc) from exc
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, where in dict.fromkeys(found):
        try:
            return await _connected(loop, socket.socket(family, kind, protocol), where)
        except OSError as exc:
            failure = _as_system_error(exc)
    raise no_connection(server, failure, timeout_s) from failure


async def _connected(loop: asyncio.AbstractEventLoop, sock: socket.socket, where: Any) -> TcpTransport:
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, where)
        return TcpTransport(sock)
    except BaseException:
        sock.close()
        raise


def _as_system_error(error: OSError) -> OSError:
    """Asyncio adds the address to the words of the system; `ConnectError` names it already."""
    if error.errno is None or error.errno < 0:
        return error
    return type(error)(error.errno, os.strerror(error.errno))
