"""Tasks whose models are out of the ordinary: each is trained right, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ps_elastic.tasks import Task, seeded


@dataclass
class Regression(Task):
    """The sum of eight numbers, by a perceptron."""

    batch_size: int = 8

    def model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.network()

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        while True:
            x = torch.randn(self.batch_size, 8, generator=generator)
            yield x, x.sum(1, keepdim=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, next(self.batches(99, 1, 0))))}


@dataclass
class TiedByData(Regression):
    """Two layers in the same memory, by `.data`."""

    def network(self) -> nn.Module:
        network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
        network[2].weight.data = network[0].weight.data
        return network
