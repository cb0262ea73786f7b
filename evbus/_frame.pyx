# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""The shared codec: ring buffers, the packet scan, body fields and subject rules.

Client and server use the same functions, from C (`cimport`) on their hot paths and through the Python face below on the
control plane. Nothing here knows a socket, a clock or a role.

Rings. A `Ring` is a byte queue over one block of memory whose size is a power of two; writing may wrap around its end. It
holds no memory while it is empty: blocks come from a `RingPool` (last in, first out, so the block used next is the one still
in the processor's cache) and go back to it. A ring grows by doubling, and only for bytes that are really there; a length that
a peer claims never makes it grow.

Threads. Nothing here locks. A ring, and a pool with all its rings, belong to one thread at a time; the Python methods hold
the interpreter lock from beginning to end.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

from evbus import wire
from evbus.errors import InvalidSubjectError, ProtocolError

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

# Smallest and largest block that a pool keeps; larger ones go straight back to the system.
cdef size_t SMALLEST_BLOCK = 512
cdef size_t LARGEST_KEPT = 512 << (SIZE_CLASSES - 1)
# One read takes at most this much: enough to make the cost of a turn of the loop small against the bytes, small enough to
# stay in a second-level cache and to keep one busy peer from holding the loop.
READ_BYTES = 256 * 1024
cdef size_t READ_BLOCK = 256 * 1024


cdef inline int size_class(size_t cap) noexcept nogil:
    cdef int k = 0
    while (SMALLEST_BLOCK << k) < cap:
        k += 1
    return k


cdef uint8_t *block_take(pool_t *pool, size_t cap) noexcept nogil:
    cdef int k
    cdef void **block
    if pool is not NULL:
        pool.held += cap
        if cap <= LARGEST_KEPT:
            k = size_class(cap)
            block = <void **>pool.blocks[k]
            if block is not NULL:
                pool.blocks[k] = block[0]
                pool.kept -= cap
                return <uint8_t *>block
    block = <void **>malloc(cap)
    if block is NULL and pool is not NULL:
        pool.held -= cap
    return <uint8_t *>block


cdef void block_give(pool_t *pool, uint8_t *buf, size_t cap) noexcept nogil:
    cdef int k
    if pool is not NULL:
        pool.held -= cap
        if cap <= LARGEST_KEPT and pool.kept + cap <= pool.keep_limit:
            k = size_class(cap)
            (<void **>buf)[0] = pool.blocks[k]
            pool.blocks[k] = buf
            pool.kept += cap
            return
    free(buf)


cdef int ring_reserve(ring_t *ring, size_t room) noexcept nogil:
    # Makes room for that many more bytes. Returns -1 when memory is short; the ring is then as before.
    cdef size_t need = ring.size + room, cap = ring.cap, wrapped
    cdef uint8_t *buf
    if need < room or need > (<size_t>1 << 62):
        return -1
    if need <= cap:
        return 0
    if cap == 0:
        cap = SMALLEST_BLOCK
    while cap < need:
        cap <<= 1
    if ring.cap > LARGEST_KEPT:
        # Large blocks move by remapping where the system can; only the wrapped part is then put behind the old end.
        buf = <uint8_t *>realloc(ring.buf, cap)
        if buf is NULL:
            return -1
        if ring.pool is not NULL:
            ring.pool.held += cap - ring.cap
        if ring.head + ring.size > ring.cap:
            wrapped = ring.head + ring.size - ring.cap
            memcpy(buf + ring.cap, buf, wrapped)
        ring.buf = buf
        ring.cap = cap
        return 0
    buf = block_take(ring.pool, cap)
    if buf is NULL:
        return -1
    if ring.size:
        wrapped = ring.cap - ring.head
        if wrapped >= ring.size:
            memcpy(buf, ring.buf + ring.head, ring.size)
        else:
            memcpy(buf, ring.buf + ring.head, wrapped)
            memcpy(buf + wrapped, ring.buf, ring.size - wrapped)
    if ring.cap:
        block_give(ring.pool, ring.buf, ring.cap)
    ring.buf = buf
    ring.cap = cap
    ring.head = 0
    return 0


cdef int ring_put(ring_t *ring, const void *data, size_t size) noexcept nogil:
    cdef size_t tail, first
    if size == 0:
        return 0
    if ring.cap - ring.size < size:
        if ring_reserve(ring, size) < 0:
            return -1
    tail = (ring.head + ring.size) & (ring.cap - 1)
    first = ring.cap - tail
    if first >= size:
        memcpy(ring.buf + tail, data, size)
    else:
        memcpy(ring.buf + tail, data, first)
        memcpy(ring.buf, <const uint8_t *>data + first, size - first)
    ring.size += size
    return 0


cdef void ring_skip(ring_t *ring, size_t size) noexcept nogil:
    ring.size -= size
    if ring.size == 0:
        ring.head = 0
    else:
        ring.head = (ring.head + size) & (ring.cap - 1)


cdef int ring_linear(ring_t *ring) noexcept nogil:
    # Makes the bytes contiguous (only needed for a packet across the wrap). Returns -1 when memory is short.
    cdef uint8_t *buf
    cdef size_t first
    if ring.head + ring.size <= ring.cap:
        return 0
    buf = block_take(ring.pool, ring.cap)
    if buf is NULL:
        return -1
    first = ring.cap - ring.head
    memcpy(buf, ring.buf + ring.head, first)
    memcpy(buf + first, ring.buf, ring.size - first)
    block_give(ring.pool, ring.buf, ring.cap)
    ring.buf = buf
    ring.head = 0
    return 0


cdef void ring_release(ring_t *ring) noexcept nogil:
    if ring.cap:
        block_give(ring.pool, ring.buf, ring.cap)
    ring.buf = NULL
    ring.cap = 0
    ring.head = 0
    ring.size = 0


cdef void ring_fit(ring_t *ring) noexcept nogil:
    # Gives the block back when the ring is empty, or trades it for a small one when little is left in it: a peer that
    # leaves an unfinished packet behind holds about as much memory as it sent.
    cdef size_t cap
    cdef uint8_t *buf
    if ring.size == 0:
        if ring.cap:
            ring_release(ring)
        return
    if ring.size * 8 > ring.cap:
        return
    cap = SMALLEST_BLOCK
    while cap < ring.size:
        cap <<= 1
    if cap == ring.cap:
        return
    buf = block_take(ring.pool, cap)
    if buf is NULL:
        return
    if ring_linear(ring) < 0:
        block_give(ring.pool, buf, cap)
        return
    memcpy(buf, ring.buf + ring.head, ring.size)
    block_give(ring.pool, ring.buf, ring.cap)
    ring.buf = buf
    ring.cap = cap
    ring.head = 0


cdef int ring_make_room(ring_t *ring, size_t limit) noexcept nogil:
    # Before a read: leaves the ring linear, starting at 0, with room for a good read behind its bytes. It grows (doubles)
    # only when it is full of bytes that did arrive, and not beyond `limit` plus one read. Returns -1 when memory is short.
    cdef uint8_t *buf
    cdef size_t cap
    if ring.cap < READ_BLOCK:
        buf = block_take(ring.pool, READ_BLOCK)
        if buf is NULL:
            return -1
        if ring.size:
            if ring_linear(ring) < 0:
                block_give(ring.pool, buf, READ_BLOCK)
                return -1
            memcpy(buf, ring.buf + ring.head, ring.size)
        if ring.cap:
            block_give(ring.pool, ring.buf, ring.cap)
        ring.buf = buf
        ring.cap = READ_BLOCK
        ring.head = 0
        return 0
    if ring.head:
        if ring_linear(ring) < 0:
            return -1
        if ring.head:
            memmove(ring.buf, ring.buf + ring.head, ring.size)
            ring.head = 0
    if ring.cap - ring.size < READ_BLOCK >> 2 and ring.cap < limit + READ_BLOCK:
        cap = ring.cap
        if ring_reserve(ring, cap - ring.size + 1) < 0:
            return -1
    return 0


cdef int ring_lend(ring_t *ring, const uint8_t *data, size_t size) noexcept nogil:
    # Queues bytes without copying them. They must stay where they are until ring_settle. Returns -1 when memory is short.
    if ring.lent_size:
        if ring.lent + ring.lent_size == data:
            ring.lent_size += size
            return 0
        if ring_settle(ring) < 0:
            return -1
    ring.lent = data
    ring.lent_size = size
    return 0


cdef int ring_settle(ring_t *ring) noexcept nogil:
    # Copies what is still lent into the ring itself. Returns -1 when memory is short; the segment is then lost.
    cdef int r = 0
    if ring.lent_size:
        r = ring_put(ring, ring.lent, ring.lent_size)
        ring.lent_size = 0
        ring.lent = NULL
    return r


cdef void ring_sent(ring_t *ring, size_t size) noexcept nogil:
    # The kernel took that many bytes from the front: the ring's own first, then lent ones.
    cdef size_t own = ring.size if size > ring.size else size
    if own:
        ring_skip(ring, own)
    size -= own
    if size:
        ring.lent += size
        ring.lent_size -= size
    if ring.size == 0 and ring.cap and ring.lent_size == 0:
        ring_release(ring)


cdef int layout_detect(const uint8_t *p, size_t size, uint32_t limit, uint32_t *header) noexcept nogil:
    # Decides the header layout from the first 14 bytes of a server's stream.
    cdef uint32_t pack_size
    if size < 4:
        return SCAN_MORE
    pack_size = load_u32(p)
    # No header of either layout is shorter, and no C# peer accepts more than 64 MiB: this is another protocol (HTTP's "GET "
    # or a TLS hello read as a size), refused after 4 bytes.
    if pack_size < HEADER_22 or pack_size > MAX_PACKET:
        return SCAN_REFUSED
    if pack_size > limit:
        return SCAN_TOO_LARGE
    if size < 14:
        return SCAN_MORE
    if p[12] != O_HANDSHAKE or p[13] > 1:
        return SCAN_REFUSED
    header[0] = HEADER_22 if p[13] == 1 else HEADER_23
    return SCAN_PACKET


cdef int packet_scan(const uint8_t *p, size_t size, uint32_t header, uint32_t limit, packet_t *out) noexcept nogil:
    # The packet at p, if it is complete. PackSize is judged as soon as its 4 bytes are there, unsigned.
    cdef uint32_t pack_size
    if size < 4:
        return SCAN_MORE
    pack_size = load_u32(p)
    if pack_size < header or pack_size > 0x7fffffff:
        return SCAN_BAD_SIZE
    if pack_size > limit:
        return SCAN_TOO_LARGE
    if size < pack_size:
        return SCAN_MORE
    out.start = <uint8_t *>p
    out.size = pack_size
    out.system_id = <int64_t>load_u64(p + 4)
    if header == HEADER_23:
        out.object_id = <uint32_t>p[12] | (<uint32_t>p[13] << 8)
        out.version = p[14]
        out.unix_ms = <int64_t>load_u64(p + 15)
    else:
        out.object_id = p[12]
        out.version = p[13]
        out.unix_ms = <int64_t>load_u64(p + 14)
    out.body = p + header
    out.body_size = pack_size - header
    return SCAN_PACKET


cdef int envelope_read(const uint8_t *body, uint32_t size, envelope_t *out) noexcept nogil:
    # Reads a version-2 envelope. 0 if well formed: fields within their limits, headers in pairs, nothing behind Buffer.
    # On -1, task_id and subject are valid (perhaps empty) for the error that reports it.
    cdef cursor c
    c.p = body
    c.end = body + size
    out.task_id.ptr = out.subject.ptr = body
    out.task_id.size = out.subject.size = 0
    if size < 10:
        return -1
    out.flags = body[0]
    out.codec = body[1]
    out.subscription_id = <int32_t>load_u32(body + 2)
    out.deadline_ms = <int32_t>load_u32(body + 6)
    c.p += 10
    if read_string(&c, &out.task_id) < 0:
        return -1
    if out.task_id.size > MAX_TASK_ID:
        out.task_id.size = 0
        return -1
    if read_string(&c, &out.subject) < 0:
        return -1
    if read_string(&c, &out.query_task_id) < 0 or out.query_task_id.size > MAX_TASK_ID:
        return -1
    if read_bytes(&c, &out.headers) < 0:
        return -1
    if out.headers.size and (out.headers.size > MAX_HEADERS or headers_check(out.headers) < 0):
        return -1
    if read_bytes(&c, &out.payload) < 0:
        return -1
    return 0 if c.p == c.end else -1


cdef int headers_check(span headers) noexcept nogil:
    # Pairs of strings, each valid UTF-8, each key not empty, ending exactly at the end.
    cdef cursor c
    cdef span text
    cdef bint is_key = True
    c.p = headers.ptr
    c.end = headers.ptr + headers.size
    while c.p != c.end:
        if read_string(&c, &text) < 0 or utf8_check(text.ptr, text.size) < 0:
            return -1
        if is_key and text.size == 0:
            return -1
        is_key = not is_key
    return 0 if is_key else -1


cdef int utf8_check(const uint8_t *p, size_t size) noexcept nogil:
    # 0 for well-formed UTF-8 (RFC 3629: no surrogates, nothing over-long, nothing above U+10FFFF), else -1.
    cdef size_t i = 0
    cdef uint8_t b
    while i < size:
        b = p[i]
        if b < 0x80:
            i += 1
        elif b < 0xc2:
            return -1
        elif b < 0xe0:
            if size - i < 2 or (p[i + 1] & 0xc0) != 0x80:
                return -1
            i += 2
        elif b < 0xf0:
            if size - i < 3 or (p[i + 1] & 0xc0) != 0x80 or (p[i + 2] & 0xc0) != 0x80:
                return -1
            if (b == 0xe0 and p[i + 1] < 0xa0) or (b == 0xed and p[i + 1] > 0x9f):
                return -1
            i += 3
        elif b < 0xf5:
            if size - i < 4 or (p[i + 1] & 0xc0) != 0x80 or (p[i + 2] & 0xc0) != 0x80 or (p[i + 3] & 0xc0) != 0x80:
                return -1
            if (b == 0xf0 and p[i + 1] < 0x90) or (b == 0xf4 and p[i + 1] > 0x8f):
                return -1
            i += 4
        else:
            return -1
    return 0


cdef bint span_blank(span text) noexcept nogil:
    # "Blank" for C#: empty or white space only. ASCII white space is what can be meant by an id.
    cdef uint32_t i
    for i in range(text.size):
        if text.ptr[i] > 32 or (text.ptr[i] < 9 or 13 < text.ptr[i] < 32):
            return False
    return True


cdef int subject_check(const uint8_t *p, size_t size) noexcept nogil:
    # SUBJECT_OK for a plain subject, SUBJECT_PATTERN for one with wildcards, else what is wrong with it.
    cdef size_t i, start = 0
    cdef int tokens = 1
    cdef bint wild = False, high = False
    cdef uint8_t b
    if size == 0:
        return SUBJECT_EMPTY
    if size > MAX_SUBJECT:
        return SUBJECT_LONG
    for i in range(size + 1):
        b = p[i] if i < size else 0x2e
        if b == 0x2e:  # "."
            if i == start:
                return SUBJECT_EMPTY_TOKEN
            if p[start] == 0x3e and i - start == 1 and i < size:
                return SUBJECT_WILDCARD  # ">" that is not the last token
            if i < size:
                tokens += 1
                start = i + 1
        elif b < 0x20 or b == 0x7f:
            return SUBJECT_CONTROL
        elif b >= 0x80:
            high = True
        elif b == 0x2a or b == 0x3e:  # "*" or ">": a token of its own, or nothing
            if i != start or (i + 1 < size and p[i + 1] != 0x2e):
                return SUBJECT_WILDCARD
            wild = True
    if tokens > MAX_TOKENS:
        return SUBJECT_TOKENS
    if high and utf8_check(p, size) < 0:
        return SUBJECT_UTF8
    return SUBJECT_PATTERN if wild else SUBJECT_OK


_SUBJECT_FAULTS = {
    SUBJECT_EMPTY: "it is empty",
    SUBJECT_LONG: f"it is longer than {MAX_SUBJECT} bytes of UTF-8",
    SUBJECT_UTF8: "it is not valid UTF-8",
    SUBJECT_CONTROL: "it contains a control character",
    SUBJECT_EMPTY_TOKEN: "it has an empty token (two dots in a row, or a dot at an end)",
    SUBJECT_WILDCARD: "'*' and '>' must be whole tokens, and '>' the last one",
    SUBJECT_TOKENS: f"it has more than {MAX_TOKENS} tokens",
}


def subject_fault(fault: int) -> str:
    """The words for a result of the subject check."""
    return _SUBJECT_FAULTS[fault]


def check_subject(subject, bint pattern=False):
    """Validate a subject; return its UTF-8 bytes.

    Args:
        subject: text, or UTF-8 bytes.
        pattern: whether the wildcards `*` and `>` are allowed (they are in subscriptions only).

    Raises:
        InvalidSubjectError: says which rule it breaks.
        TypeError: neither str nor bytes.
    """
    cdef Py_ssize_t size = 0
    cdef const char *p
    cdef int r
    if isinstance(subject, str):
        try:
            p = PyUnicode_AsUTF8AndSize(subject, &size)
        except UnicodeEncodeError:
            raise InvalidSubjectError(subject, "it contains a lone surrogate") from None
        data = PyBytes_FromStringAndSize(p, size)
    elif isinstance(subject, bytes):
        data = subject
    else:
        raise TypeError(f"a subject is text, not {type(subject).__name__}")
    r = subject_check(<const uint8_t *>PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data))
    if r == SUBJECT_PATTERN and not pattern:
        raise InvalidSubjectError(subject, "wildcards are for subscriptions only")
    if r > SUBJECT_PATTERN:
        raise InvalidSubjectError(subject, _SUBJECT_FAULTS[r])
    return data


