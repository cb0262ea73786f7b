"""The server's data plane: packets in one ring become packets in others. See `_router.pyx` for the theory of operation."""

from collections.abc import Callable, Sequence
from typing import Any, final

from evbus._frame import Ring, RingPool
from evbus._queries import QueryTable
from evbus._subjects import SubjectTable

FEED_DONE: int
FEED_CONTROL: int
FEED_YIELD: int
LINK_NEW: int
LINK_READY: int
LINK_CLOSING: int

@final
class Link:
    """One connection, as the data plane knows it: its rings, dialect and state.

    Args:
        router: the data plane it belongs to.
        connection_id: unique for the life of the server; never 0.
        flush: the transport's `flush(ring) -> bytes left`.
        owner: the control plane's object for the connection.
    """

    owner: Any
    def __new__(
        cls, router: Router, connection_id: int, flush: Callable[[Ring], int], owner: object = None
    ) -> Link: ...
    @property
    def inp(self) -> Ring: ...
    @property
    def out(self) -> Ring: ...
    @property
    def router(self) -> Router: ...
    @property
    def id(self) -> int:
        """The connection id."""

    @property
    def header_bytes(self) -> int:
        """22 or 23; 0 until the first packet has shown it."""

    @property
    def dialect(self) -> int:
        """A `wire.Dialect` as int."""

    @dialect.setter
    def dialect(self, value: int) -> None: ...
    @property
    def state(self) -> int:
        """`LINK_NEW`, `LINK_READY` or `LINK_CLOSING`."""

    @state.setter
    def state(self, value: int) -> None: ...
    @property
    def packet_limit(self) -> int:
        """Largest PackSize accepted, in bytes."""

    @packet_limit.setter
    def packet_limit(self, value: int) -> None: ...
    @property
    def pending_bytes(self) -> int:
        """Bytes queued for the peer and not yet taken by the kernel."""

    @property
    def held_bytes(self) -> int:
        """Bytes of messages that wait for the credit of its subscriptions."""

    @property
    def is_blocked(self) -> bool:
        """Whether the kernel took no more at the last flush."""

    @property
    def subscriptions(self) -> int:
        """Subscriptions held now."""

    @property
    def pending_queries(self) -> int:
        """Queries it asked that have not ended."""

    @property
    def has_pending(self) -> bool:
        """Whether anything is queued or waits for it, or a query of its own or put to it is pending."""

    def counters(self) -> dict[str, int]:
        """packets_in, bytes_in, msgs_out, dropped since it connected; held_msgs and held_bytes wait for credit now."""

@final
class Interest:
    """One subscription. Made by `Router.subscribe`; ends with `Router.unsubscribe` or its link's `detach`."""

    @property
    def link(self) -> Link: ...
    @property
    def subject(self) -> bytes:
        """The subject or pattern, UTF-8."""

    @property
    def sid(self) -> int:
        """The client's id of it; 0 for version 1."""

    @property
    def role(self) -> int:
        """A `wire.Role` as int."""

    @property
    def group(self) -> bytes:
        """Name of its group, UTF-8; empty for none."""

    @property
    def overflow(self) -> int:
        """A `wire.Overflow` as int."""

    @property
    def dropped(self) -> int:
        """Messages that its policy has dropped."""

    @property
    def credit(self) -> int:
        """Messages that it may be sent until the client grants more."""

    @property
    def held_msgs(self) -> int:
        """Messages that wait for its credit."""

