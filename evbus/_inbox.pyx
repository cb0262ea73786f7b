# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""The client's receiving side: packets from the ring become messages in mailboxes, answers for waiters, control tuples.

`Inbox.receive` runs on the I/O thread. For a delivery nothing runs but C, except when a subject is seen for the first
time since subscriptions changed (`match`). It never runs user code.

Threads. The interpreter lock is the only lock. Pointers into the ring do not outlive the packet at hand, and the ring
belongs to the I/O thread.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

from evbus._frame cimport (
    D_EVBUS_2,
    D_UNKNOWN,
    F_ANSWER,
    F_QUERY,
    HEADER_23,
    MAX_SUBJECT,
    MAX_TASK_ID,
    O_DELIVERY,
    O_ERROR,
    O_GAP,
    O_GO_AWAY,
    O_HEARTBEAT,
    O_QUERY_END,
    O_RECEIPT,
    O_RESPONSE,
    Ring,
    RingPool,
    SCAN_MORE,
    SCAN_PACKET,
    cursor,
    envelope_read,
    envelope_t,
    load_u32,
    load_u64,
    packet_scan,
    packet_t,
    read_bytes,
    read_string,
    read_u8,
    ring_fit,
    ring_linear,
    ring_skip,
    span,
)
from evbus._mailbox cimport Mailbox
from evbus._message cimport Message
from evbus.errors import ProtocolError

cdef enum:
    MSGPACK = 3  # wire.Codec.MSGPACK

# Words for wire.GapReason.
cdef str OVERFLOW = "overflow"
cdef str RECONNECT = "reconnect"

# Subjects whose subscriptions are remembered. Only costs time when it is too small.
cdef Py_ssize_t MAX_ROUTES = 8192


cdef inline str text_of(span text):
    return PyUnicode_DecodeUTF8(<const char *>text.ptr, <Py_ssize_t>text.size, "replace")


cdef inline bytes bytes_of(span text):
    return PyBytes_FromStringAndSize(<const char *>text.ptr, <Py_ssize_t>text.size)


@cython.final
cdef class Waiter:
    """Somebody who waits for one outcome: of a query, a confirmed publish, a subscribe, a flush.

    Args:
        task_id: the id that the outcome will carry.
        subject, action, timeout: for the words of errors.
        notify: called once when the outcome is there (and for each reply, if `many`), from any thread; must not raise.
        many: replies are collected until the end is told.
    """

    def __init__(self, bytes task_id not None, str subject not None="", str action not None="", notify=None,
                 bint many=False, double timeout=0.0):
        self.task_id = task_id
        self.subject = subject
        self.action = action
        self.notify = notify
        self.many = many
        self.asks = action == "query"
        self.timeout = timeout
        if many:
            self.replies = []

    @property
    def done(self):
        """Whether the outcome is known."""
        return self.finished

    def resolve(self, value=None):
        """Set the outcome; the first one counts. Returns whether this was it."""
        return self.end(value, None)

    def fail(self, error not None):
        """Set an exception as the outcome; the first outcome counts. Returns whether this was it."""
        return self.end(None, error)

    cpdef bint end(self, value, error) except -1:
        """As resolve or fail."""
        if self.finished:
            return False
        self.value = value
        self.error = error
        self.finished = True
        notify = self.notify
        if not self.many:
            self.notify = None
        if notify is not None:
            notify()
        return True

    cpdef bint push(self, reply) except -1:
        """Add a reply, if `many`; else the same as resolve."""
        if not self.many:
            return self.end(reply, None)
        if self.finished:
            return False
        self.replies.append(reply)
        if self.notify is not None:
            self.notify()
        return True

    def take_replies(self):
        """The replies since the last call."""
        replies = self.replies
        if not self.many:
            return []
        self.replies = []
        return replies

    def result(self):
        """The value, or raises the exception, of the outcome."""
        if self.error is not None:
            raise self.error
        return self.value


@cython.final
cdef class _Route:
    pass


