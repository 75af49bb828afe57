from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ps_elastic.plugins import Steps
from ps_elastic.worker.updates.base import Update, updates


@updates.register("local_sgd")
@dataclass
class LocalSgd(Update):
    """Make `local_steps` steps of plain SGD from the model received, and push the model difference.

    x^0 = x, x^{h+1} = x^h - alpha G(x^h), and x - x^H is pushed, which the server subtracts: with `synchronous` full
    averaging every H steps, with `random_subset` averaging of a random subset, with `fedbuff` FedBuff.
    The copies are local models. B <= 2 (p - 1)/p (H - 1) M for each worker, (H - 1) M in mean over all of them.
    Source: Koloskova et al., "A unified theory of decentralized SGD with changing topology and local updates", ICML
    2020 (arXiv 2003.10422); Stich, "Local SGD converges fast and communicates little", ICLR 2019.
    """

    units = "update"
    local_steps: Steps = 4  # H, worker steps from one push to the next; larger: fewer messages, larger D

    def __post_init__(self) -> None:
        super().__post_init__()
        self._start: Tensor | None = None

    def run(self, gradient: Callable[[], float], x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        if self._start is None or self.view is None:
            self._start, self.view = torch.empty_like(x), torch.empty_like(x)
        start, loss = self._start.copy_(x), 0.0
        for _ in range(self.local_steps):
            self.view.copy_(x)
            loss += gradient()
            x.add_(g, alpha=-alpha)
        torch.sub(start, x, out=g)
        x.copy_(start)
        return loss / self.local_steps
