"""Passes over float32 vectors that torch and numpy have no single call for, compiled by numba.

All vectors are contiguous, of the same length (n,), and may lie in memory that others see. The numbers have the bits of
torch's kernels, whose multiplications and additions are one operation (fma) in some places and two in others;
`stepping` looks whether that is so on this machine.

Squares are added up in float32 over 512 entries, in as many shards as the processor has (16 or more where it has an fma
at all), and these sums in double precision: good to (512 / 16 + 5) 2^-24 = 2.2e-6 by the usual bound on sums of
positive numbers, as in `norms`. In double precision from the start a step takes a quarter longer. A sum that the ends
of float32's range may have spoilt is made again in double precision.

A kernel is compiled once in a process, in a tenth of a second; numba's cache on disk is made of pickles and not used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from ps_elastic.vectors.norms import LEAST, MOST

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # a division by 0 is no exception
_VECTOR, _NUMBER = "float32[::1]", "float64"
_ROW = 512  # entries whose squares are added up in float32


@intrinsic
def _joined(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _summed(_: Any, total: Any, number: Any) -> Any:
    """total + number^2, of which the additions may be reordered, so that several are made at once."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        total, number = arguments
        return builder.fadd(total, builder.fmul(number, number), flags=("reassoc", "contract"))

    return total(total, number), generate


# As kernels call them: numba passes what comes first.
_fma = cast("Callable[[float, float, float], float]", _joined)
_add_square = cast("Callable[[float, float], float]", _summed)


@njit(f"{_NUMBER}(float32, {_VECTOR})", **_OPTIONS)
def _sure(total: float, row: np.ndarray) -> float:
    """The sum of the squares of `row`, which is `total` unless that is doubtful."""
    exact: float = np.float64(total)  # `float` leaves it as it is
    if LEAST < total < MOST:
        return exact
    exact = 0.0
    for i in range(row.size):
        number = np.float64(row[i])
        exact += number * number
    return exact


@njit(f"{_NUMBER}({_VECTOR})", **_OPTIONS)
def square(a: np.ndarray) -> float:
    """||a||^2."""
    total = 0.0
    for start in range(0, a.size, _ROW):
        row = a[start : start + _ROW]
        part = np.float32(0)
        for i in range(row.size):
            part = _add_square(part, row[i])
        total += _sure(part, row)
    return total


@njit(f"{_NUMBER}({_VECTOR}, {_VECTOR})", **_OPTIONS)
def carry(source: np.ndarray, target: np.ndarray) -> float:
    """target <- source; return ||source||^2."""
    total = 0.0
    for start in range(0, source.size, _ROW):
        row, place = source[start : start + _ROW], target[start : start + _ROW]
        part = np.float32(0)
        for i in range(row.size):
            number = row[i]
            place[i] = number
            part = _add_square(part, number)
        total += _sure(part, row)
    return total


def _apart(follows: bool) -> Callable[[np.ndarray, np.ndarray], float]:
    """(a, b) -> ||a - b||^2. follows: then a <- b."""

    @njit(f"{_NUMBER}({_VECTOR}, {_VECTOR})", **_OPTIONS)
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        total, room = 0.0, np.empty(_ROW, np.float32)
        for start in range(0, a.size, _ROW):
            first, second = a[start : start + _ROW], b[start : start + _ROW]
            moves, part = room[: first.size], np.float32(0)
            for i in range(first.size):
                number = second[i]
                move = first[i] - number
                if follows:
                    first[i] = number
                moves[i] = move
                part = _add_square(part, move)
            total += _sure(part, moves)
        return total

    return kernel


distance, follow = _apart(follows=False), _apart(follows=True)


@cache
def write(measures: bool, reads: bool) -> Callable[[np.ndarray, np.ndarray, np.ndarray, float], float]:
    """(x, copy, g, rate) -> ||x - copy||^2 of before, if that is measured, else 0; x <- x - rate g.

    reads: copy <- x of afterwards.
    """

    @njit(f"{_NUMBER}({_VECTOR}, {_VECTOR}, {_VECTOR}, {_NUMBER})", **_OPTIONS)
    def kernel(x: np.ndarray, copy: np.ndarray, g: np.ndarray, rate: float) -> float:
        weight = -np.float32(rate)
        total, room = 0.0, np.empty(_ROW, np.float32)
        for start in range(0, x.size, _ROW):
            stop = start + _ROW
            xs, copies, gs = x[start:stop], copy[start:stop], g[start:stop]
            moves, part = room[: xs.size], np.float32(0)
            for i in range(xs.size):
                old = xs[i]
                if measures:
                    move = old - copies[i]
                    moves[i] = move
                    part = _add_square(part, move)
                new = _fma(gs[i], weight, old)
                xs[i] = new
                if reads:
                    copies[i] = new
            if measures:
                total += _sure(part, moves)
        return total

    return kernel


