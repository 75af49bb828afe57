"""The server's optimizer on the flat vector, its learning-rate schedule, and what bounds its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ps_elastic.config.sections import Optimizer, Schedule
from ps_elastic.errors import PolicyError
from ps_elastic.server.steppers import Block, Change, make_stepper, moment_count
from ps_elastic.vectors.kernels import kernels_for
from ps_elastic.vectors.layout import Layout
from ps_elastic.vectors.norms import Difference, norm, quiet

BLOCK = 1 << 16  # floats: model, gradient, momentum and room for differences of a block stay in 2 MB of cache

Quotient = tuple[Tensor, float]  # vector (n,) and divisor; it may be overwritten unless the divisor is 1


class Response(NamedTuple):
    """The optimizer's answer to a gradient of 1 at one step and 0 at each since: what x and the momentum have of it.

    Two numbers each, without and with weight decay. Source: linearity of the SGD update; Polyak's heavy ball gives
    m = mu^k and x = -alpha (1 + mu + ... + mu^k) after k more steps at constant alpha.
    """

    x: list[float]
    m: list[float]

    def copy(self) -> Response:
        return Response(list(self.x), list(self.m))


_Arrays = tuple[list[np.ndarray], list[float], np.ndarray | None]
_NOTHING: _Arrays = ([], [], None)


class Sweep:
    """What a pass over the model does besides changing it, while a block is in cache.

    It measures the distances of `views`, workers' copies (d,), from the model of before, and copies that model to
    `kept` (d,), which may be one of them.
    """

    def __init__(self, views: Sequence[Tensor] = (), kept: Tensor | None = None) -> None:
        self.views, self.kept = views, kept
        self.squares = [0.0] * len(views)

    def arrays(self) -> _Arrays:
        """(views, the squares of their distances so far, kept), to be read and written by numpy."""
        return [view.numpy() for view in self.views], self.squares, None if self.kept is None else self.kept.numpy()

    @property
    def distances(self) -> list[float]:
        """||x_old - v|| of each copy v, after the pass."""
        return [math.sqrt(square) for square in self.squares]


class FlatOptimizer:
    """SGD, Adam or AdamW on the flat vector x (d,), in place, block by block, by one of the steppers.

    With SGD the bits are those of plain `torch.optim.SGD(foreach=False)` tensor by tensor, since the layout pads;
    with Adam they are those of `fused=True` on the padded vector. Without decay on norms and biases
    (`decay_norm_and_bias: false`) parameters of one dimension or none have weight decay 0.

    moments: `moment_count` vectors (d,) of zeros for its state, where that is to live in memory that others see.
    measures: without, what a step gives back means nothing.
    """

    def __init__(
        self, settings: Optimizer, layout: Layout, x: Tensor, moments: Sequence[Tensor] = (), *, measures: bool = True
    ) -> None:
        self.x, self._settings = x, settings
        kernels = kernels_for(layout.size)
        self._runs = _runs(settings, layout)
        self.difference = Difference(max(stop - start for start, stop, _ in self._runs), kernels)
        self._moments = list(moments) or [torch.zeros_like(x) for _ in range(moment_count(settings))]
        self.blocks = [Block.of(run, x, self._moments, self.difference.room) for run in self._runs]
        self.stepper = make_stepper(settings, self.difference, kernels, measures)

    @property
    def stops(self) -> list[int]:
        """Where the blocks end, in the order in which a pass goes over them."""
        return [stop for _, stop, _ in self._runs]

    def step(self, gradient: Tensor | Iterable[Quotient], rate: float, sweep: Sweep | None = None) -> float:
        """x <- x - rate * direction(gradient); return ||x_new - x_old|| as stored.

        gradient: (d,), or of each block in turn, asked for when the pass has come to it.
        """
        self.go_on()
        return self._pass(gradient, self.stepper.change, rate, sweep)

    def go_on(self) -> int:
        """Begin the next step, which `step_block` makes; return its number, from 1."""
        self.stepper.count += 1
        return self.stepper.count

    def go_to(self, count: int) -> None:
        """Be in step `count`, begun by another who shares x and moments."""
        self.stepper.count = count

    @quiet
    def step_block(self, i: int, gradient: Tensor, divisor: float, rate: float) -> float:
        """What `step` does to block i; return the square of its move. Every block once, in any order, makes a step."""
        return self.stepper.change(self.blocks[i], gradient, divisor, rate, None)

    def assign(self, model: Tensor | Iterable[Quotient], sweep: Sweep | None = None) -> float:
        """x <- model, given as the gradient of a step is; return ||x_new - x_old||."""

        def put(block: Block, part: Tensor, divisor: float, _: float, kept: np.ndarray | None) -> float:
            old = block.keep(kept)
            torch.div(part, divisor, out=block.x)
            return self.difference.square(block.array, old)

        return self._pass(model, put, 1.0, sweep)

    @quiet
    def _pass(
        self,
        vector: Tensor | Iterable[Quotient],
        change: Change,
        rate: float,
        sweep: Sweep | None,
    ) -> float:
        """Change x block by block, all that is to be done with a block at once; return ||x_new - x_old||."""
        square, moved = self.difference.square, 0.0
        views, squares, kept = sweep.arrays() if sweep else _NOTHING
        quotients = self.cut(vector) if isinstance(vector, Tensor) else vector
        for block, (part, divisor) in zip(self.blocks, quotients, strict=True):
            for i, view in enumerate(views):
                squares[i] += square(block.array, view[block.start : block.stop])
            moved += change(block, part, divisor, rate, None if kept is None else kept[block.start : block.stop])
        return math.sqrt(moved)

    def cut(self, vector: Tensor, divisor: float = 1.0) -> Iterator[Quotient]:
        """`vector` (d,), to be divided, as a step takes it."""
        return ((block.of_vector(vector), divisor) for block in self.blocks)

    def respond(self, rate: float) -> Response:
        """What a step at `rate` makes of a gradient of 1 (SGD only). Raises PolicyError with Adam."""
        s = self._settings
        if s.name != "sgd":
            raise PolicyError(
                f"{s.name} does not respond to gradients by a factor: no late gradient can be applied exactly"
            )
        return Response([-rate * (1 + s.momentum if s.nesterov else 1.0)] * 2, [1.0, 1.0])

    def continue_response(self, response: Response, rate: float) -> None:
        """Let one more step at `rate`, with a gradient of 0, pass over `response`."""
        s = self._settings
        for group, decay in enumerate((0.0, s.weight_decay)):
            gradient = decay * response.x[group]
            response.m[group] = s.momentum * response.m[group] + gradient
            heavy = response.m[group] if s.momentum else gradient
            response.x[group] -= rate * (gradient + s.momentum * heavy if s.nesterov else heavy)

    def add_response(self, target: Tensor, delta: Tensor, response: Response) -> Tensor:
        """target (d,) += c_x delta (d,), in place; return it."""
        for start, stop, decayed in self._runs:
            target[start:stop].add_(delta[start:stop], alpha=response.x[decayed])
        return target

    def amend(self, delta: Tensor, response: Response, sweep: Sweep | None = None) -> float:
        """Give the model and the momentum what they would have had with `delta` (d,) in the placeholder's step.

        x += c_x delta, m += c_m delta: exact at any lateness, since SGD is linear in its gradients. Returns ||move||.
        """
        heavy = self._settings.momentum

        def apply_late(block: Block, part: Tensor, _: float, __: float, kept: np.ndarray | None) -> float:
            old = block.keep(kept)
            block.x.add_(part, alpha=response.x[block.decayed])
            if heavy:
                block.moments[0][0].add_(part, alpha=response.m[block.decayed])
            return self.difference.square(block.array, old)

        return self._pass(delta, apply_late, 1.0, sweep)

    def coast(self) -> tuple[float, float]:
        """(coast, gain) of the next step, as `Applied` carries them; infinite with Adam, which has no such bound.

        mu ||m|| + wd ||x|| and 1; with Nesterov mu^2 ||m|| + (1 + mu) wd ||x|| and 1 + mu.
        """
        s = self._settings
        if s.name != "sgd":
            return math.inf, math.inf
        mu, decay = s.momentum, s.weight_decay * norm(self.x) if s.weight_decay else 0.0
        m_norm = norm(self._moments[0]) if mu else 0.0
        return (mu * mu * m_norm + (1 + mu) * decay, 1 + mu) if s.nesterov else (mu * m_norm + decay, 1.0)

    def direction_norm(self, gradient: Tensor) -> float:
        """||direction|| of the step just made at rate 0 with `gradient` (d,): x has not moved, the momentum has."""
        s = self._settings
        if s.name == "sgd" and s.momentum and not s.nesterov:
            return norm(self._moments[0])
        direction = gradient.clone()
        for start, stop, decayed in self._runs:
            if decayed:
                direction[start:stop].add_(self.x[start:stop], alpha=s.weight_decay)
        if s.nesterov:
            direction.add_(self._moments[0], alpha=s.momentum)
        return norm(direction)


def block_count(settings: Optimizer, layout: Layout) -> int:
    """How many blocks a step takes the model in."""
    return len(_runs(settings, layout))


def _runs(settings: Optimizer, layout: Layout) -> list[tuple[int, int, bool]]:
    """(start, stop, decayed) of the blocks: tensors with and without decay apart, each cut at BLOCK floats."""
    runs: list[tuple[int, int, bool]] = []
    stops = [slot.offset for slot in layout.slots[1:]] + [layout.size]
    for slot, stop in zip(layout.slots, stops, strict=True):
        decayed = settings.decay_norm_and_bias or len(slot.shape) > 1
        if runs and runs[-1][2] == decayed:
            runs[-1] = (runs[-1][0], stop, decayed)
        else:
            runs.append((slot.offset, stop, decayed))
    return [
        (first, min(first + BLOCK, stop), decayed)
        for start, stop, decayed in runs
        for first in range(start, stop, BLOCK)
    ]


def step_sizes(settings: Optimizer, schedule: Schedule, budget: int) -> Callable[[int], float] | float:
    """`learning_rate` by samples; one number where it is the same all along."""
    if schedule.name == "constant" and not schedule.warmup_samples:
        return settings.lr
    return partial(learning_rate, settings, schedule, budget=budget)


def learning_rate(settings: Optimizer, schedule: Schedule, samples: int, budget: int) -> float:
    """alpha after `samples` of the run's `budget` of samples were used.

    constant; step: lr gamma^floor(samples / step_samples); cosine: from lr to final * lr along half a cosine.
    Over the first warmup_samples it rises linearly from 0.
    """
    rate = settings.lr
    if schedule.name == "step":
        assert schedule.step_samples is not None, "refused where the configuration is read"
        rate *= schedule.gamma ** (samples // schedule.step_samples)
    elif schedule.name == "cosine":
        done = min(1.0, samples / budget)
        rate *= schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * done))
    if samples < schedule.warmup_samples:
        rate *= samples / schedule.warmup_samples
    return rate
