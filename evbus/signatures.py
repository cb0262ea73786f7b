"""What a handler wants to be given: found out from its first parameter, once, when it subscribes."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from evbus._message import Message
from evbus.errors import CodecError
from evbus.payload import Decoder, make_decoder
from evbus.wire import Codec

__all__ = ["Handler", "decoder_for", "is_coroutine_function", "wanted_type"]

#: Called with one argument: the decoded payload, or the Message.
Handler = Callable[[Any], Any]


def decoder_for(handler: Handler, wanted: object, codec: Codec, *, coroutines: bool = False) -> Decoder[Any] | None:
    """What turns a payload into the handler's argument; None for a handler that takes the Message itself.

    Args:
        wanted: the type asked for in so many words; None to go by the handler's first parameter.
        codec: what payloads of unknown codec count as.
        coroutines: whether it may be a coroutine function.

    Raises:
        TypeError: the handler cannot be called with one argument, is a coroutine function where only plain ones are
            called, or asks for what cannot be decoded.
    """
    if not coroutines and is_coroutine_function(handler):
        raise TypeError(
            f"{_name(handler)} is a coroutine function; EventClient and `evbus run` call plain functions only "
            "(AsyncEventClient both)"
        )
    found = wanted_type(handler) if wanted is None else wanted
    if found is Message:
        return None
    try:
        return make_decoder(found, codec)
    except CodecError as exc:
        raise TypeError(f"{_name(handler)} cannot be given {found!r}: {exc.problem}") from exc


def wanted_type(handler: Handler, otherwise: object = Message) -> object:
    """The type of a handler's first parameter; `otherwise` if it has no annotation.

    Raises:
        TypeError: it cannot be called with one argument, or its annotation cannot be resolved.
    """
    if not callable(handler):
        raise TypeError(f"a handler is a function of one argument, not {handler!r}")
    function = _function(handler)
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # some builtins do not tell
        return otherwise
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"{_name(handler)}{signature} must take one argument: the decoded payload, or the Message"
        ) from None
    parameter = next(iter(signature.parameters.values()))
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return otherwise
    if annotation is None:
        return type(None)
    return _resolve(handler, function, parameter.name, annotation)


def is_coroutine_function(handler: Handler) -> bool:
    """Whether calling it gives a coroutine, to be awaited."""
    return callable(handler) and inspect.iscoroutinefunction(_function(handler))


def _function(handler: Handler) -> Any:
    """The function behind partials, decorators, methods and callable objects."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif inspect.ismethod(handler):
            handler = handler.__func__
        elif hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif inspect.isfunction(handler) or inspect.isclass(handler) or inspect.isbuiltin(handler):
            return handler
        else:
            method = vars(type(handler)).get("__call__")
            return method if inspect.isfunction(method) else handler


def _resolve(handler: Handler, function: Any, name: str, annotation: object) -> object:
    """An annotation as a type. It may be text, and name what only the surrounding code knows."""
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    names = dict(getattr(function, "__globals__", {}))
    # Types that are local to a function are found where that function is still running: in the caller's frame.
    for scope in (_caller_locals(), _closure(function)):
        names.update({key: value for key, value in scope.items() if key not in names})
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)[name]
    except Exception as exc:
        raise TypeError(
            f"the annotation {annotation!r} of {_name(handler)} cannot be resolved ({type(exc).__name__}: {exc}); "
            "import what it names, or say type=... when subscribing"
        ) from exc


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    found = {}
    for name, cell in zip(code.co_freevars, cells, strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return found


def _caller_locals() -> dict[str, Any]:
    """The local names of the nearest caller outside evbus."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        frame = frame.f_back
    return dict(frame.f_locals) if frame is not None else {}


def _name(handler: Handler) -> str:
    return getattr(_function(handler), "__qualname__", "") or repr(handler)
