"""Every error that evbus raises on purpose: one root, and each also the builtin that its caller would expect.

::

    EvbusError
    ├── ConfigError (ValueError)                an option makes no sense; nothing was started
    ├── ServerStartError (OSError)              the server cannot listen: port in use, unknown host, bad address
    ├── ConnectError (ConnectionError)          connect() did not get a usable connection
    │   ├── NotEventServerError                 something answered, but not an event server
    │   └── AuthError                           the server refused the credentials
    ├── NotConnectedError (ConnectionError)     needs a connection, and there is none
    │   └── ClientClosedError                   needs a client that was not closed
    ├── ConnectionLostError (ConnectionError)   the connection ended meanwhile; the outcome is unknown
    ├── ProtocolError (ConnectionError)         the peer sent what the protocol does not allow
    ├── QueryError
    │   ├── QueryTimeoutError (TimeoutError)    no answer in time
    │   ├── NoRespondersError (LookupError)     nobody is there to answer
    │   ├── ResponderLostError (ConnectionError)  everybody who was asked has gone
    │   └── RemoteError (RuntimeError)          the responder answered with a failure
    ├── ConfirmTimeoutError (TimeoutError)      no receipt in time; the outcome is unknown
    ├── PermissionDeniedError (PermissionError) the server does not allow this on this subject
    ├── InvalidSubjectError (ValueError)        the subject or pattern breaks the rules
    ├── CodecError (ValueError)                 a value and its bytes do not fit together
    ├── RefusedError (RuntimeError)             the server refused a request for another reason
    └── LimitError                              carries `size` and `limit`
        ├── PayloadTooLargeError (ValueError)   the encoded message is above the payload limit
        ├── BufferFullError (BlockingIOError)   the client's outgoing buffer has no room
        └── SlowConsumerError (RuntimeError)    a subscription fell too far behind

What we did wrong (ConfigError, InvalidSubjectError, CodecError, ...) and what the peer did wrong (ProtocolError,
RemoteError) are different classes; so are closed by us (ClientClosedError) and lost (ConnectionLostError).

The attributes hold the facts and `str()` makes a sentence of them that says what to do. Every error survives pickling
and copying with its attributes, so it can cross to another process; its cause and traceback cannot.
"""

from __future__ import annotations

from typing import Any

from evbus.wire import ErrorCode

__all__ = [
    "AuthError",
    "BufferFullError",
    "ClientClosedError",
    "CodecError",
    "ConfigError",
    "ConfirmTimeoutError",
    "ConnectError",
    "ConnectionLostError",
    "EvbusError",
    "InvalidSubjectError",
    "LimitError",
    "NoRespondersError",
    "NotConnectedError",
    "NotEventServerError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "ProtocolError",
    "QueryError",
    "QueryTimeoutError",
    "RefusedError",
    "RemoteError",
    "ResponderLostError",
    "ServerStartError",
    "SlowConsumerError",
    "error_from_server",
]


def _rebuild(cls: type[EvbusError], state: dict[str, object]) -> EvbusError:
    """The inverse of `EvbusError.__reduce__`: without __init__, whose parameters differ from class to class."""
    error = cls.__new__(cls)
    for name, value in state.items():
        setattr(error, name, value)
    return error


class EvbusError(Exception):
    """The root: `except EvbusError` catches everything that evbus raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by attributes: the default, class and args, would call __init__ with the wrong arguments."""
        state = dict(self.__dict__, args=self.args)
        if isinstance(self, OSError):  # these live in slots of OSError, not in __dict__
            state.update(errno=self.errno, strerror=self.strerror)
        return _rebuild, (type(self), state)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if not name.startswith("_"))
        return f"{type(self).__name__}({facts})"


def _on(subject: str) -> str:
    return f" on {subject!r}" if subject else ""


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


# --- before anything runs ---------------------------------------------------------------------------------------------


