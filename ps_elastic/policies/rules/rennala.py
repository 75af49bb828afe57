from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Gradients
from ps_elastic.policies import Action, Bound, Drop, Facts, Ledger, Policy, Push, Release, Step, exact, policies


@policies.register("rennala")
@dataclass
class Rennala(Policy):
    """Collect `batch` gradients of the current version, from any worker, then make a step; discard older ones.

    x_{t+1} = x_t - alpha (1/S) SUM of S gradients at x_t: D = 0, and fast workers give several.
    Source: Tyurin and Richtarik, "Optimal time complexities of parallel stochastic optimization methods under a fixed
    computation model", NeurIPS 2023 (arXiv 2305.12387), method 4; S = max(1, ceil(sigma^2 / epsilon)) there.
    Share: 1.
    """

    batch: Gradients = 4  # S, gradients of one server step; larger: less noise, fewer steps

    def declared_bound(self, facts: Facts) -> Bound:
        return exact()

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if push.base < ledger.version:
            yield Drop(push.id, "stale")
        elif len(ledger.held) >= self.batch:
            yield Step.mean(ledger.held)
        yield Release((push.id.worker,))
