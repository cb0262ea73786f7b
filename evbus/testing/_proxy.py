"""A small proxy in front of a server, on a thread of its own, that can be told to misbehave."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from functools import partial

from evbus.acceptor import Acceptor
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor, Timer
from evbus.testing._faults import Faults, Flow, Link
from evbus.testing._record import Record
from evbus.transport import TcpTransport, listen_tcp, listen_unix

__all__ = ["Proxy"]

_READ_BYTES = 65536


class Proxy:
    """Takes connections and connects each to the server.

    Args:
        server: host and port; or the path of a Unix domain socket.
        record: gets what is published through it.

    Attributes:
        port: where it listens on 127.0.0.1; 0 for a server on a Unix domain socket.
        path: where it listens then, next to the server; else empty. Its file is left to whoever made the directory.
        faults: what it does wrong.
    """

    def __init__(self, server: tuple[str, int] | str, record: Record) -> None:
        self._server = server
        self._pairs: set[_Pair] = set()
        self._reactor = Reactor()
        self.port = 0
        self.path = f"{server}.proxy" if isinstance(server, str) else ""
        try:
            listeners = [listen_unix(self.path)] if self.path else listen_tcp("127.0.0.1", 0)
        except BaseException:
            self._reactor.close()
            raise
        if not self.path:
            self.port = listeners[0].getsockname()[1]
        self.faults = Faults(record, lambda: self._reactor.call_threadsafe(self._pump))
        self._acceptor = Acceptor(self._reactor, listeners, self._on_accept)
        self._thread = threading.Thread(target=self._run, name="evbus-testing-proxy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, and all its connections."""
        self._reactor.stop()
        self._thread.join()

    def _run(self) -> None:
        self._reactor.run()
        self._acceptor.close()
        for pair in list(self._pairs):
            pair.abort()
        with self.faults.lock:
            self.faults.changed = lambda: None
        self._reactor.close()

    def _on_accept(self, client: socket.socket, _peer: str) -> None:
        try:
            server = _connect(self._server)
        except OSError:  # as a client would see it without the proxy, but for the moment
            _reset(client)
            return
        self._pairs.add(_Pair(self._reactor, self.faults, self._pairs, client, server))

    def _pump(self) -> None:
        for pair in list(self._pairs):
            pair.pump()


class _Pair:
    """One connection through the proxy."""

    def __init__(
        self, reactor: Reactor, faults: Faults, pairs: set[_Pair], client: socket.socket, server: socket.socket
    ) -> None:
        self._reactor = reactor
        self._faults = faults
        self._pairs = pairs
        self._link: Link = faults.open()
        self._timer: Timer | None = None
        self._open = True
        self._halves = [_Half(client, server, self._link.up), _Half(server, client, self._link.down)]
        for half in self._halves:
            half.source.setblocking(False)
            if half.source.family != socket.AF_UNIX:
                half.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reactor.register(half.source, EVENT_READ, partial(self._on_ready, half))

    def _on_ready(self, half: _Half, mask: int) -> None:
        try:
            if mask & EVENT_READ:
                with self._faults.lock:
                    half.read()
        except OSError:
            self.abort()
            return
        self.pump()

    def pump(self) -> None:
        """Send on what may pass, and wait for what comes next."""
        if not self._open:
            return
        with self._faults.lock:
            try:
                for half in self._halves:
                    if self._link.broken:
                        break
                    half.write()
                    if half.flow.must_cut:
                        self._faults.cut(self._link)
                        # Whoever reads has got exactly so many bytes, and the end of the stream behind them.
                        with suppress(OSError):
                            half.target.shutdown(socket.SHUT_WR)
            except OSError:
                self.abort()
                return
            if self._link.broken:
                self.abort()
            elif all(half.ended for half in self._halves):
                self._close(reset=False)
            else:
                self._wait()

    def _wait(self) -> None:
        up, down = self._halves
        for half, other in ((up, down), (down, up)):  # a socket is one half's source and the other's target
            events = (EVENT_READ if half.flow.room > 0 else 0) | (EVENT_WRITE if other.blocked else 0)
            self._reactor.modify(half.source, events)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [half.flow.due for half in self._halves if not half.blocked]
        times = [when for when in due if when is not None]
        if times:
            self._timer = self._reactor.call_at(min(times), self.pump)

    def abort(self) -> None:
        """Reset both sides."""
        self._close(reset=True)

    def _close(self, *, reset: bool) -> None:
        if not self._open:
            return
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        self._pairs.discard(self)
        self._faults.gone(self._link)
        for half in self._halves:
            self._reactor.unregister(half.source)
            if reset:
                _reset(half.source)
            else:
                half.source.close()


class _Half:
    """One direction of a pair."""

    def __init__(self, source: socket.socket, target: socket.socket, flow: Flow) -> None:
        self.source = source
        self.target = target
        self.flow = flow
        self.blocked = False  # the target takes nothing at the moment
        self.ended = False  # the end of the stream has passed

    def read(self) -> None:
        room = min(self.flow.room, _READ_BYTES)
        if room <= 0:
            return
        try:
            data = self.source.recv(room)
        except (BlockingIOError, InterruptedError):
            return
        if data:
            self.flow.put(data, time.monotonic())
        else:
            self.flow.end(time.monotonic())

    def write(self) -> None:
        self.blocked = False
        while not self.ended and not self.flow.must_cut:
            data = self.flow.peek(time.monotonic(), _READ_BYTES)
            if data is None:
                return
            if not data:
                self.flow.consume(0)
                self.ended = True
                with suppress(OSError):
                    self.target.shutdown(socket.SHUT_WR)
                return
            try:
                sent = self.target.send(data)
            except (BlockingIOError, InterruptedError):
                self.blocked = True
                return
            self.flow.consume(sent)


def _connect(server: tuple[str, int] | str) -> socket.socket:
    if not isinstance(server, str):
        return socket.create_connection(server, timeout=5.0)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(server)
    except BaseException:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    TcpTransport(sock, "").abort()
