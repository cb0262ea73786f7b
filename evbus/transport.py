"""Byte streams as the server and the clients see them, and the sockets behind them.

`Transport` is the seam between the event bus and the network, and the only one: one `fill` and one `flush` per
readiness event move bytes between a ring and the other side. `TcpTransport` makes the system calls (`_io`); the
tests' simulated network moves bytes in memory. Nothing above knows which it has.

Errors come as the OSError that the system gave, such as ConnectionResetError or BrokenPipeError; after one, a
transport is only good for `abort` or `close`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from evbus import _io
from evbus.errors import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evbus._frame import Ring

__all__ = ["TcpTransport", "Transport", "accept", "format_address", "listen_tcp", "listen_unix", "remove_unix"]


class Transport(Protocol):
    """One end of a byte stream that never blocks. It belongs to one thread."""

    @property
    def peer(self) -> str:
        """The other side, for logs: "127.0.0.1:52110"."""
        ...

    def fileno(self) -> int:
        """The descriptor to register with the reactor; -1 once closed. Unregister it before closing."""
        ...

    def fill(self, ring: Ring, limit: int) -> int:
        """Read once into the ring, at most `_frame.READ_BYTES`.

        Args:
            ring: takes the bytes. It must have nothing lent.
            limit: largest packet that may have to lie in the ring.

        Returns:
            Bytes read; 0 at the end of the stream (again and again); -1 if nothing can be read now, or if the ring is
            full of what its owner has not taken.

        Raises:
            OSError: the connection is broken.
            MemoryError: no room in memory; nothing was read.
        """
        ...

    def flush(self, ring: Ring) -> int:
        """Write once from the ring, its lent segment included; afterwards nothing is lent to it.

        Returns:
            Bytes left. 0: all gone. As many as before: nothing can be written now.

        Raises:
            OSError: the connection is broken.
            MemoryError: no room to keep what was lent; the stream has a hole and must be reset.
        """
        ...

    def shutdown_write(self) -> None:
        """End our half of the stream: the peer reads what was flushed, then its end. Reading goes on."""
        ...

    def close(self) -> None:
        """Close in order: what was flushed still reaches the peer, as far as the peer reads it.

        If the peer has sent what was not read here, the system resets the connection instead. Again: nothing happens.
        """
        ...

    def abort(self) -> None:
        """Close by a reset: what the peer has not yet received is dropped. Again: nothing happens."""
        ...


class TcpTransport:
    """A connected stream socket: TCP, or a Unix socket.

    Args:
        sock: becomes nonblocking and belongs to the transport from here on.
        peer: the other side, for logs; asked of the socket by default.
    """

    __slots__ = ("_fd", "_sock", "peer")

    peer: str

    def __init__(self, sock: socket.socket, peer: str | None = None) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Packets are written whole and batched by us; waiting for more (Nagle) would only add latency.
            with suppress(OSError):  # the connection may have gone already: the first read tells
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "darwin":
            sock.setsockopt(socket.SOL_SOCKET, 0x1022, 1)  # SO_NOSIGPIPE: there is no MSG_NOSIGNAL here
        if peer is None:
            try:
                peer = format_address(sock.getpeername())
            except OSError:
                peer = "?"
        self.peer = peer
        self._sock = sock
        # The number is kept, as asking for it costs as much as the rest of the call; -1 once closed, so that a late
        # call fails instead of reaching whoever got the number next.
        self._fd = sock.fileno()

    def fileno(self) -> int:
        """See `Transport`."""
        return self._fd

    def fill(self, ring: Ring, limit: int) -> int:
        """See `Transport`."""
        return _io.fill(self._fd, ring, limit)

    def flush(self, ring: Ring) -> int:
        """See `Transport`."""
        return _io.flush(self._fd, ring)

    def shutdown_write(self) -> None:
        """See `Transport`."""
        with suppress(OSError):  # gone already: the next read tells
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Transport`."""
        self._fd = -1
        self._sock.close()

    def abort(self) -> None:
        """See `Transport`."""
        if self._fd < 0:
            return
        # Two u16 on Windows, two ints elsewhere: on, for 0 s.
        linger = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
        with suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def __repr__(self) -> str:
        return f"<TcpTransport fd {self._fd} to {self.peer}>"


