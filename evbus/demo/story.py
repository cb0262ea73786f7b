"""What happens in the demo, in order. Every line is printed after it has happened, and checked before it is printed.

Nothing waits for time to pass: the story goes on when the actors have said that their part is done.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from evbus.demo.mails import (
    EMAIL_NEW,
    EMAIL_QUERY,
    NOBODY_HERE,
    EmailQuery,
    NewEmailCommand,
    load_mails,
    matches,
    topic_of,
)
from evbus.demo.stage import Actor, DemoError, Stage

__all__ = ["play"]

_NAME_WIDTH: Final = 14
_TEXT_WIDTH: Final = 72


def play(tell: Callable[[str], None], mails_path: Path, topic: str | None = None) -> None:
    """Play the demo.

    Args:
        tell: prints one line.
        mails_path: a JSON file with at least two mails.
        topic: what the requester looks for in the subjects; by default what the first mail is about.

    Raises:
        ConfigError: the file does not fit. Nothing was started.
        DemoError: something did not happen as promised.
    """
    mails = load_mails(mails_path)
    with Stage() as stage:
        _Story(tell, stage, mails, topic_of(mails) if topic is None else topic).play()


class _Story:
    def __init__(self, tell: Callable[[str], None], stage: Stage, mails: list[NewEmailCommand], topic: str) -> None:
        self._tell = tell
        self._stage = stage
        self._mails = mails
        self._topic = topic
        self._stored = 0

    def play(self) -> None:
        self._tell("Six processes meet on an event bus. Each line is said by one of them, once it has happened.")
        self._chapter("The bus starts on a free port, and its clients connect.")
        server = self._stage.enter("server", "server")
        facts = server.expect("ready")
        self._says(server, f"listening on {facts['address']}")
        where = (str(facts["host"]), str(facts["port"]))
        # All start at once; the order in which they speak is the story's.
        anna = self._stage.enter("Anna", "reader", *where)
        ben = self._stage.enter("Ben", "reader", *where)
        archive = self._stage.enter("archive", "archive", *where)
        service = self._stage.enter("mail service", "mail_service", *where)
        requester = self._stage.enter("requester", "requester", *where)
        for actor, words in (
            (anna, f"I subscribe to {EMAIL_NEW}"),
            (ben, f"I subscribe to {EMAIL_NEW}, too"),
            (archive, f"I store what comes on {EMAIL_NEW}, and answer queries on {EMAIL_QUERY}"),
            (service, "I am connected"),
            (requester, "So am I"),
        ):
            actor.expect("ready")
            self._says(actor, words)

        half = (len(self._mails) + 1) // 2
        self._chapter("New emails come in; everyone who subscribed hears of them.")
        self._publish(self._mails[:half], service, [anna, ben], archive)

        self._chapter("Ben has heard enough; the others go on.")
        ben.do("unsubscribe")
        ben.expect("unsubscribed")
        self._says(ben, f"I unsubscribe from {EMAIL_NEW}")
        self._publish(self._mails[half:], service, [anna], archive)
        ben.do("catch_up")
        ben.expect("caught up")  # an email on its way to him would have come, and been said, before this
        self._says(ben, "I have heard nothing of that")

        self._chapter("A query is answered by the archive, with the emails that it has stored.")
        self._query(requester, archive)

        self._chapter("A query that nobody can answer fails at once.")
        self._query_nobody(requester)

        self._chapter("Everyone leaves in order, the server last.")
        for actor in (requester, service, ben, anna, archive):
            actor.dismiss("left")
            self._says(actor, "goodbye")
        self._stop(server)

    def _publish(self, mails: list[NewEmailCommand], service: Actor, readers: list[Actor], archive: Actor) -> None:
        receivers = len(readers) + 1
        for mail in mails:
            service.do("publish", mail=mail)
            told = service.expect("published")["receivers"]
            _check(told == receivers, f"the server has {told} receivers for an email, not {receivers}")
            self._says(service, f"new email {_quoted(mail.subject)}, queued for {receivers} receivers")
            for reader in readers:
                got = msgspec.convert(reader.expect("got")["mail"], NewEmailCommand)
                _check(got == mail, f"{reader.name} got {got}, not {mail}")
                self._says(reader, f"I got {_quoted(got.subject)}, sent {_time(got)}")
            self._stored += 1
            count = archive.expect("stored")["count"]
            _check(count == self._stored, f"the archive has stored {count} emails, not {self._stored}")
            self._says(archive, f"stored, {count} in all")

    def _query(self, requester: Actor, archive: Actor) -> None:
        expected = [mail for mail in self._mails if matches(mail, EmailQuery(self._topic))]
        self._says(requester, f"which emails have {_quoted(self._topic)} in their subject?")
        requester.do("ask", subject=self._topic)
        asked = archive.expect("asked")
        _check(asked["subject"] == self._topic, f"the archive was asked for {asked['subject']!r}")
        self._says(archive, f"a query for {_quoted(asked['subject'])}: I have {_emails(asked['count'])}")
        found = msgspec.convert(requester.expect("answered")["emails"], list[NewEmailCommand])
        _check(found == expected, f"the requester got {found}, not {expected}")
        self._says(requester, f"I got {_emails(len(found))}" + (":" if found else ""))
        for mail in found:
            self._says(None, f"- {_quoted(mail.subject)}, sent {_time(mail)}")
            self._says(None, f"  {_one_line(mail.content)}")

    def _query_nobody(self, requester: Actor) -> None:
        self._says(requester, f"what does {NOBODY_HERE} say?")
        requester.do("ask_nobody")
        refused = requester.expect("refused")
        seconds, timeout = refused["seconds"], refused["timeout"]
        _check(seconds < timeout / 2, f"the requester was told after {seconds:.1f} s that nobody answers, not at once")
        self._says(requester, f"told after {seconds * 1000:.1f} ms, without waiting for the timeout of {timeout:g} s:")
        self._says(None, refused["word"].partition(";")[0])

    def _stop(self, server: Actor) -> None:
        stats = server.dismiss("stopped")["stats"]
        closed = {reason: count for reason, count in stats["closed"].items() if count}
        _check(closed == {"client_closed": 5}, f"the connections ended like this: {closed}")
        _check(stats["dropped_slow"] == 0, f"{stats['dropped_slow']} messages were dropped")
        served, lost = stats["connections_accepted"], stats["undelivered_bytes"]
        _check((served, lost) == (5, 0), f"{served} connections were served, and {lost} bytes not delivered")
        self._says(server, f"stopped; {served} connections served, nothing dropped, nothing left undelivered")

    def _chapter(self, title: str) -> None:
        self._tell("")
        self._tell(title)

    def _says(self, actor: Actor | None, words: str) -> None:
        name = f"{actor.name}:" if actor else ""
        self._tell(f"  {name:<{_NAME_WIDTH}}{words}")


def _check(is_true: bool, otherwise: str) -> None:
    if not is_true:
        raise DemoError(otherwise)


def _emails(count: int) -> str:
    return "1 email" if count == 1 else f"{count or 'no'} emails"


def _quoted(text: str) -> str:
    return f'"{_one_line(text)}"'


def _one_line(text: str) -> str:
    """A text of the reader's file on one line, without what would disturb a terminal."""
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= _TEXT_WIDTH else line[: _TEXT_WIDTH - 3] + "..."


def _time(mail: NewEmailCommand) -> str:
    return mail.send_time.isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")