@cache
def sgd(decays: bool, heavy: bool, nesterov: bool, divides: bool, measures: bool = True) -> Callable[..., float]:
    """(x, m, g, rate, momentum, decay, divisor) -> ||x_new - x_old||^2 as stored, if that is measured, else 0.

    d = g / divisor + decay x;  m <- momentum m + d;  x <- x - rate (m, with Nesterov momentum m + d), each term where
    it is asked for; heavy: there is a momentum.
    """

    @njit(f"{_NUMBER}({_VECTOR}, {_VECTOR}, {_VECTOR}, {_NUMBER}, {_NUMBER}, {_NUMBER}, {_NUMBER})", **_OPTIONS)
    def kernel(
        x: np.ndarray, m: np.ndarray, g: np.ndarray, rate: float, momentum: float, decay: float, divisor: float
    ) -> float:
        weight, mu, lam, share = -np.float32(rate), np.float32(momentum), np.float32(decay), np.float32(divisor)
        total, room = 0.0, np.empty(_ROW, np.float32)
        for start in range(0, x.size, _ROW):
            stop = start + _ROW
            xs, ms, gs = x[start:stop], m[start:stop], g[start:stop]
            moves, part = room[: xs.size], np.float32(0)
            for i in range(xs.size):
                old, d = xs[i], gs[i]
                if divides:
                    d = d / share
                if decays:
                    d = _fma(old, lam, d)
                if heavy:
                    h = ms[i] * mu + d
                    ms[i] = h
                    d = _fma(h, mu, d) if nesterov else h
                new = _fma(d, weight, old)
                xs[i] = new
                if measures:
                    moves[i] = new - old
                    part = _add_square(part, new - old)
            if measures:
                total += _sure(part, moves)
        return total

    return kernel


@cache
def adam(decays: bool, decoupled: bool, divides: bool, measures: bool = True) -> Callable[..., float]:
    """(x, m, v, g, length, root, beta1, beta2, eps, decay, divisor) -> ||x_new - x_old||^2 as `sgd` does.

    d = g / divisor + decay x;  m <- m + (1 - beta1) (d - m), beta1 > 1/2;  v <- beta2 v + (1 - beta2) d^2;
    x <- x - length m / (sqrt(v) / root + eps), with length = rate / (1 - beta1^t) and root = sqrt(1 - beta2^t) in step
    t. decoupled: instead of the term in d, x is multiplied by `decay` first. Source: Kingma and Ba, ICLR 2015;
    Loshchilov and Hutter, ICLR 2019.
    """
    numbers = ", ".join([_NUMBER] * 7)

    @njit(f"{_NUMBER}({_VECTOR}, {_VECTOR}, {_VECTOR}, {_VECTOR}, {numbers})", **_OPTIONS)
    def kernel(
        x: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, length: float, root: float, beta1: float,
        beta2: float, eps: float, decay: float, divisor: float,
    ) -> float:  # fmt: skip
        step, divided, least = -np.float32(length), np.float32(root), np.float32(eps)
        w1, b2, w2 = np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
        lam, share = np.float32(decay), np.float32(divisor)
        total, room = 0.0, np.empty(_ROW, np.float32)
        for start in range(0, x.size, _ROW):
            stop = start + _ROW
            xs, ms, vs, gs = x[start:stop], m[start:stop], v[start:stop], g[start:stop]
            moves, part = room[: xs.size], np.float32(0)
            for i in range(xs.size):
                old, d = xs[i], gs[i]
                base = old
                if divides:
                    d = d / share
                if decays:
                    if decoupled:
                        base = old * lam
                    else:
                        d = _fma(old, lam, d)
                first = _fma(w1, d - ms[i], ms[i])
                ms[i] = first
                second = _fma(w2 * d, d, vs[i] * b2)
                vs[i] = second
                new = base + step * first / (np.sqrt(second) / divided + least)
                xs[i] = new
                if measures:
                    moves[i] = new - old
                    part = _add_square(part, new - old)
            if measures:
                total += _sure(part, moves)
        return total

    return kernel
