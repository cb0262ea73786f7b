"""Waking the threads whose outcomes have come, one after the other. See `_wake.pyx` for why."""

from asyncio import Future
from typing import final

from typing_extensions import Self

from evbus._outbox import Outbox

@final
class Chain:
    """Those whose outcomes have come and who are to be woken, in that order.

    Args:
        outbox: where they send; corked while the chain is long.
    """

    def __new__(cls, outbox: Outbox) -> Self: ...
    def __len__(self) -> int: ...

@final
class Wakeup:
    """One thread that waits for one outcome. Calling it, from any thread, says that the outcome is there.

    Args:
        chain: the one that wakes it.
    """

    def __new__(cls, chain: Chain) -> Self: ...
    def __call__(self) -> None: ...
    def wait(self, timeout: float = -1.0) -> bool:
        """Wait for the call; once.

        Args:
            timeout: seconds; negative: as long as it takes.

        Returns:
            whether the call has come.
        """

@final
class Resume:
    """A coroutine that waits for one outcome. Calling it, on the loop's thread, says that the outcome is there.

    Args:
        future: what it awaits.
    """

    def __new__(cls, future: Future[None]) -> Self: ...
    def __call__(self) -> None: ...
