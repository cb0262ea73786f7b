# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""The messages that wait for one subscription: filled by the I/O thread, emptied by workers.

Threads. The interpreter lock is the only lock: each method that changes more than one field does so without running
Python code in between.
"""

cimport cython
from collections import deque
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint64_t

from evbus._message cimport Message

OVERFLOW_CLOSE = OVER_CLOSE
OVERFLOW_DROP_NEWEST = OVER_DROP_NEWEST
OVERFLOW_DROP_OLDEST = OVER_DROP_OLDEST
OVERFLOW_BLOCK = OVER_BLOCK

# Why messages are missing (wire.GapReason): they found a queue full.
cdef str OVERFLOW = "overflow"

# A worker takes a batch at a time. The bytes that it took count as pending until it comes for more, so batches are
# small against the limits.
cdef size_t BATCH_MSGS = 2048
cdef size_t BATCH_BYTES = 1024 * 1024
# Messages that a server may have on their way for a subscription with overflow="block". More would not make it faster, as
# the server hears of room four times per window.
cdef size_t MAX_WINDOW = 4096


@cython.final
@cython.freelist(64)
cdef class Batch:
    """Messages of one mailbox, in order; iterating over it takes them. `plain` says that there is no query among them, and
    no gap before them.

    When the mailbox is cleared the iteration ends, wherever it stands.
    """

    def __len__(self):
        return <Py_ssize_t>(<size_t>len(self.items) - self.taken) if self.taken < <size_t>len(self.items) else 0

    def __iter__(self):
        return self

    def __next__(self):
        cdef list items = self.items
        if self.taken >= <size_t>len(items):
            raise StopIteration
        self.taken += 1
        return items[self.taken - 1]

    def take_gaps(self):
        """What is missing before the first message: (count, reason) tuples in order. The second call finds none."""
        cdef list gaps = self.gaps
        self.gaps = None
        return gaps if gaps is not None else []


cdef int add_gap(Batch batch, object count, object reason) except -1:
    # Another gap after those before the batch's first message; one of the same reason becomes one with the last.
    cdef object before
    batch.plain = False
    if batch.gaps is None:
        batch.gaps = []
    if batch.gaps and batch.gaps[len(batch.gaps) - 1][1] == reason:
        before = batch.gaps.pop()[0]
        count = None if count is None or before is None else before + count
    batch.gaps.append((count, reason))
    return 0


@cython.final
cdef class Tally:
    """What all mailboxes of a client have counted together, those that are gone included."""


@cython.final
cdef class Mailbox:
    """The messages that wait for one subscription, within its limits.

    Whoever empties it does so through `take`. When messages come and fewer than `concurrency` workers are at it, the
    inbox lists the mailbox as ready and counts one more worker; `take` returning None ends that worker's turn.

    Args:
        owner: the subscription, for whoever gets the mailbox.
        sid: the subscription's id on the wire.
        max_msgs, max_bytes: what may wait; a message that is alone is always taken.
        overflow: one of the OVERFLOW_ constants.
        concurrency: how many workers may take from it at a time. With one, order is kept.
        tally: counts along.
    """

    def __init__(self, owner, int32_t sid, *, Tally tally=None, size_t max_msgs=524288, size_t max_bytes=128 * 1024 * 1024,
                 int overflow=OVER_CLOSE, int concurrency=1):
        self.owner = owner
        self.tally = tally if tally is not None else Tally()
        self.sid = sid
        self.max_msgs = max_msgs
        self.max_bytes = max_bytes
        self.overflow = overflow
        self.concurrency = concurrency
        self.batch_msgs = BATCH_MSGS if concurrency == 1 else 1
        self.batches = deque()
        self.current = []

    @property
    def pending_msgs(self):
        """Messages that wait: that no worker has begun with."""
        return self.msgs - self.begun()

    @property
    def pending_bytes(self):
        """Bytes of payload and headers of the messages that wait, and of the batches that workers are at."""
        return self.size

    cdef size_t begun(self):
        # Messages of the batches at work that workers have begun with. They count in `msgs` until their batch is done.
        cdef size_t count = 0
        cdef Batch batch
        for batch in self.current:
            count += batch.taken
        return count

    @property
    def is_idle(self):
        """Whether nothing waits and nobody is at work."""
        return self.msgs == 0 and self.workers == 0

    @property
    def is_ended(self):
        """Whether no more messages are taken in."""
        return self.ended

    cdef int put(self, Message message) except -1:
        # 0: taken; 1: dropped and counted; 2: the same, and this ended the mailbox.
        cdef size_t cost = <size_t>PyBytes_GET_SIZE(message.data)
        cdef Batch tail = self.tail
        if message.raw_headers is not None:
            cost += <size_t>PyBytes_GET_SIZE(message.raw_headers)
        if self.ended:
            self.drop()
            return 1
        if self.msgs and (
            (self.msgs >= self.max_msgs and self.msgs - self.begun() >= self.max_msgs)
            or self.size + cost > self.max_bytes
        ):
            if self.overflow == OVER_BLOCK and self.msgs < self.max_msgs + MAX_WINDOW and (
                self.size + cost <= 2 * self.max_bytes
            ):
                # Queries do not wait for credit, and what was granted while the connection changed may count twice. Only a
                # server that takes no notice of credit gets further.
                pass
            elif self.overflow == OVER_CLOSE or self.overflow == OVER_BLOCK:
                self.drop()
                self.ended = self.overflowed = True
                return 2
            elif self.overflow == OVER_DROP_NEWEST or cost > self.max_bytes:
                return self.drop_newest()
            while self.overflow == OVER_DROP_OLDEST and self.msgs and (
                self.msgs - self.begun() >= self.max_msgs or self.size + cost > self.max_bytes
            ):
                if not self.drop_oldest():
                    # The rest is in the hands of workers.
                    return self.drop_newest()
            tail = self.tail
        if tail is None or <size_t>len(tail.items) >= self.batch_msgs or tail.size >= BATCH_BYTES:
            tail = self.new_tail()
        tail.items.append(message)
        tail.size += cost
        if message.query_id is not None:
            tail.plain = False
        self.msgs += 1
        self.size += cost
        self.received += 1
        return 0

    cdef Batch new_tail(self):
        cdef Batch tail = Batch.__new__(Batch)
        tail.items = []
        tail.plain = True
        self.batches.append(tail)
        self.tail = tail
        return tail

    cdef void drop(self) noexcept:
        self.dropped += 1
        self.tally.dropped += 1

    cdef int drop_newest(self) except -1:
        # The message at hand is dropped; whoever comes to that place is told.
        self.drop()
        self.put_gap(1, OVERFLOW)
        return 1

    def put_gap(self, count, str reason not None):
        """Messages are missing after those that wait; see the stub. A worker must see to it: `Inbox.put_gap`."""
        cdef Batch tail = self.tail
        if self.ended:
            return
        if tail is None or tail.items:
            tail = self.new_tail()
        add_gap(tail, count, reason)
        if count is not None:
            self.missed += <uint64_t>count
            self.tally.missed += <uint64_t>count

    cdef int drop_oldest(self) except -1:
        # Drops the oldest message that no worker has taken; 0 if there is none.
        cdef Batch batch, following
        cdef Message message
        cdef size_t cost
        if not self.batches:
            return 0
        batch = <Batch>self.batches[0]
        while not batch.items:
            # Gaps only: what is dropped next is missing in the same place.
            if batch is self.tail:
                return 0
            self.batches.popleft()
            following = <Batch>self.batches[0]
            for count, reason in following.take_gaps():
                add_gap(batch, count, reason)
            following.gaps = batch.gaps
            following.plain = False
            batch = following
        message = <Message>batch.items[0]
        del batch.items[0]
        cost = <size_t>PyBytes_GET_SIZE(message.data)
        if message.raw_headers is not None:
            cost += <size_t>PyBytes_GET_SIZE(message.raw_headers)
        batch.size -= cost
        self.size -= cost
        self.msgs -= 1
        self.drop()
        add_gap(batch, 1, OVERFLOW)
        self.missed += 1
        self.tally.missed += 1
        return 1

    def take(self, Batch done=None):
        """The next batch, or None if nothing waits; a worker calls it until it gets None.

        Args:
            done: the batch that this worker got before. Its messages stop counting as pending.
        """
        cdef Batch batch
        if done is not None and done in self.current:
            self.current.remove(done)
            self.msgs -= <size_t>len(done.items)
            self.size -= done.size
            self.handled += done.taken
            self.tally.handled += done.taken
            if self.window:
                self.due += <size_t>len(done.items)
            done.items = []
            if self.due and self.due * 2 >= self.window:
                msgs = self.due
                self.due = 0
                if self.grant is not None and not self.ended:
                    self.grant(msgs)
        if not self.batches:
            self.workers -= 1
            return None
        batch = <Batch>self.batches.popleft()
        if batch is self.tail:
            self.tail = None
        self.current.append(batch)
        return batch

    def open_window(self, size_t bytes_each):
        """A server is to be told how much it may send; see the stub."""
        cdef size_t window = self.max_bytes // bytes_each if bytes_each else self.max_msgs
        cdef size_t one = 1
        window = max(one, min(window, self.max_msgs, MAX_WINDOW))
        self.window = window
        # A quarter at a time, so that the server hears of room while there is still something to do.
        self.batch_msgs = one if self.concurrency > 1 else max(one, window // 4)
        self.due = 0
        return window - self.msgs if window > self.msgs else 0

    def count_error(self):
        """A worker reports that its handler failed."""
        self.errors += 1
        self.tally.errors += 1

    def end(self):
        """Take no more messages in. Those that wait can still be taken."""
        self.ended = True

    def clear(self):
        """End, and discard what waits; a worker's iteration over its batch ends with the message at hand.

        Returns the number of messages discarded.
        """
        cdef Batch batch
        cdef size_t begun = self.begun()
        cdef size_t count = self.msgs - begun
        self.ended = True
        for batch in self.current:
            batch.items = []
            batch.gaps = None
        self.current.clear()
        self.batches.clear()
        self.tail = None
        self.msgs = 0
        self.size = 0
        self.handled += begun
        self.tally.handled += begun
        self.discarded += count
        return count
