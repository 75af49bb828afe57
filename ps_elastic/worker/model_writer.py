"""Workers that add their updates to the shared model themselves: `writers: workers`.

A worker subtracts (alpha / p) x what its push decodes to from the model as soon as that is encoded, measures on the way
how far the model is from the copy that it computed on, leaves that distance in shared memory, and sends the metadata.
Rank 0 counts versions, logs, and lets the policy decide when the worker continues; nothing as long as the model is left
for it to do. A push that is discarded, as the last ones are when the run ends, is added back by its worker.
Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, shared memory; without a lock: Recht, Re, Wright, Niu,
"Hogwild!", NIPS 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.compressors.identity import Identity
from ps_elastic.vectors.kernels import kernels_for, same_bits
from ps_elastic.vectors.layout import Layout
from ps_elastic.vectors.norms import Difference, quiet, squares

_BLOCK = 1 << 16  # floats: model, copy, gradient and room for a difference stay in 1 MB of cache
_SMALL = 1 << 14  # floats: a smaller gradient is copied beside its neighbours


class SharedModel(NamedTuple):
    """What a writer works on. x: the shared model (d,). lock: held while a block of it is written; a null context
    writes plainly. distances: (n,) float64, where that of push s is left at s modulo n."""

    x: Tensor
    lock: AbstractContextManager[object]
    distances: np.ndarray


class _Piece(NamedTuple):
    """A part of the model and of the copy, and where it starts in its tensor."""

    x: Tensor
    copy: Tensor
    start: int


class Run(NamedTuple):
    """A large tensor of the flat vector, or neighbours that are small: floats [start, stop), and their names."""

    start: int
    stop: int
    names: tuple[str, ...]


def runs_of(layout: Layout) -> list[Run]:
    """The tensors of a layout in their order: an operation on a small one takes as long as it takes to call."""
    runs: list[Run] = []
    large = True  # the last one
    for slot in layout.slots:
        stop = slot.offset + slot.numel
        before, large = large, slot.numel > _SMALL
        if before or large:
            runs.append(Run(slot.offset, stop, (slot.name,)))
        else:
            runs[-1] = Run(runs[-1].start, stop, (*runs[-1].names, slot.name))
    return runs


class ModelWriter:
    """A worker's pen. copy: its copy of the model (d,). measures: whether distances are wanted, else they are nan.

    A gradient that is written as backward made it comes in parts (n,), one for each of `runs_of` the layout.
    """

    def __init__(self, shared_model: SharedModel, copy: Tensor, layout: Layout, *, measures: bool) -> None:
        self._x, self._lock, self._distances = shared_model
        self._copy, self._buckets, self._measures = copy, layout.buckets, measures
        kernels = kernels_for(layout.size)
        self._difference = Difference(min(_BLOCK, layout.size), kernels)
        self._kernels = kernels if kernels is not None and _adds_like_torch(kernels) else None
        self._in_buckets = [self._cut(bucket.start, bucket.stop) for bucket in layout.buckets]
        self.runs = runs_of(layout)
        self._in_runs = [self._cut(run.start, run.stop) for run in self.runs]

    def read(self) -> None:
        """Copy the model, as it is at the moment, into the copy."""
        self._copy.copy_(self._x)

    @quiet
    def write(self, i: int, compressor: Compressor, payload: Payload, rate: float, *, reads: bool) -> float:
        """x -= rate * decoded payload, in bucket i; return ||x - copy||^2 there, of x without that.

        reads: the copy is read again on the way, with this write in it.
        """
        if isinstance(compressor, Identity):
            return self._write(self._in_buckets[i], payload[0], rate, reads)[0]
        square, bucket = 0.0, slice(self._buckets[i].start, self._buckets[i].stop)
        for x, copy, _ in self._in_buckets[i] if self._measures or reads else ():
            square += self._away(x, copy)
            if reads:
                copy.copy_(x)
        with self._lock:
            compressor.accumulate(payload, self._x[bucket], -rate)
        if reads:
            compressor.accumulate(payload, self._copy[bucket], -rate)
        return square

    @quiet
    def write_parts(self, parts: Sequence[Tensor], rate: float, *, reads: bool) -> tuple[float, float]:
        """x -= rate * gradient; return ||x - copy||^2 as `write` does, and ||gradient||.

        Where that norm is not finite nothing is written.
        """
        square = norm = 0.0
        for done, (pieces, part) in enumerate(zip(self._in_runs, parts, strict=True)):
            distance, size = self._write(pieces, part, rate, reads)
            square, norm = square + distance, norm + size
            if not math.isfinite(norm):
                self.take_parts_back(parts[:done], rate)
                break
        return square, math.sqrt(norm)

    def take_back(self, i: int, compressor: Compressor, payload: Payload, rate: float) -> None:
        """x += rate * decoded payload, in bucket i."""
        with self._lock:
            compressor.accumulate(payload, self._x[self._buckets[i].start : self._buckets[i].stop], rate)

    def take_parts_back(self, parts: Sequence[Tensor], rate: float) -> None:
        """x += rate * gradient, or what of it is in the first parts."""
        for pieces, part in zip(self._in_runs, parts, strict=False):
            self._add(pieces, part, rate)

    def leave(self, step: int, square: float) -> None:
        """Tell rank 0 the distance of push `step`, before its header leaves."""
        self._distances[step % self._distances.size] = math.sqrt(square) if self._measures else math.nan

    def _write(self, pieces: Sequence[_Piece], vector: Tensor, rate: float, reads: bool) -> tuple[float, float]:
        """(||x - copy||^2, ||vector||^2), all that is to be done with a block at once; up to one that is not finite."""
        square = norm = 0.0
        for done, (x, copy, start) in enumerate(pieces):
            part = vector[start : start + x.numel()]
            norm += squares(part.numpy())() if self._kernels is None else self._kernels.square(part.numpy())
            if not math.isfinite(norm):
                self._add(pieces[:done], vector, rate)
                break
            square += self._write_piece(x, copy, part, rate, reads)
        return square, norm

    def _write_piece(self, x: Tensor, copy: Tensor, part: Tensor, rate: float, reads: bool) -> float:
        if self._kernels is not None:  # one pass, all of it locked: there is nothing to be gained by two
            kernel = self._kernels.write(self._measures, reads)
            with self._lock:
                return float(kernel(x.numpy(), copy.numpy(), part.numpy(), rate))
        square = self._away(x, copy)
        with self._lock:
            x.add_(part, alpha=-rate)
        if reads:
            copy.copy_(x)
        return square

    def _add(self, pieces: Sequence[_Piece], vector: Tensor, rate: float) -> None:
        for x, _, start in pieces:
            with self._lock:
                x.add_(vector[start : start + x.numel()], alpha=rate)

    def _away(self, x: Tensor, copy: Tensor) -> float:
        return self._difference.square(x.numpy(), copy.numpy()) if self._measures else 0.0

    def _cut(self, start: int, stop: int) -> list[_Piece]:
        ends = [(i, min(i + _BLOCK, stop)) for i in range(start, stop, _BLOCK)]
        return [_Piece(self._x[i:j], self._copy[i:j], i - start) for i, j in ends]


@cache
def _adds_like_torch(kernels: ModuleType) -> bool:
    """Whether the kernel that writes leaves the bits that torch leaves, on this machine."""
    write = kernels.write(False, False)
    return same_bits(
        lambda x, g: x.add_(g, alpha=-0.3), lambda x, g: write(x.numpy(), x.numpy(), g.numpy(), 0.3), vectors=2
    )
