"""Everything of the server that has d entries: the model, payloads, views, debts. It decides nothing.

The server asks it by PushId and gets numbers back, so that a run can be simulated by a store without tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.compressors.base import reapply
from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import ZERO, PushId, ReplyId, Step, Term
from ps_elastic.policies.ledger import View
from ps_elastic.server.combine import EagerSum, StepCombiner
from ps_elastic.server.combiners import Part
from ps_elastic.server.combiners.base import no_drift
from ps_elastic.server.optimizer import FlatOptimizer, Quotient, Response, Sweep
from ps_elastic.server.shared_step import Leader
from ps_elastic.server.views import Snapshots
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.vectors.norms import norm

BeginStep = Callable[[Sequence[int], np.ndarray], "Callable[[int], None] | None"]


class ParameterStore:
    """x: the server's model (d,), in place. keeps_versions: views are kept, so that distances can be measured.

    before_change: called before x changes, for a transport that sends models from where they are. begin_step: called
    then with the workers whose pushes a step is made of, and x; what it returns, unless None, is told how many entries
    of x are new, again and again. crew: makes a step, where it can, that does nothing but change x. None: nobody cares.
    """

    workers_write = False  # the steps that it is told of have been made by workers

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        *,
        keeps_versions: bool = True,
        before_change: Callable[[], None] | None = None,
        begin_step: BeginStep | None = None,
        crew: Leader | None = None,
    ) -> None:
        self.layout, self.x, self.snapshots = layout, x, Snapshots(x)
        self._array = x.numpy()  # the same; made once, as it takes a microsecond
        self._keeps_versions = keeps_versions
        self._before_change, self._begin_step, self._crew = before_change, begin_step, crew
        self._optimizer, self._compressors = optimizer, compressors
        self._payloads: dict[PushId, tuple[Payload, ...]] = {}
        self._dense: dict[PushId, Tensor] = {}  # combined payloads (0, version), (d,)
        self._views: dict[PushId | ReplyId, int] = {}  # view -> version held
        self._reapplied: dict[PushId | ReplyId, Reapplied] = {}  # view -> what its worker did to that version
        self._own: dict[PushId | ReplyId, Tensor] = {}  # view -> the view itself, where it is nobody else's (d,)
        self._settlement: Settlement | None = None
        self._settled_at = -1  # version at which it began
        self._responses: dict[PushId, Response] = {}  # missing push -> what the optimizer made of its debt so far
        self._terms = StepCombiner(layout, compressors, optimizer.stops)
        self._step, self._is_combined = Step(()), True  # the step made last, and whether `_combined` is of it
        self._combined, self._scratch = layout.empty(), torch.empty_like(x)  # no memory until they are written
        self._distances: dict[PushId, float] = {}  # of the views that the last step measured
        dense = len(layout.buckets) > 1 and all(isinstance(compressor, Identity) for compressor in compressors)
        self._eager_sum = EagerSum(layout.buckets, self._combined) if dense else None

    def foresee(self, part: PushMessage) -> None:
        """A bucket of a push is here, and what will probably be done with it may be begun. Raises WireError."""
        if self._eager_sum is not None:
            i = part.bucket
            (vector,) = self._read(part, self.layout.buckets[i], self._compressors[i])
            self._eager_sum.arrived(PushId(part.worker, part.step), i, vector)

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        """Note the payload of a push; it stays in the transport's memory until `keep`. Raises WireError."""
        read = [self._read(*part) for part in zip(parts, self.layout.buckets, self._compressors, strict=True)]
        self._payloads[push] = tuple(read)

    def keep(self, push: PushId) -> None:
        """Copy the payload out of the transport's memory, if it is still needed."""
        if push in self._payloads:
            if self._eager_sum is not None:
                self._eager_sum.forget()
            copies = (tuple(array.clone() for array in payload) for payload in self._payloads[push])
            self._payloads[push] = tuple(copies)

    def free(self, push: PushId) -> None:
        self._payloads.pop(push, None)
        self._dense.pop(push, None)

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The model that the push `view` is to be computed on, as a numpy array that stays as it is until x changes."""
        if view not in self._views and view not in self._own:
            if given.own_push is not None:
                response = self._optimizer.respond(alpha)
                vector = self._decoded(given.own_push).mul_(given.own)
                self._own[view] = self._optimizer.add_response(
                    self.snapshots.vector(given.version).clone(), vector, response
                )
            elif self._keeps_versions:
                self.snapshots.hold(given.version)
                self._views[view] = given.version
        if view in self._own:
            return self._own[view].numpy()
        # Without kept versions a reply that is sent again carries the newest model: no farther than it is counted.
        if given.version == self.snapshots.version or not self._keeps_versions:
            return self._array
        return self.snapshots.vector(given.version).numpy()

    def hand(self, reply: ReplyId, version: int) -> Any:
        """The model for a worker that runs ahead, as a numpy array that stays as it is until `end`."""
        if reply not in self._views:
            self.snapshots.hold(version)
            self._views[reply] = version
        return self.snapshots.fixed(version).numpy()

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        """The push `view` was computed on the model of `reply` less rate x each of `pushes`, in this order."""
        self._views[view] = self._views[reply]
        self.snapshots.hold(self._views[view])
        if pushes:
            self._reapplied[view] = Reapplied(rate, tuple(pushes))

    def end(self, view: PushId | ReplyId) -> None:
        """Nobody will ask for this view again."""
        self._own.pop(view, None)
        self._reapplied.pop(view, None)
        if (version := self._views.pop(view, None)) is not None:
            self.snapshots.let_go(version)

    def view(self, view: PushId | ReplyId) -> Any:
        """The model given for the push `view`, where versions are kept, whatever x has become since."""
        return self._vector(view).numpy()

    def drift(self, view: PushId, bucket: Bucket | None = None) -> Tensor:
        """x - v of a view given (d,), or what of it is in `bucket` (n,): the caller's until the next call."""
        if bucket is None:
            return torch.sub(self.x, self._vector(view), out=self._scratch)
        part = slice(bucket.start, bucket.stop)
        return torch.sub(self.x[part], self._vector(view)[part], out=self._scratch[part])

    def distance(self, view: PushId) -> float:
        """||x - v||_2 of a view given."""
        if self._views.get(view) == self.snapshots.version and view not in self._reapplied:
            return 0.0
        return self._optimizer.difference.norm(self.x, self._vector(view))

    def distance_when_used(self, view: PushId) -> float:
        """||x - v||_2 of a view that the last step measured, x the model that the step was made from."""
        return self._distances[view]

    def combine(self, step: Step) -> None:
        """Take the terms of the step that `apply` or `amend` makes next."""
        self._step, self._is_combined = step, False

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        """Make the next version, `rate` = alpha x share, in one pass over x; return ||x_new - x_old||.

        views: of the pushes that the step uses; their distances are measured on the way, and those of its terms end.
        """
        terms, version = step.terms, self.snapshots.version
        owed = [missing for _, _, missing in terms if missing is not None]
        gradient: Tensor | Iterable[Quotient] | None = None
        if self._eager_sum is not None and (total := self._eager_sum.take(step)) is not None:
            gradient = self._optimizer.cut(total, float(len(terms)))
        elif not owed:
            gradient = self._terms.in_blocks(step.combine, self._parts_of)
        if gradient is None:
            gradient = self._whole()
        keys: list[PushId | ReplyId | int] = []  # views that are the same are measured once
        apart: dict[PushId | ReplyId | int, Tensor] = {}
        for view in views:
            key = view if view in self._reapplied else self._views.get(view, view)
            keys.append(key)
            if key != version and key not in apart:
                apart[key] = self._vector(view)
        for push, _, missing in terms:
            if missing is None:
                self.end(push)  # its memory, read in this pass, may be where the model of before is kept
        if self._before_change is not None:
            self._before_change()
        sweep = Sweep(tuple(apart.values()), self.snapshots.advance())
        if step.apply == "assign":
            moved = self._optimizer.assign(gradient, sweep)
        else:
            for response in self._responses.values():
                self._optimizer.continue_response(response, rate)
            for debt in owed:
                self._responses[debt] = self._optimizer.respond(rate)
            shared = None
            if self._crew is not None and not (owed or apart or sweep.kept is not None):
                shared = self._crew.step(step, self._payloads, rate)
            tell = None
            if self._begin_step is not None:
                tell = self._begin_step([term.push.worker for term in step.terms], self._array)
            if tell is not None and shared is None:
                parts = self._optimizer.cut(gradient) if isinstance(gradient, Tensor) else gradient
                gradient = _telling(parts, tell)
            moved = self._optimizer.step(gradient, rate, sweep) if shared is None else shared
            if tell is not None:
                tell(self.x.numel())
        if apart:
            measured = dict(zip(apart, sweep.distances, strict=True))
            self._distances = {view: measured.get(key, 0.0) for view, key in zip(views, keys, strict=True)}
        else:
            self._distances = dict.fromkeys(views, 0.0)
        return moved

    def amend(self, missing: PushId) -> float:
        """Repay a debt with the vector combined: x += c_x delta, m += c_m delta; return ||x_new - x_old||."""
        delta = self._whole()
        if self._before_change is not None:
            self._before_change()
        return self._optimizer.amend(delta, self._responses.pop(missing), Sweep(kept=self.snapshots.advance()))

    def forgive(self, missing: PushId) -> None:
        """The debt on `missing` is closed unpaid."""
        self._responses.pop(missing, None)

    def direction_norm(self) -> float:
        """||direction|| of the step just made at rate 0."""
        return self._optimizer.direction_norm(self._whole())

    def coast(self) -> tuple[float, float]:
        return self._optimizer.coast()

    def x_norm(self) -> float:
        return norm(self.x)

    def ideal(self, view: PushId) -> Ideal:
        """Begin to follow how far a view given is from the model with every debt open now settled."""
        version = self._views.get(view)
        if self._settlement is None or self._settled_at != self.snapshots.version:
            debts = {push: response.copy() for push, response in self._responses.items()}
            self._settlement = Settlement(debts, torch.zeros_like(self.x), self._optimizer)
            self._settled_at = self.snapshots.version
        drifts = self._settlement.drifts
        if version not in drifts:  # a view of its own has none, and shares its drift with nobody
            drifts[version] = self.drift(view).clone()
        return Ideal(drifts[version] if version is not None else drifts.pop(None), self._settlement)

    def delta(self) -> Tensor:
        """The vector (d,) of the amend just made: what the debt owed."""
        return self._combined

    def _whole(self) -> Tensor:
        """The terms of the step as one vector (d,), kept where a stand-in is made of it."""
        step, made = self._step, PushId(0, self.snapshots.version + 1)
        if not self._is_combined:
            if self._eager_sum is not None:
                self._eager_sum.forget()  # the sum lies where this will
            self._terms.whole(step.combine, self._parts_of, self._combined)
            self._is_combined = True
            if any(term.stands_for is not None and term.push == made for term in step.terms):
                self._dense[made] = self._combined.clone()
        return self._combined

    def _parts_of(self, i: int, bucket: Bucket) -> list[Part]:
        made = self.snapshots.version + 1  # the mean of the others, which leaves their mean as it is
        return [self._part(term, i, bucket) for term in self._step.terms if term.push.worker or term.push.step != made]

    def _vector(self, view: PushId | ReplyId) -> Tensor:
        if view in self._own:
            return self._own[view]
        vector = self.snapshots.vector(self._views[view])
        if view not in self._reapplied:
            return vector
        rate, pushes = self._reapplied[view]
        vector = vector.clone()
        for push in pushes:
            reapply(vector, self._payloads[push], self.layout.buckets, self._compressors, rate)
        return vector

    def _part(self, term: Term, i: int, bucket: Bucket) -> Part:
        view = term.push
        if view.worker:
            return Part(self._payloads[view][i], None, term.weight, lambda: self.drift(view, bucket))
        if view == ZERO:
            return Part(None, None, term.weight, no_drift)
        return Part(None, self._dense[view][bucket.start : bucket.stop], term.weight, no_drift)

    def _decoded(self, push: PushId) -> Tensor:
        """A new vector (d,): what `push` carried."""
        if push in self._dense:
            return self._dense[push].clone()
        out = torch.zeros_like(self.x)
        for payload, bucket, compressor in zip(self._payloads[push], *self._buckets(), strict=True):
            compressor.accumulate(payload, out[bucket.start : bucket.stop])
        return out

    def _buckets(self) -> tuple[Sequence[Bucket], Sequence[Compressor]]:
        return self.layout.buckets, self._compressors

    @staticmethod
    def _read(part: PushMessage, bucket: Bucket, compressor: Compressor) -> Payload:
        payload = tuple(map(torch.from_numpy, part.arrays))
        compressor.check(payload, bucket.numel)
        return payload


