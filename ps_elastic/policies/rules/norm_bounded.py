from __future__ import annotations

from dataclasses import dataclass, field

from ps_elastic.plugins import Beta
from ps_elastic.policies import Bound, Facts, Ledger, Push, policies
from ps_elastic.policies.rules.scheduling import ElasticScheduler
from ps_elastic.policies.theory import REPAID, b_norm_bounded, b_norm_bounded_announced, late_norm


@policies.register("norm_bounded")
@dataclass
class NormBounded(ElasticScheduler):
    """End a round when the norms received reach a fraction `beta` of all; apply late gradients when they come.

    Proceed when SUM_{j in R} n_j >= beta SUM_j n_j, n_j the last known norm of worker j; a late gradient is applied
    in full when it comes. B <= m M/p for m missing; with announced norms (1 - beta) M. Choosing who is missing by
    norm ties the choice to the noise: only these M-type bounds hold.
    Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, norm-bounded elastic scheduling; the reference norm is
    ours, the text leaves it open.
    Share: (received + missing)/p.
    """

    # fraction of the sum of norms that ends a round; 1 is synchronous, smaller: less waiting, larger D
    beta: Beta = 0.8
    norms: dict[int, float] = field(default_factory=dict, init=False)  # last known, by worker
    total: float = field(default=0.0, init=False)  # of `norms`
    here: float = field(default=0.0, init=False)  # of the pushes kept

    def declared_bound(self, facts: Facts) -> Bound:
        M = late_norm(facts)
        announced = f"(1 - beta) M = {b_norm_bounded_announced(self.beta, M):.4g} with announced norms"
        return Bound(
            b_norm_bounded(facts.owed, facts.fewest, M),
            f"m M/p, M = {M:.4g} the rms of the pushes, over 1 - momentum; {announced}",
            conditions=(REPAID,),
            broken=(REPAID,) if facts.lost else (),
            kind="observed",
            every_push=self.beta == 1,
        )

    def arrived(self, push: Push, ledger: Ledger) -> None:
        worker = push.id.worker
        self.total += push.norm - self.norms.get(worker, 0.0)
        self.norms[worker] = push.norm
        if push.base >= self.opened:
            self.here += push.norm

    def began(self, ledger: Ledger) -> None:
        self.here = 0.0
        self.norms = {worker: norm for worker, norm in self.norms.items() if worker in ledger.workers}
        self.total = sum(self.norms.values())  # anew each round: running sums drift

    def enough(self, ledger: Ledger) -> bool:
        if self.beta == 1 or self.here < self.beta * self.total or len(self.norms) < len(ledger.workers):
            return False
        return all(worker in self.norms for worker in ledger.workers)
