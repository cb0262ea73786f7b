# Subscriptions with an overflow policy of their own, seen from C: what they missed, and what waits for their credit.
#
# Ownership. A flow_t belongs to its Interest (through sub_t.flow) and owns its held_t. A receipt_t belongs to the held
# messages that it waits for, and to the publish while it is routed: it is freed when `left` is 0. The lists in conn_t
# (`flows`, `receipts`) borrow.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from evbus._frame cimport span
from evbus._subjects cimport conn_t, flow_t, sub_t

cdef enum:
    # wire.Overflow
    OVERFLOW_CLOSE = 0
    OVERFLOW_DROP_NEWEST = 1
    OVERFLOW_BLOCK = 2


# The Receipt of one confirmed publish, held back until its message waits for nobody's credit any more.
ctypedef struct receipt_t:
    conn_t *publisher       # NULL: it has gone
    receipt_t *prev         # in the publisher's list
    receipt_t *next
    uint32_t left           # waiting queues that the message is in, and 1 while it is being routed
    uint32_t receivers
    uint32_t dropped
    uint32_t task_size
    uint8_t task_id[128]


# One message in the waiting queue of a subscription: the packet as it will be sent.
ctypedef struct held_t:
    held_t *next
    receipt_t *receipt      # NULL: nobody waits for it
    size_t size
    uint8_t data[1]


cdef flow_t *flow_new(sub_t *sub, uint32_t policy) noexcept nogil
cdef void flow_unlink(flow_t *flow) noexcept nogil
cdef held_t *flow_hold(flow_t *flow, size_t size) noexcept nogil
cdef held_t *flow_pop(flow_t *flow) noexcept nogil
cdef receipt_t *receipt_new(conn_t *publisher, span task_id) noexcept nogil
cdef void receipt_free(receipt_t *receipt) noexcept nogil
cdef void receipts_orphan(conn_t *publisher) noexcept nogil
