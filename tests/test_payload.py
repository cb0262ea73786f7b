"""evbus.payload: what values become on the wire and what they come back as."""

from __future__ import annotations

import array
import contextlib
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import gc
import pickle
import sys
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evbus import payload
from evbus.errors import CodecError, ConfigError
from evbus.payload import OMITTED, codec_from_name, decode, encode, make_decoder
from evbus.wire import Codec


@dataclasses.dataclass
class Mail:
    to: str
    size: int
    sent: dt.datetime
    tags: list[str] = dataclasses.field(default_factory=list)


class Point(msgspec.Struct, frozen=True):
    x: int
    y: float = 0.0


class Movie(TypedDict):
    name: str
    year: int


class Pair(NamedTuple):
    left: int
    right: str


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mode(str, enum.Enum):
    ON = "on"
    OFF = "off"


class Plain:
    def __init__(self) -> None:
        self.x = 1


NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone.utc)

# (value, type): every kind of value that the documentation names.
STRUCTURED: list[tuple[Any, Any]] = [
    (Mail("a@b", 3, NOW, ["x"]), Mail),
    (Point(1, 2.5), Point),
    ({"name": "Alien", "year": 1979}, Movie),
    (Pair(1, "r"), Pair),
    ({"a": [1, 2, {"b": None}]}, dict[str, Any]),
    ([1, 2, 3], list[int]),
    ((1, "a"), tuple[int, str]),
    ({1, 2}, set[int]),
    (frozenset({1}), frozenset[int]),
    (12, int),
    (-(2**63), int),
    (2**64 - 1, int),
    (1.5, float),
    (True, bool),
    (None, None.__class__),
    (None, Mail | None),
    (NOW, dt.datetime),
    (NOW.date(), dt.date),
    (NOW.timetz(), dt.time),
    (dt.timedelta(days=1, microseconds=5), dt.timedelta),
    (uuid.UUID(int=7), uuid.UUID),
    (decimal.Decimal("1.10"), decimal.Decimal),
    (Color.BLUE, Color),
    (Level.HIGH, Level),
    ([Mail("a", 1, NOW)], list[Mail]),
    ({"k": Point(1)}, dict[str, Point]),
]


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "codec", "data"),
    [
        (b"", Codec.BYTES, b""),
        (b"\x00\xff", Codec.BYTES, b"\x00\xff"),
        (bytearray(b"ab"), Codec.BYTES, b"ab"),
        (memoryview(b"abcd")[::2], Codec.BYTES, b"ac"),
        (memoryview(array.array("H", [1, 2])), Codec.BYTES, array.array("H", [1, 2]).tobytes()),
        ("", Codec.TEXT, b""),
        ("grüß\0", Codec.TEXT, b"gr\xc3\xbc\xc3\x9f\0"),
        (Mode.ON, Codec.TEXT, b"on"),
        (OMITTED, Codec.BYTES, b""),
        (None, Codec.MSGPACK, b"\xc0"),
        (1, Codec.MSGPACK, b"\x01"),
        ([1], Codec.MSGPACK, b"\x91\x01"),
    ],
)
def test_encode(value: object, codec: Codec, data: bytes) -> None:
    got = encode(value)
    assert got == (codec, data)
    assert type(got[0]) is Codec
    assert type(got[1]) is bytes


def test_encode_json_only_changes_structured_values() -> None:
    assert encode({"a": 1}, Codec.JSON) == (Codec.JSON, b'{"a":1}')
    assert encode(None, Codec.JSON) == (Codec.JSON, b"null")
    assert encode(b"x", Codec.JSON) == (Codec.BYTES, b"x")
    assert encode("x", Codec.JSON) == (Codec.TEXT, b"x")
    assert encode(OMITTED, Codec.JSON) == (Codec.BYTES, b"")


def test_bytes_are_not_copied() -> None:
    value = b"x" * 1000
    assert encode(value)[1] is value


def test_mutable_buffers_are_copied() -> None:
    value = bytearray(b"abc")
    _, data = encode(value)
    value[0] = 0
    assert data == b"abc"
    value.append(1)  # and no export of the bytearray is left behind


def test_bytes_subclass_becomes_plain_bytes() -> None:
    class Blob(bytes):
        pass

    _, data = encode(Blob(b"z"))
    assert type(data) is bytes


