"""What type checkers must accept, and the types they must infer."""

from dataclasses import dataclass
from typing import TypedDict

import msgspec
from typing_extensions import assert_type

import evbus
from evbus import EventClient, EventRouter, Message, Receipt


@evbus.event("email.new")
@dataclass
class NewEmail:
    title: str


@dataclass
class EmailList:
    emails: list[NewEmail]


@dataclass
class EmailQuery(evbus.Query[EmailList], subject="email.find"):
    word: str


@evbus.event("email.count")
class EmailCount(evbus.Query[int], msgspec.Struct):
    word: str


@evbus.event("email.seen")
class Seen(TypedDict):
    title: str


def use(bus: EventClient, router: EventRouter) -> None:
    assert_type(bus.publish(NewEmail("Lunch")), Receipt | None)
    bus.publish("email.new", NewEmail("Lunch"), confirm=True)
    bus.publish(NewEmail("Lunch"), confirm=True, headers={"by": "hand"})
    bus.publish(Seen, {"title": "Lunch"})

    assert_type(bus.query(EmailQuery("Lunch")), EmailList)
    assert_type(bus.query(EmailCount("Lunch"), timeout=1), int)
    assert_type(bus.query("email.other", EmailQuery("Lunch")), EmailList)
    assert_type(bus.query("email.find", {"word": "Lunch"}, EmailList), EmailList)
    assert_type(bus.query("email.find", response=EmailList), EmailList)
    assert_type(bus.query(NewEmail("Lunch"), response=int), int)
    assert_type(bus.query(Seen, {"title": "Lunch"}, int), int)

    @bus.on(NewEmail, group="workers")
    def store(email: NewEmail) -> int:
        return len(email.title)

    assert_type(store(NewEmail("Lunch")), int)

    @bus.on(NewEmail)
    def audit(message: Message) -> None:
        print(message.headers)

    @bus.on(NewEmail)
    def anything(thing: object) -> None:
        print(thing)

    @bus.on(NewEmail, type=dict)
    def plain(email: dict[str, str]) -> None:
        print(email)

    @bus.on(Seen)
    def seen(mail: Seen) -> None:
        print(mail["title"])

    @bus.on("email.*")
    def old(email: NewEmail) -> None:
        print(email)

    @bus.on_query(EmailQuery)
    def find(query: EmailQuery) -> EmailList:
        return EmailList([NewEmail(query.word)])

    assert_type(find(EmailQuery("Lunch")), EmailList)

    @bus.on_query(EmailQuery)
    def later(message: Message) -> None:
        message.reply(EmailList([]))

    @bus.on_query(NewEmail)
    def confirm(email: NewEmail) -> bool:
        return bool(email.title)

    bus.subscribe(NewEmail, store)
    bus.subscribe(NewEmail, audit)
    bus.subscribe(NewEmail, lambda email: print(email.title))
    bus.subscribe(NewEmail, print, type=dict)
    assert_type(bus.subscribe(NewEmail).next(), Message)
    bus.unsubscribe(NewEmail, store)

    @router.on(NewEmail)
    def routed(email: NewEmail) -> None:
        print(email)

    @router.on("email.new")
    def routed_too(email: NewEmail) -> None:
        print(email)

    @router.on_query(EmailQuery)
    def routed_find(query: EmailQuery) -> EmailList:
        return EmailList([NewEmail(query.word)])

    router.include(EventRouter("shop"))
    bus.include(router)
