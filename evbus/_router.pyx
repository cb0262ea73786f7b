# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The server's data plane: packets in one ring become packets in others, without a Python object per message.

`Router.feed(link)` scans a connection's input ring. Publishes, queries and answers are handled here, in C; every other known
packet is handed to the control plane (`feed` returns `FEED_CONTROL` and `take_packet()` gives it), in order, so that the two
planes together see a connection's packets one after the other.

Three ideas carry the speed:

* *Runs.* A publish and its delivery have the same body, in every dialect, if the publish carries no query id (in the dialect
  with `IsQueryRequest` that flag is one zero byte, just where an empty `QueryTaskId` stands). Such a publish becomes a delivery
  by patching its header where it lies. Consecutive ones for the same receivers form a run, which is lent to each receiver's
  ring as one segment and goes to the kernel from where it lies. Only what the kernel does not take is copied.
* *Entries.* A subject is looked up once per change of subject, and its route (who gets it) is remembered with it.
* *Flushes.* A receiver with much queued is flushed at the end of the feed, while the bytes are in the cache; one with
  little waits for the end of the loop's turn (`flush_dirty`), so that a turn costs it one system call.

A lent segment borrows from the input ring of the connection being fed, so `finish` settles all of them before `feed` lets
go of that ring's bytes.

Nothing is dropped silently: every path that does not deliver counts, and tells the sender where the protocol has words for
it. A receiver whose ring would exceed the limit of pending bytes becomes a *victim*: it gets nothing more and the owner of
the router closes it (`take_victims`).

Subscriptions with another overflow policy than CLOSE (a *flow* each, see `_flow.pxd`) stay out of all this: a route lists
those that are plain apart (`extra`), so that the others' deliveries cost nothing more. DROP_NEWEST: over the soft limit its
messages are dropped until half of the limit is left; then, or before a message that cannot be dropped, a Gap tells how
many. BLOCK: each message takes one from the subscription's credit; without credit, or over the soft limit, it waits in a
copy, and the Receipt of its publish waits with it.

Threads: one thread, the reactor's, with the interpreter lock held except inside the transports' system calls.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset, strlen

from evbus._frame cimport (
    D_EVBUS_2, D_H22, D_H23_199, D_H23_255, DIALECTS, E_DUPLICATE_ID, E_INVALID_SUBJECT, E_MALFORMED, E_NO_RESPONDERS,
    E_PAYLOAD_TOO_LARGE, E_TOO_MANY_QUERIES, E_UNKNOWN_QUERY, F_ALL, F_ANSWER, F_CONFIRM, F_NO_ECHO, F_QUERY, HEADER_22,
    HEADER_23, MAX_TASK_ID, O_CANCEL_QUERY, O_CREDIT, O_DELIVERY, O_ERROR, O_GAP, O_HANDSHAKE, O_HEARTBEAT, O_HEARTBEAT_OLD,
    O_PUBLISH, O_QUERY, O_QUERY_END, O_RECEIPT, O_RESPONSE, O_SUBSCRIBE, O_UNSUBSCRIBE, SCAN_BAD_SIZE, SCAN_MORE,
    SCAN_PACKET, SCAN_TOO_LARGE, SUBJECT_OK, cursor, envelope_read, layout_detect, pack_packet, packet_scan, read_bytes, read_string, ring_lend,
    ring_linear, ring_put, ring_release, ring_fit, ring_settle, ring_skip, ring_t, span_blank, store_header,
    store_string, store_u32, store_u64, string_room, subject_check,
)
from evbus._flow cimport (
    OVERFLOW_BLOCK, OVERFLOW_CLOSE, OVERFLOW_DROP_NEWEST, flow_hold, flow_new, flow_pop, flow_unlink, held_t, receipt_free,
    receipt_new, receipts_orphan,
)
from evbus._queries cimport asked_t, own_id_of, subject_of, wire_id_of
from evbus._subjects cimport group_t, route_t

from evbus import wire

cdef enum:
    S_NEW = 0
    S_READY = 1
    S_CLOSING = 2

    # A receiver with this much queued is flushed at the end of the feed rather than of the turn: one system call more per
    # 16 KiB costs little, and the bytes are still in the cache.
    FLUSH_NOW = 16384
    # A payload from this size on is lent to the receiver's ring instead of copied into it.
    LEND_MIN = 8192
    # Deliveries after which one feed stops, so that a publisher with many subscribers cannot hold the loop.
    WORK_PER_FEED = 65536
    # One node or subscription looked at to find out who gets a message on a new subject, in deliveries.
    WORK_PER_VISIT = 4

    CLOSE_NOT_EVENT_BUS = 4
    CLOSE_PACKET_TOO_LARGE = 6
    CLOSE_PROTOCOL_ERROR = 7
    CLOSE_SLOW = 9
    CLOSE_INTERNAL = 14

    GAP_OVERFLOW = 1

    END_COMPLETE = 0
    END_RESPONDER_LOST = 1
    END_DEADLINE = 2

FEED_DONE = 0
FEED_CONTROL = 1
FEED_YIELD = 2

LINK_NEW = S_NEW
LINK_READY = S_READY
LINK_CLOSING = S_CLOSING

cdef const char *error_text(uint32_t code) noexcept nogil:
    if code == E_MALFORMED:
        return b"the packet is malformed"
    if code == E_INVALID_SUBJECT:
        return b"the subject is not valid here"
    if code == E_PAYLOAD_TOO_LARGE:
        return b"the payload is larger than this server allows"
    if code == E_NO_RESPONDERS:
        return b"nobody answers queries on this subject"
    if code == E_TOO_MANY_QUERIES:
        return b"too many of this connection's queries are pending"
    if code == E_DUPLICATE_ID:
        return b"this id is already in use on this connection"
    if code == E_UNKNOWN_QUERY:
        return b"this connection was not asked that query, or it has ended"
    return b"refused"


cdef class Link:
    """One connection, as the data plane knows it: its rings, dialect and state.

    Args:
        router: the data plane it belongs to.
        connection_id: unique for the life of the server; never 0.
        flush: the transport's `flush(ring) -> bytes left`.
        owner: the control plane's object for the connection.
    """

    def __cinit__(self, Router router, uint64_t connection_id, flush, owner=None):
        self.router = router
        self.inp = Ring(router.pool)
        self.out = Ring(router.pool)
        self.flush = flush
        self.owner = owner
        self.c.inp = &self.inp.ring
        self.c.out = &self.out.ring
        self.c.owner = <void *>self
        self.c.id = connection_id
        self.c.state = S_NEW
        self.c.packet_limit = 4096
        self.attached = True

    def __dealloc__(self):
        # Without `detach` only when a whole server is thrown away: then receipts that wait must not find a connection.
        receipts_orphan(&self.c)

    @property
    def id(self):
        """The connection id."""
        return self.c.id

    @property
    def header_bytes(self):
        """22 or 23; 0 until the first packet has shown it."""
        return self.c.header

    @property
    def dialect(self):
        """A `wire.Dialect` as int."""
        return self.c.dialect

    @dialect.setter
    def dialect(self, uint32_t value):
        if value >= DIALECTS:
            raise ValueError(f"no dialect {value}")
        if self.c.subscriptions:
            self.router.table.invalidate()
        self.c.dialect = value

    @property
    def state(self):
        """`LINK_NEW`, `LINK_READY` or `LINK_CLOSING`."""
        return self.c.state

    @state.setter
    def state(self, uint32_t value):
        self.c.state = value

    @property
    def packet_limit(self):
        """Largest PackSize accepted, in bytes."""
        return self.c.packet_limit

    @packet_limit.setter
    def packet_limit(self, uint32_t value):
        self.c.packet_limit = value

    @property
    def pending_bytes(self):
        """Bytes queued for the peer and not yet taken by the kernel."""
        return self.c.out.size + self.c.out.lent_size

    @property
    def held_bytes(self):
        """Bytes of messages that wait for the credit of its subscriptions."""
        return self.c.held_bytes

    @property
    def is_blocked(self):
        """Whether the kernel took no more at the last flush."""
        return self.c.blocked

    @property
    def subscriptions(self):
        """Subscriptions held now."""
        return self.c.subscriptions

    @property
    def pending_queries(self):
        """Queries it asked that have not ended."""
        return self.c.queries

    @property
    def has_pending(self):
        """Whether anything is queued or waits for it, or a query of its own or put to it is pending."""
        return bool(self.c.out.size or self.c.held_msgs or self.c.asking is not NULL or self.c.asked is not NULL)

    def counters(self):
        """packets_in, bytes_in, msgs_out, dropped since it connected; held_msgs and held_bytes wait for credit now."""
        return {
            "held_msgs": self.c.held_msgs, "held_bytes": self.c.held_bytes,
            "packets_in": self.c.packets_in, "bytes_in": self.c.bytes_in,
            "msgs_out": self.c.msgs_out, "dropped": self.c.dropped,
        }


