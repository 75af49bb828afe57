"""What tasks on a labelled data set share: the workers' batches, and the evaluation of a classifier."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ps_elastic.tasks.partition import Indices, endless_batches, split


def labelled_batches(
    inputs: Tensor, labels: Tensor, *, worker: int, workers: int, batch_size: int, heterogeneity: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, labels) of worker 1..workers, copied from its own part of the data; see `partition`.

    inputs: (n, ...), labels: (n,) int64, both on the CPU. A batch keeps their types: (b, ...) and (b,).
    """
    if not 1 <= worker <= workers:
        raise ValueError(f"got worker {worker}, expected 1 to {workers}")
    parts = split(labels.numpy(), workers, heterogeneity, batch_size, seed)
    return _chosen(inputs, labels, endless_batches(parts[worker - 1], batch_size, worker, seed))


def _chosen(inputs: Tensor, labels: Tensor, batches: Iterator[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        rows = torch.from_numpy(batch)
        yield inputs[rows], labels[rows]


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