class ConfigError(EvbusError, ValueError):
    """An option makes no sense. Nothing was started or changed.

    Attributes:
        option: name of the option, e.g. "payload_bytes" or "url".
        problem: what is wrong with it, and what would be right.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__()
        self.option = option
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.option}: {self.problem}"


class ServerStartError(EvbusError, OSError):
    """The server cannot listen where it was told to. `errno` is the system's number if there is one.

    Attributes:
        address: where, as the user wrote it ("127.0.0.1:9100").
        problem: what is wrong ("the port is in use by another process").
        hint: what to do about it; empty if there is nothing to say.
    """

    def __init__(self, address: str, problem: str, hint: str = "", errno: int | None = None) -> None:
        super().__init__()
        self.address = address
        self.problem = problem
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"cannot listen on {self.address}: {self.problem}{hint}"


# --- connections ------------------------------------------------------------------------------------------------------


class ConnectError(EvbusError, ConnectionError):
    """connect() did not get a usable connection. `errno` is the system's number if there is one.

    Attributes:
        address: the server's address ("127.0.0.1:9100").
        reason: why ("Connection refused", "timed out after 3.0 s").
    """

    def __init__(self, address: str, reason: str = "", errno: int | None = None) -> None:
        super().__init__()
        self.address = address
        self.reason = reason
        self.errno = errno

    def __str__(self) -> str:
        return (
            f"cannot connect to {self.address}{_because(self.reason)}; check the address, and that a server runs there "
            "(`evbus serve` starts one)"
        )


class NotEventServerError(ConnectError):
    """Something accepts connections at the address, but it does not answer like an event server."""

    def __str__(self) -> str:
        return (
            f"{self.address} is not an event server{_because(self.reason)}; check host and port, "
            "and that both sides use TLS or neither does"
        )


class AuthError(ConnectError):
    """The server refused the credentials. Trying again with the same ones is pointless."""

    def __str__(self) -> str:
        return f"{self.address} refused the credentials{_because(self.reason)}; check the token given as `auth`"


class NotConnectedError(EvbusError, ConnectionError):
    """The call needs a connection, and there is none.

    Attributes:
        action: what was to be done ("publish", "query").
        status: the client's status at that moment ("RECONNECTING"), or empty.
    """

    def __init__(self, action: str, status: str = "") -> None:
        super().__init__()
        self.action = action
        self.status = status

    def __str__(self) -> str:
        if self.status == "RECONNECTING":
            return (
                f"cannot {self.action}: the connection was lost, and the client is getting a new one (status "
                "RECONNECTING); wait_connected() waits for it, and Reconnect(buffer_bytes=...) keeps what is published "
                "meanwhile"
            )
        status = f" (status {self.status})" if self.status else ""
        return f"cannot {self.action}: not connected{status}; call connect() first"


class ClientClosedError(NotConnectedError):
    """The client was closed, and a closed client is not opened again."""

    def __str__(self) -> str:
        return f"cannot {self.action}: the client is closed; make a new EventClient"


class ConnectionLostError(EvbusError, ConnectionError):
    """The connection ended while something was under way. Whether the server still did it is unknown.

    Attributes:
        action: what was under way ("query", "confirmation of a publish"), or empty.
        reason: what is known of the cause, or empty.
    """

    def __init__(self, action: str = "", reason: str = "") -> None:
        super().__init__()
        self.action = action
        self.reason = reason

    def __str__(self) -> str:
        during = f" during {self.action}" if self.action else ""
        return (
            f"the connection was lost{during}{_because(self.reason)}; the outcome is unknown, "
            "so repeat only what may happen twice"
        )


class ProtocolError(EvbusError, ConnectionError):
    """The peer sent what the protocol does not allow. The connection it came on is closed.

    Attributes:
        problem: what was wrong.
    """

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem

    def __str__(self) -> str:
        return f"the peer broke the protocol: {self.problem}; check that both sides are up to date"


# --- queries ----------------------------------------------------------------------------------------------------------


class QueryError(EvbusError):
    """A query ended without an answer.

    Attributes:
        subject: what was asked.
    """

    def __init__(self, subject: str) -> None:
        super().__init__()
        self.subject = subject

    def __str__(self) -> str:
        return f"the query{_on(self.subject)} was not answered"


class QueryTimeoutError(QueryError, TimeoutError):
    """No answer in time. The responder may still be at work, or may have done it already.

    Attributes:
        subject: what was asked.
        timeout: how long was waited, in seconds.
    """

    def __init__(self, subject: str, timeout: float) -> None:
        super().__init__(subject)
        self.timeout = timeout

    def __str__(self) -> str:
        return (
            f"no answer to the query{_on(self.subject)} within {self.timeout:g} s; "
            "the responder may have acted all the same (a longer `timeout` waits longer)"
        )


class NoRespondersError(QueryError, LookupError):
    """Nobody is there to answer: no responder and no subscriber on the subject. Told at once, not after the timeout."""

    def __str__(self) -> str:
        return (
            f"nobody answers queries{_on(self.subject)}; start a responder (`on_query`, or a subscriber that replies), "
            "or check the spelling"
        )


class ResponderLostError(QueryError, ConnectionError):
    """Everybody who was asked has gone without an answer; of a `query_all`, this one has. They may have acted before.

    Attributes:
        subject: what was asked, or empty.
        sender: connection id of the responder; 0 if it is not about a single one.
    """

    def __init__(self, subject: str, sender: int = 0) -> None:
        super().__init__(subject)
        self.sender = sender

    def __str__(self) -> str:
        return (
            f"the responder{_on(self.subject)} went away before it answered; it may have acted, so ask again with care"
        )


class RemoteError(QueryError, RuntimeError):
    """The responder answered with a failure: its handler raised, or called `Message.fail`.

    Attributes:
        code: the responder's number; 500 (`wire.HANDLER_FAILED`) when its handler raised.
        text: the responder's words.
        subject: what was asked, or empty.
        sender: connection id of the responder; 0 if unknown.
    """

    def __init__(self, code: int, text: str, subject: str = "", sender: int = 0) -> None:
        super().__init__(subject)
        self.code = code
        self.text = text
        self.sender = sender

    def __str__(self) -> str:
        return f"the responder{_on(self.subject)} failed with code {self.code}{_because(self.text)}"


# --- requests that the server refused ---------------------------------------------------------------------------------


class ConfirmTimeoutError(EvbusError, TimeoutError):
    """No receipt in time for a publish with confirm=True. The outcome is unknown: it may have been delivered.

    Attributes:
        subject: what was published to.
        timeout: how long was waited, in seconds.
    """

    def __init__(self, subject: str, timeout: float) -> None:
        super().__init__()
        self.subject = subject
        self.timeout = timeout

    def __str__(self) -> str:
        return (
            f"no receipt for the publish{_on(self.subject)} within {self.timeout:g} s; "
            "it may have been delivered, so publish again only what may arrive twice"
        )


class PermissionDeniedError(EvbusError, PermissionError):
    """The server does not allow this.

    Attributes:
        action: "publish", "subscribe", "query", ..., or empty if unknown.
        subject: on which subject.
        reason: the server's words, or empty.
    """

    def __init__(self, action: str, subject: str, reason: str = "") -> None:
        super().__init__()
        self.action = action
        self.subject = subject
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"not allowed: {self.action or 'request'}{_on(self.subject)}{_because(self.reason)}; "
            "ask for the permission where the server's users are kept"
        )


class InvalidSubjectError(EvbusError, ValueError):
    """The subject or pattern breaks the rules.

    Attributes:
        subject: the offender, cut to 256 characters so that a long one does not flood a log.
        problem: which rule.
    """

    def __init__(self, subject: str, problem: str) -> None:
        super().__init__()
        self.subject = subject if len(subject) <= 256 else subject[:253] + "..."
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"invalid subject {self.subject!r}: {self.problem}; a subject is up to 32 non-empty tokens joined by dots, "
            "at most 256 bytes; `*` and `>` stand alone as tokens, and only in subscriptions"
        )


class CodecError(EvbusError, ValueError):
    """A value and its bytes do not fit together.

    Attributes:
        action: "encode" or "decode".
        type_name: the type to be encoded or decoded into.
        problem: what is wrong, with the place in the value where that is known.
        codec: name of the codec ("msgpack", "json", ...), or empty.
        subject: the subject of the message, where it is known; may be set later by whoever knows it.
    """

    def __init__(self, action: str, type_name: str, problem: str, *, codec: str = "", subject: str = "") -> None:
        super().__init__()
        self.action = action
        self.type_name = type_name
        self.problem = problem
        self.codec = codec
        self.subject = subject

    def __str__(self) -> str:
        if self.action == "encode":
            codec = f" as {self.codec}" if self.codec else ""
            return f"cannot encode {self.type_name}{codec}{_on(self.subject)}: {self.problem}"
        codec = f" ({self.codec})" if self.codec else ""
        return f"cannot decode a payload{codec}{_on(self.subject)} into {self.type_name}: {self.problem}"


class RefusedError(EvbusError, RuntimeError):
    """The server refused a request for a reason that has no class of its own.

    Attributes:
        code: the number, see `wire.ErrorCode`; a newer server may send others.
        subject: which subject the request was about, or empty.
        text: the server's words.
    """

    def __init__(self, code: int, subject: str = "", text: str = "") -> None:
        super().__init__()
        self.code = code
        self.subject = subject
        self.text = text

    def __str__(self) -> str:
        try:
            name = ErrorCode(self.code).name.lower().replace("_", " ")
        except ValueError:
            name = f"code {self.code}"
        return f"the server refused a request{_on(self.subject)} ({name}){_because(self.text)}"


# --- limits -----------------------------------------------------------------------------------------------------------


class LimitError(EvbusError):
    """Something is over a limit.

    Attributes:
        size: how large it is (or would be); -1 if only the server knows.
        limit: how large it may be; -1 if only the server knows.
    """

    def __init__(self, size: int = -1, limit: int = -1) -> None:
        super().__init__()
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"over a limit{self._figures('')}"

    def _figures(self, unit: str) -> str:
        """The figures that are known, as in (5 bytes, limit 4)."""
        known = []
        if self.size >= 0:
            known.append(f"{self.size:,}{unit}")
        if self.limit >= 0:
            known.append(f"limit {self.limit:,}")
        return f" ({', '.join(known)})" if known else ""


class PayloadTooLargeError(LimitError, ValueError):
    """The encoded message is above the payload limit; sizes in bytes. It was not sent, or the server skipped it.

    Attributes:
        size: bytes of the payload; -1 if unknown.
        limit: bytes allowed; -1 if unknown.
        subject: what it was meant for, or empty.
    """

    def __init__(self, size: int = -1, limit: int = -1, subject: str = "") -> None:
        super().__init__(size, limit)
        self.subject = subject

    def __str__(self) -> str:
        return (
            f"the payload{_on(self.subject)} is too large{self._figures(' bytes')}; send it in parts, "
            "or raise payload_bytes in the server's limits (evbus serve --max-payload)"
        )


class BufferFullError(LimitError, BlockingIOError):
    """The client's outgoing buffer has no room, and the call may not wait. Nothing was taken; sizes in bytes."""

    def __init__(self, size: int = -1, limit: int = -1) -> None:
        super().__init__(size, limit)

    def __str__(self) -> str:
        return (
            f"the outgoing buffer is full{self._figures(' bytes')}; nothing was sent: "
            "wait for the connection, allow a longer `timeout`, or publish less"
        )


