"""Sockets as transports, the system calls behind them, and listening."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import select
import socket
import threading
from collections.abc import Iterator

import frame_c
import pytest
from frame_c import Lender

from evbus import _io, transport
from evbus._frame import READ_BYTES, Ring, RingPool
from evbus.errors import ServerStartError
from evbus.transport import TcpTransport, Transport, accept, format_address, listen_tcp

LIMIT = 1 << 20
Pair = tuple[TcpTransport, socket.socket]


def wait_readable(sock: TcpTransport | socket.socket) -> None:
    assert select.select([sock], [], [], 30)[0]


def accept_one(listener: socket.socket) -> tuple[socket.socket, str]:
    wait_readable(listener)
    taken = accept(listener)
    assert taken is not None
    return taken


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    (sock,) = listen_tcp("127.0.0.1", 0)
    yield sock
    sock.close()


@pytest.fixture
def pair(listener: socket.socket) -> Iterator[Pair]:
    """A transport, and the socket at its other end, blocking."""
    with socket.create_connection(listener.getsockname()) as other:
        taken = TcpTransport(*accept_one(listener))
        other.settimeout(30)
        yield taken, other
        taken.close()


def fill_one(taken: TcpTransport, ring: Ring, limit: int = LIMIT) -> int:
    wait_readable(taken)
    return taken.fill(ring, limit)


def receive_all(other: socket.socket) -> bytes:
    return b"".join(iter(lambda: other.recv(1 << 20), b""))


def content(size: int) -> bytes:
    return hashlib.shake_128(b"evbus").digest(size)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_tcp_transport_is_a_transport(pair):
    taken: Transport = pair[0]
    assert taken.fileno() >= 0


def test_fill_reads_what_is_there(pair):
    taken, other = pair
    pool = RingPool()
    ring = Ring(pool)
    assert taken.fill(ring, LIMIT) == -1
    assert pool.held_bytes == 0  # nothing came: no memory is held
    other.sendall(b"hello ")
    assert fill_one(taken, ring) == 6
    other.sendall(b"world")
    assert fill_one(taken, ring) == 5
    assert taken.fill(ring, LIMIT) == -1
    assert ring.take() == b"hello world"
    assert pool.held_bytes == 0


def test_a_needless_fill_leaves_an_unfinished_packet_in_little_memory(pair):
    taken, other = pair
    ring = Ring(RingPool())
    other.sendall(b"half a pac")
    fill_one(taken, ring)
    assert ring.capacity == READ_BYTES
    assert taken.fill(ring, LIMIT) == -1
    assert (ring.peek(), ring.capacity) == (b"half a pac", 512)
    other.sendall(b"ket")
    fill_one(taken, ring)
    assert ring.take() == b"half a packet"


def test_the_end_of_the_stream_is_zero_again_and_again(pair):
    taken, other = pair
    ring = Ring()
    other.sendall(b"last")
    other.shutdown(socket.SHUT_WR)
    assert fill_one(taken, ring) == 4
    wait_readable(taken)
    assert taken.fill(ring, LIMIT) == 0
    assert taken.fill(ring, LIMIT) == 0
    assert ring.take() == b"last"


def test_one_fill_is_one_bounded_read(pair):
    taken, other = pair
    data = content(3 * READ_BYTES)
    sender = threading.Thread(target=other.sendall, args=(data,))
    sender.start()
    ring = Ring()
    while len(ring) < len(data):
        assert 0 < fill_one(taken, ring, len(data)) <= READ_BYTES
    sender.join(30)
    assert ring.take() == data


def test_a_full_ring_takes_nothing_until_its_owner_has_taken_something(pair):
    taken, other = pair
    ring = Ring()
    other.sendall(b"waits")
    wait_readable(taken)
    ring.make_room(0)
    while (room := ring.make_room(0)) > 0:
        ring.write(bytes(room))
    full = len(ring)
    assert taken.fill(ring, 0) == -1
    assert len(ring) == full
    ring.take(3)
    assert taken.fill(ring, 0) == 3
    ring.take(full - 3)
    assert taken.fill(ring, 0) == 2
    assert ring.take() == b"waits"


def test_fill_appends_behind_bytes_that_wrap(pair):
    taken, other = pair
    ring = Ring()
    ring.write(bytes(500))
    ring.take(450)
    ring.write(b"y" * 400)
    other.sendall(b"tail")
    assert fill_one(taken, ring) == 4
    assert ring.take() == bytes(50) + b"y" * 400 + b"tail"


def test_a_reset_is_an_error_of_its_kind(pair):
    taken, other = pair
    ring = Ring()
    TcpTransport(other.dup()).abort()
    TcpTransport(other).abort()
    wait_readable(taken)
    with pytest.raises(ConnectionResetError) as caught:
        taken.fill(ring, LIMIT)
    assert caught.value.errno == errno.ECONNRESET
    assert caught.value.strerror
    assert ring.capacity == 0


# --- writing ----------------------------------------------------------------------------------------------------------


def test_flush_writes_all_and_gives_the_memory_back(pair):
    taken, other = pair
    pool = RingPool()
    ring = Ring(pool)
    assert taken.flush(ring) == 0
    ring.write(b"hello")
    assert taken.flush(ring) == 0
    assert (len(ring), pool.held_bytes) == (0, 0)
    assert other.recv(100) == b"hello"


def test_flush_writes_across_the_wrap(pair):
    taken, other = pair
    ring = Ring()
    ring.write(bytes(500))
    ring.take(450)
    ring.write(b"y" * 400)
    expected = ring.peek()
    assert taken.flush(ring) == 0
    taken.close()
    assert receive_all(other) == expected


def lend(ring: Ring, lender: Lender, size: int) -> None:
    assert frame_c.ring_lend(ctypes.byref(frame_c.ring_inside(ring)), lender.address, size) == 0


@pytest.mark.parametrize("own", [0, 5, 450])
def test_flush_writes_own_and_lent_bytes_in_one_call(pair, own):
    taken, other = pair
    ring = Ring()
    if own:
        ring.write(bytes(500))
        ring.take(490)
        ring.write(b"y" * (own - 10) if own > 10 else b"")
        ring.take(len(ring) - own)
    lender = Lender(content(3000))
    lend(ring, lender, 3000)
    expected = ring.peek()
    assert len(expected) == own + 3000
    assert taken.flush(ring) == 0
    lender.spoil()
    taken.close()
    assert receive_all(other) == expected
    assert ring.capacity == 0


@pytest.fixture
def narrow() -> Iterator[Pair]:
    """As `pair`, with little buffer.

    Not the least for the reader: a window that closes and opens by a few bytes at a time makes TCP wait for its timers.
    """
    (listener,) = listen_tcp("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with listener, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        other.connect(listener.getsockname())
        other.settimeout(30)
        taken = TcpTransport(*accept_one(listener))
        yield taken, other
        taken.close()


def test_partial_writes_lose_nothing(narrow):
    taken, other = narrow
    ring = Ring(RingPool())
    data = content(2_000_000)
    ring.write(data)
    lefts = [len(data)]
    received = bytearray()
    while lefts[-1]:
        lefts.append(taken.flush(ring))
        assert lefts[-1] == len(ring)
        if lefts[-1] == lefts[-2]:  # nothing can be written now
            received += other.recv(100_000)
            select.select([], [taken], [], 30)
    taken.close()
    received += receive_all(other)
    assert len(lefts) > 10
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


def test_what_is_not_taken_of_a_lent_segment_is_copied(narrow):
    taken, other = narrow
    ring = Ring()
    data = content(1_000_000)
    lender = Lender(data)
    ring.write(b"own")
    lend(ring, lender, len(data))
    left = taken.flush(ring)
    assert 0 < left < len(data)
    inside = frame_c.ring_inside(ring)
    assert (inside.lent_size, inside.size) == (0, left)
    lender.spoil()
    received = bytearray()
    while taken.flush(ring):
        received += other.recv(100_000)
        select.select([], [taken], [], 30)
    taken.close()
    received += receive_all(other)
    assert received == b"own" + data


def test_a_socket_that_takes_nothing_still_settles(narrow):
    taken, _ = narrow
    ring = Ring()
    ring.write(bytes(1_000_000))
    before = 0
    while (left := taken.flush(ring)) != before:
        before = left
    lender = Lender(b"0123456789")
    lend(ring, lender, 10)
    assert 10 < taken.flush(ring) <= before + 10
    assert frame_c.ring_inside(ring).lent_size == 0
    lender.spoil()
    assert ring.take()[-10:] == b"0123456789"


def test_one_flush_is_bounded(pair):
    """A receiver that drains as fast as we write must not hold the loop; seen from outside only as: it goes on."""
    taken, other = pair
    data = content(_io.WRITE_BYTES + 1_000_000)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(receive_all(other)))
    reader.start()
    ring = Ring()
    lender = Lender(data[1000:])
    ring.write(data[:1000])
    lend(ring, lender, len(data) - 1000)
    left = taken.flush(ring)
    assert left >= len(data) - _io.WRITE_BYTES
    lender.spoil()
    while taken.flush(ring):
        select.select([], [taken], [], 30)
    taken.close()
    reader.join(30)
    assert received[0] == data


def test_writing_to_a_peer_that_has_gone_is_an_error_and_no_signal(pair):
    taken, other = pair
    TcpTransport(other.dup()).abort()
    TcpTransport(other).abort()
    wait_readable(taken)
    ring = Ring()
    lender = Lender(b"0123456789")
    ring.write(b"own")
    lend(ring, lender, 10)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        taken.flush(ring)
    assert frame_c.ring_inside(ring).lent_size == 0  # no pointer to somebody else's memory is left
    assert ring.peek() == b"own"
    with pytest.raises(BrokenPipeError):
        taken.flush(ring)


def test_settle_copies_what_is_lent():
    ring = Ring()
    lender = Lender(b"0123456789")
    _io.settle(ring)
    lend(ring, lender, 10)
    _io.settle(ring)
    lender.spoil()
    assert ring.take() == b"0123456789"


def test_only_rings_are_filled(pair):
    with pytest.raises(TypeError):
        _io.fill(pair[0].fileno(), None, LIMIT)
    with pytest.raises(TypeError):
        _io.flush(pair[0].fileno(), bytearray())


# --- the life of a transport ------------------------------------------------------------------------------------------


def test_the_socket_is_set_up(pair):
    taken, other = pair
    assert taken._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not taken._sock.getblocking()
    assert taken.peer == "{}:{}".format(*other.getsockname())
    assert repr(taken) == f"<TcpTransport fd {taken.fileno()} to {taken.peer}>"


def test_unix_sockets_are_streams_too():
    a, b = socket.socketpair()
    taken = TcpTransport(a)
    assert taken.peer == "unix"
    ring = Ring()
    ring.write(b"x")
    assert taken.flush(ring) == 0
    assert b.recv(1) == b"x"
    b.close()
    assert taken.fill(ring, LIMIT) == 0
    taken.close()


def test_a_connection_that_is_lost_before_it_is_looked_at(listener):
    """Linux lets it be accepted; asking it for its peer, or setting it up, may fail."""
    other = socket.create_connection(listener.getsockname())
    TcpTransport(other).abort()
    wait_readable(listener)
    sock, _ = accept_one(listener)
    taken = TcpTransport(sock)
    assert taken.peer
    with pytest.raises(ConnectionResetError):
        taken.fill(Ring(), LIMIT)
    taken.shutdown_write()
    taken.abort()


def test_shutdown_write_ends_one_half(pair):
    taken, other = pair
    ring = Ring()
    ring.write(b"bye")
    taken.flush(ring)
    taken.shutdown_write()
    taken.shutdown_write()
    assert receive_all(other) == b"bye"
    other.sendall(b"still here")
    assert fill_one(taken, ring) == 10
    with pytest.raises(BrokenPipeError):
        taken.flush(ring)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_after_the_end_nothing_reaches_the_descriptor(pair, how):
    taken, _ = pair
    fd = taken.fileno()
    getattr(taken, how)()
    with open(os.devnull) as reuser:  # somebody else may get the number at once
        assert reuser.fileno() == fd
        ring = Ring()
        ring.write(b"x")
        for call in (lambda: taken.fill(ring, LIMIT), lambda: taken.flush(ring)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EBADF
        assert taken.fileno() == -1
        taken.shutdown_write()
        taken.close()
        taken.abort()
        os.fstat(reuser.fileno())


def test_close_is_orderly(pair):
    taken, other = pair
    ring = Ring()
    ring.write(content(100_000))
    while taken.flush(ring):
        select.select([], [taken], [], 30)
    taken.close()
    assert receive_all(other) == content(100_000)


def test_abort_is_a_reset(pair):
    taken, other = pair
    taken.abort()
    with pytest.raises(ConnectionResetError):
        other.recv(1)


# --- addresses and listening ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 9100), "127.0.0.1:9100"),
        (("::1", 9100, 0, 0), "[::1]:9100"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80"),
        ("/run/evbus.sock", "/run/evbus.sock"),
        (b"\0evbus", "@evbus"),
        (b"/run/\xff", "/run/�"),
        ("", "unix"),
        (b"", "unix"),
        (None, "unix"),
    ],
)
def test_addresses_as_people_write_them(address, text):
    assert format_address(address) == text


def test_accept_takes_one_or_says_that_there_is_none(listener):
    assert accept(listener) is None
    with socket.create_connection(listener.getsockname()) as other:
        sock, peer = accept_one(listener)
        assert peer == "{}:{}".format(*other.getsockname())
        sock.close()
    assert accept(listener) is None


def test_listening_on_a_free_port():
    (sock,) = listen_tcp("127.0.0.1", 0, backlog=5)
    assert sock.getsockname()[1] > 0
    assert not sock.getblocking()
    sock.close()


def test_all_addresses_of_a_name_get_the_same_port(monkeypatch):
    """With port 0 the first one's; if the others cannot have it, another one."""
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 0)) for n in (1, 2, 1, 3)
    ]  # one of them twice
    monkeypatch.setattr(transport.socket, "getaddrinfo", lambda *_, **__: addresses)
    failures = [None, OSError(errno.EADDRINUSE, "in use"), None, None, OSError(errno.EADDRINUSE, "in use")]
    real = transport._listen_one
    opened: list[socket.socket] = []

    def listen_one(family, address, backlog):
        failure = failures.pop(0) if failures else None
        if failure is not None:
            raise failure
        opened.append(real(family, address, backlog))
        return opened[-1]

    monkeypatch.setattr(transport, "_listen_one", listen_one)
    listeners = listen_tcp("many.example", 0)
    assert [sock.getsockname()[0] for sock in listeners] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert len({sock.getsockname()[1] for sock in listeners}) == 1
    assert len(opened) == 1 + 2 + 3
    assert [sock.fileno() >= 0 for sock in opened] == [False] * 3 + [True] * 3
    for sock in listeners:
        sock.close()


