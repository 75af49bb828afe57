"""Tasks on a labelled data set: the workers' batches, the loss, and the evaluation of a classifier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import NotNegative, Whole
from ps_elastic.tasks.base import Task

Labels = NDArray[np.integer]
Indices = NDArray[np.int64]
Batch = tuple[Tensor, Tensor]  # inputs (b, ...), labels (b,) int64
DRAWS = 100  # class mixtures drawn before giving up; one that works one time in ten is found nearly always


class Classification(Task):
    """A task whose examples belong to classes. It gives the model and two data sets, and has these two fields."""

    batch_size: Whole
    heterogeneity: NotNegative  # 0: every worker alike; larger: more different class mixtures

    @property
    @abstractmethod
    def train_data(self) -> Batch:
        """All that is trained on, on the CPU."""

    @property
    @abstractmethod
    def test_data(self) -> Batch:
        """All that is held out, on the CPU."""

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Batch]:
        return labelled_batches(
            *self.train_data, worker=worker, workers=workers, batch_size=self.batch_size,
            heterogeneity=self.heterogeneity, seed=seed,
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return evaluate_classifier(model, *self.test_data)


def labelled_batches(
    inputs: Tensor, labels: Tensor, *, worker: int, workers: int, batch_size: int, heterogeneity: float, seed: int
) -> Iterator[Batch]:
    """Endless (inputs, labels) of worker 1..workers, copied from its own part of the data; see `partition`.

    inputs: (n, ...), labels: (n,) int64, both on the CPU. A batch keeps their types: (b, ...) and (b,).
    """
    if not 1 <= worker <= workers:
        raise ValueError(f"got worker {worker}, expected 1 to {workers}")
    parts = split(labels.numpy(), workers, heterogeneity, batch_size, seed)
    chosen = map(torch.from_numpy, endless_batches(parts[worker - 1], batch_size, worker, seed))
    return ((inputs[rows], labels[rows]) for rows in chosen)


def evaluate_classifier(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 500) -> dict[str, float]:
    """The mean cross entropy ("loss", in nats) and the share of right answers ("accuracy") on (n, ...) and (n,)."""
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    for some, answers in zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True):
        answers = answers.to(device)
        scores = model(some.to(device))  # (b, classes)
        loss += float(nn.functional.cross_entropy(scores, answers, reduction="sum"))
        right += int((scores.argmax(dim=1) == answers).sum())
    return {"loss": loss / len(labels), "accuracy": right / len(labels)}


def split(labels: Labels, workers: int, heterogeneity: float, batch_size: int, seed: int) -> list[Indices]:
    """Return the sample numbers of worker 1, 2, ..., p: disjoint, together all of `labels` (n,), seeded by `seed`.

    heterogeneity h >= 0. At 0 a shuffled deal in parts whose sizes differ by at most one. Above 0 the samples of
    each class c are shuffled and cut at the proportions

        (q_1c, ..., q_pc) ~ Dirichlet(1/h, ..., 1/h)

    so that the expected part is the same for all, Var(q_ic) = (1/p)(1 - 1/p) / (p/h + 1), and larger h makes the
    mixtures and the sizes of the parts more different. (Hsu, Qi and Brown, "Measuring the Effects of Non-Identical
    Data Distribution for Federated Visual Classification", 2019, draw a worker's classes; here a class's workers are
    drawn, as Li et al., "Federated Learning on Non-IID Data Silos", 2022, so that every sample has one owner.)
    Mixtures that leave a worker less than one batch are drawn again. Raises ConfigError if DRAWS of them all do.
    """
    generator = np.random.default_rng(seed)
    draws: Iterator[list[Indices]]
    if heterogeneity:
        draws = (_mixtures(labels, workers, heterogeneity, generator) for _ in range(DRAWS))
    else:
        draws = iter([np.array_split(generator.permutation(len(labels)), workers)])
    for parts in draws:
        sizes = [len(part) for part in parts]
        if min(sizes) >= batch_size:
            return parts
    raise _too_small(sizes, batch_size, heterogeneity)


def endless_batches(indices: Indices, batch_size: int, worker: int, seed: int) -> Iterator[Indices]:
    """Yield (batch_size,) sample numbers for ever, going through `indices` in a new order every epoch.

    The order of an epoch is drawn from (seed, worker, epoch). What an epoch leaves over begins the next one's first
    batch, so that every batch is whole and every sample is used equally often. Raises ConfigError if there is no
    sample to draw from.
    """
    if not len(indices):
        raise ConfigError(f"worker {worker} has no samples, expected at least 1", key="batch_size")
    left = indices[:0]
    for epoch in count():
        # A spawn key, since a plain list of numbers is padded with zeros: [5] would be the same seed as [5, 0].
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(worker, epoch)))
        queue = np.concatenate([left, generator.permutation(indices)])
        whole = len(queue) // batch_size * batch_size
        yield from queue[:whole].reshape(-1, batch_size)
        left = queue[whole:]


def _mixtures(labels: Labels, workers: int, heterogeneity: float, generator: np.random.Generator) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(workers, 1 / heterogeneity))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _too_small(sizes: list[int], batch_size: int, heterogeneity: float) -> ConfigError:
    worker = int(np.argmin(sizes)) + 1
    part = f"worker {worker} of {len(sizes)} would have {min(sizes)} of {sum(sizes)} samples"
    found = f"{part}, fewer than one batch of {batch_size}"
    if not heterogeneity:
        return ConfigError(f"{found}; use a smaller batch_size or fewer workers", key="batch_size")
    message = f"{found}, in each of {DRAWS} draws; use a smaller heterogeneity or batch_size, or fewer workers"
    return ConfigError(message, key="heterogeneity")
