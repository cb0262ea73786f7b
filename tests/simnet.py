"""A simulated network: the real reactor, server and clients in one thread, over pipes in memory, under a seed.

    net = SimNet(seed=7)
    core = ServerCore(net.reactor(), limits, wall_ms=net.wall_ms)
    Acceptor(net.reactor(), [net.listen()], lambda transport, peer: core.add(transport))
    transport = net.connect()                     # a SimTransport; register it with net.reactor()
    net.run(300)
    net.settle()                                  # no more faults: let everything arrive
    print(net.trace_hash())                       # the same for the same seed, bit for bit

What is real: every line of evbus above the transport, and the reactor itself. What is simulated is below it: the
selector, the clock, the listener, and `fill` and `flush`. One `step` is one thing that happens: some bytes of one
direction of one connection arrive, a turn of the loop, a little time (or, when nothing else can happen, the time until
the next timer), or a fault. All choices come from one `random.Random`, so a seed and the code decide everything;
nothing here depends on the wall clock, on addresses of objects, on the order of a set, or on threads.

The network keeps TCP's promises: bytes arrive once and in order or the connection breaks; a writer that is faster than
the reader is stopped (`capacity`); an end of stream comes behind the bytes; a reset destroys what is still on its way;
data for a closed socket is answered by a reset; descriptor numbers are used again at once, the lowest first. It takes
every liberty that TCP leaves: reads and writes of any length, refusal of a write on a writable socket, readiness that
turns out wrong, delays, stalls. Three planted faults break the promises on purpose, to show that the checks of a test
would notice: `swap_chunks`, `lose_rest`, `duplicate_chunk`.
"""

from __future__ import annotations

import errno
import heapq
import os
import random
import selectors
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from evbus import _io
from evbus._frame import READ_BYTES, Ring
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor

SERVER = ("10.0.0.1", 9100)

# What travels through a pipe.
DATA, END, RESET, REFUSED, SYN, SYN_ACK = range(6)

_WALL_START_MS = 1_800_000_000_000


@dataclass(slots=True)
class Faults:
    """How rough the network is: probabilities, and lengths of time in seconds of the simulated clock."""

    partial_read: float = 0.25  # a read gives only a part of what is there
    partial_write: float = 0.25  # a write takes only a part of what fits, or, one time in five, nothing
    partial_arrival: float = 0.25  # a chunk arrives in two parts
    delay: float = 0.1  # a chunk takes up to `max_delay_s` instead of no time
    max_delay_s: float = 0.05
    spurious: float = 0.02  # a descriptor is reported ready that is not
    reset: float = 0.0  # per step: a connection breaks
    stall: float = 0.0  # per step: one direction of a connection stands still for up to `max_stall_s`
    max_stall_s: float = 2.0
    # Planted: a network or a transport that breaks its promises.
    swap_chunks: float = 0.0  # two chunks overtake each other
    lose_rest: float = 0.0  # what a partial write did not take is forgotten
    duplicate_chunk: float = 0.0  # a chunk arrives twice


#: A network without any fault or liberty.
CALM = Faults(partial_read=0, partial_write=0, partial_arrival=0, delay=0, spurious=0)


class SimClock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Waker:
    """There is one thread: nobody else wakes the loop."""

    def fileno(self) -> int:
        return -1

    def wake(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class SimSelector(selectors.BaseSelector):
    """Readiness of simulated descriptors. Never waits: time passes by steps of the network only."""

    def __init__(self, net: SimNet) -> None:
        self._net = net
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd not in self._net.descriptors:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if fd in self._keys:
            raise KeyError(f"{fd} is registered already")
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj if isinstance(fileobj, int) else fileobj.fileno()]
        key = self._keys[key.fd] = key._replace(events=events, data=data)
        return key

    def is_registered(self, fd: int) -> bool:
        return fd in self._keys

    def any_ready(self) -> bool:
        """Whether a turn of the loop would have a descriptor to look at; without spurious ones."""
        descriptors = self._net.descriptors
        return any(descriptors[fd].readiness() & key.events for fd, key in self._keys.items())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        net = self._net
        spurious = net.faults.spurious
        ready = []
        for fd, key in self._keys.items():
            mask = net.descriptors[fd].readiness() & key.events
            if spurious and net.rng.random() < spurious:
                mask = key.events
            if mask:
                ready.append((key, mask))
        if len(ready) > 1:
            net.rng.shuffle(ready)
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()


