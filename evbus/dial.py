"""Addresses of servers, and connections to them."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from evbus.errors import ConfigError, ConnectError
from evbus.transport import TcpTransport, format_address

__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "Address",
    "check_address",
    "dial_tcp",
    "no_connection",
    "parse_url",
    "unknown_host",
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 9100


class Address(NamedTuple):
    """Where a server listens."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return format_address((self.host, self.port))


def check_address(host: object, port: object) -> Address:
    """The address as given. Raises ConfigError if it can be none."""
    if not isinstance(host, str) or not host:
        raise ConfigError("host", f"must be a host name or an address, not {host!r}")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ConfigError("port", f"must be 1 to 65535, not {port!r}")
    return Address(host, port)


def parse_url(url: str) -> Address:
    """The address in a URL such as `evbus://127.0.0.1:9100`; the scheme and the port may be left out.

    Raises:
        ConfigError: it is no URL of a kind that is known here.
    """
    if not isinstance(url, str):
        raise ConfigError("url", f"must be text, not {type(url).__name__}")
    if "://" not in url:
        url = f"evbus://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError("url", f"{url!r} is not readable: {exc}") from exc
    if parts.scheme != "evbus":
        raise ConfigError("url", f"must begin with evbus://, not {parts.scheme}://")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url", "must not carry credentials, which would end up in logs; give them as `auth`")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError("url", f"{url!r} has more than host and port")
    return check_address(parts.hostname or DEFAULT_HOST, DEFAULT_PORT if port is None else port)


def dial_tcp(address: Address, timeout_s: float) -> TcpTransport:
    """Connect to the first of a host's addresses that answers. Blocks, at most about `timeout_s` (and what the system
    takes to look up a name).

    Raises:
        ConnectError: names the address, the reason, and what to do.
    """
    deadline = time.monotonic() + timeout_s
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise unknown_host(address, exc) from exc
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, where in dict.fromkeys(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.connect(where)
            return TcpTransport(sock)
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
    raise no_connection(address, failure, timeout_s) from failure


def unknown_host(address: Address, error: Exception) -> ConnectError:
    """The exception for a name that has no address."""
    code = error.errno if isinstance(error, OSError) else None
    return ConnectError(str(address), f"the host {address.host!r} is unknown", code)


def no_connection(address: Address, error: OSError, timeout_s: float) -> ConnectError:
    """The exception for an address that does not answer; a TimeoutError says that the time was up."""
    if isinstance(error, TimeoutError):
        return ConnectError(str(address), f"no answer within {timeout_s:g} s", error.errno)
    return ConnectError(str(address), (error.strerror or str(error)).lower(), error.errno)
