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


class Changing(nn.Module):
    """Whose first layer is frozen or not, and changes in the forward of step `at`."""

    def __init__(self, change: str, at: int) -> None:
        super().__init__()
        self.body, self.head, self.change, self.at, self.steps = nn.Linear(8, 16), nn.Linear(16, 1), change, at, 0
        self.body.requires_grad_(change != "release")

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        if self.training and self.steps == self.at:
            match self.change:
                case "release" | "freeze":
                    self.body.requires_grad_(self.change == "release")
                case "freeze all":
                    self.requires_grad_(False)
                case "move":
                    self.body.weight.data = self.body.weight.data.clamp(-0.2, 0.2)
                case "cast":
                    self.double()
        return self.head(self.body(x.to(self.body.weight.dtype)).relu())


@dataclass
class Changes(Regression):
    """Parameters that do not stay what they were at the start."""

    change: str = "release"
    at: int = 6

    def network(self) -> nn.Module:
        return Changing(self.change, self.at)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch).float()


@dataclass
class Modes(Regression):
    """A BatchNorm that stays in eval mode, and an evaluation that leaves the model in train mode."""

    whole: bool = False

    def network(self) -> nn.Module:
        network = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
        )
        network[1].eval().requires_grad_(False)
        return network.eval() if self.whole else network

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in model.modules())
        metrics = super().evaluate(model)
        model.train()
        return metrics
