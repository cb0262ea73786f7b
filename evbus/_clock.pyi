"""The system's wall clock for packet headers. Docstrings are in `_clock.pyx`."""

from evbus._outbox import Clock

class SystemClock(Clock):
    """The time as the system has it; assigning `unix_ms` has no effect."""
