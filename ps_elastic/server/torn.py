"""The server's store where workers read the model while it is written: `views: torn`.

Nobody knows what such a reader sees but the reader itself. So each worker computes on a copy that it made in memory
shared with the server, and leaves it there until its push is answered: that copy is the view.
Source: the shared-memory model of Nadiradze et al., "Elastic Consistency", AAAI 2021, table 1, where a view misses, in
each coordinate, some of the last updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.policies.events import PushId, ReplyId, Step
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.store import BeginStep, ParameterStore
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout


class TornStore(ParameterStore):
    """copies: of each worker the model (d,) that it computes on, in shared memory."""

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        copies: Mapping[int, Tensor],
        before_change: Callable[[], None] | None = None,
        begin_step: BeginStep | None = None,
    ) -> None:
        super().__init__(
            layout, x, optimizer, compressors, keeps_versions=False, before_change=before_change, begin_step=begin_step
        )
        self._copies = copies

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The live model: the worker copies it when it likes, whatever is written meanwhile."""
        self._own[view] = self._copies[view.worker]
        return self.x.numpy()

    def keep(self, push: PushId) -> None:
        super().keep(push)
        if push in self._own:  # its worker is about to copy the model of now there
            self._own[push] = self._own[push].clone()


class Left(NamedTuple):
    """What a push that is here, or was, said of itself."""

    distance: float
    norm: float  # of what it carried


class WrittenStore(ParameterStore):
    """The store of a server whose workers write: the steps that it is told of have been made.

    distances: of each worker what its `SharedModel` has. What pushes carried is in the model and nowhere else, so that
    of a step which uses several the move is known as the most that it can be.
    """

    workers_write = True

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        distances: Mapping[int, np.ndarray],
    ) -> None:
        super().__init__(layout, x, optimizer, compressors, keeps_versions=False)
        self._places, self._left = distances, dict[PushId, Left]()
        self._moved = 0.0  # by the step under way, over its rate

    def foresee(self, part: PushMessage) -> None:
        """There is nothing to be added up."""

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        places = self._places[push.worker]
        self._left[push] = Left(float(places[push.step % places.size]), parts[0].payload_norm)

    def keep(self, push: PushId) -> None:
        """Nothing of it is in the transport's memory."""

    def free(self, push: PushId) -> None:
        self._left.pop(push, None)

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The live model: the worker copies it when it likes, whatever is written meanwhile."""
        return self.x.numpy()

    def hand(self, reply: ReplyId, version: int) -> Any:
        return self.x.numpy()

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        """Its own pushes are in the model that the worker read."""

    def end(self, view: PushId | ReplyId) -> None:
        """Views are the workers'."""

    def combine(self, step: Step) -> None:
        total = sum(term.weight for term in step.terms) if step.combine == "mean" else 1.0
        self._moved = sum(abs(term.weight) * self._left[term.push].norm for term in step.terms) / total

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        self.snapshots.advance()
        return rate * self._moved

    def direction_norm(self) -> float:
        return self._moved

    def distance_when_used(self, view: PushId) -> float:
        return self._left[view].distance
