"""What type checkers must reject: one mistake on each line that is marked."""

from dataclasses import dataclass

import evbus
from evbus import AsyncEventClient, EventClient, EventRouter


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


async def finds_text_later(query: EmailQuery) -> str:
    return query.word


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
    value: int = next(bus.query_all(EmailQuery("Lunch"))).value  # BAD
    print(value)
    print(answer)


async def use_async(bus: AsyncEventClient, router: EventRouter) -> None:
    bus.on(NewEmail)(takes_number)  # BAD
    await bus.subscribe(NewEmail, takes_number)  # BAD
    bus.on_query(EmailQuery)(takes_email)  # BAD
    bus.on_query(EmailQuery)(finds_text)  # BAD
    bus.on_query(EmailQuery)(finds_text_later)  # BAD
    router.on_query(EmailQuery)(finds_text_later)  # BAD
    answer: int = await bus.query(EmailQuery("Lunch"))  # BAD
    await bus.publish(NewEmail("Lunch"), NewEmail("Lunch"))  # BAD
    async for reply in bus.query_all(EmailQuery("Lunch")):
        answer = reply.value  # BAD
    print(answer)
