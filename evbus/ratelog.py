"""Logging that a peer cannot flood: a few lines per second and category, the rest counted."""

from __future__ import annotations

import logging
from typing import Final

__all__ = ["RateLimitedLog"]

#: Lines per category and window.
LINES: Final = 10
WINDOW_S: Final = 1.0


class RateLimitedLog:
    """Wraps a logger; warnings are limited per category, and what was left out is told by a line of its own.

    One thread. Time is passed in.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._window_end = 0.0
        self._lines: dict[str, int] = {}

    def debug(self, message: str, *args: object) -> None:
        """Log at DEBUG; never limited, as it is off by default."""
        self._log.debug(message, *args)

    def warning(self, category: str, now: float, message: str, *args: object) -> None:
        """Log at WARNING, at most 10 lines per category and second."""
        self.tick(now)
        count = self._lines.get(category, 0) + 1
        self._lines[category] = count
        if count <= LINES:
            self._log.warning(message, *args)

    def tick(self, now: float) -> None:
        """Close a window that has ended, and tell what it left out."""
        if now < self._window_end:
            return
        for category, count in self._lines.items():
            if count > LINES:
                self._log.warning("%d further lines about %s were left out", count - LINES, category)
        self._lines.clear()
        self._window_end = now + WINDOW_S
