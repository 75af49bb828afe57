"""Tasks whose models are out of the ordinary: each is trained right, or refused by name."""

from __future__ import annotations

import threading
import warnings
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


class Masked(nn.Module):
    """Buffers that share memory, one of them under two names, and one that is in no state."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.ones(8, 8).tril()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.a.register_buffer("mask", mask[:4])
        self.b.register_buffer("mask", mask[2:6])
        self.out.register_buffer("mask", self.a.mask)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x + self.a.mask.sum(0)).tanh() + self.b.mask.sum(0)).tanh()) * self.scale


@dataclass
class SharedBuffers(Regression):
    def network(self) -> nn.Module:
        return Masked()


class Uncopied(nn.Module):
    """Which deepcopy refuses, for two reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.body = nn.utils.weight_norm(nn.Linear(8, 16))
        self.norm, self.out = nn.BatchNorm1d(16).eval(), nn.Linear(16, 1)
        self.register_buffer("scale", torch.rand(()), persistent=False)
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.out(self.norm(self.body(x)).relu()) * self.scale


@dataclass
class NoCopies(Regression):
    def network(self) -> nn.Module:
        return Uncopied()


@dataclass
class Unsavable(Regression):
    """A sparse buffer in the state."""

    def network(self) -> nn.Module:
        network = super().network()
        network.register_buffer("adjacency", torch.eye(3).to_sparse())
        return network


@dataclass
class Sparse(Regression):
    """An embedding whose gradient is sparse."""

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(16, 1))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        while True:
            x = torch.randint(0, 50, (self.batch_size, 4), generator=generator)
            yield x, x.float().mean(1, keepdim=True) / 25


class Adapted(nn.Module):
    """A frozen base of another type, with an adapter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.norm, self.adapter = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
        for module in (self.base, self.norm):
            module.to(dtype).requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.norm(self.base(x.to(self.base.weight.dtype))).float().relu())


@dataclass
class Frozen(Regression):
    dtype: str = "bfloat16"

    def network(self) -> nn.Module:
        return Adapted(getattr(torch, self.dtype))


@dataclass
class Half(Regression):
    """Trained parameters that are not float32."""

    def network(self) -> nn.Module:
        return super().network().bfloat16()


@dataclass
class Empty(Regression):
    """Parameters without a number: first, last and in between."""

    def network(self) -> nn.Module:
        network = super().network()
        network.first = nn.Parameter(torch.zeros(0, 8))
        network[0].extra = nn.Parameter(torch.zeros(0, 3))
        network[2].last = nn.Parameter(torch.zeros(0))
        return network

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = model[2](model[1](model[0](batch[0])))
        more = (batch[0] @ model.first.T).sum() + model[0].extra.sum() + model[2].last.sum()
        return nn.functional.mse_loss(x, batch[1]) + more