def cyclic() -> list[Any]:
    a: list[Any] = []
    a.append(a)
    return a


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Plain(), ["Plain", "dataclass"]),
        ([Plain()], ["list", "Plain"]),
        (lambda: 1, ["function"]),
        (object(), ["object"]),
        (cyclic(), ["list", "nested too deeply"]),
        ("\ud800", ["str", "lone surrogate", "character 0"]),
        (["ab\udfff"], ["list", "lone surrogate", "character 2"]),
        (1j, ["complex"]),
        (Plain, ["type"]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("codec", [Codec.MSGPACK, Codec.JSON])
def test_what_cannot_be_encoded(value: object, words: list[str], codec: Codec) -> None:
    with pytest.raises(CodecError) as caught:
        encode(value, codec)
    assert caught.value.action == "encode"
    assert caught.value.__cause__ is not None
    for word in words:
        assert word in str(caught.value)


def test_whole_numbers_of_msgpack_have_64_bits_and_those_of_json_have_not() -> None:
    for value in (2**64, -(2**63) - 1):
        with pytest.raises(CodecError, match="64 bits"):
            encode(value)
        assert decode(*encode(value, Codec.JSON)) == value


def test_a_released_memoryview_is_a_codec_error() -> None:
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(CodecError, match="memoryview"):
        encode(view)


def test_memory_errors_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(value: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(payload, "_to_msgpack", exhausted)
    with pytest.raises(MemoryError):
        encode([1])


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "wanted"), STRUCTURED, ids=lambda item: str(item)[:30])
@pytest.mark.parametrize("codec", [Codec.MSGPACK, Codec.JSON])
def test_structured_round_trip(value: Any, wanted: Any, codec: Codec) -> None:
    used, data = encode(value, codec)
    assert used == codec
    back = decode(used, data, wanted)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(("value", "wanted"), STRUCTURED, ids=lambda item: str(item)[:30])
@pytest.mark.parametrize("codec", [Codec.MSGPACK, Codec.JSON])
def test_an_unknown_codec_counts_as_the_configured_one(value: Any, wanted: Any, codec: Codec) -> None:
    _, data = encode(value, codec)
    assert decode(Codec.UNKNOWN, data, wanted, codec) == value


@pytest.mark.parametrize("wanted", [None, Any, object])
def test_without_a_type_the_value_comes_as_it_was_sent(wanted: Any) -> None:
    for value in (b"raw", "text", {"a": [1, None, True, 2.5]}, [], None, 7):
        for codec in (Codec.MSGPACK, Codec.JSON):
            back = decode(*encode(value, codec), wanted)
            assert back == value
            assert type(back) is type(value)
    assert decode(*encode(OMITTED), wanted) == b""
    assert decode(Codec.UNKNOWN, b"\x91\x01", wanted) == b"\x91\x01"


@pytest.mark.parametrize("codec", [*Codec, 77])
@pytest.mark.parametrize("data", [b"", b"\xff\x00", b"\x91\x01"])
def test_bytes_takes_any_payload_as_it_is(codec: int, data: bytes) -> None:
    assert decode(codec, data, bytes) is data
    array_ = decode(codec, data, bytearray)
    assert (type(array_), array_) == (bytearray, data)
    view = decode(codec, data, memoryview)
    assert (type(view), bytes(view)) == (memoryview, data)


@pytest.mark.parametrize("codec", [Codec.UNKNOWN, Codec.BYTES, Codec.TEXT])
def test_str_takes_utf8(codec: int) -> None:
    assert decode(codec, "grüß".encode(), str) == "grüß"
    assert decode(codec, b"", str) == ""
    with pytest.raises(CodecError, match="not UTF-8") as caught:
        decode(codec, b"ab\xff", str)
    assert "byte 2" in str(caught.value)
    assert "str" in str(caught.value)


def test_str_inside_structured_payloads() -> None:
    assert decode(Codec.MSGPACK, b"\xa2hi", str) == "hi"
    assert decode(Codec.JSON, b'"hi"', str) == "hi"
    with pytest.raises(CodecError, match="Expected `str`, got `int`"):
        decode(Codec.MSGPACK, b"\x01", str)
    with pytest.raises(CodecError, match="Expected `str`, got `int`"):
        decode(Codec.JSON, b"1", str)


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("hi", str | None, "hi"),
        ("on", Mode, Mode.ON),
        ("red", Color, Color.RED),
        ("red", Literal["red", "green"], "red"),
        ("00000000-0000-0000-0000-000000000007", uuid.UUID, uuid.UUID(int=7)),
        ("1.10", decimal.Decimal, decimal.Decimal("1.10")),
        ("2026-01-02T03:04:05.678901Z", dt.datetime, NOW),
        ("abc", Annotated[str, msgspec.Meta(max_length=3)], "abc"),
    ],
)
def test_text_fits_types_that_are_text_at_heart(text: str, wanted: Any, expected: object) -> None:
    back = decode(*encode(text), wanted)
    assert back == expected
    assert type(back) is type(expected)


