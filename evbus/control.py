"""What a server says that is not a message: outcomes of requests, errors, heartbeats, farewells."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from evbus._frame import unpack
from evbus.errors import EvbusError, QueryTimeoutError, RefusedError, ResponderLostError, error_from_server
from evbus.message import Receipt
from evbus.reports import one_line
from evbus.wire import EndReason, ErrorCode, ObjectId, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from evbus._inbox import Waiter
    from evbus.correlation import Correlation
    from evbus.registrar import Registrar
    from evbus.reports import Reports

__all__ = ["Control"]

_log = logging.getLogger("evbus.client")

# Words of a peer that are kept; the rest is cut.
_MAX_TEXT = 1024
# The longest that a server can keep us away.
_MAX_RETRY_AFTER_S = 60.0


class Control:
    """Reads control packets on the core's thread, and tells those whom they concern. What is not well formed is
    counted.

    Attributes:
        parting_words: why the server says that it will end the connection; empty if it has not.
        retry_after_s: how long it wants us to wait then before we come back.
        late_answers: answers of ours that came when nobody waited for them any more, and failures that came to us so.
        malformed: packets that could not be read.
    """

    def __init__(self, correlation: Correlation, registrar: Registrar, reports: Reports) -> None:
        self.parting_words = ""
        self.retry_after_s = 0.0
        self.late_answers = 0
        self.malformed = 0
        self._correlation = correlation
        self._inbox = correlation.inbox
        self._registrar = registrar
        self._reports = reports
        self._handlers: dict[int, tuple[str, Callable[..., None]]] = {
            int(ObjectId.RESPONSE): ("bBs", self._on_response),
            int(ObjectId.ERROR): ("biss", self._on_error),
            int(ObjectId.RECEIPT): ("bii", self._on_receipt),
            int(ObjectId.QUERY_END): ("bBi", self._on_query_end),
            int(ObjectId.HEARTBEAT): ("i", self._on_heartbeat),
            int(ObjectId.GO_AWAY): ("iis", self._on_go_away),
        }

    def handle(self, object_id: int, system_id: int, body: bytes) -> None:
        """One packet."""
        layout, handler = self._handlers[object_id]
        fields = unpack(body, layout)
        if fields is None:
            self.malformed += 1
        else:
            handler(system_id, *fields)

    def _on_response(self, _system_id: int, task_id: bytes, status: int, text: str) -> None:
        waiter = self._inbox.pop_waiter(task_id)
        if status == Status.SUCCESS:
            self._registrar.answered(task_id, None)
            if waiter is not None:
                waiter.resolve(Receipt(-1))
            return
        self._failed(task_id, waiter, RefusedError(0, waiter.subject if waiter is not None else "", text[:_MAX_TEXT]))

    def _on_error(self, system_id: int, task_id: bytes, code: int, subject: str, text: str) -> None:
        waiter = self._inbox.find_waiter(task_id) if task_id else None
        if waiter is None and (system_id or code == ErrorCode.UNKNOWN_QUERY):
            # Our answer came when the asker had gone or had another one, or a failure came after its query had ended.
            self.late_answers += 1
            _log.debug("an answer on %s came too late", one_line(subject[:_MAX_TEXT]))
            return
        error = error_from_server(
            code,
            subject[:_MAX_TEXT],
            text[:_MAX_TEXT],
            sender=system_id,
            action=waiter.action if waiter is not None else "",
            timeout=waiter.timeout if waiter is not None else 0.0,
        )
        if waiter is not None and waiter.many and system_id:
            waiter.push(error)  # one of several; the others may still answer
            return
        if waiter is not None:
            self._inbox.pop_waiter(task_id)
        self._failed(task_id, waiter, error)

    def _failed(self, task_id: bytes, waiter: Waiter | None, error: EvbusError) -> None:
        self._registrar.answered(task_id, error)
        heard = waiter is not None and waiter.notify is not None
        if waiter is not None:
            waiter.fail(error)
        if not heard:
            self._reports.server_error(error)

    def _on_receipt(self, _system_id: int, task_id: bytes, receivers: int, dropped: int) -> None:
        waiter = self._inbox.pop_waiter(task_id)
        if waiter is not None:
            waiter.resolve(Receipt(receivers, dropped))

    def _on_query_end(self, system_id: int, task_id: bytes, reason: int, _replies: int) -> None:
        if system_id:  # the end of one responder, not of the query
            waiter = self._inbox.find_waiter(task_id)
            if waiter is not None and waiter.many:
                waiter.push(ResponderLostError(waiter.subject, system_id))
            return
        waiter = self._inbox.pop_waiter(task_id)
        if waiter is None:
            return
        if reason == EndReason.COMPLETE or (waiter.many and reason == EndReason.RESPONDER_LOST):
            waiter.resolve(None)  # of many, each one that was lost has been told
        elif reason == EndReason.DEADLINE:
            waiter.fail(QueryTimeoutError(waiter.subject, waiter.timeout))
        else:
            waiter.fail(ResponderLostError(waiter.subject))

    def _on_heartbeat(self, _system_id: int, beat: int) -> None:
        waiter = self._correlation.beat_heard(beat) if beat else None
        if waiter is not None:
            waiter.resolve(None)

    def _on_go_away(self, _system_id: int, reason: int, retry_after_ms: int, text: str) -> None:
        self.retry_after_s = min(max(retry_after_ms, 0) / 1000, _MAX_RETRY_AFTER_S)
        self.parting_words = one_line(text[:_MAX_TEXT]) or f"the server said goodbye (reason {reason})"
