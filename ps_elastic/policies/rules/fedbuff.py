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
    """Collect `k` pushes, then apply their mean, each weighted by its staleness; no worker waits.

    x_{t+1} = x_t - eta (1/k) SUM_i s(tau_i) Delta_i, s(tau) = 1/sqrt(1 + tau), tau in server steps.
    Source: Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022
    (arXiv 2106.06639); meant for `update: local_sgd`, whose pushes are scaled already (then eta = `rate`).
    Share: `rate`.
    """

    k: Annotated[int, Range("a number of updates >= 1")] = 2  # pushes of one server step; larger: less noise, staler
    # eta, server learning rate: it multiplies the step; smaller: smaller steps
    rate: Annotated[float, Range("0 < rate <= 1")] = 1.0
    damped: bool = True  # weigh each by 1/sqrt(1 + staleness); false: alike

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_missed_steps(facts.tau, self.rate, facts.M), "tau rate M", kind="observed")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) >= self.k:
            terms = [Term(id, self._weight(ledger.version - ledger.held[id].base)) for id in sorted(ledger.held)]
            yield Step(tuple(terms), share=self.rate, combine="sum")
        yield Release((push.id.worker,))

    def _weight(self, staleness: int) -> float:
        return (1 / sqrt(1 + staleness) if self.damped else 1.0) / self.k
