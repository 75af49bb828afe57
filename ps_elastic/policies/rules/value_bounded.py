from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_elastic.plugins import NotNegative
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, no_bound, policies


@policies.register("value_bounded")
@dataclass
class ValueBounded(Policy):
    """Use gradients at once if the change that a copy lacks stays below a falling threshold; else keep them for later.

    Keep while SUM of step lengths since the oldest copy + (n/p) mean norm of those kept > v_0 / sqrt(t + 1).
    Source: Wei et al., "Consistent bounded-asynchronous parameter servers for distributed ML", 2013
    (arXiv 1312.7869), value-bounded asynchronous parallel: its condition at a server, in the 2-norm. The norm of a push
    is taken for the step length it makes, so with momentum or weight decay this is no guarantee; see elastic_bound.
    Share: n/p for a step of n pushes.
    """

    units = ("gradient",)
    optimizers = ("sgd",)
    bounds_views = True
    threshold: NotNegative = 10.0  # v_0 in gradient units, of what a worker's copy lacks; larger: staler, less waiting
    falling: bool = True  # divide it by sqrt(version + 1); false: v_0 at every version
    norms: float = field(default=0.0, init=False)  # sum of payload norms of the pushes kept

    def declared_bound(self, facts: Facts) -> Bound:
        if not facts.plain:
            return no_bound("none: with momentum or weight decay a step is not bounded by the norms of its pushes")
        return Bound(self.threshold, "threshold", every_push=self.threshold == 0)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        self.norms += push.payload_norm
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held:
            return
        p = max(1, len(ledger.workers))
        oldest = ledger.oldest_view
        if oldest is not None:
            unseen = ledger.travelled - ledger.views[oldest].travelled + self.norms / p
            if unseen > self.threshold / ((ledger.version + 1) ** 0.5 if self.falling else 1.0):
                return
        yield Step.mean(ledger.held, share=min(1.0, len(ledger.held) / p))
        self.norms = 0.0
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))