def _telling(parts: Iterable[Quotient], tell: Callable[[int], None]) -> Iterator[Quotient]:
    """`parts`, each asked for when the step is done with what was before it; `tell` how many entries that is."""
    done = 0
    for part in parts:
        yield part
        done += part[0].numel()
        tell(done)


class Reapplied(NamedTuple):
    """What a worker that runs ahead does to a model: it subtracts rate x what these pushes of its own decode to."""

    rate: float
    pushes: tuple[PushId, ...]


class Settlement:
    """The debts open at one moment, and what they add to a drift of then as they are closed: SUM c_x delta."""

    def __init__(self, debts: dict[PushId, Response], total: Tensor, optimizer: FlatOptimizer) -> None:
        self.debts, self.total, self._optimizer = debts, total, optimizer
        self.drifts: dict[int | None, Tensor] = {}  # version -> x - v (d,), shared by its views

    def settle(self, missing: PushId, delta: Tensor | None) -> None:
        """The debt on `missing` is closed: repaid with `delta` (d,), or not at all."""
        response = self.debts.pop(missing, None)
        if response is not None and delta is not None:
            self._optimizer.add_response(self.total, delta, response)


class Ideal(NamedTuple):
    """A drift x - v (d,) on its way to x_ideal - v, by a settlement that all uses of a moment share."""

    drift: Tensor
    settlement: Settlement

    @property
    def distance(self) -> float | None:
        """||x_ideal - v||, or None while a debt is open."""
        return None if self.settlement.debts else norm(self.drift + self.settlement.total)
