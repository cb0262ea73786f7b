"""The subject table: who gets a message on a subject. See `_subjects.pyx` for the theory of operation."""

from typing import final

@final
class SubjectTable:
    """Subjects, patterns and the cache of matches.

    Args:
        cache_limit: how many subjects without a subscription of their own may be remembered.
        key: 16 bytes for the hash; random by default.
    """

    def __new__(cls, cache_limit: int = 65536, key: bytes | None = None) -> SubjectTable: ...
    @property
    def subscriptions(self) -> int: ...
    @property
    def patterns(self) -> int: ...
    @property
    def resolved(self) -> int: ...
    @property
    def evicted(self) -> int: ...
    @property
    def route_bytes(self) -> int: ...
    @property
    def visited(self) -> int: ...
    @property
    def subjects(self) -> int:
        """Exact subjects known, those that are only cached included."""

    @property
    def nodes(self) -> int:
        """Nodes of the pattern trie."""

    def lookup(
        self, subject: bytes
    ) -> tuple[list[int], dict[bytes, list[tuple[int, int]]], list[tuple[int, int]]] | None:
        """(plain connection ids, {group: [(connection id, sid)]}, [(connection id, sid)] of responders), or None if the
        subject is not valid.
        """
