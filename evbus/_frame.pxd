# The shared codec, seen from C: rings, packet scan, body fields, subject rules. Bodies are in _frame.pyx.
#
# Ownership. A ring_t owns its block, and gives it back to its pool as soon as it holds no bytes. A `span` or a packet_t
# borrows from a ring: it is valid until that ring is next written to, skipped, compacted or released. A lent segment (see
# ring_lend) borrows from somebody else's ring and must be settled before that ring moves.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    HEADER_22 = 22
    HEADER_23 = 23
    MAX_SUBJECT = 256
    MAX_TOKENS = 32
    MAX_TASK_ID = 128
    MAX_GROUP = 128
    MAX_HEADERS = 16384
    OVERHEAD = 65536
    MAX_PACKET = 67108864

    O_HANDSHAKE = 1
    O_SUBSCRIBE = 2
    O_UNSUBSCRIBE = 3
    O_PUBLISH = 4
    O_DELIVERY = 5
    O_QUERY = 6
    O_HEARTBEAT = 199
    O_RESPONSE = 254
    O_HEARTBEAT_OLD = 255
    O_ERROR = 1000
    O_GO_AWAY = 1001
    O_GAP = 1002
    O_RECEIPT = 1003
    O_CANCEL_QUERY = 1004
    O_QUERY_END = 1005
    O_CREDIT = 1006

    D_UNKNOWN = 0
    D_H22 = 1
    D_H23_255 = 2
    D_H23_199 = 3
    D_EVBUS_2 = 4
    DIALECTS = 5

    F_CONFIRM = 1
    F_NO_ECHO = 2
    F_ALL = 4
    F_QUERY = 8
    F_ANSWER = 16

    E_MALFORMED = 1
    E_INVALID_SUBJECT = 2
    E_PAYLOAD_TOO_LARGE = 3
    E_PERMISSION_DENIED = 4
    E_NO_RESPONDERS = 5
    E_RESPONDER_LOST = 6
    E_QUERY_TIMEOUT = 7
    E_TOO_MANY_SUBSCRIPTIONS = 8
    E_TOO_MANY_QUERIES = 9
    E_DUPLICATE_ID = 10
    E_UNKNOWN_SUBSCRIPTION = 11
    E_UNKNOWN_QUERY = 12
    E_DRAINING = 13
    E_UNSUPPORTED = 14
    ERROR_CODES = 15

    # Results of packet_scan.
    SCAN_MORE = 0
    SCAN_PACKET = 1
    SCAN_BAD_SIZE = 2
    SCAN_TOO_LARGE = 3
    SCAN_REFUSED = 4

    # Results of subject_check; SUBJECT_OK and SUBJECT_PATTERN are the good ones.
    SUBJECT_OK = 0
    SUBJECT_PATTERN = 1
    SUBJECT_EMPTY = 2
    SUBJECT_LONG = 3
    SUBJECT_UTF8 = 4
    SUBJECT_CONTROL = 5
    SUBJECT_EMPTY_TOKEN = 6
    SUBJECT_WILDCARD = 7
    SUBJECT_TOKENS = 8

    SIZE_CLASSES = 10  # blocks of 512 bytes << class: 512 B to 256 KiB


ctypedef struct pool_t:
    void *blocks[SIZE_CLASSES]  # free lists, last in first out, so that the warmest block is used next
    size_t kept                 # bytes in the free lists
    size_t keep_limit
    size_t held                 # bytes handed out


ctypedef struct ring_t:
    uint8_t *buf
    size_t cap           # power of two, or 0: no memory held
    size_t head
    size_t size
    const uint8_t *lent  # a borrowed segment that follows the ring's own bytes
    size_t lent_size
    pool_t *pool


ctypedef struct span:
    const uint8_t *ptr
    uint32_t size


ctypedef struct cursor:
    const uint8_t *p
    const uint8_t *end


ctypedef struct packet_t:
    uint8_t *start       # the whole packet
    uint32_t size
    uint32_t object_id
    uint32_t version
    int64_t system_id
    int64_t unix_ms
    const uint8_t *body
    uint32_t body_size


# Fields of a version-2 envelope, borrowed from the packet.
ctypedef struct envelope_t:
    uint32_t flags
    uint32_t codec
    int32_t subscription_id
    int32_t deadline_ms
    span task_id
    span subject
    span query_task_id
    span headers
    span payload


cdef int ring_reserve(ring_t *ring, size_t room) noexcept nogil
cdef int ring_put(ring_t *ring, const void *data, size_t size) noexcept nogil
cdef void ring_skip(ring_t *ring, size_t size) noexcept nogil
cdef int ring_linear(ring_t *ring) noexcept nogil
cdef void ring_release(ring_t *ring) noexcept nogil
cdef void ring_fit(ring_t *ring) noexcept nogil
cdef int ring_make_room(ring_t *ring, size_t limit) noexcept nogil
cdef int ring_lend(ring_t *ring, const uint8_t *data, size_t size) noexcept nogil
cdef int ring_settle(ring_t *ring) noexcept nogil
cdef void ring_sent(ring_t *ring, size_t size) noexcept nogil

