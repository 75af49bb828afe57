from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Quorum
from ps_elastic.policies import Action, Ledger, Policy, Push, PushId, Release, Step, Term, policies
from ps_elastic.policies.theory import Bound, Facts, exact, no_bound


@policies.register("consensus")
@dataclass
class Consensus(Policy):
    """Set the model to the mean of every worker's latest contribution, once `quorum` of them are new.

    x <- (1/p) SUM_i z_i, z_i the last push of worker i: of a late worker the last contribution counts again. With
    `update: sisa` z_i = (sigma w_i + pi_i)/(sigma + lambda), which makes this the server of PISA and SISA.
    Source: Zhou et al., "Preconditioned inexact stochastic ADMM for deep models", 2025 (arXiv 2502.10784), algorithm 1.
    Share: 1 (it sets the model and makes no optimizer step).
    """

    units = ("model",)
    keeps_last = True
    quorum: Quorum = 1.0  # fraction of the workers whose model must be new; smaller: less waiting, older models

    def declared_bound(self, facts: Facts) -> Bound:
        if self.quorum == 1:
            return exact()
        return no_bound("none: the model is set, not stepped, so that its change is no multiple of a step size")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held or len(ledger.held) < self.quorum * len(ledger.workers) - 1e-9:
            return
        newest = self._newest(ledger)
        if ledger.computing and any(worker not in newest for worker in ledger.workers):
            return  # the first contribution of some worker is still to come
        yield Step(tuple(Term(push) for push in sorted(newest.values())), apply="assign")
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))

    def _newest(self, ledger: Ledger) -> dict[int, PushId]:
        newest = {push.worker: push for push in ledger.held}
        for worker in ledger.workers:
            if worker not in newest and (last := ledger.last(worker)) is not None:
                newest[worker] = last
        return newest