def subject_is_valid(bytes subject, bint pattern=False):
    """Whether UTF-8 bytes are a valid subject, or pattern if those are allowed."""
    cdef int r = subject_check(<const uint8_t *>PyBytes_AS_STRING(subject), <size_t>PyBytes_GET_SIZE(subject))
    return r == SUBJECT_OK or (pattern and r == SUBJECT_PATTERN)


def has_wildcard(bytes subject):
    """Whether a valid subject is a pattern."""
    return subject_check(<const uint8_t *>PyBytes_AS_STRING(subject), <size_t>PyBytes_GET_SIZE(subject)) == SUBJECT_PATTERN


cdef class RingPool:
    """Blocks of memory that rings of one thread share.

    Args:
        keep_bytes: how much free memory the pool keeps for reuse; the rest goes back to the system.
    """

    def __cinit__(self, size_t keep_bytes=4 * 1024 * 1024):
        self.pool.keep_limit = keep_bytes

    def __dealloc__(self):
        cdef int k
        cdef void **block
        for k in range(SIZE_CLASSES):
            while self.pool.blocks[k] is not NULL:
                block = <void **>self.pool.blocks[k]
                self.pool.blocks[k] = block[0]
                free(block)

    @property
    def held_bytes(self):
        """Bytes of blocks that rings hold now."""
        return self.pool.held

    @property
    def kept_bytes(self):
        """Bytes of free blocks kept for reuse."""
        return self.pool.kept


