"""What pushes carried, as long as somebody needs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.compressors.base import reapply
from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import PushId
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout

_SMALL = 1 << 16  # floats of a vector that may be kept beyond its push


class Payloads:
    """of: push -> a payload for each bucket. dense: combined payloads (0, version), (d,)."""

    def __init__(self, layout: Layout, compressors: Sequence[Compressor]) -> None:
        self.of: dict[PushId, tuple[Payload, ...]] = {}
        self.dense: dict[PushId, Tensor] = {}
        self._layout, self._compressors = layout, compressors
        self._numels = [bucket.numel for bucket in layout.buckets]
        # worker -> the arrays of its last push and what they are, where all vectors of a size are: they may come again
        self._last: dict[int, tuple[tuple[Any, ...], tuple[Payload]]] | None = None
        if self._numels == [layout.size] and layout.size <= _SMALL and type(compressors[0]) is Identity:
            self._last = {}

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        """Note what came in `parts`, one for each bucket, where it lies. Raises WireError."""
        last, arrays = self._last, parts[0].arrays
        if last is not None and push.worker in last and last[push.worker][0] is arrays:
            self.of[push] = last[push.worker][1]
        elif len(parts) == 1:
            self.of[push] = whole = (self.read(parts[0], 0),)
            if last is not None:
                last[push.worker] = arrays, whole
        else:
            self.of[push] = tuple([self.read(part, i) for i, part in enumerate(parts)])

    def read(self, part: PushMessage, i: int) -> Payload:
        """What came for bucket i. Raises WireError."""
        payload = tuple(map(torch.from_numpy, part.arrays))
        self._compressors[i].check(payload, self._numels[i])
        return payload

    def keep(self, push: PushId) -> None:
        """Copy it out of the memory where it lies."""
        copies = (tuple(array.clone() for array in payload) for payload in self.of[push])
        self.of[push] = tuple(copies)

    def free(self, pushes: Iterable[PushId]) -> None:
        for push in pushes:
            if push in self.of:
                del self.of[push]
            if self.dense:
                self.dense.pop(push, None)

    def decoded(self, push: PushId) -> Tensor:
        """A new vector (d,): what `push` carried."""
        if push in self.dense:
            return self.dense[push].clone()
        out = self._layout.empty()
        for payload, bucket, compressor in zip(self.of[push], self._layout.buckets, self._compressors, strict=True):
            compressor.accumulate(payload, out[bucket.start : bucket.stop])
        return out

    def reapply(self, push: PushId, x: Tensor, rate: float) -> None:
        """x (d,) -= rate x what `push` carried."""
        reapply(x, self.of[push], self._layout.buckets, self._compressors, rate)
