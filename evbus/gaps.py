"""Telling a subscriber what it has missed, in order with its messages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

from evbus._mailbox import Batch, Mailbox
from evbus.errors import SlowConsumerError
from evbus.message import Gap
from evbus.reports import Reports, one_line

__all__ = ["GapTeller", "OnGap"]

_log = logging.getLogger("evbus.client")

OnGap = Callable[[Gap], object]


class GapTeller:
    """What becomes of one subscription's gaps, for whoever takes its messages.

    Args:
        reports: hears of overflows that nobody else wants to hear of, and of what `on_gap` raises.
        mailbox: the subscription's; its errors are counted there.
        subject: the subscription's.
        on_gap: the user's; called where the handler runs. None: there is a line in the log for the first gap, and
            `on_error` gets a SlowConsumerError for each that an overflow left.
    """

    def __init__(self, reports: Reports, mailbox: Mailbox, subject: str, on_gap: OnGap | None) -> None:
        self._reports = reports
        self._mailbox = mailbox
        self._subject = subject
        self._on_gap = on_gap
        self._warned = False

    def tell(self, batch: Batch) -> None:
        """Tell what is missing before a batch that is not plain. Raises nothing."""
        for count, reason in batch.take_gaps():
            gap = Gap(self._subject, count, reason)
            if self._on_gap is None:
                self._untold(gap)
                continue
            try:
                self._on_gap(gap)
            except BaseException as exc:  # noqa: BLE001 - the user's code; even SystemExit must not end the thread
                self._failed(exc)

    async def tell_async(self, batch: Batch) -> None:
        """The same on a loop, where `on_gap` may be a coroutine function. Raises only what ends a task or a program."""
        for count, reason in batch.take_gaps():
            gap = Gap(self._subject, count, reason)
            if self._on_gap is None:
                self._untold(gap)
                continue
            try:
                result = self._on_gap(gap)
                if inspect.isawaitable(result):
                    await result
            except Exception as exc:  # noqa: BLE001 - the user's code
                self._failed(exc)

    def _untold(self, gap: Gap) -> None:
        # Reconnects are in the log once for all subscriptions; see the session.
        level = logging.DEBUG if self._warned or gap.reason == "reconnect" else logging.WARNING
        self._warned |= level == logging.WARNING
        missed = "may have missed messages" if gap.count is None else f"missed {gap.count:,} messages"
        _log.log(level, "the subscription on %s %s (%s)", one_line(gap.subject), missed, gap.reason)
        if gap.reason == "overflow":
            self._reports.tell(SlowConsumerError(gap.subject, missed=gap.count or 0))

    def _failed(self, error: BaseException) -> None:
        self._mailbox.count_error()
        self._reports.handler_error(error, None, self._subject)
