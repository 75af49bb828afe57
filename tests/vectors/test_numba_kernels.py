"""Each compiled kernel, against the same in double precision and against torch: values, bits, and ends of the range."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from ps_elastic.vectors import kernels
from ps_elastic.vectors.norms import ACCURACY

NUMELS = (0, 1, 511, 512, 513, 5000)
SQUARE = 2 * ACCURACY + 2.0**-23


@pytest.fixture(scope="module")
def k() -> ModuleType:
    if (reason := kernels.why_not()) is not None:
        pytest.skip(reason)
    from ps_elastic.vectors import numba_kernels

    return numba_kernels


def vectors(count: int, numel: int, size: float = 1.0) -> list[np.ndarray]:
    random = np.random.default_rng(numel)
    return [(size * random.standard_normal(numel)).astype(np.float32) for _ in range(count)]


def squared(vector: np.ndarray) -> float:
    return float(np.sum(vector.astype(np.float64) ** 2))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return squared(a.astype(np.float64) - b)


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18])
def test_squares_are_as_accurate_as_norms_are(k: ModuleType, numel: int, size: float) -> None:
    a, b = vectors(2, numel, size)
    target, view = np.empty_like(a), a.copy()
    assert k.square(a) == pytest.approx(squared(a), rel=SQUARE, abs=0)
    assert k.distance(a, b) == pytest.approx(apart(a, b), rel=SQUARE, abs=0)
    assert k.carry(a, target) == pytest.approx(squared(a), rel=SQUARE, abs=0)
    assert k.follow(view, b) == pytest.approx(apart(a, b), rel=SQUARE, abs=0)
    assert (target == a).all() and (view == b).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_seen(k: ModuleType, value: float) -> None:
    (a,) = vectors(1, 5000)
    a[4321] = value
    assert k.square(a) == pytest.approx(value * value, nan_ok=True)
    assert k.carry(a, np.empty_like(a)) == pytest.approx(value * value, nan_ok=True)


@pytest.mark.parametrize("measures", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_write_has_torchs_bits_and_measures_the_model_before(k: ModuleType, measures: bool, reads: bool) -> None:
    x, view, g = vectors(3, 5000)
    expected = torch.from_numpy(x).add(torch.from_numpy(g), alpha=-0.3).numpy()
    before, seen = apart(x, view), view.copy()
    found = k.write(measures, reads)(x, view, g, 0.3)
    assert found == pytest.approx(before if measures else 0.0, rel=SQUARE)
    assert (x == expected).all() and (view == (expected if reads else seen)).all()


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_sgd_is_what_its_equation_says(
    k: ModuleType, decay: float, momentum: float, nesterov: bool, divisor: float
) -> None:
    x, m, g = vectors(3, 5000)
    d = g / divisor + decay * x.astype(np.float64)
    heavy = momentum * m + d
    direction = (momentum * heavy + d if nesterov else heavy) if momentum else d
    expected, old = x - 0.1 * direction, x.copy()
    kernel = k.sgd(decay != 0, momentum != 0, nesterov, divisor != 1)
    found = kernel(x, m, g, 0.1, momentum, decay, divisor)
    assert np.allclose(x, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(m, heavy, rtol=1e-5, atol=1e-6) or not momentum
    assert found == pytest.approx(apart(x, old), rel=SQUARE)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_adam_is_what_its_equation_says(k: ModuleType, decoupled: bool, divisor: float) -> None:
    x, m, g, v = vectors(4, 5000)
    v, rate, t, decay = v * v, 0.01, 7, 0.1
    d = g / divisor + (0.0 if decoupled else decay) * x.astype(np.float64)
    first, second = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
    length, root = rate / (1 - 0.9**t), math.sqrt(1 - 0.999**t)
    base = x * (1 - rate * decay) if decoupled else x
    expected, old = base - length * first / (np.sqrt(second) / root + 1e-8), x.copy()
    given = 1 - rate * decay if decoupled else decay
    kernel = k.adam(True, decoupled, divisor != 1)
    found = kernel(x, m, v, g, length, root, 0.9, 0.999, 1e-8, given, divisor)
    assert np.allclose(x, expected, rtol=1e-4, atol=1e-6)
    assert np.allclose(m, first, rtol=1e-4, atol=1e-6) and np.allclose(v, second, rtol=1e-4, atol=1e-6)
    assert found == pytest.approx(apart(x, old), rel=SQUARE)


def test_a_kernel_that_does_not_measure_gives_nothing_back(k: ModuleType) -> None:
    x, m, g = vectors(3, 1000)
    assert k.sgd(False, True, False, False, False)(x, m, g, 0.1, 0.9, 0.0, 1.0) == 0.0