def format_address(address: object) -> str:
    """A socket's address as people write it: "127.0.0.1:9100", "[::1]:9100", or the path of a Unix socket."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "replace").replace("\0", "@")  # Linux's abstract names begin with NUL
    return str(address) if address else "unix"


def accept(listener: socket.socket) -> tuple[socket.socket, str] | None:
    """Take one waiting connection.

    Returns:
        The socket and its peer for logs, or None if none is waiting.

    Raises:
        OSError: as the system says; many of these concern only the connection that was waiting (see `acceptor`).
    """
    try:
        sock, address = listener.accept()
    except (BlockingIOError, InterruptedError):
        return None
    return sock, format_address(address)


def listen_tcp(host: str | None, port: int, backlog: int = 1024) -> list[socket.socket]:
    """Listen on every address that a host name stands for.

    Args:
        host: name or numeric address; "" or None for all interfaces.
        port: 0 takes a free one, the same for all addresses.
        backlog: connections that the system keeps until they are accepted.

    Returns:
        Nonblocking listeners, one per address. Addresses of a family that this machine lacks are left out if another
        one can be had.

    Raises:
        ServerStartError: names the address, what is wrong, and the way out.
    """
    where = format_address((host or "*", port))
    if not 0 <= port <= 65535:
        raise ServerStartError(where, "there is no such port", "ports are 1 to 65535, and 0 takes a free one")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        code = exc.errno if isinstance(exc, socket.gaierror) else None
        hint = "check the spelling, or give a numeric address such as 127.0.0.1"
        raise ServerStartError(where, f"the host {host!r} is unknown", hint, code) from exc
    # A name may be listed twice; the order is the system's.
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    # With port 0 the first address chooses; where another one cannot have that port, all of them try again with the
    # next.
    tries = 16 if port == 0 and len(addresses) > 1 else 1
    while True:
        tries -= 1
        try:
            return _listen_all(addresses, port, backlog)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not tries:
                raise _start_error(where, exc) from exc


def _listen_all(addresses: Sequence[tuple[int, tuple[object, ...]]], port: int, backlog: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    missing = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, address in addresses:
        try:
            listener = _listen_one(family, (address[0], port, *address[2:]), backlog)
        except OSError as exc:
            if exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                missing = exc
                continue
            for other in listeners:
                other.close()
            raise
        listeners.append(listener)
        port = port or listener.getsockname()[1]
    if not listeners:
        raise missing
    return listeners


def _listen_one(family: int, address: tuple[object, ...], backlog: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            # There SO_REUSEADDR would let a second server take the port of a running one.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            # A server that is restarted at once must not wait for the old connections' TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "::" would otherwise also take the port of "0.0.0.0", which has a listener of its own.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(backlog)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_unix(path: str, backlog: int = 1024) -> socket.socket:
    """Listen on a Unix domain socket that only this user may connect to (0600).

    Args:
        path: where the socket's file is made. One that a server left behind is removed; anything else there is an
            error.
        backlog: connections that the system keeps until they are accepted.

    Returns:
        A nonblocking listener. Its file is the caller's to remove: `remove_unix`.

    Raises:
        ServerStartError: names the path, what is wrong, and the way out.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise ServerStartError(path, "this system has no Unix domain sockets", "listen on a TCP port instead")
    if not path or "\0" in path:
        raise ServerStartError(repr(path), "this is no path of a file")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            listener.bind(path)
        # Before listen: nobody can connect in between.
        os.chmod(path, 0o600)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        hint = ""
        if exc.errno == errno.EADDRINUSE:
            hint = "another server listens there, or the path is no socket: stop it, or choose another path"
        elif exc.errno is None:
            hint = "paths of Unix sockets have about 100 bytes at most"
        raise ServerStartError(path, exc.strerror or str(exc), hint, exc.errno) from exc
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the file of a socket that nobody listens on any more. Raises OSError EADDRINUSE if it is not that."""
    in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise in_use
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # somebody is there, if not quick to answer
    raise in_use


def remove_unix(path: str, inode: int) -> None:
    """Remove the file of a closed listener, unless another server has put its own there meanwhile."""
    try:
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
    except OSError:
        pass  # gone already


def _start_error(where: str, exc: OSError) -> ServerStartError:
    problem, hint = exc.strerror or str(exc), ""
    if exc.errno == errno.EADDRINUSE:
        problem = "the port is in use"
        hint = "another server may be running there: stop it, or choose another port; port 0 takes a free one"
    elif exc.errno in (errno.EACCES, errno.EPERM):
        problem = "this user may not listen there"
        hint = "ports below 1024 are often reserved: choose a higher one"
    elif exc.errno == errno.EADDRNOTAVAIL:
        problem = "this machine does not have that address"
        hint = "127.0.0.1 is for this machine only, 0.0.0.0 stands for all its addresses"
    return ServerStartError(where, problem, hint, exc.errno)
