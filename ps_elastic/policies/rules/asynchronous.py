from __future__ import annotations

from dataclasses import dataclass

from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, Term, policies
from ps_elastic.policies.theory import b_missed_steps, b_reapplied


@policies.register("asynchronous")
@dataclass
class Asynchronous(Policy):
    """Use every gradient at once, and release its worker at once.

    x_{t+1} = x_t - (alpha/p) G(v_t), v_t the model its worker was last given: with delays of at most tau steps
    D_t <= alpha tau M / p. With p equal workers in turn tau = p - 1; with `update.pipeline: k` of them p (k + 1) - 1,
    of which the k own are re-applied.
    Source: Dean et al., "Large scale distributed deep networks", NIPS 2012, section 4.1 (Downpour SGD), with fetch
    and push after every gradient; constant: Nadiradze et al., "Elastic Consistency", AAAI 2021.
    Share: 1/p, so that p pushes move the model as one synchronous round does.
    """

    pipelines = adds = True

    def declared_bound(self, facts: Facts) -> Bound:
        missed = b_missed_steps(facts.tau, 1 / facts.fewest, facts.M)
        if not facts.reapplied:
            return Bound(missed, "tau M/p", kind="observed")
        return Bound(missed + b_reapplied(facts), "tau M/p + r M", kind="observed")

    def on_push(self, push: Push, ledger: Ledger) -> tuple[Action, ...]:
        return Step((Term(push.id),), 1 / len(ledger.workers)), Release((push.id.worker,))
