"""Classes with a subject: how they are marked, and what publish, subscribe and query make of them."""

from __future__ import annotations

import enum
import json
import queue
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import msgspec
import pytest
from helpers_cli import Program

import evbus
from evbus import CodecError, ConfigError, EventClient, EventServer, InvalidSubjectError, Message
from evbus.events import address_of, response_of, subject_of, subscribed
from evbus.payload import OMITTED, decode, encode
from evbus.wire import Codec

pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")


@evbus.event("email.new")
@dataclass
class NewEmail:
    title: str


@dataclass(slots=True)
@evbus.event("email.slotted")
class Slotted:
    title: str


@evbus.event("email.struct")
class Struct(msgspec.Struct):
    title: str


@evbus.event("email.typed")
class Typed(TypedDict):
    title: str


@evbus.event("email.model")
class Model(pydantic.BaseModel):
    title: str = pydantic.Field(min_length=1)


@dataclass
class EmailList:
    emails: list[NewEmail]


@dataclass
class EmailQuery(evbus.Query[EmailList], subject="email.find"):
    word: str


@dataclass(slots=True)
class SlottedQuery(evbus.Query[int], subject="email.slots"):
    word: str


@evbus.event("email.count")
class StructQuery(evbus.Query[int], msgspec.Struct):
    word: str


class ModelQuery(pydantic.BaseModel, evbus.Query[list[Model]], subject="email.models"):
    word: str


@evbus.event("email.unsaid")
class Unsaid(evbus.Query):
    pass


T = TypeVar("T")
S = TypeVar("S")


class Page(evbus.Query[list[T]], Generic[T]):
    pass


class Pair(evbus.Query[dict[S, T]], Generic[T, S]):
    pass


class Direct(evbus.Query[T], Generic[T]):
    pass


@dataclass
class Mails(Page[NewEmail], subject="mails.page"):
    pass


@dataclass
class Later(evbus.Query["DefinedBelow"], subject="later"):
    pass


@dataclass
class DefinedBelow:
    number: int


@pytest.fixture(scope="module")
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running


@pytest.fixture
def bus(server: EventServer) -> Iterator[EventClient]:
    with evbus.connect(server.address) as client:
        yield client


# --- marking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "subject"),
    [
        (NewEmail, "email.new"),
        (Slotted, "email.slotted"),
        (Struct, "email.struct"),
        (Typed, "email.typed"),
        (Model, "email.model"),
        (EmailQuery, "email.find"),
        (SlottedQuery, "email.slots"),
        (StructQuery, "email.count"),
        (ModelQuery, "email.models"),
        (Mails, "mails.page"),
    ],
)
def test_the_subject_of_a_class(cls: type, subject: str) -> None:
    assert subject_of(cls) == subject


def test_a_subject_is_inherited_and_can_be_another_in_a_subclass() -> None:
    class Urgent(NewEmail):
        pass

    @evbus.event("email.spam")
    class Spam(NewEmail):
        pass

    assert subject_of(Urgent) == "email.new"
    assert subject_of(Spam) == "email.spam"
    assert subject_of(NewEmail) == "email.new"


def test_an_enum_can_be_an_event() -> None:
    @evbus.event("light")
    class Light(enum.Enum):
        RED = 1

    assert address_of(Light.RED, OMITTED) == ("light", Light.RED)


def test_the_same_subject_again_is_no_mistake_and_another_is() -> None:
    evbus.event("email.new")(NewEmail)
    with pytest.raises(ConfigError, match=r"NewEmail has the subject 'email.new' already, so not 'email.old' too"):
        evbus.event("email.old")(NewEmail)
    with pytest.raises(ConfigError, match=r"EmailQuery has the subject 'email.find' already"):
        evbus.event("email.new")(EmailQuery)
    assert subject_of(NewEmail) == "email.new"


@pytest.mark.parametrize("subject", ["email.*", "email.>", ">", "*"])
def test_a_wildcard(subject: str) -> None:
    with pytest.raises(ConfigError, match="a class stands for one subject"):
        evbus.event(subject)
    with pytest.raises(ConfigError, match="a class stands for one subject"):

        class Pattern(evbus.Query[int], subject=subject):
            pass


