"""How the optimizer makes a step on one block of the model and measures it: with kernels of torch, or with our own.

Both have the same bits. Ours read and write model, moments and gradient once and add up the move on the way, where
torch needs the block of before and another pass over both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ps_elastic.config.sections import Optimizer
from ps_elastic.vectors.kernels import same_bits
from ps_elastic.vectors.norms import Difference, quiet


class Block(NamedTuple):
    """A part [start, stop) of the flat vectors, and its tensor views of them."""

    start: int
    stop: int
    decayed: bool
    x: Tensor
    array: np.ndarray  # the same
    old: np.ndarray  # room for x of before, shared by all blocks
    xs: list[Tensor]  # x, as torch's kernels want it
    moments: list[list[Tensor]]  # the momentum, or Adam's two, likewise; [[]] without any
    state: list[np.ndarray]  # the same

    @classmethod
    def of(cls, run: tuple[int, int, bool], x: Tensor, moments: Sequence[Tensor], room: np.ndarray) -> Block:
        """run: (start, stop, decayed)."""
        start, stop, decayed = run
        part, parts = x[start:stop], [[moment[start:stop]] for moment in moments] or [[]]
        state = [moment[start:stop].numpy() for moment in moments]
        return cls(start, stop, decayed, part, part.numpy(), room[: stop - start], [part], parts, state)

    def of_vector(self, vector: Tensor) -> Tensor:
        """The same part of `vector` (d,)."""
        whole = self.stop - self.start == vector.numel()
        return vector if whole else vector[self.start : self.stop]  # a slice takes as long as a small copy

    def keep(self, kept: np.ndarray | None) -> np.ndarray:
        """x as it is, copied to `kept`, or to the common room if that is None."""
        old = self.old if kept is None else kept
        np.copyto(old, self.array)
        return old


Change = Callable[[Block, Tensor, float, float, np.ndarray | None], float]


class Stepper(Protocol):
    """Makes steps, block by block. count: of the step that is being made, from 1."""

    count: int

    def change(self, block: Block, g: Tensor, divisor: float, rate: float, kept: np.ndarray | None) -> float:
        """Make the step on a block, with gradient g / divisor (n,); return the square of the move.

        kept: where x of before is copied to, if that is wanted. Be `quiet`.
        """
        ...


class TorchStepper:
    """torch's fused kernels, called directly: the classes of torch.optim take 40 us a call and import the compiler."""

    def __init__(self, settings: Optimizer, difference: Difference, measures: bool) -> None:
        self._settings, self._difference, self._measures = settings, difference, measures
        self._adam = torch._fused_adam_ if settings.name == "adam" else torch._fused_adamw_
        self.count, self._steps = 0, torch.zeros(())  # the second follows the first, as Adam's kernels want it
        self._followed = 0
        self._divisor = torch.ones(())  # of the gradient: the kernels divide by it

    def change(self, block: Block, g: Tensor, divisor: float, rate: float, kept: np.ndarray | None) -> float:
        s, old = self._settings, block.old if kept is None else kept
        if self._measures or kept is not None:
            old[:] = block.array  # sooner than by copyto
        decay = s.weight_decay if block.decayed else 0.0
        scale = None if divisor == 1 else self._divisor.fill_(divisor)
        if s.name == "sgd":
            torch._fused_sgd_(
                block.xs, [g], block.moments[0], weight_decay=decay, momentum=s.momentum, lr=rate, dampening=0.0,
                nesterov=s.nesterov, maximize=False, is_first_step=self.count == 1, grad_scale=scale,
            )  # fmt: skip
        else:
            first, second = block.moments
            if self._followed != self.count:
                self._followed = self.count
                self._steps.fill_(self.count)
            self._adam(
                block.xs, [g], first, second, [], [self._steps], lr=rate, beta1=s.betas[0], beta2=s.betas[1],
                weight_decay=decay, eps=s.eps, amsgrad=False, maximize=False, grad_scale=scale,
            )  # fmt: skip
        return self._difference.square(block.array, old) if self._measures else math.nan


class CompiledStepper:
    """Our kernels: one pass. The first step with a momentum is torch's, which copies the gradient as it is, -0 too."""

    def __init__(self, settings: Optimizer, plain: TorchStepper, kernels: ModuleType, measures: bool) -> None:
        self._settings, self._plain, self._kernels, self._measures = settings, plain, kernels, measures
        self.count, self._kernel = 0, cache(self._make)

    def change(self, block: Block, g: Tensor, divisor: float, rate: float, kept: np.ndarray | None) -> float:
        s, t = self._settings, self.count
        if t == 1 and s.momentum and s.name == "sgd":
            self._plain.count = t
            return self._plain.change(block, g, divisor, rate, kept)
        if kept is not None:
            np.copyto(kept, block.array)
        kernel = self._kernel(block.decayed and s.weight_decay != 0, divisor != 1)
        if s.name == "sgd":
            m = block.state[0] if s.momentum else block.array  # which is not looked at
            decay = s.weight_decay if block.decayed else 0.0
            return kernel(block.array, m, g.numpy(), rate, s.momentum, decay, divisor)
        (beta1, beta2), (m, v) = s.betas, block.state
        length, root = rate / (1 - beta1**t), math.sqrt(1 - beta2**t)
        lam = 1 - rate * s.weight_decay if s.name == "adamw" else s.weight_decay
        return kernel(block.array, m, v, g.numpy(), length, root, beta1, beta2, s.eps, lam, divisor)

    def _make(self, decays: bool, divides: bool) -> Callable[..., float]:
        s, kernels, measures = self._settings, self._kernels, self._measures
        made: Callable[..., float]
        if s.name == "sgd":
            made = kernels.sgd(decays, s.momentum != 0, s.nesterov, divides, measures)
        else:
            made = kernels.adam(decays, s.name == "adamw", divides, measures)
        return made


def make_stepper(
    settings: Optimizer, difference: Difference, kernels: ModuleType | None, measures: bool = True
) -> Stepper:
    """Ours where there are `kernels` and they have torch's bits on this machine, else torch's.

    measures: else a step need not tell how far it moved the model.
    """
    plain = TorchStepper(settings, difference, measures)
    if kernels is not None:
        compiled = CompiledStepper(settings, plain, kernels, measures)
        if agree(settings, plain, compiled):
            return compiled
    return plain


@quiet
def agree(settings: Optimizer, plain: TorchStepper, compiled: CompiledStepper) -> bool:
    """Whether both leave the same bits in model and moments, in steps with and without decay, divided and not."""
    many = moment_count(settings)

    def steps(stepper: Stepper, x: Tensor, *vectors: Tensor) -> None:
        moments, gradients = [vector.zero_() for vector in vectors[:many]], vectors[many:]
        half, old = x.numel() // 2, np.empty(x.numel(), np.float32)
        blocks = [Block.of(run, x, moments, old) for run in ((0, half, True), (half, x.numel(), False))]
        for count, (divisor, g) in enumerate(zip((1.0, 3.0, 1.0, 2.0), gradients, strict=True), 1):
            stepper.count = count
            for block in blocks:
                stepper.change(block, block.of_vector(g).clone(), divisor, 0.1 / count, None)
        stepper.count = 0

    return same_bits(partial(steps, plain), partial(steps, compiled), vectors=1 + many + 4)


def moment_count(settings: Optimizer) -> int:
    """How many vectors of the model's size a step goes on from."""
    return 2 if settings.name != "sgd" else 1 if settings.momentum else 0