class _Pipe:
    """One direction of a connection: what is on its way, and what has arrived and was not yet read."""

    __slots__ = ("arrived", "capacity", "flying", "flying_bytes", "name", "sink", "source", "stalled_until")

    def __init__(self, name: str, source: _End, sink: _End, capacity: int) -> None:
        self.name = name
        self.source = source
        self.sink = sink
        self.capacity = capacity
        self.flying: deque[tuple[int, bytes, float]] = deque()  # kind, data, when it can arrive
        self.flying_bytes = 0
        self.arrived = bytearray()
        self.stalled_until = 0.0

    def when(self) -> float:
        """When its first chunk can arrive."""
        return max(self.flying[0][2], self.stalled_until)

    def space(self) -> int:
        return self.capacity - self.flying_bytes - len(self.arrived)


class SimTransport:
    """One end of a simulated connection: a `Transport`, and what `accept` of a simulated listener returns."""

    def __init__(self, net: SimNet, name: str, local: tuple[str, int], remote: tuple[str, int]) -> None:
        self.net = net
        self.name = name
        self.local = local
        self.remote = remote
        self.peer = f"{remote[0]}:{remote[1]}"
        self.established = False
        self.ended = False  # the peer's end of stream has arrived
        self.write_ended = False  # ours was sent
        self.broken: OSError | None = None  # what the next call raises
        self.dead = False  # it was raised
        self.inp: _Pipe
        self.out: _Pipe
        self._fd = net.new_descriptor(self)

    def __repr__(self) -> str:
        return f"<SimTransport {self.name} fd {self._fd}>"

    # ---- the descriptor ----

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def readiness(self) -> int:
        if self.broken is not None or self.dead:
            return EVENT_READ | EVENT_WRITE
        if not self.established:
            return 0
        mask = EVENT_READ if self.inp.arrived or self.ended else 0
        if self.write_ended or self.out.space() > 0:
            mask |= EVENT_WRITE
        return mask

    # ---- Transport ----

    def fill(self, ring: Ring, limit: int) -> int:
        net = self.net
        self._check_open()
        arrived = self.inp.arrived
        if arrived:
            n = min(len(arrived), ring.make_room(limit), READ_BYTES)
            if n == 0:
                net.note("full", self.name)
                return -1
            if n > 1 and net.chance(net.faults.partial_read):
                n = net.rng.randint(1, n)
            data = bytes(arrived[:n])
            del arrived[:n]
            ring.write(data)
            net.note("read", self.name, n, zlib.crc32(data))
            return n
        ring.fit()
        if self.broken is not None:
            raise self._broken_now()
        return 0 if self.ended or self.dead else -1

    def flush(self, ring: Ring) -> int:
        net = self.net
        self._check_open()
        total = len(ring)
        if not total:
            return 0
        try:
            if self.broken is not None:
                raise self._broken_now()
            if self.dead or self.write_ended:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            space = self.out.space() if self.established else 0
            n = min(total, space)
            if n > 0 and net.chance(net.faults.partial_write):
                n = net.rng.randint(1, n) if net.chance(0.8) else 0
            if n <= 0:
                return total
            data = ring.take(n)
            net.note("write", self.name, n, zlib.crc32(data))
            net.send(self.out, DATA, data)
            if n < total and net.chance(net.faults.lose_rest):
                net.note("planted lose_rest", self.name, total - n)
                ring.clear()
            return len(ring)
        finally:
            _io.settle(ring)  # as the real one: afterwards nothing is lent

    def shutdown_write(self) -> None:
        if self._fd >= 0 and not self.write_ended and self.established and not self._is_broken():
            self.write_ended = True
            self.net.note("shutdown", self.name)
            self.net.send(self.out, END)

    def close(self) -> None:
        if self._fd < 0:
            return
        if self.inp.arrived or not self.established:
            self.abort()  # unread input: the system resets
            return
        self.shutdown_write()
        self.net.note("close", self.name)
        self._free()

    def abort(self) -> None:
        if self._fd < 0:
            return
        net = self.net
        net.note("abort", self.name)
        if not self._is_broken():
            if self.established:
                # Some of what is on its way may be ahead of the reset.
                net.cut(self.out, net.rng.randint(0, len(self.out.flying)))
                net.send(self.out, RESET)
            else:
                net.cut(self.out, 0)
        self._free()

    # ---- what happens to it ----

    def _check_open(self) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _is_broken(self) -> bool:
        return self.broken is not None or self.dead

    def _broken_now(self) -> OSError:
        exc, self.broken, self.dead = self.broken, None, True
        assert exc is not None
        return exc

    def _free(self) -> None:
        self.inp.arrived.clear()
        self.net.free_descriptor(self)
        self._fd = -1

    def reset(self, kind: type[OSError] = ConnectionResetError, code: int = errno.ECONNRESET) -> None:
        """The connection is broken from here on; what has arrived can still be read."""
        if self._fd >= 0 and not self._is_broken():
            self.broken = kind(code, os.strerror(code))
        self.net.cut(self.out, 0)


