from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import NotNegative, Range, Whole, expect
from ps_elastic.tasks.base import Task, tasks

Curvature = Annotated[tuple[float, ...], Range("at least one number, each > 0")]
Batch = tuple[Tensor, Tensor]  # the worker's optimum (d,) and the noise (d,), float32


@tasks.register("quadratic")
@dataclass
class Quadratic(Task):
    """A quadratic whose optimum, curvature, noise and heterogeneity are known: for checks against theory.

        f(x) = (1/p) sum_i f_i(x) - const = (1/2) sum_k c_k (x_k - b_k)^2
        f_i(x) = (1/2) sum_k c_k (x_k - b_ik)^2,    gradient of worker i: c (x - b_i) + noise

    The noise is Gaussian with mean 0 and E||noise||^2 = noise^2 / batch_size, whatever d. The workers' optima are
    drawn so that their gradients at any x add up to p grad f(x), and (1/p) sum_i ||grad f_i - grad f||^2 =
    heterogeneity^2. Every run begins at x = start.
    """

    batch_size: Whole = 1  # samples whose noise is averaged in one batch; larger: less noise
    curvature: Curvature = (1.0, 2.0, 5.0, 10.0)  # c of each coordinate; larger: steeper
    dimension: int | None = None  # d, coordinates; curvature is repeated up to it. null: as many as curvature has
    # root of the expected squared norm of one sample's noise, in gradient units; larger: noisier
    noise: NotNegative = 1.0
    # zeta, rms distance of a worker's gradient from the mean; 0: alike, larger: optima farther apart
    heterogeneity: NotNegative = 0.0
    optimum: float = 0.0  # b, value of every coordinate
    start: float = 1.0  # x_0, value of every coordinate

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = len(self.curvature)
        expect(self.dimension is None or self.dimension >= fewest, self, "dimension", f"null or at least {fewest}")

    @property
    def c(self) -> NDArray[np.float64]:
        """(d,) curvatures."""
        return np.resize(np.asarray(self.curvature, np.float64), self.dimension or len(self.curvature))

    @property
    def b(self) -> NDArray[np.float64]:
        """(d,) the minimiser of f; f is 0 there."""
        return np.full_like(self.c, self.optimum)

    @property
    def smoothness(self) -> float:
        """L of ||grad f(x) - grad f(y)|| <= L ||x - y||."""
        return max(self.curvature)

    @property
    def strong_convexity(self) -> float:
        """c of (x - y) . (grad f(x) - grad f(y)) >= c ||x - y||^2."""
        return min(self.curvature)

    @property
    def sigma(self) -> float:
        """Root of E||gradient of one batch - grad f_i||^2."""
        return self.noise / math.sqrt(self.batch_size)

    def optima(self, workers: int, seed: int) -> NDArray[np.float64]:
        """(p, d): b_i of workers 1..p. Raises ConfigError if one worker alone is to differ from the mean."""
        if not self.heterogeneity:
            return np.tile(self.b, (workers, 1))
        if workers == 1:
            raise ConfigError(f"got {self.heterogeneity} for 1 worker, expected 0", key="heterogeneity")
        pulls = _generator(seed, 0).standard_normal((workers, len(self.c)))
        pulls -= pulls.mean(axis=0)
        pulls *= self.heterogeneity / np.sqrt((pulls**2).sum(axis=1).mean())
        return self.b + pulls / self.c

    def model(self, seed: int) -> nn.Module:
        """One parameter x (d,), at the start."""
        return Point(torch.full((len(self.c),), self.start), torch.from_numpy(self.c).float())

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Batch]:
        optimum = torch.from_numpy(self.optima(workers, seed)[worker - 1]).float()
        return self._noisy(optimum, _generator(seed, worker))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """f_i(x) + noise . x, so that the gradient is c (x - b_i) + noise, both added once in float32."""
        optimum, noise = batch
        x, c = model.get_parameter("x"), model.get_buffer("c")
        return (0.5 * c * (x - optimum) ** 2).sum() + (noise * x).sum()

    def differentiate(self, model: nn.Module, batch: Batch, out: Mapping[str, Tensor]) -> float:
        """c (x - b_i) + noise: a tenth of the time of autograd where d is small."""
        optimum, noise = batch
        point, g = cast(Point, model), out["x"]
        x = point.x.detach()
        away = x - optimum
        torch.mul(away, point.c, out=g)
        loss = 0.5 * float(away.dot(g)) + float(noise.dot(x))
        g.add_(noise)
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """f(x) - f(b) as "loss", and "distance" ||x - b||; in float64."""
        away = model.get_parameter("x").detach().cpu().double().numpy() - self.b
        return {"loss": float(0.5 * (self.c * away**2).sum()), "distance": float(np.linalg.norm(away))}

    def _noisy(self, optimum: Tensor, generator: np.random.Generator) -> Iterator[Batch]:
        size = len(optimum)
        deviation = np.float32(self.sigma / math.sqrt(size))
        while True:
            yield optimum, torch.from_numpy(deviation * generator.standard_normal(size, np.float32))


class Point(nn.Module):
    """A model that is its parameter; `c` travels with it to the device and is not saved."""

    def __init__(self, x: Tensor, c: Tensor) -> None:
        super().__init__()
        self.c: Tensor
        self.x = nn.Parameter(x)
        self.register_buffer("c", c, persistent=False)


def _generator(seed: int, worker: int) -> np.random.Generator:
    """Worker 1..p draws its noise from its own; 0 is for what is drawn for all of them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(worker,)))