def test_an_address_family_that_the_machine_lacks_is_left_out(monkeypatch):
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(transport.socket, "getaddrinfo", lambda *_, **__: found)
    (sock,) = listen_tcp("two.example", 0)
    assert sock.family == socket.AF_INET
    sock.close()


@pytest.mark.parametrize("host", [None, ""])
def test_no_host_stands_for_all_interfaces(host):
    listeners = listen_tcp(host, 0)
    port = listeners[0].getsockname()[1]
    assert {sock.getsockname()[1] for sock in listeners} == {port}
    with socket.create_connection(("127.0.0.1", port)):
        pass
    for sock in listeners:
        sock.close()


def test_localhost():
    listeners = listen_tcp("localhost", 0)
    assert len({sock.getsockname()[1] for sock in listeners}) == 1
    for sock in listeners:
        sock.close()


def test_a_port_in_use_is_named(listener):
    port = listener.getsockname()[1]
    with pytest.raises(ServerStartError) as caught:
        listen_tcp("127.0.0.1", port)
    error = caught.value
    assert (error.address, error.errno) == (f"127.0.0.1:{port}", errno.EADDRINUSE)
    assert "the port is in use" in str(error)
    assert "choose another port" in str(error)
    assert isinstance(error.__cause__, OSError)


def test_a_server_that_is_started_again_at_once_gets_its_port():
    (sock,) = listen_tcp("127.0.0.1", 0)
    address = sock.getsockname()
    with socket.create_connection(address) as other:
        taken, _ = accept_one(sock)
        taken.close()  # we close first: the connection stays here in TIME_WAIT
        assert other.recv(1) == b""
    sock.close()
    (again,) = listen_tcp(*address)
    again.close()


