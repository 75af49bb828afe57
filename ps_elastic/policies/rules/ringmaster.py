from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Versions
from ps_elastic.policies import Action, Bound, Drop, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_shared_memory


@policies.register("ringmaster")
@dataclass
class Ringmaster(Policy):
    """Use a gradient at once if its staleness is below `delay` versions; else discard it.

    x_{t+1} = x_t - alpha G(v), tau = t - version(v) < R: B <= (R - 1) M.
    Source: Maranjyan, Tyurin, Richtarik, "Ringmaster ASGD: the first asynchronous SGD with optimal time complexity",
    2025 (arXiv 2501.16168), algorithm 1; R = max(1, ceil(sigma^2 / epsilon)) there.
    Share: 1.
    """

    # R, versions of staleness from which a gradient is discarded; larger: fewer are, staler. 1: only fresh ones are
    # used
    delay: Versions = 4

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_shared_memory(self.delay - 1, facts.M), "(delay - 1) M", every_push=self.delay == 1)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if ledger.version - push.base < self.delay:
            yield Step.mean([push.id])
        else:
            yield Drop(push.id, "stale")
        yield Release((push.id.worker,))
