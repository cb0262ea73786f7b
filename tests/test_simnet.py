"""The simulated network itself, with participants that only echo."""

from __future__ import annotations

import errno

import pytest
from simnet import CALM, SERVER, Faults, SimNet, SimTransport

from evbus._frame import Ring
from evbus.acceptor import Acceptor
from evbus.reactor import EVENT_READ, EVENT_WRITE

ROUGH = Faults(
    partial_read=0.5, partial_write=0.5, partial_arrival=0.5, delay=0.5, max_delay_s=0.2, spurious=0.1, stall=0.02
)


class Peer:
    """One end of a connection on the reactor: sends what it is told to, keeps what it gets."""

    def __init__(self, net: SimNet, transport: SimTransport, *, echo: bool = False) -> None:
        self.net = net
        self.transport = transport
        self.echo = echo
        self.keeps_open = False  # after the other side's end of stream
        self.inp = Ring()
        self.out = Ring()
        self.got = b""
        self.end = ""  # how it ended: "eof" or the name of an exception
        net.reactor().register(transport, EVENT_READ | EVENT_WRITE, self.on_ready)

    def send(self, data: bytes) -> None:
        self.out.write(data)
        self.ask()

    def ask(self) -> None:
        """Set the interest to what there is to do."""
        if not self.end or self.keeps_open:
            reading = EVENT_READ if not self.end else 0
            writing = EVENT_WRITE if len(self.out) or not self.transport.established else 0
            self.net.reactor().modify(self.transport, reading | writing)

    def on_ready(self, mask: int) -> None:
        try:
            if mask & EVENT_WRITE:
                self.transport.flush(self.out)
            if mask & EVENT_READ:
                n = self.transport.fill(self.inp, 4096)
                if n == 0:
                    self.finish("eof")
                elif n > 0:
                    data = self.inp.take()
                    assert len(data) == n
                    self.got += data
                    if self.echo:
                        self.send(data)
            self.ask()
        except OSError as exc:
            self.keeps_open = False
            self.finish(type(exc).__name__)

    def finish(self, end: str) -> None:
        if not self.end:
            self.end = end
            if not self.keeps_open:
                self.net.reactor().unregister(self.transport)
                self.transport.close()


class EchoServer:
    def __init__(self, net: SimNet, *, echo: bool = True) -> None:
        self.net = net
        self.peers: list[Peer] = []
        self.listener = net.listen()
        self.echo = echo
        self.acceptor = Acceptor(net.reactor(), [self.listener], self.on_accept)

    def on_accept(self, transport: SimTransport, peer: str) -> None:
        assert transport.peer == peer
        self.peers.append(Peer(self.net, transport, echo=self.echo))


def text(client: int, length: int) -> bytes:
    """Bytes in which any change of order, loss or repetition shows."""
    return b"".join(b"%d:%d;" % (client, n) for n in range(length))


def echo_run(seed: int, faults: Faults, *, steps: int = 300, clients: int = 3) -> tuple[SimNet, list[Peer]]:
    net = SimNet(seed, faults, capacity=700)
    EchoServer(net)
    peers = [Peer(net, net.connect()) for _ in range(clients)]
    for number, peer in enumerate(peers):
        for n in range(10):
            peer.send(text(number, 300)[n * 100 : (n + 1) * 100])
    net.run(steps)
    return net, peers


def wrong(peers: list[Peer]) -> list[int]:
    return [number for number, peer in enumerate(peers) if peer.got != text(number, 300)[:1000]]


# --- the promises of TCP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [CALM, Faults(), ROUGH], ids=["calm", "default", "rough"])
def test_bytes_arrive_once_and_in_order(faults):
    for seed in range(60):
        net, peers = echo_run(seed, faults)
        net.settle()
        assert wrong(peers) == [], net
        assert net.errors == []


def test_what_arrives_is_a_prefix_at_any_time():
    for seed in range(20):
        net, peers = echo_run(seed, ROUGH, steps=0)
        while net.steps < 300 and net.step():
            for number, peer in enumerate(peers):
                assert text(number, 300).startswith(peer.got), net


def test_a_seed_replays_bit_for_bit():
    faults = Faults(reset=0.005, stall=0.02, swap_chunks=0.01)
    hashes = [echo_run(seed, faults)[0].trace_hash() for seed in range(40)]
    assert hashes == [echo_run(seed, faults)[0].trace_hash() for seed in range(40)]
    assert len(set(hashes)) == 40


def test_the_trace_knows_the_bytes():
    def run(data: bytes) -> str:
        net = SimNet(1, CALM)
        EchoServer(net)
        Peer(net, net.connect()).send(data)
        net.settle()
        return net.trace_hash()

    assert run(b"one") == run(b"one") != run(b"two")