@final
class Router:
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

    def __new__(
        cls,
        pool: RingPool,
        *,
        payload_bytes: int,
        pending_bytes: int,
        queries: int,
        query_max_s: float,
        query_default_s: float,
        cache_subjects: int,
        ticks: int,
        soft_bytes: int = 8388608,
    ) -> Router: ...
    @property
    def table(self) -> SubjectTable: ...
    @property
    def queries(self) -> QueryTable: ...
    @property
    def packets_in(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def published(self) -> int: ...
    @property
    def delivered(self) -> int: ...
    @property
    def unrouted(self) -> int: ...
    @property
    def dropped_slow(self) -> int: ...
    @property
    def dropped_newest(self) -> int:
        """Messages dropped by the policy DROP_NEWEST."""

    @property
    def dropped_held(self) -> int:
        """Messages that waited for the credit of a subscription that then ended."""

    @property
    def gaps(self) -> int:
        """Gap packets queued."""

    @property
    def gaps_untold(self) -> int:
        """Messages of gaps whose subscription ended, with its connection, before it could be told."""

    @property
    def held(self) -> int:
        """Messages that had to wait for credit."""

    @property
    def held_msgs(self) -> int:
        """Messages that wait for credit now."""

    @property
    def queries_asked(self) -> int: ...
    @property
    def queries_answered(self) -> int: ...
    @property
    def unknown_packets(self) -> int: ...
    @property
    def early_packets(self) -> int: ...
    def set_time(self, now: float, unix_ms: int) -> None:
        """The time of this turn: the reactor's clock in seconds, and the wall clock in Unix milliseconds."""

    def feed(self, link: Link) -> int:
        """Handle what stands in a link's input ring.

        Returns:
            `FEED_DONE`: all complete packets are handled. `FEED_CONTROL`: `take_packet()` has one for the control plane;
            call feed again after it. `FEED_YIELD`: enough for one turn; call again in the next. A negative value: close
            the connection for the `wire.CloseReason` of that number.
        """

    def take_packet(self) -> tuple[int, int, int, int, bytes]:
        """The packet that `feed` stopped at: (object_id, version, system_id, unix_ms, body)."""

    def flush_dirty(self) -> None:
        """Flush every connection that got bytes since the last call. For the end of a turn."""

    @property
    def ticks_system_id(self) -> int:
        """SystemId towards version-1 peers of the newer generation: the .NET ticks of the server's start."""

    @property
    def is_dirty(self) -> bool:
        """Whether `flush_dirty` has something to do."""

    def flush(self, link: Link) -> int:
        """The link's socket is writable again: send what waits. Returns the bytes left."""

    def take_victims(self) -> Sequence[tuple[Link, int]]:
        """[(link, CloseReason)] of connections to close for being too slow."""

    def take_lost(self) -> Sequence[tuple[Link, OSError]]:
        """[(link, OSError)] of connections whose flush failed."""

    def take_blocked(self) -> Sequence[Link]:
        """Links that the kernel took no more from since the last call: wait until they are writable, then `flush`."""

    def send(self, link: Link, packet: bytes) -> None:
        """Queue a packet of the control plane. Dropped (and counted) if the connection is being closed."""

    def subscribe(
        self, link: Link, subject: bytes, sid: int = 0, role: int = 0, group: bytes = b"", overflow: int = 0
    ) -> Interest:
        """Add a subscription to a valid subject or pattern; active at once. Returns its Interest.

        One with another `overflow` than CLOSE must be a version-2 subscriber's (role 0). With BLOCK it gets nothing until
        `grant`.
        """

    def unsubscribe(self, interest: Interest) -> None:
        """End a subscription. Nothing more is queued for it after this returns, but a Gap if it is owed one."""

    def grant(self, interest: Interest, msgs: int) -> None:
        """A subscription with policy BLOCK may be sent so many messages more. For another one nothing happens."""

    def detach(self, link: Link) -> None:
        """The connection is gone: end its queries, tell the askers of queries that only it could still answer, and forget it.
        Its subscriptions must have been ended before.
        """

    def cancel_query(self, link: Link, task_id: bytes) -> bool:
        """Forget a query that this connection asked. Returns whether it was pending."""

    def fail_query(self, link: Link, task_id: bytes, code: int, text: bytes) -> bool:
        """A connection that was asked reports failure. Returns False if it was not asked that query.

        The asker is told at once if nobody else may still answer (of a query to all: each time).
        """

    def expire_queries(self) -> int:
        """End the queries whose deadline has passed; returns how many."""

    def refuse(self, link: Link, task_id: bytes, code: int, subject: bytes = b"") -> None:
        """Tell a peer that one of its packets was refused, in its own dialect; counted. See `wire.ErrorCode`."""

    def acknowledge(self, link: Link, task_id: bytes) -> None:
        """Answer with ResponseCommon, success; nothing for an empty TaskId."""

    def counters(self) -> dict[str, Any]:
        """The data plane's counters since the server started."""
