"""Accepting connections: bounded work, descriptors that run out, errors of connections that wait."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from simnet import CALM, SimListener, SimNet, SimTransport

from evbus.acceptor import Acceptor
from evbus.reactor import Reactor
from evbus.transport import listen_tcp

resource = pytest.importorskip("resource")


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Server:
    """An acceptor on a simulated listener with connections that wait."""

    def __init__(self, *, waiting: int, errors: list[int] | None = None, **options: int) -> None:
        self.net = SimNet(1, CALM)
        self.reactor = self.net.reactor()
        self.listener: SimListener = self.net.listen(backlog=1000)
        for _ in range(waiting):
            self.net.connect()
        self.net.run_until(lambda: len(self.listener.waiting) == waiting)
        self.taken: list[SimTransport] = []
        self.acceptor = Acceptor(
            self.reactor, [self.listener], lambda transport, peer: self.taken.append(transport), **options
        )
        self.listener.errors.extend(error(code) for code in errors or [])

    def go(self, seconds: float = 0.0) -> None:
        self.net.clock.now += seconds
        self.reactor.run_once(0)

    @property
    def listens(self) -> bool:
        return self.net.selector.is_registered(self.listener.fileno())


def test_all_who_wait_are_taken():
    server = Server(waiting=10)
    server.go()
    assert len(server.taken) == server.acceptor.accepted == 10


def test_a_turn_takes_only_so_many():
    server = Server(waiting=150)
    counts = []
    for _ in range(4):
        server.go()
        counts.append(len(server.taken))
    assert counts == [64, 128, 150, 150]
    few = Server(waiting=5, max_per_turn=2)
    few.go()
    assert len(few.taken) == 2
    assert few.acceptor.pauses == 0


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_descriptors_the_loop_is_left_in_peace(code):
    server = Server(waiting=3, errors=[code])
    server.go()
    acceptor = server.acceptor
    assert acceptor.is_paused
    assert (acceptor.accepted, acceptor.exhausted, acceptor.pauses) == (0, 1, 1)
    assert not server.listens
    assert server.reactor.next_timer() == server.net.clock.now + 0.1
    server.go(0.05)
    assert not server.listens
    server.go(0.06)  # the timer
    assert server.listens
    assert not acceptor.is_paused
    server.go()
    assert len(server.taken) == 3


def test_pauses_double_up_to_a_second_and_start_again_after_success():
    server = Server(waiting=2, errors=[errno.EMFILE] * 6)
    pauses = []
    for _ in range(6):
        server.go()
        timer = server.reactor.next_timer()
        assert timer is not None
        pauses.append(round(timer - server.net.clock.now, 6))
        server.go(timer - server.net.clock.now)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    server.go()
    assert len(server.taken) == 2
    server.listener.errors.append(error(errno.EMFILE))
    server.net.connect()
    server.net.run_until(lambda: server.acceptor.is_paused)
    assert server.reactor.next_timer() == pytest.approx(server.net.clock.now + 0.1)


def test_a_closed_connection_makes_room_at_once():
    server = Server(waiting=3, errors=[errno.EMFILE])
    server.go()
    server.acceptor.resume()
    assert server.listens
    assert not server.acceptor.is_paused
    assert server.reactor.next_timer() is None
    server.acceptor.resume()  # not paused: nothing happens
    server.go()
    assert len(server.taken) == 3


def test_one_log_line_a_second(caplog):
    caplog.set_level(logging.INFO)
    server = Server(waiting=1, errors=[errno.EMFILE] * 100)
    for _ in range(50):
        server.go(0.1)
        server.acceptor.resume()
    assert server.acceptor.pauses == 50
    lines = [record for record in caplog.records if record.name == "evbus.server"]
    assert 5 <= len(lines) <= 6
    assert lines[0].message == f"cannot accept connections, trying again in 0.1 s: {os.strerror(errno.EMFILE)}"


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETUNREACH])
def test_errors_of_a_connection_that_waits_are_skipped(code):
    server = Server(waiting=3, errors=[code, code])
    server.go()
    assert len(server.taken) == 3
    assert (server.acceptor.skipped, server.acceptor.exhausted, server.acceptor.pauses) == (2, 0, 0)


def test_an_error_among_successes_does_not_pause():
    server = Server(waiting=3, errors=[errno.EPERM], max_per_turn=2)
    server.go()
    assert (len(server.taken), server.acceptor.skipped, server.acceptor.pauses) == (1, 1, 0)


def test_a_turn_of_nothing_but_errors_pauses():
    server = Server(waiting=1, errors=[errno.EPERM] * 70)
    server.go()
    assert (server.acceptor.skipped, server.acceptor.exhausted, server.acceptor.pauses) == (64, 0, 1)
    assert not server.listens
    server.go(0.1)
    server.go()
    assert len(server.taken) == 1


@pytest.mark.parametrize("code", [errno.EBADF, errno.EINVAL, errno.ENOTSOCK])
def test_a_broken_listener_is_given_up(code, caplog):
    server = Server(waiting=1, errors=[code])
    server.go()
    assert server.listener.fileno() == -1
    assert "stopped listening" in caplog.text
    server.go()
    server.acceptor.close()


def test_an_error_of_the_owner_closes_that_connection_only(caplog):
    server = Server(waiting=3)
    calls = []

    def on_accept(transport: SimTransport, peer: str) -> None:
        calls.append(transport)
        if len(calls) == 2:
            raise RuntimeError("no")

    server.acceptor._on_accept = on_accept
    server.go()
    assert [transport.fileno() >= 0 for transport in calls] == [True, False, True]
    assert (server.acceptor.accepted, server.acceptor.failed) == (3, 1)
    assert [str(exc) for exc, _ in server.net.errors] == ["no"]
    assert "Traceback" in caplog.text


def test_close_stops_everything():
    server = Server(waiting=2, errors=[errno.EMFILE])
    server.go()
    server.acceptor.close()
    server.acceptor.close()
    assert server.listener.fileno() == -1
    assert not server.acceptor.is_paused
    assert server.reactor.next_timer() is None
    server.acceptor.resume()
    server.net.settle(5)
    assert server.net.errors == []
    assert server.taken == []


def test_the_owner_may_close_while_it_accepts():
    server = Server(waiting=3)
    server.acceptor._on_accept = lambda transport, peer: (server.taken.append(transport), server.acceptor.close())
    server.go()
    assert len(server.taken) == 1
    assert server.net.errors == []


def test_one_listener_that_runs_out_pauses_all():
    net = SimNet(1, CALM)
    listeners = [net.listen(("10.0.0.1", 9100)), net.listen(("10.0.0.2", 9100))]
    for listener in listeners:
        net.connect(listener.address)
    net.run_until(lambda: all(listener.waiting for listener in listeners))
    taken: deque[SimTransport] = deque()
    acceptor = Acceptor(net.reactor(), listeners, lambda transport, peer: taken.append(transport))
    for listener in listeners:
        listener.errors.append(error(errno.EMFILE))
    net.reactor().run_once(0)
    assert acceptor.pauses == 1  # whichever came first
    assert not any(net.selector.is_registered(listener.fileno()) for listener in listeners)
    net.settle(1)
    assert len(taken) == 2


# --- with the real thing ----------------------------------------------------------------------------------------------


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Leaves the process so many more descriptors than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        probe = os.open(os.devnull, os.O_RDONLY)  # the lowest free number; those above it may be in use
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + more, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_real_process_without_descriptors(few_descriptors):
    (listener,) = listen_tcp("127.0.0.1", 0)
    address = listener.getsockname()
    taken: list[socket.socket] = []
    with Reactor() as reactor:
        acceptor = Acceptor(reactor, [listener], lambda sock, peer: taken.append(sock))
        clients = [socket.create_connection(address) for _ in range(6)]
        few_descriptors(3)
        while not acceptor.is_paused:
            reactor.run_once(30)
        assert 0 < len(taken) <= 3
        before = reactor.turns
        reactor.run_once(0.05)
        reactor.run_once(0)
        assert reactor.turns == before + 2
        assert acceptor.pauses == 1  # connections wait, and the loop hears nothing of it
        few_descriptors(100)
        while len(taken) < 6:  # the timer
            reactor.run_once(30)
        acceptor.close()
    for sock in [*clients, *taken]:
        sock.close()
