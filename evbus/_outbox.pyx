# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""The client's sending side: packets are staged by any thread and sent by one at a time.

Two rings. `staging` takes packets; every method that writes to it holds the interpreter lock from its first look at the
state to its last byte and runs no Python code in between, so it needs no other lock, and a packet is staged whole or
not at all. `sending` belongs to the flusher, who lets go of the interpreter lock inside the system call. When `sending`
is empty the flusher swaps the two under the interpreter lock. So bytes leave in the order in which they were staged,
whoever sends them.

Who flushes. The first few packets of each millisecond are sent by whoever packs them: that costs less than to wake
another thread, and nothing is faster. With more it is a burst: the I/O thread is woken, once, to look after it every
millisecond (`polling`), and packets are left to gather. A packer that has staged a good buffer full sends it itself; so
does whoever waits for an answer. What no packer sent for a millisecond the I/O thread sends. `flushing` keeps flushers
apart: the one at work looks at `staging` again before it leaves, so nobody's bytes are left behind. When the kernel
takes no more, the I/O thread is woken to wait for it, and all others leave the socket alone (`blocked`). `idle` says
that all is sent and that nobody is there to look after what is staged next.

With a single thread, which `gather` declares, it is simpler: the first packet that is staged wakes, the rest gathers until
the loop's next turn sends it all. Only a good buffer full is sent at once, and its packer told to let others have a turn;
and so many urgent packets that their receivers are better put to work already.

Nothing here knows a socket: `transport` is anything with `flush(ring)`, see `evbus.transport`.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from evbus._frame cimport (
    D_EVBUS_2,
    D_H23_199,
    D_UNKNOWN,
    HEADER_23,
    MAX_HEADERS,
    MAX_SUBJECT,
    MAX_TASK_ID,
    O_PUBLISH,
    O_QUERY,
    Ring,
    RingPool,
    ring_put,
    ring_reserve,
    store_bytes,
    store_header,
    store_string,
    store_u32,
    string_room,
)
from evbus._frame import check_subject
from evbus.errors import PayloadTooLargeError

PACK_OK = P_OK
PACK_FULL = P_FULL
PACK_CLOSED = P_CLOSED
PACK_SLOW = P_SLOW
PACK_YIELD = P_YIELD
FLUSH_DONE = S_DONE
FLUSH_BUSY = S_BUSY
FLUSH_BLOCKED = S_BLOCKED
FLUSH_CLOSED = S_CLOSED

# Validated subjects that are remembered. Only costs time when it is too small.
cdef Py_ssize_t MAX_KEYS = 4096
# Packets per millisecond that are sent by their packers: more would cost a burst too much, fewer would delay the second
# and third packet of a program that sends only these.
cdef int SOLO_PACKETS = 4
# Urgent packets that are left to gather while threads are woken one after the other.
cdef int CORKED_PACKETS = 16
# The same with a single thread: then the peer gets to work while we still make the rest. Queries at 64 at once: 1.2 times
# the rate (median) against sending all of a turn together; 8 or 16 cost more system calls and gained nothing.
cdef int GATHERED_PACKETS = 32
# Sends in a row by one flusher, so that a thread that came to publish does not end up sending for all others.
cdef int MAX_ROUNDS = 16
# More than any packet has beside its payload: what a waiting publisher needs on top of it.
cdef size_t PACKET_ROOM = 32 * 1024
# Everything of an envelope but headers and payload: header, fixed fields, three ids with their lengths, two counts.
cdef enum:
    HEAD_ROOM = 23 + 10 + 3 * 5 + 2 * 128 + 256 + 8


cdef class Clock:
    """The time that goes into packets; this one stands still unless it is moved. `_clock.SystemClock` is the real one.

    Args:
        unix_ms: milliseconds since 1970; assign the attribute to move the clock.
    """

    def __cinit__(self, int64_t unix_ms=0):
        self.unix_ms = unix_ms

    def now_ms(self):
        """Milliseconds since 1970."""
        return self.read()

    cdef int64_t read(self) noexcept:
        return self.unix_ms


