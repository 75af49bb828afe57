from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from ps_elastic.errors import ConfigError
from ps_elastic.tasks.classification import endless_batches, split

LABELS = np.repeat(np.arange(10), 600)[np.random.default_rng(7).permutation(6000)]


def mixtures(parts: list[np.ndarray]) -> np.ndarray:
    """(p, classes): the share of each worker in each class."""
    counts = np.array([np.bincount(LABELS[part], minlength=10) for part in parts])
    return counts / counts.sum(axis=0)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (3, 0), (3, 1), (7, 2)])
def test_every_sample_has_one_owner(heterogeneity: float, workers: int, seed: int) -> None:
    parts = split(LABELS, workers, heterogeneity, 16, seed)
    assert len(parts) == workers
    assert sorted(np.concatenate(parts)) == list(range(6000))


def test_without_heterogeneity_sizes_differ_by_at_most_one_and_classes_are_shuffled() -> None:
    parts = split(LABELS, 7, 0.0, 16, seed=0)
    assert {len(part) for part in parts} == {857, 858}
    # A class gives each worker 600/7 samples with a hypergeometric deviation of 8.1; five of them is 0.068 of a class.
    assert np.abs(mixtures(parts) - 1 / 7).max() < 0.068


def test_sorted_labels_make_no_difference_to_an_even_split() -> None:
    parts = split(np.sort(LABELS), 2, 0.0, 16, seed=0)
    assert all(len(np.unique(np.sort(LABELS)[part])) == 10 for part in parts)


def test_mixtures_have_the_variance_of_the_dirichlet_distribution() -> None:
    for heterogeneity in (0.1, 1.0, 5.0):
        shares = np.array([mixtures(split(LABELS, 3, heterogeneity, 1, seed)) for seed in range(60)])
        expected = (1 / 3) * (2 / 3) / (3 / heterogeneity + 1)
        assert shares.var() == pytest.approx(expected, rel=0.15)  # 600 classes drawn; in 18 such sets at most 9 % off


def test_mixtures_take_their_samples_from_everywhere_in_a_class() -> None:
    parts = split(np.sort(LABELS), 3, 1.0, 16, seed=0)
    middles = [np.mean(part[part < 600]) for part in parts]  # class 0
    assert np.ptp(middles) < 150  # neighbouring thirds would be 400 apart


def test_larger_heterogeneity_makes_mixtures_more_different() -> None:
    spread = [mixtures(split(LABELS, 3, h, 1, seed=3)).std() for h in (0.0, 0.05, 0.5, 5.0, 100.0)]
    assert spread == sorted(spread)
    assert spread[0] < 0.03
    assert spread[-1] > 0.4


def test_the_split_is_a_function_of_the_seed() -> None:
    for heterogeneity in (0.0, 1.0):
        first, again, other = (split(LABELS, 3, heterogeneity, 16, seed) for seed in (5, 5, 6))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_part_smaller_than_a_batch_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"worker 4 of 4 would have 2 of 11 samples, fewer than one batch of 3") as e:
        split(np.zeros(11, int), 4, 0.0, 3, seed=0)
    assert e.value.key == "batch_size"


def test_mixtures_are_drawn_again_until_every_worker_has_a_batch() -> None:
    labels = np.repeat([0, 1], 100)
    for seed in range(20):
        assert min(len(part) for part in split(labels, 3, 3.0, 30, seed)) >= 30


def test_mixtures_that_cannot_give_everybody_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"worker \d of 3 would have 0 of 50 samples.*in each of 100 draws") as error:
        split(np.zeros(50, int), 3, 1e6, 1, seed=0)  # one class, and one worker gets all of it
    assert error.value.key == "heterogeneity"


def test_batches_are_whole_and_use_every_sample_equally_often() -> None:
    indices = np.arange(100, 110)
    batches = list(islice(endless_batches(indices, 4, worker=1, seed=0), 5))  # 20 samples: two epochs
    assert {len(batch) for batch in batches} == {4}
    drawn = np.concatenate(batches)
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(indices)
    assert not np.array_equal(drawn[:10], drawn[10:])


def test_a_batch_may_be_larger_than_the_part() -> None:
    batch = next(endless_batches(np.arange(3), 7, worker=1, seed=0))
    assert sorted(np.bincount(batch)) == [2, 2, 3]


def test_order_depends_on_seed_worker_and_epoch_alone() -> None:
    indices = np.arange(32)

    def orders(worker: int, seed: int) -> list[tuple[int, ...]]:
        return [tuple(order) for order in islice(endless_batches(indices, 32, worker, seed), 3)]

    assert orders(1, 0) == orders(1, 0)
    everything = [order for worker in (1, 2) for seed in (0, 1) for order in orders(worker, seed)]
    assert len(set(everything)) == len(everything)


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="worker 2 has no samples"):
        next(endless_batches(np.arange(0), 4, worker=2, seed=0))
