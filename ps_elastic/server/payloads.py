"""What pushes carried, as long as somebody needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.compressors.base import reapply
from ps_elastic.policies.events import PushId
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout


class Payloads:
    """of: push -> a payload for each bucket. dense: combined payloads (0, version), (d,)."""

    def __init__(self, layout: Layout, compressors: Sequence[Compressor]) -> None:
        self.of: dict[PushId, tuple[Payload, ...]] = {}
        self.dense: dict[PushId, Tensor] = {}
        self._layout, self._compressors = layout, compressors
        self._numels = [bucket.numel for bucket in layout.buckets]

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        """Note what came in `parts`, one for each bucket, where it lies. Raises WireError."""
        if len(parts) == 1:
            self.of[push] = (self.read(parts[0], 0),)
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

    def free(self, push: PushId) -> None:
        self.of.pop(push, None)
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
