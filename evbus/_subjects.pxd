# The subject table, seen from C: connections' interests, exact subjects, patterns, and the cache of matches.
#
# Ownership. A sub_t belongs to its Interest; the table borrows it between table_add and table_remove. An entry_t and its
# route belong to the table: they are valid until the next add, remove, touch_all or missed lookup.
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from evbus._frame cimport DIALECTS, ring_t, span


# One connection, as the data plane sees it. Embedded in a Link (_router.pyx), which owns it.
ctypedef struct conn_t:
    ring_t *inp
    ring_t *out
    void *owner             # the Link, borrowed
    uint64_t id
    uint32_t header         # 22 or 23; 0 until it is known
    uint32_t dialect
    uint32_t state
    uint32_t packet_limit
    uint32_t subscriptions
    uint32_t queries        # pending queries it asked
    bint touched            # got bytes during this feed
    bint dirty              # has bytes to flush at the end of this turn
    bint blocked            # the kernel took no more: flushed when it is writable again
    uint32_t victim         # 0, or the CloseReason for which it is about to be closed
    uint64_t mark           # scratch: last resolve that saw it
    void *asking            # its own pending queries (pending_t list)
    void *asked             # queries put to it (asked_t list)
    void *flows             # its subscriptions with a policy (flow_t list)
    void *receipts          # of its publishes, held back (receipt_t list)
    bint dropping           # over the soft limit: what may be dropped is, until half of that is left
    bint relieved           # bytes were taken since it held back or dropped something
    size_t held_bytes       # of messages that wait for credit
    uint64_t held_msgs
    uint64_t packets_in
    uint64_t bytes_in
    uint64_t msgs_out
    uint64_t dropped


ctypedef struct flow_t


ctypedef struct sub_t:
    conn_t *conn
    int32_t sid             # the client's id of it; 0 for version 1
    uint32_t role
    uint32_t group_size     # 0: plain
    const uint8_t *group
    void *home              # the list it stands in (subs_t)
    void *place             # the entry_t or node_t of that list
    bint is_pattern
    uint32_t index          # where it stands in that list
    flow_t *flow            # NULL: policy CLOSE


# What a subscription with another policy than CLOSE needs.
ctypedef struct flow_t:
    sub_t *sub
    flow_t *prev            # in its connection's list
    flow_t *next
    uint32_t policy
    uint64_t missed         # messages dropped that it has not been told of
    uint64_t dropped        # all of them
    int64_t credit          # messages that it may still be sent
    void *head              # what waits for credit (held_t)
    void *tail
    uint64_t held_msgs


ctypedef struct subs_t:
    sub_t **items
    uint32_t count
    uint32_t room


# Members of one group, by its name, over all matching subscriptions.
ctypedef struct group_t:
    uint32_t first          # in route_t.members
    uint32_t count


# Who gets a message on one subject. Valid while its entry is (see entry_t).
ctypedef struct route_t:
    size_t size             # of this block
    uint32_t receivers      # plain connections and groups
    uint32_t first[DIALECTS + 1]  # plain connections by dialect: plain[first[d]:first[d + 1]]
    uint32_t groups
    uint32_t responders
    uint32_t extras
    conn_t **plain
    group_t *group
    sub_t **member
    sub_t **responder
    # The plain subscriptions of connections of which one that matches has a policy: these connections are not in `plain`, so
    # that what is queued for them one by one keeps its order. By connection, BLOCK last.
    sub_t **extra


ctypedef struct entry_t:
    route_t *route
    uint64_t hash
    uint64_t epoch          # the table's epoch at which the route was made; 0: none yet
    uint32_t turn           # round robin over group members
    uint32_t query_turn     # and over responders
    uint32_t size
    subs_t subs
    bint used               # second chance for the cache's clock
    uint8_t key[1]          # size bytes


ctypedef struct slot_t:
    uint64_t hash
    void *item


# Open addressing, linear probing, at most half full, deletion by shifting back.
ctypedef struct hash_t:
    slot_t *slots
    size_t mask             # slots - 1; 0: none yet
    size_t count


cdef uint64_t siphash13(uint64_t k0, uint64_t k1, const uint8_t *p, size_t size) noexcept nogil
cdef int hash_insert(hash_t *table, uint64_t hash, void *item) noexcept nogil
cdef void hash_remove(hash_t *table, uint64_t hash, void *item) noexcept nogil


@cython.final
cdef class SubjectTable:
    cdef uint64_t key0
    cdef uint64_t key1
    cdef hash_t entries
    cdef hash_t edges
    cdef void *root         # node_t
    cdef uint64_t epoch
    cdef uint64_t stamp
    cdef size_t cached      # entries without subscriptions of their own
    cdef size_t cache_limit
    cdef size_t hand
    cdef uint32_t turn      # where the round robin of the next entry starts
    cdef readonly size_t route_bytes
    cdef readonly uint64_t visited  # nodes and subscriptions looked at to make routes: what that cost
    cdef readonly size_t subscriptions
    cdef readonly size_t patterns
    cdef readonly uint64_t resolved
    cdef readonly uint64_t evicted
    # Scratch of resolve.
    cdef subs_t found
    cdef conn_t **conns
    cdef size_t conns_room

    cdef uint64_t hash(self, const uint8_t *p, size_t size) noexcept nogil
    cdef entry_t *peek(self, const uint8_t *p, uint32_t size) noexcept nogil
    cdef entry_t *probe(self, const uint8_t *p, uint32_t size, uint64_t hash) noexcept nogil
    cdef entry_t *find(self, const uint8_t *p, uint32_t size) noexcept nogil
    cdef int add(self, sub_t *sub, const uint8_t *p, uint32_t size) noexcept nogil
    cdef void remove(self, sub_t *sub) noexcept nogil
    cdef void invalidate(self) noexcept nogil
    cdef int resolve(self, entry_t *entry) noexcept nogil
    cdef int match(self, entry_t *entry) noexcept nogil
    cdef entry_t *insert(self, const uint8_t *p, uint32_t size, uint64_t hash) noexcept nogil
    cdef bint evict(self, entry_t *keep) noexcept nogil
    cdef void drop_route(self, entry_t *entry) noexcept nogil
    cdef void drop_entry(self, entry_t *entry) noexcept nogil
