# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""Queries by the hundred thousand: an id, somebody who waits, and a packet in the buffer, in one step.

The general way, for queries with headers and for a full buffer, is `correlation.Sending`; it costs 2 µs more, most of it
for the objects between.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from evbus._frame cimport O_QUERY
from evbus._inbox cimport Inbox, Waiter
from evbus._outbox cimport P_OK, Outbox


@cython.final
cdef class Asker:
    """Asks plain queries on one connection after the other.

    Args:
        inbox: expects the answers.
        outbox: takes the packets.

    Attributes:
        prefix: eight characters that the ids begin with; another one for each connection.
    """

    cdef Inbox inbox
    cdef Outbox outbox
    cdef bytes prefix_text
    cdef uint64_t count

    def __cinit__(self, Inbox inbox not None, Outbox outbox not None):
        self.inbox = inbox
        self.outbox = outbox
        self.prefix_text = b"00000000"

    @property
    def prefix(self):
        """See the class."""
        return self.prefix_text.decode()

    @prefix.setter
    def prefix(self, str value not None):
        cdef bytes text = value.encode()
        if len(text) != 8:
            raise ValueError("the prefix has eight characters")
        self.prefix_text = text

    def ask(self, str subject not None, uint32_t codec, bytes payload not None, double timeout, int32_t deadline_ms,
            notify):
        """Ask a query without headers.

        Args:
            timeout: seconds, for the words of a timeout.
            deadline_ms: how long the server may wait for the answer.
            notify: called once when the outcome is there.

        Returns:
            the waiter for the answer. None: the buffer is full or there is no connection or the payload is too large,
            and nothing has happened: take the general way, which knows what to do.

        Raises:
            InvalidSubjectError: nothing was asked.
        """
        cdef char text[32]
        cdef int size
        cdef int status
        cdef Outbox outbox = self.outbox
        cdef bytes key = outbox.key_of(subject)
        cdef Waiter waiter
        cdef bytes task_id
        if not outbox.takes(<size_t>len(payload)):
            return None
        self.count += 1
        # Not a hyphen, as `Correlation.new_id` has it: the two count for themselves.
        size = snprintf(text, sizeof(text), "%sq%llx", PyBytes_AS_STRING(self.prefix_text), <unsigned long long>self.count)
        task_id = PyBytes_FromStringAndSize(text, size)
        waiter = Waiter.__new__(Waiter)
        waiter.task_id = task_id
        waiter.subject = subject
        waiter.action = "query"
        waiter.notify = notify
        waiter.asks = True
        waiter.timeout = timeout
        # Before the packet: the answer may be there before we are back.
        self.inbox.waiters[task_id] = waiter
        status = outbox.stage_message(outbox.dialect, O_QUERY, key, payload, 0, codec, deadline_ms, task_id, b"", b"",
                                      False)
        if status != P_OK:
            self.inbox.waiters.pop(task_id, None)
            return None
        outbox.packed_msgs += 1
        outbox.after_stage(True)
        return waiter
