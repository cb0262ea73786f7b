# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""One message as a client has received it, and the bookkeeping of who answers it if it is a query."""

cimport cython
from libc.stdint cimport int64_t, uint32_t

from evbus._frame import unpack_headers
from evbus.errors import CodecError, EvbusError
from evbus.payload import decode as decode_payload
from evbus.wire import Codec

cdef enum:
    MSGPACK = 3  # wire.Codec.MSGPACK

_CODECS = {int(codec): codec for codec in Codec}


@cython.final
@cython.freelist(2048)
@cython.no_gc  # a query that waits in a mailbox does reach its client, but closing a client empties its mailboxes
cdef class Message:
    """One message as it arrived: an event, a query, or the answer to a query. Read-only.

    The stub `_inbox.pyi` documents the attributes.
    """

    def __init__(self, str subject not None, bytes data not None=b"", *, int codec=0, headers=None,
                 double timestamp=0.0, int64_t sender=0):
        self.subject = subject
        self.data = data
        self.codec = <uint32_t>codec
        self.header_map = dict(headers) if headers else {}
        self.unix_ms = <int64_t>(timestamp * 1000.0)
        self.sender = sender
        self.fallback = MSGPACK

    @property
    def headers(self):
        """The publisher's headers, text to text; empty if there are none. Decoded when first read."""
        if self.header_map is None:
            self.header_map = (unpack_headers(self.raw_headers) or {}) if self.raw_headers is not None else {}
        return self.header_map

    @property
    def timestamp(self):
        """When it was published: seconds since 1970 by the publisher's clock, as `time.time()` gives them."""
        return self.unix_ms / 1000.0

    @property
    def is_query(self):
        """Whether an answer is expected."""
        return self.query_id is not None

    @property
    def answered(self):
        """Whether this query was answered here, by a reply or a failure."""
        return self.is_answered

    def decode(self, type=None):
        """The payload as a value; see the stub."""
        try:
            return decode_payload(self.codec, self.data, type, _CODECS[self.fallback])
        except CodecError as error:
            error.subject = self.subject
            raise

    def reply(self, value=None, *, headers=None):
        """Answer this query; see the stub."""
        if self.query_id is None or self.answerer is None:
            raise EvbusError(f"the message on {self.subject!r} is an event; only a query can be answered")
        return self.answerer.reply(self, value, headers)

    def fail(self, int code, str text not None=""):
        """Answer this query with a failure; see the stub."""
        if self.query_id is None or self.answerer is None:
            raise EvbusError(f"the message on {self.subject!r} is an event; only a query can be answered")
        return self.answerer.fail(self, code, text)

    def __repr__(self):
        kind = "query" if self.query_id is not None else "message"
        return f"<evbus {kind} on {self.subject!r}, {len(self.data)} bytes>"


def query_id(Message message not None):
    """The id to answer a query with; empty for what is no query."""
    return message.query_id if message.query_id is not None else b""


def claim_answer(Message message not None):
    """Take the right to answer a query, which exists once however many handlers have it. Returns whether it was
    free."""
    if message.query_id is None or message.is_answered:
        return False
    message.is_answered = True
    return True


def release_answer(Message message not None):
    """Give the right back: the answer could not be sent."""
    message.is_answered = False


def handler_done(Message message not None, tuple failure):
    """One of the handlers of a query has ended without an answer.

    Args:
        failure: (code, text) if it failed, None if it had nothing to say.

    Returns:
        the first failure, to be told to the asker, if this was the last handler and none answered; else None.
    """
    message.handlers_left -= 1
    if message.failure is None:
        message.failure = failure
    if message.handlers_left > 0 or message.is_answered:
        return None
    return message.failure
