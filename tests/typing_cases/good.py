"""What type checkers must accept, and the types they must infer."""

from dataclasses import dataclass
from typing import TypedDict

import msgspec
from typing_extensions import assert_type

import evbus
from evbus import AsyncEventClient, EventClient, EventRouter, Message, Receipt, Reply


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

    assert_type(bus.publish_many(NewEmail, [NewEmail("Lunch")]), int)
    bus.publish_many("email.new", (b"", {"title": "Lunch"}), no_echo=True)
    for reply in bus.query_all(EmailQuery("Lunch")):
        assert_type(reply, Reply[EmailList])
        assert_type(reply.value, EmailList)
    with bus.query_all("email.find", {"word": "Lunch"}, EmailList) as replies:
        assert_type(next(replies).value, EmailList)
    assert_type(next(bus.query_all("email.other", EmailCount("Lunch"))).value, int)

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


async def use_async(bus: AsyncEventClient, router: EventRouter) -> None:
    assert_type(await bus.publish(NewEmail("Lunch")), Receipt | None)
    await bus.publish(NewEmail("Lunch"), confirm=True, headers={"by": "hand"})
    await bus.publish(Seen, {"title": "Lunch"}, no_echo=True)
    assert_type(await bus.publish_many(NewEmail, [NewEmail("Lunch")]), int)

    assert_type(await bus.query(EmailQuery("Lunch")), EmailList)
    assert_type(await bus.query(EmailCount("Lunch"), timeout=1), int)
    assert_type(await bus.query("email.other", EmailQuery("Lunch")), EmailList)
    assert_type(await bus.query("email.find", {"word": "Lunch"}, EmailList), EmailList)
    assert_type(await bus.query(NewEmail("Lunch"), response=int), int)
    async for reply in bus.query_all(EmailQuery("Lunch")):
        assert_type(reply, Reply[EmailList])
        assert_type(reply.value, EmailList)

    @bus.on(NewEmail, group="workers")
    async def store(email: NewEmail) -> int:
        return len(email.title)

    assert_type(await store(NewEmail("Lunch")), int)

    @bus.on(NewEmail)
    def audit(message: Message) -> None:
        print(message.headers)

    @bus.on_query(EmailQuery)
    async def find(query: EmailQuery) -> EmailList:
        return EmailList([NewEmail(query.word)])

    assert_type(await find(EmailQuery("Lunch")), EmailList)

    @bus.on_query(EmailCount)
    def count(query: EmailCount) -> int:
        return len(query.word)

    assert_type(count(EmailCount("Lunch")), int)

    @router.on_query(EmailCount)
    async def routed_count(query: EmailCount) -> int:
        return len(query.word)

    await bus.subscribe(NewEmail, store)
    await bus.subscribe(NewEmail, lambda email: print(email.title))
    assert_type(await (await bus.subscribe(NewEmail)).next(), Message)
    await bus.unsubscribe(NewEmail, store)
    await bus.include(router)
