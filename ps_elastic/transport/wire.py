"""Messages as bytes: a fixed little-endian header, then raw arrays. Never pickle.

The header (112 bytes) says everything about the size of what follows, and is checked before anything is
allocated or read. Each array starts at a multiple of 8 bytes.

| bytes | what |
|---|---|
| 0:8 | magic "PSEL", wire version, kind, flags |
| 8:16 | worker, bucket, number of buckets |
| 16:32 | step, base or version |
| 32:64 | norm, payload norm, residual norm, seconds waited of a push; discrepancy, alpha, weight, rate of a reply |
| 64:72 | samples, loss |
| 72:80 | first 8 bytes of the layout's digest |
| 80:112 | up to four arrays: type code in the high byte (0: no array), number of entries below it |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ps_elastic.errors import WireError
from ps_elastic.transport.messages import (
    MOST_SETTLED,
    OUTCOMES,
    Ask,
    Farewell,
    Layer,
    Message,
    PushMessage,
    Reply,
    Settled,
)

MAGIC, WIRE_VERSION = b"PSEL", 3
HEADER = struct.Struct("<4sBBHIHHQQ4dIf8s4Q")
HEADER_BYTES = HEADER.size
MAX_ARRAYS = 4
PUSH, REPLY, ASK, FAREWELL = range(1, 5)
_STOP, _MODEL_APART, _STATISTICS, _LAYERS, MODEL_SHARED, _VECTOR_APART, _STALE = 1, 2, 4, 8, 16, 32, 64
_SETTLED, _LAYER = 4, 3  # float64 numbers that tell of a settled push, and of a layer
_COPIED_BYTES = 1 << 13  # copying so little onto itself is quicker than asking whether it already stands there
_TYPES = ("<f4", "<f8", "<i4", "<i8", "|u1", "<u2", "<f2", "<u4", "|i1", "<i2")
_CODES = {np.dtype(name): code for code, name in enumerate(_TYPES, 1)}  # 0 is no array; an empty one has its type
FLOAT32 = _CODES[np.dtype("<f4")]


class Place(IntEnum):
    """Where the large array of a message is, the model of a reply or the first array of a push.

    Behind the header, in messages of its own, or, of a model, in memory shared with the server.
    """

    INLINE, APART, SHARED = range(3)


class Packed(NamedTuple):
    """A message ready to travel: `head` is one contiguous uint8 array; `apart` follows in messages of its own."""

    head: np.ndarray
    apart: np.ndarray | None = None


class Size(NamedTuple):
    """What a receiver must know of a message: its bytes, less the large array where that is elsewhere, and where it is.

    stale: a model came ahead that is not that of this reply.
    """

    nbytes: int
    place: Place
    stale: bool = False


class _Form(NamedTuple):
    """What the sizes in a header say: bytes of the message, and type, start and stop of each array that is in it.

    apart: type and entries of the one that is not.
    """

    nbytes: int
    places: tuple[tuple[np.dtype, int, int], ...]
    apart: tuple[np.dtype, int] | None


def padded(nbytes: int) -> int:
    return (nbytes + 7) & ~7


def pack(
    message: Message, layout: bytes, buffer: np.ndarray, *, place: Place = Place.INLINE, stale: bool = False
) -> Packed:
    """Write `message` into `buffer` (uint8, large enough) and return what of it is to be sent.

    layout: the digest. Arrays that already stand in their place in `buffer` are not copied; no more is a reply's model,
    or the first array of a push, that is somewhere else. stale: a model was sent ahead of this reply that is not its.
    Raises WireError for too many arrays or a type that has no code.
    """
    flags, bucket, buckets, numbers, samples, loss = 0, 0, 1, (0.0, 0.0, 0.0, 0.0), 0, 0.0
    apart = None
    match message:
        case PushMessage(worker, step, base, arrays, bucket, buckets, samples, loss):
            kind = PUSH
            numbers = (message.norm, message.payload_norm, message.residual_norm, message.waited_s)
            if message.statistics is not None:
                flags, arrays = _STATISTICS, (*arrays, message.statistics)
            flags |= message.ahead << 8
            if place == Place.APART and message.arrays:
                flags, apart = flags | _VECTOR_APART, message.arrays[0]
        case Reply(worker, step, base, given):
            kind, arrays = REPLY, ()
            flags = OUTCOMES.index(message.outcome) << 8 | (_STALE if stale else 0)
            numbers = (message.discrepancy, message.alpha, message.weight, message.rate)
            if given is None:
                flags |= _STOP
            elif place == Place.APART:
                flags, apart = flags | _MODEL_APART, given
            elif place == Place.SHARED:
                flags |= MODEL_SHARED
            else:
                arrays = (given,)
            if message.layers:
                flags |= _LAYERS
                arrays = (*arrays, _flat([(v, OUTCOMES.index(outcome), w) for v, outcome, w in message.layers]))
            if message.settled:
                told = [(step, OUTCOMES.index(outcome), d, bucket) for step, outcome, d, bucket in message.settled]
                arrays = (*arrays, _flat(told))
        case Ask(worker, step):
            kind, base, arrays = ASK, 0, ()
        case Farewell(worker, step, text, code):
            kind, base, arrays = FAREWELL, code, (np.frombuffer(text.encode(), np.uint8),)
    if len(arrays) > MAX_ARRAYS:
        raise WireError(f"{len(arrays)} arrays in a message; expected at most {MAX_ARRAYS}")
    sizes, end = [0] * MAX_ARRAYS, HEADER_BYTES
    for i, array in enumerate(arrays):
        if array.dtype not in _CODES:
            raise WireError(f"an array of {array.dtype} cannot be sent; known: {', '.join(_TYPES)}")
        sizes[i] = _CODES[array.dtype] << 56 | array.size
        if array is apart:
            continue
        target = buffer[end : end + array.nbytes]
        if array.nbytes <= _COPIED_BYTES or target.ctypes.data != array.ctypes.data:
            target.view(array.dtype)[:] = array
        end += padded(array.nbytes)
    HEADER.pack_into(
        buffer.data, 0, MAGIC, WIRE_VERSION, kind, flags, worker, bucket, buckets, step, base,
        *numbers, samples, loss, layout[:8], *sizes,
    )  # fmt: skip
    return Packed(buffer[:end], apart)


def size_of(head: np.ndarray, layout: bytes, source: str) -> Size:
    """How many bytes the message that starts with `head` takes, and where its large array is.

    Raises WireError naming `source` for another magic, version or layout, an unknown kind, or an unknown type.
    """
    fields = _fields(head, layout, source)
    form, flags = _form_of(fields, source), fields[3]
    if fields[2] == PUSH and form.apart is not None:
        return Size(form.nbytes, Place.APART)
    place = Place.INLINE
    if fields[2] == REPLY and flags & (_MODEL_APART | MODEL_SHARED):
        place = Place.APART if flags & _MODEL_APART else Place.SHARED
    return Size(form.nbytes, place, stale=fields[2] == REPLY and bool(flags & _STALE))


def unpack(frame: np.ndarray, layout: bytes, source: str, apart: np.ndarray | None = None) -> Message:
    """The message in `frame` (uint8); its arrays are views of `frame`. `apart`: the large one that is not in it.

    Of a push that is a view of `apart`, uint8.

    Raises WireError as `size_of` does, and where `frame` is shorter than its header says or does not hold what its
    kind needs.
    """
    fields = _fields(frame, layout, source)
    nbytes, places, vector = _form_of(fields, source)
    if frame.size < nbytes:
        raise WireError(f"{source}: got {frame.size} bytes, expected {nbytes}")
    arrays = [frame[start:stop].view(dtype) for dtype, start, stop in places]
    if vector is not None:
        dtype, count = vector
        if apart is None or apart.size != count * dtype.itemsize:
            there = "none" if apart is None else f"one of {apart.size} bytes"
            raise WireError(f"{source}: got {there} apart from its header, expected {count * dtype.itemsize} bytes")
        arrays.insert(0, apart.view(dtype))
    try:
        return _message(fields, arrays, apart)
    except (IndexError, ValueError, OverflowError) as error:
        raise WireError(f"{source}: a damaged message of kind {fields[2]}: {error}") from error


def _message(fields: tuple[Any, ...], arrays: list[np.ndarray], model: np.ndarray | None) -> Message:
    _, _, kind, flags, worker, bucket, buckets, step, base, a, b, c, d, samples, loss, *_ = fields
    if kind == PUSH:
        statistics = arrays.pop() if flags & _STATISTICS else None
        return PushMessage(
            worker, step, base, tuple(arrays), bucket, buckets, samples, loss, a, b, c, d, statistics, flags >> 8
        )
    if kind == ASK:
        return Ask(worker, step)
    if kind == FAREWELL:
        return Farewell(worker, step, bytes(arrays[0]).decode(), base)
    if not flags & (_STOP | _MODEL_APART | MODEL_SHARED):
        model = arrays.pop(0)
    found = arrays.pop(0).reshape(-1, _LAYER).tolist() if flags & _LAYERS else []
    layers = tuple(Layer(int(version), OUTCOMES[int(outcome)], weight) for version, outcome, weight in found)
    told = arrays[0].reshape(-1, _SETTLED).tolist() if arrays else []
    settled = tuple(Settled(int(s), OUTCOMES[int(outcome)], d, int(bucket)) for s, outcome, d, bucket in told)
    return Reply(
        worker, step, base, None if flags & _STOP else model, OUTCOMES[flags >> 8], a, b, c, settled, layers, d
    )


def reply_bytes(model_bytes: int, buckets: int) -> int:
    """Most bytes that a reply takes with a model of `model_bytes` in it and a layer for each of `buckets`."""
    return HEADER_BYTES + padded(model_bytes) + 8 * (_LAYER * buckets + _SETTLED * MOST_SETTLED)


def _flat(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1)


def _form_of(fields: tuple[Any, ...], source: str) -> _Form:
    try:
        return _form(fields[-MAX_ARRAYS:], fields[2] == PUSH and bool(fields[3] & _VECTOR_APART))
    except ValueError as error:
        raise WireError(f"{source}: {error}") from None


@lru_cache(maxsize=256)
def _form(sizes: tuple[int, ...], apart: bool) -> _Form:
    """Worked out once for each kind of message; apart: the first array is. Raises ValueError for an unknown type."""
    places, end, first = [], HEADER_BYTES, None
    for word in filter(None, sizes):
        code, count = word >> 56, word & ((1 << 56) - 1)
        if not 1 <= code <= len(_TYPES):
            raise ValueError(f"unknown array type {code}")
        dtype = np.dtype(_TYPES[code - 1])
        if apart and first is None:
            first = dtype, count
            continue
        nbytes = count * dtype.itemsize
        places.append((dtype, end, end + nbytes))
        end += padded(nbytes)
    if apart and first is None:
        raise ValueError("an array apart, expected with one named in the header")
    return _Form(end, tuple(places), first)


def _fields(head: np.ndarray, layout: bytes, source: str) -> tuple[Any, ...]:
    if head.size < HEADER_BYTES:
        raise WireError(f"{source}: got {head.size} bytes, expected a header of {HEADER_BYTES}")
    fields = HEADER.unpack_from(head.data)
    if fields[0] != MAGIC:
        raise WireError(f"{source}: starts with {fields[0]!r}, expected {MAGIC!r}")
    if fields[1] != WIRE_VERSION:
        raise WireError(f"{source}: wire version {fields[1]}, expected {WIRE_VERSION}")
    if fields[15] != layout[:8]:
        raise WireError(f"{source}: layout {fields[15].hex()}, expected {layout[:8].hex()}: another model or buckets")
    if fields[2] not in (PUSH, REPLY, ASK, FAREWELL):
        raise WireError(f"{source}: unknown kind of message {fields[2]}")
    if fields[2] == REPLY and (fields[3] >> 8) >= len(OUTCOMES):
        raise WireError(f"{source}: unknown outcome {fields[3] >> 8}")
    return fields
