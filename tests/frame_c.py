"""The C functions of `_frame`, called from tests through the capsules in which Cython exports them.

Other extensions reach them by `cimport`; what they rely on beyond the Python face (lending above all) is tested here
without building an extension for it. The structures repeat `_frame.pxd`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_int, c_size_t, c_uint8, c_uint32, c_void_p

from evbus import _frame

SIZE_CLASSES = 10


class Pool(Structure):
    _fields_ = (
        ("blocks", c_void_p * SIZE_CLASSES),
        ("kept", c_size_t),
        ("keep_limit", c_size_t),
        ("held", c_size_t),
    )


class RingT(Structure):
    _fields_ = (
        ("buf", POINTER(c_uint8)),
        ("cap", c_size_t),
        ("head", c_size_t),
        ("size", c_size_t),
        ("lent", POINTER(c_uint8)),
        ("lent_size", c_size_t),
        ("pool", POINTER(Pool)),
    )


class Span(Structure):
    _fields_ = (("ptr", c_void_p), ("size", c_uint32))

    def text(self) -> bytes:
        return ctypes.string_at(self.ptr, self.size)


class Envelope(Structure):
    _fields_ = (
        ("flags", c_uint32),
        ("codec", c_uint32),
        ("subscription_id", ctypes.c_int32),
        ("deadline_ms", ctypes.c_int32),
        ("task_id", Span),
        ("subject", Span),
        ("query_task_id", Span),
        ("headers", Span),
        ("payload", Span),
    )


_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, (ctypes.py_object, ctypes.c_char_p)


def function(name: str, result: object, *arguments: object) -> Callable[..., int]:
    capsule = _frame.__pyx_capi__[name]
    return ctypes.CFUNCTYPE(result, *arguments)(_capsule_pointer(capsule, _capsule_name(capsule)))


ring_put = function("ring_put", c_int, POINTER(RingT), ctypes.c_char_p, c_size_t)
ring_reserve = function("ring_reserve", c_int, POINTER(RingT), c_size_t)
ring_skip = function("ring_skip", None, POINTER(RingT), c_size_t)
ring_linear = function("ring_linear", c_int, POINTER(RingT))
ring_release = function("ring_release", None, POINTER(RingT))
ring_fit = function("ring_fit", None, POINTER(RingT))
ring_make_room = function("ring_make_room", c_int, POINTER(RingT), c_size_t)
ring_lend = function("ring_lend", c_int, POINTER(RingT), c_void_p, c_size_t)
ring_settle = function("ring_settle", c_int, POINTER(RingT))
ring_sent = function("ring_sent", None, POINTER(RingT), c_size_t)
utf8_check = function("utf8_check", c_int, ctypes.c_char_p, c_size_t)
subject_check = function("subject_check", c_int, ctypes.c_char_p, c_size_t)
span_blank = function("span_blank", c_int, Span)
headers_check = function("headers_check", c_int, Span)
envelope_read = function("envelope_read", c_int, c_void_p, c_uint32, POINTER(Envelope))


def span_of(data: bytes) -> Span:
    """Of a bytes object that the caller keeps."""
    return Span(ctypes.cast(ctypes.c_char_p(data), c_void_p), len(data))


class Lender:
    """Owns bytes at a fixed address, as the ring of a publisher does, and lends them."""

    def __init__(self, data: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(data, len(data))
        self.address = ctypes.addressof(self._buffer)

    def spoil(self) -> None:
        """What happens to the bytes once the publisher's ring moves."""
        ctypes.memset(self.address, 0xEE, len(self._buffer))


class CRing:
    """A ring_t of its own, with the little that is needed to look at it from outside."""

    def __init__(self, keep_limit: int = 1 << 20) -> None:
        self.pool = Pool(keep_limit=keep_limit)
        self.ring = RingT(pool=ctypes.pointer(self.pool))
        self.ref = byref(self.ring)

    def put(self, data: bytes) -> None:
        assert ring_put(self.ref, data, len(data)) == 0

    def lend(self, lender: Lender, start: int, size: int) -> None:
        assert ring_lend(self.ref, lender.address + start, size) == 0

    def content(self) -> bytes:
        ring = self.ring
        first = min(ring.size, ring.cap - ring.head)
        own = ctypes.string_at(ctypes.addressof(ring.buf.contents) + ring.head, first) if ring.cap else b""
        if first < ring.size:
            own += ctypes.string_at(ring.buf, ring.size - first)
        return own + (ctypes.string_at(ring.lent, ring.lent_size) if ring.lent_size else b"")


def ring_inside(ring: _frame.Ring) -> RingT:
    """The ring_t of a Ring. Found by its content, as where it lies in the object is the compiler's business."""
    probe = _frame.Ring()
    probe.write(b"x" * 301)
    word = ctypes.sizeof(c_size_t)
    for offset in range(2 * word, 16 * word, word):
        inside = RingT.from_address(id(probe) + offset)
        if (inside.cap, inside.head, inside.size, inside.lent_size) == (512, 0, 301, 0):
            return RingT.from_address(id(ring) + offset)
    raise AssertionError("the layout of Ring is not understood")