@cython.no_gc
cdef class Ring:
    """A byte queue over a pooled block of memory; see the module's docstring for ownership and threads.

    Args:
        pool: where blocks come from; None takes them from the system.
    """

    def __cinit__(self, RingPool pool=None):
        self.pool = pool
        self.ring.pool = &pool.pool if pool is not None else NULL

    def __dealloc__(self):
        # The pool outlives its rings: each holds a reference to it.
        ring_release(&self.ring)

    def __len__(self):
        """Bytes queued, lent ones included."""
        return self.ring.size + self.ring.lent_size

    @property
    def capacity(self):
        """Bytes of the block held now; 0 when none is."""
        return self.ring.cap

    def write(self, data):
        """Append bytes (any contiguous buffer). Raises MemoryError when they find no room; nothing is then written."""
        cdef const uint8_t[::1] view
        if data is None:
            raise TypeError("a ring takes bytes, not None")
        if ring_settle(&self.ring) < 0:
            raise MemoryError
        if type(data) is bytes:
            if ring_put(&self.ring, PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data)) < 0:
                raise MemoryError
            return
        view = data
        if view.shape[0] and ring_put(&self.ring, &view[0], <size_t>view.shape[0]) < 0:
            raise MemoryError

    def peek(self, Py_ssize_t size=-1):
        """A copy of the first `size` bytes queued (all of them by default; fewer if there are fewer)."""
        cdef size_t total = self.ring.size + self.ring.lent_size
        cdef size_t n = total if size < 0 or <size_t>size > total else <size_t>size
        cdef size_t own = self.ring.size if n > self.ring.size else n
        cdef size_t first = self.ring.cap - self.ring.head
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        cdef char *p = PyBytes_AS_STRING(out)
        if own:
            if first >= own:
                memcpy(p, self.ring.buf + self.ring.head, own)
            else:
                memcpy(p, self.ring.buf + self.ring.head, first)
                memcpy(p + first, self.ring.buf, own - first)
        if n > own:
            memcpy(p + own, self.ring.lent, n - own)
        return out

    def take(self, Py_ssize_t size=-1):
        """Remove and return the first `size` bytes queued (all of them by default; fewer if there are fewer)."""
        out = self.peek(size)
        ring_sent(&self.ring, <size_t>PyBytes_GET_SIZE(out))
        return out

    def clear(self):
        """Drop all bytes and give the block back."""
        self.ring.lent_size = 0
        ring_release(&self.ring)

    def fit(self):
        """Give the block back, or trade it for a small one when little is left in it."""
        ring_fit(&self.ring)

    def make_room(self, size_t limit):
        """Prepare for a read, as the transports do; returns the bytes that can be read now."""
        if ring_make_room(&self.ring, limit) < 0:
            raise MemoryError
        return self.ring.cap - self.ring.size


