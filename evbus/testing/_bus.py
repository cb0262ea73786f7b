"""A bus for one test: a server, its clients, what was published, and faults."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import suppress
from types import TracebackType
from typing import Any, overload

from evbus.client import EventClient
from evbus.dial import Address
from evbus.errors import ConfirmTimeoutError, EvbusError
from evbus.limits import Limits
from evbus.message import ConnectStatus, Message
from evbus.server import EventServer
from evbus.testing._faults import Faults
from evbus.testing._memory import MemoryServer
from evbus.testing._proxy import Proxy
from evbus.testing._record import Record

__all__ = ["Bus", "MemoryBus", "ServerBus"]

#: Seconds that a handler which still runs gets at the end of a bus.
_PATIENCE_S = 5.0
#: Between two looks at whether a bus is idle.
_LOOK_S = 0.002
#: A client that is known by its connection alone counts as idle when nothing passed for so long.
_QUIET_S = 0.05


class Bus(ABC):
    """What `ServerBus` and `MemoryBus` have in common. Both are context managers.

    Every method may be called from any thread. All of them block; in asyncio code, call those that wait
    (`expect`, `wait_idle`, `close`) by `asyncio.to_thread`.
    """

    def __init__(self, record: Record, faults: Faults) -> None:
        self._record = record
        self._faults = faults
        self._clients: list[EventClient] = []
        self._watched: list[EventClient] = []

    # ---- clients -----------------------------------------------------------------------------------------------------

    def client(self, **options: Any) -> EventClient:
        """A new connected client; `close` disconnects it.

        Args:
            options: as for `EventClient`, without host and port.
        """
        client = self._new_client(options)
        self._clients.append(client)
        return client.connect()

    def watch(self, client: EventClient) -> EventClient:
        """Let `wait_idle` wait for a client that the test has made itself, too. Returns it."""
        self._watched.append(client)
        return client

    @abstractmethod
    def _new_client(self, options: dict[str, Any]) -> EventClient:
        """A client that is not connected yet."""

    @abstractmethod
    def stats(self) -> dict[str, object]:
        """The server's counters, see `EventServer.stats`."""

    # ---- looking -----------------------------------------------------------------------------------------------------

    def published(self, subject: str = ">") -> list[Message]:
        """What was published so far on a subject, or on those that fit a pattern, in the order in which it went to the
        server. Queries and answers are not among it.

        What this bus's own clients have in their buffers is sent first, so it is among it.
        """
        for client in self._known():
            if client.status is ConnectStatus.CONNECTED and not self._faults.paused:
                with suppress(EvbusError):
                    client.rtt(_PATIENCE_S)
        return self._record.published(subject)

    @overload
    def expect(self, subject: str, timeout: float = ...) -> Message: ...
    @overload
    def expect(self, subject: str, timeout: float = ..., *, count: int) -> list[Message]: ...
    def expect(self, subject: str, timeout: float = 5.0, *, count: int | None = None) -> Message | list[Message]:
        """Wait for the next message that is published on a subject, or on one that fits a pattern.

        Next: each call goes on where the last one with the same `subject` ended, the first one at the beginning. So it
        does not matter whether the message came before the call.

        Args:
            subject: the subject or pattern.
            timeout: seconds.
            count: return a list of so many.

        Raises:
            AssertionError: not in time; says what was published instead.
        """
        found = self._record.expect(subject, timeout, 1 if count is None else count)
        return found[0] if count is None else found

    def wait_idle(self, timeout: float = 5.0) -> None:
        """Wait until nothing goes on: all that was published is delivered, every handler has finished, no query is
        open, and nothing that a handler did has begun anything new.

        Of clients that are neither made by `client` nor given to `watch`, only the connection is seen: they count as
        idle when nothing passed for 50 ms. Messages that wait for a `for` loop over a subscription, or its `next`, do
        not count.

        Raises:
            AssertionError: not in time; says what still goes on.
        """
        deadline = time.monotonic() + timeout
        known: str | None = None
        while True:
            before = self._marks()
            silent = self._ask_all(deadline)
            busy = silent or self._at_work()
            if busy is None:
                if self._marks() == before:
                    return
                busy = "messages keep coming"
            if silent is None:
                known = busy
            if time.monotonic() >= deadline:
                # The last look may have had no time for the server's answer: what the one before has seen tells more.
                paused = " (the bus is paused)" if self._faults.paused else ""
                raise AssertionError(f"the bus is not idle within {timeout:g} s: {known or busy}{paused}")
            time.sleep(_LOOK_S)

    def _known(self) -> list[EventClient]:
        return [*self._clients, *self._watched]

    def _marks(self) -> list[object]:
        """Numbers that stand still while nothing begins."""
        stats = self.stats()
        marks: list[object] = [stats[key] for key in ("published", "delivered", "queries", "answers")]
        for client in self._known():
            figures = client.stats()
            marks += [figures.published, figures.received]
        return marks

    def _ask_all(self, deadline: float) -> str | None:
        """Let each client ask the server twice: first, so that the server has all that was sent, and again, so that
        each client has all that the server made of it. Returns who got no answer.
        """
        for _ in range(2):
            for client in self._known():
                status = client.status
                if status in (ConnectStatus.CONNECTING, ConnectStatus.RECONNECTING, ConnectStatus.DRAINING):
                    return f"{_name(client)} is {status.value}"
                if status is not ConnectStatus.CONNECTED:
                    continue
                try:
                    client.rtt(max(deadline - time.monotonic(), 0.001))
                except ConfirmTimeoutError:
                    return f"the server has not answered {_name(client)}"
                except EvbusError:
                    return f"{_name(client)} has just lost its connection"
        return None

    def _at_work(self) -> str | None:
        """What still goes on."""
        connected = sum(client.status is ConnectStatus.CONNECTED for client in self._known())
        if len(self._faults.links) > connected:
            if self._faults.waiting:
                return f"{self._faults.waiting} bytes are on their way"
            passed = self._faults.passed
            time.sleep(_QUIET_S)
            if self._faults.passed != passed:
                return "bytes are passing"
        pending = self.stats()["queries_pending"]
        if pending:
            return f"{pending} queries wait for an answer"
        for client in self._known():
            figures = client.stats()
            if figures.pending_queries or figures.pending_bytes:
                return (
                    f"{_name(client)} waits for the server: {figures.pending_queries} queries or confirmations, "
                    f"{figures.pending_bytes} bytes to send"
                )
            for subscription in client.subscriptions:
                if subscription.handler is not None and not subscription.is_idle:
                    waiting = subscription.pending_msgs
                    more = f", {waiting} messages wait for it" if waiting else ""
                    return f"a handler on {subscription.subject!r} of {_name(client)} is at work{more}"
            if client.stats().at_work:
                return f"a handler or callback of {_name(client)} is at work"
        return None

    # ---- faults ------------------------------------------------------------------------------------------------------

    def drop_connections(self) -> int:
        """Reset every connection, as a network that fails does. Returns how many there were. New ones are taken."""
        return self._faults.drop()

    def pause(self) -> None:
        """Let no byte pass, in either direction, until `resume`: connections stay, and are silent."""
        self._faults.pause(True)

    def resume(self) -> None:
        """Let pass what `pause` has held back, and what comes."""
        self._faults.pause(False)

    def delay(self, seconds: float) -> None:
        """Let every byte pass so many seconds after it was sent, in each direction; 0 ends it."""
        self._faults.delay(seconds)

    def cut_after(self, size: int | None, *, to_server: bool = True) -> None:
        """Cut one connection in the middle of what it carries: the first one, open now or coming, on which `size` more
        bytes pass. Exactly so many reach the other side. The connections after it are whole.

        Args:
            size: bytes from now on, or from the beginning of a new connection; None takes the order back.
            to_server: count what goes to the server; False: what comes from it.
        """
        self._faults.cut_after(size, to_server=to_server)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything: its clients, the server, the threads. What waits is discarded. Again: nothing happens.

        Raises:
            AssertionError: a handler of one of its clients does not return. Everything else has ended.
        """
        clients, self._clients = self._clients, []
        self._watched = []
        try:
            for client in clients:
                client.disconnect(drain=False)
            deadline = time.monotonic() + _PATIENCE_S
            stuck = [client for client in clients if not client._pool.join(max(deadline - time.monotonic(), 0.0))]
        finally:
            self._end()
        if stuck:
            names = ", ".join(map(_name, stuck))
            raise AssertionError(f"a handler or callback of {names} has not returned {_PATIENCE_S:g} s after the end")

    @abstractmethod
    def _end(self) -> None:
        """End what the bus has started."""

    def __enter__(self) -> Bus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ServerBus(Bus):
    """A real server on a free port, and a small proxy in front of it that makes the faults.

    Anything that speaks to an event server can connect to `address`: other clients, other processes, C# programs.

    Args:
        limits: what the server grants.

    Attributes:
        server: the server itself; what connects to it directly, past the proxy, is neither recorded nor harmed.
    """

    def __init__(self, *, limits: Limits | None = None) -> None:
        self.server = EventServer(port=0, limits=limits).start()
        record = Record()
        try:
            self._proxy = Proxy(("127.0.0.1", self.server.port), record)
        except BaseException:
            self.server.stop(0)
            raise
        super().__init__(record, self._proxy.faults)

    def __enter__(self) -> ServerBus:
        return self

    @property
    def host(self) -> str:
        """Where to connect to."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """Where to connect to."""
        return self._proxy.port

    @property
    def address(self) -> str:
        """Where to connect to, as "host:port"."""
        return str(Address(self.host, self.port))

    @property
    def url(self) -> str:
        """Where to connect to, for `evbus.connect`."""
        return f"evbus://{self.address}"

    def stats(self) -> dict[str, object]:
        """The server's counters, see `EventServer.stats`."""
        return self.server.stats()

    def _new_client(self, options: dict[str, Any]) -> EventClient:
        return EventClient(self.host, self.port, **options)

    def _end(self) -> None:
        self._proxy.close()
        self.server.stop(0)


class MemoryBus(Bus):
    """The cores of the server and of its clients, connected through memory: no socket, no port, no descriptor.

    It behaves as a `ServerBus` does, but only its own clients can connect.

    Args:
        limits: what the server grants.
    """

    def __init__(self, *, limits: Limits | None = None) -> None:
        record = Record()
        self._server = MemoryServer(limits if limits is not None else Limits(), record)
        super().__init__(record, self._server.faults)

    def __enter__(self) -> MemoryBus:
        return self

    def stats(self) -> dict[str, object]:
        """The server's counters, see `EventServer.stats`."""
        return self._server.stats()

    def _new_client(self, options: dict[str, Any]) -> EventClient:
        return _MemoryClient(self._server, options)

    def _end(self) -> None:
        self._server.close()


class _MemoryClient(EventClient):
    """A client whose network is a memory server's."""

    def __init__(self, server: MemoryServer, options: dict[str, Any]) -> None:
        self._dial = server.dial
        self._make_reactor = server.reactor
        super().__init__("memory", 1, **options)


def _name(client: EventClient) -> str:
    return f"client {client.name!r}" if client.name else "a client"
