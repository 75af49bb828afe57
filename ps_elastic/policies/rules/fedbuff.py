from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Annotated

from ps_elastic.plugins import Range
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, Term, policies
from ps_elastic.policies.theory import b_missed_steps


@policies.register("fedbuff")
@dataclass
class FedBuff(Policy):
    """Collect `k` updates, then apply their mean, each damped by its staleness; nobody waits.

    x_{t+1} = x_t - eta (1/k) SUM_i s(tau_i) Delta_i, s(tau) = 1/sqrt(1 + tau), tau in server steps.
    Source: Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022
    (arXiv 2106.06639); meant for `update: local_sgd`, whose pushes are scaled already (then eta = `rate`).
    Share: `rate`.
    """

    k: Annotated[int, Range("a number of updates >= 1")] = 2  # updates per step; larger: less noise, staler
    rate: Annotated[float, Range("0 < rate <= 1")] = 1.0  # eta, 0 < rate <= 1
    damped: bool = True  # false: s = 1

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_missed_steps(facts.tau, self.rate, facts.M), "tau rate M", kind="observed")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) >= self.k:
            terms = [Term(id, self._weight(ledger.version - ledger.held[id].base)) for id in sorted(ledger.held)]
            yield Step(tuple(terms), share=self.rate, combine="sum")
        yield Release((push.id.worker,))

    def _weight(self, staleness: int) -> float:
        return (1 / sqrt(1 + staleness) if self.damped else 1.0) / self.k
