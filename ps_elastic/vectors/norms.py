"""Norms of float32 vectors, good to a millionth at the price of a float32 dot product.

The squares of 1024 entries at a time are summed in float32 by the BLAS, which adds in 32 shards or more, so that no
shard makes more than 32 additions; these sums are added in double precision. By the usual bound on a sum of positive
numbers its square is off by at most (1024 / 32 + 5) 2^-24 = 2.2e-6 of itself, hence the norm by `ACCURACY`. Single
precision throughout would be as fast and off by 4e-4 at ten million entries (seen); double precision throughout takes
six times as long. One thread computes, so that a norm does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
from torch import Tensor

ACCURACY = 1.2e-6  # relative error of a norm at most
_ROW = 1024
LEAST, MOST = 1e-24, 1e30  # a sum of squares outside of these may have lost more to the ends of float32's range


# Sums of squares that overflow are made again in double precision: numpy need not warn of them.
quiet = np.errstate(over="ignore", under="ignore", invalid="ignore")


class _Sum(NamedTuple):
    """A float32 array (n,) as the sum of its squares is made: in rows, and what is left over."""

    array: np.ndarray
    rows: np.ndarray  # (n // _ROW, 1, _ROW)
    columns: np.ndarray  # (n // _ROW, _ROW, 1): the same
    sums: np.ndarray  # (n // _ROW, 1, 1)
    flat: np.ndarray  # (n // _ROW,): the same
    rest: np.ndarray  # (n % _ROW,)

    @classmethod
    def of(cls, array: np.ndarray) -> _Sum:
        count = array.size // _ROW
        whole = array[: count * _ROW]
        sums = np.empty((count, 1, 1), np.float32)
        rows, columns = whole.reshape(-1, 1, _ROW), whole.reshape(-1, _ROW, 1)
        return cls(array, rows, columns, sums, sums.ravel(), array[count * _ROW :])

    def square(self) -> float:
        total = 0.0
        if self.flat.size:
            np.matmul(self.rows, self.columns, out=self.sums)
            total = sum(self.flat.tolist())
        if self.rest.size:
            total += float(self.rest.dot(self.rest))
        if LEAST < total < MOST:
            return total
        if not np.count_nonzero(self.array):  # a third of the time of `any`
            return 0.0
        return float(np.square(self.array, dtype=np.float64).sum())


def squares(array: np.ndarray) -> Callable[[], float]:
    """What tells ||array||^2 of a contiguous float32 array (n,), as it is when that is called; be `quiet`."""
    return _Sum.of(array).square


class Difference:
    """`room` (n,) for the difference of two vectors of that length or less; it allocates nothing once it was used.

    Vectors in cache are compared by numpy, whose calls take 0.25 us before they begin, where those of torch take 0.7.
    kernels: of `kernels_for`; with them there is no difference, `room` is left alone, and sums are more exact.

    square(a, b): ||a - b||^2 of two vectors (m,), m <= n; b may be room[:m], which holds the difference then. Be
    `quiet`.
    """

    def __init__(self, numel: int, kernels: ModuleType | None = None) -> None:
        self.room = np.empty(numel, np.float32)
        self._forms: dict[int, _Sum] = {}  # by length
        self._kernels = kernels
        self.square: Callable[[np.ndarray, np.ndarray], float] = self._square if kernels is None else kernels.distance

    def _square(self, a: np.ndarray, b: np.ndarray) -> float:
        size, forms = a.size, self._forms
        if size not in forms:
            forms[size] = _Sum.of(self.room[:size])
        form = forms[size]
        np.subtract(a, b, form.array)
        if not form.flat.size and LEAST < (total := float(form.rest.dot(form.rest))) < MOST:  # as below, but sooner
            return total
        return form.square()

    @quiet
    def norm(self, a: Tensor, b: Tensor) -> float:
        """||a - b|| of two vectors (d,), however long."""
        step, first, second = self.room.size, a.numpy(), b.numpy()
        if self._kernels is not None:
            return math.sqrt(self._kernels.distance(first, second))
        starts = range(0, first.size, step)
        return math.sqrt(sum([self.square(first[i : i + step], second[i : i + step]) for i in starts]))


@quiet
def norm(vector: Tensor) -> float:
    """||vector||_2 of a contiguous float32 vector (n,) on the CPU."""
    return math.sqrt(_Sum.of(vector.detach().numpy()).square())
