"""A worker's gradients: of its next batches, at the model in x, into g."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ps_elastic.tasks import Task
from ps_elastic.worker.flat_module import FlatModule
from ps_elastic.worker.updates import Update
from ps_elastic.worker.updates.sgd import Sgd


class GradientSource:
    """The gradients of worker `rank` of 1..p, as its update asks for them.

    flat: where they are made. clock: seconds; only durations are taken from it.
    drawn: batches since it was set to 0. final: whether what backward makes is what is pushed, and is so in any case.
    leave: called during backward with each bucket that is finished, if anything.
    """

    leave: Callable[[int], None] | None = None

    def __init__(
        self, rank: int, task: Task, flat: FlatModule, batches: Iterator[Any], update: Update, *, seed: int = 0,
        accumulate: int = 1, clip_norm: float | None = None, autocast: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.rank, self.task, self.flat, self.update, self.clock = rank, task, flat, update, clock
        self._batches, self._g, self._gradient, self._device = batches, flat.made, flat.gradient, flat.device
        self._seed, self._accumulate, self._clip_norm = seed, accumulate, clip_norm
        self._step, self._cut_s, self._until = 0, update.cut_s, math.inf
        self._cut: Collection[int] | None = ()  # buckets that the computation under way does not come to, if known
        self.drawn = 0
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(autocast or "")
        self._autocast: Callable[[], Any] = (
            (lambda: torch.autocast(self._device.type, dtype)) if dtype else contextlib.nullcontext
        )
        plain = accumulate == 1 and dtype is None and self._cut_s is None
        self._shortcut = plain and type(task).differentiate is not Task.differentiate
        whole = type(update).run is Sgd.run and clip_norm is None and self._cut_s is None
        self.final = whole and not self._shortcut

    def begin(self, step: int, started: float, cut: Collection[int] | None) -> None:
        """Gradients of push `step` are asked for from `started` on; cut: see `Worker.push`."""
        self._step = step
        self._until = math.inf if self._cut_s is None or cut is not None else started + self._cut_s
        self._cut = () if self._cut_s is None else cut

    def gradient(self) -> float:
        """Leave the gradient of the mean loss of the next `accumulate` batches in g, clipped; return that loss."""
        loss = self._mean_gradient()
        if self._clip_norm is not None:
            norm = float(torch.linalg.vector_norm(self._g))
            if self._clip_norm < norm < math.inf:
                self._g *= self._clip_norm / norm
        return loss

    def missing(self) -> Collection[int]:
        """The buckets that backward had not finished when it was cut off."""
        if self._cut is not None:
            return self._cut
        return self._gradient.missing() if self._gradient.cut else ()

    def _mean_gradient(self) -> float:
        if self._shortcut:
            return self.task.differentiate(self.flat.model, self._next_batch(), self._gradient.views)
        total = 0.0
        final = self.final and self._accumulate == 1
        with self._gradient.collecting(self.clock, self._until, final=final):
            for number in range(1, self._accumulate + 1):
                batch = self._next_batch()
                with self._autocast():
                    loss = self.task.loss(self.flat.model, batch)
                if self.leave is not None and number == self._accumulate:
                    self._gradient.tell(self.leave)
                total += float(loss.detach())
                torch.autograd.backward(loss / self._accumulate if self._accumulate > 1 else loss)
                self._gradient.told()
        for i in self.missing():
            bucket = self.flat.layout.buckets[i]
            self._g[bucket.start : bucket.stop].zero_()
        return total / self._accumulate

    def _next_batch(self) -> Any:
        if not self._shortcut:
            _seed(self._device, draw_seed(self._seed, self.rank, self._step, self.drawn))
        self.drawn += 1
        return to_device(next(self._batches), self._device)


def _seed(device: torch.device, seed: int) -> None:
    """Seed torch's default generator of the CPU and of `device`."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 300 us more: it notes where it was called from
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def draw_seed(*parts: int) -> int:
    """A 63-bit seed for a generator, from whole numbers such as (seed, worker, step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; arrays become tensors."""
    match batch:
        case Tensor():
            return batch.to(device, non_blocking=True)
        case np.ndarray():
            return torch.from_numpy(batch).to(device)
        case tuple() | list():
            return type(batch)(to_device(item, device) for item in batch)
        case dict():
            return {key: to_device(item, device) for key, item in batch.items()}
    return batch
