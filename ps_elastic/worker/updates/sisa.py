from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ps_elastic.plugins import BelowOne, NotNegative, Positive, UpToOne, Versions
from ps_elastic.worker.updates.base import Update, updates

_EPSILON = 1e-8  # beside the root of the second moment


@updates.register("sisa")
@dataclass
class Sisa(Update):
    """Solve the worker's part of an inexact ADMM around the model received, and push the local model that it gives.

    For min SUM_i f_i(w_i)/p + (lambda/2) ||w||^2 with all w_i = w, at the model w pulled and with g = G(w):

        w_i = w - (g + pi_i) / (sigma + rho q_i);   pi_i <- pi_i + sigma (w_i - w);
        z_i = (sigma w_i + pi_i) / (sigma + lambda)

    q_i = 1 is PISA; q_i = sqrt(m_i), m_i the running mean of (g + pi_i)^2, is SISA. `policy: consensus` sets w to the
    mean of all z_i. sigma <- sigma/mu every `growth_every` versions. Rests where pi_i = -grad f_i(w) and lambda w is
    the mean of the pi_i: data that differ leave no floor. The learning rate has no part in it.
    Source: Zhou et al., "Preconditioned inexact stochastic ADMM for deep models", 2025 (arXiv 2502.10784), algorithms 1
    and 2, with the defaults of its code.
    """

    units = "model"
    moves = False
    sigma: Positive = 1.5  # penalty for leaving the common model; larger: smaller steps, workers closer together
    rho: NotNegative = 1000.0  # weight of q; larger: smaller steps
    ridge: NotNegative = 1e-3  # lambda, L2 penalty; larger: smaller parameters
    precondition: bool = True  # q = sqrt(m), SISA; false: q = 1, PISA (which needs a far smaller rho)
    beta: BelowOne = 0.999  # memory of m; larger: longer
    mu: UpToOne = 0.997  # sigma is divided by it; smaller: steps shrink sooner. 1: sigma is constant
    growth_every: Versions = 10  # versions from one such division to the next; larger: steps shrink later

    def __post_init__(self) -> None:
        super().__post_init__()
        self._multiplier: Tensor | None = None  # pi (d,)
        self._moment: Tensor | None = None  # m (d,), not yet corrected for its start at 0
        self._rounds = 0

    def run(self, gradient: Callable[[], float], x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        loss = gradient()
        if not math.isfinite(float(g.norm())):
            return loss
        if self._multiplier is None:
            self._multiplier = torch.zeros_like(x)
        sigma = self.sigma / self.mu ** (version // self.growth_every)
        g.add_(self._multiplier)
        step = g.div_(self._divisor(g, sigma))
        self._multiplier.sub_(step, alpha=sigma)
        torch.sub(x, step, out=g).mul_(sigma).add_(self._multiplier).div_(sigma + self.ridge)
        return loss

    def _divisor(self, force: Tensor, sigma: float) -> Tensor | float:
        """sigma + rho q, given g + pi (d,)."""
        if not self.precondition:
            return sigma + self.rho
        if self._moment is None:
            self._moment = torch.zeros_like(force)
        self._rounds += 1
        self._moment.mul_(self.beta).addcmul_(force, force, value=1 - self.beta)
        root = (self._moment / (1 - self.beta**self._rounds)).sqrt_().add_(_EPSILON)
        return root.mul_(self.rho).add_(sigma)
