"""Small messages of one kind, again and again: what is the same in all of them is made once.

`pack` and `unpack` are the general way, which is taken for everything out of the usual; the bytes are the same.
"""

from __future__ import annotations

import struct

import numpy as np

from ps_elastic.transport.messages import OUTCOMES, Message, PushMessage, Reply
from ps_elastic.transport.wire import (
    FLOAT32,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MODEL_SHARED,
    PUSH,
    REPLY,
    WIRE_VERSION,
    Place,
    pack,
    padded,
    unpack,
)

_QUICK = struct.Struct("<6sBBIHHQQ4dIf40s")  # the header, with what tells its form in the first, the third and the last
_OPENING = struct.pack("<4sBB", MAGIC, WIRE_VERSION, PUSH)
_OUTCOMES = {outcome: code << 8 for code, outcome in enumerate(OUTCOMES)}  # as flags


class PushReader:
    """Reads what arrives in `frame` (uint8), one message at a time: `unpack`, whose arrays are kept while the header
    says that they are where they were."""

    def __init__(self, frame: np.ndarray, layout: bytes, source: str) -> None:
        self._frame, self._layout, self._source, self._bytes = frame, layout, source, frame.data
        self._form: tuple[bytes, int] | None = None  # layout and sizes, and flags, of the push read last
        self._arrays: tuple[np.ndarray, ...] = ()
        self._statistics: np.ndarray | None = None

    def read(self) -> Message:
        """The message in the frame. Raises WireError as `unpack` does."""
        fields = _QUICK.unpack_from(self._bytes)
        opening, flags, ahead, worker, bucket, buckets, step, base, a, b, c, d, samples, loss, sizes = fields
        if (sizes, flags) != self._form or opening != _OPENING:
            return self._read_anew(sizes, flags)
        return PushMessage(
            worker, step, base, self._arrays, bucket, buckets, samples, loss, a, b, c, d, self._statistics, ahead
        )

    def _read_anew(self, sizes: bytes, flags: int) -> Message:
        message = unpack(self._frame, self._layout, self._source)
        if isinstance(message, PushMessage):
            self._form, self._arrays, self._statistics = (sizes, flags), message.arrays, message.statistics
        return message


class ReplyStamp:
    """Writes replies into `buffer`: `pack`, where the model, (entries,) float32, always has the same place.

    place: behind the header, or in memory shared with the worker.
    """

    def __init__(self, buffer: np.ndarray, layout: bytes, entries: int, place: Place) -> None:
        self.place, self._buffer, self._layout, self._bytes = place, buffer, layout, buffer.data
        inside = entries if place == Place.INLINE else 0
        self._room = buffer[HEADER_BYTES : HEADER_BYTES + 4 * inside].view(np.float32)
        self._frame = buffer[: HEADER_BYTES + padded(4 * inside)]
        self._flags, self._size = (0, FLOAT32 << 56 | entries) if inside else (MODEL_SHARED, 0)

    def write(self, reply: Reply) -> np.ndarray:
        """What of the buffer is to be sent."""
        worker, step, version, model, outcome, discrepancy, alpha, weight, settled, layers, rate = reply
        if model is None or settled or layers:
            return pack(reply, self._layout, self._buffer, place=self.place).head
        if self._size:
            self._room[:] = model
        HEADER.pack_into(
            self._bytes, 0, MAGIC, WIRE_VERSION, REPLY, self._flags | _OUTCOMES[outcome], worker, 0, 1, step, version,
            discrepancy, alpha, weight, rate, 0, 0.0, self._layout[:8], self._size, 0, 0, 0,
        )  # fmt: skip
        return self._frame
