"""The options of a client: frozen values, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from evbus.announcement import HEARTBEAT_RANGE_S
from evbus.errors import ConfigError
from evbus.wire import MAX_CLIENT_ID_BYTES, MAX_PACKET_CEILING_BYTES, MAX_TOKEN_BYTES, PACKET_OVERHEAD_BYTES, Codec

__all__ = ["ClientLimits", "Reconnect", "SessionOptions", "check_reconnect", "check_timeout"]

_MIB = 1 << 20
# The server regards a name as one more string of the announcement; this keeps the handshake below its 4 KiB.
_MAX_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class ClientLimits:
    """What a client keeps in memory, and what it takes from a server. All positive; sizes in bytes.

    Raises:
        ConfigError: a value is no positive whole number, or above its ceiling.
    """

    packet_bytes: int = MAX_PACKET_CEILING_BYTES
    """Largest packet that is taken from the server, at most 64 MiB; a larger one ends the connection. A server that
    tells its own, lower limit is held to that."""

    buffer_bytes: int = 4 * _MIB
    """Bytes that may wait to be sent; then `publish` waits until a quarter of it is left."""

    pending_msgs: int = 524_288
    """Messages that may wait for the handler of one subscription. Source: nats clients."""

    pending_bytes: int = 128 * _MIB
    """Bytes of payload and headers that may wait for the handler of one subscription."""

    def __post_init__(self) -> None:
        """Check each value."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**62:
                raise ConfigError(field.name, f"must be a positive whole number, not {value!r}")
        if not PACKET_OVERHEAD_BYTES <= self.packet_bytes <= MAX_PACKET_CEILING_BYTES:
            raise ConfigError(
                "packet_bytes",
                f"must be from {PACKET_OVERHEAD_BYTES:,} to {MAX_PACKET_CEILING_BYTES:,}, not {self.packet_bytes:,}",
            )


@dataclass(frozen=True, kw_only=True)
class Reconnect:
    """How a client gets a new connection when it has lost one. Times in seconds, sizes in bytes.

    A round tries each server once, in their order. The pause before a round is random, so that the clients of a server
    that restarts do not all come back in the same moment ("full jitter").

    Raises:
        ConfigError: a value makes no sense.
    """

    first_delay_s: float = 0.6
    """The first round comes after anything from nothing to this. Measured with 1,000 clients of a server that resets
    them, or is killed and back at once: less puts more than 30 % of the attempts into one tenth of a second."""

    min_delay_s: float = 0.2
    """The second comes after at most this; after that it doubles with each round."""

    max_delay_s: float = 5.0
    """The longest pause. After a refusal of the credentials it is the pause."""

    timeout_s: float = 3.0
    """What one server gets to answer."""

    give_up_after_s: float = math.inf
    """After so long without a connection the client stops trying. Infinite: it never does."""

    buffer_bytes: int = 0
    """Messages published while there is no connection are kept up to so many bytes, and sent first after it is back;
    then BufferFullError. 0: there is no such buffer, and `publish` raises NotConnectedError."""

    def __post_init__(self) -> None:
        """Check each value."""
        for name in ("first_delay_s", "min_delay_s", "max_delay_s", "timeout_s", "give_up_after_s"):
            value: object = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
            if not good or (value == 0 and name != "first_delay_s"):
                raise ConfigError(f"reconnect.{name}", f"must be a positive number of seconds, not {value!r}")
        if self.min_delay_s > self.max_delay_s or math.isinf(self.max_delay_s):
            raise ConfigError(
                "reconnect.max_delay_s", f"must be finite and at least min_delay_s, not {self.max_delay_s!r}"
            )
        size: object = self.buffer_bytes
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**62:
            raise ConfigError("reconnect.buffer_bytes", f"must be a whole number from 0 up, not {size!r}")


def check_reconnect(value: object) -> Reconnect | None:
    """The option as it was given: True for the defaults, False for none, or a Reconnect.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, Reconnect):
        return value
    if isinstance(value, bool):
        return Reconnect() if value else None
    raise ConfigError("reconnect", f"must be True, False or Reconnect(...), not {value!r}")


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What a session needs to know of its user's wishes.

    Raises:
        ConfigError: an option makes no sense.
    """

    name: str = ""
    """What the server calls this client in its logs."""

    token: str = ""
    """The credentials."""

    client_id: str = ""
    """32 hexadecimal digits that stay the same over all connections; made up if empty."""

    heartbeat_s: float = 5.0
    """Seconds between heartbeats; a server that is silent for twice as long is taken for lost."""

    codec: Codec = Codec.MSGPACK
    """How structured values are sent."""

    limits: ClientLimits = ClientLimits()

    reconnect: Reconnect | None = None
    """What happens when the connection is lost; None: nothing."""

    warn_after_s: float | None = 10.0
    """Seconds after which a handler's call is reported as slow; None for never."""

    def __post_init__(self) -> None:
        """Check each value."""
        _text("name", self.name, _MAX_NAME_BYTES)
        _text("auth", self.token, MAX_TOKEN_BYTES, secret=True)
        _text("client_id", self.client_id, MAX_CLIENT_ID_BYTES)
        if not isinstance(self.limits, ClientLimits):
            raise ConfigError("limits", f"must be ClientLimits, not {type(self.limits).__name__}")
        beat: object = self.heartbeat_s
        low, high = HEARTBEAT_RANGE_S
        if not isinstance(beat, (int, float)) or isinstance(beat, bool) or not low <= beat <= high:
            raise ConfigError("heartbeat", f"must be from {low:g} to {high:g} seconds, not {beat!r}")
        warn: object = self.warn_after_s
        if warn is not None and (not isinstance(warn, (int, float)) or isinstance(warn, bool) or not warn > 0):
            raise ConfigError("warn_after", f"must be a number of seconds above 0, or None for never, not {warn!r}")

    def __repr__(self) -> str:
        # Without the token: representations end up in logs.
        return f"SessionOptions(name={self.name!r}, heartbeat_s={self.heartbeat_s!r}, codec={self.codec!r})"


def _text(option: str, value: object, limit: int, *, secret: bool = False) -> None:
    shown = "" if secret else f", not {value!r}"
    if not isinstance(value, str):
        raise ConfigError(option, f"must be text, not {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(option, f"must be valid Unicode text{shown}") from None
    if size > limit:
        raise ConfigError(option, f"takes {size:,} bytes of UTF-8; the limit is {limit:,}")


def check_timeout(value: object, *, zero: bool = False) -> float | None:
    """A timeout in seconds as it was given; None means none.

    Raises:
        ConfigError: it is negative, not a number, or 0 where that makes no sense.
    """
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise ConfigError("timeout", f"must be a number of seconds, or None for no limit, not {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise ConfigError("timeout", f"must be {'at least' if zero else 'greater than'} 0 seconds, not {value!r}")
    return None if value == math.inf else float(value)