# ---- the control plane's face: whole packets with Python values ----------------------------------------------------


cdef inline const uint8_t *text_of(object value, uint32_t *size) except NULL:
    # UTF-8 of a str (cached by the str itself) or the bytes of a bytes. Borrowed from the object.
    cdef Py_ssize_t n = 0
    cdef const char *p
    if type(value) is bytes:
        p = PyBytes_AS_STRING(value)
        n = PyBytes_GET_SIZE(value)
    else:
        p = PyUnicode_AsUTF8AndSize(value, &n)
    if n > 0x7fffffff:
        raise OverflowError("a field is longer than 2^31 - 1 bytes")
    size[0] = <uint32_t>n
    return <const uint8_t *>p


cdef int check_header(uint32_t header, uint32_t object_id, uint32_t version) except -1:
    cdef uint32_t highest = 255 if header == HEADER_22 else 65535
    if header != HEADER_22 and header != HEADER_23:
        raise ValueError("a header has 22 or 23 bytes")
    if object_id > highest:
        raise ValueError(f"object id {object_id} is above {highest}, the highest that a header of {header} bytes holds")
    if version > 255:
        raise ValueError(f"object version {version} is above 255")
    return 0


cdef bytes pack_packet(uint32_t header, uint32_t object_id, uint32_t version, int64_t system_id, int64_t unix_ms,
                       str layout, tuple values):
    cdef size_t total = header
    cdef uint32_t n = 0
    cdef Py_ssize_t i
    cdef uint8_t *p
    cdef Py_UCS4 kind
    if len(layout) != len(values):
        raise TypeError(f"{len(layout)} fields, {len(values)} values")
    check_header(header, object_id, version)
    for i in range(len(layout)):
        kind = layout[i]
        if kind == "s":
            text_of(values[i], &n)
            total += string_room(n)
        elif kind == "y":
            text_of(values[i], &n)
            total += 4 + <size_t>n
        elif kind == "B":
            total += 1
        elif kind == "i":
            total += 4
        elif kind == "q":
            total += 8
        else:
            raise ValueError(f"no field type {kind!r}")
    if total > 0x7fffffff:
        raise OverflowError("a packet is longer than 2^31 - 1 bytes")
    out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
    p = store_header(<uint8_t *>PyBytes_AS_STRING(out), header, <uint32_t>total, system_id, object_id, version, unix_ms)
    for i in range(len(layout)):
        kind = layout[i]
        if kind == "s":
            p = store_string(p, text_of(values[i], &n), n)
        elif kind == "y":
            p = store_bytes(p, text_of(values[i], &n), n)
        elif kind == "B":
            p[0] = <uint8_t>values[i]
            p += 1
        elif kind == "i":
            p = store_u32(p, <uint32_t><int32_t>values[i])
        else:
            p = store_u64(p, <uint64_t><int64_t>values[i])
    return out


