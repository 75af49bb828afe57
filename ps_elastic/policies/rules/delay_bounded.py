from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Staleness
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_shared_memory


@policies.register("delay_bounded")
@dataclass
class DelayBounded(Policy):
    """Use gradients at once if no worker's copy falls more than `bound` versions behind; else keep them for later.

    Before a step makes version t + 1, every worker's copy in use must be at least as new as t + 1 - bound; a push that
    would break this is kept for later and its worker waits, and all kept ones are used in one step once none does.
    So tau <= bound and B <= tau M, each step counting for at most a round.
    Source: the bounded-delay assumption of shared-memory SGD, Nadiradze et al., "Elastic Consistency", AAAI 2021,
    table 1, enforced instead of assumed; Langford, Smola, Zinkevich, "Slow learners are fast", NIPS 2009.
    Share: n/p for a step of n pushes.
    """

    adds = True
    bound: Staleness = 4  # versions that a worker's copy may lack; 0 is synchronous, larger: staler, less waiting

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_shared_memory(self.bound, facts.M), "bound M", every_push=self.bound == 0)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held:
            return
        oldest = next(iter(ledger.views.values()), None)  # views are in the order sent, which is that of versions
        if oldest is not None and ledger.version + 1 - oldest.version > self.bound:
            return
        yield Step.mean(ledger.held, share=min(1.0, len(ledger.held) / max(1, len(ledger.workers))))
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))
