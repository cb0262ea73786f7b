"""The server's limits: one frozen value that is checked when it is made and read everywhere below.

Every limit is on by default. A limit is a positive number: 0 and None are errors and never mean "none", because a limit
that is forgotten must not be a limit that is off (ActiveMQ and amqp091-go were hurt by exactly that). Where having no
limit can make sense it must be spelt out: `Limits(connections=UNLIMITED)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

from evbus.errors import ConfigError
from evbus.wire import MAX_PACKET_CEILING_BYTES, MAX_PAYLOAD_CEILING_BYTES, PACKET_OVERHEAD_BYTES

__all__ = ["UNLIMITED", "Limits"]


class _Unlimited(int):
    """The largest signed 64-bit number: no count or size gets there, and C code compares it like any other limit."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNLIMITED"


#: Spells out that a limit is off. An int (2**63 - 1), so that code compares it like any other limit; for a limit in
#: seconds it becomes infinity. Only the fields whose docstring says so take it.
UNLIMITED: Final[int] = _Unlimited(2**63 - 1)

_KIB = 1 << 10
_MIB = 1 << 20

# Fields that may be UNLIMITED. Not among them: what bounds the memory that one packet or one stranger can claim
# (payload, handshake), how long the server remembers a query, and the cache, which is no protection but a size.
_MAY_BE_UNLIMITED = frozenset(
    {
        "connections",
        "handshakes",
        "subscriptions_per_connection",
        "subscriptions",
        "queries_per_connection",
        "pending_soft_bytes",
        "pending_soft_s",
        "pending_hard_bytes",
        "write_timeout_s",
        "silence_s",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server grants its peers. Immutable; `dataclasses.replace` makes a changed copy, which is checked again.

    Args:
        See the fields. Sizes are bytes, durations (names that end in `_s`) are seconds.

    Raises:
        ConfigError: a value is not a positive number, is above its ceiling, or contradicts another one.
    """

    payload_bytes: int = 1 * _MIB
    """Largest payload of a message, in bytes. At most 64 MiB less 64 KiB. A larger one is skipped and answered with an
    error; the connection stays. Source: C# servers from 1.4.0 on, and nats-server, have the same 1 MiB."""

    handshake_bytes: int = 4 * _KIB
    """Largest packet in bytes before the handshake has succeeded; a larger one closes the connection. At least 512, at
    most the packet limit. Source: room for a token and a name (1 KiB each at most); RabbitMQ gives 8 KiB."""

    handshake_s: float = 5.0
    """Seconds from accepting a connection to its good handshake, TLS included; absolute, so that a trickle of bytes
    does not extend it. Source: a C# client gives up after 3 s itself."""

    connections: int = 10_000
    """Number of connections at a time; further ones are closed at once. May be UNLIMITED; the server stays below the
    system's limit of descriptors in any case. Source: what 20,000 descriptors and 30 MiB of idle connections carry."""

    handshakes: int = 512
    """Number of connections at a time that have not shaken hands yet, so that strangers cannot use up all connections.
    May be UNLIMITED. Source: each may hold 4 KiB for 5 s, so 512 cost 2 MiB at most."""

    subscriptions_per_connection: int = 10_000
    """Number of subscriptions of one connection; the next is refused with an error. May be UNLIMITED."""

    subscriptions: int = 500_000
    """Number of subscriptions of all connections together; the next is refused with an error. May be UNLIMITED.
    Source: at most about 0.5 KiB each in the subject table, so 250 MiB at worst."""

    queries_per_connection: int = 10_000
    """Number of queries of one connection that wait for an answer; the next is refused with an error. May be
    UNLIMITED."""

    query_s: float = 60.0
    """Longest deadline of a query, in seconds: a longer one is cut to this. Source: bounds how long the server
    remembers a query that nobody answers."""

    query_default_s: float = 30.0
    """Deadline in seconds of a query that names none, so of all version-1 queries. At most `query_s`. Source: C#
    servers from 1.4.0 on forget a query after 30 s."""

    pending_soft_bytes: int = 8 * _MIB
    """Bytes that may wait for one connection for as long as it likes; above it for `pending_soft_s`, the connection is
    reset as a slow consumer. At most `pending_hard_bytes`. May be UNLIMITED. Source: redis, 8 MiB for pub/sub."""

    pending_soft_s: float = 10.0
    """Seconds that a connection may stay above `pending_soft_bytes`. May be UNLIMITED. Source: redis gives 60 s, which
    at 1 Gbit/s is long enough to reach any hard limit."""

    pending_hard_bytes: int = 64 * _MIB
    """Bytes waiting for one connection at which it is reset at once. At least one packet. May be UNLIMITED. Source:
    nats-server, 64 MiB."""

    write_timeout_s: float = 10.0
    """Seconds that a connection may take no byte at all while data waits for it; then it is reset. May be UNLIMITED.
    Source: nats-server's write deadline, 10 s."""

    match_cache: int = 65_536
    """Number of subjects whose subscribers the router remembers; beyond it the oldest go. Only costs time, never a
    message. Source: more than the 5,000 busy subjects of the bench; some tens of MiB when full of long subjects."""

    silence_s: float = 180.0
    """Seconds of silence after which a version-1 peer is taken for dead; an evbus peer is judged by its own heartbeat.
    May be UNLIMITED. Source: C# clients send a heartbeat every 5 s, older ones none; servers from 1.2.0 on wait 30 s,
    which has cut off clients that were only suspended."""

    def __post_init__(self) -> None:
        """Check each value by itself, then against the others."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s"):
                object.__setattr__(self, field.name, _seconds(field.name, value))
            else:
                _count(field.name, value)
        self._at_most("payload_bytes", MAX_PAYLOAD_CEILING_BYTES, f"{MAX_PAYLOAD_CEILING_BYTES:,}, the ceiling")
        self._at_most("handshake_bytes", self.packet_bytes, f"the packet limit ({self.packet_bytes:,})")
        if self.handshake_bytes < 512:
            raise ConfigError(
                "handshake_bytes", f"must be at least 512, or no client gets in, not {self.handshake_bytes}"
            )
        self._at_most("query_default_s", self.query_s, f"query_s ({self.query_s:g})")
        self._at_most(
            "pending_soft_bytes", self.pending_hard_bytes, f"pending_hard_bytes ({self.pending_hard_bytes:,})"
        )
        self._at_most("packet_bytes", self.pending_hard_bytes, f"pending_hard_bytes ({self.pending_hard_bytes:,})")

    @property
    def packet_bytes(self) -> int:
        """Largest packet, in bytes: a payload and 64 KiB for header, ids, subject and headers. A larger one closes."""
        return min(self.payload_bytes + PACKET_OVERHEAD_BYTES, MAX_PACKET_CEILING_BYTES)

    def _at_most(self, name: str, ceiling: float, what: str) -> None:
        value = getattr(self, name)
        if value > ceiling:
            raise ConfigError(name, f"must be at most {what}, not {value:,}")


def _count(name: str, value: object) -> None:
    # bool is an int to Python, but `connections=True` is a mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(name, f"must be a whole number, not {value!r}")
    _positive(name, value)
    if isinstance(value, _Unlimited):
        if name not in _MAY_BE_UNLIMITED:
            raise ConfigError(name, "cannot be UNLIMITED")
    elif value >= UNLIMITED:
        raise ConfigError(name, f"is out of range: {value}")


def _seconds(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(name, f"must be a number of seconds, not {value!r}")
    if isinstance(value, _Unlimited) or value == math.inf:
        # Infinity is what UNLIMITED became in a value that `dataclasses.replace` copies.
        if name not in _MAY_BE_UNLIMITED:
            raise ConfigError(name, "cannot be UNLIMITED")
        return math.inf
    if not math.isfinite(value):
        raise ConfigError(name, f"must be a number of seconds, not {value!r}")
    _positive(name, value)
    return float(value)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        allowed = "; write UNLIMITED for no limit" if name in _MAY_BE_UNLIMITED else ""
        raise ConfigError(name, f"must be greater than 0, not {value}{allowed}")
