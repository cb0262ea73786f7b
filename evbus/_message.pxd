# Layout of a received message. Bodies are in _message.pyx.
from libc.stdint cimport int32_t, int64_t, uint32_t


cdef class Message:
    cdef readonly str subject
    cdef readonly bytes data
    cdef bytes raw_headers
    cdef dict header_map
    cdef bytes query_id
    cdef object answerer
    cdef tuple failure
    cdef int64_t unix_ms
    cdef readonly int64_t sender
    cdef readonly uint32_t codec
    cdef uint32_t fallback
    cdef readonly int32_t deadline_ms
    cdef int handlers_left
    cdef bint is_answered
