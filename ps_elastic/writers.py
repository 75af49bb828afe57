"""Workers that add their updates to the shared model themselves: `writers: workers`.

A worker subtracts (alpha / p) x what its push decodes to from the model as soon as that is encoded, and then sends the
header; rank 0 counts versions, measures and lets the rule decide when the worker goes on. A push that is dropped, as
the last ones are when the run ends, is added back by its worker.
Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, shared memory; without a lock: Recht, Re, Wright, Niu,
"Hogwild!", NIPS 2011.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.events import PushId, Step
from ps_elastic.layout import Bucket, Layout
from ps_elastic.messages import PushMessage
from ps_elastic.norms import norm, quiet
from ps_elastic.optimizer import FlatOptimizer, Quotient, Sweep
from ps_elastic.torn import TornCalculator


class Writer:
    """A worker's pen. x: the shared model (d,). lock: held while a bucket is written; a null context writes plainly."""

    def __init__(self, x: Tensor, buckets: Sequence[Bucket], lock: AbstractContextManager[object]) -> None:
        self._x, self._buckets, self._lock = x, buckets, lock

    def write(self, i: int, compressor: Compressor, payload: Payload, rate: float) -> None:
        """x -= rate * decoded payload, in bucket i."""
        bucket = self._buckets[i]
        with self._lock:
            compressor.accumulate(payload, self._x[bucket.start : bucket.stop], -rate)


class Witness(FlatOptimizer):
    """Stands in for plain SGD where the steps have been made already: it measures them.

    known: ||gradient|| of the next step, where it is: that need not be measured.
    """

    known: float | None = None

    @quiet
    def step(self, gradient: Tensor | Iterable[Quotient], rate: float, sweep: Sweep | None = None) -> float:
        """Return rate * ||gradient||; the distances are those of x with this step taken back."""
        sweep, square, moved, known = sweep or Sweep(), self.difference.square, 0.0, self.known
        if known is not None and not sweep.views:
            return rate * known
        quotients = self.cut(gradient) if isinstance(gradient, Tensor) else gradient
        for block, (part, divisor) in zip(self._blocks, quotients, strict=True):
            scale, room = rate / divisor, self.difference.room[: part.numel()]
            place = torch.from_numpy(room)
            for i, view in enumerate(sweep.views):
                torch.sub(view[block.start : block.stop], part, alpha=scale, out=place)
                sweep.squares[i] += square(block.array, room)
            if known is None:
                moved += (scale * norm(part)) ** 2
        return math.sqrt(moved) if known is None else rate * known


class WrittenCalculator(TornCalculator):
    """The calculator of a server whose workers write."""

    workers_write = True

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        witness: Witness,
        compressors: Sequence[Compressor],
        copies: Mapping[int, Tensor],
    ) -> None:
        super().__init__(layout, x, witness, compressors, copies)
        self._witness = witness
        self._norms: dict[PushId, float] = {}  # ||decoded payload|| of the pushes that are here

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        super().take(push, parts)
        self._norms[push] = parts[0].payload_norm

    def free(self, push: PushId) -> None:
        super().free(push)
        self._norms.pop(push, None)

    def combine(self, step: Step) -> None:
        super().combine(step)
        self._witness.known = self._norms[step.terms[0].push] if len(step.terms) == 1 else None
