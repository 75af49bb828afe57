"""Evaluation on the server's rank without stalling the workers: on a thread of its own, of a copy of the model."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ps_elastic.tasks import Task
from ps_elastic.tasks.copies import copy_model
from ps_elastic.vectors.layout import Layout, load_statistics


class Evaluation(NamedTuple):
    """Metrics of the model that had used so many samples; t_s: when it had them, in seconds of the run."""

    samples: int
    version: int
    t_s: float
    metrics: dict[str, float]


class _Job(NamedTuple):
    """An evaluation to be done: of x (d,), a copy that may be written again afterwards unless it is the final one."""

    x: Tensor
    statistics: dict[int, np.ndarray]
    samples: int
    version: int
    t_s: float
    final: bool


class Evaluator:
    """Evaluates whenever `every` more samples were used, and at the end.

    One evaluation runs at a time; while it does, the newest one due replaces any that waits. With
    `background=False` it runs at once, so that the results come in a fixed order.
    seed: of `model`. statistics: worker -> the running statistics of its BatchNorms, averaged before each evaluation.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        every: int | None,
        *,
        background: bool = True,
        seed: int = 0,
    ) -> None:
        self.statistics: dict[int, np.ndarray] = {}
        self._task, self._layout, self._every = task, layout, every
        self._model, self._device = copy_model(task, model, seed), next(model.parameters()).device
        layout.attach(self._model, layout.empty().to(self._device), fill=False)  # not written: it takes no memory
        self._spare: list[Tensor] = []  # copies (d,) that nobody reads any more
        self.due = math.inf if every is None else every  # samples that the next evaluation waits for
        self._pool = ThreadPoolExecutor(1, "evaluation") if background else None
        self._running: Future[Evaluation] | None = None
        self._next: _Job | None = None
        self._finished: list[Evaluation] = []
        self.has_begun = False  # something was submitted whose result `finished` has not given yet

    def submit(self, x: Tensor, samples: int, version: int, now: float, *, final: bool = False) -> None:
        """Evaluate x (d,), with the statistics as they are now, if an evaluation is due by `samples`.

        x is copied, unless this is the final one: then it must stay as it is until the result is here.
        """
        if not final and samples < self.due:
            return
        if self._every is not None:
            self.due = (samples // self._every + 1) * self._every
        if self._next is not None:
            self._spare.append(self._next.x)
        self.has_begun = True
        copied = x if final else (self._spare.pop() if self._spare else torch.empty_like(x)).copy_(x)
        self._next = _Job(copied, dict(self.statistics), samples, version, now, final)
        self._begin()

    def finished(self) -> list[Evaluation]:
        """The evaluations that ended since the last call. Raises what the task's `evaluate` raised."""
        if self._running is not None and self._running.done():
            self._finished.append(self._running.result())
            self._running = None
            self._begin()
        done, self._finished = self._finished, []
        self.has_begun = self._running is not None
        return done

    def wait(self) -> None:
        """Return when nothing runs or waits; the results come with `finished`."""
        while self._running is not None:
            self._finished.append(self._running.result())
            self._running = None
            self._begin()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        if self._next is None or self._running is not None:
            return
        job, self._next = self._next, None
        if self._pool is None:
            self._finished.append(self._evaluate(job))
        else:
            self._running = self._pool.submit(self._evaluate, job)

    def _evaluate(self, job: _Job) -> Evaluation:
        self._layout.attach(self._model, job.x.to(self._device), fill=False)
        load_statistics(self._model, job.statistics)
        self._model.eval()  # each time: a task may end in train mode
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self._task.evaluate(self._model).items()}
        if not job.final:
            self._spare.append(job.x)
        return Evaluation(job.samples, job.version, job.t_s, metrics)
