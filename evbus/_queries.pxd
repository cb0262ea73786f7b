# The pending queries, seen from C.
#
# Ownership. A pending_t belongs to the table until query_end frees it; the lists in conn_t (`asking`, `asked`) borrow.
cimport cython
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from evbus._frame cimport span
from evbus._subjects cimport conn_t, hash_t


# One query that was put to one connection.
ctypedef struct asked_t:
    void *query             # pending_t
    conn_t *conn
    asked_t *next_of_query
    asked_t *prev           # in the connection's list, newest first
    asked_t *next


ctypedef struct pending_t:
    uint64_t hash           # of the id on the responders' side
    uint64_t own_hash       # of (asker, id on the asker's side), where the two ids differ
    conn_t *asker
    pending_t *prev         # in the asker's list
    pending_t *next
    asked_t *asked          # who may still answer
    uint32_t asked_count
    uint32_t replies
    bint all                # query_all: every reply goes to the asker
    bint lost               # somebody who was asked went away without a reply
    double deadline
    size_t heap_index
    uint32_t wire_size      # id on the responders' side
    uint32_t own_size       # id on the asker's side; 0: the same
    uint32_t subject_size
    uint8_t data[1]         # wire id, own id, subject


@cython.final
cdef class QueryTable:
    cdef uint64_t key0
    cdef uint64_t key1
    cdef hash_t by_wire_id
    cdef hash_t by_own_id
    cdef pending_t **heap
    cdef size_t heap_room
    cdef readonly size_t count
    cdef uint64_t serial

    cdef pending_t *find(self, span wire_id) noexcept nogil
    cdef pending_t *find_own(self, conn_t *asker, span own_id) noexcept nogil
    cdef pending_t *begin(self, conn_t *asker, span own_id, span subject, double deadline, bint all) noexcept nogil
    cdef int ask(self, pending_t *query, conn_t *conn) noexcept nogil
    cdef asked_t *asked_of(self, pending_t *query, conn_t *conn) noexcept nogil
    cdef void answered(self, pending_t *query, conn_t *conn) noexcept nogil
    cdef void end(self, pending_t *query) noexcept nogil
    cdef pending_t *due(self, double now) noexcept nogil
    cdef void heap_up(self, size_t i) noexcept nogil
    cdef void heap_down(self, size_t i) noexcept nogil


cdef inline span wire_id_of(pending_t *query) noexcept nogil:
    cdef span out
    out.ptr = query.data
    out.size = query.wire_size
    return out


cdef inline span own_id_of(pending_t *query) noexcept nogil:
    cdef span out
    if query.own_size:
        out.ptr = query.data + query.wire_size
        out.size = query.own_size
    else:
        out.ptr = query.data
        out.size = query.wire_size
    return out


cdef inline span subject_of(pending_t *query) noexcept nogil:
    cdef span out
    out.ptr = query.data + query.wire_size + query.own_size
    out.size = query.subject_size
    return out
