# The server's data plane, seen from C. Bodies and the theory of operation are in _router.pyx.
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from evbus._flow cimport receipt_t
from evbus._frame cimport ERROR_CODES, Ring, RingPool, envelope_t, packet_t, span
from evbus._queries cimport QueryTable, pending_t
from evbus._subjects cimport SubjectTable, conn_t, entry_t, flow_t, route_t, sub_t


@cython.final
cdef class Link:
    cdef conn_t c
    cdef readonly Ring inp
    cdef readonly Ring out
    cdef readonly Router router
    cdef object flush          # callable(Ring) -> bytes left; the transport's
    cdef public object owner   # the control plane's own object for this connection
    cdef bint attached


@cython.final
cdef class Interest:
    cdef sub_t sub
    cdef SubjectTable table
    cdef readonly Link link
    cdef bytes subject_bytes
    cdef bytes group_bytes
    cdef bint active


@cython.final
cdef class Router:
    cdef readonly SubjectTable table
    cdef readonly QueryTable queries
    cdef RingPool pool
    # Limits, in bytes and counts; see limits.py.
    cdef uint32_t payload_limit
    cdef uint32_t query_limit
    cdef size_t pending_limit
    cdef size_t soft_limit     # above it nothing is queued that may be dropped or can wait
    cdef double query_max_s
    cdef double query_default_s
    # Time, set once per turn by the owner.
    cdef double now
    cdef int64_t unix_ms
    cdef int64_t ticks         # SystemId towards peers of the 1.2 generation and later
    # The run: consecutive publishes in one input ring that become deliveries in place.
    cdef uint8_t *run_start
    cdef size_t run_size
    cdef uint32_t run_msgs
    cdef conn_t **run_targets
    cdef uint32_t run_count
    cdef entry_t *run_entry
    cdef uint32_t run_dialect
    cdef entry_t *last
    cdef int64_t work
    # Connections that got bytes: during this feed, and since the last flush.
    cdef conn_t **touched
    cdef size_t touched_count
    cdef size_t touched_room
    cdef conn_t **dirty
    cdef size_t dirty_count
    cdef size_t dirty_room
    cdef conn_t **victims
    cdef size_t victim_count
    cdef size_t victim_room
    # Connections with flows that have room again.
    cdef conn_t **relieved
    cdef size_t relieved_count
    cdef size_t relieved_room
    cdef receipt_t *receipt    # of the publish at hand, if its message waits for credit
    cdef list lost
    cdef list blocked
    cdef object packet
    cdef packet_t pk
    cdef uint8_t prefix[1024]
    cdef uint64_t guid_serial
    # Counters.
    cdef readonly uint64_t packets_in
    cdef readonly uint64_t bytes_in
    cdef readonly uint64_t published
    cdef readonly uint64_t delivered
    cdef readonly uint64_t unrouted
    cdef readonly uint64_t dropped_slow
    cdef readonly uint64_t dropped_newest
    cdef readonly uint64_t dropped_held
    cdef readonly uint64_t gaps
    cdef readonly uint64_t gaps_untold
    cdef readonly uint64_t held
    cdef readonly uint64_t held_msgs
    cdef readonly uint64_t queries_asked
    cdef readonly uint64_t queries_answered
    cdef readonly uint64_t unknown_packets
    cdef readonly uint64_t early_packets
    cdef readonly uint64_t bytes_out
    cdef uint64_t errors[ERROR_CODES]

    cdef int scan(self, conn_t *c) noexcept nogil
    cdef int on_publish_v1(self, conn_t *c) noexcept nogil
    cdef void refuse_payload(self, conn_t *c, envelope_t *env) noexcept nogil
    cdef int on_publish_v2(self, conn_t *c) noexcept nogil
    cdef int on_query(self, conn_t *c, bint v2) noexcept nogil
    cdef int route(self, conn_t *c, envelope_t *env, uint32_t in_place) noexcept nogil
    cdef entry_t *entry_of(self, span subject) noexcept nogil
    cdef void run_commit(self) noexcept nogil
    cdef uint32_t fan_out(self, conn_t *c, envelope_t *env, conn_t **targets, uint32_t count, conn_t *skip,
                          uint32_t flags, span task_id) noexcept nogil
    cdef uint32_t to_groups(self, conn_t *c, entry_t *entry, envelope_t *env, pending_t *query,
                            uint32_t *missed) noexcept nogil
    cdef uint32_t make_prefix(self, conn_t *sender, uint32_t dialect, uint32_t flags, uint32_t codec, int32_t sid,
                              int32_t deadline_ms, span task_id, span subject, uint32_t headers_size,
                              uint32_t payload_size) noexcept nogil
    cdef uint32_t to_extras(self, conn_t *c, route_t *route, envelope_t *env, uint32_t *missed) noexcept nogil
    cdef uint32_t ask_extras(self, conn_t *c, route_t *route, envelope_t *env, pending_t *query) noexcept nogil
    cdef bint has_room(self, conn_t *c, size_t size) noexcept nogil
    cdef bint must_wait(self, sub_t *sub, size_t size) noexcept nogil
    cdef bint must_drop(self, conn_t *c, size_t size) noexcept nogil
    cdef void drop_newest(self, flow_t *flow) noexcept nogil
    cdef bint send_or_hold(self, conn_t *publisher, sub_t *sub, uint32_t prefix_size, envelope_t *env) noexcept nogil
    cdef void release(self, flow_t *flow) noexcept nogil
    cdef void settle_receipt(self, receipt_t *receipt, bint delivered) noexcept nogil
    cdef void put_gap(self, flow_t *flow) noexcept nogil
    cdef void tell_gaps(self, conn_t *c) noexcept nogil
    cdef void end_flow(self, flow_t *flow) noexcept nogil
    cdef int relieve(self) except -1
    cdef bint deliver(self, conn_t *c, uint32_t prefix_size, span headers, span payload) noexcept nogil
    cdef bint answer(self, conn_t *c, envelope_t *env) noexcept nogil
    cdef pending_t *old_rule(self, conn_t *c, span subject) noexcept nogil
    cdef void send_answer(self, conn_t *c, pending_t *query, envelope_t *env) noexcept nogil
    cdef void put(self, conn_t *c, const uint8_t *p, uint32_t size) noexcept nogil
    cdef void touch(self, conn_t *c) noexcept nogil
    cdef void make_victim(self, conn_t *c, uint32_t reason) noexcept nogil
    cdef void put_response(self, conn_t *c, span task_id, uint32_t status, span text) noexcept nogil
    cdef void put_error(self, conn_t *c, span task_id, uint32_t code, span subject) noexcept nogil
    cdef void put_receipt(self, conn_t *c, span task_id, uint32_t receivers, uint32_t dropped) noexcept nogil
    cdef void put_query_end(self, conn_t *c, pending_t *query, uint32_t reason, int64_t lost) noexcept nogil
    cdef int64_t own_system_id(self, conn_t *c) noexcept nogil
    cdef int64_t sender_system_id(self, conn_t *sender, uint32_t dialect) noexcept nogil
    cdef int flush_one(self, conn_t *c) except -1
    cdef int finish(self) except -1
    cdef int settle_touched(self) except -1
