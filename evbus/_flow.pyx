# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The memory of subscriptions with an overflow policy: gaps not told yet, messages that wait for credit, and the receipts
that wait for those. What is done with them stands in `_router.pyx`.

Threads: one thread, the reactor's.
"""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from evbus import wire


cdef flow_t *flow_new(sub_t *sub, uint32_t policy) noexcept nogil:
    # NULL when memory is short.
    cdef flow_t *flow = <flow_t *>calloc(1, sizeof(flow_t))
    if flow is NULL:
        return NULL
    flow.sub = sub
    flow.policy = policy
    flow.next = <flow_t *>sub.conn.flows
    if flow.next is not NULL:
        flow.next.prev = flow
    sub.conn.flows = flow
    sub.flow = flow
    return flow


cdef void flow_unlink(flow_t *flow) noexcept nogil:
    # Out of its connection's list. Nothing may wait in it any more.
    if flow.prev is not NULL:
        flow.prev.next = flow.next
    else:
        flow.sub.conn.flows = flow.next
    if flow.next is not NULL:
        flow.next.prev = flow.prev
    flow.sub.flow = NULL
    free(flow)


cdef held_t *flow_hold(flow_t *flow, size_t size) noexcept nogil:
    # Room for a packet at the end of the queue; NULL when memory is short.
    cdef held_t *held = <held_t *>malloc(sizeof(held_t) + size)
    if held is NULL:
        return NULL
    held.next = NULL
    held.receipt = NULL
    held.size = size
    if flow.tail is NULL:
        flow.head = held
    else:
        (<held_t *>flow.tail).next = held
    flow.tail = held
    flow.held_msgs += 1
    flow.sub.conn.held_bytes += sizeof(held_t) + size
    flow.sub.conn.held_msgs += 1
    return held


cdef held_t *flow_pop(flow_t *flow) noexcept nogil:
    # The oldest packet that waits, now the caller's to free; NULL if there is none.
    cdef held_t *held = <held_t *>flow.head
    if held is NULL:
        return NULL
    flow.head = held.next
    if held.next is NULL:
        flow.tail = NULL
    flow.held_msgs -= 1
    flow.sub.conn.held_bytes -= sizeof(held_t) + held.size
    flow.sub.conn.held_msgs -= 1
    return held


cdef receipt_t *receipt_new(conn_t *publisher, span task_id) noexcept nogil:
    # NULL when memory is short. `left` is 1: the publish that is being routed.
    cdef receipt_t *receipt = <receipt_t *>calloc(1, sizeof(receipt_t))
    if receipt is NULL:
        return NULL
    receipt.publisher = publisher
    receipt.next = <receipt_t *>publisher.receipts
    if receipt.next is not NULL:
        receipt.next.prev = receipt
    publisher.receipts = receipt
    receipt.left = 1
    receipt.task_size = task_id.size
    memcpy(receipt.task_id, task_id.ptr, task_id.size)
    return receipt


cdef void receipt_free(receipt_t *receipt) noexcept nogil:
    if receipt.publisher is not NULL:
        if receipt.prev is not NULL:
            receipt.prev.next = receipt.next
        else:
            receipt.publisher.receipts = receipt.next
        if receipt.next is not NULL:
            receipt.next.prev = receipt.prev
    free(receipt)


cdef void receipts_orphan(conn_t *publisher) noexcept nogil:
    # The publisher has gone: nobody is told.
    cdef receipt_t *receipt = <receipt_t *>publisher.receipts
    publisher.receipts = NULL
    while receipt is not NULL:
        receipt.publisher = NULL
        receipt = receipt.next


assert (wire.Overflow.CLOSE, wire.Overflow.DROP_NEWEST, wire.Overflow.BLOCK) == (
    OVERFLOW_CLOSE, OVERFLOW_DROP_NEWEST, OVERFLOW_BLOCK,
)
