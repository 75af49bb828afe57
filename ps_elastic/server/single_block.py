"""The steps of a small model at once: what `ParameterStore.apply` does in general, where it comes to very little.

Most runs are of a model that is one bucket and, up to 65,536 parameters, one block, whose pushes are vectors; most of
their steps are the mean of some pushes, each counted once. Such a step is one sum and one call of the optimizer. The
general way stays, for all others, and as what this one is compared with: both have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import PushId, Step
from ps_elastic.server.optimizer import FlatOptimizer, Response
from ps_elastic.server.payloads import Payloads
from ps_elastic.server.views import KeptViews
from ps_elastic.vectors.layout import Layout

Apply = Callable[[Step, float, Sequence[PushId]], float]  # as `apply` of a store


class SingleBlock:
    """Makes steps of x (d,), which is one block and one bucket.

    responses: of the gradients that are late. distances: filled with those of the copies of each step. general: makes
    the steps that are not the plain mean of pushes, or from copies of their own. Be `quiet`.
    """

    def __init__(
        self,
        x: Tensor,
        optimizer: FlatOptimizer,
        payloads: Payloads,
        views: KeptViews,
        responses: Mapping[PushId, Response],
        distances: dict[PushId, float],
        general: Apply,
    ) -> None:
        self._array, self._room = x.numpy(), torch.empty_like(x)
        self._block, self._stepper, self._square = optimizer.blocks[0], optimizer.stepper, optimizer.difference.square
        self._payloads, self._responses = payloads.of, responses
        self._views, self._snapshots, self._copies = views, views.snapshots, views.snapshots.copies
        self._distances, self._general = distances, general

    @classmethod
    def of(
        cls,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        payloads: Payloads,
        views: KeptViews,
        responses: Mapping[PushId, Response],
        distances: dict[PushId, float],
        general: Apply,
    ) -> SingleBlock | None:
        """None where the model is more than that, or pushes are no vectors."""
        single = len(layout.buckets) == 1 and len(optimizer.stops) == 1 and type(compressors[0]) is Identity
        return cls(x, optimizer, payloads, views, responses, distances, general) if single else None

    def apply(self, step: Step, rate: float, views: Sequence[PushId]) -> float:
        """As `Store.apply`."""
        terms, _, combine, apply = step
        if combine != "mean" or apply != "step" or not rate or self._responses or self._views.reapplied:
            return self._general(step, rate, views)
        payloads, versions, vectors, count = self._payloads, self._views.versions, list[Tensor](), len(terms)
        for push, weight, missing in terms:
            if weight != 1 or missing is not None or push not in payloads:
                return self._general(step, rate, views)
            vectors.append(payloads[push][0][0])
        for view in views:
            if view not in versions:
                return self._general(step, rate, views)
        distances, apart, snapshots = self._distances, dict[int, float](), self._snapshots
        apart[snapshots.version] = 0.0
        distances.clear()
        for view in views:
            version = versions[view]
            if version not in apart:
                apart[version] = math.sqrt(self._square(self._array, self._copies[version].array))
            distances[view] = apart[version]
        ended = list[int]()
        for push, _, _ in terms:
            if push in versions:
                ended.append(versions.pop(push))
            else:
                self._views.end(push)
        snapshots.release(*ended)
        copy, stepper = snapshots.move_on(), self._stepper
        total = vectors[0] if count == 1 else self._sum(vectors)
        stepper.count += 1
        kept = None if copy is None else copy.array
        return math.sqrt(stepper.change(self._block, total, float(count), rate, kept))

    def _sum(self, vectors: Sequence[Tensor]) -> Tensor:
        """In the order given; of two or more."""
        total = torch.add(vectors[0], vectors[1], out=self._room)
        for vector in vectors[2:]:
            total.add_(vector)
        return total
