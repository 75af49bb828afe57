from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Annotated

from ps_elastic.plugins import OneOf, expect
from ps_elastic.policies import Action, Bound, Facts, Ledger, Measure, Policy, Push, PushId, Release, Step, policies
from ps_elastic.policies.theory import b_missed_steps


@policies.register("elastic_bound")
@dataclass
class ElasticBound(Policy):
    """Use gradients at once if every worker's copy stays within alpha B of the model; else keep them for later.

    On a push: if no live worker computes, use all kept pushes in one step. Otherwise use them only if, for every copy
    in use, travelled + reach - travelled(copy) < B; else keep them. travelled: cumulative step length; reach: largest
    move of the next step. Guarantee, on every push: ||x_t - v|| <= B x (largest alpha between copy and use), up to
    rounding. Use is all-or-nothing: choosing among the kept by norm would tie the sample to its noise. B = 0 is
    synchronous, infinity asynchronous in steps of whatever is kept.

    The cumulative step length grows like n where the true distance grows like sqrt(n) under noise; "refreshed" asks
    for the true distance of a copy that blocks, if that can help, at most once per copy and version. Same guarantee.

    Source: ours. From value-bounded asynchronous parallel (Wei et al., arXiv 1312.7869; called ideal but impractical
    in Dai et al., arXiv 1410.8043) it inherits a bound on values instead of clocks; new is one writer that knows every
    copy, which makes the bound exact and cheap, and the norm, which is that of elastic consistency.
    Share: n/p for a step of n pushes.
    """

    units = ("gradient",)
    optimizers = ("sgd",)
    uses_reach = bounds_views = True
    # B in gradient units; or 2M, twice the rms norm of a decoded push so far; or inf. Larger: staler, less waiting; 0
    # is synchronous
    bound: float | str = "4M"
    # refreshed: measure a worker's copy that blocks; path: never, its cumulative step length counts
    distance: Annotated[str, OneOf("refreshed or path")] = "refreshed"
    norms: float = field(default=0.0, init=False)  # sum of payload norms of the pushes kept
    squares: float = field(default=0.0, init=False)  # of the payload norms of all pushes
    pushes: int = field(default=0, init=False)
    measured: dict[PushId, int] = field(default_factory=dict, init=False)  # push -> version its copy was measured at
    granted: float = field(default=0.0, init=False)  # B that the last Step was made within

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self._number() >= 0, self, "bound", "a number >= 0, a multiple like 2M, or inf")

    @property
    def needs_views(self) -> bool:  # type: ignore[override]
        return self.distance == "refreshed"

    def budget(self) -> float:
        """B now, in gradient units."""
        return self._number() * (sqrt(self.squares / self.pushes) if self._relative and self.pushes else 1.0)

    def declared_bound(self, facts: Facts) -> Bound:
        budget = self._number() * (facts.M_push if self._relative else 1.0)
        if budget == inf:
            return Bound(
                b_missed_steps(1, facts.shares, facts.M), "s M, s = SUM of the step scales missed", kind="observed"
            )
        admits = f", which admits {budget * facts.fewest / facts.M:.3g} pushes of norm M" if facts.M else ""
        return Bound(budget, f"bound{admits}", every_push=True)

    def limit(self) -> float:
        return self.granted

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        self.norms += push.payload_norm
        self.squares += push.payload_norm**2
        self.pushes += 1
        self.measured.pop(push.id, None)
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held:
            return
        count = len(ledger.held)
        share = min(1.0, count / max(1, len(ledger.workers)))
        budget = self.budget()
        if ledger.computing:
            reach = ledger.reach(self.norms / count, share)
            while (oldest := ledger.oldest_view) is not None:
                if ledger.travelled + reach - ledger.views[oldest].travelled < budget:
                    break
                if not self._worth_asking(oldest, reach, budget, ledger):
                    return
                self.measured[oldest] = ledger.version
                yield Measure((oldest,))
        yield Step.mean(ledger.held, share)
        self.norms, self.granted = 0.0, budget
        if len(self.measured) > len(ledger.views):  # some are of pushes that were lost
            self.measured = {view: version for view, version in self.measured.items() if view in ledger.views}
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))

    def _worth_asking(self, view: PushId, reach: float, budget: float, ledger: Ledger) -> bool:
        if self.distance == "path" or reach >= budget or self.measured.get(view) == ledger.version:
            return False
        return ledger.version - ledger.views[view].version >= 2

    @property
    def _relative(self) -> bool:
        return isinstance(self.bound, str) and self.bound.endswith("M")

    def _number(self) -> float:
        try:
            return float(self.bound.removesuffix("M") if isinstance(self.bound, str) else self.bound)
        except ValueError:
            return -1.0
