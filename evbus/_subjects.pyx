# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The subject table: who gets a message on a subject, in constant time for every subject in use.

Exact subjects stand in a hash table; patterns (`*`, `>`) in a token trie whose edges share a second hash table, so that a
node costs no table of its own. A lookup ends at an *entry*: the subject's own subscriptions, and its *route*, the merged
result of both. A route stays until one of its subject's own subscriptions changes or any pattern does (`epoch`), so a busy
subject costs one lookup whatever the number of patterns. Entries that only cache a match are bounded (`cache_limit`) and
leave by the clock algorithm (second chance). So do routes, also those of subscribed subjects, when all of them together
take more than `ROUTES_LIMIT`: with thousands of receivers of a pattern, every subject has a route that long.

Hashes are SipHash-1-3 with a random key per table, so that subjects chosen by a peer cannot be made to collide. Matching is
iterative: its stack is bounded by the 32 tokens that a subject may have, and it visits a node at most once.

Threads: one thread, the reactor's.
"""

import secrets

from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy, memset

from evbus._frame cimport MAX_TOKENS, SUBJECT_OK, load_u64, subject_check


# Memory of all routes together, in bytes. Room for 65,536 subjects with a hundred receivers each.
cdef size_t ROUTES_LIMIT = 64 * 1024 * 1024


cdef enum:
    BLOCK = 2  # wire.Overflow


# A node of the pattern trie. `tail` are the subscriptions that end in ">" below it.
ctypedef struct node_t:
    node_t *parent
    node_t *star
    uint64_t hash           # of its edge
    uint64_t id             # differs for each node ever made: part of the edges' hashes below it
    uint32_t children       # edges below it, the star included
    uint32_t size
    bint is_star
    subs_t here
    subs_t tail
    uint8_t token[1]


cdef inline uint64_t rotl(uint64_t x, int b) noexcept nogil:
    return (x << b) | (x >> (64 - b))


cdef uint64_t siphash13(uint64_t k0, uint64_t k1, const uint8_t *p, size_t size) noexcept nogil:
    # SipHash with 1 compression and 3 finalisation rounds (Aumasson and Bernstein 2012), as CPython and Rust use it.
    cdef uint64_t v0 = k0 ^ <uint64_t>0x736f6d6570736575
    cdef uint64_t v1 = k1 ^ <uint64_t>0x646f72616e646f6d
    cdef uint64_t v2 = k0 ^ <uint64_t>0x6c7967656e657261
    cdef uint64_t v3 = k1 ^ <uint64_t>0x7465646279746573
    cdef uint64_t m, last = <uint64_t>(size & 0xff) << 56
    cdef size_t whole = size & ~<size_t>7, i = 0
    cdef int rounds
    while i < whole:
        m = load_u64(p + i)
        v3 ^= m
        v0 += v1; v1 = rotl(v1, 13); v1 ^= v0; v0 = rotl(v0, 32)
        v2 += v3; v3 = rotl(v3, 16); v3 ^= v2
        v0 += v3; v3 = rotl(v3, 21); v3 ^= v0
        v2 += v1; v1 = rotl(v1, 17); v1 ^= v2; v2 = rotl(v2, 32)
        v0 ^= m
        i += 8
    while i < size:
        last |= <uint64_t>p[i] << (8 * (i & 7))
        i += 1
    v3 ^= last
    for rounds in range(4):
        v0 += v1; v1 = rotl(v1, 13); v1 ^= v0; v0 = rotl(v0, 32)
        v2 += v3; v3 = rotl(v3, 16); v3 ^= v2
        v0 += v3; v3 = rotl(v3, 21); v3 ^= v0
        v2 += v1; v1 = rotl(v1, 17); v1 ^= v2; v2 = rotl(v2, 32)
        if rounds == 0:
            v0 ^= last
            v2 ^= 0xff
    return v0 ^ v1 ^ v2 ^ v3


# ---- the hash table under both --------------------------------------------------------------------------------------


cdef int hash_grow(hash_t *table) noexcept nogil:
    cdef size_t size = 16 if table.mask == 0 else (table.mask + 1) * 2, i, k
    cdef slot_t *old = table.slots
    cdef slot_t *slots = <slot_t *>calloc(size, sizeof(slot_t))
    if slots is NULL:
        return -1
    if old is not NULL:
        for i in range(table.mask + 1):
            if old[i].item is not NULL:
                k = old[i].hash & (size - 1)
                while slots[k].item is not NULL:
                    k = (k + 1) & (size - 1)
                slots[k] = old[i]
        free(old)
    table.slots = slots
    table.mask = size - 1
    return 0


cdef int hash_insert(hash_t *table, uint64_t hash, void *item) noexcept nogil:
    # Adds an item that is not in it. Returns -1 when memory is short.
    cdef size_t k
    if table.slots is NULL or table.count * 2 > table.mask:
        if hash_grow(table) < 0:
            return -1
    k = hash & table.mask
    while table.slots[k].item is not NULL:
        k = (k + 1) & table.mask
    table.slots[k].hash = hash
    table.slots[k].item = item
    table.count += 1
    return 0


cdef void hash_remove(hash_t *table, uint64_t hash, void *item) noexcept nogil:
    # Removes an item that is in it, and closes the gap: later items of the run move back to where a probe finds them.
    cdef size_t k = hash & table.mask, gap, home
    while table.slots[k].item != item:
        k = (k + 1) & table.mask
    gap = k
    while True:
        k = (k + 1) & table.mask
        if table.slots[k].item is NULL:
            break
        home = table.slots[k].hash & table.mask
        # May stay if its home lies cyclically in (gap, k].
        if ((k - home) & table.mask) >= ((k - gap) & table.mask):
            table.slots[gap] = table.slots[k]
            gap = k
    table.slots[gap].item = NULL
    table.count -= 1


cdef int subs_append(subs_t *subs, sub_t *sub, uint32_t first_room) noexcept nogil:
    cdef uint32_t room
    cdef sub_t **items
    if subs.count == subs.room:
        room = first_room if subs.room == 0 else subs.room * 2
        items = <sub_t **>realloc(subs.items, room * sizeof(sub_t *))
        if items is NULL:
            return -1
        subs.items = items
        subs.room = room
    subs.items[subs.count] = sub
    subs.count += 1
    return 0


cdef int subs_add(subs_t *subs, sub_t *sub) noexcept nogil:
    # The list is the subscription's home: most have one member only.
    sub.index = subs.count
    return subs_append(subs, sub, 1)


cdef void subs_remove(subs_t *subs, sub_t *sub) noexcept nogil:
    subs.count -= 1
    subs.items[sub.index] = subs.items[subs.count]
    subs.items[sub.index].index = sub.index
    if subs.count == 0:
        free(subs.items)
        subs.items = NULL
        subs.room = 0


cdef int found_all(subs_t *found, subs_t *subs) noexcept nogil:
    # Into the scratch list of resolve; the subscriptions' own places stay.
    cdef uint32_t i
    for i in range(subs.count):
        if subs_append(found, subs.items[i], 64) < 0:
            return -1
    return 0


cdef class SubjectTable:
    """Subjects, patterns and the cache of matches.

    Args:
        cache_limit: how many subjects without a subscription of their own may be remembered.
        key: 16 bytes for the hash; random by default.
    """

    def __cinit__(self, size_t cache_limit=65536, bytes key=None):
        if key is None:
            key = secrets.token_bytes(16)
        self.key0 = load_u64(<const uint8_t *>key)
        self.key1 = load_u64(<const uint8_t *>key + 8)
        self.cache_limit = cache_limit if cache_limit else 1
        self.epoch = 1
        self.root = calloc(1, sizeof(node_t))
        if self.root is NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        cdef node_t *node
        cdef entry_t *entry
        if self.entries.slots is not NULL:
            for i in range(self.entries.mask + 1):
                entry = <entry_t *>self.entries.slots[i].item
                if entry is not NULL:
                    free(entry.route)
                    free(entry.subs.items)
                    free(entry)
        if self.edges.slots is not NULL:
            for i in range(self.edges.mask + 1):
                node = <node_t *>self.edges.slots[i].item
                if node is not NULL:
                    free(node.here.items)
                    free(node.tail.items)
                    free(node)
        if self.root is not NULL:
            node = <node_t *>self.root
            free(node.tail.items)
            free(node.here.items)
            free(node)
        free(self.entries.slots)
        free(self.edges.slots)
        free(self.found.items)
        free(self.conns)

    @property
    def subjects(self):
        """Exact subjects known, those that are only cached included."""
        return self.entries.count

    @property
    def nodes(self):
        """Nodes of the pattern trie."""
        return self.edges.count

    cdef uint64_t hash(self, const uint8_t *p, size_t size) noexcept nogil:
        return siphash13(self.key0, self.key1, p, size)

    cdef entry_t *peek(self, const uint8_t *p, uint32_t size) noexcept nogil:
        # The hot lookup: the entry of a subject whose route is up to date, else NULL (then use find). Changes nothing.
        cdef entry_t *entry = self.probe(p, size, siphash13(self.key0, self.key1, p, size))
        if entry is NULL or entry.epoch != self.epoch:
            return NULL
        entry.used = True
        return entry

    cdef entry_t *probe(self, const uint8_t *p, uint32_t size, uint64_t hash) noexcept nogil:
        # The entry of a subject with that hash, or NULL.
        cdef size_t k
        cdef slot_t *slot
        cdef entry_t *entry
        if self.entries.slots is NULL:
            return NULL
        k = hash & self.entries.mask
        while True:
            slot = &self.entries.slots[k]
            if slot.item is NULL:
                return NULL
            if slot.hash == hash:
                entry = <entry_t *>slot.item
                if entry.size == size and memcmp(entry.key, p, size) == 0:
                    return entry
            k = (k + 1) & self.entries.mask

    cdef entry_t *find(self, const uint8_t *p, uint32_t size) noexcept nogil:
        # The entry of a subject, made and resolved if need be. NULL: the subject is not valid, or memory is short.
        # May evict other entries that are only cached.
        cdef uint64_t h = siphash13(self.key0, self.key1, p, size)
        cdef entry_t *entry = self.probe(p, size, h)
        if entry is NULL:
            if subject_check(p, size) != SUBJECT_OK:
                return NULL
            if self.cached >= self.cache_limit:
                self.evict(NULL)
            entry = self.insert(p, size, h)
            if entry is NULL:
                return NULL
            self.cached += 1
        entry.used = True
        if entry.epoch != self.epoch:
            if self.resolve(entry) < 0:
                return NULL
            while self.route_bytes > ROUTES_LIMIT:
                if not self.evict(entry):
                    break
        return entry

    cdef entry_t *insert(self, const uint8_t *p, uint32_t size, uint64_t hash) noexcept nogil:
        cdef entry_t *entry = <entry_t *>calloc(1, sizeof(entry_t) + size)
        if entry is NULL:
            return NULL
        entry.hash = hash
        entry.size = size
        # Subjects that are used once each are shared out in turn as well.
        self.turn += 1
        entry.turn = entry.query_turn = self.turn
        memcpy(entry.key, p, size)
        if hash_insert(&self.entries, hash, entry) < 0:
            free(entry)
            return NULL
        return entry

    cdef void drop_entry(self, entry_t *entry) noexcept nogil:
        hash_remove(&self.entries, entry.hash, entry)
        self.drop_route(entry)
        free(entry)

    cdef void drop_route(self, entry_t *entry) noexcept nogil:
        if entry.route is not NULL:
            self.route_bytes -= entry.route.size
            free(entry.route)
            entry.route = NULL
            entry.epoch = 0

    cdef bint evict(self, entry_t *keep) noexcept nogil:
        # Second chance: the hand goes round and takes the first entry that was not used since it last came by. One that is
        # only cached goes; a subscribed one loses its route, if it is for their memory (`keep` is then the one in use).
        # Returns False if there is nothing to take.
        cdef entry_t *entry
        cdef size_t steps
        for steps in range(2 * (self.entries.mask + 1)):
            self.hand = (self.hand + 1) & self.entries.mask
            entry = <entry_t *>self.entries.slots[self.hand].item
            if entry is NULL or entry == keep:
                continue
            if entry.subs.count and (keep is NULL or entry.route is NULL):
                continue
            if entry.used:
                entry.used = False
                continue
            self.evicted += 1
            if entry.subs.count:
                self.drop_route(entry)
            else:
                self.drop_entry(entry)
                self.cached -= 1
            return True
        return False

    cdef void invalidate(self) noexcept nogil:
        # Every route is made again when it is next used.
        self.epoch += 1

    cdef int add(self, sub_t *sub, const uint8_t *p, uint32_t size) noexcept nogil:
        # Adds a subscription to a subject or pattern that subject_check found valid. Returns -1 when memory is short.
        cdef uint64_t h
        cdef entry_t *entry = NULL
        cdef node_t *node
        cdef node_t *child
        cdef size_t start, end
        cdef subs_t *home
        if subject_check(p, size) == SUBJECT_OK:
            h = siphash13(self.key0, self.key1, p, size)
            entry = self.probe(p, size, h)
            if entry is NULL:
                entry = self.insert(p, size, h)
                if entry is NULL:
                    return -1
                self.cached += 1
            if subs_add(&entry.subs, sub) < 0:
                return -1
            if entry.subs.count == 1:
                self.cached -= 1
            sub.is_pattern = False
            sub.home = &entry.subs
            sub.place = entry
            entry.epoch = 0
            self.subscriptions += 1
            return 0
        node = <node_t *>self.root
        start = 0
        while True:
            end = start
            while end < size and p[end] != 0x2e:
                end += 1
            if end - start == 1 and p[start] == 0x3e:
                home = &node.tail
                break
            child = node_step(self, node, p + start, <uint32_t>(end - start))
            if child is NULL:
                prune(self, node)
                return -1
            node = child
            if end == size:
                home = &node.here
                break
            start = end + 1
        if subs_add(home, sub) < 0:
            prune(self, node)
            return -1
        sub.is_pattern = True
        sub.home = home
        sub.place = node
        self.epoch += 1
        self.subscriptions += 1
        self.patterns += 1
        return 0

    cdef void remove(self, sub_t *sub) noexcept nogil:
        cdef entry_t *entry
        subs_remove(<subs_t *>sub.home, sub)
        self.subscriptions -= 1
        if sub.is_pattern:
            self.patterns -= 1
            self.epoch += 1
            prune(self, <node_t *>sub.place)
            return
        entry = <entry_t *>sub.place
        entry.epoch = 0
        if entry.subs.count == 0:
            self.drop_entry(entry)

    cdef int match(self, entry_t *entry) noexcept nogil:
        # Appends the subscriptions of all matching patterns to self.found.
        cdef node_t *nodes[MAX_TOKENS + 2]
        cdef uint32_t depths[MAX_TOKENS + 2]
        cdef uint32_t starts[MAX_TOKENS + 1]
        cdef uint32_t tokens = 0, i, depth, size
        cdef int top = 0
        cdef node_t *node
        cdef node_t *child
        starts[0] = 0
        for i in range(entry.size):
            if entry.key[i] == 0x2e:
                tokens += 1
                starts[tokens] = i + 1
        tokens += 1
        nodes[0] = <node_t *>self.root
        depths[0] = 0
        top = 1
        while top:
            top -= 1
            self.visited += 1
            node = nodes[top]
            depth = depths[top]
            if depth == tokens:
                if found_all(&self.found, &node.here) < 0:
                    return -1
                continue
            if node.tail.count and found_all(&self.found, &node.tail) < 0:
                return -1
            # At most two nodes per level wait on the stack, and one of them is taken at once: it never grows beyond tokens + 1.
            if node.star is not NULL:
                nodes[top] = node.star
                depths[top] = depth + 1
                top += 1
            if node.children > (1 if node.star is not NULL else 0):
                size = (starts[depth + 1] - 1 if depth + 1 < tokens else entry.size) - starts[depth]
                child = node_child(self, node, entry.key + starts[depth], size)
                if child is not NULL:
                    nodes[top] = child
                    depths[top] = depth + 1
                    top += 1
        return 0

    cdef int resolve(self, entry_t *entry) noexcept nogil:
        # Makes the route of an entry: matches, one copy per connection, groups by name, connections sorted by dialect.
        cdef subs_t *found = &self.found
        cdef uint32_t i, k, plain = 0, members = 0, responders = 0, groups = 0, extras = 0
        cdef uint64_t apart = 0
        cdef uint32_t counts[DIALECTS + 1]
        cdef sub_t *sub
        cdef conn_t *conn
        cdef conn_t **conns
        cdef route_t *route
        cdef size_t size
        cdef uint8_t *p
        cdef sub_t **named
        found.count = 0
        self.resolved += 1
        if found_all(found, &entry.subs) < 0:
            return -1
        if self.patterns and self.match(entry) < 0:
            return -1
        if self.conns_room < found.count:
            conns = <conn_t **>realloc(self.conns, found.count * sizeof(conn_t *))
            if conns is NULL:
                return -1
            self.conns = conns
            self.conns_room = found.count
        memset(counts, 0, sizeof(counts))
        self.stamp += 1
        self.visited += found.count
        for i in range(found.count):
            sub = found.items[i]
            if sub.flow is not NULL and sub.role != 1 and sub.group_size == 0:
                # All plain subscriptions of this connection are extras.
                sub.conn.mark = apart = self.stamp
        if apart:
            self.stamp += 1
        for i in range(found.count):
            sub = found.items[i]
            if sub.role == 1:
                responders += 1
            elif sub.group_size:
                members += 1
            elif apart and sub.conn.mark == apart:
                extras += 1
            elif sub.conn.mark != self.stamp:
                sub.conn.mark = self.stamp
                self.conns[plain] = sub.conn
                counts[sub.conn.dialect + 1] += 1
                plain += 1
        size = sizeof(route_t) + (plain + members + responders + extras) * sizeof(void *) + members * sizeof(group_t)
        p = <uint8_t *>malloc(size)
        if p is NULL:
            return -1
        route = <route_t *>p
        memset(route, 0, sizeof(route_t))
        route.size = size
        p += sizeof(route_t)
        route.plain = <conn_t **>p
        p += plain * sizeof(void *)
        route.member = <sub_t **>p
        p += members * sizeof(void *)
        route.responder = <sub_t **>p
        p += responders * sizeof(void *)
        route.extra = <sub_t **>p
        p += extras * sizeof(void *)
        route.group = <group_t *>p
        for i in range(<uint32_t>DIALECTS):
            counts[i + 1] += counts[i]
            route.first[i + 1] = counts[i + 1]
        for i in range(plain):
            conn = self.conns[i]
            route.plain[counts[conn.dialect]] = conn
            counts[conn.dialect] += 1
        named = route.member
        k = 0
        for i in range(found.count):
            sub = found.items[i]
            if sub.role == 1:
                route.responder[route.responders] = sub
                route.responders += 1
            elif sub.group_size:
                named[k] = sub
                k += 1
            elif apart and sub.conn.mark == apart:
                route.extra[route.extras] = sub
                route.extras += 1
        if extras > 1:
            qsort(route.extra, extras, sizeof(sub_t *), by_connection)
        # A peer chooses how many groups there are, so the work must not grow with their square.
        if members > 1:
            qsort(named, members, sizeof(sub_t *), by_group)
        for i in range(members):
            if i == 0 or by_name(named[i - 1], named[i]) != 0:
                route.group[groups].first = i
                route.group[groups].count = 0
                groups += 1
            route.group[groups - 1].count += 1
        route.groups = groups
        route.receivers = plain + groups + extras
        self.drop_route(entry)
        self.route_bytes += size
        entry.route = route
        entry.epoch = self.epoch
        return 0

    # ---- for tests ----

    def lookup(self, bytes subject):
        """(plain connection ids, {group: [(connection id, sid)]}, [(connection id, sid)] of responders), or None if the
        subject is not valid."""
        cdef entry_t *entry = self.find(<const uint8_t *>subject, <uint32_t>len(subject))
        cdef uint32_t i, j
        cdef group_t group
        if entry is NULL:
            return None
        route = entry.route
        groups = {}
        for i in range(route.groups):
            group = route.group[i]
            groups[route.member[group.first].group[: route.member[group.first].group_size]] = [
                (route.member[j].conn.id, route.member[j].sid) for j in range(group.first, group.first + group.count)
            ]
        return (
            [route.plain[i].id for i in range(route.first[DIALECTS])],
            groups,
            [(route.responder[i].conn.id, route.responder[i].sid) for i in range(route.responders)],
        )


cdef int by_connection(const void *a, const void *b) noexcept nogil:
    cdef const sub_t *x = (<const sub_t **>a)[0]
    cdef const sub_t *y = (<const sub_t **>b)[0]
    cdef bint x_blocks, y_blocks
    if x.conn.id != y.conn.id:
        return -1 if x.conn.id < y.conn.id else 1
    x_blocks = x.flow is not NULL and x.flow.policy == BLOCK
    y_blocks = y.flow is not NULL and y.flow.policy == BLOCK
    if x_blocks != y_blocks:
        return -1 if y_blocks else 1
    return (x.sid > y.sid) - (x.sid < y.sid)


cdef int by_name(const sub_t *a, const sub_t *b) noexcept nogil:
    if a.group_size != b.group_size:
        return -1 if a.group_size < b.group_size else 1
    return memcmp(a.group, b.group, a.group_size)


cdef int by_group(const void *a, const void *b) noexcept nogil:
    # Members of a group stand together, in an order that a change elsewhere does not disturb.
    cdef const sub_t *x = (<const sub_t **>a)[0]
    cdef const sub_t *y = (<const sub_t **>b)[0]
    cdef int r = by_name(x, y)
    if r != 0:
        return r
    if x.conn.id != y.conn.id:
        return -1 if x.conn.id < y.conn.id else 1
    return (x.sid > y.sid) - (x.sid < y.sid)


cdef inline uint64_t edge_hash(SubjectTable table, node_t *node, const uint8_t *token, uint32_t size) noexcept nogil:
    # The node's id as part of the key: equal tokens below different nodes do not collide.
    return siphash13(table.key0 ^ (node.id * <uint64_t>0x9e3779b97f4a7c15), table.key1, token, size)


cdef node_t *node_child(SubjectTable table, node_t *node, const uint8_t *token, uint32_t size) noexcept nogil:
    cdef uint64_t h
    cdef size_t k
    cdef node_t *child
    if table.edges.slots is NULL:
        return NULL
    h = edge_hash(table, node, token, size)
    k = h & table.edges.mask
    while table.edges.slots[k].item is not NULL:
        if table.edges.slots[k].hash == h:
            child = <node_t *>table.edges.slots[k].item
            if child.parent == node and not child.is_star and child.size == size and memcmp(child.token, token, size) == 0:
                return child
        k = (k + 1) & table.edges.mask
    return NULL


cdef node_t *node_step(SubjectTable table, node_t *node, const uint8_t *token, uint32_t size) noexcept nogil:
    # The child for a token of a pattern, made if it is not there. NULL when memory is short.
    cdef bint star = size == 1 and token[0] == 0x2a
    cdef node_t *child = node.star if star else node_child(table, node, token, size)
    if child is not NULL:
        return child
    child = <node_t *>calloc(1, sizeof(node_t) + size)
    if child is NULL:
        return NULL
    child.parent = node
    child.is_star = star
    child.size = size
    memcpy(child.token, token, size)
    child.hash = edge_hash(table, node, token, size)
    table.stamp += 1
    child.id = table.stamp
    if hash_insert(&table.edges, child.hash, child) < 0:
        free(child)
        return NULL
    if star:
        node.star = child
    node.children += 1
    return child


cdef void prune(SubjectTable table, node_t *node) noexcept nogil:
    # Frees nodes that lead nowhere, from a leaf upwards.
    cdef node_t *parent
    while node.parent is not NULL and node.children == 0 and node.here.count == 0 and node.tail.count == 0:
        parent = node.parent
        hash_remove(&table.edges, node.hash, node)
        if parent.star == node:
            parent.star = NULL
        parent.children -= 1
        free(node)
        node = parent