class _Unborn:
    """Stands at the far end of a connection until a listener has heard of it."""

    __slots__ = ("inp", "local", "name", "out", "remote")

    def __init__(self, name: str, local: tuple[str, int], remote: tuple[str, int]) -> None:
        self.name = name
        self.local = local
        self.remote = remote
        self.inp: _Pipe
        self.out: _Pipe

    def fileno(self) -> int:
        return -1


class SimListener:
    """A listening socket; register it with an `Acceptor`.

    Attributes:
        errors: raised by the next calls of `accept`, one each; the waiting connection stays.
    """

    def __init__(self, net: SimNet, address: tuple[str, int], backlog: int) -> None:
        self.net = net
        self.address = address
        self.backlog = backlog
        self.waiting: deque[SimTransport] = deque()
        self.errors: deque[OSError] = deque()
        self._fd = net.new_descriptor(self)

    def fileno(self) -> int:
        return self._fd

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def readiness(self) -> int:
        return EVENT_READ if self.waiting else 0

    def accept(self) -> tuple[SimTransport, tuple[str, int]]:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self.errors:
            raise self.errors.popleft()
        transport = self.waiting.popleft()
        self.net.note("accept", transport.name)
        return transport, transport.remote

    def close(self) -> None:
        if self._fd < 0:
            return
        for transport in self.waiting:
            transport.abort()
        self.waiting.clear()
        del self.net.listeners[self.address]
        self.net.free_descriptor(self)
        self._fd = -1


_End = SimTransport | _Unborn


