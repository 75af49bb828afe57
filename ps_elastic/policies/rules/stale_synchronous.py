from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Lead
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_stale_synchronous


@policies.register("stale_synchronous")
@dataclass
class StaleSynchronous(Policy):
    """Use every gradient at once; a worker continues while it leads the slowest by at most `bound` steps.

    Release i when clock_i - min_j clock_j <= bound, clock = pushes completed. So completed clocks never differ by
    more than bound + 1, a copy misses at most (2 bound + 1)(p - 1) pushes, and B <= (2 bound + 1)(p - 1) M / p.
    Source: Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NIPS 2013,
    section 3, where the reads of a clock wait instead of its end.
    Share: 1/p.
    """

    adds = True
    bound: Lead = 4  # worker steps ahead of the slowest; 0 is synchronous in pace, larger: staler, less waiting

    def declared_bound(self, facts: Facts) -> Bound:
        scale = facts.p / facts.fewest  # the step scale is that of the workers left
        return Bound(b_stale_synchronous(facts.p, self.bound, scale * facts.M), "(2 bound + 1)(p - 1) M/p")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        worker = push.id.worker
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        if ledger.clock(worker) == ledger.slowest:  # it was the slowest, alone: others may continue now
            yield from self.try_again(ledger)
        elif ledger.clock(worker) - ledger.slowest <= self.bound:
            yield Release((worker,))

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        ready = tuple(w for w in ledger.waiting if ledger.clock(w) - ledger.slowest <= self.bound)
        if ready:
            yield Release(ready)