def test_bytes_fit_unions_with_bytes() -> None:
    assert decode(Codec.BYTES, b"x", bytes | None) == b"x"
    assert decode(Codec.BYTES, b"", bytes | None) == b""


@pytest.mark.parametrize("codec", [Codec.UNKNOWN, Codec.BYTES])
def test_an_empty_payload_is_none_where_none_is_allowed(codec: int) -> None:
    assert decode(codec, b"", Mail | None) is None
    assert decode(codec, b"", type(None)) is None
    with pytest.raises(CodecError):
        decode(codec, b"", Mail)
    with pytest.raises(CodecError):
        decode(Codec.MSGPACK, b"", Mail | None)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text(st.characters(exclude_categories=["Cs"]))
        | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
        max_leaves=20,
    )
)
def test_any_plain_value_comes_back(value: Any) -> None:
    assert decode(*encode(value)) == value


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "data", "wanted", "words"),
    [
        (Codec.MSGPACK, b"\x01", Mail, ["Mail", "msgpack", "Expected `object`, got `int`"]),
        (Codec.JSON, b'{"x":"a"}', Point, ["Point", "JSON", "`$.x`", "Expected `int`, got `str`"]),
        (Codec.JSON, b"{}", Point, ["Point", "`x`"]),
        (Codec.JSON, b"{", Point, ["Point", "truncated"]),
        (Codec.MSGPACK, b"", Point, ["Point", "truncated"]),
        (Codec.MSGPACK, b"\x01\x02", int, ["int", "trailing"]),
        (Codec.TEXT, b"hi", Mail, ["Mail", "got `str`", "published as text"]),
        (Codec.BYTES, b"hi", Mail, ["Mail", "got `bytes`", "published as bytes"]),
        (Codec.TEXT, b"\xff", Mail, ["Mail", "UTF-8"]),
        (Codec.UNKNOWN, b"hello", Mail, ["Mail", "did not say", "`bytes`"]),
        (Codec.NETWEAVER, b"x", Mail, ["Mail", "C# serializer", "`bytes`"]),
        (Codec.NETWEAVER, b"x", str, ["str", "C# serializer"]),
        (Codec.NETWEAVER, b"x", None, ["plain values", "C# serializer"]),
        (9, b"x", Mail, ["Mail", "codec 9", "update evbus"]),
        (9, b"x", str, ["str", "codec 9"]),
        (9, b"x", None, ["plain values", "codec 9"]),
        (-1, b"x", None, ["codec -1"]),
        (Codec.TEXT, b"\xff", None, ["UTF-8"]),
        (Codec.MSGPACK, b"\xc1", None, ["msgpack", "invalid"]),
        (Codec.JSON, b"nope", None, ["JSON"]),
        (Codec.JSON, b"[1]", list[str], ["list[str]", "`$[0]`"]),
        (Codec.JSON, b'"green"', Color, ["Color", "green"]),
    ],
)
def test_misfits(codec: int, data: bytes, wanted: Any, words: list[str]) -> None:
    with pytest.raises(CodecError) as caught:
        decode(codec, data, wanted)
    assert caught.value.action == "decode"
    for word in words:
        assert word.lower() in str(caught.value).lower()
    assert caught.value.subject == ""
    caught.value.subject = "mail.new"
    assert "'mail.new'" in str(caught.value)


