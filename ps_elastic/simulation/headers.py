"""A timing-only simulation: pushes that are metadata alone (header_workers.py), and a store that moves no tensor.

Server, ledger, policy and network are those of any run; only norms are made up, or taken from a recorded run. Every
push is a common part (the gradient of the loss) and a part of its own (noise): of pushes combined the common parts add
up, the others add in squares, and so do the moves of the model since a copy was sent. All distances are estimates by
that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

from ps_elastic.config.sections import Optimizer
from ps_elastic.policies.events import ZERO, PushId, ReplyId, Step
from ps_elastic.policies.ledger import View
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout


class Weight(NamedTuple):
    """What is left of an array: its bytes."""

    nbytes: int


Motion = tuple[float, float]  # the norm of a vector in two parts: what pushes have in common, the square of the rest


class NoSnapshots(NamedTuple):
    """Stands for the snapshots of a store that keeps none."""

    peak: None = None


class HeaderStore:
    """A `Store` on norms alone. The momentum is followed, weight decay and the norm of x are not.

    coherence: part of a push's squared norm that is common to all.
    """

    workers_write = False
    snapshots = NoSnapshots()
    x = None

    def __init__(self, optimizer: Optimizer, layout: Layout, coherence: float) -> None:
        self.layout, self._optimizer, self._coherence = layout, optimizer, coherence
        self._model, self._size = Weight(4 * layout.size), layout.numel
        self._payloads: dict[PushId, Motion] = {}
        self._views: dict[PushId | ReplyId, Motion] = {}  # view -> how far the model had moved when it was given
        self._owed: dict[PushId, float] = {}  # missing push -> rate of the step that had its placeholder
        self._combined = self._moved = self._momentum = (0.0, 0.0)
        self._version = 0
        self._distances: dict[PushId, float] = {}  # of the copies that the last step measured
        self.distance_when_used = self._distances.__getitem__
        self._settlement: HeaderSettlement | None = None
        self._settled_at = -1  # version at which it began

    def foresee(self, part: PushMessage) -> None:
        """Without numbers there is nothing to do ahead."""

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        norm = parts[0].payload_norm
        square = norm * norm
        common = self._coherence * square
        self._payloads[push] = sqrt(common), square - common

    def keep(self, push: PushId) -> None:
        """Nothing lies in anybody's memory."""

    def free(self, pushes: Iterable[PushId]) -> None:
        for push in pushes:
            self._payloads.pop(push, None)

    def give(self, view: PushId, given: View, alpha: float) -> Weight:
        self._views.setdefault(view, self._moved)
        return self._model

    def hand(self, reply: ReplyId, version: int) -> Weight:
        self._views.setdefault(reply, self._moved)
        return self._model

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        """What a worker re-applies is what the model moves by it, if the model uses it at that rate."""
        common, noise = self._views[reply]
        for push in pushes:
            together, alone = self._payloads[push]
            common, noise = common + rate * together, noise + rate * rate * alone
        self._views[view] = common, noise

    def view(self, view: PushId | ReplyId) -> Weight:
        return self._model

    def end(self, view: PushId | ReplyId) -> None:
        self._views.pop(view, None)

    def distance(self, view: PushId) -> float:
        """An estimate of ||x - v||: common moves add up since then, the others add in squares."""
        common, noise = self._views[view]
        common_now, noise_now = self._moved
        return sqrt((common_now - common) ** 2 + abs(noise_now - noise))

    def combine(self, step: Step) -> None:
        payloads, terms = self._payloads, step.terms
        if len(terms) == 1 and terms[0].push in payloads and step.combine != "sum":
            self._combined = payloads[terms[0].push]
            return
        made = PushId(0, self._version + 1)
        terms = tuple([term for term in terms if term.push != made])
        total = 1.0 if step.combine == "sum" else sum([term.weight for term in terms])
        common = noise = 0.0
        for push, weight, _ in terms:
            if push != ZERO:
                together, alone = payloads[push]
                weight /= total
                common += weight * together
                noise += weight * weight * alone
        self._combined = common, noise
        if len(terms) < len(step.terms):
            payloads[made] = self._combined

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        self.combine(step)
        distances, self._version = self._distances, self._version + 1
        distances.clear()
        for view in views:
            distances[view] = self.distance(view)
        mu, direction = self._optimizer.momentum, self._combined
        if self._optimizer.name != "sgd":  # every coordinate moves by about the rate, whatever the gradient
            scale = sqrt(self._size) / (_norm(direction) or 1.0)
            direction = direction[0] * scale, direction[1] * scale * scale
        elif mu:
            heavy = self._momentum
            direction = self._momentum = mu * heavy[0] + direction[0], mu * mu * heavy[1] + direction[1]
        for push, _, missing in step.terms:
            if missing is not None:
                self._owed[missing] = rate
            else:
                self._views.pop(push, None)
        return self._move(direction, rate)

    def amend(self, missing: PushId) -> float:
        self._version += 1
        return self._move(self._combined, self._owed.pop(missing))

    def forgive(self, missing: PushId) -> None:
        self._owed.pop(missing, None)

    def direction_norm(self) -> float:
        return _norm(self._combined)

    def coast(self) -> tuple[float, float]:
        if self._optimizer.name != "sgd":
            return math.inf, math.inf
        return self._optimizer.momentum * _norm(self._momentum), 1.0

    def x_norm(self) -> float:
        return 0.0

    def ideal(self, view: PushId) -> HeaderIdeal:
        if self._settlement is None or self._settled_at != self._version:
            self._settlement, self._settled_at = HeaderSettlement(dict(self._owed)), self._version
        return HeaderIdeal(self.distance(view), self._settlement)

    def delta(self) -> float:
        """The norm of what was combined last."""
        return _norm(self._combined)

    def _move(self, direction: Motion, rate: float) -> float:
        """Let the model move by rate x direction; return how far."""
        together, alone = direction
        common, noise = self._moved
        self._moved = common + rate * together, noise + rate * rate * alone
        return rate * sqrt(together * together + alone)


def _norm(motion: Motion) -> float:
    return sqrt(motion[0] * motion[0] + motion[1])


class HeaderSettlement:
    """The debts open at one moment, and the squared norm of what they add to a drift of then as they are closed."""

    def __init__(self, debts: dict[PushId, float]) -> None:
        self.debts, self.square = debts, 0.0

    def settle(self, missing: PushId, delta: float | None) -> None:
        rate = self.debts.pop(missing, None)
        if rate is not None and delta is not None:
            self.square += (rate * delta) ** 2


class HeaderIdeal(NamedTuple):
    """An estimate of ||x_ideal - v||: late gradients add in squares."""

    drift: float
    settlement: HeaderSettlement

    @property
    def distance(self) -> float | None:
        return None if self.settlement.debts else math.hypot(self.drift, sqrt(self.settlement.square))


def joined(slices: Sequence[Weight]) -> Weight:
    """The model made of its slices."""
    return Weight(sum(part.nbytes for part in slices))
