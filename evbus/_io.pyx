# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""System calls between sockets and rings: `fill` reads once, `flush` writes once, without the interpreter lock.

The sockets are nonblocking and are given by number. What differs between systems is in `_io_shim.h`.

Threads. While the lock is released the ring's memory is in use, so a ring must be touched by one thread only, as
`_frame` demands anyway.
"""

import os
import sys

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from evbus._frame cimport Ring, ring_fit, ring_make_room, ring_sent, ring_settle, ring_t

from evbus import _frame

cdef extern from "_io_shim.h" nogil:
    enum:
        EVBUS_WOULD_BLOCK

    ctypedef struct evbus_iov_t:
        int count

    void evbus_iov_add(evbus_iov_t *iov, const void *data, size_t size) noexcept
    int64_t evbus_recv(int64_t fd, void *data, size_t size, int *error) noexcept
    int64_t evbus_send(int64_t fd, evbus_iov_t *iov, int *error) noexcept


#: One `flush` hands at most this much to the system: a receiver that drains as fast as we write could otherwise hold
#: the loop for as long as the queue is deep. More than common systems buffer per socket, so it costs no extra calls.
WRITE_BYTES = 4 * 1024 * 1024
cdef size_t WRITE_MOST = 4 * 1024 * 1024
cdef size_t READ_MOST = <size_t>_frame.READ_BYTES
cdef bint WINDOWS = sys.platform == "win32"


cdef object failed(int code):
    # OSError picks the subclass (ConnectionResetError, BrokenPipeError, ...) by the number. Winsock's numbers go into
    # its fourth argument, from which it also makes errno.
    if WINDOWS:
        return OSError(0, "socket error", None, code)
    return OSError(code, os.strerror(code))


def fill(int64_t fd, Ring ring not None, size_t limit):
    """Read once from a socket into a ring.

    Args:
        fd: number of a nonblocking socket.
        ring: takes the bytes behind those it holds. It must have nothing lent.
        limit: largest packet that may have to lie in the ring; the ring does not grow beyond it and one read.

    Returns:
        The number of bytes read; 0 at the end of the stream; -1 if nothing can be read now, be it because the socket
        has nothing or because the ring is full (then the owner must take packets out of it first).

    Raises:
        OSError: the connection is broken, as its subclass (ConnectionResetError, ...).
        MemoryError: no room; nothing was read.
    """
    cdef ring_t *r = &ring.ring
    cdef size_t room
    cdef int64_t n
    cdef int error = 0
    if ring_make_room(r, limit) < 0:
        raise MemoryError
    room = r.cap - r.size
    if room == 0:
        return -1
    if room > READ_MOST:
        room = READ_MOST
    with nogil:
        # ring_make_room left the bytes at the block's start, so that the room behind them is one piece.
        n = evbus_recv(fd, r.buf + r.size, room, &error)
    if n > 0:
        r.size += <size_t>n
        return n
    # Nothing came: the block that was taken for the read is not needed, and an idle connection holds no memory.
    ring_fit(r)
    if n == 0 or n == EVBUS_WOULD_BLOCK:
        return n
    raise failed(error)


def flush(int64_t fd, Ring ring not None):
    """Write once from a ring to a socket: its bytes and the segment lent to it, in one system call.

    What the system does not take of a lent segment is copied into the ring, so that afterwards nothing is lent: the
    owner of the segment is free to move it.

    Args:
        fd: number of a nonblocking socket.
        ring: its bytes leave it from the front.

    Returns:
        The number of bytes left in the ring. 0: all gone, and the ring holds no memory. As many as before: the socket
        takes nothing now. In between: the socket took a part, or `WRITE_BYTES` were reached.

    Raises:
        OSError: the connection is broken, as its subclass (BrokenPipeError, ConnectionResetError, ...).
        MemoryError: no room to copy the rest of a lent segment: bytes are lost, the connection must be reset.
    """
    cdef ring_t *r = &ring.ring
    cdef evbus_iov_t iov
    cdef size_t first, own = r.size, lent = r.lent_size
    cdef int64_t n
    cdef int error = 0
    if own + lent == 0:
        return 0
    iov.count = 0
    if own > WRITE_MOST:
        own = WRITE_MOST
        lent = 0
    elif lent > WRITE_MOST - own:
        lent = WRITE_MOST - own
    if own:
        first = r.cap - r.head
        if first >= own:
            evbus_iov_add(&iov, r.buf + r.head, own)
        else:
            evbus_iov_add(&iov, r.buf + r.head, first)
            evbus_iov_add(&iov, r.buf, own - first)
    if lent:
        evbus_iov_add(&iov, r.lent, lent)
    with nogil:
        n = evbus_send(fd, &iov, &error)
    if n > 0:
        ring_sent(r, <size_t>n)
    elif n != 0 and n != EVBUS_WOULD_BLOCK:
        # The stream is dead; a pointer into somebody else's ring must not outlive this call.
        r.lent_size = 0
        r.lent = NULL
        raise failed(error)
    if r.lent_size and ring_settle(r) < 0:
        raise MemoryError
    return r.size


def settle(Ring ring not None):
    """Copy what is lent to a ring into the ring itself, as `flush` does with the rest of it; for simulated transports.

    Raises:
        MemoryError: no room; the lent bytes are lost.
    """
    if ring_settle(&ring.ring) < 0:
        raise MemoryError
