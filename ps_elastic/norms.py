"""Norms of float32 vectors, good to a millionth at the price of a float32 dot product.

The squares of 1024 entries at a time are summed in float32 by the BLAS, which adds in 32 lanes or more, so that no
lane makes more than 32 additions; these sums are added in double precision. By the usual bound on a sum of positive
numbers its square is off by at most (1024 / 32 + 5) 2^-24 = 2.2e-6 of itself, hence the norm by `ACCURACY`. Single
precision throughout would be as fast and off by 4e-4 at ten million entries (seen); double precision throughout takes
six times as long. One thread computes, so that a norm does not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ACCURACY = 1.2e-6  # relative error of a norm at most
_ROW = 1024
_LEAST, _MOST = 1e-24, 1e30  # a sum of squares outside of these may have lost more to the ends of float32's range


# Sums of squares that overflow are made again in double precision: numpy need not warn of them.
quiet = np.errstate(over="ignore", under="ignore", invalid="ignore")


class _Sum(NamedTuple):
    """A float32 array (n,) as the sum of its squares is made: in rows, and what is left over."""

    array: np.ndarray
    rows: np.ndarray  # (n // _ROW, 1, _ROW)
    columns: np.ndarray  # (n // _ROW, _ROW, 1): the same
    sums: np.ndarray  # (n // _ROW, 1, 1)
    rest: np.ndarray  # (n % _ROW,)

    @classmethod
    def of(cls, array: np.ndarray) -> _Sum:
        count = array.size // _ROW
        whole = array[: count * _ROW]
        sums = np.empty((count, 1, 1), np.float32)
        return cls(array, whole.reshape(-1, 1, _ROW), whole.reshape(-1, _ROW, 1), sums, array[count * _ROW :])

    def square(self) -> float:
        total = 0.0
        if self.sums.size:
            np.matmul(self.rows, self.columns, out=self.sums)
            total = sum(self.sums.ravel().tolist())
        if self.rest.size:
            total += float(self.rest.dot(self.rest))
        if _LEAST < total < _MOST:
            return total
        return float(np.square(self.array, dtype=np.float64).sum()) if self.array.any() else 0.0


class Difference:
    """`room` (n,) for the difference of two vectors of that length or less; it allocates nothing once it was used."""

    def __init__(self, numel: int) -> None:
        self.room = torch.empty(numel)
        self._forms: dict[int, tuple[Tensor, _Sum]] = {}  # by length

    def square(self, a: Tensor, b: Tensor) -> float:
        """||a - b||^2 of two vectors (m,), m <= n; b may be room[:m], which holds the difference then. Be `quiet`."""
        numel = a.numel()
        form = self._forms.get(numel)
        if form is None:
            room = self.room[:numel]
            form = self._forms[numel] = room, _Sum.of(room.numpy())
        torch.sub(a, b, out=form[0])
        return form[1].square()

    @quiet
    def norm(self, a: Tensor, b: Tensor) -> float:
        """||a - b|| of two vectors (d,), however long."""
        step = self.room.numel()
        return math.sqrt(sum([self.square(a[i : i + step], b[i : i + step]) for i in range(0, a.numel(), step)]))


@quiet
def norm(vector: Tensor) -> float:
    """||vector||_2 of a contiguous float32 vector (n,) on the CPU."""
    return math.sqrt(_Sum.of(vector.detach().numpy()).square())
