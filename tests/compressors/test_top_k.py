from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps_elastic.compressors import ErrorFeedback
from ps_elastic.compressors.top_k import TopK, largest
from ps_elastic.errors import ConfigError, WireError


def by_full_sort(magnitude: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-magnitude, kind="stable")[:k])


def test_the_largest_magnitudes_are_sent_with_their_signs_in_order_of_index() -> None:
    indices, values = TopK(ratio=0.4).encode(torch.tensor([1.0, -5.0, 0.5, 3.0, -2.0]))
    assert (indices.dtype, values.dtype) == (torch.int32, torch.float32)
    assert indices.tolist() == [1, 3] and values.tolist() == [-5.0, 3.0]


def test_the_lowest_index_wins_a_tie() -> None:
    indices, _ = TopK(ratio=0.5).encode(torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 1.0]))
    assert indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ratio", "numel", "k"), [(0.01, 50, 1), (0.01, 199, 1), (0.01, 200, 2), (0.5, 5, 2), (1.0, 7, 7), (1e-9, 3, 1)]
)
def test_k_is_the_ratio_rounded_down_and_at_least_one(ratio: float, numel: int, k: int) -> None:
    indices, _ = TopK(ratio).encode(torch.randn(numel))
    assert TopK(ratio).count(numel) == len(indices) == k


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_largest_is_the_head_of_a_full_stable_sort(values: list[int], data: st.DataObject) -> None:
    magnitude = np.array(values, np.float32)
    k = data.draw(st.integers(1, len(values)))
    assert largest(magnitude, k).tolist() == by_full_sort(magnitude, k).tolist()


def long_vectors() -> dict[str, np.ndarray]:
    n = 100_000
    generator = np.random.default_rng(0)
    gaussian = np.abs(generator.standard_normal(n)).astype(np.float32)
    sampled_high = gaussian.copy()
    sampled_high[::64] += 100  # the entries that the threshold is guessed from are no sample of the others
    sampled_low = gaussian.copy()
    sampled_low[::64] = 0
    return {
        "gaussian": gaussian,
        "ties": generator.integers(0, 3, n).astype(np.float32),
        "zeros": np.zeros(n, np.float32),
        "few": np.where(np.arange(n) % 5000 == 1, 1, 0).astype(np.float32),
        "guessed too high": sampled_high,
        "guessed too low": sampled_low,
        "falling": np.linspace(1, 0, n, dtype=np.float32),
    }


@pytest.mark.parametrize("name", long_vectors())
def test_a_guessed_threshold_changes_nothing(name: str) -> None:
    magnitude = long_vectors()[name]
    for k in (1, 10, 1000, 1600, 50_000, 99_999, 100_000):
        assert np.array_equal(largest(magnitude, k), by_full_sort(magnitude, k)), k


def test_the_contraction_is_attained_where_all_entries_are_equal() -> None:
    coder, ones = TopK(ratio=0.25), torch.ones(64)
    error = float((ones - coder.decode(coder.encode(ones), 64)).pow(2).sum())
    assert error == 48 == coder.gamma(64) * 64


@pytest.mark.parametrize(("d", "k", "expected"), [(4, 1, 14), (8, 2, 28), (12, 3, 42), (5, 1, 30)])
def test_the_residual_of_equal_gradients_cycles(d: int, k: int, expected: int) -> None:
    """With g all ones, n = d/k: ||e||^2 at the end of a cycle of n steps is k (n-1) n (2n-1) / 6; nothing is lost."""
    feedback = ErrorFeedback(TopK(ratio=k / d), d)
    squares, sent = [], torch.zeros(d)
    for _ in range(12 * d):
        payload = feedback.encode(torch.ones(d))
        sent += feedback.compressor.decode(payload, d)
        squares.append(float(feedback.residual.pow(2).sum()))
    n = d // k
    assert expected == k * (n - 1) * n * (2 * n - 1) // 6
    assert torch.equal(sent + feedback.residual, torch.full((d,), 12.0 * d))
    assert set(squares[n - 1 :]) == {float(expected)}


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, 2.0])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="expected 0 < ratio <= 1"):
        TopK(ratio)


@pytest.mark.parametrize("given", [[-1, 3], [3, 10], [3, 2**31 - 1], [3, -1], [5, 5], [5, 4]], ids=str)
def test_an_index_outside_the_bucket_or_out_of_order_is_refused(given: list[int]) -> None:
    coder = TopK(ratio=0.2)
    _, values = coder.encode(torch.randn(10))
    indices = torch.tensor(given, dtype=torch.int32)
    with pytest.raises(WireError, match=r"top_k: the indices are not ascending numbers within 0\.\.9"):
        coder.check((indices, values), 10)


def test_the_wire_carries_8_bytes_an_entry() -> None:
    payload = TopK(ratio=0.1).encode(torch.randn(1000))
    assert sum(a.numel() * a.element_size() for a in payload) == 800
