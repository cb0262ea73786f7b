"""What type checkers must reject: one mistake on each line that is marked."""

from dataclasses import dataclass

import evbus
from evbus import EventClient, EventRouter


@evbus.event("email.new")
@dataclass
class NewEmail:
    title: str


@dataclass
class EmailQuery(evbus.Query[list[NewEmail]], subject="email.find"):
    word: str


def takes_number(number: int) -> None: ...


def takes_email(email: NewEmail) -> None: ...


def finds_text(query: EmailQuery) -> str:
    return query.word


def finds_by_email(query: NewEmail) -> list[NewEmail]:
    return [query]


def use(bus: EventClient, router: EventRouter) -> None:
    bus.on(NewEmail)(takes_number)  # BAD
    router.on(NewEmail)(takes_number)  # BAD
    bus.subscribe(NewEmail, takes_number)  # BAD
    bus.on_query(EmailQuery)(takes_email)  # BAD
    bus.on_query(EmailQuery)(finds_text)  # BAD
    bus.on_query(EmailQuery)(finds_by_email)  # BAD
    router.on_query(EmailQuery)(finds_text)  # BAD
    answer: int = bus.query(EmailQuery("Lunch"))  # BAD
    bus.query(EmailQuery("Lunch"), EmailQuery("Lunch"))  # BAD
    bus.publish(NewEmail("Lunch"), NewEmail("Lunch"))  # BAD
    bus.on(NewEmail("Lunch"))  # BAD
    bus.include("router")  # BAD
    router.include(bus)  # BAD
    evbus.event(NewEmail)  # BAD
    print(answer)
