"""elastic_bound as it would be if it knew everything: what is left to gain. For simulations alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ps_elastic.policies.events import Action, PushId, Release, Step
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.elastic_bound import ElasticBound

if TYPE_CHECKING:
    from ps_elastic.server.server import Server


@dataclass
class ExactStep(ElasticBound):
    """elastic_bound with the exact distance of every copy after the step that it might make, instead of a bound on it.

    On a push, if no live worker computes, use all held pushes; otherwise only if ||x - alpha (n/p) mean - v|| < alpha B
    for every copy in use. No policy can do that: metadata do not tell. `watch` shows it the server;
    plain SGD with a constant alpha is taken for granted.
    """

    def watch(self, server: Server) -> None:
        self._server = server

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held:
            return
        share, budget = min(1.0, len(ledger.held) / max(1, len(ledger.workers))), self.budget()
        step = Step.mean(ledger.held, share)
        if ledger.computing and not self._bounded(ledger, share, budget) and self._farthest(ledger, step) >= budget:
            return
        yield step
        self.norms, self.granted = 0.0, budget
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))

    def _bounded(self, ledger: Ledger, share: float, budget: float) -> bool:
        """Whether the path alone shows that the step is within the budget, which is sooner asked."""
        oldest = ledger.oldest_view
        reach = ledger.reach(self.norms / len(ledger.held), share)
        return oldest is None or ledger.travelled + reach - ledger.views[oldest].travelled < budget

    def _farthest(self, ledger: Ledger, step: Step) -> float:
        """The largest ||x - v|| / alpha after `step`, of all copies in use."""
        store, alpha = self._server.store, ledger.applied.alpha
        # By the store's own private means: a policy of the package has no business here, and is given none.
        mean = sum(store.payloads.decoded(term.push) for term in step.terms) / len(step.terms)
        after = store.x - alpha * step.share * mean
        of_version: dict[int, PushId] = {view.version: push for push, view in ledger.views.items()}
        views = torch.stack([torch.from_numpy(store.view(push)) for push in of_version.values()])
        return float(torch.linalg.vector_norm(after - views, dim=1).max()) / alpha
