from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ps_elastic.plugins import Duration
from ps_elastic.worker.updates.base import Update, updates


@updates.register("cut_sgd")
@dataclass
class CutSgd(Update):
    """Push the gradient of one batch, as far as backward has come after `deadline_s`: from the last layer to the first.

    The buckets that it has not come to are sent empty. For layerwise policies: the straggler's side of SALF.
    Source: Lang, Cohen and Shlezinger, "Stragglers-aware low-latency synchronous federated learning via layer-wise
    model updates", 2024 (arXiv 2403.18375).
    """

    deadline_s: Duration = 1.0  # seconds from the reply; larger: more layers. The policy's own, less a message each way

    @property
    def cut_s(self) -> float:  # type: ignore[override]
        return self.deadline_s

    def run(self, gradient: Callable[[], float], x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        return gradient()