@cython.final
cdef class Inbox:
    """Everything that arrives on one connection.

    Args:
        match: `match(subject_utf8)` gives the mailboxes of the plain subscriptions that a subject concerns: two tuples,
            of those that get its events and of those that are asked its queries.
        fallback: MSGPACK or JSON: what payloads of unknown codec count as.

    `answerer` is what queries are answered through: `reply(message, value, headers)` and `fail(message, code, text)`.
    """

    def __cinit__(self, match, *, uint32_t fallback=MSGPACK):
        self.match = match
        self.fallback = fallback
        self.ring = Ring(RingPool(512 * 1024))
        self.routes = {}
        self.boxes = {}
        self.waiters = {}
        self.ready = []
        self.overflows = []
        self.dialect = D_UNKNOWN
        self.limit = 65536

    def start(self, size_t limit):
        """A fresh connection: only control packets of at most `limit` bytes until `open`."""
        self.ring.clear()
        self.dialect = D_UNKNOWN
        self.limit = <uint32_t>limit
        self.fault = None

    def open(self, uint32_t dialect, size_t limit):
        """The handshake is done: let deliveries of that dialect in, and packets of at most `limit` bytes."""
        self.dialect = dialect
        self.limit = <uint32_t>limit

    @property
    def is_announced(self):
        """Whether there is a server that speaks version 2."""
        return self.dialect == D_EVBUS_2

    @property
    def limit_bytes(self):
        """The largest packet that is taken."""
        return self.limit

    def add_mailbox(self, Mailbox box not None):
        """A new subscription. Raises ValueError if its id is taken."""
        if box.sid in self.boxes:
            raise ValueError(f"subscription id {box.sid} is taken")
        self.boxes[box.sid] = box
        self.forget_routes()

    def remove_mailbox(self, Mailbox box not None):
        """The subscription is gone; does nothing if it was not there."""
        self.boxes.pop(box.sid, None)
        self.forget_routes()

    def put_gap(self, Mailbox box not None, count, str reason not None):
        """Messages for that mailbox are missing here; see the stub."""
        box.put_gap(count, reason)
        self.want_worker(box)

    def forget_routes(self):
        """Subscriptions changed: ask `match` again for each subject."""
        self.generation += 1
        self.last = None
        self.routes.clear()

    def add_waiter(self, Waiter waiter not None):
        """Expect an outcome for the waiter's id."""
        self.waiters[waiter.task_id] = waiter

    def pop_waiter(self, bytes task_id not None):
        """The waiter of that id, who is expected no more; None if there is none."""
        return self.waiters.pop(task_id, None)

    def find_waiter(self, bytes task_id not None):
        """The waiter of that id, or None."""
        return self.waiters.get(task_id)

    def take_waiters(self):
        """All waiters; none is expected any more."""
        waiters = list(self.waiters.values())
        self.waiters.clear()
        return waiters

    @property
    def waiting(self):
        """How many waiters there are."""
        return len(self.waiters)

    def take_ready(self):
        """Mailboxes that have messages and need a worker; each entry stands for one worker."""
        ready = self.ready
        if ready:
            self.ready = []
        return ready

    def take_overflows(self):
        """Mailboxes that a message ended because they were full."""
        overflows = self.overflows
        if overflows:
            self.overflows = []
        return overflows

    # ---- the hot path --------------------------------------------------------------------------------------------

    def receive(self):
        """Take all complete packets from the ring.

        Afterwards look, in this order, at what is returned, at `take_overflows`, at `take_ready` and at `fault` (what
        the server did wrong; nothing can be read after it).

        Returns:
            the control packets in their order: tuples of object id, version, SystemId, Unix milliseconds and body.
        """
        cdef packet_t packet
        cdef int r
        cdef list controls = []
        cdef Ring ring = self.ring
        if self.fault is not None:
            return controls
        if ring_linear(&ring.ring) < 0:
            raise MemoryError
        while ring.ring.size:
            r = packet_scan(ring.ring.buf + ring.ring.head, ring.ring.size, HEADER_23, self.limit, &packet)
            if r != SCAN_PACKET:
                if r != SCAN_MORE:
                    size = load_u32(ring.ring.buf + ring.ring.head)
                    self.fault = ProtocolError(
                        f"a packet claims {size:,} bytes; the header has {HEADER_23} and the limit is {self.limit:,}"
                    )
                break
            self.received_packets += 1
            if packet.object_id == O_DELIVERY and self.dialect != D_UNKNOWN:
                if self.dialect == D_EVBUS_2:
                    self.delivery_v2(&packet)
                else:
                    self.delivery_v1(&packet)
            elif packet.object_id == O_GAP and packet.version == 1 and self.dialect == D_EVBUS_2:
                # In its place among the deliveries, unlike other control packets.
                self.gap(&packet)
            elif packet.version == 1 and is_control(packet.object_id):
                controls.append((
                    packet.object_id, packet.version, packet.system_id, packet.unix_ms,
                    PyBytes_FromStringAndSize(<const char *>packet.body, <Py_ssize_t>packet.body_size),
                ))
            else:
                self.unknown += 1
            ring_skip(&ring.ring, packet.size)
            if self.dialect == D_UNKNOWN and controls:
                # What follows the handshake's answer may only be read once its dialect is known.
                break
        ring_fit(&ring.ring)
        return controls

    cdef int delivery_v2(self, packet_t *packet) except -1:
        cdef envelope_t fields
        if packet.version != 2:
            self.unknown += 1
            return 0
        if envelope_read(packet.body, packet.body_size, &fields) < 0 or fields.subject.size > MAX_SUBJECT:
            self.malformed += 1
            return 0
        return self.deliver(&fields, packet)

    cdef int delivery_v1(self, packet_t *packet) except -1:
        cdef envelope_t fields
        cdef cursor c
        cdef Waiter waiter
        cdef uint32_t is_query = 0
        if packet.version != 1:
            self.unknown += 1
            return 0
        c.p = packet.body
        c.end = packet.body + packet.body_size
        if (read_string(&c, &fields.task_id) < 0 or fields.task_id.size > MAX_TASK_ID
                or read_string(&c, &fields.subject) < 0 or fields.subject.size > MAX_SUBJECT
                or read_u8(&c, &is_query) < 0 or read_bytes(&c, &fields.payload) < 0):
            self.malformed += 1
            return 0
        fields.codec = 0
        fields.subscription_id = 0
        fields.deadline_ms = 0
        fields.headers.size = 0
        fields.flags = F_QUERY if is_query else 0
        packet.system_id = 0  # does not name the sender here
        # Only the id tells an answer from an event here.
        if not is_query and fields.task_id.size and self.waiters:
            waiter = <Waiter>self.waiters.get(bytes_of(fields.task_id))
            if waiter is not None and waiter.asks:
                fields.flags = F_ANSWER
        return self.deliver(&fields, packet)

    cdef int deliver(self, envelope_t *fields, packet_t *packet) except -1:
        cdef Message message
        cdef Mailbox box = None
        cdef _Route route = None
        cdef Waiter waiter = None
        cdef tuple boxes = None
        if fields.flags & F_ANSWER:
            waiter = <Waiter>self.waiters.get(bytes_of(fields.task_id))
            if waiter is None or not waiter.asks:
                self.late_answers += 1
                return 0
        elif fields.subscription_id:
            box = <Mailbox>self.boxes.get(fields.subscription_id)
            if box is None:
                self.unmatched += 1
                return 0
        else:
            route = self.last
            if (route is None or <uint32_t>PyBytes_GET_SIZE(route.key) != fields.subject.size
                    or memcmp(PyBytes_AS_STRING(route.key), fields.subject.ptr, fields.subject.size) != 0):
                route = self.route(fields.subject)
            boxes = route.asked if fields.flags & F_QUERY else route.boxes
            if not boxes:
                self.unmatched += 1
                return 0
        message = Message.__new__(Message)
        message.data = bytes_of(fields.payload)
        message.codec = fields.codec
        message.unix_ms = packet.unix_ms
        message.sender = packet.system_id
        message.fallback = self.fallback
        if fields.headers.size:
            message.raw_headers = bytes_of(fields.headers)
        self.received_msgs += 1
        if waiter is not None:
            message.subject = waiter.subject
            if not waiter.many:
                self.waiters.pop(waiter.task_id, None)
            waiter.push(message)
            return 0
        if fields.flags & F_QUERY:
            message.query_id = bytes_of(fields.task_id)
            message.answerer = self.answerer
            message.deadline_ms = fields.deadline_ms
            message.handlers_left = <int>len(boxes) if boxes is not None else 1
        if route is None:
            message.subject = text_of(fields.subject)
            return self.put(box, message)
        message.subject = route.subject
        for box in boxes:
            self.put(box, message)
        return 0

    cdef int put(self, Mailbox box, Message message) except -1:
        cdef int r = box.put(message)
        if r == 0:
            if box.workers < box.concurrency:
                box.workers += 1
                self.ready.append(box)
            return 0
        message.handlers_left -= 1
        if r == 2:
            self.overflows.append(box)
        else:
            # It may have left a gap, which takes a worker.
            self.want_worker(box)
        return 0

    cdef int want_worker(self, Mailbox box) except -1:
        if box.batches and box.workers < box.concurrency:
            box.workers += 1
            self.ready.append(box)
        return 0

    cdef int gap(self, packet_t *packet) except -1:
        # The server had to drop messages for one subscription: i32 id, i64 count, u8 reason.
        cdef int32_t sid
        cdef int64_t count
        cdef Mailbox box
        if packet.body_size < 13:
            self.malformed += 1
            return 0
        sid = <int32_t>load_u32(packet.body)
        count = <int64_t>load_u64(packet.body + 4)
        if count < 0:
            count = 0
        box = <Mailbox>self.boxes.get(sid)
        if box is None:
            # The subscription has just ended.
            self.missed_late += <uint64_t>count
            return 0
        self.put_gap(box, count, RECONNECT if packet.body[12] == 2 else OVERFLOW)
        return 0

    cdef _Route route(self, span subject):
        # The route of a subject that is not the last one's.
        cdef bytes key = bytes_of(subject)
        cdef _Route route = <_Route>self.routes.get(key)
        cdef uint64_t generation = self.generation
        if route is None:
            route = _Route.__new__(_Route)
            route.key = key
            route.subject = text_of(subject)
            route.boxes, route.asked = self.match(key)
            if self.generation != generation:
                # Another thread changed the subscriptions meanwhile; good for this message, not to be remembered.
                return route
            if len(self.routes) >= MAX_ROUTES:
                self.routes.clear()
            self.routes[key] = route
        self.last = route
        return route


cdef inline bint is_control(uint32_t object_id) noexcept:
    return (object_id == O_RESPONSE or object_id == O_HEARTBEAT or object_id == O_ERROR or object_id == O_RECEIPT
            or object_id == O_QUERY_END or object_id == O_GO_AWAY)
