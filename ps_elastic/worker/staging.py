"""How a bucket of the gradient comes to the CPU, with its square: it is there already, or it is copied from a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ps_elastic.vectors.kernels import kernels_for
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.vectors.norms import quiet, squares

_LARGE = 1 << 18  # floats: less is in cache still when everything is there, and it takes fewer calls to square it then
_SQUARED_BLOCK = 1 << 16  # floats: what is copied is in cache when it is squared


class Staging(Protocol):
    """g: the gradient (d,) on the CPU, of which each bucket is right from when it was fetched."""

    g: Tensor

    def begin(self, i: int) -> None:
        """Bucket i is final, as seen from the stream that backward uses: what can be done without waiting is begun."""

    def fetch(self, i: int) -> list[float]:
        """Return when bucket i is in g: the sum of its squares, in parts."""


class InPlace:
    """Backward leaves the gradient in g itself. places: those that make up each bucket."""

    def __init__(self, g: Tensor, places: Sequence[Sequence[GradientRegion]]) -> None:
        self.g, self._places = g, places

    def begin(self, i: int) -> None:
        """There is nothing to be done."""

    def fetch(self, i: int) -> list[float]:
        return [place.square() for place in self._places[i]]


class FromGpu:
    """made (d,) is on a GPU: buckets are copied into pinned memory on a stream of their own, while backward goes on."""

    def __init__(self, made: Tensor, buckets: Sequence[Bucket]) -> None:
        self.g = torch.zeros(made.shape, pin_memory=True)
        stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._made, self._buckets, self._stream = made, buckets, stream(made.device)
        self._norms = torch.zeros(len(buckets), pin_memory=True)
        self._events: dict[int, torch.cuda.Event] = {}

    def begin(self, i: int) -> None:
        bucket = self._buckets[i]
        part = slice(bucket.start, bucket.stop)
        self._stream.wait_stream(torch.cuda.current_stream(self._made.device))
        with torch.cuda.stream(self._stream):
            norm = torch.linalg.vector_norm(self._made[part])
            self._norms[i].copy_(norm, non_blocking=True)
            self.g[part].copy_(self._made[part], non_blocking=True)
            self._events[i] = self._stream.record_event()

    def fetch(self, i: int) -> list[float]:
        if i not in self._events:
            self.begin(i)
        self._events.pop(i).synchronize()
        return [float(self._norms[i]) ** 2]


class GradientRegion:
    """view: contiguous, of g."""

    def __init__(self, view: Tensor) -> None:
        self.view, self.is_large = view, view.numel() >= _LARGE
        self._square: float | None = None  # of what stands there, where it is known
        self._kernels, self._blocks = None, []
        if view.device.type == "cpu":
            self._kernels, flat = kernels_for(view.numel()), view.detach().view(-1)
            size = _SQUARED_BLOCK if self.is_large and self._kernels is None else max(1, view.numel())
            blocks = torch.split(flat, size)
            self._blocks = [(block.numpy(), self._squares(block.numpy())) for block in blocks]

    def put(self, gradient: Tensor, *, final: bool) -> None:
        """Copy it here. final: nobody changes it any more, so that it may be squared on the way."""
        if final and self.is_large and self._blocks and gradient.is_contiguous():
            self._square = self._carried(gradient)
        else:
            self.view.copy_(gradient)
            self._square = None

    def add(self, gradient: Tensor) -> None:
        self.view.add_(gradient)
        self._square = None

    def clear(self) -> None:
        self.view.zero_()
        self._square = None

    @quiet
    def square(self) -> float:
        """The sum of the squares of what stands here, on the CPU."""
        return sum([square() for _, square in self._blocks]) if self._square is None else self._square

    @quiet
    def _carried(self, gradient: Tensor) -> float:
        source, start, total = gradient.numpy().reshape(-1), 0, 0.0
        if self._kernels is not None:
            return float(self._kernels.carry(source, self._blocks[0][0]))
        for block, square in self._blocks:
            block[:] = source[start : start + block.size]
            start += block.size
            total += square()
        return total

    def _squares(self, array: np.ndarray) -> Callable[[], float]:
        return squares(array) if self._kernels is None else partial(self._kernels.square, array)


class KeptGradient:
    """As `GradientRegion`, but the gradient is kept as backward made it, and `view` stays zero, as if none was made."""

    def __init__(self, view: Tensor) -> None:
        self.view = self._made = view

    def put(self, gradient: Tensor, *, final: bool) -> None:
        self._made = gradient

    def add(self, gradient: Tensor) -> None:
        self._made.add_(gradient)

    def clear(self) -> None:
        self._made = self.view

    def take(self) -> Tensor:
        """The gradient (n,), which is let go."""
        made, self._made = self._made, self.view
        return made.reshape(-1)


def measured(layout: Layout, bucket: Bucket, places: Sequence[GradientRegion], g: Tensor) -> Iterator[GradientRegion]:
    """What `bucket` is squared by: the places of its large tensors, and runs of small ones. places: of every tensor."""
    inside = [pair for pair in zip(layout.slots, places, strict=True) if bucket.start <= pair[0].offset < bucket.stop]
    for is_large, group in groupby(inside, lambda pair: pair[1].is_large):
        members = list(group)
        if is_large:
            yield from [place for _, place in members]
        else:
            first, last = members[0][0], members[-1][0]
            yield GradientRegion(g[first.offset : last.offset + last.numel])