def test_the_runs_take_every_liberty():
    """Else they would show little."""
    what = set()
    reads = set()
    for seed in range(10):
        net, _ = echo_run(seed, ROUGH)
        what |= {entry[1] for entry in net.trace}
        reads |= {entry[3] for entry in net.trace if entry[1] == "read"}
    assert {"connect", "accept", "arrive", "read", "write", "turn", "time", "stall"} <= what
    assert len(reads) > 50


@pytest.mark.parametrize("name", ["swap_chunks", "lose_rest", "duplicate_chunk"])
def test_planted_faults_are_visible(name):
    struck = noticed = 0
    for seed in range(40):
        faults = Faults()
        setattr(faults, name, 0.1)
        net, peers = echo_run(seed, faults)
        planted = net.planted(name)
        net.settle()
        assert not wrong(peers) or planted, net  # no fault, no harm
        struck += planted > 0
        noticed += planted > 0 and bool(wrong(peers))
    assert struck >= 20
    assert noticed >= 0.9 * struck  # two equal bytes may change places


def test_a_writer_that_is_faster_than_its_reader_is_stopped():
    net = SimNet(1, CALM, capacity=1000)
    server = EchoServer(net, echo=False)
    client = Peer(net, net.connect())
    net.run_until(lambda: server.peers)
    net.reactor().modify(server.peers[0].transport, 0)
    client.send(bytes(5000))
    net.settle()
    assert len(client.out) == 4000
    assert client.transport.readiness() == 0
    net.reactor().modify(server.peers[0].transport, EVENT_READ)
    net.settle()
    assert server.peers[0].got == bytes(5000)


@pytest.mark.parametrize("seed", range(20))
def test_the_end_comes_behind_the_bytes_and_the_other_half_goes_on(seed):
    net = SimNet(seed, ROUGH)
    server = EchoServer(net, echo=False)
    client = Peer(net, net.connect())
    client.send(b"abc" * 100)
    net.run_until(lambda: server.peers)
    peer = server.peers[0]
    peer.keeps_open = True
    net.run_until(lambda: client.transport.established and not len(client.out))
    client.transport.shutdown_write()
    client.transport.shutdown_write()
    with pytest.raises(BrokenPipeError):
        client.transport.flush(ring_of(b"more"))
    net.run_until(lambda: peer.end)
    assert (peer.got, peer.end) == (b"abc" * 100, "eof")
    peer.send(b"still here")
    net.run_until(lambda: client.got == b"still here")
    assert peer.transport.fill(Ring(), 100) == 0
    assert client.end == ""


def ring_of(data: bytes) -> Ring:
    ring = Ring()
    ring.write(data)
    return ring


def connected(net: SimNet, *, echo: bool = False) -> tuple[Peer, Peer]:
    server = EchoServer(net, echo=echo)
    client = Peer(net, net.connect())
    net.run_until(lambda: client.transport.established and server.peers)
    return client, server.peers[0]


def test_an_orderly_close_is_read_to_its_end():
    net = SimNet(1)
    client, server = connected(net)
    client.send(b"last words")
    net.run_until(lambda: not len(client.out))
    client.finish("closed")
    client.transport.close()
    client.transport.abort()  # again: nothing happens
    net.settle()
    assert (server.got, server.end) == (b"last words", "eof")


def test_a_close_with_unread_input_is_a_reset():
    net = SimNet(1, CALM)
    client, server = connected(net)
    net.reactor().modify(client.transport, 0)
    server.send(b"never read")
    net.settle()
    client.finish("closed")
    net.settle()
    assert server.end == "ConnectionResetError"


def test_bytes_for_a_closed_end_are_answered_by_a_reset():
    net = SimNet(1, CALM)
    client, server = connected(net)
    server.keeps_open = True  # does not take the hint
    client.finish("closed")
    net.settle()
    assert server.transport.ended
    server.transport.flush(ring_of(b"too late"))
    net.settle()
    with pytest.raises(ConnectionResetError):
        server.transport.fill(Ring(), 100)
    assert server.transport.fill(Ring(), 100) == 0  # told once
    with pytest.raises(BrokenPipeError):
        server.transport.flush(ring_of(b"x"))


def test_an_abort_destroys_what_is_on_its_way_but_not_what_has_arrived():
    lengths = set()
    for seed in range(30):
        net = SimNet(seed)
        client, server = connected(net)
        for n in range(20):
            client.send(b"%02d" % n)
            net.turn()
        client.net.reactor().unregister(client.transport)
        client.transport.abort()
        net.settle()
        sent = b"".join(b"%02d" % n for n in range(20))
        assert sent.startswith(server.got)
        assert server.end == "ConnectionResetError"
        lengths.add(len(server.got))
    assert len(lengths) > 3


def test_a_break_is_a_reset_for_both():
    net = SimNet(1)
    client, server = connected(net)
    net.break_one(client.transport)
    net.settle()
    assert (client.end, server.end) == ("ConnectionResetError", "ConnectionResetError")
    net.break_one()  # nobody left