@pytest.mark.parametrize("subject", ["", "a..b", ".a", "a" * 300])
def test_no_subject_at_all(subject: str) -> None:
    with pytest.raises(InvalidSubjectError):
        evbus.event(subject)


def test_a_decorator_without_a_subject() -> None:
    with pytest.raises(TypeError, match=r'write @evbus.event\("some.subject"\), not NewEmail'):
        evbus.event(NewEmail)


def test_only_classes_have_subjects() -> None:
    with pytest.raises(TypeError, match="only a class can have a subject"):
        evbus.event("a")(lambda: None)


# --- where a message goes ---------------------------------------------------------------------------------------------


def test_addresses() -> None:
    mail = NewEmail("Lunch")
    assert address_of("a", mail) == ("a", mail)
    assert address_of(mail, OMITTED) == ("email.new", mail)
    assert address_of(NewEmail, mail) == ("email.new", mail)
    assert address_of(Typed, {"title": "Lunch"}) == ("email.typed", {"title": "Lunch"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (EmailList([]), OMITTED),
            "EmailList has no subject: give one, or name it where the class is made",
        ),
        ((b"payload", OMITTED), "bytes has no subject"),
        (({"title": "Lunch"}, OMITTED), "dict has no subject"),
        ((None, OMITTED), "NoneType has no subject"),
        (
            (NewEmail, OMITTED),
            "the message must be one of its objects: there is none",
        ),
        (
            (NewEmail, Slotted("a")),
            "the message must be one of its objects: this is a value of type Slotted",
        ),
        (
            (Typed, "text"),
            "the message must be one of its objects: this is a value of type str",
        ),
        ((NewEmail("a"), "b"), "a value of type NewEmail is a message already"),
        ((NewEmail("a"), None), "no room for a value of type NoneType"),
    ],
)
def test_what_has_no_address(arguments: tuple[object, object], words: str, bus: EventClient) -> None:
    with pytest.raises(TypeError, match=words):
        address_of(*arguments)
    with pytest.raises(TypeError, match=words):
        bus.publish(*arguments)
    with pytest.raises(TypeError, match=words):
        bus.query(*arguments)


def test_bytes_for_a_class(bus: EventClient) -> None:
    """They take the short way, which knows no classes."""
    with pytest.raises(TypeError):
        bus.publish(NewEmail, b"payload")


# --- what a handler gets ----------------------------------------------------------------------------------------------


def test_what_handlers_are_given() -> None:
    def plain(email): ...
    def same(email: NewEmail): ...
    def base(email: object): ...
    def optional(email: NewEmail | None): ...
    def envelope(message: Message): ...
    def typed(mail: Typed): ...

    def anything(email: Any): ...

    for handler in (plain, same, base, optional, anything, lambda email: None, print):
        assert subscribed(NewEmail, handler, None) == ("email.new", NewEmail)
    assert subscribed(NewEmail, envelope, None) == ("email.new", Message)
    assert subscribed(NewEmail, envelope, dict) == ("email.new", dict)
    assert subscribed(NewEmail, None, None) == ("email.new", None)
    assert subscribed(Typed, typed, None) == ("email.typed", Typed)
    assert subscribed("a.*", envelope, None) == ("a.*", None)


def test_a_handler_of_something_else(bus: EventClient) -> None:
    with pytest.raises(TypeError, match=r"takes Slotted, and messages on 'email.new' are NewEmail"):

        @bus.on(NewEmail)
        def wrong(email: Slotted) -> None: ...

    with pytest.raises(TypeError, match="coroutine function"):

        @bus.on(NewEmail)
        async def later(email: NewEmail) -> None: ...


@pytest.mark.parametrize("what", [EmailList, 5, NewEmail("a"), None])
def test_subscribing_to_what_has_no_subject(what: Any, bus: EventClient) -> None:
    words = "EmailList has no subject" if what is EmailList else "a subject is text, or a class that has one"
    for call in (bus.subscribe, bus.on, bus.on_query, bus.unsubscribe):
        with pytest.raises(TypeError, match=words):
            result = call(what)
            result(print)


