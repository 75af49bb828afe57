from __future__ import annotations

from dataclasses import dataclass

from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, exact, policies


@policies.register("synchronous")
@dataclass
class Synchronous(Policy):
    """Wait for a gradient of every live worker, use their mean in one step, and release all together.

    x_{t+1} = x_t - alpha (1/p) SUM_i G(x_t; i): perfect consistency, B = 0.
    Source: Valiant, "A bridging model for parallel computation", Communications of the ACM 33(8), 1990, whose
    superstep this is; the parallel step of Nadiradze et al., "Elastic Consistency", AAAI 2021, with I_t = everybody.
    Share: 1; what a worker pushed before it left still counts.
    """

    lockstep = True

    def declared_bound(self, facts: Facts) -> Bound:
        return exact()

    def on_push(self, push: Push, ledger: Ledger) -> tuple[Action, ...]:
        if ledger.computing:
            return ()
        return self._step(ledger)

    def on_leave(self, worker: int, ledger: Ledger) -> tuple[Action, ...]:
        if ledger.held and not ledger.computing:
            return self._step(ledger)
        return ()

    def _step(self, ledger: Ledger) -> tuple[Action, ...]:
        step = Step.mean(ledger.held)
        return (step, Release(tuple(ledger.waiting))) if ledger.waiting else (step,)
