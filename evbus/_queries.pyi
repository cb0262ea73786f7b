"""The pending queries: who asked, who was asked, until when. See `_queries.pyx`."""

from typing import final

@final
class QueryTable:
    """The table of one server's pending queries."""

    def __new__(cls) -> QueryTable: ...
    @property
    def count(self) -> int: ...
    @property
    def next_deadline(self) -> float | None:
        """Clock time of the earliest deadline, or None."""
