"""The server's store where workers write the model themselves: `writers: workers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from torch import Tensor

from ps_elastic.errors import PolicyError
from ps_elastic.policies.events import PushId, ReplyId, Step
from ps_elastic.policies.ledger import View
from ps_elastic.server.views import Snapshots
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout
from ps_elastic.vectors.norms import norm


class Left(NamedTuple):
    """What a push that is here, or was, said of itself."""

    distance: float
    norm: float  # of what it carried


class WrittenStore:
    """The store of a server whose workers write: the steps that it is told of have been made.

    distances: of each worker what its `SharedModel` has. What pushes carried is in the model and nowhere else, so that
    of a step which uses several the move is known as the most that it can be. The copies are the workers'. The
    optimizer is plain SGD.
    """

    workers_write = True

    def __init__(self, layout: Layout, x: Tensor, distances: Mapping[int, np.ndarray]) -> None:
        self.layout, self.x, self.snapshots = layout, x, Snapshots(x)
        self._array, self._places, self._left = x.numpy(), distances, dict[PushId, Left]()
        self._moved = 0.0  # by the step under way, over its rate

    def foresee(self, part: PushMessage) -> None:
        """There is nothing to be added up."""

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        places = self._places[push.worker]
        self._left[push] = Left(float(places[push.step % places.size]), parts[0].payload_norm)

    def keep(self, push: PushId) -> None:
        """Nothing of it is in the transport's memory."""

    def free(self, pushes: Iterable[PushId]) -> None:
        for push in pushes:
            self._left.pop(push, None)

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The live model: the worker copies it when it likes, whatever is written meanwhile."""
        return self._array

    def hand(self, reply: ReplyId, version: int) -> Any:
        return self._array

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        """Its own pushes are in the model that the worker read."""

    def end(self, view: PushId | ReplyId) -> None:
        """Nothing was kept."""

    def combine(self, step: Step) -> None:
        total = sum(term.weight for term in step.terms) if step.combine == "mean" else 1.0
        self._moved = sum(abs(term.weight) * self._left[term.push].norm for term in step.terms) / total

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        self.combine(step)
        self.snapshots.advance()
        return rate * self._moved

    def distance_when_used(self, view: PushId) -> float:
        return self._left[view].distance

    def direction_norm(self) -> float:
        return self._moved

    def coast(self) -> tuple[float, float]:
        return 0.0, 1.0

    def x_norm(self) -> float:
        return norm(self.x)

    def _refuse(self, *_: object) -> NoReturn:
        """A policy whose pushes workers add by themselves can ask for none of this."""
        raise PolicyError("workers write the model: of their copies and of late gradients the server knows nothing")

    view = distance = amend = forgive = ideal = delta = _refuse
