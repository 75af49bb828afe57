from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_missed_steps


@policies.register("staleness_aware")
@dataclass
class StalenessAware(Policy):
    """Use every gradient at once with a learning rate divided by its staleness.

    x_{t+1} = x_t - (alpha / max(1, tau)) G(v_t), tau = staleness in versions. B <= (tau M) / tau = M where it is
    even.
    Source: Zhang et al., "Staleness-aware async-SGD for distributed deep learning", IJCAI 2016 (arXiv 1511.05950).
    Share: 1 / max(1, tau), the source's.
    """

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(
            b_missed_steps(1, facts.shares, facts.M),
            "s M, s = SUM 1/tau of the steps that a copy missed",
            kind="observed",
        )

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id], share=1 / max(1, ledger.version - push.base))
        yield Release((push.id.worker,))
