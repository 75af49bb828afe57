"""Everything of the server that has d entries: model, payloads, workers' copies, late gradients. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import ZERO, PushId, Step, Term
from ps_elastic.server.combine import EagerSum, StepCombiner
from ps_elastic.server.combiners import Part
from ps_elastic.server.combiners.base import no_drift
from ps_elastic.server.debts import IdealDrift, Repayment
from ps_elastic.server.optimizer import FlatOptimizer, Quotient, Sweep
from ps_elastic.server.payloads import Payloads
from ps_elastic.server.shared_step import Leader
from ps_elastic.server.single_block import Apply, SingleBlock
from ps_elastic.server.views import KeptViews, TornViews, ViewId
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.vectors.norms import norm

BeginStep = Callable[[Sequence[int], np.ndarray], "Callable[[int], None] | None"]


class ParameterStore:
    """The store of x, the server's model (d,), changed in place. Of each method, see `Store`.

    keeps_versions: workers' copies are kept, so that distances can be measured. copies: where workers read the model
    while it is written, of each the model (d,) that it computes on, in memory shared with it.

    before_change: called before x changes, for a transport that sends models from where they are. begin_step: called
    then with the workers whose pushes a step is made of, and x; what it returns, unless None, is told how many entries
    of x are new, again and again. crew: makes a step, where it can, that does nothing but change x. None: nobody cares.
    """

    workers_write = False

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        *,
        keeps_versions: bool = True,
        copies: Mapping[int, Tensor] | None = None,
        before_change: Callable[[], None] | None = None,
        begin_step: BeginStep | None = None,
        crew: Leader | None = None,
    ) -> None:
        self.layout, self.x, self._array = layout, x, x.numpy()  # the same; made once, as it takes a microsecond
        self.payloads = payloads = Payloads(layout, compressors)
        self.views = views = (
            KeptViews(x, optimizer, payloads, keeps=keeps_versions) if copies is None else TornViews(x, copies)
        )
        self.snapshots = views.snapshots
        self.take, self.free = payloads.take, payloads.free
        self.give, self.hand, self.derive, self.end = views.give, views.hand, views.derive, views.end
        self._before_change, self._begin_step, self._crew = before_change, begin_step, crew
        self._optimizer = optimizer
        self._repayment = Repayment(optimizer)
        self._terms = StepCombiner(layout, compressors, optimizer.stops)
        self._step, self._is_combined = Step(()), True  # the step made last, and whether `_combined` is of it
        self._combined, self._scratch = layout.empty(), torch.empty_like(x)  # no memory until they are written
        self._distances: dict[PushId, float] = {}  # of the copies that the last step measured
        self.distance_when_used = self._distances.__getitem__
        self._apply: Apply = self._in_general
        if isinstance(views, KeptViews) and not (before_change or begin_step or crew):
            single = SingleBlock.of(
                layout, x, optimizer, compressors, payloads, views, self._repayment.responses, self._distances,
                self._in_general,
            )  # fmt: skip
            self._apply = single.apply if single is not None else self._in_general
        dense = len(layout.buckets) > 1 and all(isinstance(compressor, Identity) for compressor in compressors)
        self._eager_sum = EagerSum(layout.buckets, self._combined) if dense else None

    def foresee(self, part: PushMessage) -> None:
        if self._eager_sum is not None:
            i = part.bucket
            (vector,) = self.payloads.read(part, i)
            self._eager_sum.arrived(PushId(part.worker, part.step), i, vector)

    def keep(self, push: PushId) -> None:
        if push in self.payloads.of:
            if self._eager_sum is not None:
                self._eager_sum.forget()
            self.payloads.keep(push)
            self.views.keep(push)

    def view(self, view: ViewId) -> Any:
        return self.views.vector(view).numpy()

    def drift(self, view: PushId, bucket: Bucket | None = None) -> Tensor:
        """x - v of a copy given (d,), or what of it is in `bucket` (n,): the caller's until the next call."""
        if bucket is None:
            return torch.sub(self.x, self.views.vector(view), out=self._scratch)
        part = slice(bucket.start, bucket.stop)
        return torch.sub(self.x[part], self.views.vector(view)[part], out=self._scratch[part])

    def distance(self, view: PushId) -> float:
        _, apart = self.views.apart((view,))
        return self._optimizer.difference.norm(self.x, *apart.values()) if apart else 0.0

    def combine(self, step: Step) -> None:
        self._step, self._is_combined = step, False

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        return self._apply(step, rate, views)

    def _in_general(self, step: Step, rate: float, views: Sequence[PushId]) -> float:
        """In one pass over x."""
        self.combine(step)
        terms = step.terms
        owed = [missing for _, _, missing in terms if missing is not None]
        gradient: Tensor | Iterable[Quotient] | None = None
        if self._eager_sum is not None and (total := self._eager_sum.take(step)) is not None:
            gradient = self._optimizer.cut(total, float(len(terms)))
        elif not owed:
            gradient = self._terms.in_blocks(step.combine, self._parts_of)
        if gradient is None:
            gradient = self._whole()
        keys, apart = self.views.apart(views)
        for push, _, missing in terms:
            if missing is None:
                self.end(push)  # its memory, read in this pass, may be where the model of before is kept
        if self._before_change is not None:
            self._before_change()
        sweep = Sweep(tuple(apart.values()), self.snapshots.advance())
        if step.apply == "assign":
            moved = self._optimizer.assign(gradient, sweep)
        else:
            if owed or self._repayment.responses:
                self._repayment.stepped(rate, owed)
            shared = None
            if self._crew is not None and not (owed or apart or sweep.kept is not None):
                shared = self._crew.step(step, self.payloads.of, rate)
            tell = None
            if self._begin_step is not None:
                tell = self._begin_step([term.push.worker for term in step.terms], self._array)
            if tell is not None and shared is None:
                parts = self._optimizer.cut(gradient) if isinstance(gradient, Tensor) else gradient
                gradient = _telling(parts, tell)
            moved = self._optimizer.step(gradient, rate, sweep) if shared is None else shared
            if tell is not None:
                tell(self.x.numel())
        measured = dict(zip(apart, sweep.distances, strict=True))
        self._distances.clear()
        self._distances.update((view, measured.get(key, 0.0)) for view, key in zip(views, keys, strict=True))
        return moved

    def amend(self, missing: PushId) -> float:
        delta = self._whole()
        if self._before_change is not None:
            self._before_change()
        kept = Sweep(kept=self.snapshots.advance())
        return self._optimizer.amend(delta, self._repayment.responses.pop(missing), kept)

    def forgive(self, missing: PushId) -> None:
        self._repayment.responses.pop(missing, None)

    def direction_norm(self) -> float:
        return self._optimizer.direction_norm(self._whole())

    def coast(self) -> tuple[float, float]:
        return self._optimizer.coast()

    def x_norm(self) -> float:
        return norm(self.x)

    def ideal(self, view: PushId) -> IdealDrift:
        return self._repayment.ideal(self.snapshots.version, self.views.version(view), partial(self.drift, view))

    def delta(self) -> Tensor:
        return self._combined

    def _whole(self) -> Tensor:
        """The terms of the step as one vector (d,), kept if a placeholder is made of it."""
        step, made = self._step, PushId(0, self.snapshots.version + 1)
        if not self._is_combined:
            if self._eager_sum is not None:
                self._eager_sum.forget()  # the sum lies where this will
            self._terms.whole(step.combine, self._parts_of, self._combined)
            self._is_combined = True
            if any(term.stands_for is not None and term.push == made for term in step.terms):
                self.payloads.dense[made] = self._combined.clone()
        return self._combined

    def _parts_of(self, i: int, bucket: Bucket) -> list[Part]:
        made = self.snapshots.version + 1  # the mean of the others, which leaves their mean as it is
        return [self._part(term, i, bucket) for term in self._step.terms if term.push.worker or term.push.step != made]

    def _part(self, term: Term, i: int, bucket: Bucket) -> Part:
        view = term.push
        if view.worker:
            return Part(self.payloads.of[view][i], None, term.weight, lambda: self.drift(view, bucket))
        if view == ZERO:
            return Part(None, None, term.weight, no_drift)
        return Part(None, self.payloads.dense[view][bucket.start : bucket.stop], term.weight, no_drift)


def _telling(parts: Iterable[Quotient], tell: Callable[[int], None]) -> Iterator[Quotient]:
    """`parts`, each asked for when the step is done with what was before it; `tell` how many entries that is."""
    done = 0
    for part in parts:
        yield part
        done += part[0].numel()
        tell(done)