def test_random_breaks_happen_and_are_noticed_by_both():
    broken = 0
    for seed in range(30):
        net, peers = echo_run(seed, Faults(reset=0.03))
        net.settle()
        for number, peer in enumerate(peers):
            assert peer.end in ("", "ConnectionResetError")
            assert text(number, 300)[:1000].startswith(peer.got)
            assert (peer.got == text(number, 300)[:1000]) or peer.end
            broken += bool(peer.end)
        assert net.errors == []
    assert broken > 20


def test_no_connection_without_a_listener():
    net = SimNet(1)
    client = Peer(net, net.connect())
    net.settle()
    assert client.end == "ConnectionRefusedError"
    client = Peer(net, net.connect())
    listener = net.listen()  # just in time
    net.settle()
    assert client.transport.established
    assert len(listener.waiting) == 1
    listener.close()  # who waits is reset
    net.settle()
    assert client.end == "ConnectionResetError"
    assert SERVER not in net.listeners


def test_a_connection_given_up_before_it_stands():
    for seed in range(10):
        net = SimNet(seed)
        server = EchoServer(net)
        transport = net.connect()
        net.run(seed % 4)
        transport.close()
        net.settle()
        assert [peer.end for peer in server.peers] in ([], ["ConnectionResetError"], ["eof"])
        assert net.descriptors.keys() == {server.listener.fileno()}


def test_a_full_backlog_makes_clients_wait():
    net = SimNet(1, CALM)
    listener = net.listen(backlog=2)
    clients = [net.connect() for _ in range(3)]
    for _ in range(100):
        net.step()
    assert [client.established for client in clients].count(True) == 2
    listener.accept()
    net.run_until(lambda: all(client.established for client in clients))
    assert net.clock.now >= 1001


def test_errors_of_accept_are_injected():
    net = SimNet(1)
    server = EchoServer(net)
    server.listener.errors.append(OSError(errno.EMFILE, "too many open files"))
    client = Peer(net, net.connect())
    net.run_until(lambda: server.acceptor.is_paused)
    before = net.clock.now
    client.send(b"hello")
    net.run_until(lambda: client.got == b"hello")
    assert server.acceptor.accepted == 1
    assert net.clock.now >= before + 0.1 - 0.02


# --- the machinery ----------------------------------------------------------------------------------------------------


def test_descriptor_numbers_are_used_again_lowest_first():
    net = SimNet(1, CALM)
    listener = net.listen()
    first, second = net.connect(), net.connect()
    assert [listener.fileno(), first.fileno(), second.fileno()] == [3, 4, 5]
    first.abort()
    assert first.fileno() == -1
    assert net.connect().fileno() == 4
    with pytest.raises(OSError, match="descriptor"):
        first.fill(Ring(), 100)
    with pytest.raises(OSError, match="descriptor"):
        first.flush(ring_of(b"x"))


def test_closing_what_is_registered_is_a_mistake():
    net = SimNet(1, CALM)
    client = Peer(net, net.connect())
    with pytest.raises(AssertionError, match="registered"):
        client.transport.abort()


def test_time_passes_only_by_steps_and_goes_to_the_next_timer():
    net = SimNet(1, CALM)
    seen: list[float] = []
    net.reactor().call_later(5, lambda: seen.append(net.clock.now))
    net.step()
    assert net.clock.now == 1005
    net.step()
    assert seen == [1005]
    assert not net.step()  # nothing can happen any more
    net.run(10)
    assert net.wall_ms() == 1_800_001_005_000


def test_settle_runs_timers_within_a_given_time():
    net = SimNet(1)
    seen: list[float] = []

    def tick() -> None:
        seen.append(net.clock.now)
        net.reactor().call_later(1, tick)

    net.reactor().call_later(1, tick)
    net.settle()
    assert seen == []
    net.settle(3.5)
    assert seen == [1001, 1002, 1003]
    assert net.clock.now == 1003.5


def test_run_until_says_which_seed_failed():
    with pytest.raises(AssertionError, match="seed=77"):
        SimNet(77).run_until(lambda: False)
    net = SimNet(78)
    busy(net)
    with pytest.raises(AssertionError, match="seed=78"):
        net.run_until(lambda: False, 50)
    with pytest.raises(AssertionError, match="did not come to rest"):
        net.settle(steps=50)


def busy(net: SimNet) -> None:
    def again() -> None:
        net.reactor().call_soon(again)

    again()


def test_a_stall_holds_one_direction():
    net = SimNet(1, CALM)
    client, server = connected(net)
    net.settle()
    net.stall(client.transport, 10)
    client.send(b"late")
    server.send(b"at once")
    start = net.clock.now
    net.run_until(lambda: client.got == b"at once")
    assert net.clock.now < start + 5
    net.run_until(lambda: server.got == b"late")
    assert net.clock.now >= start + 10


def test_errors_of_callbacks_are_kept():
    net = SimNet(1)
    net.reactor().call_soon(lambda: 1 / 0)
    net.settle()
    assert [type(exc) for exc, _ in net.errors] == [ZeroDivisionError]
