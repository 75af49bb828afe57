"""Places in g, and the squares of what stands there: those of a large tensor are added up on its way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from torch import Tensor

from ps_elastic.vectors.kernels import kernels_for
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.vectors.norms import quiet, squares

_LARGE = 1 << 18  # floats: less is in cache still when everything is there, and it takes fewer calls to square it then
_BLOCK = 1 << 16  # floats: what is copied is in cache when it is squared


class Place:
    """view: contiguous, of g."""

    def __init__(self, view: Tensor) -> None:
        self.view, self.is_large = view, view.numel() >= _LARGE
        self._square: float | None = None  # of what stands there, where it is known
        self._kernels, self._blocks = None, []
        if view.device.type == "cpu":
            self._kernels, flat = kernels_for(view.numel()), view.detach().view(-1)
            blocks = flat.split(_BLOCK if self.is_large and self._kernels is None else max(1, view.numel()))
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


def measured(layout: Layout, bucket: Bucket, places: Sequence[Place], g: Tensor) -> Iterator[Place]:
    """What `bucket` is squared by: the places of its large tensors, and runs of small ones. places: of every tensor."""
    inside = [pair for pair in zip(layout.slots, places, strict=True) if bucket.start <= pair[0].offset < bucket.stop]
    for is_large, group in groupby(inside, lambda pair: pair[1].is_large):
        members = list(group)
        if is_large:
            yield from [place for _, place in members]
        else:
            first, last = members[0][0], members[-1][0]
            yield Place(g[first.offset : last.offset + last.numel])
