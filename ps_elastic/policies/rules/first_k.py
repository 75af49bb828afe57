from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Workers
from ps_elastic.policies import Action, Bound, Drop, Facts, Ledger, Policy, Push, Release, Step, exact, policies


@policies.register("first_k")
@dataclass
class FirstK(Policy):
    """Use the mean of the first `k` gradients of each version; discard the late ones, and tell their workers.

    x_{t+1} = x_t - alpha (1/k) SUM of the first k pushes computed on x_t: D = 0; the price is the work discarded,
    and a sample that leans to the fast workers where speed and data are linked.
    Source: Chen et al., "Revisiting distributed synchronous SGD", 2016 (arXiv 1604.00981), section 3.2: N + b
    workers, of which b are backups; here k = N. With fewer live workers than k, all of them.
    Share: 1 (the source averages what it uses).
    """

    k: Workers = 2  # gradients of one server step; larger: fewer are discarded, longer waits for stragglers

    def workers_needed(self) -> int:
        return self.k

    def declared_bound(self, facts: Facts) -> Bound:
        return exact()

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if push.base < ledger.version:
            yield Drop(push.id, "late")
            yield Release((push.id.worker,))
        else:
            yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if ledger.held and len(ledger.held) >= min(self.k, len(ledger.workers)):
            yield Step.mean(ledger.held)
            if ledger.waiting:
                yield Release(tuple(ledger.waiting))
