# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""The system's wall clock for packet headers.

It is read for every packet that a client sends, so it is one call in C (of C11's own function, which Linux, macOS and
Windows have). Apart from `_outbox` because what is sans-IO below gets its time from outside.
"""

from libc.stdint cimport int64_t

from evbus._outbox cimport Clock

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int timespec_get(timespec *ts, int base)
    int TIME_UTC


cdef class SystemClock(Clock):
    """The time as the system has it; assigning `unix_ms` has no effect."""

    cdef int64_t read(self) noexcept:
        cdef timespec ts
        timespec_get(&ts, TIME_UTC)
        return <int64_t>ts.tv_sec * 1000 + <int64_t>ts.tv_nsec // 1000000
