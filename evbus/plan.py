"""What a client is interested in: its subscriptions, how they are told to a server, and which of them a subject
concerns.

The plan outlives connections: what is in it is subscribed again on every new one. Changes are for one thread at a time
(the session's lock); `match` may run meanwhile, on the I/O thread, because what it reads is replaced and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from evbus._frame import check_subject, has_wildcard
from evbus._mailbox import Mailbox
from evbus.errors import ConfigError
from evbus.wire import MAX_GROUP_BYTES, Overflow, Role

__all__ = ["Interest", "Plan", "token_match"]


class Interest:
    """One subscription, as the server sees it.

    Attributes:
        sid: its id on the wire, unique in the client's life.
        subject: subject or pattern, as the user wrote it.
        key: its UTF-8.
        role: SUBSCRIBER gets events (and queries that no responder takes); RESPONDER gets queries only.
        group: members of one group share the messages; empty for none.
        overflow: what the server does when this client is too slow.
        tokens: of a pattern; None for a plain subject.
        mailbox: where its messages wait.
        active: whether it is in the plan.
        leaving: the server has been told that it ends; it is in the plan for what is still on its way.
        on_lost: called with the reason when no more messages will come, but not by `unsubscribe`. On the I/O thread, so
            it must be quick and run no user code.

    Raises:
        InvalidSubjectError, ConfigError: subject or group break the rules.
    """

    __slots__ = (
        "active",
        "group",
        "key",
        "leaving",
        "mailbox",
        "on_lost",
        "overflow",
        "role",
        "sid",
        "subject",
        "tokens",
    )

    mailbox: Mailbox

    def __init__(
        self,
        sid: int,
        subject: str,
        *,
        role: Role = Role.SUBSCRIBER,
        group: str | None = None,
        overflow: Overflow = Overflow.CLOSE,
    ) -> None:
        self.sid = sid
        self.subject = subject
        self.key = check_subject(subject, pattern=True)
        self.role = role
        self.group = _check_group(group)
        self.overflow = overflow
        self.tokens = tuple(self.key.split(b".")) if has_wildcard(self.key) else None
        self.active = False
        self.leaving = False
        self.on_lost: Callable[[Exception], object] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the server sends it one copy per connection, without naming it."""
        return self.role == Role.SUBSCRIBER and not self.group and self.overflow != Overflow.BLOCK


def _check_group(group: str | None) -> str:
    if group is None:
        return ""
    if not isinstance(group, str):
        raise ConfigError("group", f"must be text, not {type(group).__name__}")
    if not group or len(group.encode(errors="replace")) > MAX_GROUP_BYTES or not group.isprintable():
        raise ConfigError("group", f"must be 1 to {MAX_GROUP_BYTES} bytes of printable text, not {group[:200]!r}")
    return group


def token_match(pattern: tuple[bytes, ...], tokens: list[bytes]) -> bool:
    """Whether a pattern covers a subject, both split at the dots. `*` is one token, a final `>` one or more."""
    if pattern[-1] == b">":
        if len(tokens) < len(pattern):
            return False
    elif len(tokens) != len(pattern):
        return False
    return all(want in (b"*", b">") or want == token for want, token in zip(pattern, tokens, strict=False))


class Plan:
    """All interests of a client.

    Attributes:
        names_targets: whether deliveries to group members and responders name their subscription (version 2). If not,
            everything is matched here by its subject.
    """

    def __init__(self) -> None:
        self.names_targets = True
        self._all: dict[int, Interest] = {}
        self._exact: dict[bytes, tuple[Interest, ...]] = {}
        self._patterns: tuple[Interest, ...] = ()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Interest]:
        """In the order in which they were added."""
        return iter(list(self._all.values()))

    def add(self, interest: Interest) -> bool:
        """Add an interest. Returns whether its subject is the first of its kind (version-1 servers count subjects)."""
        self._all[interest.sid] = interest
        interest.active = True
        first = not self.same_subject(interest)
        if interest.tokens is None:
            self._exact[interest.key] = (*self._exact.get(interest.key, ()), interest)
        else:
            self._patterns = (*self._patterns, interest)
        return first

    def remove(self, interest: Interest) -> bool:
        """Take an interest out; it may be gone already. Returns whether it was the last of its subject."""
        interest.active = False
        if self._all.pop(interest.sid, None) is None:
            return False
        if interest.tokens is None:
            left = tuple(other for other in self._exact[interest.key] if other is not interest)
            if left:
                self._exact[interest.key] = left
            else:
                del self._exact[interest.key]
        else:
            self._patterns = tuple(other for other in self._patterns if other is not interest)
        return not self.same_subject(interest)

    def find(self, sid: int) -> Interest | None:
        """The interest of that id."""
        return self._all.get(sid)

    def with_subject(self, subject: str) -> list[Interest]:
        """The interests that were made with exactly that subject or pattern."""
        return [interest for interest in self if interest.subject == subject]

    def same_subject(self, interest: Interest) -> tuple[Interest, ...]:
        """The other interests with exactly that subject."""
        candidates = self._patterns if interest.tokens is not None else self._exact.get(interest.key, ())
        return tuple(other for other in candidates if other.key == interest.key and other is not interest)

    def match(self, key: bytes) -> tuple[tuple[Mailbox, ...], tuple[Mailbox, ...]]:
        """The mailboxes that a delivery concerns that names no subscription: of its events, and of its queries."""
        found = [*self._exact.get(key, ())]
        if self._patterns:
            tokens = key.split(b".")
            found += [it for it in self._patterns if it.tokens is not None and token_match(it.tokens, tokens)]
        plain = tuple(it.mailbox for it in found if it.is_plain)
        if self.names_targets:
            return plain, plain
        # A version-1 server knows no roles: with a responder here, the others are not asked.
        return plain, tuple(it.mailbox for it in found if it.role == Role.RESPONDER) or plain
