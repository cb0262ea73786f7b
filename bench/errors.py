"""What can go wrong in a bench, for the one place that prints it."""

from __future__ import annotations

__all__ = ["BenchError", "UnavailableError"]


class BenchError(Exception):
    """A run failed: the figures would be wrong. The text is for the reader."""


class UnavailableError(BenchError):
    """Something that the bench needs is not on this machine."""
