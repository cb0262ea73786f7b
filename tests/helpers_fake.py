"""A server that is played by a function, over every kind of network that a `Bus` can have.

It speaks by `reference`, not by evbus's own codec, and runs on a reactor: over sockets on a real one, in memory on one
that waits for memory.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, final

import reference as ref

from evbus._frame import Ring
from evbus.dial import Address, Server, UnixAddress, dial
from evbus.reactor import EVENT_READ, EVENT_WRITE, Reactor
from evbus.testing import Bus, MemoryBus
from evbus.testing._memory import MemoryTransport
from evbus.transport import TcpTransport, Transport

__all__ = ["FakeNetwork", "Peer", "Play"]

_LIMIT = 1 << 20


@final
class Peer:
    """One connection of a played server."""

    def __init__(self, reactor: Reactor, transport: Transport, play: Play) -> None:
        self._reactor = reactor
        self._transport = transport
        self._play = play
        self._in, self._out = Ring(), Ring()
        self._decoder = ref.Decoder(ref.layout_of(ref.EVBUS_2))
        self._events = EVENT_READ
        reactor.register(transport, EVENT_READ, self._on_ready)
        play(self, None)

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._out.write(data)
        self._flush()

    def send(self, object_id: int, version: int = 1, **fields: Any) -> None:
        """Send one packet."""
        self.send_bytes(ref.encode(ref.EVBUS_2, object_id, fields, version=version))

    def serve(self, packet: ref.Packet) -> None:
        """Be a server that accepts everything and does nothing."""
        if packet.object_id == ref.HANDSHAKE:
            self.send(ref.RESPONSE, TaskId=packet.fields["TaskId"], Status=ref.SUCCESS, Message='evbus/1 {"version":2}')
        elif packet.object_id == ref.HEARTBEAT:
            self.send(ref.HEARTBEAT, TaskId=packet.fields["TaskId"])
        elif packet.object_id in (ref.SUBSCRIBE, ref.UNSUBSCRIBE) and packet.fields["TaskId"]:
            self.send(ref.RESPONSE, TaskId=packet.fields["TaskId"], Status=ref.SUCCESS)

    def close(self) -> None:
        """End the connection."""
        if self._transport.fileno() >= 0:
            self._reactor.unregister(self._transport)
            self._transport.close()

    def _on_ready(self, mask: int) -> None:
        try:
            if mask & EVENT_READ:
                size = self._transport.fill(self._in, _LIMIT)
                if size == 0:
                    self.close()
                    return
                self._decoder.feed(self._in.take(len(self._in)))
                while isinstance(frame := self._decoder.next(), ref.Frame):
                    self._play(self, ref.decode(frame, ref.EVBUS_2))
            self._flush()
        except OSError:
            self.close()

    def _flush(self) -> None:
        if self._transport.fileno() < 0:
            return
        left = self._transport.flush(self._out)
        events = EVENT_READ | EVENT_WRITE if left else EVENT_READ
        if events != self._events:
            self._events = events
            self._reactor.modify(self._transport, events)


#: Is called with None when a connection begins, then with each packet.
Play = Callable[[Peer, "ref.Packet | None"], object]


@final
class FakeNetwork:
    """A played server on a network of the same kind as a bus's.

    Args:
        bus: of which kind.
        play: the server.
    """

    def __init__(self, bus: Bus, play: Play) -> None:
        self._play = play
        self._peers: list[Peer] = []
        self._memory = bus._server._net if isinstance(bus, MemoryBus) else None
        self._directory = TemporaryDirectory()
        self._dial: Callable[[Server, float], Transport]
        self._reactor = self._memory.reactor() if self._memory is not None else Reactor()
        self._listener = None
        if self._memory is None:
            self._listen(unix=hasattr(bus, "_directory"))
        self._thread = threading.Thread(target=self._reactor.run, name="fake-server", daemon=True)
        self._thread.start()

    def _listen(self, *, unix: bool) -> None:
        path = f"{self._directory.name}/bus"
        listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        listener.bind(path if unix else ("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        self._listener = listener
        where: Server = UnixAddress(path) if unix else Address("127.0.0.1", listener.getsockname()[1])
        self._dial = lambda _, timeout_s: dial(where, timeout_s)

        def on_ready(_: int) -> None:
            sock, _ = listener.accept()
            self._add(TcpTransport(sock, "client"))

        self._reactor.register(listener, EVENT_READ, on_ready)

    def _add(self, transport: Transport) -> None:
        self._peers.append(Peer(self._reactor, transport, self._play))

    def dial(self, address: Server, timeout_s: float) -> Transport:
        """A connection to it."""
        net = self._memory
        if net is None:
            return self._dial(address, timeout_s)
        with net.faults.lock:
            link = net.faults.open()
            client = MemoryTransport(net, link, link.down, link.up, "fake")
            server = MemoryTransport(net, link, link.up, link.down, "client")
        self._reactor.call_threadsafe(lambda: self._add(server))
        return client

    async def dial_async(self, address: Server, timeout_s: float) -> Transport:
        """The same, for asyncio."""
        return self.dial(address, timeout_s)

    def close(self) -> None:
        """End it, and its connections."""

        def end() -> None:
            for peer in self._peers:
                peer.close()
            self._reactor.stop()

        self._reactor.call_threadsafe(end)
        self._thread.join()
        if self._listener is not None:
            self._listener.close()
        self._reactor.close()
        self._directory.cleanup()
