"""Addresses of servers, and connections to them."""

from __future__ import annotations

import socket

import pytest

from evbus.dial import Address, UnixAddress, check_address, check_servers, dial, parse_url
from evbus.errors import ConfigError, ConnectError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("evbus://127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("evbus://example.org", ("example.org", 9100)),
        ("evbus://[::1]:1234", ("::1", 1234)),
        ("evbus://", ("127.0.0.1", 9100)),
        ("example.org:80/", ("example.org", 80)),
        ("[::1]", ("::1", 9100)),
    ],
)
def test_urls(url: str, address: tuple[str, int]) -> None:
    assert parse_url(url) == (address,)


def test_urls_of_several_servers_and_of_paths() -> None:
    assert parse_url("evbus://one,two:5,[::1]:6") == (Address("one", 9100), Address("two", 5), Address("::1", 6))
    assert parse_url("unix:///run/x.sock") == (UnixAddress("/run/x.sock"),)
    assert str(UnixAddress("/run/x.sock")) == "/run/x.sock"


def test_servers_instead_of_host_and_port() -> None:
    assert check_servers("h", 1, None) == (Address("h", 1),)
    assert check_servers("h", 1, ["b:2", "unix:///x", "a,b:2"]) == (Address("b", 2), UnixAddress("/x"), Address("a"))
    for wrong in ([], "b:2", 5, [5], ["http://x"]):
        with pytest.raises(ConfigError):
            check_servers("h", 1, wrong)


@pytest.mark.parametrize(
    "url",
    [
        "http://x",
        "evbus+tls://x",
        "unix://run/x",
        "evbus://a,b/c",
        "evbus://a:b@x",
        "evbus://x:0",
        "evbus://x:port",
        "evbus://x:65536",
        "evbus://x/path",
        "evbus://x?y=1",
        "evbus://x#y",
        "evbus://[::1",
        5,
    ],
)
def test_what_is_none(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_url(url)


def test_credentials_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url("evbus://user:canary@host")
    assert "canary" not in str(caught.value)


def test_addresses_print_as_people_write_them() -> None:
    assert str(Address("::1", 5)) == "[::1]:5"
    assert str(check_address("h", 1)) == "h:1"
    with pytest.raises(ConfigError, match="give host='h' and port=91"):
        check_address("h:91", 1)
    for host, port in (("", 1), (None, 1), ("h", 0), ("h", True), ("h", "1")):
        with pytest.raises(ConfigError):
            check_address(host, port)


def test_dialling() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        transport = dial(Address("localhost", port), 5.0)
        assert transport.peer == f"127.0.0.1:{port}"
        transport.close()
    with pytest.raises(ConnectError, match=f"127.0.0.1:{port}: connection refused") as caught:
        dial(Address("127.0.0.1", port), 5.0)
    assert caught.value.errno
    with pytest.raises(ConnectError, match="unknown"):
        dial(Address("no-such-host.invalid", 1), 1.0)


def test_nobody_answering() -> None:
    # A listener whose backlog is full answers no more.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = []
        try:
            with pytest.raises(ConnectError, match=r"no answer within 0\.1 s"):
                while len(waiting) < 20:
                    waiting.append(dial(Address("127.0.0.1", port), 0.1))
        finally:
            for transport in waiting:
                transport.close()