@pytest.mark.parametrize("wanted", [None, list[Any], Any, dict[str, Any]])
@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (Codec.MSGPACK, b"\x91" * 100_000 + b"\x01"),
        (Codec.JSON, b"[" * 100_000 + b"]" * 100_000),
        (Codec.MSGPACK, b"\x81\xa1a" * 100_000 + b"\x01"),
    ],
    ids=["msgpack arrays", "json arrays", "msgpack maps"],
)
def test_deep_nesting_is_refused_and_not_fatal(wanted: Any, codec: int, data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(codec, data, wanted)


@pytest.mark.parametrize("wanted", [None, list[int], set[int], dict[str, int], Any])
@pytest.mark.parametrize(
    "data", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_claimed_lengths_cost_nothing(wanted: Any, data: bytes) -> None:
    """Five bytes that claim four billion items: an error at once, not memory for them."""
    with pytest.raises(CodecError):
        decode(Codec.MSGPACK, data, wanted)


@given(st.binary(max_size=64), st.sampled_from([None, Mail, Point, Movie, Pair, Color, str, list[int], int]))
def test_garbage_is_a_value_or_a_codec_error(data: bytes, wanted: Any) -> None:
    for codec in range(-1, 8):
        with contextlib.suppress(CodecError):
            decode(codec, data, wanted)


@dataclasses.dataclass
class Picky:
    x: int

    def __post_init__(self) -> None:
        if self.x == 1:
            raise ValueError("one is not liked")
        if self.x == 2:
            raise KeyError("two")
        if self.x == 3:
            raise MemoryError


def test_what_the_type_itself_raises() -> None:
    with pytest.raises(CodecError, match="one is not liked"):
        decode(Codec.JSON, b'{"x":1}', Picky)
    with pytest.raises(CodecError, match=r"own code raised KeyError.*two"):
        decode(Codec.JSON, b'{"x":2}', Picky)
    with pytest.raises(MemoryError):
        decode(Codec.JSON, b'{"x":3}', Picky)
    assert decode(Codec.JSON, b'{"x":4}', Picky) == Picky(4)


# --- make_decoder -----------------------------------------------------------------------------------------------------


def local_with_a_name_that_cannot_be_resolved() -> type:
    class Hidden:
        pass

    @dataclasses.dataclass
    class Local:
        a: Hidden

    return Local


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Plain, ["Plain", "dataclass"]),
        (Mail | Point, ["Mail", "Point"]),
        (local_with_a_name_that_cannot_be_resolved(), ["Local", "Hidden"]),
        (42, ["42"]),
        ("Mail", ["Mail"]),
    ],
    ids=str,
)
def test_a_type_that_cannot_be_decoded_into_is_told_at_once(wanted: Any, words: list[str]) -> None:
    with pytest.raises(CodecError, match="cannot be decoded into") as caught:
        make_decoder(wanted)
    for word in words:
        assert word in str(caught.value)


def test_decoders_are_made_once_per_type() -> None:
    assert make_decoder(Mail).__self__ is make_decoder(Mail).__self__  # type: ignore[attr-defined]
    assert make_decoder(Mail, Codec.JSON).__self__ is not make_decoder(Mail).__self__  # type: ignore[attr-defined]
    assert make_decoder(list[int]).__self__ is make_decoder(list[int]).__self__  # type: ignore[attr-defined]


def test_types_that_are_equal_only_as_numbers_are_kept_apart() -> None:
    assert decode(Codec.JSON, b"1", Literal[1]) == 1
    with pytest.raises(CodecError):
        decode(Codec.JSON, b"1", Literal[2])


def test_a_type_that_cannot_be_hashed_works_all_the_same() -> None:
    wanted = Annotated[int, ["not hashable"]]
    with pytest.raises(TypeError):
        hash(wanted)
    assert decode(Codec.JSON, b"1", wanted) == 1


def test_the_cache_is_bounded() -> None:
    """Types that are made while the program runs do not stay for ever."""
    first = weakref.ref(kept := dataclasses.make_dataclass("Made", [("x", int)]))
    make_decoder(kept)
    del kept
    for index in range(payload._MAX_DECODERS + 8):
        make_decoder(tuple[(int,) * (index % 7 + 1) + (Literal[index],)])  # type: ignore[misc]
    assert payload._cached_decoder.cache_info().currsize <= payload._MAX_DECODERS
    gc.collect()
    assert first() is None


def test_threads_share_decoders_and_encoders() -> None:
    """Many threads encode and decode at once, with a switch interval that makes them interleave."""
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for index in range(300):
            mail = Mail(f"{number}.{index}", index, NOW, ["t"] * (index % 9))
            codec = Codec.JSON if index % 2 else Codec.MSGPACK
            back = make_decoder(Mail)(*encode(mail, codec))
            made = decode(Codec.JSON, b'"1"', Literal["1", f"{number % 3}.{index}"])  # type: ignore[valid-type]
            if back != mail or made != "1":
                wrong.append(back)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(before)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.mark.parametrize(
    "action",
    [
        lambda: encode(b"x" * 100),
        lambda: encode("x" * 100),
        lambda: encode([1, 2]),
        lambda: decode(Codec.MSGPACK, b"\x92\x01\x02", list[int]),
        lambda: decode(Codec.BYTES, b"abc", bytes),
    ],
)
def test_nothing_is_kept_per_message(action: Callable[[], object]) -> None:
    for _ in range(100):
        action()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(2000):
        action()
    gc.collect()
    assert sys.getallocatedblocks() - before < 500


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_codec_from_name() -> None:
    assert codec_from_name("msgpack") is Codec.MSGPACK
    assert codec_from_name("json") is Codec.JSON
    for bad in ("JSON", "pickle", "", "bytes"):
        with pytest.raises(ConfigError, match="codec"):
            codec_from_name(bad)


def test_omitted_is_one_object() -> None:
    assert repr(OMITTED) == "OMITTED"
    assert copy.deepcopy(OMITTED) is OMITTED
    assert pickle.loads(pickle.dumps(OMITTED)) is OMITTED
