"""EventRouter: what is declared, and what a client makes of it."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import evbus
from evbus import ConfigError, EventClient, EventRouter, EventServer, InvalidSubjectError, Message


@evbus.event("email.new")
@dataclass
class NewEmail:
    title: str


@dataclass
class EmailQuery(evbus.Query[list[str]], subject="email.find"):
    word: str


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def bus(server: EventServer) -> Iterator[EventClient]:
    with evbus.connect(server.address) as client:
        yield client


def subjects(router: EventRouter) -> list[Any]:
    return [one.subject for one in router.declared()]


def test_handlers_stay_as_they_are_and_are_declared_in_order() -> None:
    router = EventRouter()

    def handler(message: Message) -> None: ...

    assert router.on("a.*")(handler) is handler
    assert router.on_query("b")(handler) is handler
    assert router.on(NewEmail)(handler) is handler
    assert subjects(router) == ["a.*", "b", NewEmail]
    assert repr(router) == "<EventRouter, 3 handlers>"


def test_a_prefix_stands_before_text_and_not_before_a_class() -> None:
    router = EventRouter("shop")
    router.on("order.new")(print)
    router.on(NewEmail)(print)
    outer = EventRouter("eu.west")
    outer.include(router)
    outer.on("x.>")(print)
    assert router.prefix == "shop"
    assert subjects(router) == ["shop.order.new", NewEmail]
    assert subjects(outer) == ["eu.west.shop.order.new", NewEmail, "eu.west.x.>"]
    assert repr(outer) == "<EventRouter, prefix 'eu.west', 3 handlers>"


def test_what_an_included_router_gets_later_counts() -> None:
    outer, inner = EventRouter(), EventRouter()
    outer.include(inner)
    inner.on("late")(print)
    assert subjects(outer) == ["late"]


def test_routers_do_not_go_in_circles() -> None:
    first, second, third = EventRouter(), EventRouter(), EventRouter()
    first.include(second)
    second.include(third)
    for router in (first, third):
        with pytest.raises(ConfigError, match="cannot include itself"):
            third.include(router)
    with pytest.raises(TypeError, match="a router includes routers, not a value of type str"):
        first.include("second")


@pytest.mark.parametrize("prefix", ["shop.", "a..b", "*", "shop.>"])
def test_a_bad_prefix(prefix: str) -> None:
    with pytest.raises(InvalidSubjectError):
        EventRouter(prefix)


def test_mistakes_show_where_they_are_made() -> None:
    router = EventRouter("a" * 200)
    with pytest.raises(InvalidSubjectError):
        router.on("a..b")
    with pytest.raises(InvalidSubjectError, match="256"):
        router.on("b" * 100)
    with pytest.raises(TypeError, match="int has no subject"):
        router.on(int)
    with pytest.raises(TypeError, match="a subject is text"):
        router.on_query(5)
    with pytest.raises(TypeError, match="a handler is a function"):
        router.on("b")(5)
    assert subjects(router) == []


def test_a_subject_that_becomes_too_long() -> None:
    inner, outer = EventRouter(), EventRouter("a" * 200)
    inner.on("b" * 100)(print)
    outer.include(inner)
    with pytest.raises(InvalidSubjectError):
        subjects(outer)


def test_a_client_includes_a_router(bus: EventClient) -> None:
    router, got = EventRouter("shop"), queue.Queue[Any]()

    @router.on("order.*", group="workers", concurrency=2)
    def order(number: int) -> None:
        got.put(number)

    @router.on(NewEmail, max_pending_msgs=7, overflow="drop_oldest")
    def email(mail: NewEmail) -> None:
        got.put(mail)

    @router.on_query(EmailQuery)
    def find(query: EmailQuery) -> list[str]:
        return [query.word]

    made = bus.include(router)
    assert [(one.subject, one.group, one.handler) for one in made] == [
        ("shop.order.*", "workers", order),
        ("email.new", None, email),
        ("email.find", None, find),
    ]
    bus.publish("shop.order.new", 5)
    assert got.get(timeout=10) == 5
    bus.publish(NewEmail("Lunch"))
    assert got.get(timeout=10) == NewEmail("Lunch")
    assert bus.query(EmailQuery("Lunch")) == ["Lunch"]


def test_two_clients_may_include_one_router(bus: EventClient, server: EventServer) -> None:
    router, got = EventRouter(), queue.Queue[str]()
    router.on("twice", type=str)(got.put)
    with evbus.connect(server.address) as other:
        assert len(bus.include(router)) == len(other.include(router)) == 1
        receipt = bus.publish("twice", "hello", confirm=True)
        assert receipt is not None
        assert receipt.receivers == 2
        assert [got.get(timeout=10), got.get(timeout=10)] == ["hello", "hello"]


def test_a_client_that_is_not_connected_yet(server: EventServer) -> None:
    router, got = EventRouter(), queue.Queue[str]()
    router.on("early", type=str)(got.put)
    client = EventClient("127.0.0.1", server.port)
    client.include(router)
    with client:
        client.publish("early", "hello")
        assert got.get(timeout=10) == "hello"


def test_all_or_none(bus: EventClient) -> None:
    router = EventRouter()
    router.on("first")(lambda message: None)

    @router.on("second")
    def no_argument() -> None: ...

    with pytest.raises(TypeError, match="must take one argument"):
        bus.include(router)
    receipt = bus.publish("first", confirm=True)
    assert receipt is not None
    assert receipt.receivers == 0
