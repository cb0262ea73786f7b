"""A network in memory: transports, and reactors that wait for them, with neither sockets nor descriptors."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from evbus import _io
from evbus._frame import READ_BYTES, Ring
from evbus.aio_loop import LoopReactor
from evbus.dial import Server
from evbus.errors import ConnectError
from evbus.limits import Limits
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor
from evbus.server_core import ServerCore
from evbus.testing._faults import Faults, Flow, Link
from evbus.testing._record import Record
from evbus.transport import Transport

__all__ = ["MemoryServer"]


class MemoryTransport:
    """One end of a connection in memory, see `evbus.transport.Transport`.

    Args:
        net: where it is.
        link: the connection.
        inp, out: its two directions, as this end sees them.
        peer: the other side, for logs.
    """

    def __init__(self, net: _Net, link: Link, inp: Flow, out: Flow, peer: str) -> None:
        self.peer = peer
        self._net = net
        self._link = link
        self._inp = inp
        self._out = out
        self._fd = next(net.numbers)
        net.transports[self._fd] = self

    def fileno(self) -> int:
        """A number that no descriptor has to do with."""
        return self._fd

    def readiness(self, now: float) -> int:
        """What can be done now."""
        if self._link.broken:
            return EVENT_READ | EVENT_WRITE
        mask = EVENT_READ if self._inp.must_cut or self._inp.is_ready(now) else 0
        return mask | EVENT_WRITE if self._out.room > 0 or self._out.ended else mask

    @property
    def due(self) -> float | None:
        """When there will be something to read, as far as time alone decides."""
        return self._inp.due

    def fill(self, ring: Ring, limit: int) -> int:
        """See `Transport`."""
        with self._net.faults.lock:
            self._check()
            room = min(ring.make_room(limit), READ_BYTES)
            if room <= 0:
                return -1
            data = None if self._inp.must_cut else self._inp.peek(time.monotonic(), room)
            if data:
                ring.write(data)
                self._inp.consume(len(data))
                self._net.changed()
            else:
                ring.fit()
            if self._inp.must_cut:
                self._net.faults.cut(self._link)
                if not data:
                    self._check()
            return -1 if data is None else len(data)

    def flush(self, ring: Ring) -> int:
        """See `Transport`."""
        with self._net.faults.lock:
            try:
                self._check()
                if self._out.ended:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                size = min(len(ring), self._out.room)
                if size > 0:
                    self._out.put(ring.take(size), time.monotonic())
                    self._net.changed()
                return len(ring)
            finally:
                _io.settle(ring)

    def _check(self) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._link.broken:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def shutdown_write(self) -> None:
        """See `Transport`."""
        with self._net.faults.lock:
            self._out.end(time.monotonic())
            self._net.changed()

    def close(self) -> None:
        """See `Transport`."""
        with self._net.faults.lock:
            if self._fd >= 0:
                self._out.end(time.monotonic())
                self._inp.ended = True  # the other side can write no more
                self._leave()

    def abort(self) -> None:
        """See `Transport`."""
        with self._net.faults.lock:
            if self._fd >= 0:
                self._link.broken = True
                self._leave()

    def _leave(self) -> None:
        del self._net.transports[self._fd]
        self._fd = -1
        if not any(other._link is self._link for other in self._net.transports.values()):
            self._net.faults.gone(self._link)
        self._net.changed()


class _Net:
    """Everything that selectors look at, under one lock."""

    def __init__(self, record: Record) -> None:
        self.faults = Faults(record, self.changed)
        self.condition = threading.Condition(self.faults.lock)
        self.numbers = itertools.count(1)
        self.transports: dict[int, MemoryTransport] = {}
        self.loops: set[MemoryLoop] = set()

    def changed(self) -> None:
        """Something may be ready that was not. The lock is held."""
        self.condition.notify_all()
        for loop in list(self.loops):
            loop.changed()

    def reactor(self) -> Reactor:
        """An event loop that waits for what happens here."""
        selector = _Selector(self)
        return Reactor(selector=selector, wakeup=selector)


class _Selector(selectors.BaseSelector):
    """Waits for transports in memory, and is its reactor's waker too."""

    def __init__(self, net: _Net) -> None:
        self._net = net
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._woken = False

    # ---- the waker ----

    def fileno(self) -> int:
        """There is nothing to watch."""
        return -1

    def wake(self) -> None:
        """End the wait, or the next one."""
        with self._net.condition:
            self._woken = True
            self._net.condition.notify_all()

    def drain(self) -> None:
        """`select` has done it."""

    # ---- the selector ----

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See `selectors`."""
        with self._net.condition:
            if fileobj not in self._net.transports:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            key = self._keys[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
            return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """See `selectors`."""
        return self._keys.pop(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See `selectors`."""
        key = self._keys[fileobj] = self._keys[fileobj]._replace(events=events, data=data)
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """See `selectors`."""
        return self._keys

    def close(self) -> None:
        """See `selectors`."""
        self._keys.clear()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._net.condition:
            while True:
                now = time.monotonic()
                ready: list[tuple[selectors.SelectorKey, int]] = []
                until = deadline
                for fd, key in self._keys.items():
                    transport = self._net.transports.get(fd)
                    if transport is None:
                        continue
                    mask = transport.readiness(now) & key.events
                    if mask:
                        ready.append((key, mask))
                    due = transport.due
                    if due is not None and due > now and (until is None or due < until):
                        until = due
                if ready or self._woken or (deadline is not None and now >= deadline):
                    self._woken = False
                    return ready
                self._net.condition.wait(None if until is None else max(until - now, 0.0))