# --- on a bus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mail", [NewEmail("a"), Slotted("a"), Struct("a"), Model(title="a")], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("codec", ["msgpack", "json"])
def test_publish_and_on(mail: Any, codec: str, server: EventServer) -> None:
    got: queue.Queue[Any] = queue.Queue()
    with evbus.connect(server.address, codec=codec) as bus:

        @bus.on(type(mail))
        def store(email: Any) -> None:
            got.put(email)

        receipt = bus.publish(mail, confirm=True)
        assert receipt is not None
        assert receipt.receivers == 1
        assert got.get(timeout=10) == mail
        bus.publish(type(mail), mail)
        assert got.get(timeout=10) == mail
        bus.unsubscribe(type(mail), store)
        receipt = bus.publish(mail, confirm=True)
        assert receipt is not None
        assert receipt.receivers == 0


def test_a_typed_dict(bus: EventClient) -> None:
    got: queue.Queue[Any] = queue.Queue()
    bus.subscribe(Typed, got.put)
    bus.publish(Typed, {"title": "Lunch"})
    assert got.get(timeout=10) == {"title": "Lunch"}


def test_the_envelope_and_iteration(bus: EventClient) -> None:
    got: queue.Queue[Message] = queue.Queue()

    @bus.on(NewEmail)
    def audit(message: Message) -> None:
        got.put(message)

    with bus.subscribe(NewEmail) as mails:
        bus.publish(NewEmail("Lunch"), headers={"by": "hand"})
        assert got.get(timeout=10).headers == {"by": "hand"}
        assert mails.next(timeout=10).decode(NewEmail) == NewEmail("Lunch")


def test_query(bus: EventClient) -> None:
    @bus.on_query(EmailQuery)
    def find(query: EmailQuery) -> EmailList:
        return EmailList([NewEmail(query.word)])

    expected = EmailList([NewEmail("Lunch")])
    assert bus.query(EmailQuery("Lunch")) == expected
    assert bus.query("email.find", EmailQuery("Lunch")) == expected
    assert bus.query(EmailQuery, EmailQuery("Lunch"), EmailList) == expected
    assert bus.query(EmailQuery("Lunch"), response=dict) == {"emails": [{"title": "Lunch"}]}
    assert bus.query("email.find", {"word": "Lunch"}) == {"emails": [{"title": "Lunch"}]}
    bus.unsubscribe(EmailQuery)
    with pytest.raises(evbus.NoRespondersError, match=r"email\.find"):
        bus.query(EmailQuery("Lunch"))


def test_query_of_a_struct_with_slots_and_of_models(bus: EventClient) -> None:
    bus.on_query(StructQuery)(lambda query: len(query.word))
    bus.on_query(SlottedQuery)(lambda query: len(query.word))
    bus.on_query(ModelQuery)(lambda query: [Model(title=query.word)])
    assert bus.query(StructQuery("Lunch")) == 5
    assert bus.query(SlottedQuery("Lunch")) == 5
    assert bus.query(ModelQuery(word="Lunch")) == [Model(title="Lunch")]


def test_an_answer_that_does_not_fit(bus: EventClient) -> None:
    bus.on_query(EmailQuery)(lambda query: "text")
    with pytest.raises(CodecError, match="EmailList") as caught:
        bus.query(EmailQuery("Lunch"))
    assert caught.value.subject == "email.find"


# --- what a query says of its answer ----------------------------------------------------------------------------------


def test_responses() -> None:
    @dataclass
    class Turned(Pair[int, str], subject="turned"):
        pass

    @dataclass
    class Straight(Direct[NewEmail], subject="direct"):
        pass

    @dataclass
    class Deeper(Straight):
        pass

    @dataclass
    class Nothing(evbus.Query[None], subject="nothing"):
        pass

    @dataclass
    class Itself(evbus.Query["Itself"], subject="itself"):
        pass

    assert response_of(NewEmail("a")) is None
    assert response_of(EmailQuery("a")) is EmailList
    assert response_of(StructQuery("a")) is int
    assert response_of(Mails()) == list[NewEmail]
    assert response_of(Turned()) == dict[str, int]
    assert response_of(Straight()) is NewEmail
    assert response_of(Deeper()) is NewEmail
    assert response_of(Later()) is DefinedBelow
    assert response_of(Nothing()) is type(None)
    assert response_of(Itself()) is Itself


