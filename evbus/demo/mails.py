"""What the actors say to each other, and the file of mails that they say it about."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from evbus.errors import ConfigError

__all__ = [
    "EMAIL_NEW",
    "EMAIL_QUERY",
    "NOBODY_HERE",
    "EmailQuery",
    "EmailQueryResponse",
    "NewEmailCommand",
    "default_mails",
    "load_mails",
    "matches",
    "topic_of",
]

EMAIL_NEW: Final = "email.new"
EMAIL_QUERY: Final = "email.query"
#: Queries on this subject have no responder.
NOBODY_HERE: Final = "calendar.query"

#: All mails must fit into one answer, whose limit is 1 MiB.
_MAX_FILE_BYTES: Final = 512 * 1024
_FORM: Final = '[{"subject": "...", "content": "...", "send_time": "2026-11-23T09:30:00Z"}, ...]'


@dataclass(frozen=True)
class NewEmailCommand:
    """A new email has come: published on `email.new`."""

    subject: str
    content: str
    send_time: datetime


@dataclass(frozen=True)
class EmailQuery:
    """Which emails have this in their subject? Asked on `email.query`."""

    subject: str


@dataclass(frozen=True)
class EmailQueryResponse:
    """The answer to an EmailQuery."""

    emails: list[NewEmailCommand]


def matches(mail: NewEmailCommand, query: EmailQuery) -> bool:
    """Whether a mail is one that a query asks for."""
    return query.subject.casefold() in mail.subject.casefold()


def default_mails() -> Path:
    """The mails of a source checkout, which are meant to be edited; else those that come with the package."""
    checkout = Path(__file__).resolve().parents[2] / "examples" / "mails.json"
    return checkout if checkout.is_file() else Path(__file__).with_name("mails.json")


def load_mails(path: Path) -> list[NewEmailCommand]:
    """Read a file of mails.

    Raises:
        ConfigError: the file cannot be read, or does not hold at least two mails in the right form.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError("mails", f"cannot read {str(path)!r}: {why}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError("mails", f"{str(path)!r} is larger than 512 KiB; the demo wants a few mails, not all of them")
    try:
        mails = msgspec.json.decode(data, type=list[NewEmailCommand])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("mails", f"{str(path)!r} does not fit: {error}; it must look like {_FORM}") from error
    if len(mails) < 2:
        raise ConfigError("mails", f"{str(path)!r} holds {len(mails)} mails; the story needs at least 2")
    return mails


def topic_of(mails: list[NewEmailCommand]) -> str:
    """What to search for if nobody says it: the first subject, without the "Re:" of answers."""
    topic = next((mail.subject for mail in mails if mail.subject.strip()), "").strip()
    while topic.casefold().startswith("re:"):
        topic = topic[3:].strip()
    return topic
