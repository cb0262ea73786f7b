# Layout of a subscription's queue. Bodies are in _mailbox.pyx.
from libc.stdint cimport int32_t, uint64_t

from evbus._message cimport Message

cdef enum:
    # What a mailbox does with a message that finds it full.
    OVER_CLOSE = 0
    OVER_DROP_NEWEST = 1
    OVER_DROP_OLDEST = 2
    OVER_BLOCK = 3


cdef class Batch:
    cdef list items
    cdef readonly size_t taken
    cdef size_t size
    cdef readonly bint plain
    cdef list gaps


cdef class Tally:
    cdef readonly uint64_t handled
    cdef readonly uint64_t dropped
    cdef readonly uint64_t errors
    cdef readonly uint64_t missed


cdef class Mailbox:
    cdef Tally tally
    cdef readonly int32_t sid
    cdef readonly object owner
    cdef public object wake
    cdef Batch tail
    cdef object batches
    cdef list current
    cdef readonly size_t max_msgs
    cdef readonly size_t max_bytes
    cdef size_t msgs
    cdef size_t size
    cdef size_t batch_msgs
    cdef size_t window
    cdef size_t due
    cdef public object grant
    cdef int overflow
    cdef int concurrency
    cdef int workers
    cdef bint ended
    cdef readonly bint overflowed
    cdef readonly uint64_t received
    cdef readonly uint64_t dropped
    cdef readonly uint64_t discarded
    cdef readonly uint64_t handled
    cdef readonly uint64_t errors
    cdef readonly uint64_t missed

    cdef size_t begun(self)
    cdef int put(self, Message message) except -1
    cdef void drop(self) noexcept
    cdef int drop_newest(self) except -1
    cdef Batch new_tail(self)
    cdef int drop_oldest(self) except -1
