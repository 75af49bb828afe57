"""How a store repays a debt exactly, at any lateness, and what its model would be with all of them repaid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ps_elastic.policies.events import PushId
from ps_elastic.server.optimizer import FlatOptimizer, Response
from ps_elastic.vectors.norms import norm


class Repayment:
    """responses: missing push -> what the optimizer made of its debt so far."""

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self.responses: dict[PushId, Response] = {}
        self._optimizer = optimizer
        self._settlement: Settlement | None = None
        self._settled_at = -1  # version at which it began

    def stepped(self, rate: float, owed: Sequence[PushId]) -> None:
        """A step at `rate` goes over the debts open, and owes these pushes."""
        for response in self.responses.values():
            self._optimizer.continue_response(response, rate)
        for debt in owed:
            self.responses[debt] = self._optimizer.respond(rate)

    def ideal(self, version: int, given: int | None, drift: Callable[[], Tensor]) -> IdealDrift:
        """Follow a view from here on. given: its version, None where it is of its worker alone. drift: x - v (d,)."""
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
        self.drifts: dict[int, Tensor] = {}  # version -> x - v (d,), shared by its views

    def settle(self, missing: PushId, delta: Tensor | None) -> None:
        """The debt on `missing` is closed: repaid with `delta` (d,), or not at all."""
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
