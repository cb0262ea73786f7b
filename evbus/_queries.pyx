# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The pending queries: who asked, who was asked, until when.

A query travels to its responders under the id that its asker chose. Only if that id is pending from another connection does
the table make one of its own ("evbus-<n>") and remember both, so that an answer can never reach the wrong asker. An answer
is accepted only from a connection in the query's `asked` list. Deadlines stand in a binary heap. Everything hangs on the
two connections' lists as well, so that the end of either finds its queries without a search.

Threads: one thread, the reactor's.
"""

import secrets

from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy

from evbus._frame cimport load_u64, span
from evbus._subjects cimport conn_t, hash_insert, hash_remove, hash_t, siphash13


cdef class QueryTable:
    """The table of one server's pending queries."""

    def __cinit__(self):
        cdef bytes key = secrets.token_bytes(16)
        self.key0 = load_u64(<const uint8_t *>key)
        self.key1 = load_u64(<const uint8_t *>key + 8)

    def __dealloc__(self):
        # Not by `end`: the connections may have gone before the table.
        cdef size_t i
        cdef asked_t *asked
        cdef asked_t *following
        for i in range(self.count):
            asked = self.heap[i].asked
            while asked is not NULL:
                following = asked.next_of_query
                free(asked)
                asked = following
            free(self.heap[i])
        free(self.heap)
        free(self.by_wire_id.slots)
        free(self.by_own_id.slots)

    @property
    def next_deadline(self):
        """Clock time of the earliest deadline, or None."""
        return self.heap[0].deadline if self.count else None

    cdef pending_t *find(self, span wire_id) noexcept nogil:
        cdef uint64_t h
        cdef size_t k
        cdef pending_t *query
        if self.count == 0:
            return NULL
        h = siphash13(self.key0, self.key1, wire_id.ptr, wire_id.size)
        k = h & self.by_wire_id.mask
        while self.by_wire_id.slots[k].item is not NULL:
            if self.by_wire_id.slots[k].hash == h:
                query = <pending_t *>self.by_wire_id.slots[k].item
                if query.wire_size == wire_id.size and memcmp(query.data, wire_id.ptr, wire_id.size) == 0:
                    return query
            k = (k + 1) & self.by_wire_id.mask
        return NULL

    cdef pending_t *find_own(self, conn_t *asker, span own_id) noexcept nogil:
        # The query that this connection asked under this id of its own.
        cdef pending_t *query = self.find(own_id)
        cdef uint64_t h
        cdef size_t k
        if query is not NULL and query.asker == asker and query.own_size == 0:
            return query
        if self.by_own_id.count == 0:
            return NULL
        h = siphash13(self.key0 ^ asker.id, self.key1, own_id.ptr, own_id.size)
        k = h & self.by_own_id.mask
        while self.by_own_id.slots[k].item is not NULL:
            if self.by_own_id.slots[k].hash == h:
                query = <pending_t *>self.by_own_id.slots[k].item
                if (
                    query.asker == asker
                    and query.own_size == own_id.size
                    and memcmp(query.data + query.wire_size, own_id.ptr, own_id.size) == 0
                ):
                    return query
            k = (k + 1) & self.by_own_id.mask
        return NULL

    cdef pending_t *begin(self, conn_t *asker, span own_id, span subject, double deadline, bint all) noexcept nogil:
        # A new query whose id is not pending from the same connection. NULL when memory is short.
        cdef char made[32]
        cdef span wire = own_id
        cdef pending_t *query
        cdef pending_t **heap
        cdef size_t room
        cdef uint32_t own_size = 0
        if self.find(own_id) is not NULL:
            wire.ptr = <const uint8_t *>made
            while True:
                self.serial += 1
                wire.size = <uint32_t>snprintf(made, sizeof(made), b"evbus-%llu", <unsigned long long>self.serial)
                if self.find(wire) is NULL:
                    break
            own_size = own_id.size
        if self.count == self.heap_room:
            room = 64 if self.heap_room == 0 else self.heap_room * 2
            heap = <pending_t **>realloc(self.heap, room * sizeof(pending_t *))
            if heap is NULL:
                return NULL
            self.heap = heap
            self.heap_room = room
        query = <pending_t *>malloc(sizeof(pending_t) + wire.size + own_size + subject.size)
        if query is NULL:
            return NULL
        query.wire_size = wire.size
        query.own_size = own_size
        query.subject_size = subject.size
        memcpy(query.data, wire.ptr, wire.size)
        if own_size:
            memcpy(query.data + wire.size, own_id.ptr, own_size)
        memcpy(query.data + wire.size + own_size, subject.ptr, subject.size)
        query.hash = siphash13(self.key0, self.key1, wire.ptr, wire.size)
        query.own_hash = siphash13(self.key0 ^ asker.id, self.key1, own_id.ptr, own_id.size)
        if hash_insert(&self.by_wire_id, query.hash, query) < 0:
            free(query)
            return NULL
        if own_size and hash_insert(&self.by_own_id, query.own_hash, query) < 0:
            hash_remove(&self.by_wire_id, query.hash, query)
            free(query)
            return NULL
        query.asker = asker
        query.asked = NULL
        query.asked_count = 0
        query.replies = 0
        query.all = all
        query.lost = False
        query.deadline = deadline
        query.prev = NULL
        query.next = <pending_t *>asker.asking
        if query.next is not NULL:
            query.next.prev = query
        asker.asking = query
        asker.queries += 1
        self.heap[self.count] = query
        query.heap_index = self.count
        self.count += 1
        self.heap_up(query.heap_index)
        return query

    cdef int ask(self, pending_t *query, conn_t *conn) noexcept nogil:
        # Notes that the query was put to a connection. Returns -1 when memory is short.
        cdef asked_t *asked = <asked_t *>malloc(sizeof(asked_t))
        if asked is NULL:
            return -1
        asked.query = query
        asked.conn = conn
        asked.next_of_query = query.asked
        query.asked = asked
        query.asked_count += 1
        asked.prev = NULL
        asked.next = <asked_t *>conn.asked
        if asked.next is not NULL:
            asked.next.prev = asked
        conn.asked = asked
        return 0

    cdef asked_t *asked_of(self, pending_t *query, conn_t *conn) noexcept nogil:
        cdef asked_t *asked = query.asked
        while asked is not NULL and asked.conn != conn:
            asked = asked.next_of_query
        return asked

    cdef void answered(self, pending_t *query, conn_t *conn) noexcept nogil:
        # Takes one entry of a connection off the query's list: it has answered, or is gone.
        cdef asked_t **at = &query.asked
        cdef asked_t *asked
        while at[0] is not NULL and at[0].conn != conn:
            at = &at[0].next_of_query
        asked = at[0]
        if asked is NULL:
            return
        at[0] = asked.next_of_query
        query.asked_count -= 1
        if asked.prev is not NULL:
            asked.prev.next = asked.next
        else:
            conn.asked = asked.next
        if asked.next is not NULL:
            asked.next.prev = asked.prev
        free(asked)

    cdef void end(self, pending_t *query) noexcept nogil:
        # Forgets a query and frees it.
        cdef size_t i = query.heap_index
        while query.asked is not NULL:
            self.answered(query, query.asked.conn)
        hash_remove(&self.by_wire_id, query.hash, query)
        if query.own_size:
            hash_remove(&self.by_own_id, query.own_hash, query)
        if query.prev is not NULL:
            query.prev.next = query.next
        else:
            query.asker.asking = query.next
        if query.next is not NULL:
            query.next.prev = query.prev
        query.asker.queries -= 1
        self.count -= 1
        if i != self.count:
            self.heap[i] = self.heap[self.count]
            self.heap[i].heap_index = i
            self.heap_up(i)
            self.heap_down(self.heap[i].heap_index)
        free(query)

    cdef pending_t *due(self, double now) noexcept nogil:
        # A query whose deadline has passed, or NULL.
        if self.count and self.heap[0].deadline <= now:
            return self.heap[0]
        return NULL

    cdef void heap_up(self, size_t i) noexcept nogil:
        cdef pending_t *query = self.heap[i]
        cdef size_t parent
        while i:
            parent = (i - 1) >> 1
            if self.heap[parent].deadline <= query.deadline:
                break
            self.heap[i] = self.heap[parent]
            self.heap[i].heap_index = i
            i = parent
        self.heap[i] = query
        query.heap_index = i

    cdef void heap_down(self, size_t i) noexcept nogil:
        cdef pending_t *query = self.heap[i]
        cdef size_t child
        while True:
            child = 2 * i + 1
            if child >= self.count:
                break
            if child + 1 < self.count and self.heap[child + 1].deadline < self.heap[child].deadline:
                child += 1
            if query.deadline <= self.heap[child].deadline:
                break
            self.heap[i] = self.heap[child]
            self.heap[i].heap_index = i
            i = child
        self.heap[i] = query
        query.heap_index = i
