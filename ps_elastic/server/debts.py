"""Late gradients: pushes that a Step replaced by placeholder gradients, until they are applied late or never will be.

A *debt* is such a missing push: owed by the Step that had the placeholder, repaid when the push is applied late, which
takes the placeholder out again, and closed by that or because the push will not come (it is forgiven then).

Discrepancies may be those from the model including late gradients: then a use waits here until the debts of its time
are closed. `Debts` is a shard's part of it; `Repayment` is a store's, which applies exactly at any lateness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ps_elastic.policies.events import Push, PushId, Step
from ps_elastic.server.discrepancy import Use, over
from ps_elastic.server.optimizer import FlatOptimizer, Response
from ps_elastic.server.protocols import Ideal, Store
from ps_elastic.server.totals import BoundFacts
from ps_elastic.vectors.norms import norm


class Owed(NamedTuple):
    """A debt: the largest step size since the step that owes it, and how many steps were made by then."""

    alpha: float
    steps: int


class Waiting(NamedTuple):
    """A use that waits for its push, or for its distance. ideal: None where that is known."""

    use: Use
    ideal: Ideal | None


class Debts:
    """owed: the debts, by the missing push. alpha: the largest step size since any of their steps, as of the last one.

    note: is told of each use that waits no more, and when. is_ideal: distances are those including late gradients.
    """

    def __init__(
        self, store: Store, measures: BoundFacts, note: Callable[[Use, float], None], *, is_ideal: bool
    ) -> None:
        self.owed: dict[PushId, Owed] = {}
        self.alpha, self.is_ideal = 0.0, is_ideal
        self._store, self._measures, self._note = store, measures, note
        self._open: dict[int, list[Waiting]] = {}  # version -> uses whose ideal model is not known yet
        self._uses: dict[
            PushId, Waiting
        ] = {}  # of pushes owed, until they are applied late and their distance is known
        self._ideals: dict[PushId, Ideal] = {}  # of the copies that the step under way uses, while debts are open

    def watch(self, views: Sequence[PushId]) -> None:
        """A step is about to use pushes with these copies, while debts are open."""
        if self.is_ideal:
            self._ideals = {view: self._store.ideal(view) for view in views}

    def hold(self, use: Use) -> Use:
        """A step counts this in, whose push is late or whose distance is not known yet; return what is known."""
        ideal = None
        if self.owed and self.is_ideal:
            ideal, use = self._ideals.pop(use.id), use._replace(distance=math.nan)
        waiting = Waiting(use, ideal)
        if use.push is None:
            self._uses[use.id] = waiting
        if ideal is not None:
            self._open.setdefault(use.version, []).append(waiting)
        return use

    def stepped(self, step: Step, alpha: float, steps: int) -> None:
        """A step with `alpha`, one of so many, opened the debts that it names."""
        for missing, owed in self.owed.items():
            if owed.alpha < alpha:
                self.owed[missing] = owed._replace(alpha=alpha)
        for term in step.terms:
            if term.stands_for is not None:
                self.owed[term.stands_for] = Owed(alpha, steps)
        self.alpha = max(owed.alpha for owed in self.owed.values())
        oldest = next(iter(self.owed.values()))
        self._measures.note_debts(len(self.owed), steps - oldest.steps + 1)

    def repaid(self, push: Push, now: float) -> list[tuple[PushId, float]]:
        """`push` was applied late; return the pushes whose discrepancy is known by that."""
        use, ideal = self._uses[push.id]
        waiting = self._uses[push.id] = Waiting(use._replace(push=push), ideal)
        waits = ideal is not None and use.version in self._open
        return ([] if waits else self._close(waiting, now)) + self._settle(push.id, now, paid=True)

    def forgiven(self, owed: Collection[PushId], now: float, *, ended: bool) -> list[tuple[PushId, float]]:
        """Pushes not among `owed` will not be applied late; return the pushes whose discrepancy is known by that.

        ended: because the run is over, so that nothing is lost by it.
        """
        known: list[tuple[PushId, float]] = []
        if len(owed) == len(self.owed):  # every debt of the ledger is known here, so none was closed
            return known
        for missing in [push for push in self.owed if push not in owed]:
            self._measures.lost += not ended
            self._store.forgive(missing)
            self._uses.pop(missing, None)
            known += self._settle(missing, now, paid=False)
        return known

    def _settle(self, missing: PushId, now: float, *, paid: bool) -> list[tuple[PushId, float]]:
        """A debt is closed: note the uses that waited for no other."""
        del self.owed[missing]
        known = []
        for version, uses in tuple(self._open.items()):
            ideal = uses[0].ideal  # those of a step wait for the same debts
            assert ideal is not None
            ideal.settlement.settle(missing, self._store.delta() if paid else None)
            if not ideal.settlement.debts:
                del self._open[version]
                for use in uses:
                    known += self._close(use, now)
        return known

    def _close(self, waiting: Waiting, now: float) -> list[tuple[PushId, float]]:
        """The distance of a use is known: note it, once its push is here; never, if that will not come."""
        use, ideal = waiting
        if use.push is None:
            owed = self._uses.get(use.id)
            if owed is None or owed.use.push is None:
                return []
            use, ideal = owed
        self._uses.pop(use.id, None)
        distance = use.distance if ideal is None else ideal.distance
        assert distance is not None
        self._note(use._replace(distance=distance, scaled=over(distance, use.largest)), now)
        return [(use.id, distance)]


class Repayment:
    """responses: missing push -> what the optimizer made of its debt so far."""

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self.responses: dict[PushId, Response] = {}
        self._optimizer = optimizer
        self._settlement: Settlement | None = None
        self._settled_at = -1  # version at which it began

    def stepped(self, rate: float, owed: Sequence[PushId]) -> None:
        """A step at `rate` goes over the debts open, and has placeholders for these pushes."""
        for response in self.responses.values():
            self._optimizer.continue_response(response, rate)
        for debt in owed:
            self.responses[debt] = self._optimizer.respond(rate)

    def ideal(self, version: int, given: int | None, drift: Callable[[], Tensor]) -> IdealDrift:
        """Follow a copy from here on. given: its version, None where it is of its worker alone. drift: x - v (d,)."""
        if self._settlement is None or self._settled_at != version:
            debts = {push: response.copy() for push, response in self.responses.items()}
            self._settlement, self._settled_at = Settlement(debts, self._optimizer), version
        drifts = self._settlement.drifts
        if given is None:
            return IdealDrift(drift().clone(), self._settlement)
        if given not in drifts:
            drifts[given] = drift().clone()
        return IdealDrift(drifts[given], self._settlement)


class Settlement:
    """The debts open at one moment, and what they add to a drift of then as they are closed: SUM c_x delta."""

    def __init__(self, debts: dict[PushId, Response], optimizer: FlatOptimizer) -> None:
        self.debts, self.total, self._optimizer = debts, torch.zeros_like(optimizer.x), optimizer
        self.drifts: dict[int, Tensor] = {}  # version -> x - v (d,), shared by its copies

    def settle(self, missing: PushId, delta: Tensor | None) -> None:
        """The debt on `missing` is closed: applied late with `delta` (d,), or not at all."""
        response = self.debts.pop(missing, None)
        if response is not None and delta is not None:
            self._optimizer.add_response(self.total, delta, response)


class IdealDrift(NamedTuple):
    """A drift x - v (d,) on its way to x_ideal - v, by a settlement that all uses of a moment share."""

    drift: Tensor
    settlement: Settlement

    @property
    def distance(self) -> float | None:
        """||x_ideal - v||, or None while a debt is open."""
        return None if self.settlement.debts else norm(self.drift + self.settlement.total)
