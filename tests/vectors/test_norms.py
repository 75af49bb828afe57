from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ps_elastic.server.discrepancy import _WIDER
from ps_elastic.vectors.kernels import kernels_for
from ps_elastic.vectors.norms import ACCURACY, Difference, norm

pytestmark = pytest.mark.usefixtures("kernels")
SIZES = (1, 63, 1023, 1024, 1025, 5000, 70_001)


def exact(vector: Tensor) -> float:
    """In double precision, by numpy."""
    return math.sqrt(np.sum(vector.numpy().astype(np.float64) ** 2))


def vectors(numel: int) -> list[Tensor]:
    """Random ones, and what rounds in one direction all the time."""
    generator = torch.Generator().manual_seed(numel)
    last = torch.full((numel,), 1e-3)
    last[: numel // 9 + 1] = 1.7
    made = [torch.randn(numel, generator=generator), torch.rand(numel, generator=generator) ** 8, last]
    return made + [torch.full((numel,), value) for value in (0.1, 1.0 + 2.0**-12, 1.1, 1.4142, 1.7)]


@pytest.mark.parametrize("numel", SIZES)
def test_a_norm_is_as_accurate_as_it_says(numel: int) -> None:
    for vector in vectors(numel):
        assert math.isclose(norm(vector), exact(vector), rel_tol=ACCURACY, abs_tol=0)


@pytest.mark.parametrize("numel", SIZES)
def test_a_distance_is_as_accurate_whatever_room_it_has(numel: int) -> None:
    difference = Difference(2048, kernels_for(2048))
    for a, b in zip(vectors(numel), reversed(vectors(numel)), strict=True):
        apart = exact(a.double() - b.double())
        # One more rounding for each entry's difference; a == b where the list meets itself in the middle.
        assert math.isclose(difference.norm(a, b), apart, rel_tol=ACCURACY + 2.0**-24, abs_tol=0)


def test_the_second_vector_may_lie_in_the_room(kernels: str) -> None:
    difference = Difference(3000, kernels_for(3000))
    a, b = torch.randn(3000), torch.randn(3000)
    expected = difference.square(a.numpy(), b.numpy())
    room = difference.room
    room[:] = b.numpy()
    assert difference.square(a.numpy(), room) == expected
    if kernels == "torch":  # which leave the difference there
        assert torch.equal(torch.from_numpy(room), a - b)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-15, 1e15, 1e20, 1e38])
def test_no_square_leaves_the_range_of_float32(size: float) -> None:
    vector = torch.randn(3000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * size
    assert math.isclose(norm(vector), exact(vector), rel_tol=ACCURACY, abs_tol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_distances_of_any_length_and_size_are_accurate_however_much_cancels(threads: int) -> None:
    random, before = np.random.default_rng(threads), torch.get_num_threads()
    difference = Difference(1 << 16, kernels_for(1 << 16))
    torch.set_num_threads(threads)
    try:
        for _ in range(150):
            numel = int(10 ** random.uniform(0, 5.2))
            size, step = 10 ** random.uniform(-20, 18), 10 ** random.uniform(-7, 1)
            a = (size * random.standard_normal(numel)).astype(np.float32)
            b = (a * (1 + step * random.standard_normal(numel))).astype(np.float32)
            apart = math.sqrt(np.sum((a.astype(np.float64) - b) ** 2))
            found = difference.norm(torch.from_numpy(a), torch.from_numpy(b))
            assert math.isclose(found, apart, rel_tol=ACCURACY + 2.0**-24, abs_tol=0), (numel, size, step)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_none() -> None:
    assert norm(torch.zeros(5000)) == 0.0
    assert norm(torch.full((2000,), math.inf)) == math.inf
    assert math.isnan(norm(torch.tensor([1.0, math.nan])))


def test_a_norm_does_not_depend_on_the_number_of_threads() -> None:
    a, b = torch.randn(200_000), torch.randn(200_000)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add((norm(a), Difference(1 << 16, kernels_for(1 << 16)).norm(a, b)))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_path_is_widened_by_more_than_its_norms_can_be_off() -> None:
    """D <= SUM of moves: D too large and each move too small by ACCURACY and the rounding of a difference."""
    assert (1 + ACCURACY + 2.0**-24) / (1 - ACCURACY - 2.0**-24) < _WIDER
