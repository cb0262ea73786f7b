"""How long to wait before the next attempt to connect."""

from __future__ import annotations

from random import Random

from evbus.options import Reconnect

__all__ = ["Backoff"]


class Backoff:
    """The pauses between rounds of attempts, with full jitter: anything from nothing to a bound that doubles.

    A server that restarts loses all its clients in one moment. Random pauses over the whole range spread their return
    more evenly than a fixed pause with some noise. (Source: M. Brooker, "Exponential Backoff And Jitter", 2015.)

    Args:
        policy: the bounds.
        random: where chance comes from.
    """

    def __init__(self, policy: Reconnect, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._bound = policy.min_delay_s

    def first(self) -> float:
        """Seconds before the first round after a loss; later ones begin with the shortest bound again."""
        self._bound = self._policy.min_delay_s
        return self._random.uniform(0.0, self._policy.first_delay_s)

    def next(self) -> float:
        """Seconds before the next round."""
        bound = self._bound
        self._bound = min(bound * 2, self._policy.max_delay_s)
        return self._random.uniform(0.0, bound)
