from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated

from ps_elastic.plugins import OneOf, Quorum
from ps_elastic.policies import Bound, Facts, Ledger, PushId, no_bound, policies
from ps_elastic.policies.rules.scheduling import ElasticScheduler
from ps_elastic.policies.theory import EQUAL_DATA, REPAID, SMALL_STEP, b_variance_bounded


@policies.register("variance_bounded")
@dataclass
class VarianceBounded(ElasticScheduler):
    """End a round when a `quorum` of the workers has pushed; an unbiased placeholder replaces each late gradient.

    substitute = "own": the copy of worker i is x + c (m/p) g_i, its own gradient in place of m missing ones, so that
    x_ideal - v_i = -(alpha/p) SUM_{j missing} (g_j - g_i); "mean": the mean of the received, for all alike. Corrected
    exactly when the late ones come. B <= 3 sigma m/p for alpha <= 1/(6L), equal data and lateness of one round. An own
    gradient replaces all that is late when its worker is released, of earlier rounds too: what is late longer adds to
    B, and a late worker that is released needs a placeholder for the others as well.
    Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, variance-bounded elastic scheduling; the mean of the
    received as placeholder is ours.
    Share: (received + missing)/p.
    """

    # fraction of the workers whose push ends a round; 1 is synchronous, smaller: less waiting, larger D
    quorum: Quorum = 0.5
    # placeholder gradient. own: each worker's own; mean: the mean of the received
    substitute: Annotated[str, OneOf("own or mean")] = "own"

    def declared_bound(self, facts: Facts) -> Bound:
        if facts.momentum:
            return no_bound("none: with momentum a late gradient weighs more than its placeholder, the later the more")
        if facts.sigma is None:
            return no_bound("none: sigma is not known, no step used two gradients")
        missing = max(facts.owed, facts.p - self._needed(facts.p))
        late = facts.lateness if self.substitute == "own" else 1  # the mean is of the round that it is used in
        return Bound(
            b_variance_bounded(missing, facts.fewest, facts.sigma, late, facts.M_push),
            "3 sigma m/p" if late <= 1 else f"3 sigma m/p + (l - 1) m M/(4p), late by l = {late} rounds",
            conditions=(SMALL_STEP, EQUAL_DATA, REPAID),
            broken=(REPAID,) if facts.lost else (),
            kind="declared" if late <= 1 else "observed",
            every_push=missing == 0,
        )

    @property
    def own_views(self) -> bool:  # type: ignore[override]
        return self.substitute == "own"

    def enough(self, ledger: Ledger) -> bool:
        return len(ledger.held) >= self._needed(len(ledger.workers))

    def placeholder(self, ledger: Ledger) -> PushId:
        return PushId(0, ledger.version + 1) if self.substitute == "mean" else super().placeholder(ledger)

    def own(self, ledger: Ledger) -> float:
        return len(ledger.debts) / len(ledger.workers) if self.substitute == "own" else 0.0

    def _needed(self, workers: int) -> int:
        return ceil(self.quorum * workers - 1e-9)
