from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ps_elastic.worker.updates.base import Update, updates


@updates.register("sgd")
@dataclass
class Sgd(Update):
    """Push the gradient of one batch (or the mean of `accumulate` batches) at the model received."""

    moves = False

    def run(self, gradient: Callable[[], float], x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        return gradient()