def test_responses_that_cannot_be_known() -> None:
    @dataclass
    class Missing(evbus.Query["Nowhere"], subject="a"):
        pass

    with pytest.raises(TypeError, match=r"Unsaid does not say what its answer is: derive it from evbus.Query"):
        response_of(Unsaid())
    with pytest.raises(TypeError, match="Direct does not say"):
        response_of(Direct())
    with pytest.raises(TypeError, match=r"Missing cannot be resolved .*Nowhere"):
        response_of(Missing())


# --- pydantic ---------------------------------------------------------------------------------------------------------


class Inner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    when: datetime
    raw: bytes = b"x"


def inner() -> Inner:
    return Inner(when=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc))


@dataclass
class Around:
    models: list[Inner] = field(default_factory=list)
    one: Inner | None = None


def test_a_model_is_its_own_json() -> None:
    model = inner()
    for codec in (Codec.MSGPACK, Codec.JSON):
        assert encode(model, codec) == (Codec.JSON, model.model_dump_json().encode())
    assert decode(Codec.JSON, model.model_dump_json().encode(), Inner) == model
    packed = msgspec.msgpack.encode({"when": "2026-01-02T03:04:05Z", "raw": "x"})
    assert decode(Codec.MSGPACK, packed, Inner) == model
    assert decode(Codec.UNKNOWN, packed, Inner) == model
    assert decode(Codec.JSON, model.model_dump_json().encode()) == {"when": "2026-01-02T03:04:05Z", "raw": "x"}


@pytest.mark.parametrize("codec", [Codec.MSGPACK, Codec.JSON])
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([inner()], list[Inner]),
        ({"a": inner()}, dict[str, Inner]),
        (Around([inner()], inner()), Around),
        (Around(), Around),
        (inner(), Inner | None),
    ],
)
def test_models_inside_other_values(value: Any, wanted: Any, codec: Codec) -> None:
    used, data = encode(value, codec)
    assert decode(used, data, wanted) == value


@pytest.mark.parametrize("wanted", [Model, list[Model]])
def test_a_model_that_does_not_fit(wanted: Any) -> None:
    value: Any = {"title": ""} if wanted is Model else [{"title": ""}]
    for codec, data in ((Codec.JSON, msgspec.json.encode(value)), (Codec.MSGPACK, msgspec.msgpack.encode(value))):
        with pytest.raises(CodecError, match="title: String should have at least 1 character") as caught:
            decode(codec, data, wanted)
        assert "\n" not in str(caught.value)
    with pytest.raises(CodecError):
        decode(Codec.JSON, b"{", wanted)
    with pytest.raises(CodecError):
        decode(Codec.TEXT, b"text", wanted)


def test_a_model_that_cannot_be_sent() -> None:
    class Holder(pydantic.BaseModel):
        what: Any

    with pytest.raises(CodecError, match="Holder"):
        encode(Holder(what=object()))
    with pytest.raises(CodecError, match="Encoding objects of type object is unsupported"):
        encode([object()])


def test_pydantic_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import json, sys, evbus, evbus.client, evbus.server, evbus.routers, dataclasses\n"
        "@evbus.event('a')\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "with evbus.EventServer(port=0) as server, evbus.connect(server.address) as bus:\n"
        "    bus.on_query(A)(lambda a: a)\n"
        "    answer = bus.query(A(1), response=A)\n"
        "print(json.dumps([answer.x, 'pydantic' in sys.modules]))\n"
    )
    with Program([sys.executable, "-c", code], cwd=tmp_path) as program:
        assert json.loads(program.finish().out) == [1, False]
