from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import BelowOne, NotNegative
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, Term, policies
from ps_elastic.policies.theory import b_shared_memory


@policies.register("delay_compensated")
@dataclass
class DelayCompensated(Policy):
    """Use every gradient at once, corrected to first order for the change of the model since the worker's copy.

    x_{t+1} = x_t - alpha (g + lambda g * g * (x_t - v_t)), elementwise: g g^T replaces the Hessian, its diagonal is
    used. Constant: lambda = scale. Adaptive: lambda = scale / sqrt(MS + 1e-7), MS <- m MS + (1 - m) g * g.
    Source: Zheng et al., "Asynchronous stochastic gradient descent with delay compensation", ICML 2017
    (arXiv 1609.08326): DC-ASGD-c with 0.04, DC-ASGD-a with 2 and m = 0.95.
    Share: 1, the source's.
    """

    units = ("gradient",)
    needs_views = True
    adaptive: bool = False  # divide `scale` by the running rms of the gradient, entry by entry
    # lambda; larger: stronger correction. null: that of the source, 0.04, or 2 if adaptive
    scale: NotNegative | None = None
    decay: BelowOne = 0.95  # m, memory of the running mean square if adaptive; larger: longer

    def declared_bound(self, facts: Facts) -> Bound:
        formula = f"tau M, M = {facts.M_applied:.4g} the rms of the compensated gradients"
        return Bound(b_shared_memory(facts.tau, facts.M_applied), formula, kind="observed")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        scale = self.scale if self.scale is not None else (2.0 if self.adaptive else 0.04)
        decay = f":decay={self.decay!r}" if self.adaptive else ""
        yield Step((Term(push.id),), combine=f"delay_compensated:scale={scale!r}{decay}")
        yield Release((push.id.worker,))
