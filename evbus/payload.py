"""Payloads: from Python values to bytes and back. Nothing is ever pickled.

What a value becomes (`encode`)::

    bytes, bytearray, memoryview    its bytes, as they are             codec BYTES
    str                             UTF-8                              codec TEXT
    OMITTED (no message given)      nothing: an empty payload          codec BYTES
    a pydantic model                its own JSON                       codec JSON
    everything else, None too       msgpack, or JSON where asked for   codec MSGPACK or JSON

"Everything else" is what msgspec knows: dataclasses, msgspec Structs, TypedDict, NamedTuple, dict, list, tuple, set,
int, float, bool, None, datetime, date, time, timedelta, UUID, Enum, Decimal, and attrs classes. msgpack has whole
numbers of 64 bits; JSON has no NaN or infinity (they become null), and bytes inside a value become base64 text.

What bytes become depends on their codec and on the type that the reader asks for (`make_decoder`, `decode`):

- No type, `Any` or `object`: the value as it was sent, in plain containers; bytes if the codec is UNKNOWN.
- `bytes` (also `bytearray`, `memoryview`): the payload's own bytes, whatever their codec.
- `str`: the UTF-8 text of BYTES, TEXT and UNKNOWN.
- Any other type: MSGPACK and JSON are decoded into it and checked against it. BYTES and TEXT must fit it as a value
  (`str | None`, `Literal["on", "off"]`, an Enum of strings, a UUID as text, ...). UNKNOWN, which is what version-1
  peers send, counts as the codec that the reader is configured with.
- A type that allows None takes an empty UNKNOWN or BYTES payload as None: C# sends null as no bytes at all.

What does not fit is a CodecError that names the type and the place. Everything here may be called from any thread.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Callable
from typing import Any, Final, TypeVar, overload

import msgspec

from evbus.errors import CodecError, ConfigError
from evbus.wire import Codec

__all__ = ["OMITTED", "Decoder", "Omitted", "codec_from_name", "decode", "encode", "make_decoder"]

T = TypeVar("T")

#: Takes the codec's id and the payload; returns the value. Raises CodecError.
Decoder = Callable[[int, bytes], T]

# Plain names for the hot paths: reading an attribute of an Enum class costs more than the rest of them. Ids arrive as
# plain ints and are compared with plain ints.
_BYTES: Final = Codec.BYTES
_TEXT: Final = Codec.TEXT
_MSGPACK: Final = Codec.MSGPACK
_JSON: Final = Codec.JSON
_UNKNOWN_ID: Final = int(Codec.UNKNOWN)
_BYTES_ID: Final = int(Codec.BYTES)
_TEXT_ID: Final = int(Codec.TEXT)
_MSGPACK_ID: Final = int(Codec.MSGPACK)
_JSON_ID: Final = int(Codec.JSON)

_NAMES: Final = {
    Codec.UNKNOWN: "untyped",
    Codec.BYTES: "bytes",
    Codec.TEXT: "text",
    Codec.MSGPACK: "msgpack",
    Codec.JSON: "JSON",
    Codec.NETWEAVER: "NetWeaver",
}


# --- pydantic ---------------------------------------------------------------------------------------------------------
# Never imported here: whoever has a model has imported it. Models inside other values, such as list[Model], go through
# msgspec's hooks, as what their JSON would be.


def _is_model(kind: Any) -> bool:
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    # Version 1 of pydantic has models without these methods.
    return base is not None and isinstance(kind, type) and issubclass(kind, base) and hasattr(kind, _VALIDATE)


_VALIDATE: Final = "model_validate_json"


def _encode_other(value: Any) -> Any:
    if _is_model(type(value)):
        return value.model_dump(mode="json")
    raise TypeError(f"Encoding objects of type {_type_name(type(value))} is unsupported")


def _decode_other(kind: Any, value: Any) -> Any:
    """What msgspec does not know: models are validated; anything else is left to msgspec's own check."""
    if not _is_model(kind):
        return value
    return _validated(kind, _to_json(value))


def _validated(model: Any, data: bytes) -> Any:
    try:
        return model.model_validate_json(data)
    except ValueError as e:
        errors = getattr(e, "errors", None)
        if errors is None:
            raise
        # Where and what; not the values, which do not belong into a log.
        problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in errors())
        raise ValueError("; ".join(problems)) from e


# An Encoder holds no state between calls, so all threads may share these.
_to_msgpack: Final = msgspec.msgpack.Encoder(enc_hook=_encode_other).encode
_to_json: Final = msgspec.json.Encoder(enc_hook=_encode_other).encode
_from_msgpack: Final = msgspec.msgpack.Decoder().decode
_from_json: Final = msgspec.json.Decoder().decode

# A program decodes into as many types as its source names. More than this many can only come from types that are made
# while it runs; the least recently used ones then go, and are made again when they are needed.
_MAX_DECODERS: Final = 1024