class SimNet:
    """See the module's docstring.

    Args:
        seed: decides everything.
        faults: how rough the network is; may be changed at any time.
        capacity: bytes that one direction of a connection holds before its writer has to wait.

    Attributes:
        trace: what happened, as tuples: step, what, who, details.
        errors: exceptions of the reactor's callbacks, with the callback.
        steps: steps made.
    """

    def __init__(self, seed: int, faults: Faults | None = None, *, capacity: int = 16 * 1024) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = replace(faults) if faults is not None else Faults()
        self.capacity = capacity
        self.clock = SimClock()
        self.trace: list[tuple[object, ...]] = []
        self.errors: list[tuple[Exception, object]] = []
        self.steps = 0
        self.selector = SimSelector(self)
        self.listeners: dict[tuple[str, int], SimListener] = {}
        self.descriptors: dict[int, SimTransport | SimListener] = {}
        self._free_numbers: list[int] = []
        self._connections = 0
        self._pairs: list[tuple[SimTransport, SimTransport]] = []
        self._moving: dict[_Pipe, None] = {}  # with something on its way; a dict, for its order
        self._reactor = Reactor(
            selector=self.selector, clock=self.clock, wakeup=_Waker(), on_error=lambda *what: self.errors.append(what)
        )

    def __repr__(self) -> str:
        return f"SimNet(seed={self.seed}, step {self.steps}, {self.faults})"

    # ---- for participants ----

    def reactor(self) -> Reactor:
        """The one reactor, shared by everybody."""
        return self._reactor

    def wall_ms(self) -> int:
        """A wall clock: Unix milliseconds."""
        return _WALL_START_MS + int(self.clock.now * 1000)

    def listen(self, address: tuple[str, int] = SERVER, backlog: int = 16) -> SimListener:
        """Listen; connections to the address are refused before."""
        assert address not in self.listeners
        listener = self.listeners[address] = SimListener(self, address, backlog)
        return listener

    def connect(self, address: tuple[str, int] = SERVER) -> SimTransport:
        """Begin a connection. As on a nonblocking socket, it is writable once established or refused; then `flush` and
        `fill` raise ConnectionRefusedError."""
        number = self._connections = self._connections + 1
        local = (f"10.0.1.{number % 250 + 1}", 40_000 + number)
        client = SimTransport(self, f"c{number}", local, address)
        server = _Unborn(f"s{number}", address, local)
        up = _Pipe(f"c{number}>", client, server, self.capacity)
        down = _Pipe(f"s{number}>", server, client, self.capacity)
        client.inp = server.out = down
        client.out = server.inp = up
        self.note("connect", client.name)
        self.send(up, SYN)
        return client

    # ---- what can happen ----

    def step(self) -> bool:
        """Let one thing happen. False if nothing can, and nothing ever will unless somebody does something."""
        self.steps += 1
        faults, rng = self.faults, self.rng
        if faults.reset and rng.random() < faults.reset and self._alive():
            self.break_one()
            return True
        if faults.stall and rng.random() < faults.stall and self._alive():
            self.stall(rng.choice(rng.choice(self._pairs)), rng.random() * faults.max_stall_s)
            return True
        now = self.clock.now
        arriving = [pipe for pipe in self._moving if pipe.flying[0][2] <= now and pipe.stalled_until <= now]
        work = self._reactor.has_work or self.selector.any_ready()
        roll = rng.random()
        if arriving and (roll < 0.5 or not work):
            self.deliver(arriving[int(rng.random() * len(arriving))])
        elif work and roll < 0.95:
            self.turn()
        elif arriving or work:
            self.advance(rng.random() ** 3 * 0.02)
        else:
            next_event = self.next_event()
            if next_event is None:
                return False
            self.advance(max(next_event - now, 0.0))
        return True

    def run(self, steps: int) -> None:
        """So many steps, fewer if nothing can happen any more."""
        for _ in range(steps):
            if not self.step():
                return

    def run_until(self, condition: Callable[[], object], steps: int = 10_000) -> None:
        """Steps until a condition holds.

        Raises:
            AssertionError: it does not come true.
        """
        for _ in range(steps):
            if condition():
                return
            if not self.step():
                break
        assert condition(), f"{self}: the condition did not come true"

    def settle(self, seconds: float = 0.0, steps: int = 100_000) -> None:
        """From here on no faults: let everything arrive and be worked on.

        Args:
            seconds: after that, go on with timers that are due within so many seconds.
            steps: where it gives up.

        Raises:
            AssertionError: it does not come to rest.
        """
        self.faults = replace(CALM)
        for pipe in self._moving:
            pipe.stalled_until = 0.0
        end = self.clock.now + seconds
        for _ in range(steps):
            self.steps += 1
            if self._reactor.has_work or self.selector.any_ready():
                self.turn()
            elif self._moving:
                pipe = min(self._moving, key=_Pipe.when)  # the first of equal ones
                self.advance(max(pipe.when() - self.clock.now, 0.0))
                self.deliver(pipe)
            else:
                timer = self._reactor.next_timer()
                if timer is None or timer > end:
                    self.advance(max(end - self.clock.now, 0.0))
                    return
                self.advance(timer - self.clock.now)
        raise AssertionError(f"{self}: did not come to rest")

    def turn(self) -> None:
        """One turn of the loop."""
        self.note("turn")
        self._reactor.run_once(0)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds:
            self.clock.now += seconds
            self.note("time", round(self.clock.now, 9))

    def next_event(self) -> float | None:
        """When the next timer is due, or something on its way may arrive; None if there is neither."""
        times = [pipe.when() for pipe in self._moving]
        timer = self._reactor.next_timer()
        if timer is not None:
            times.append(timer)
        return min(times, default=None)

    def deliver(self, pipe: _Pipe) -> None:
        """The next chunk of a pipe arrives, or a part of it."""
        faults, rng = self.faults, self.rng
        flying = pipe.flying
        if len(flying) > 1 and self.chance(faults.swap_chunks) and flying[0][0] == flying[1][0] == DATA:
            flying[0], flying[1] = flying[1], flying[0]
            self.note("planted swap_chunks", pipe.name)
        kind, data, at = flying.popleft()
        if kind == DATA:
            if len(data) > 1 and self.chance(faults.partial_arrival):
                n = rng.randint(1, len(data) - 1)
                flying.appendleft((DATA, data[n:], at))
                data = data[:n]
            elif self.chance(faults.duplicate_chunk):
                self.note("planted duplicate_chunk", pipe.name)
                flying.appendleft((DATA, data, at))
                pipe.flying_bytes += len(data)
            pipe.flying_bytes -= len(data)
        if not flying:
            del self._moving[pipe]
        self.note("arrive", pipe.name, kind, len(data))
        self._arrived(pipe, kind, data)

    def _arrived(self, pipe: _Pipe, kind: int, data: bytes) -> None:
        sink = pipe.sink
        if isinstance(sink, _Unborn):
            assert kind == SYN
            self._on_syn(pipe, sink)
        elif kind == RESET:
            sink.reset()
        elif sink.fileno() < 0:
            # Nobody there: whoever sent it is told, unless it has gone too.
            if kind in (DATA, SYN_ACK):
                self.cut(pipe, 0)
                if pipe.source.fileno() >= 0:
                    self.send(sink.out, RESET)
        elif sink._is_broken():
            pass
        elif kind == DATA:
            pipe.arrived += data
        elif kind == END:
            sink.ended = True
        elif kind == SYN_ACK:
            sink.established = True
        elif kind == REFUSED:
            sink.reset(ConnectionRefusedError, errno.ECONNREFUSED)

    def _on_syn(self, pipe: _Pipe, unborn: _Unborn) -> None:
        listener = self.listeners.get(unborn.local)
        if listener is None:
            self.send(unborn.out, REFUSED)
        elif len(listener.waiting) >= listener.backlog:
            pipe.flying.appendleft((SYN, b"", self.clock.now + 1.0))  # dropped, and sent again
            self._moving[pipe] = None
        else:
            server = SimTransport(self, unborn.name, unborn.local, unborn.remote)
            server.inp, server.out = pipe, unborn.out
            pipe.sink = unborn.out.source = server
            server.established = True
            listener.waiting.append(server)
            assert isinstance(pipe.source, SimTransport)
            self._pairs.append((pipe.source, server))
            self.send(server.out, SYN_ACK)

    # ---- faults by hand ----

    def break_one(self, transport: SimTransport | None = None) -> None:
        """Break a connection (a random one by default): both ends see a reset, what is on its way is lost."""
        alive = [pair for pair in self._alive() if transport is None or transport in pair]
        if alive:
            client, server = alive[int(self.rng.random() * len(alive))]
            self.note("break", client.name)
            client.reset()
            server.reset()

    def stall(self, transport: SimTransport, seconds: float) -> None:
        """Nothing that the transport writes arrives for so long."""
        pipe = transport.out
        pipe.stalled_until = max(pipe.stalled_until, self.clock.now + seconds)
        self.note("stall", pipe.name)

    def _alive(self) -> list[tuple[SimTransport, SimTransport]]:
        # A pair is over when both are closed, or broken: then there is nothing left that a fault could do.
        self._pairs = [pair for pair in self._pairs if any(end.fileno() >= 0 and not end._is_broken() for end in pair)]
        return self._pairs

    # ---- for the parts ----

    def send(self, pipe: _Pipe, kind: int, data: bytes = b"") -> None:
        """Put a chunk on its way."""
        at = self.clock.now
        if self.chance(self.faults.delay):
            at += self.rng.random() * self.faults.max_delay_s
        if pipe.flying:
            at = max(at, pipe.flying[-1][2])  # nobody overtakes
        pipe.flying.append((kind, data, at))
        pipe.flying_bytes += len(data)
        self._moving[pipe] = None

    def cut(self, pipe: _Pipe, keep: int) -> None:
        """What is on its way behind the first `keep` chunks is lost."""
        while len(pipe.flying) > keep:
            pipe.flying_bytes -= len(pipe.flying.pop()[1])
        if not pipe.flying:
            self._moving.pop(pipe, None)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def note(self, what: str, *details: object) -> None:
        """Add to the trace."""
        self.trace.append((self.steps, what, *details))

    def trace_hash(self) -> str:
        """Of all that happened, the bytes written and read included (by their checksums)."""
        return sha256(repr(self.trace).encode()).hexdigest()

    def planted(self, name: str) -> int:
        """How often a planted fault has struck."""
        return sum(entry[1] == f"planted {name}" for entry in self.trace)

    def new_descriptor(self, owner: SimTransport | SimListener) -> int:
        fd = heapq.heappop(self._free_numbers) if self._free_numbers else 3 + len(self.descriptors)
        self.descriptors[fd] = owner
        return fd

    def free_descriptor(self, owner: SimTransport | SimListener) -> None:
        fd = owner.fileno()
        assert not self.selector.is_registered(fd), f"{owner} is closed while it is registered"
        del self.descriptors[fd]
        heapq.heappush(self._free_numbers, fd)
