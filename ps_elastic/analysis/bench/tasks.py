"""Tasks to measure with, of any size and on synthetic data: `task: {name: "ps_elastic.analysis.bench.tasks:Wide"}`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ps_elastic.plugins import Range, Time, Whole, expect
from ps_elastic.tasks import Task, seeded

INPUTS, CLASSES = 784, 10
_SLOPE = 1e-3


@dataclass
class Wide(Task):
    """A linear function of `parameters` numbers: its gradient costs one pass over memory, so that the rest shows.

        f(x) = slope * sum_k x_k,    x_0 = 0

    compute_s: seconds that each gradient sleeps. tensors: how many tensors of equal size the model has.
    """

    parameters: Whole = 1_000  # larger: more bytes a push
    tensors: int = 1  # more: smaller buckets are possible
    compute_s: Time = 0.0  # larger: a worker that is away for longer
    batch_size: Whole = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(1 <= self.tensors <= self.parameters, self, "tensors", "a whole number from 1 to parameters")

    def model(self, seed: int) -> nn.Module:
        part, rest = divmod(self.parameters, self.tensors)
        return nn.ParameterList([torch.zeros(part + (i < rest)) for i in range(self.tensors)])

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        batch = torch.full((), _SLOPE)
        while True:
            yield batch

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(self.compute_s)
        total: Tensor = sum((batch * parameter).sum() for parameter in model.parameters())  # type: ignore[assignment]
        return total

    def differentiate(self, model: nn.Module, batch: Tensor, out: Mapping[str, Tensor]) -> float:
        time.sleep(self.compute_s)
        for gradient in out.values():
            gradient.fill_(_SLOPE)
        return _SLOPE * sum(float(parameter.detach().sum()) for parameter in model.parameters())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": _SLOPE * sum(float(parameter.sum()) for parameter in model.parameters())}


@dataclass
class Perceptron(Task):
    """A perceptron with two hidden layers of equal width and about `parameters` parameters, on random data."""

    parameters: Annotated[int, Range(f"a whole number >= {INPUTS + CLASSES + 1}")] = 300_000  # larger: wider
    batch_size: Whole = 32
    rounds: Whole = 8  # different batches, given in turn

    @property
    def width(self) -> int:
        """h of h^2 + (inputs + classes) h = parameters."""
        half = (INPUTS + CLASSES) / 2
        return max(1, round(math.sqrt(half * half + self.parameters) - half))

    def model(self, seed: int) -> nn.Module:
        h = self.width
        with seeded(seed):
            return nn.Sequential(
                nn.Linear(INPUTS, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, CLASSES)
            )  # fmt: skip

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = self._draw(worker, seed)
        while True:
            yield from drawn

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self._draw(0, 0)[0]))}

    def _draw(self, worker: int, seed: int) -> list[tuple[Any, Any]]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        return [
            (
                torch.randn(self.batch_size, INPUTS, generator=generator),
                torch.randint(CLASSES, (self.batch_size,), generator=generator),
            )
            for _ in range(self.rounds)
        ]
