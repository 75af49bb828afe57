"""A task in which something goes wrong on demand."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from ps_elastic.cluster.environment import launcher_rank
from ps_elastic.errors import ConfigError
from ps_elastic.tasks import Task


class Vector(nn.Module):
    def __init__(self, floats: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(floats))


@dataclass
class Troubled(Task):
    """The loss is the sum of x (floats,): every version of the model is one number, repeated. Workers check that.

    fault: what happens on rank `rank` at its step `step`; `stamp`: a file that is given the time of it.
    """

    batch_size: int = 1
    floats: int = 100
    sleep_s: float = 0.0  # in every step
    fault: str = "none"
    rank: int = 1
    step: int = 3
    stamp: str = ""
    torn: bool = False  # whether views may be

    def prepare(self) -> None:
        if self.fault == "prepare" and launcher_rank() == self.rank:
            raise ConfigError("half of it is missing", key="data_dir", source="data.gz")

    def model(self, seed: int) -> nn.Module:
        other = self.fault == "layout" and launcher_rank() == self.rank
        return Vector(self.floats + 1 if other else self.floats)

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        if self.fault == "batches" and worker == self.rank:
            raise ValueError("no batches for me")
        return self._steps(worker)

    def _steps(self, worker: int) -> Iterator[Tensor]:
        step = 0
        while True:
            step += 1
            yield torch.tensor([worker == self.rank and step == self.step])

    def loss(self, model: Vector, batch: Tensor) -> Tensor:  # type: ignore[override]
        x = model.x.detach()
        assert self.torn or x.min() == x.max(), f"a torn model: {float(x.min())} to {float(x.max())}"
        time.sleep(self.sleep_s)
        factor = self._go_wrong() if bool(batch) else 1.0
        return factor * model.x.sum()

    def evaluate(self, model: Vector) -> dict[str, float]:  # type: ignore[override]
        if self.fault == "evaluate":
            self._note_time()
            raise ZeroDivisionError("no accuracy today")
        x = model.x.detach()
        assert self.torn or x.min() == x.max()
        process = psutil.Process()
        return {
            "loss": float(x.sum()), "wall_s": time.perf_counter(), "cpu_s": time.process_time(),
            "resident_bytes": float(process.memory_info().rss),
        }  # fmt: skip

    def _note_time(self) -> None:
        if self.stamp:
            Path(self.stamp).write_text(repr(time.time()))

    def _go_wrong(self) -> float:
        self._note_time()
        match self.fault:
            case "raise":
                raise ValueError("the dog ate batch 3")
            case "exit":
                sys.exit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "pause":
                time.sleep(1.0)
            case "hang":
                time.sleep(600)
            case "nan" | "inf":
                return float(self.fault)
        return 1.0
