"""Sums made before the rule decides: what a Step will probably add up is added as its buckets arrive.

Expected is a Step like the last two: the mean of one push each of the same workers. The sum is made by the operations
of the combiner `mean`, in its order, so that the bits are the same; where the rule decides otherwise it is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ps_elastic.policies.events import PushId, Step
from ps_elastic.vectors.layout import Bucket


class Foresight:
    """sum: (d,), nothing between a Step and the first bucket that arrives after it."""

    def __init__(self, buckets: Sequence[Bucket], sum: Tensor) -> None:
        self._parts = [sum[bucket.start : bucket.stop] for bucket in buckets]
        self._sum = sum
        self._last: tuple[int, ...] = ()  # workers of the last Step, in its order, if it was such a mean
        self._expected: tuple[int, ...] = ()
        self._steps: dict[int, int] = {}  # worker -> step of the push expected
        self._here: list[dict[int, Tensor]] = [{} for _ in buckets]  # of each bucket: worker -> what it sent
        self._added = [0] * len(buckets)  # of each bucket: how many of the expected are in the sum

    def arrived(self, push: PushId, i: int, vector: Tensor) -> None:
        """Bucket i of a push is here: `vector` (n,), which stays as it is until the Step."""
        expected, here = self._expected, self._here[i]
        if push.worker not in expected:
            return
        if self._steps.setdefault(push.worker, push.step) != push.step or push.worker in here:
            self.forget()  # a worker is ahead of the others, or began anew: this is no round
            return
        here[push.worker] = vector
        part, added = self._parts[i], self._added[i]
        if added == 0 and expected[0] in here and expected[1] in here:
            torch.add(here[expected[0]], here[expected[1]], out=part)
            added = 2
        while 2 <= added < len(expected) and expected[added] in here:
            part.add_(here[expected[added]])
            added += 1
        self._added[i] = added

    def take(self, step: Step) -> Tensor | None:
        """The sum of the step's terms (d,), the caller's to change, if that is what was made; a new round begins."""
        pushes = tuple([term.push for term in step.terms])
        plain = step.combine == "mean" and all(term.weight == 1 and term.stands_for is None for term in step.terms)
        made = (
            plain
            and len(pushes) > 1
            and pushes == tuple([PushId(worker, self._steps.get(worker, 0)) for worker in self._expected])
            and min(self._added) == len(pushes)
        )
        workers = tuple([push.worker for push in pushes]) if plain else ()
        again = workers == self._last and len(workers) > 1 and (made or not self._expected)
        self.forget()
        self._last, self._expected = workers, workers if again else ()
        return self._sum if made else None

    def forget(self) -> None:
        """What was expected will not be, or what it was made of does not last; two Steps alike make a new start."""
        self._last = self._expected = ()
        self._steps.clear()
        for here in self._here:
            here.clear()
        self._added = [0] * len(self._added)
