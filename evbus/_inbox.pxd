# Layout of the client's receiving side. Bodies are in _inbox.pyx.
from libc.stdint cimport uint32_t, uint64_t

from evbus._frame cimport Ring, envelope_t, packet_t, span
from evbus._mailbox cimport Mailbox
from evbus._message cimport Message


cdef class Waiter:
    cdef readonly bytes task_id
    cdef readonly str subject
    cdef readonly str action
    cdef readonly bint many
    cdef bint asks
    cdef readonly double timeout
    cdef public object notify
    cdef object value
    cdef object error
    cdef list replies
    cdef bint finished

    cpdef bint end(self, object value, object error) except -1
    cpdef bint push(self, object reply) except -1


cdef class _Route:
    cdef bytes key
    cdef str subject
    cdef tuple boxes  # get the subject's events
    cdef tuple asked  # get its queries


cdef class Inbox:
    cdef readonly Ring ring
    cdef dict routes
    cdef _Route last
    cdef dict boxes
    cdef dict waiters
    cdef list ready
    cdef list overflows
    cdef object match
    cdef public object answerer
    cdef uint64_t generation
    cdef uint32_t limit
    cdef uint32_t dialect
    cdef uint32_t fallback
    cdef readonly object fault
    cdef readonly uint64_t received_packets
    cdef readonly uint64_t received_msgs
    cdef readonly uint64_t malformed
    cdef readonly uint64_t unknown
    cdef readonly uint64_t unmatched
    cdef readonly uint64_t late_answers
    cdef readonly uint64_t missed_late

    cdef int delivery_v2(self, packet_t *packet) except -1
    cdef int delivery_v1(self, packet_t *packet) except -1
    cdef int deliver(self, envelope_t *fields, packet_t *packet) except -1
    cdef _Route route(self, span subject)
    cdef int put(self, Mailbox box, Message message) except -1
    cdef int want_worker(self, Mailbox box) except -1
    cdef int gap(self, packet_t *packet) except -1
