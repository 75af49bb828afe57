"""What a worker sees of others without the server's memory: how far they moved the model under its push."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.compressors.identity import Identity
from ps_elastic.vectors.kernels import kernels_for
from ps_elastic.vectors.layout import Bucket
from ps_elastic.vectors.norms import Difference, quiet
from ps_elastic.worker.flat_module import FlatModule, ModelLives

_BLOCK = 1 << 16  # floats: model, copy and room for their difference stay in cache
_LATE_BLOCK = 1 << 15  # and those of the gradient too


class DriftMeter:
    """||new model + own applied update - old copy|| of each push; for plain SGD what others did meanwhile, exactly.

    copy: the model computed on (d,), which nobody else looks at or writes to between a push and its reply. What
    can be done without the reply is done while it is awaited: of a push with the weights of its two predecessors the
    own update is taken off before the reply tells so.

    moved: the distance for the last reply, nan before any push.
    """

    moved = math.nan

    def __init__(self, copy: Tensor, buckets: Sequence[Bucket], compressors: Sequence[Compressor]) -> None:
        self._copy, self._compressors = copy, compressors
        self._kernels = kernels_for(copy.numel()) if copy.device.type == "cpu" else None
        self._difference = Difference(min(copy.numel(), _BLOCK)) if copy.device.type == "cpu" else None
        self._blocks = [block.numpy() for block in torch.split(copy, _BLOCK)] if self._difference else []
        self._parts = [copy[bucket.start : bucket.stop] for bucket in buckets]
        self._payloads: Sequence[Payload] = ()  # of the push that is not answered yet
        self._nothing = (0.0,) * len(buckets)
        self._told = self._taken = self._nothing  # weights: of the last reply, and what was taken off for its push
        self._steady = False  # whether the last two replies told the same weights

    def left(self, payloads: Sequence[Payload], copy: Tensor | None) -> None:
        """A push has left; its payloads stay until the reply. copy: where its gradient was taken (d,), if not at x."""
        if copy is not None:
            self._copy.copy_(copy)
        self._payloads, self._taken = payloads, self._nothing
        if self._steady:
            self._take_off(self._told)

    def came(self, model: Tensor, weights: Sequence[float]) -> None:
        """The copy becomes `model` (d,), of the reply, which applied bucket i times weights[i]."""
        if self._payloads:
            self._settle(weights)
            self.moved = self._follow(model)
        else:
            self._copy.copy_(model)

    def _settle(self, weights: Sequence[float]) -> None:
        """The reply has told what became of the push."""
        self._take_off(weights)
        self._steady, self._told = self._told == weights, tuple(weights)

    def _take_off(self, weights: Sequence[float]) -> None:
        """The old copy less the own update, by these weights in all."""
        for i, (weight, taken) in enumerate(zip(weights, self._taken, strict=True)):
            payload, compressor, part = self._payloads[i], self._compressors[i], self._parts[i]
            if weight == taken or not payload:
                continue
            if self._difference is None:
                part.sub_(compressor.decode(payload, part.numel()).to(part.device), alpha=weight - taken)
            else:
                compressor.accumulate(payload, part, taken - weight)
        self._taken = tuple(weights)

    @quiet
    def _follow(self, model: Tensor) -> float:
        """How far the copy is from the model, which is the copy from now on: one pass over both."""
        if self._difference is None:
            model = model.to(self._copy.device)
            moved = float(torch.linalg.vector_norm(self._copy.sub_(model)))
            self._copy.copy_(model)
            return moved
        if self._kernels is not None:
            return math.sqrt(self._kernels.follow(self._copy.numpy(), model.numpy()))
        total = 0.0
        for new, copy in zip(torch.split(model, _BLOCK), self._blocks, strict=True):
            block = new.numpy()
            total += self._difference.square(copy, block)
            np.copyto(copy, block)
        return math.sqrt(total)


class LateDriftMeter(DriftMeter):
    """As `DriftMeter`, of a worker on the CPU that computes where each model arrives: x (d,), which stays as it is
    then.

    Nothing is done before the worker continues: the model is compared with the copy, and the next copy is made of it,
    in one pass when the next push has left.
    """

    def __init__(self, x: Tensor, buckets: Sequence[Bucket], compressors: Sequence[Compressor]) -> None:
        super().__init__(torch.empty_like(x), buckets, compressors)
        self._x, self._pending, self._moved = x, False, math.nan
        self._cuts = [_cut(bucket) for bucket in buckets]

    @property
    def moved(self) -> float:  # type: ignore[override]
        if self._pending:
            assert self._difference is not None
            self._moved, self._pending = self._difference.norm(self._x, self._copy), False
        return self._moved

    @quiet
    def left(self, payloads: Sequence[Payload], copy: Tensor | None) -> None:
        self._payloads, self._taken = payloads, self._told if self._steady else self._nothing
        total = sum(self._renew(i, self._x if copy is None else copy) for i in range(len(payloads)))
        if self._pending:
            self._moved, self._pending = math.sqrt(total), False

    def came(self, model: Tensor, weights: Sequence[float]) -> None:
        """x is the model of the reply, which applied bucket i times weights[i]."""
        if self._payloads:
            self._settle(weights)
            self._pending = True

    def _renew(self, i: int, source: Tensor) -> float:
        """Make bucket i of the copy: `source` less what was taken off; return how far the model is from it, squared."""
        payload, compressor, weight, total = self._payloads[i], self._compressors[i], self._taken[i], 0.0
        cut = self._cuts[i]
        pieces: Sequence[Payload] = ()
        if weight and payload and (compressor.cuts or len(cut) == 1):
            first = cut[0].start
            pieces = compressor.cut(payload, [part.stop - first for part in cut]) if len(cut) > 1 else [payload]
        for k, part in enumerate(cut):
            copy = self._copy[part]
            if self._pending:
                assert self._difference is not None
                total += self._difference.square(copy.numpy(), self._x[part].numpy())
            if pieces and isinstance(compressor, Identity):  # a pass less
                torch.add(source[part], pieces[k][0], alpha=-weight, out=copy)
                continue
            copy.copy_(source[part])
            if pieces:
                compressor.accumulate(pieces[k], copy, -weight)
        if weight and payload and not pieces:
            compressor.accumulate(payload, self._parts[i], -weight)
        return total


def drift_meter(flat: FlatModule, compressors: Sequence[Compressor], *, moves: bool) -> DriftMeter | None:
    """What tells the drift of pushes computed there; None if no model is kept. moves: the update moves x."""
    if flat.lives is ModelLives.SERVERS:
        return None
    if flat.lives is ModelLives.OWN and not moves:
        return LateDriftMeter(flat.x, flat.layout.buckets, compressors)
    copy = flat.x if flat.lives is ModelLives.BESIDE else torch.empty_like(flat.x)  # x stays until the next model comes
    return DriftMeter(copy, flat.layout.buckets, compressors)


def _cut(bucket: Bucket) -> list[slice]:
    """The bucket in blocks."""
    starts = range(bucket.start, bucket.stop, _LATE_BLOCK)
    return [slice(start, min(start + _LATE_BLOCK, bucket.stop)) for start in starts]
