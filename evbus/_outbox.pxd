# Layout of the client's sending side. Bodies are in _outbox.pyx.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from evbus._frame cimport Ring

cdef enum:
    # Results of the pack methods.
    P_OK = 0      # staged; somebody is on it
    P_FULL = 1    # over the high watermark; nothing was staged
    P_CLOSED = 2  # no connection that is ready for this; nothing was staged
    P_SLOW = 3    # pack_event only: take the general way (version 1, or a handler may be answering a query)
    P_YIELD = 4   # pack_event of an outbox that gathers: staged, and a buffer full was sent; let others have a turn

    # Results of flush.
    S_DONE = 0     # nothing is left
    S_BUSY = 1     # somebody else is at it, and will send what was staged
    S_BLOCKED = 2  # the kernel takes no more for now; the I/O thread has been woken to wait for it
    S_CLOSED = 3   # no transport, or it failed just now


cdef class Clock:
    cdef public int64_t unix_ms

    cdef int64_t read(self) noexcept


cdef class Outbox:
    cdef Ring staging
    cdef Ring sending
    cdef Clock clock
    cdef object transport
    cdef object last_subject
    cdef bytes last_key
    cdef dict keys
    cdef size_t high
    cdef size_t low
    cdef size_t eager
    cdef size_t in_flight
    cdef size_t payload_limit
    cdef uint32_t dialect
    cdef uint32_t epoch
    cdef int inside
    cdef int answering_now
    cdef bint fast
    cdef bint idle
    cdef bint flushing
    cdef bint blocked
    cdef bint room_wanted
    cdef bint burst
    cdef bint polling
    cdef bint gathers
    cdef bint corked
    cdef int corked_msgs
    cdef size_t room_mark
    cdef int64_t burst_ms
    cdef int burst_msgs
    cdef readonly object broken
    cdef readonly uint64_t packed_msgs
    cdef readonly uint64_t flushed_bytes
    cdef readonly uint64_t flushes
    cdef readonly uint64_t wakes
    cdef public object wake
    cdef public object on_room

    cdef bytes key_of(self, object subject)
    cdef int stage(self, const void *head, size_t head_size, const void *tail, size_t tail_size) except -1
    cdef bint takes(self, size_t payload_size) noexcept
    cdef int stage_message(self, uint32_t dialect, uint32_t object_id, bytes key, bytes payload, uint32_t flags,
                           uint32_t codec, int32_t deadline_ms, bytes task_id, bytes query_task_id, bytes headers,
                           bint force) except -1
    cdef int after_stage(self, bint urgent) except -1
    cdef bint full(self, size_t size) noexcept
    cdef int uncork(self) except -1
    cdef void refresh_fast(self) noexcept
