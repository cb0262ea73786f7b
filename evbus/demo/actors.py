"""The processes of the demo. Each is a client of the bus (one is the server) that does what the stage tells it.

The stage writes one JSON object a line to an actor's standard input, {"do": "publish", ...}, and the actor writes one a
line to its standard output, {"event": "published", ...}. When its input ends, an actor leaves in order: so none
outlives the stage, whatever happens to that.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from evbus.client import EventClient
from evbus.demo.mails import (
    EMAIL_NEW,
    EMAIL_QUERY,
    NOBODY_HERE,
    EmailQuery,
    EmailQueryResponse,
    NewEmailCommand,
    matches,
)
from evbus.errors import NoRespondersError
from evbus.message import Message
from evbus.server import EventServer

__all__ = ["main"]

#: Seconds. Nothing in the demo takes anywhere near as long.
_TIMEOUT_S: Final = 15.0


class Stage:
    """The actor's side of the two pipes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def tell(self, event: str, **facts: object) -> None:
        """Something has happened. Any thread."""
        line = msgspec.json.encode({"event": event, **facts})
        with self._lock:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()

    def obey(self, commands: dict[str, Callable[..., object]]) -> None:
        """Do what the stage says until it has nothing more to say."""
        for line in sys.stdin.buffer:
            order: dict[str, Any] = msgspec.json.decode(line)
            commands[order.pop("do")](**order)


def server(stage: Stage) -> None:
    """The event server, inside a process of its own."""
    with EventServer(port=0) as bus:
        stage.tell("ready", host="127.0.0.1", port=bus.port, address=bus.address)
        stage.obey({})
    stage.tell("stopped", stats=bus.stats())


def mail_service(stage: Stage, client: EventClient) -> None:
    """Publishes a command for each new email."""

    def publish(mail: object) -> None:
        command = msgspec.convert(mail, NewEmailCommand)
        receipt = client.publish(EMAIL_NEW, command, confirm=True, timeout=_TIMEOUT_S)
        assert receipt is not None
        stage.tell("published", receivers=receipt.receivers)

    stage.tell("ready")
    stage.obey({"publish": publish})


def reader(stage: Stage, client: EventClient) -> None:
    """Wants to hear of new emails, for a while at least."""

    def on_mail(mail: NewEmailCommand) -> None:
        stage.tell("got", mail=mail)

    subscription = client.subscribe(EMAIL_NEW, on_mail)

    def unsubscribe() -> None:
        client.unsubscribe(subscription)
        stage.tell("unsubscribed")

    def catch_up() -> None:
        # The server handles and sends in order: once it has answered, everything before is here.
        client.flush(timeout=_TIMEOUT_S)
        stage.tell("caught up")

    stage.tell("ready")
    stage.obey({"unsubscribe": unsubscribe, "catch_up": catch_up})


def archive(stage: Stage, client: EventClient) -> None:
    """Stores every email, and answers queries for them."""
    stored: list[NewEmailCommand] = []

    @client.on(EMAIL_NEW)
    def store(mail: NewEmailCommand) -> None:
        stored.append(mail)
        stage.tell("stored", count=len(stored))

    @client.on_query(EMAIL_QUERY)
    def find(query: EmailQuery) -> EmailQueryResponse:
        found = [mail for mail in stored if matches(mail, query)]
        stage.tell("asked", subject=query.subject, count=len(found))
        return EmailQueryResponse(found)

    stage.tell("ready")
    stage.obey({})


def requester(stage: Stage, client: EventClient) -> None:
    """Asks for emails, and for something that nobody knows."""

    def ask(subject: str) -> None:
        answer = client.query(EMAIL_QUERY, EmailQuery(subject), EmailQueryResponse, timeout=_TIMEOUT_S)
        stage.tell("answered", emails=answer.emails)

    def ask_nobody() -> None:
        began = time.monotonic()
        try:
            client.query(NOBODY_HERE, "what is on today?", str, timeout=_TIMEOUT_S)
        except NoRespondersError as error:
            stage.tell("refused", word=str(error), seconds=time.monotonic() - began, timeout=_TIMEOUT_S)
        else:
            stage.tell("answered")

    stage.tell("ready")
    stage.obey({"ask": ask, "ask_nobody": ask_nobody})


_CLIENTS: Final[dict[str, Callable[[Stage, EventClient], None]]] = {
    "mail_service": mail_service,
    "reader": reader,
    "archive": archive,
    "requester": requester,
}


def main(role: str, name: str, host: str = "", port: str = "0") -> None:
    """Play a role until standard input ends."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the stage blocks signals while it starts us
    stage = Stage()
    if role == "server":
        server(stage)
        return
    with EventClient(host, int(port), name=name, on_error=_report) as client:
        _CLIENTS[role](stage, client)
    # Here every handler has ended, so nothing can be told after this.
    stage.tell("left")


def _report(error: BaseException, _message: Message | None) -> None:
    """An error that no call raised: on standard error, where the reader of the demo sees it."""
    sys.stderr.write(f"{type(error).__name__}: {error}\n")