# As long as `sub` stands in the table, both the table and the conn_t in the link must be there, so the garbage collector must
# not clear the fields before __dealloc__ has run. (A cycle through an Interest always goes through its Link, which it clears.)
@cython.no_gc_clear
cdef class Interest:
    """One subscription. Made by `Router.subscribe`; ends with `Router.unsubscribe` or its link's `detach`."""

    @property
    def subject(self):
        """The subject or pattern, UTF-8."""
        return self.subject_bytes

    @property
    def sid(self):
        """The client's id of it; 0 for version 1."""
        return self.sub.sid

    @property
    def role(self):
        """A `wire.Role` as int."""
        return self.sub.role

    @property
    def group(self):
        """Name of its group, UTF-8; empty for none."""
        return self.group_bytes

    @property
    def overflow(self):
        """A `wire.Overflow` as int."""
        return self.sub.flow.policy if self.sub.flow is not NULL else OVERFLOW_CLOSE

    @property
    def dropped(self):
        """Messages that its policy has dropped."""
        return self.sub.flow.dropped if self.sub.flow is not NULL else 0

    @property
    def credit(self):
        """Messages that it may be sent until the client grants more."""
        return self.sub.flow.credit if self.sub.flow is not NULL else 0

    @property
    def held_msgs(self):
        """Messages that wait for its credit."""
        return self.sub.flow.held_msgs if self.sub.flow is not NULL else 0

    def __dealloc__(self):
        cdef held_t *held
        # Only when it is dropped without `unsubscribe`, as when a whole server is thrown away. The link may have been cleared.
        if self.active:
            if self.link.router is not None:
                self.link.router.last = NULL
            self.link.c.subscriptions -= 1
            self.table.remove(&self.sub)
            if self.sub.flow is not NULL:
                held = flow_pop(self.sub.flow)
                while held is not NULL:
                    if held.receipt is not NULL:
                        held.receipt.left -= 1
                        if held.receipt.left == 0:
                            receipt_free(held.receipt)
                    free(held)
                    held = flow_pop(self.sub.flow)
                flow_unlink(self.sub.flow)


cdef inline int grow(conn_t ***items, size_t *room) noexcept nogil:
    cdef size_t more = 64 if room[0] == 0 else room[0] * 2
    cdef conn_t **moved = <conn_t **>realloc(items[0], more * sizeof(conn_t *))
    if moved is NULL:
        return -1
    items[0] = moved
    room[0] = more
    return 0


cdef inline void forget(conn_t **items, size_t *count, conn_t *c) noexcept nogil:
    cdef size_t i = 0
    while i < count[0]:
        if items[i] == c:
            count[0] -= 1
            items[i] = items[count[0]]
        else:
            i += 1


cdef inline bint waits_better(sub_t *sub, sub_t *than) noexcept nogil:
    # Which of two members of a group, that cannot be sent an event now, it is left to.
    if sub.flow.policy != than.flow.policy:
        return sub.flow.policy == OVERFLOW_BLOCK
    if sub.flow.held_msgs != than.flow.held_msgs:
        return sub.flow.held_msgs < than.flow.held_msgs
    if sub.conn.id != than.conn.id:
        return sub.conn.id < than.conn.id
    return sub.sid < than.sid


cdef inline bint conn_has_subs(conn_t *c) noexcept nogil:
    return c.subscriptions > 0