cdef int packet_scan(const uint8_t *p, size_t size, uint32_t header, uint32_t limit, packet_t *out) noexcept nogil
cdef int layout_detect(const uint8_t *p, size_t size, uint32_t limit, uint32_t *header) noexcept nogil
cdef int envelope_read(const uint8_t *body, uint32_t size, envelope_t *out) noexcept nogil
cdef int headers_check(span headers) noexcept nogil
cdef int subject_check(const uint8_t *p, size_t size) noexcept nogil
cdef int utf8_check(const uint8_t *p, size_t size) noexcept nogil
cdef bint span_blank(span text) noexcept nogil


cdef inline uint32_t load_u32(const uint8_t *p) noexcept nogil:
    # Byte by byte, so that the order does not depend on the machine; compilers make one load of it.
    return <uint32_t>p[0] | (<uint32_t>p[1] << 8) | (<uint32_t>p[2] << 16) | (<uint32_t>p[3] << 24)


cdef inline uint64_t load_u64(const uint8_t *p) noexcept nogil:
    return <uint64_t>load_u32(p) | (<uint64_t>load_u32(p + 4) << 32)


cdef inline uint8_t *store_u16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v & 0xff)
    p[1] = <uint8_t>((v >> 8) & 0xff)
    return p + 2


cdef inline uint8_t *store_u32(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v & 0xff)
    p[1] = <uint8_t>((v >> 8) & 0xff)
    p[2] = <uint8_t>((v >> 16) & 0xff)
    p[3] = <uint8_t>((v >> 24) & 0xff)
    return p + 4


cdef inline uint8_t *store_u64(uint8_t *p, uint64_t v) noexcept nogil:
    store_u32(p, <uint32_t>(v & 0xffffffffu))
    store_u32(p + 4, <uint32_t>(v >> 32))
    return p + 8


cdef inline uint8_t *store_header(uint8_t *p, uint32_t header, uint32_t size, int64_t system_id, uint32_t object_id,
                                  uint32_t version, int64_t unix_ms) noexcept nogil:
    p = store_u32(p, size)
    p = store_u64(p, <uint64_t>system_id)
    if header == HEADER_23:
        p = store_u16(p, object_id)
    else:
        p[0] = <uint8_t>(object_id & 0xff)
        p += 1
    p[0] = <uint8_t>(version & 0xff)
    return store_u64(p + 1, <uint64_t>unix_ms)


cdef inline uint32_t string_room(uint32_t size) noexcept nogil:
    # Bytes that a string of that many bytes of UTF-8 takes on the wire.
    cdef uint32_t n = size + 1
    while size >= 128:
        size >>= 7
        n += 1
    return n


cdef inline uint8_t *store_string(uint8_t *p, const uint8_t *text, uint32_t size) noexcept nogil:
    cdef uint32_t n = size
    while n >= 128:
        p[0] = <uint8_t>((n & 127) | 128)
        p += 1
        n >>= 7
    p[0] = <uint8_t>n
    p += 1
    if size:
        memcpy(p, text, size)
    return p + size


cdef inline uint8_t *store_bytes(uint8_t *p, const uint8_t *data, uint32_t size) noexcept nogil:
    p = store_u32(p, size)
    if size:
        memcpy(p, data, size)
    return p + size


# Readers take a cursor with its end and return 0, or -1 if the field runs past the end or is not well formed.

cdef inline int read_u8(cursor *c, uint32_t *out) noexcept nogil:
    if c.p == c.end:
        return -1
    out[0] = c.p[0]
    c.p += 1
    return 0


cdef inline int read_i32(cursor *c, int32_t *out) noexcept nogil:
    if c.end - c.p < 4:
        return -1
    out[0] = <int32_t>load_u32(c.p)
    c.p += 4
    return 0


cdef inline int read_i64(cursor *c, int64_t *out) noexcept nogil:
    if c.end - c.p < 8:
        return -1
    out[0] = <int64_t>load_u64(c.p)
    c.p += 8
    return 0


cdef inline int read_string(cursor *c, span *out) noexcept nogil:
    # LEB128 of at most 5 bytes and at most 2^31 - 1; padding with zero bits is accepted, as the C# readers do.
    cdef uint32_t size = 0, shift = 0, byte
    while True:
        if c.p == c.end:
            return -1
        byte = c.p[0]
        c.p += 1
        if shift == 28 and byte > 7:
            return -1
        size |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    if size > <size_t>(c.end - c.p):
        return -1
    out.ptr = c.p
    out.size = size
    c.p += size
    return 0


cdef inline int read_bytes(cursor *c, span *out) noexcept nogil:
    cdef uint32_t size
    if c.end - c.p < 4:
        return -1
    size = load_u32(c.p)
    c.p += 4
    # Unsigned: a negative count is larger than any body.
    if size > <size_t>(c.end - c.p):
        return -1
    out.ptr = c.p
    out.size = size
    c.p += size
    return 0


cdef bytes pack_packet(uint32_t header, uint32_t object_id, uint32_t version, int64_t system_id, int64_t unix_ms,
                       str layout, tuple values)


cdef class RingPool:
    cdef pool_t pool


cdef class Ring:
    cdef ring_t ring
    cdef RingPool pool