class MemoryLoop(LoopReactor):
    """An asyncio loop that waits for transports in memory.

    Nothing wakes such a loop but a call from the thread where something changed; it then looks at what it waits for.
    """

    def __init__(self, net: _Net, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._net = net
        self._timer: asyncio.TimerHandle | None = None
        self._looking = False  # a look is under way to the loop

    def changed(self) -> None:
        """Something may be ready. The net's lock is held; any thread."""
        if not self._looking:
            try:
                self._loop.call_soon_threadsafe(self._look)
                self._looking = True
            except RuntimeError:  # the loop has ended, and its client with it
                self._net.loops.discard(self)

    def _watch(self, fd: int, _before: int, events: int, callback: Callable[[int], object]) -> None:
        with self._net.condition:
            self._callbacks[fd] = (events, callback)
            if events:
                self._net.loops.add(self)
                self.changed()
            elif all(other == fd for other in self._callbacks):
                self._net.loops.discard(self)

    def _look(self) -> None:
        """Tell what is ready; what is still ready then is told in the loop's next turn."""
        ready: list[tuple[Callable[[int], object], int]] = []
        with self._net.condition:
            self._looking = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            now = time.monotonic()
            due: list[float] = []
            for fd, (events, callback) in self._callbacks.items():
                transport = self._net.transports.get(fd)
                if transport is None:
                    continue
                mask = transport.readiness(now) & events
                if mask:
                    ready.append((callback, mask))
                if transport.due is not None and transport.due > now:
                    due.append(transport.due - now)
            if ready:
                self.changed()
            elif due:
                self._timer = self._loop.call_later(min(due), self._look_again)
        for callback, mask in ready:
            callback(mask)

    def _look_again(self) -> None:
        self._timer = None
        self._look()


class MemoryServer:
    """The server's core on a thread of its own, and the network that leads to it.

    Args:
        limits: what it grants its peers.
        record: gets what is published.
    """

    def __init__(self, limits: Limits, record: Record) -> None:
        self._net = _Net(record)
        self.faults = self._net.faults
        self._reactor = self._net.reactor()
        self._core = ServerCore(self._reactor, limits)
        self._closed = False
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._reactor.run, name="evbus-testing-memory", daemon=True)
        self._thread.start()

    def reactor(self) -> Reactor:
        """A loop for a client of this server."""
        return self._net.reactor()

    def loop(self, loop: asyncio.AbstractEventLoop) -> LoopReactor:
        """An asyncio loop as a client of this server sees it."""
        return MemoryLoop(self._net, loop)

    async def dial_async(self, address: Server, timeout_s: float) -> Transport:
        """See `dial`, which does not block."""
        return self.dial(address, timeout_s)

    def dial(self, address: Server, _timeout_s: float) -> Transport:
        """A new connection to the server."""
        with self.faults.lock:
            if self._closed:
                raise ConnectError(str(address), "the bus in memory is closed", errno.ECONNREFUSED)
            link = self.faults.open()
            number = next(self._numbers)
            client = MemoryTransport(self._net, link, link.down, link.up, "memory")
            server = MemoryTransport(self._net, link, link.up, link.down, f"memory:{number}")
        self._reactor.call_threadsafe(lambda: self._core.add(server))
        return client

    def stats(self) -> dict[str, object]:
        """See `EventServer.stats`."""
        return self._core.broker.stats()

    def close(self) -> None:
        """End all connections, and the thread."""
        with self.faults.lock:
            if self._closed:
                return
            self._closed = True
            self.faults.pause(False)
            self.faults.delay(0.0)

        def end() -> None:
            self._core.close_all()
            self._core.when_gone(self._reactor.stop)

        self._reactor.call_threadsafe(end)
        self._thread.join()
        self._reactor.close()