class SlowConsumerError(LimitError, RuntimeError):
    """A subscription fell too far behind its publishers: it was ended, or missed messages.

    Attributes:
        subject: the subscription's subject or pattern.
        size: what was waiting when it was ended.
        limit: how much may wait.
        unit: of both: "messages" or "bytes".
        missed: how many messages it missed, if it goes on; 0 if it was ended.
    """

    def __init__(self, subject: str, size: int = -1, limit: int = -1, unit: str = "bytes", *, missed: int = 0) -> None:
        super().__init__(size, limit)
        self.subject = subject
        self.unit = unit
        self.missed = missed

    @property
    def pending(self) -> int:
        """What was waiting; the same as `size`."""
        return self.size

    def __str__(self) -> str:
        if self.missed:
            return (
                f"the subscription{_on(self.subject)} fell too far behind and missed {self.missed:,} messages; "
                "make its handler faster, share the work in a group, or give `on_gap` to be told"
            )
        return (
            f"the subscription{_on(self.subject)} fell too far behind{self._figures(' ' + self.unit)} and was ended; "
            "make its handler faster, share the work in a group, or choose another `overflow`"
        )


# --- from the wire ----------------------------------------------------------------------------------------------------


def error_from_server(
    code: int, subject: str = "", text: str = "", *, sender: int = 0, action: str = "", timeout: float = 0.0
) -> EvbusError:
    """The exception for an Error object (id 1000) that a client received.

    Args:
        code: the Error's code.
        subject: its subject, may be empty.
        text: its words, may be empty.
        sender: the packet's SystemId: 0 for the server itself, else the connection id of the responder that failed.
        action: what the error is about, for PermissionDeniedError ("publish", "subscribe", "query").
        timeout: how long the query was to wait, in seconds, for QueryTimeoutError.

    Returns:
        the error, not raised. Codes that this version does not know become a RefusedError, so that a newer server is
        never misunderstood.
    """
    if sender != 0:
        return RemoteError(code, text, subject, sender)
    if code == ErrorCode.NO_RESPONDERS:
        return NoRespondersError(subject)
    if code == ErrorCode.RESPONDER_LOST:
        return ResponderLostError(subject)
    if code == ErrorCode.QUERY_TIMEOUT:
        return QueryTimeoutError(subject, timeout)
    if code == ErrorCode.PAYLOAD_TOO_LARGE:
        return PayloadTooLargeError(subject=subject)
    if code == ErrorCode.INVALID_SUBJECT:
        return InvalidSubjectError(subject, text or "the server refused it")
    if code == ErrorCode.PERMISSION_DENIED:
        return PermissionDeniedError(action, subject, text)
    return RefusedError(code, subject, text)