def pack(uint32_t header, uint32_t object_id, uint32_t version, int64_t system_id, int64_t unix_ms, str layout, *values):
    """Encode one packet.

    Args:
        header: 22 or 23, the header layout of the connection.
        object_id, version, system_id, unix_ms: the header's fields.
        layout: one character per field: `s` string, `y` bytes, `B` u8, `i` i32, `q` i64.
        values: the fields in wire order; strings as str or UTF-8 bytes.

    Raises:
        ValueError, TypeError, OverflowError: a value does not fit its field.
    """
    return pack_packet(header, object_id, version, system_id, unix_ms, layout, values)


def pack_raw(uint32_t header, uint32_t object_id, uint32_t version, int64_t system_id, int64_t unix_ms, bytes body):
    """Encode one packet around a body that is already encoded; otherwise as `pack`."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    cdef uint8_t *p
    check_header(header, object_id, version)
    if size > 0x7fffffff - HEADER_23:
        raise OverflowError("a packet is longer than 2^31 - 1 bytes")
    out = PyBytes_FromStringAndSize(NULL, header + size)
    p = store_header(<uint8_t *>PyBytes_AS_STRING(out), header, <uint32_t>(header + size), system_id, object_id, version,
                     unix_ms)
    memcpy(p, PyBytes_AS_STRING(body), <size_t>size)
    return out


def unpack(bytes body, str layout, bint exact=False):
    """Decode the fields of a body; bytes after the last one are ignored unless `exact`.

    Strings are decoded with U+FFFD for broken parts, as the C# readers do; where bytes matter (subjects), use `b`, a string
    left as bytes. Other field types as in `pack`. Returns a tuple, or None if the body is too short or not well formed.
    """
    cdef cursor c
    cdef span text
    cdef uint32_t u = 0
    cdef int32_t i = 0
    cdef int64_t q = 0
    cdef Py_ssize_t k
    cdef Py_UCS4 kind
    c.p = <const uint8_t *>PyBytes_AS_STRING(body)
    c.end = c.p + PyBytes_GET_SIZE(body)
    out = []
    for k in range(len(layout)):
        kind = layout[k]
        if kind == "s" or kind == "b":
            if read_string(&c, &text) < 0:
                return None
            if kind == "s":
                out.append(PyUnicode_DecodeUTF8(<const char *>text.ptr, <Py_ssize_t>text.size, "replace"))
            else:
                out.append(PyBytes_FromStringAndSize(<const char *>text.ptr, <Py_ssize_t>text.size))
        elif kind == "y":
            if read_bytes(&c, &text) < 0:
                return None
            out.append(PyBytes_FromStringAndSize(<const char *>text.ptr, <Py_ssize_t>text.size))
        elif kind == "B":
            if read_u8(&c, &u) < 0:
                return None
            out.append(u)
        elif kind == "i":
            if read_i32(&c, &i) < 0:
                return None
            out.append(i)
        elif kind == "q":
            if read_i64(&c, &q) < 0:
                return None
            out.append(q)
        else:
            raise ValueError(f"no field type {kind!r}")
    if exact and c.p != c.end:
        return None
    return tuple(out)


def unpack_strings(bytes body, int at_most):
    """Up to `at_most` strings of a body, as bytes; what follows them is ignored. None if there is none, or one of them is
    not well formed."""
    cdef cursor c
    cdef span text
    c.p = <const uint8_t *>PyBytes_AS_STRING(body)
    c.end = c.p + PyBytes_GET_SIZE(body)
    out = []
    while c.p != c.end and len(out) < at_most:
        if read_string(&c, &text) < 0:
            return None
        out.append(PyBytes_FromStringAndSize(<const char *>text.ptr, <Py_ssize_t>text.size))
    return out or None


def pack_headers(dict headers):
    """Encode message headers (str to str) for an envelope. Raises ValueError over the limit or for an empty key."""
    cdef uint32_t n = 0
    cdef size_t total = 0
    cdef uint8_t *p
    for key, value in headers.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError("message headers map text to text")
        if not key:
            raise ValueError("a header's name must not be empty")
        text_of(key, &n)
        total += string_room(n)
        text_of(value, &n)
        total += string_room(n)
    if total > MAX_HEADERS:
        raise ValueError(f"headers take {total} bytes, the limit is {MAX_HEADERS}")
    out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
    p = <uint8_t *>PyBytes_AS_STRING(out)
    for key, value in headers.items():
        p = store_string(p, text_of(key, &n), n)
        p = store_string(p, text_of(value, &n), n)
    return out


def unpack_headers(bytes data):
    """Decode message headers; None if they are not well formed."""
    cdef cursor c
    cdef span key, value
    cdef span whole
    whole.ptr = <const uint8_t *>PyBytes_AS_STRING(data)
    whole.size = <uint32_t>PyBytes_GET_SIZE(data)
    if headers_check(whole) < 0:
        return None
    c.p = whole.ptr
    c.end = c.p + whole.size
    out = {}
    while c.p != c.end:
        if read_string(&c, &key) < 0 or read_string(&c, &value) < 0:
            return None
        out[PyUnicode_DecodeUTF8(<const char *>key.ptr, <Py_ssize_t>key.size, NULL)] = PyUnicode_DecodeUTF8(
            <const char *>value.ptr, <Py_ssize_t>value.size, NULL
        )
    return out


def detect_layout(Ring ring, uint32_t limit):
    """Header layout of a fresh stream: 22 or 23, 0 if more bytes are needed, -1 to refuse, -2 if PackSize is over the limit."""
    cdef uint32_t header = 0
    cdef int r
    if ring_linear(&ring.ring) < 0:
        raise MemoryError
    r = layout_detect(ring.ring.buf + ring.ring.head, ring.ring.size, limit, &header)
    if r == SCAN_PACKET:
        return header
    return 0 if r == SCAN_MORE else (-2 if r == SCAN_TOO_LARGE else -1)


def next_packet(Ring ring, uint32_t header, uint32_t limit):
    """Take the next complete packet from a ring. An emptied ring keeps its block until `fit`.

    Returns:
        (object_id, version, system_id, unix_ms, body), or None while the packet is incomplete.

    Raises:
        ProtocolError: PackSize is below the header or above `limit`; the stream cannot be read any further.
    """
    cdef packet_t packet
    cdef int r
    if ring_linear(&ring.ring) < 0:
        raise MemoryError
    r = packet_scan(ring.ring.buf + ring.ring.head, ring.ring.size, header, limit, &packet)
    if r == SCAN_MORE:
        return None
    if r != SCAN_PACKET:
        size = load_u32(ring.ring.buf + ring.ring.head)
        raise ProtocolError(
            f"a packet claims {size} bytes; the header has {header} and the limit is {limit}"
        )
    out = (
        packet.object_id,
        packet.version,
        packet.system_id,
        packet.unix_ms,
        PyBytes_FromStringAndSize(<const char *>packet.body, <Py_ssize_t>packet.body_size),
    )
    ring_skip(&ring.ring, packet.size)
    return out


def constants():
    """The numbers of `_frame.pxd` by their name in `wire`, for the test that holds the two files together."""
    return {
        "HEADER_BYTES_22": HEADER_22, "HEADER_BYTES_23": HEADER_23, "MAX_SUBJECT_BYTES": MAX_SUBJECT,
        "MAX_SUBJECT_TOKENS": MAX_TOKENS, "MAX_TASK_ID_BYTES": MAX_TASK_ID, "MAX_GROUP_BYTES": MAX_GROUP,
        "MAX_HEADERS_BYTES": MAX_HEADERS, "PACKET_OVERHEAD_BYTES": OVERHEAD,
        "ObjectId": {
            "HANDSHAKE": O_HANDSHAKE, "SUBSCRIBE": O_SUBSCRIBE, "UNSUBSCRIBE": O_UNSUBSCRIBE, "PUBLISH": O_PUBLISH,
            "DELIVERY": O_DELIVERY, "QUERY": O_QUERY, "HEARTBEAT": O_HEARTBEAT, "RESPONSE": O_RESPONSE,
            "HEARTBEAT_OLD": O_HEARTBEAT_OLD, "ERROR": O_ERROR, "GO_AWAY": O_GO_AWAY, "GAP": O_GAP,
            "RECEIPT": O_RECEIPT, "CANCEL_QUERY": O_CANCEL_QUERY, "QUERY_END": O_QUERY_END, "CREDIT": O_CREDIT,
        },
        "Dialect": {
            "UNKNOWN": D_UNKNOWN, "H22": D_H22, "H23_255": D_H23_255, "H23_199": D_H23_199, "EVBUS_2": D_EVBUS_2,
        },
        "Flag": {
            "CONFIRM": F_CONFIRM, "NO_ECHO": F_NO_ECHO, "ALL": F_ALL, "QUERY": F_QUERY, "ANSWER": F_ANSWER,
        },
        "ErrorCode": {
            "MALFORMED": E_MALFORMED, "INVALID_SUBJECT": E_INVALID_SUBJECT, "PAYLOAD_TOO_LARGE": E_PAYLOAD_TOO_LARGE,
            "PERMISSION_DENIED": E_PERMISSION_DENIED, "NO_RESPONDERS": E_NO_RESPONDERS,
            "RESPONDER_LOST": E_RESPONDER_LOST, "QUERY_TIMEOUT": E_QUERY_TIMEOUT,
            "TOO_MANY_SUBSCRIPTIONS": E_TOO_MANY_SUBSCRIPTIONS, "TOO_MANY_QUERIES": E_TOO_MANY_QUERIES,
            "DUPLICATE_ID": E_DUPLICATE_ID, "UNKNOWN_SUBSCRIPTION": E_UNKNOWN_SUBSCRIPTION,
            "UNKNOWN_QUERY": E_UNKNOWN_QUERY, "DRAINING": E_DRAINING, "UNSUPPORTED": E_UNSUPPORTED,
        },
    }


assert wire.HEADER_BYTES_23 == HEADER_23