class Omitted:
    """The class of OMITTED, for annotations."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "OMITTED"

    def __reduce__(self) -> str:
        """Copies and pickles are the one instance."""
        return "OMITTED"


#: "No message given": goes as an empty payload. An explicit None is a value of its own (msgpack nil, JSON null).
OMITTED: Final = Omitted()


def codec_from_name(name: str) -> Codec:
    """The codec that a user chose for structured values.

    Args:
        name: "msgpack" or "json".

    Raises:
        ConfigError: it is neither.
    """
    if name == "msgpack":
        return _MSGPACK
    if name == "json":
        return _JSON
    raise ConfigError("codec", f'must be "msgpack" or "json", not {name!r}')


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode(value: object, codec: Codec = _MSGPACK) -> tuple[Codec, bytes]:
    """The payload of a value, and the codec id that tells the reader how it was made.

    Args:
        value: anything of the table above. A bytearray or memoryview is copied, so it may change afterwards.
        codec: MSGPACK or JSON, for structured values.

    Raises:
        CodecError: the value is of a type that cannot be sent, or holds one.
    """
    kind = type(value)
    if kind is bytes:
        return _BYTES, value  # type: ignore[return-value]  # mypy does not follow `kind`
    try:
        if kind is str:
            return _TEXT, value.encode()  # type: ignore[attr-defined]
        if value is OMITTED:
            return _BYTES, b""
        if isinstance(value, (bytes, bytearray, memoryview)):
            return _BYTES, bytes(value)
        if isinstance(value, str):  # a subclass, for example an Enum of strings
            return _TEXT, str.encode(value)
        if type(kind) is not type and _is_model(kind):
            return _JSON, value.model_dump_json().encode()  # type: ignore[attr-defined]
        return (_JSON, _to_json(value)) if codec == _JSON else (_MSGPACK, _to_msgpack(value))
    except MemoryError:
        raise
    except Exception as e:
        shown = "" if kind is str or isinstance(value, (bytes, bytearray, memoryview)) else _NAMES[_as_codec(codec)]
        raise CodecError("encode", _type_name(kind), _why_not_encoded(e), codec=shown) from e


def _as_codec(codec: int) -> Codec:
    return _JSON if codec == _JSON else _MSGPACK


def _why_not_encoded(e: Exception) -> str:
    if isinstance(e, UnicodeEncodeError):
        return f"it holds a lone surrogate (character {e.start}), which UTF-8 cannot carry"
    if isinstance(e, RecursionError):
        return "it is nested too deeply, or contains itself"
    if isinstance(e, OverflowError):
        return f"{e}; whole numbers go up to 64 bits"
    if isinstance(e, TypeError):
        return f"{e}; send bytes, str, a dataclass, a msgspec Struct, a TypedDict, a pydantic model or plain containers"
    return str(e) or type(e).__name__


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(codec: int, data: bytes, type: Any = None, fallback: Codec = _MSGPACK) -> Any:
    """The value of one payload. For many payloads of one type, keep what `make_decoder` returns.

    Args:
        codec: the codec's id as it came over the wire.
        data: the payload.
        type: what to decode into; None for the value as it was sent.
        fallback: MSGPACK or JSON: what a payload of UNKNOWN codec counts as when a structured type is asked for.

    Raises:
        CodecError: the payload does not fit the type, or the type cannot be decoded into.
    """
    return make_decoder(type, fallback)(codec, data)


@overload
def make_decoder(type: type[T], fallback: Codec = ...) -> Decoder[T]: ...
@overload
def make_decoder(type: Any = ..., fallback: Codec = ...) -> Decoder[Any]: ...
def make_decoder(type: Any = None, fallback: Codec = _MSGPACK) -> Decoder[Any]:
    """A function that decodes payloads into one type; made once per type and remembered.

    Args:
        type: what to decode into; None for values as they were sent.
        fallback: MSGPACK or JSON: what a payload of UNKNOWN codec counts as when a structured type is asked for.

    Raises:
        CodecError: the type cannot be decoded into: here, where it is asked for, and not with the first message.
    """
    try:
        return _cached_decoder(type, _as_codec(fallback))
    except TypeError:  # the type cannot be hashed, e.g. Annotated with a list; then it is not remembered
        return _build_decoder(type, _as_codec(fallback))


def _build_decoder(wanted: Any, fallback: Codec) -> Decoder[Any]:
    if wanted is None or wanted is Any or wanted is object:
        return _decode_as_sent
    if wanted is bytes:
        return _decode_bytes
    if wanted is bytearray or wanted is memoryview:
        return lambda _codec, data: wanted(data)
    if wanted is str:
        return _decode_str
    return _TypedDecoder(wanted, fallback).decode


# lru_cache is written in C and safe to share between threads; two threads that ask for a new type at once at worst
# make it twice.
_cached_decoder = functools.lru_cache(_MAX_DECODERS)(_build_decoder)


def _decode_bytes(_codec: int, data: bytes) -> bytes:
    return data


def _decode_as_sent(codec: int, data: bytes) -> Any:
    if codec in (_BYTES_ID, _UNKNOWN_ID):
        return data
    try:
        if codec == _TEXT_ID:
            return data.decode()
        if codec == _MSGPACK_ID:
            return _from_msgpack(data)
        if codec == _JSON_ID:
            return _from_json(data)
    except MemoryError:
        raise
    except Exception as e:
        raise _misfit(codec, "plain values", e) from e
    raise _no_such_codec(codec, "plain values")


def _decode_str(codec: int, data: bytes) -> str:
    try:
        if codec == _MSGPACK_ID:
            return _str_from_msgpack(data)
        if codec == _JSON_ID:
            return _str_from_json(data)
        if codec in (_TEXT_ID, _BYTES_ID, _UNKNOWN_ID):
            return data.decode()
    except MemoryError:
        raise
    except Exception as e:
        raise _misfit(codec, "str", e) from e
    raise _no_such_codec(codec, "str")


_str_from_msgpack: Final = msgspec.msgpack.Decoder(str).decode
_str_from_json: Final = msgspec.json.Decoder(str).decode


class _TypedDecoder:
    """Decodes into one structured type."""

    __slots__ = ("_allows_none", "_fallback", "_from_json", "_from_msgpack", "_hook", "_name", "_type")

    def __init__(self, wanted: Any, fallback: Codec) -> None:
        self._type = wanted
        self._name = _type_name(wanted)
        self._fallback = fallback
        try:
            if isinstance(msgspec.inspect.type_info(wanted), msgspec.inspect.CustomType) and not _is_model(wanted):
                raise TypeError("it is a plain class; make it a dataclass, a msgspec Struct or a TypedDict")
            hook = _decode_other if "pydantic" in sys.modules else None
            self._from_msgpack = msgspec.msgpack.Decoder(wanted, dec_hook=hook).decode
            self._from_json = msgspec.json.Decoder(wanted, dec_hook=hook).decode
            if _is_model(wanted):
                self._from_json = functools.partial(_validated, wanted)
        except (TypeError, ValueError, NameError, AttributeError, RecursionError) as e:
            # NameError: an annotation that cannot be resolved, e.g. of a class that is local to a function.
            raise CodecError("decode", self._name, f"this type cannot be decoded into: {e}") from e
        self._hook = hook
        try:
            msgspec.convert(None, wanted, dec_hook=hook)
            self._allows_none = True
        except msgspec.ValidationError:
            self._allows_none = False

    def decode(self, codec: int, data: bytes) -> Any:
        try:
            if codec == _MSGPACK_ID:
                return self._from_msgpack(data)
            if codec == _JSON_ID:
                return self._from_json(data)
            return self._decode_rare(codec, data)
        except (MemoryError, CodecError):
            raise
        except (ValueError, msgspec.MsgspecError, RecursionError) as e:
            raise _misfit(codec, self._name, e) from e
        except Exception as e:  # raised by the type itself: its __post_init__ or its converters
            problem = f"its own code raised {type(e).__name__}: {e}"
            raise CodecError("decode", self._name, problem, codec=_codec_name(codec)) from e

    def _decode_rare(self, codec: int, data: bytes) -> Any:
        if codec == _UNKNOWN_ID:
            if not data and self._allows_none:
                return None
            return self._from_json(data) if self._fallback == _JSON else self._from_msgpack(data)
        if codec == _TEXT_ID:
            return msgspec.convert(data.decode(), self._type, dec_hook=self._hook)
        if codec == _BYTES_ID:
            try:
                return msgspec.convert(data, self._type, dec_hook=self._hook)
            except msgspec.ValidationError:
                if not data and self._allows_none:
                    return None
                raise
        raise _no_such_codec(codec, self._name)


def _misfit(codec: int, type_name: str, e: Exception) -> CodecError:
    if isinstance(e, UnicodeDecodeError):
        problem = f"it is not UTF-8 (byte {e.start}); ask for `bytes` to take it as it is"
    elif isinstance(e, RecursionError):
        problem = "it is nested too deeply"
    else:
        problem = str(e) or type(e).__name__
        if codec == _UNKNOWN_ID:
            problem += "; its sender did not say how it is encoded: ask for `bytes` to take it as it is"
        elif codec in (_BYTES_ID, _TEXT_ID):
            problem += f"; it was published as {_codec_name(codec)}, not as a structured value"
    return CodecError("decode", type_name, problem, codec=_codec_name(codec))


def _no_such_codec(codec: int, type_name: str) -> CodecError:
    if codec == Codec.NETWEAVER:
        problem = "this version of evbus does not read the C# serializer; ask for `bytes` to take it as it is"
    else:
        problem = f"codec {codec} is unknown here; update evbus, or ask for `bytes` to take it as it is"
    return CodecError("decode", type_name, problem, codec=_codec_name(codec))


def _codec_name(codec: int) -> str:
    try:
        return _NAMES[Codec(codec)]
    except ValueError:
        return f"codec-{codec}"


def _type_name(wanted: Any) -> str:
    """`Mail` for a class, the text as written for anything else: `list[Mail]`, `Mail | None`."""
    if isinstance(wanted, type) and typing.get_origin(wanted) is None:
        return wanted.__qualname__
    return str(wanted).replace("typing.", "")