cdef class Router:
    """The data plane of one server.

    Args:
        pool: memory for the connections' rings.
        payload_bytes, pending_bytes: limits of a payload and of what one connection may have queued.
        soft_bytes: above it nothing is queued for a connection that may be dropped or can wait.
        queries: pending queries per connection.
        query_max_s, query_default_s: longest deadline of a query; the one of a query that names none.
        cache_subjects: subjects remembered that nobody subscribed to by name.
        ticks: SystemId towards version-1 peers of the newer generation.
    """

    def __cinit__(self, RingPool pool, *, uint32_t payload_bytes, size_t pending_bytes, uint32_t queries,
                  double query_max_s, double query_default_s, size_t cache_subjects, int64_t ticks, size_t soft_bytes=8 * 1024 * 1024):
        self.pool = pool
        self.table = SubjectTable(cache_subjects)
        self.queries = QueryTable()
        self.payload_limit = payload_bytes
        self.pending_limit = pending_bytes
        self.soft_limit = soft_bytes
        self.query_limit = queries
        self.query_max_s = query_max_s
        self.query_default_s = query_default_s
        self.ticks = ticks
        self.lost = []
        self.blocked = []

    def __dealloc__(self):
        free(self.touched)
        free(self.dirty)
        free(self.victims)
        free(self.relieved)

    # ---- the owner's face --------------------------------------------------------------------------------------------

    def set_time(self, double now, int64_t unix_ms):
        """The time of this turn: the reactor's clock in seconds, and the wall clock in Unix milliseconds."""
        self.now = now
        self.unix_ms = unix_ms

    def feed(self, Link link not None):
        """Handle what stands in a link's input ring.

        Returns:
            `FEED_DONE`: all complete packets are handled. `FEED_CONTROL`: `take_packet()` has one for the control plane;
            call feed again after it. `FEED_YIELD`: enough for one turn; call again in the next. A negative value: close
            the connection for the `wire.CloseReason` of that number.
        """
        cdef conn_t *c = &link.c
        cdef int r
        if c.inp.size == 0 or c.state == S_CLOSING:
            # Also when a control packet was the last one: a connection that holds no bytes holds no block.
            ring_release(c.inp)
            return FEED_DONE
        if ring_linear(c.inp) < 0:
            raise MemoryError
        self.work = 0
        r = self.scan(c)
        return r

    def take_packet(self):
        """The packet that `feed` stopped at: (object_id, version, system_id, unix_ms, body)."""
        packet, self.packet = self.packet, None
        return packet

    def flush_dirty(self):
        """Flush every connection that got bytes since the last call. For the end of a turn."""
        cdef size_t i
        cdef conn_t *c
        for i in range(self.dirty_count):
            c = self.dirty[i]
            c.dirty = False
            if c.state != S_CLOSING and not c.blocked and c.out.size:
                self.flush_one(c)
        self.dirty_count = 0
        if self.relieved_count:
            self.relieve()

    @property
    def ticks_system_id(self):
        """SystemId towards version-1 peers of the newer generation: the .NET ticks of the server's start."""
        return self.ticks

    @property
    def is_dirty(self):
        """Whether `flush_dirty` has something to do."""
        return self.dirty_count > 0

    def flush(self, Link link not None):
        """The link's socket is writable again: send what waits. Returns the bytes left."""
        cdef size_t left
        link.c.blocked = False
        self.flush_one(&link.c)
        left = link.c.out.size
        if self.relieved_count:
            self.relieve()
        return left

    def take_victims(self):
        """[(link, CloseReason)] of connections to close for being too slow."""
        cdef size_t i
        if self.victim_count == 0:
            return ()
        out = [(<Link>self.victims[i].owner, self.victims[i].victim) for i in range(self.victim_count)]
        self.victim_count = 0
        return out

    def take_lost(self):
        """[(link, OSError)] of connections whose flush failed."""
        if not self.lost:
            return ()
        out, self.lost = self.lost, []
        return out

    def take_blocked(self):
        """Links that the kernel took no more from since the last call: wait until they are writable, then `flush`."""
        if not self.blocked:
            return ()
        out, self.blocked = self.blocked, []
        return out

    def send(self, Link link not None, bytes packet):
        """Queue a packet of the control plane. Dropped (and counted) if the connection is being closed."""
        self.put(&link.c, <const uint8_t *>PyBytes_AS_STRING(packet), <uint32_t>PyBytes_GET_SIZE(packet))
        self.finish()

    def subscribe(self, Link link not None, bytes subject, int32_t sid=0, uint32_t role=0, bytes group=b"",
                  uint32_t overflow=0):
        """Add a subscription to a valid subject or pattern; active at once. Returns its Interest.

        One with another `overflow` than CLOSE must be a version-2 subscriber's (role 0). With BLOCK it gets nothing until
        `grant`."""
        cdef Interest interest = Interest.__new__(Interest)
        interest.table = self.table
        interest.link = link
        interest.subject_bytes = subject
        interest.group_bytes = group
        interest.sub.conn = &link.c
        interest.sub.sid = sid
        interest.sub.role = role
        interest.sub.group = <const uint8_t *>PyBytes_AS_STRING(group)
        interest.sub.group_size = <uint32_t>PyBytes_GET_SIZE(group)
        self.last = NULL
        if overflow != OVERFLOW_CLOSE and flow_new(&interest.sub, overflow) is NULL:
            raise MemoryError
        if self.table.add(&interest.sub, <const uint8_t *>PyBytes_AS_STRING(subject),
                          <uint32_t>PyBytes_GET_SIZE(subject)) < 0:
            if interest.sub.flow is not NULL:
                flow_unlink(interest.sub.flow)
            raise MemoryError
        interest.active = True
        link.c.subscriptions += 1
        return interest

    def unsubscribe(self, Interest interest not None):
        """End a subscription. Nothing more is queued for it after this returns, but a Gap if it is owed one."""
        if interest.active:
            self.last = NULL
            self.table.remove(&interest.sub)
            interest.active = False
            interest.link.c.subscriptions -= 1
            if interest.sub.flow is not NULL:
                self.end_flow(interest.sub.flow)
                self.finish()

    def grant(self, Interest interest not None, int32_t msgs):
        """A subscription with policy BLOCK may be sent so many messages more. For another one nothing happens."""
        cdef flow_t *flow = interest.sub.flow
        if flow is not NULL and flow.policy == OVERFLOW_BLOCK and interest.active:
            # Whoever grants for ever has no more than what fits.
            flow.credit = min(flow.credit + msgs, <int64_t>0x7fffffff)
            self.release(flow)
            self.finish()

    def detach(self, Link link not None):
        """The connection is gone: end its queries, tell the askers of queries that only it could still answer, and forget it.
        Its subscriptions must have been ended before."""
        cdef conn_t *c = &link.c
        cdef pending_t *query
        if not link.attached:
            return
        link.attached = False
        c.state = S_CLOSING
        if c.victim == 0:
            c.victim = CLOSE_INTERNAL  # nothing more is queued for it
        while c.asking is not NULL:
            self.queries.end(<pending_t *>c.asking)
        while c.asked is not NULL:
            query = <pending_t *>(<asked_t *>c.asked).query
            self.queries.answered(query, c)
            query.lost = True
            if query.all:
                self.put_query_end(query.asker, query, END_RESPONDER_LOST, <int64_t>c.id)
            if query.asked_count == 0:
                self.put_query_end(query.asker, query, END_RESPONDER_LOST, 0)
                self.queries.end(query)
        receipts_orphan(c)
        forget(self.relieved, &self.relieved_count, c)
        forget(self.touched, &self.touched_count, c)
        forget(self.dirty, &self.dirty_count, c)
        forget(self.victims, &self.victim_count, c)
        self.finish()
        link.inp.clear()
        link.out.clear()
        link.flush = None

    def cancel_query(self, Link link not None, bytes task_id):
        """Forget a query that this connection asked. Returns whether it was pending; if not, that is counted."""
        cdef span own
        cdef pending_t *query
        own.ptr = <const uint8_t *>PyBytes_AS_STRING(task_id)
        own.size = <uint32_t>PyBytes_GET_SIZE(task_id)
        query = self.queries.find_own(&link.c, own)
        if query is NULL:
            self.errors[E_UNKNOWN_QUERY] += 1
            return False
        self.queries.end(query)
        return True

    def fail_query(self, Link link not None, bytes task_id, int32_t code, bytes text):
        """A connection that was asked reports failure. Returns False if it was not asked that query.

        The asker is told at once if nobody else may still answer (of a query to all: each time)."""
        cdef span wire_id, own, subject
        cdef pending_t *query
        cdef conn_t *asker
        wire_id.ptr = <const uint8_t *>PyBytes_AS_STRING(task_id)
        wire_id.size = <uint32_t>PyBytes_GET_SIZE(task_id)
        query = self.queries.find(wire_id)
        if query is NULL or self.queries.asked_of(query, &link.c) is NULL:
            self.errors[E_UNKNOWN_QUERY] += 1
            return False
        self.queries.answered(query, &link.c)
        if query.all:
            query.replies += 1
        asker = query.asker
        if query.all or query.asked_count == 0:
            own = own_id_of(query)
            subject = subject_of(query)
            if asker.dialect == D_EVBUS_2:
                packet = wire_error(asker.header, <int64_t>link.c.id, self.unix_ms, own, code, subject, text)
                self.put(asker, <const uint8_t *>PyBytes_AS_STRING(packet), <uint32_t>PyBytes_GET_SIZE(packet))
            else:
                subject.ptr = <const uint8_t *>PyBytes_AS_STRING(text)
                subject.size = <uint32_t>PyBytes_GET_SIZE(text)
                self.put_response(asker, own, 2, subject)
        if query.asked_count == 0:
            if query.all:
                self.put_query_end(asker, query, END_RESPONDER_LOST if query.lost else END_COMPLETE, 0)
            self.queries.end(query)
        self.finish()
        return True

    def expire_queries(self):
        """End the queries whose deadline has passed; returns how many."""
        cdef pending_t *query = self.queries.due(self.now)
        cdef int n = 0
        while query is not NULL:
            if query.asker.dialect == D_EVBUS_2:
                self.put_query_end(query.asker, query, END_DEADLINE, 0)
            self.queries.end(query)
            n += 1
            query = self.queries.due(self.now)
        if n:
            self.finish()
        return n

    def refuse(self, Link link not None, bytes task_id, uint32_t code, bytes subject=b""):
        """Tell a peer that one of its packets was refused, in its own dialect; counted. See `wire.ErrorCode`."""
        cdef span task, about
        task.ptr = <const uint8_t *>PyBytes_AS_STRING(task_id)
        task.size = <uint32_t>PyBytes_GET_SIZE(task_id)
        about.ptr = <const uint8_t *>PyBytes_AS_STRING(subject)
        about.size = <uint32_t>PyBytes_GET_SIZE(subject)
        self.put_error(&link.c, task, code, about)
        self.finish()

    def acknowledge(self, Link link not None, bytes task_id):
        """Answer with ResponseCommon, success; nothing for an empty TaskId."""
        cdef span task, none
        task.ptr = <const uint8_t *>PyBytes_AS_STRING(task_id)
        task.size = <uint32_t>PyBytes_GET_SIZE(task_id)
        none.ptr = task.ptr
        none.size = 0
        if task.size:
            self.put_response(&link.c, task, 1, none)
            self.finish()

    def counters(self):
        """The data plane's counters since the server started."""
        cdef uint32_t i
        return {
            "packets_in": self.packets_in, "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
            "published": self.published, "delivered": self.delivered, "unrouted": self.unrouted,
            "dropped_slow": self.dropped_slow, "dropped_newest": self.dropped_newest, "dropped_held": self.dropped_held,
            "gaps": self.gaps, "gaps_untold": self.gaps_untold, "held": self.held, "held_msgs": self.held_msgs, "queries": self.queries_asked, "answers": self.queries_answered,
            "queries_pending": self.queries.count, "unknown_packets": self.unknown_packets,
            "early_packets": self.early_packets, "subscriptions": self.table.subscriptions,
            "subjects": self.table.subjects, "errors": {
                wire.ErrorCode(i).name.lower(): self.errors[i] for i in range(1, <uint32_t>ERROR_CODES) if self.errors[i]
            },
        }

    # ---- one connection's packets -------------------------------------------------------------------------------------

    cdef int scan(self, conn_t *c) noexcept nogil:
        cdef int r, result = 0
        cdef const uint8_t *p = c.inp.buf + c.inp.head
        cdef size_t left = c.inp.size, used
        cdef packet_t *pk = &self.pk
        cdef bint known
        if c.header == 0:
            r = layout_detect(p, left, c.packet_limit, &c.header)
            if r == SCAN_MORE:
                ring_fit(c.inp)
                return 0
            if r == SCAN_TOO_LARGE:
                return -CLOSE_PACKET_TOO_LARGE
            if r != SCAN_PACKET:
                return -CLOSE_NOT_EVENT_BUS
        while True:
            r = packet_scan(p, left, c.header, c.packet_limit, pk)
            if r != SCAN_PACKET:
                if r == SCAN_BAD_SIZE:
                    result = -CLOSE_PROTOCOL_ERROR
                elif r == SCAN_TOO_LARGE:
                    result = -CLOSE_PACKET_TOO_LARGE
                break
            p += pk.size
            left -= pk.size
            c.packets_in += 1
            self.packets_in += 1
            if c.state != S_READY:
                if pk.object_id == O_HANDSHAKE and pk.version == 1:
                    result = 1
                    break
                self.early_packets += 1
                continue
            if pk.object_id == O_PUBLISH and pk.version == 1:
                self.on_publish_v1(c)
            elif pk.object_id == O_PUBLISH and pk.version == 2 and c.dialect == D_EVBUS_2:
                self.on_publish_v2(c)
            elif pk.object_id == O_QUERY and pk.version == 1:
                self.on_query(c, False)
            elif pk.object_id == O_QUERY and pk.version == 2 and c.dialect == D_EVBUS_2:
                self.on_query(c, True)
            else:
                known = pk.version == 1 and (
                    pk.object_id <= O_UNSUBSCRIBE and pk.object_id >= O_HANDSHAKE
                    or pk.object_id == O_HEARTBEAT or pk.object_id == O_HEARTBEAT_OLD
                )
                if c.dialect == D_EVBUS_2 and not known:
                    known = pk.version == 2 and (pk.object_id == O_SUBSCRIBE or pk.object_id == O_UNSUBSCRIBE) or (
                        pk.version == 1
                        and (pk.object_id == O_ERROR or pk.object_id == O_CANCEL_QUERY or pk.object_id == O_CREDIT)
                    )
                if known:
                    result = 1
                    break
                self.unknown_packets += 1
                continue
            if self.work >= WORK_PER_FEED:
                result = 2
                break
        self.run_commit()
        used = c.inp.size - left
        c.bytes_in += used
        self.bytes_in += used
        with gil:
            # Whatever happens here, the lent segments are settled before the ring lets go of its bytes.
            try:
                self.finish()
            except BaseException:
                result = -CLOSE_INTERNAL
            if result == 1:
                self.packet = (
                    pk.object_id, pk.version, pk.system_id, pk.unix_ms,
                    PyBytes_FromStringAndSize(<const char *>pk.body, <Py_ssize_t>pk.body_size),
                )
            ring_skip(c.inp, used)
            if result == 0:
                ring_fit(c.inp)
        return result

    cdef entry_t *entry_of(self, span subject) noexcept nogil:
        # NULL: not a valid subject (or no memory for it).
        cdef entry_t *entry = self.last
        cdef uint64_t visited
        if (
            entry is not NULL and entry.size == subject.size and entry.epoch == self.table.epoch
            and memcmp(entry.key, subject.ptr, subject.size) == 0
        ):
            return entry
        entry = self.table.peek(subject.ptr, subject.size)
        if entry is NULL:
            # find may free entries: the run must not keep one. What it costs counts as work, as a peer chooses the patterns.
            self.run_commit()
            visited = self.table.visited
            entry = self.table.find(subject.ptr, subject.size)
            self.work += <int64_t>(self.table.visited - visited) * WORK_PER_VISIT
        self.last = entry
        return entry

    cdef int on_publish_v1(self, conn_t *c) noexcept nogil:
        cdef cursor cur
        cdef envelope_t env
        cdef packet_t *pk = &self.pk
        cdef pending_t *query
        cdef uint32_t body, in_place = 0
        memset(&env, 0, sizeof(env))
        cur.p = pk.body
        cur.end = pk.body + pk.body_size
        env.query_task_id.ptr = env.headers.ptr = pk.body
        if read_string(&cur, &env.task_id) < 0 or env.task_id.size > MAX_TASK_ID:
            env.task_id.ptr = pk.body
            env.task_id.size = 0
            self.put_error(c, env.task_id, E_MALFORMED, env.headers)
            return 0
        if (
            read_string(&cur, &env.subject) < 0
            or (
                c.dialect >= D_H23_199
                and (read_string(&cur, &env.query_task_id) < 0 or env.query_task_id.size > MAX_TASK_ID)
            )
            or read_bytes(&cur, &env.payload) < 0
        ):
            self.put_error(c, env.task_id, E_MALFORMED, env.headers)
            return 0
        if env.payload.size > self.payload_limit:
            self.refuse_payload(c, &env)
            return 0
        if env.query_task_id.size and not span_blank(env.query_task_id):
            self.answer(c, &env)
            return 0
        if c.asked is not NULL and c.dialect < D_H23_199:
            query = self.old_rule(c, env.subject)
            if query is not NULL:
                self.send_answer(c, query, &env)
                return 0
        # In place only if the body is, byte for byte, the one that an encoder would make: no padding, nothing behind it.
        body = string_room(env.task_id.size) + string_room(env.subject.size) + 4 + env.payload.size
        if c.dialect >= D_H23_199:
            body += 1
        if body == pk.body_size:
            in_place = D_H23_199 if c.dialect == D_EVBUS_2 else c.dialect
        return self.route(c, &env, in_place)

    cdef void refuse_payload(self, conn_t *c, envelope_t *env) noexcept nogil:
        # Of two faults the subject's is told.
        if subject_check(env.subject.ptr, env.subject.size) != SUBJECT_OK:
            self.put_error(c, env.task_id, E_INVALID_SUBJECT, env.subject)
        else:
            self.put_error(c, env.task_id, E_PAYLOAD_TOO_LARGE, env.subject)

    cdef int on_publish_v2(self, conn_t *c) noexcept nogil:
        cdef envelope_t env
        cdef packet_t *pk = &self.pk
        cdef uint32_t body
        if envelope_read(pk.body, pk.body_size, &env) < 0:
            self.put_error(c, env.task_id, E_MALFORMED, env.subject)
            return 0
        if env.payload.size > self.payload_limit:
            self.refuse_payload(c, &env)
            return 0
        if env.query_task_id.size and not span_blank(env.query_task_id):
            self.answer(c, &env)
            return 0
        if env.flags & F_NO_ECHO:
            return self.route(c, &env, 0)
        body = (
            10 + string_room(env.task_id.size) + string_room(env.subject.size) + 1 + 4 + env.headers.size + 4
            + env.payload.size
        )
        return self.route(c, &env, D_EVBUS_2 if body == pk.body_size else 0)

    cdef int route(self, conn_t *c, envelope_t *env, uint32_t in_place) noexcept nogil:
        # An event: to every matching connection once, and to one member of each matching group. `in_place` is the dialect
        # in which the packet is its own delivery, or 0.
        cdef packet_t *pk = &self.pk
        cdef entry_t *entry = self.entry_of(env.subject)
        cdef route_t *route
        cdef conn_t **targets
        cdef conn_t *skip = c if env.flags & F_NO_ECHO else NULL
        cdef uint32_t first = 0, same = 0, i, grouped = 0, missed = 0, receivers, dropped
        cdef span none
        if entry is NULL:
            self.put_error(c, env.task_id, E_INVALID_SUBJECT, env.subject)
            return 0
        none.ptr = env.subject.ptr
        none.size = 0
        route = entry.route
        self.published += 1
        if route.receivers == 0:
            self.unrouted += 1
        if in_place:
            first = route.first[in_place]
            same = route.first[in_place + 1] - first
        if same < route.receivers:
            # Receivers of other dialects, and groups, get copies of their own. The run goes first where it could hold earlier
            # messages for one of them.
            if self.run_dialect != in_place or route.groups or not in_place or (
                route.extras and self.run_entry != entry
            ):
                self.run_commit()
            i = first + same
            if first:
                self.fan_out(c, env, route.plain, first, skip, 0, env.task_id)
            if route.first[DIALECTS] > i:
                self.fan_out(c, env, route.plain + i, route.first[DIALECTS] - i, skip, 0, env.task_id)
            if route.groups:
                grouped = self.to_groups(c, entry, env, NULL, &missed)
            if route.extras:
                grouped += self.to_extras(c, route, env, &missed)
            self.work += route.receivers - same
        if same:
            # The packet becomes its own delivery, where it lies, and joins the run or starts one.
            targets = route.plain + first
            if not (
                self.run_size != 0
                and self.run_start + self.run_size == pk.start
                and self.run_dialect == in_place
                and (self.run_entry == entry or (same == 1 and self.run_count == 1 and self.run_targets[0] == targets[0]))
            ):
                self.run_commit()
                self.run_start = pk.start
                self.run_dialect = in_place
                self.run_targets = targets
                self.run_count = same
                self.run_entry = entry
            store_u64(pk.start + 4, <uint64_t>self.sender_system_id(c, in_place))
            pk.start[12] = O_DELIVERY
            if in_place == D_EVBUS_2:
                # Flags, subscription id and deadline are between the publisher and the server.
                pk.start[HEADER_23] = 0
                memset(pk.start + HEADER_23 + 2, 0, 8)
            self.run_size += pk.size
            self.run_msgs += 1
            self.work += same
        if env.task_id.size:
            if c.subscriptions or env.flags & F_CONFIRM:
                # The publisher's own copy goes before its acknowledgement; a receipt counts what was really queued.
                self.run_commit()
            if env.flags & F_CONFIRM:
                receivers = grouped
                dropped = missed
                for i in range(route.first[DIALECTS]):
                    if route.plain[i].victim:
                        dropped += 1
                    elif route.plain[i] != skip:
                        receivers += 1
                if self.receipt is not NULL:
                    # It waits in a queue, and so does the receipt; but not if it has left the queue again.
                    self.receipt.receivers += receivers
                    self.receipt.dropped += dropped
                    self.settle_receipt(self.receipt, True)
                    self.receipt = NULL
                else:
                    self.put_receipt(c, env.task_id, receivers, dropped)
            else:
                self.put_response(c, env.task_id, 1, none)
        return 0

    cdef void run_commit(self) noexcept nogil:
        cdef uint32_t i
        cdef conn_t *c
        cdef int r
        if self.run_size == 0:
            return
        for i in range(self.run_count):
            c = self.run_targets[i]
            if c.victim or c.out.size + c.out.lent_size + self.run_size > self.pending_limit:
                if not c.victim:
                    self.make_victim(c, CLOSE_SLOW)
                c.dropped += self.run_msgs
                self.dropped_slow += self.run_msgs
                continue
            # A connection that the kernel takes nothing from would have the segment copied anyway, and a small one costs
            # less to copy than to lend.
            if self.run_size >= LEND_MIN and not c.blocked:
                r = ring_lend(c.out, self.run_start, self.run_size)
            else:
                r = ring_settle(c.out)
                if r == 0:
                    r = ring_put(c.out, self.run_start, self.run_size)
            if r < 0:
                self.make_victim(c, CLOSE_INTERNAL)
                c.dropped += self.run_msgs
                self.dropped_slow += self.run_msgs
                continue
            c.msgs_out += self.run_msgs
            self.delivered += self.run_msgs
            self.touch(c)
        self.run_size = 0
        self.run_msgs = 0

    cdef uint32_t fan_out(self, conn_t *c, envelope_t *env, conn_t **targets, uint32_t count, conn_t *skip,
                          uint32_t flags, span task_id) noexcept nogil:
        # Copies for connections sorted by dialect: what stands before the payload is encoded once per dialect.
        cdef uint32_t i, size = 0, dialect = 0, n = 0
        cdef span headers
        for i in range(count):
            if targets[i] == skip:
                continue
            if targets[i].dialect != dialect:
                dialect = targets[i].dialect
                headers = env.headers
                if dialect != D_EVBUS_2:
                    headers.size = 0
                size = self.make_prefix(c, dialect, flags, env.codec, 0, 0, task_id, env.subject, headers.size,
                                        env.payload.size)
            if self.deliver(targets[i], size, headers, env.payload):
                n += 1
        return n

    cdef uint32_t to_groups(self, conn_t *c, entry_t *entry, envelope_t *env, pending_t *query,
                            uint32_t *missed) noexcept nogil:
        # One member of each group, in turn; one that is being closed is passed over. Returns how many groups were served;
        # `missed` is how many were not because all their members are being closed.
        cdef route_t *route = entry.route
        cdef uint32_t i, k, size, n = 0, flags = F_QUERY if query is not NULL else 0
        cdef bint slow
        cdef sub_t *sub
        cdef sub_t *later
        cdef span headers, task_id = env.task_id
        if query is not NULL:
            task_id = wire_id_of(query)
        entry.turn += 1
        for i in range(route.groups):
            slow = False
            later = NULL
            for k in range(route.group[i].count):
                sub = route.member[route.group[i].first + (entry.turn + k) % route.group[i].count]
                if sub.conn == c and env.flags & F_NO_ECHO:
                    continue
                slow = True
                if sub.conn.victim:
                    continue
                headers = env.headers
                if sub.conn.dialect != D_EVBUS_2:
                    headers.size = 0
                size = self.make_prefix(c, sub.conn.dialect, flags, env.codec, sub.sid, env.deadline_ms if flags else 0,
                                        task_id, env.subject, headers.size, env.payload.size)
                if query is not NULL and self.queries.asked_of(query, sub.conn) is not NULL:
                    break  # a connection is asked once
                if sub.flow is not NULL:
                    if query is NULL and self.must_wait(sub, size + headers.size + 4 + env.payload.size):
                        # One that has room goes before it. To wait is better than to be dropped, in the shortest queue.
                        if later is NULL or waits_better(sub, later):
                            later = sub
                        continue
                    if sub.flow.policy == OVERFLOW_BLOCK:
                        if query is NULL:
                            if self.send_or_hold(c, sub, size, env):
                                n += 1
                                break
                            continue
                        sub.flow.credit -= 1
                    elif sub.flow.missed:
                        self.put_gap(sub.flow)
                if self.deliver(sub.conn, size, headers, env.payload):
                    if query is not NULL:
                        self.queries.ask(query, sub.conn)
                    n += 1
                    break
            else:
                if later is not NULL and later.flow.policy == OVERFLOW_BLOCK:
                    size = self.make_prefix(c, D_EVBUS_2, flags, env.codec, later.sid, 0, task_id, env.subject,
                                            env.headers.size, env.payload.size)
                    if self.send_or_hold(c, later, size, env):
                        n += 1
                        continue
                elif later is not NULL:
                    later.conn.dropping = True
                    later.conn.dropped += 1
                    self.dropped_newest += 1
                    self.drop_newest(later.flow)
                missed[0] += slow
        return n

    cdef uint32_t make_prefix(self, conn_t *sender, uint32_t dialect, uint32_t flags, uint32_t codec, int32_t sid,
                              int32_t deadline_ms, span task_id, span subject, uint32_t headers_size,
                              uint32_t payload_size) noexcept nogil:
        # Encodes a delivery up to and including the headers' count (version 2) or the payload's (version 1) into self.prefix.
        cdef uint32_t header = HEADER_22 if dialect == D_H22 else HEADER_23, size
        cdef uint8_t *p
        cdef char guid[40]
        if flags & F_QUERY and dialect < D_H23_199:
            # A client of that generation takes an event with the id of a query of its own for the answer, so it must not
            # see the asker's id: it gets a fresh one, in the form that it expects.
            self.guid_serial += 1
            task_id.size = <uint32_t>snprintf(guid, sizeof(guid), b"%08x-%04x-4000-8000-%012llx",
                                              <unsigned int>(self.ticks & 0xffffffffu),
                                              <unsigned int>((self.ticks >> 32) & 0xffffu),
                                              <unsigned long long>self.guid_serial)
            task_id.ptr = <const uint8_t *>guid
        size = header + string_room(task_id.size) + string_room(subject.size) + 4 + payload_size
        if dialect == D_EVBUS_2:
            size += 10 + 1 + 4 + headers_size
        elif dialect == D_H23_199:
            size += 1
        p = store_header(self.prefix, header, size, self.sender_system_id(sender, dialect), O_DELIVERY,
                         2 if dialect == D_EVBUS_2 else 1, self.pk.unix_ms)
        if dialect == D_EVBUS_2:
            p[0] = <uint8_t>flags
            p[1] = <uint8_t>codec
            p = store_u32(p + 2, <uint32_t>sid)
            p = store_u32(p, <uint32_t>deadline_ms)
        p = store_string(p, task_id.ptr, task_id.size)
        p = store_string(p, subject.ptr, subject.size)
        if dialect == D_EVBUS_2:
            p[0] = 0
            p = store_u32(p + 1, headers_size)
        else:
            if dialect == D_H23_199:
                p[0] = 1 if flags & F_QUERY else 0
                p += 1
            p = store_u32(p, payload_size)
        return <uint32_t>(p - self.prefix)

    cdef bint deliver(self, conn_t *c, uint32_t prefix_size, span headers, span payload) noexcept nogil:
        # Queues self.prefix, the headers (version 2 only) and the payload. False: the receiver is, or now becomes, a victim.
        cdef uint8_t count[4]
        cdef int r
        cdef size_t total = <size_t>prefix_size + headers.size + 4 + payload.size
        if c.victim or c.out.size + c.out.lent_size + total > self.pending_limit:
            if not c.victim:
                self.make_victim(c, CLOSE_SLOW)
            c.dropped += 1
            self.dropped_slow += 1
            return False
        r = ring_settle(c.out)
        if r == 0:
            r = ring_put(c.out, self.prefix, prefix_size)
        if r == 0 and c.dialect == D_EVBUS_2:
            if headers.size:
                r = ring_put(c.out, headers.ptr, headers.size)
            store_u32(count, payload.size)
            if r == 0:
                r = ring_put(c.out, count, 4)
        if r == 0 and payload.size:
            if payload.size >= LEND_MIN and not c.blocked:
                r = ring_lend(c.out, payload.ptr, payload.size)
            else:
                r = ring_put(c.out, payload.ptr, payload.size)
        if r < 0:
            # No memory: part of the packet may be queued, so this connection cannot go on; the others can.
            self.make_victim(c, CLOSE_INTERNAL)
            c.dropped += 1
            self.dropped_slow += 1
            return False
        c.msgs_out += 1
        self.delivered += 1
        self.touch(c)
        return True

    # ---- overflow policies -----------------------------------------------------------------------------------------------

    cdef bint has_room(self, conn_t *c, size_t size) noexcept nogil:
        # Below the soft limit with that packet. An empty queue takes any.
        cdef size_t queued = c.out.size + c.out.lent_size
        return queued == 0 or queued + size <= self.soft_limit

    cdef bint must_drop(self, conn_t *c, size_t size) noexcept nogil:
        # Whether what may be dropped for that connection is dropped now. Ends the dropping, with the gaps told, when half of
        # the soft limit is left.
        if c.dropping and c.out.size + c.out.lent_size <= self.soft_limit // 2:
            self.tell_gaps(c)
        return not c.victim and (c.dropping or not self.has_room(c, size))

    cdef bint must_wait(self, sub_t *sub, size_t size) noexcept nogil:
        # Whether a subscription with a policy cannot be sent an event now.
        if sub.flow.policy == OVERFLOW_DROP_NEWEST:
            return self.must_drop(sub.conn, size)
        return sub.flow.credit <= 0 or sub.flow.head is not NULL or not self.has_room(sub.conn, size)

    cdef uint32_t to_extras(self, conn_t *c, route_t *route, envelope_t *env, uint32_t *missed) noexcept nogil:
        # An event for the plain subscriptions with a policy: one copy for all of a connection that do not block, one for each
        # that does. Returns how many were queued or wait; `missed` is how many were not.
        cdef uint32_t i = 0, k, end, n = 0, size = 0
        cdef sub_t *sub
        cdef conn_t *target
        cdef bint needed
        cdef span headers = env.headers, task_id = env.task_id
        while i < route.extras:
            sub = route.extra[i]
            target = sub.conn
            end = i + 1
            if target == c and env.flags & F_NO_ECHO:
                i = end
                continue
            if size == 0:
                size = self.make_prefix(c, D_EVBUS_2, 0, env.codec, 0, 0, task_id, env.subject, headers.size,
                                        env.payload.size)
            if sub.flow is not NULL and sub.flow.policy == OVERFLOW_BLOCK:
                store_u32(self.prefix + HEADER_23 + 2, <uint32_t>sub.sid)
                if self.send_or_hold(c, sub, size, env):
                    n += 1
                else:
                    missed[0] += 1
                i = end
                continue
            needed = sub.flow is NULL
            while end < route.extras and route.extra[end].conn == target:
                if route.extra[end].flow is NULL:
                    needed = True
                elif route.extra[end].flow.policy == OVERFLOW_BLOCK:
                    break
                end += 1
            store_u32(self.prefix + HEADER_23 + 2, 0)
            if self.must_drop(target, <size_t>size + headers.size + 4 + env.payload.size) and not needed:
                target.dropping = True
                target.dropped += 1
                self.dropped_newest += 1
                missed[0] += 1
                for k in range(i, end):
                    self.drop_newest(route.extra[k].flow)
            else:
                for k in range(i, end):
                    if route.extra[k].flow is not NULL and route.extra[k].flow.missed:
                        self.put_gap(route.extra[k].flow)
                if self.deliver(target, size, headers, env.payload):
                    n += 1
                else:
                    missed[0] += 1
            i = end
        return n

    cdef uint32_t ask_extras(self, conn_t *c, route_t *route, envelope_t *env, pending_t *query) noexcept nogil:
        # A query for the same subscriptions; it is not held back and not dropped, but it takes its credit.
        cdef uint32_t i, size, n = 0
        cdef sub_t *sub
        for i in range(route.extras):
            sub = route.extra[i]
            if self.queries.asked_of(query, sub.conn) is not NULL:
                continue
            size = self.make_prefix(c, D_EVBUS_2, F_QUERY, env.codec, 0, env.deadline_ms, wire_id_of(query), env.subject,
                                    env.headers.size, env.payload.size)
            if sub.flow is not NULL and sub.flow.policy == OVERFLOW_BLOCK:
                store_u32(self.prefix + HEADER_23 + 2, <uint32_t>sub.sid)
                sub.flow.credit -= 1
            if self.deliver(sub.conn, size, env.headers, env.payload) and self.queries.ask(query, sub.conn) == 0:
                n += 1
        return n

    cdef void drop_newest(self, flow_t *flow) noexcept nogil:
        flow.missed += 1
        flow.dropped += 1

    cdef bint send_or_hold(self, conn_t *publisher, sub_t *sub, uint32_t prefix_size, envelope_t *env) noexcept nogil:
        # An event, whose prefix is made, for a subscription with policy BLOCK. False: it is, or now becomes, a victim.
        cdef conn_t *c = sub.conn
        cdef flow_t *flow = sub.flow
        cdef size_t total = <size_t>prefix_size + env.headers.size + 4 + env.payload.size
        cdef held_t *held
        cdef uint8_t *p
        if c.victim or not self.must_wait(sub, total):
            if not self.deliver(c, prefix_size, env.headers, env.payload):
                return False
            flow.credit -= 1
            return True
        if c.held_bytes + c.out.size + c.out.lent_size + total > self.pending_limit:
            self.make_victim(c, CLOSE_SLOW)
            c.dropped += 1
            self.dropped_slow += 1
            return False
        held = flow_hold(flow, total)
        if held is NULL:
            self.make_victim(c, CLOSE_INTERNAL)
            c.dropped += 1
            self.dropped_slow += 1
            return False
        p = held.data
        memcpy(p, self.prefix, prefix_size)
        p += prefix_size
        memcpy(p, env.headers.ptr, env.headers.size)
        p = store_u32(p + env.headers.size, env.payload.size)
        memcpy(p, env.payload.ptr, env.payload.size)
        self.held += 1
        self.held_msgs += 1
        if env.flags & F_CONFIRM and env.task_id.size:
            if self.receipt is NULL:
                self.receipt = receipt_new(publisher, env.task_id)
            if self.receipt is not NULL:
                self.receipt.left += 1
                held.receipt = self.receipt
        return True

    cdef void release(self, flow_t *flow) noexcept nogil:
        # Queues what waits for a subscription, as far as its credit and the connection's room go.
        cdef conn_t *c = flow.sub.conn
        cdef held_t *held = <held_t *>flow.head
        while held is not NULL and flow.credit > 0 and not c.victim and self.has_room(c, held.size):
            if ring_settle(c.out) < 0 or ring_put(c.out, held.data, held.size) < 0:
                self.make_victim(c, CLOSE_INTERNAL)
                return
            held = flow_pop(flow)
            flow.credit -= 1
            self.held_msgs -= 1
            c.msgs_out += 1
            self.delivered += 1
            self.touch(c)
            if held.receipt is not NULL:
                self.settle_receipt(held.receipt, True)
            free(held)
            held = <held_t *>flow.head

    cdef void settle_receipt(self, receipt_t *receipt, bint delivered) noexcept nogil:
        # One that a receipt waited for is done. The receipt goes out with the last.
        cdef span task_id
        if not delivered:
            receipt.receivers -= 1
            receipt.dropped += 1
        receipt.left -= 1
        if receipt.left:
            return
        if receipt.publisher is not NULL:
            task_id.ptr = receipt.task_id
            task_id.size = receipt.task_size
            self.put_receipt(receipt.publisher, task_id, receipt.receivers, receipt.dropped)
        receipt_free(receipt)

    cdef void put_gap(self, flow_t *flow) noexcept nogil:
        # In band: the next delivery for that subscription comes after it.
        cdef uint8_t buf[64]
        cdef uint8_t *p
        cdef conn_t *c = flow.sub.conn
        cdef uint32_t size = HEADER_23 + 13
        if c.victim:
            return
        p = store_header(buf, HEADER_23, size, 0, O_GAP, 1, self.unix_ms)
        p = store_u32(p, <uint32_t>flow.sub.sid)
        store_u64(p, flow.missed)
        p[8] = GAP_OVERFLOW
        self.put(c, buf, size)
        if not c.victim:
            flow.missed = 0
            self.gaps += 1

    cdef void tell_gaps(self, conn_t *c) noexcept nogil:
        cdef flow_t *flow = <flow_t *>c.flows
        c.dropping = False
        while flow is not NULL:
            if flow.missed:
                self.put_gap(flow)
            flow = flow.next

    cdef void end_flow(self, flow_t *flow) noexcept nogil:
        # The subscription has ended. What waits for it is dropped, and what it was not told is told now, or counted.
        cdef conn_t *c = flow.sub.conn
        cdef held_t *held = flow_pop(flow)
        while held is not NULL:
            self.held_msgs -= 1
            self.dropped_held += 1
            c.dropped += 1
            if held.receipt is not NULL:
                self.settle_receipt(held.receipt, False)
            free(held)
            held = flow_pop(flow)
        if flow.missed and c.state != S_CLOSING:
            self.put_gap(flow)
        self.gaps_untold += flow.missed
        flow_unlink(flow)

    cdef int relieve(self) except -1:
        # Connections that took bytes: gaps are told, and what waited for room is queued. That may flush them again.
        cdef conn_t *c
        cdef flow_t *flow
        while self.relieved_count:
            self.relieved_count -= 1
            c = self.relieved[self.relieved_count]
            c.relieved = False
            if c.victim or c.state == S_CLOSING:
                continue
            if c.dropping and c.out.size <= self.soft_limit // 2:
                self.tell_gaps(c)
            flow = <flow_t *>c.flows
            while flow is not NULL and c.held_msgs:
                if flow.head is not NULL:
                    self.release(flow)
                flow = flow.next
            self.settle_touched()
        return 0

    # ---- queries -------------------------------------------------------------------------------------------------------

    cdef int on_query(self, conn_t *c, bint v2) noexcept nogil:
        cdef cursor cur
        cdef envelope_t env
        cdef packet_t *pk = &self.pk
        cdef entry_t *entry
        cdef route_t *route
        cdef pending_t *query
        cdef double patience = self.query_default_s
        cdef uint32_t i, k, size, asked = 0, missed = 0
        cdef sub_t *sub
        cdef conn_t *target
        cdef span headers
        self.run_commit()
        memset(&env, 0, sizeof(env))
        env.task_id.ptr = env.subject.ptr = env.headers.ptr = pk.body
        if v2:
            if envelope_read(pk.body, pk.body_size, &env) < 0:
                self.put_error(c, env.task_id, E_MALFORMED, env.subject)
                return 0
        else:
            cur.p = pk.body
            cur.end = pk.body + pk.body_size
            if read_string(&cur, &env.task_id) < 0 or env.task_id.size > MAX_TASK_ID:
                env.task_id.size = 0
                self.put_error(c, env.task_id, E_MALFORMED, env.subject)
                return 0
            if read_string(&cur, &env.subject) < 0 or read_bytes(&cur, &env.payload) < 0:
                env.subject.size = 0
                self.put_error(c, env.task_id, E_MALFORMED, env.subject)
                return 0
        if span_blank(env.task_id):
            self.put_error(c, env.task_id, E_MALFORMED, env.subject)
            return 0
        env.flags &= F_ALL  # the other bits mean nothing in a query
        if env.payload.size > self.payload_limit:
            self.refuse_payload(c, &env)
            return 0
        entry = self.entry_of(env.subject)
        if entry is NULL:
            self.put_error(c, env.task_id, E_INVALID_SUBJECT, env.subject)
            return 0
        if self.queries.find_own(c, env.task_id) is not NULL:
            self.put_error(c, env.task_id, E_DUPLICATE_ID, env.subject)
            return 0
        if c.queries >= self.query_limit:
            self.put_error(c, env.task_id, E_TOO_MANY_QUERIES, env.subject)
            return 0
        route = entry.route
        self.queries_asked += 1
        if route.responders == 0 and route.receivers == 0:
            self.put_error(c, env.task_id, E_NO_RESPONDERS, env.subject)
            return 0
        if env.deadline_ms > 0:
            patience = env.deadline_ms * 0.001
        if env.deadline_ms <= 0 or patience > self.query_max_s:
            patience = min(patience, self.query_max_s)
            env.deadline_ms = <int32_t>(patience * 1000 + 0.5)
        query = self.queries.begin(c, env.task_id, env.subject, self.now + patience, (env.flags & F_ALL) != 0)
        if query is NULL:
            self.put_error(c, env.task_id, E_TOO_MANY_QUERIES, env.subject)
            return 0
        if route.responders:
            # One of the responders in turn, or all of them; one that is being closed is passed over.
            entry.query_turn += 1
            for k in range(route.responders):
                sub = route.responder[(entry.query_turn + k) % route.responders]
                target = sub.conn
                if target.victim or self.queries.asked_of(query, target) is not NULL:
                    continue
                headers = env.headers
                if target.dialect != D_EVBUS_2:
                    headers.size = 0
                size = self.make_prefix(c, target.dialect, F_QUERY, env.codec, sub.sid, env.deadline_ms,
                                        wire_id_of(query), env.subject, headers.size, env.payload.size)
                if self.deliver(target, size, headers, env.payload) and self.queries.ask(query, target) == 0:
                    asked += 1
                    if not query.all:
                        break
        else:
            for i in range(route.first[DIALECTS]):
                target = route.plain[i]
                headers = env.headers
                if target.dialect != D_EVBUS_2:
                    headers.size = 0
                size = self.make_prefix(c, target.dialect, F_QUERY, env.codec, 0, env.deadline_ms, wire_id_of(query),
                                        env.subject, headers.size, env.payload.size)
                if self.deliver(target, size, headers, env.payload) and self.queries.ask(query, target) == 0:
                    asked += 1
            if route.extras:
                asked += self.ask_extras(c, route, &env, query)
            if asked == 0 and route.groups:
                asked = self.to_groups(c, entry, &env, query, &missed)
        self.work += asked
        if asked == 0:
            self.queries.end(query)
            self.put_error(c, env.task_id, E_NO_RESPONDERS, env.subject)
        return 0

    cdef pending_t *old_rule(self, conn_t *c, span subject) noexcept nogil:
        # Generations that cannot mark an answer answer by a publish on the query's subject: it answers the oldest query on that
        # subject that this connection was asked.
        cdef asked_t *asked = <asked_t *>c.asked
        cdef pending_t *query
        cdef pending_t *found = NULL
        cdef span about
        while asked is not NULL:
            query = <pending_t *>asked.query
            about = subject_of(query)
            if about.size == subject.size and memcmp(about.ptr, subject.ptr, subject.size) == 0:
                found = query
            asked = asked.next
        return found

    cdef bint answer(self, conn_t *c, envelope_t *env) noexcept nogil:
        cdef pending_t *query = self.queries.find(env.query_task_id)
        cdef span about, none
        self.run_commit()
        if query is not NULL:
            about = subject_of(query)
        if (
            query is NULL
            or about.size != env.subject.size
            or memcmp(about.ptr, env.subject.ptr, about.size) != 0
            or self.queries.asked_of(query, c) is NULL
        ):
            # Dropped without an acknowledgement, as the C# servers do; an announced peer is told.
            if subject_check(env.subject.ptr, env.subject.size) != SUBJECT_OK:
                self.put_error(c, env.task_id, E_INVALID_SUBJECT, env.subject)
                return False
            none.ptr = env.subject.ptr
            none.size = 0
            self.put_error(c, env.task_id if c.dialect == D_EVBUS_2 else none, E_UNKNOWN_QUERY, env.subject)
            return False
        self.send_answer(c, query, env)
        if env.task_id.size:
            none.ptr = env.subject.ptr
            none.size = 0
            if env.flags & F_CONFIRM:
                self.put_receipt(c, env.task_id, 1, 0)
            else:
                self.put_response(c, env.task_id, 1, none)
        return True

    cdef void send_answer(self, conn_t *c, pending_t *query, envelope_t *env) noexcept nogil:
        cdef conn_t *asker = query.asker
        cdef span headers = env.headers
        cdef uint32_t size
        self.run_commit()
        if asker.dialect != D_EVBUS_2:
            headers.size = 0
        size = self.make_prefix(c, asker.dialect, F_ANSWER, env.codec, 0, 0, own_id_of(query), subject_of(query),
                                headers.size, env.payload.size)
        self.deliver(asker, size, headers, env.payload)
        self.queries_answered += 1
        query.replies += 1
        if query.all and asker.dialect == D_EVBUS_2:
            self.queries.answered(query, c)
            if query.asked_count == 0:
                self.put_query_end(asker, query, END_RESPONDER_LOST if query.lost else END_COMPLETE, 0)
                self.queries.end(query)
            return
        self.queries.end(query)

    # ---- what the server itself says ------------------------------------------------------------------------------------

    cdef int64_t own_system_id(self, conn_t *c) noexcept nogil:
        if c.dialect == D_EVBUS_2:
            return 0
        if c.dialect == D_H23_199:
            return self.ticks
        return (self.unix_ms + <int64_t>11644473600000) * 10000

    cdef int64_t sender_system_id(self, conn_t *sender, uint32_t dialect) noexcept nogil:
        if dialect == D_EVBUS_2:
            return <int64_t>sender.id
        if dialect == D_H23_199:
            return self.ticks
        return (self.unix_ms + <int64_t>11644473600000) * 10000

    cdef void touch(self, conn_t *c) noexcept nogil:
        if not c.touched:
            if self.touched_count == self.touched_room and grow(&self.touched, &self.touched_room) < 0:
                self.make_victim(c, CLOSE_INTERNAL)
                return
            self.touched[self.touched_count] = c
            self.touched_count += 1
            c.touched = True

    cdef void make_victim(self, conn_t *c, uint32_t reason) noexcept nogil:
        if c.victim == 0:
            c.victim = reason
            if self.victim_count == self.victim_room and grow(&self.victims, &self.victim_room) < 0:
                return
            self.victims[self.victim_count] = c
            self.victim_count += 1

    cdef void put(self, conn_t *c, const uint8_t *p, uint32_t size) noexcept nogil:
        if c.state == S_CLOSING:
            c.dropped += 1
            return
        if c.victim or c.out.size + c.out.lent_size + size > self.pending_limit:
            if not c.victim:
                self.make_victim(c, CLOSE_SLOW)
            c.dropped += 1
            self.dropped_slow += 1
            return
        if ring_settle(c.out) < 0 or ring_put(c.out, p, size) < 0:
            self.make_victim(c, CLOSE_INTERNAL)
            return
        self.touch(c)

    cdef void put_response(self, conn_t *c, span task_id, uint32_t status, span text) noexcept nogil:
        cdef uint8_t buf[2048]
        cdef uint8_t *p
        cdef uint32_t size
        if text.size > 1024:
            text.size = 1024
        size = c.header + string_room(task_id.size) + 1 + string_room(text.size)
        p = store_header(buf, c.header, size, self.own_system_id(c), O_RESPONSE, 1, self.unix_ms)
        p = store_string(p, task_id.ptr, task_id.size)
        p[0] = <uint8_t>status
        p = store_string(p + 1, text.ptr, text.size)
        self.put(c, buf, size)

    cdef void put_error(self, conn_t *c, span task_id, uint32_t code, span subject) noexcept nogil:
        # Counted, and told in the peer's own words: an announced one always, another one if it named a TaskId.
        cdef uint8_t buf[1024]
        cdef uint8_t *p
        cdef uint32_t size
        cdef span text
        self.errors[code] += 1
        # What the sender's earlier packets caused goes first.
        self.run_commit()
        text.ptr = <const uint8_t *>error_text(code)
        text.size = <uint32_t>strlen(<const char *>text.ptr)
        if code == E_MALFORMED:
            subject.size = 0
        if c.dialect != D_EVBUS_2:
            # A malformed packet of a version-1 peer is dropped without a word, as the C# servers do.
            if code != E_MALFORMED and task_id.size and task_id.size <= MAX_TASK_ID:
                self.put_response(c, task_id, 2, text)
            return
        if subject.size > 256:
            subject.size = 0
        if task_id.size > MAX_TASK_ID:
            task_id.size = 0
        size = c.header + string_room(task_id.size) + 4 + string_room(subject.size) + string_room(text.size)
        p = store_header(buf, c.header, size, 0, O_ERROR, 1, self.unix_ms)
        p = store_string(p, task_id.ptr, task_id.size)
        p = store_u32(p, code)
        p = store_string(p, subject.ptr, subject.size)
        p = store_string(p, text.ptr, text.size)
        self.put(c, buf, size)

    cdef void put_receipt(self, conn_t *c, span task_id, uint32_t receivers, uint32_t dropped) noexcept nogil:
        cdef uint8_t buf[256]
        cdef uint8_t *p
        cdef uint32_t size = c.header + string_room(task_id.size) + 8
        p = store_header(buf, c.header, size, 0, O_RECEIPT, 1, self.unix_ms)
        p = store_string(p, task_id.ptr, task_id.size)
        p = store_u32(p, receivers)
        p = store_u32(p, dropped)
        self.put(c, buf, size)

    cdef void put_query_end(self, conn_t *c, pending_t *query, uint32_t reason, int64_t lost) noexcept nogil:
        # `lost`: the connection that will not reply, while others may; 0: the query is over.
        cdef uint8_t buf[256]
        cdef uint8_t *p
        cdef span own = own_id_of(query), text
        cdef uint32_t size
        if c.dialect != D_EVBUS_2:
            if reason == END_RESPONDER_LOST:
                text.ptr = <const uint8_t *>b"the connection that was asked is gone"
                text.size = 37
                self.put_response(c, own, 2, text)
            return
        size = c.header + string_room(own.size) + 5
        p = store_header(buf, c.header, size, lost, O_QUERY_END, 1, self.unix_ms)
        p = store_string(p, own.ptr, own.size)
        p[0] = <uint8_t>reason
        p = store_u32(p + 1, query.replies)
        self.put(c, buf, size)

    # ---- flushing --------------------------------------------------------------------------------------------------------

    cdef int flush_one(self, conn_t *c) except -1:
        # One system call for one connection. What the kernel did not take stays queued, copied if it was lent.
        cdef Link link = <Link>c.owner
        cdef size_t before = c.out.size + c.out.lent_size
        try:
            link.flush(link.out)
        except OSError as error:
            self.lost.append((link, error))
            c.blocked = True
            c.out.lent_size = 0
            ring_release(c.out)
            return 0
        self.bytes_out += before - c.out.size - c.out.lent_size
        if c.out.size or c.out.lent_size:
            if ring_settle(c.out) < 0:
                self.make_victim(c, CLOSE_INTERNAL)
            if not c.blocked:
                c.blocked = True
                self.blocked.append(link)
        if (c.dropping or c.held_msgs) and not c.relieved and c.out.size <= self.soft_limit // 2:
            if self.relieved_count == self.relieved_room and grow(&self.relieved, &self.relieved_room) < 0:
                return 0  # the next flush tries again
            self.relieved[self.relieved_count] = c
            self.relieved_count += 1
            c.relieved = True
        return 0

    cdef int finish(self) except -1:
        # After a feed, or whatever else wrote.
        self.settle_touched()
        if self.relieved_count:
            self.relieve()
        return 0

    cdef int settle_touched(self) except -1:
        # Much is flushed now, little waits for the end of the turn; nothing stays lent.
        cdef size_t i, n = self.touched_count
        cdef conn_t *c
        self.touched_count = 0
        try:
            for i in range(n):
                c = self.touched[i]
                c.touched = False
                if not c.blocked and c.out.size + c.out.lent_size >= FLUSH_NOW:
                    self.flush_one(c)
                    continue
                if ring_settle(c.out) < 0:
                    self.make_victim(c, CLOSE_INTERNAL)
                if not c.dirty and not c.blocked:
                    if self.dirty_count == self.dirty_room and grow(&self.dirty, &self.dirty_room) < 0:
                        self.flush_one(c)
                        continue
                    self.dirty[self.dirty_count] = c
                    self.dirty_count += 1
                    c.dirty = True
        except BaseException:
            # A transport broke its promise (only OSError is expected): nothing may stay lent.
            for i in range(n):
                c = self.touched[i]
                c.touched = False
                if ring_settle(c.out) < 0:
                    self.make_victim(c, CLOSE_INTERNAL)
            raise
        return 0


cdef bytes wire_error(uint32_t header, int64_t system_id, int64_t unix_ms, span task_id, int32_t code, span subject,
                      bytes text):
    from_task = PyBytes_FromStringAndSize(<const char *>task_id.ptr, <Py_ssize_t>task_id.size)
    about = PyBytes_FromStringAndSize(<const char *>subject.ptr, <Py_ssize_t>subject.size)
    return pack_packet(header, O_ERROR, 1, system_id, unix_ms, "siss", (from_task, code, about, text))