@cython.final
cdef class Outbox:
    """The bytes that wait to be sent, and the rules for who sends them; see the module's docstring.

    Args:
        clock: the time for packet headers.
        high_bytes: above this many waiting bytes packing is refused (PACK_FULL), so that the publisher waits.
        low_bytes: at this many or fewer, waiting publishers are told to go on.
        eager_bytes: a packer that has staged this much sends it itself.

    `wake` is called, from any thread, when the I/O thread is to look at `broken`, `is_blocked` and `is_polling`;
    `on_room` when `want_room` said that there was none and now there is. Both must return quickly and must not raise.
    """

    def __cinit__(self, Clock clock not None, *, size_t high_bytes=4 * 1024 * 1024, size_t low_bytes=1024 * 1024,
                  size_t eager_bytes=64 * 1024):
        self.clock = clock
        self.high = high_bytes
        self.low = low_bytes
        self.eager = eager_bytes
        self.keys = {}
        # A pool for each ring: a ring and its pool belong to one thread at a time.
        self.staging = Ring(RingPool(512 * 1024))
        self.sending = Ring(RingPool(512 * 1024))
        self.dialect = D_UNKNOWN

    # ---- the connection's life: control plane ------------------------------------------------------------------------

    def attach(self, transport not None):
        """A fresh connection: from now on control packets may be staged and flushed, messages not yet (`open`)."""
        self.drop()
        self.transport = transport

    def open(self, uint32_t dialect, size_t payload_limit, kept=()):
        """The handshake is done and the subscriptions are staged: let messages in.

        Args:
            dialect: EVBUS_2, or H23_199 for a server that did not announce itself.
            payload_limit: largest payload that the server takes, in bytes.
            kept: messages that waited for this: tuples of the subject's UTF-8, payload, headers, flags and codec. They
                are staged before any other message, however many bytes they are.

        Returns:
            of the kept ones those that were not staged as they are over the limit: tuples of subject and bytes.
        """
        cdef bytes key, payload, headers
        cdef list refused = []
        if dialect != D_EVBUS_2 and dialect != D_H23_199:
            raise ValueError("a client speaks EVBUS_2 or H23_199")
        for key, payload, headers, flags, codec in kept:
            if <size_t>PyBytes_GET_SIZE(payload) > payload_limit:
                refused.append((key.decode(), PyBytes_GET_SIZE(payload)))
            else:
                self.stage_message(dialect, O_PUBLISH, key, payload, flags, codec, 0, b"", b"", headers, True)
                self.packed_msgs += 1
        self.dialect = dialect
        self.payload_limit = payload_limit
        self.refresh_fast()
        return refused

    def close(self):
        """Take no more messages; what is staged can still be flushed, and control packets pass."""
        self.dialect = D_UNKNOWN
        self.refresh_fast()

    def drop(self):
        """Forget the connection and all that waits. Returns the number of bytes that were never sent.

        A flusher may still be inside its system call (`flusher_inside`); the transport must not be closed before it
        left.
        """
        cdef size_t lost = self.staging.ring.size + self.in_flight
        self.close()
        self.transport = None
        self.epoch += 1
        # New rings instead of clearing: a flusher may still be reading the old one.
        self.staging = Ring(RingPool(512 * 1024))
        self.sending = Ring(RingPool(512 * 1024))
        self.in_flight = 0
        self.flushing = False
        self.blocked = False
        self.idle = False
        self.polling = False
        self.broken = None
        if self.room_wanted:
            self.room_wanted = False
            if self.on_room is not None:
                self.on_room()
        return lost

    def now_ms(self):
        """The clock's time, for packets that are encoded elsewhere."""
        return self.clock.read()

    @property
    def flusher_inside(self):
        """Whether a thread is inside a transport's `flush` right now."""
        return self.inside > 0

    @property
    def is_open(self):
        """Whether messages can be staged."""
        return self.dialect != D_UNKNOWN

    @property
    def is_blocked(self):
        """Whether the kernel took less than it was given, so that the I/O thread waits for it."""
        return self.blocked

    @property
    def pending_bytes(self):
        """Bytes staged and not yet taken by the kernel."""
        return self.staging.ring.size + self.in_flight

    @property
    def high_bytes(self):
        """The high watermark."""
        return self.high

    @property
    def payload_limit_bytes(self):
        """Largest payload that the server takes; 0 before the handshake."""
        return self.payload_limit

    def gather(self):
        """There is one thread only, and `wake` has it flush in its next turn: packets gather until then, urgent ones too.
        """
        self.gathers = True

    def begin_answering(self):
        """A handler starts on a query that a publish may answer: until it ends, `pack_event` says PACK_SLOW."""
        self.answering_now += 1
        self.refresh_fast()

    def end_answering(self):
        """The inverse of begin_answering."""
        self.answering_now -= 1
        self.refresh_fast()

    @property
    def is_answering(self):
        """Whether a handler is at work on a query, so that a publish may be its answer."""
        return self.answering_now > 0

    @property
    def is_polling(self):
        """Whether packers count on the I/O thread to flush every millisecond. It ends that with `end_polling`."""
        return self.polling

    def end_polling(self):
        """The burst is over, the I/O thread flushes once more and then waits to be woken."""
        self.polling = False

    def hold(self):
        """The I/O thread is at work and will flush when it is done: no need to wake it until then."""
        self.idle = False

    cdef void refresh_fast(self) noexcept:
        self.fast = self.dialect == D_EVBUS_2 and self.answering_now == 0

    # ---- packing: any thread -------------------------------------------------------------------------------------

    def key(self, subject not None):
        """The UTF-8 of a subject to publish to, validated. Raises InvalidSubjectError."""
        return self.key_of(subject)

    cdef bytes key_of(self, object subject):
        # Python code runs only when the subject is new.
        cdef object key
        if type(subject) is str:
            if subject is self.last_subject:
                return self.last_key
            key = self.keys.get(subject)
            if key is None:
                key = check_subject(subject)
                if len(self.keys) >= MAX_KEYS:
                    self.keys.clear()
                self.keys[subject] = key
            self.last_subject = subject
            self.last_key = <bytes>key
            return <bytes>key
        return check_subject(str(subject) if isinstance(subject, str) else subject)

    cdef bint full(self, size_t size) noexcept:
        cdef size_t pending = self.staging.ring.size + self.in_flight
        # One packet always finds room, however large.
        return pending != 0 and pending + size > self.high

    cdef int stage(self, const void *head, size_t head_size, const void *tail, size_t tail_size) except -1:
        # Reserves for all first, so that a packet is staged whole or not at all.
        cdef size_t size = head_size + tail_size, room
        if self.staging.ring.cap - self.staging.ring.size < size:
            # In a burst an empty ring starts with what one flush takes, or it would get there by doubling each time.
            room = self.eager * 2 if self.burst and self.staging.ring.cap == 0 else size
            if ring_reserve(&self.staging.ring, room if room > size else size) < 0:
                raise MemoryError
        ring_put(&self.staging.ring, head, head_size)
        ring_put(&self.staging.ring, tail, tail_size)
        return 0

    cdef int after_stage(self, bint urgent) except -1:
        cdef int64_t now
        cdef bint alone = False
        if urgent and self.corked:
            # More threads are about to wake up and to send; whoever is the last of them uncorks.
            self.corked_msgs += 1
            if self.corked_msgs < CORKED_PACKETS:
                return 0
            self.corked_msgs = 0
        if self.gathers:
            if self.idle:
                self.idle = False
                self.wakes += 1
                if self.wake is not None:
                    self.wake()
            if urgent:
                self.corked_msgs += 1
                urgent = self.corked_msgs >= GATHERED_PACKETS
                if urgent:
                    self.corked_msgs = 0
        if self.idle and not urgent:
            now = self.clock.read()
            if now != self.burst_ms:
                self.burst_ms = now
                self.burst_msgs = 0
            self.burst_msgs += 1
            alone = self.burst_msgs <= SOLO_PACKETS
            if not alone:
                self.idle = False
                self.polling = True
                self.wakes += 1
                if self.wake is not None:
                    self.wake()
        if urgent or alone or self.staging.ring.size >= self.eager:
            if not self.flushing and not self.blocked:
                self.flush(False)
        return 0

    cdef int uncork(self) except -1:
        # Nobody else is about to send: what was left to gather goes now.
        self.corked = False
        self.corked_msgs = 0
        if self.staging.ring.size and not self.flushing and not self.blocked:
            self.flush(False)
        return 0

    def pack_event(self, subject not None, bytes payload not None, uint32_t codec):
        """Stage a plain event for a server that speaks version 2: no ids, no headers, no acknowledgement.

        Returns PACK_OK, PACK_FULL, or PACK_SLOW when `pack_message` must be used instead. If the outbox gathers, also
        PACK_YIELD: staged, and a buffer full was sent, so that it is time to let others have a turn.

        Raises:
            InvalidSubjectError, PayloadTooLargeError: nothing was staged.
        """
        cdef uint8_t head[HEAD_ROOM]
        cdef uint8_t *p
        cdef bytes key
        cdef size_t size, head_size
        cdef size_t payload_size = <size_t>PyBytes_GET_SIZE(payload)
        cdef bint large
        if subject is self.last_subject:
            key = self.last_key
        else:
            key = self.key_of(subject)
        # From here to the end of `stage` no Python code runs.
        if not self.fast:
            return P_SLOW
        if payload_size > self.payload_limit:
            raise PayloadTooLargeError(payload_size, self.payload_limit, str(subject))
        p = head + HEADER_23
        p[0] = 0
        p[1] = <uint8_t>(codec & 0xff)
        p = store_u32(p + 2, 0)
        p = store_u32(p, 0)
        p[0] = 0
        p = store_string(p + 1, <const uint8_t *>PyBytes_AS_STRING(key), <uint32_t>PyBytes_GET_SIZE(key))
        p[0] = 0
        p = store_u32(p + 1, 0)
        p = store_u32(p, <uint32_t>payload_size)
        head_size = <size_t>(p - head)
        size = head_size + payload_size
        if self.full(size):
            return P_FULL
        store_header(head, HEADER_23, <uint32_t>size, 0, O_PUBLISH, 2, self.clock.read())
        self.stage(head, head_size, PyBytes_AS_STRING(payload), payload_size)
        self.packed_msgs += 1
        large = self.staging.ring.size >= self.eager
        if self.idle or large:
            self.after_stage(False)
            if large and self.gathers:
                return P_YIELD
        return P_OK

    def pack_message(self, uint32_t object_id, bytes key not None, bytes payload not None, *, uint32_t flags=0,
                     uint32_t codec=0, int32_t deadline_ms=0, bytes task_id not None=b"",
                     bytes query_task_id not None=b"", bytes headers not None=b"", bint urgent=False):
        """Stage a publish (or answer) or a query with all its fields, in the dialect of the connection.

        A server that speaks version 1 gets neither flags, codec, deadline nor headers.

        Args:
            object_id: PUBLISH or QUERY.
            key: the subject's UTF-8, validated (`key`).
            headers: as `pack_headers` makes them.
            urgent: send it now rather than with what comes next.

        Returns:
            PACK_OK, PACK_FULL or PACK_CLOSED.

        Raises:
            PayloadTooLargeError: above the server's limit; nothing was staged.
        """
        cdef int r
        if object_id != O_PUBLISH and object_id != O_QUERY:
            raise ValueError("only publishes and queries are messages of a client")
        if (PyBytes_GET_SIZE(key) > MAX_SUBJECT or PyBytes_GET_SIZE(task_id) > MAX_TASK_ID
                or PyBytes_GET_SIZE(query_task_id) > MAX_TASK_ID or PyBytes_GET_SIZE(headers) > MAX_HEADERS):
            raise ValueError("a field is over its limit")
        if self.dialect == D_UNKNOWN:
            return P_CLOSED
        if <size_t>PyBytes_GET_SIZE(payload) > self.payload_limit:
            raise PayloadTooLargeError(PyBytes_GET_SIZE(payload), self.payload_limit, key.decode())
        r = self.stage_message(self.dialect, object_id, key, payload, flags, codec, deadline_ms, task_id, query_task_id,
                               headers, False)
        if r == P_OK:
            self.packed_msgs += 1
            self.after_stage(urgent)
        return r

    cdef bint takes(self, size_t payload_size) noexcept:
        # Whether a message with that payload can be staged as far as the connection and its limit are concerned.
        return self.dialect != D_UNKNOWN and payload_size <= self.payload_limit

    cdef int stage_message(self, uint32_t dialect, uint32_t object_id, bytes key, bytes payload, uint32_t flags,
                           uint32_t codec, int32_t deadline_ms, bytes task_id, bytes query_task_id, bytes headers,
                           bint force) except -1:
        # Stages a message whose fields are within their limits; P_OK, or P_FULL unless `force`.
        cdef uint8_t head[HEAD_ROOM]
        cdef uint8_t *p = head + HEADER_23
        cdef size_t size, head_size
        cdef size_t payload_size = <size_t>PyBytes_GET_SIZE(payload)
        cdef uint32_t version = 2
        if dialect == D_EVBUS_2:
            p[0] = <uint8_t>(flags & 0xff)
            p[1] = <uint8_t>(codec & 0xff)
            p = store_u32(p + 2, 0)
            p = store_u32(p, <uint32_t>deadline_ms)
        else:
            version = 1
            headers = b""
        p = store_string(p, <const uint8_t *>PyBytes_AS_STRING(task_id), <uint32_t>PyBytes_GET_SIZE(task_id))
        p = store_string(p, <const uint8_t *>PyBytes_AS_STRING(key), <uint32_t>PyBytes_GET_SIZE(key))
        if version == 2 or object_id == O_PUBLISH:
            p = store_string(p, <const uint8_t *>PyBytes_AS_STRING(query_task_id),
                             <uint32_t>PyBytes_GET_SIZE(query_task_id))
        if version == 2 and PyBytes_GET_SIZE(headers) == 0:
            p = store_u32(p, 0)
        head_size = <size_t>(p - head)
        size = head_size + 4 + payload_size
        if PyBytes_GET_SIZE(headers):
            size += 4 + <size_t>PyBytes_GET_SIZE(headers)
        if not force and self.full(size):
            return P_FULL
        store_header(head, HEADER_23, <uint32_t>size, 0, object_id, version, self.clock.read())
        # Room for all first; then nothing below can fail half way.
        if ring_reserve(&self.staging.ring, size) < 0:
            raise MemoryError
        if PyBytes_GET_SIZE(headers):
            p = store_u32(p, <uint32_t>PyBytes_GET_SIZE(headers))
            self.stage(head, head_size + 4, PyBytes_AS_STRING(headers), <size_t>PyBytes_GET_SIZE(headers))
            head_size = 0
            p = head
        p = store_u32(p, <uint32_t>payload_size)
        self.stage(head, <size_t>(p - head), PyBytes_AS_STRING(payload), payload_size)
        return P_OK

    def pack_control(self, bytes packet not None, bint urgent=False):
        """Stage a packet that is already encoded, at any time while a transport is attached and whatever waits already.

        Returns PACK_OK or PACK_CLOSED.
        """
        if self.transport is None:
            return P_CLOSED
        self.stage(PyBytes_AS_STRING(packet), <size_t>PyBytes_GET_SIZE(packet), NULL, 0)
        self.after_stage(urgent)
        return P_OK

    def want_room(self, size_t size=0):
        """Ask for `on_room` after PACK_FULL. Returns False if there is room already (or no connection), so: try again.

        Args:
            size: bytes of the payload that waits; a large one needs more room than the low watermark leaves.

        Also sends what is staged, if nobody is at it.
        """
        cdef size_t mark = self.low
        if not self.flushing and not self.blocked:
            self.flush(False)
        if size and size + PACKET_ROOM > self.high - mark:
            mark = 0
        if self.transport is None or self.staging.ring.size + self.in_flight <= mark:
            return False
        if not self.room_wanted or mark < self.room_mark:
            self.room_mark = mark
        self.room_wanted = True
        return True

    # ---- sending ---------------------------------------------------------------------------------------------------

    def flush(self, bint io_thread):
        """Send what is staged, as far as the kernel takes it.

        Args:
            io_thread: the caller is the I/O thread, which alone may try while the kernel is known to take nothing.

        Returns:
            FLUSH_DONE, FLUSH_BUSY, FLUSH_BLOCKED or FLUSH_CLOSED. After FLUSH_BLOCKED the I/O thread calls again as
            soon as the socket is writable. A failure of the transport is kept in `broken` for the I/O thread, which is
            woken.
        """
        cdef size_t before, left
        cdef uint32_t epoch = self.epoch
        cdef int result = S_BLOCKED
        cdef int rounds = 0
        cdef object transport = self.transport
        cdef object failure = None
        if transport is None or self.broken is not None:
            return S_CLOSED
        if self.flushing:
            return S_BUSY
        if self.blocked and not io_thread:
            return S_BLOCKED
        self.flushing = True
        self.idle = False
        try:
            while True:
                if self.in_flight == 0:
                    if self.staging.ring.size == 0:
                        self.idle = not self.polling
                        self.blocked = False
                        result = S_DONE
                        break
                    self.staging, self.sending = self.sending, self.staging
                    self.in_flight = self.sending.ring.size
                    self.burst = self.in_flight >= self.eager
                if rounds == MAX_ROUNDS:
                    break
                rounds += 1
                before = self.in_flight
                self.inside += 1
                try:
                    left = transport.flush(self.sending)
                finally:
                    self.inside -= 1
                if self.epoch != epoch:
                    return S_CLOSED
                self.in_flight = left
                self.flushed_bytes += before - left
                self.flushes += 1
                if left == before:
                    self.blocked = True
                    break
        except OSError as exc:
            failure = exc
        finally:
            if self.epoch == epoch:
                self.flushing = False
                if result != S_DONE:
                    # Also right if an interrupt (Ctrl-C) came out of the transport: the ring knows what was sent.
                    self.in_flight = self.sending.ring.size
                    self.idle = not self.blocked and not self.polling
        if failure is not None:
            if self.epoch == epoch:
                self.broken = failure
                if self.wake is not None:
                    self.wake()
            return S_CLOSED
        if self.room_wanted and self.staging.ring.size + self.in_flight <= self.room_mark:
            self.room_wanted = False
            if self.on_room is not None:
                self.on_room()
        if result == S_BLOCKED and not io_thread and self.wake is not None:
            self.wake()
        return result
