"""Addresses of servers, and connections to them."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from evbus.errors import ConfigError, ConnectError
from evbus.transport import TcpTransport, format_address

__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "Address",
    "Server",
    "UnixAddress",
    "check_address",
    "check_servers",
    "dial",
    "no_connection",
    "parse_url",
    "unix_socket",
    "unknown_host",
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 9100


class Address(NamedTuple):
    """Where a server listens on TCP."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return format_address((self.host, self.port))


class UnixAddress(NamedTuple):
    """Where a server listens on a Unix domain socket."""

    path: str

    def __str__(self) -> str:
        return self.path


Server = Address | UnixAddress


def check_address(host: object, port: object) -> Address:
    """The address as given. Raises ConfigError if it can be none."""
    if not isinstance(host, str) or not host:
        raise ConfigError("host", f"must be a host name or an address, not {host!r}")
    name, colon, number = host.partition(":")
    if colon and number.isdecimal():
        raise ConfigError("host", f"{host!r} has a port in it; give host={name!r} and port={number}")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ConfigError("port", f"must be 1 to 65535, not {port!r}")
    return Address(host, port)


def check_servers(host: object, port: object, servers: object) -> tuple[Server, ...]:
    """The servers of a client, in the order in which they are tried: those of `servers`, or else host and port.

    Raises:
        ConfigError: they can be none.
    """
    if servers is None:
        return (check_address(host, port),)
    if isinstance(servers, str) or not isinstance(servers, Sequence) or not servers:
        raise ConfigError("servers", f'must be a list of URLs, such as ["evbus://10.0.0.1:9100"], not {servers!r}')
    return tuple(dict.fromkeys(server for url in servers for server in parse_url(url)))


def parse_url(url: object) -> tuple[Server, ...]:
    """The addresses in a URL: `evbus://127.0.0.1:9100`, several servers as `evbus://one:9100,two:9100`, or the path of
    a Unix domain socket as `unix:///run/evbus.sock`. The scheme `evbus` and the port may be left out.

    Raises:
        ConfigError: it is no URL of a kind that is known here.
    """
    if not isinstance(url, str):
        raise ConfigError("url", f"must be text, not {type(url).__name__}")
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "evbus", url
    if scheme == "unix":
        if not rest.startswith("/"):
            raise ConfigError("url", f"must have the whole path of a socket, as in unix:///run/evbus.sock, not {url!r}")
        return (UnixAddress(rest),)
    if scheme != "evbus":
        raise ConfigError("url", f"must begin with evbus:// or unix://, not {scheme}://")
    if "@" in rest:
        raise ConfigError("url", "must not carry credentials, which would end up in logs; give them as `auth`")
    return tuple(_parse_tcp(url, part) for part in rest.removesuffix("/").split(","))


def _parse_tcp(url: str, place: str) -> Address:
    try:
        parts = urlsplit(f"evbus://{place}")
        port = parts.port
    except ValueError as exc:
        raise ConfigError("url", f"{url!r} is not readable: {exc}") from exc
    if parts.path or parts.query or parts.fragment:
        raise ConfigError("url", f"{url!r} has more than host and port")
    return check_address(parts.hostname or DEFAULT_HOST, DEFAULT_PORT if port is None else port)


def dial(server: Server, timeout_s: float) -> TcpTransport:
    """Connect to a server; to the first of a host's addresses that answers. Blocks, at most about `timeout_s` (and what
    the system takes to look up a name).

    Raises:
        ConnectError: names the address, the reason, and what to do.
    """
    if isinstance(server, UnixAddress):
        return _dial_unix(server, timeout_s)
    deadline = time.monotonic() + timeout_s
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise unknown_host(server, exc) from exc
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, where in dict.fromkeys(found):
        try:
            return _connected(socket.socket(family, kind, protocol), where, deadline - time.monotonic())
        except OSError as exc:
            failure = exc
    raise no_connection(server, failure, timeout_s) from failure


def _dial_unix(server: UnixAddress, timeout_s: float) -> TcpTransport:
    try:
        return _connected(unix_socket(server), server.path, timeout_s)
    except OSError as exc:
        raise no_connection(server, exc, timeout_s) from exc


def unix_socket(server: UnixAddress) -> socket.socket:
    """A socket for a path. Raises ConnectError where there are none of that kind."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConnectError(str(server), "this system has no Unix domain sockets")
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _connected(sock: socket.socket, where: object, timeout_s: float) -> TcpTransport:
    try:
        sock.settimeout(max(timeout_s, 0.001))
        sock.connect(where)  # type: ignore[arg-type]  # as getaddrinfo gave it, or a path
        return TcpTransport(sock)
    except BaseException:
        sock.close()
        raise


def unknown_host(address: Address, error: Exception) -> ConnectError:
    """The exception for a name that has no address."""
    code = error.errno if isinstance(error, OSError) else None
    return ConnectError(str(address), f"the host {address.host!r} is unknown", code)


def no_connection(server: Server, error: OSError, timeout_s: float) -> ConnectError:
    """The exception for a server that does not answer; a TimeoutError says that the time was up."""
    if isinstance(error, TimeoutError):
        return ConnectError(str(server), f"no answer within {timeout_s:g} s", error.errno)
    return ConnectError(str(server), (error.strerror or str(error)).lower(), error.errno)