def test_an_unknown_host_is_named(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(transport.socket, "getaddrinfo", unknown)
    with pytest.raises(ServerStartError, match=r"host 'nowhere\.invalid' is unknown") as caught:
        listen_tcp("nowhere.invalid", 9100)
    assert caught.value.errno == socket.EAI_NONAME
    assert caught.value.address == "nowhere.invalid:9100"


def test_a_name_that_is_no_name():
    with pytest.raises(ServerStartError, match="is unknown"):
        listen_tcp("a" * 70 + ".invalid", 9100)  # too long for a label: refused before any resolver is asked


def test_an_address_of_another_machine_is_named():
    with pytest.raises(ServerStartError, match="this machine does not have that address") as caught:
        listen_tcp("192.0.2.1", 9100)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40])
def test_a_port_that_cannot_be(port):
    with pytest.raises(ServerStartError, match="no such port"):
        listen_tcp("127.0.0.1", port)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EACCES, "may not listen"), (errno.EPERM, "may not listen"), (errno.EIO, os.strerror(errno.EIO))],
)
def test_other_errors_are_named_and_leave_nothing_open(monkeypatch, code, words):
    opened = []
    real = socket.socket

    class Failing(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(self)

        def bind(self, address):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(transport.socket, "socket", Failing)
    with pytest.raises(ServerStartError, match=words) as caught:
        listen_tcp("127.0.0.1", 80)
    assert caught.value.errno == code
    assert [sock.fileno() for sock in opened] == [-1]
