"""The terms of a Step as one vector: whole, or block by block as the optimizer goes over the model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.policies.events import PushId, Step
from ps_elastic.server.combiners import Combiner, Part, make_combiner
from ps_elastic.server.optimizer import Quotient
from ps_elastic.vectors.layout import Bucket, Layout

PartsOf = Callable[[int, Bucket], list[Part]]  # the terms of a Step in one bucket


class _Piece(NamedTuple):
    """What one block and one bucket have in common: the bucket's k-th piece, and its place in the block."""

    bucket: int
    k: int
    place: slice


class StepCombiner:
    """Combines payloads. stops: where the blocks end that the vector is wanted in."""

    def __init__(self, layout: Layout, compressors: Sequence[Compressor], stops: Sequence[int]) -> None:
        self._buckets, self._compressors = layout.buckets, compressors
        self._combiners: dict[str, list[Combiner]] = {}  # one for each bucket, since they may keep state
        self._pieces, self._stops = _pieces(layout.buckets, stops)
        self._lengths = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
        self._can_cut = all(c.cuts or len(ends) == 1 for c, ends in zip(compressors, self._stops, strict=True))
        self._room = torch.empty(max(self._lengths))

    def whole(self, name: str, parts_of: PartsOf, out: Tensor) -> None:
        """Fill out (d,) with what the combiner called `name` makes of the parts."""
        for i, (combiner, bucket) in enumerate(zip(self._named(name), self._buckets, strict=True)):
            combiner.combine(self._compressors[i], parts_of(i, bucket), out[bucket.start : bucket.stop])

    def in_blocks(self, name: str, parts_of: PartsOf) -> Iterator[Quotient] | None:
        """The same in blocks, each combined when it is asked for; None where it cannot be cut.

        A block is good until the next one is asked for, and the bits are those of the whole.
        """
        combiners = self._named(name)
        parts = [parts_of(i, bucket) for i, bucket in enumerate(self._buckets)]
        if len(parts) == 1 and len(parts[0]) == 1:
            vector = combiners[0].alone(self._compressors[0], parts[0][0], self._buckets[0].numel)
            if vector is not None:
                blocks = [vector] if len(self._lengths) == 1 else vector.split_with_sizes(self._lengths)
                return zip(blocks, repeat(1.0))  # as many as there are blocks
        if not (combiners[0].elementwise and self._can_cut):
            return None
        if len(parts) == 1 and len(self._lengths) == 1:
            return iter((combiners[0].quotient(self._compressors[0], parts[0], self._room),))
        return self._blocks(combiners, parts)

    def _blocks(self, combiners: Sequence[Combiner], parts: Sequence[list[Part]]) -> Iterator[Quotient]:
        cut = [
            list(zip(*(part.cut(compressor, stops) for part in of_bucket), strict=True))
            if len(stops) > 1
            else [tuple(of_bucket)]
            for of_bucket, compressor, stops in zip(parts, self._compressors, self._stops, strict=True)
        ]
        for pieces, numel in zip(self._pieces, self._lengths, strict=True):
            room = self._room if numel == self._room.numel() else self._room[:numel]
            if len(pieces) == 1:
                i, k, _ = pieces[0]
                yield combiners[i].quotient(self._compressors[i], cut[i][k], room)
            else:
                for i, k, place in pieces:
                    combiners[i].combine(self._compressors[i], cut[i][k], room[place])
                yield room, 1.0

    def _named(self, name: str) -> list[Combiner]:
        if name not in self._combiners:
            self._combiners[name] = [make_combiner(name) for _ in self._buckets]
        return self._combiners[name]


def _pieces(buckets: Sequence[Bucket], stops: Sequence[int]) -> tuple[list[list[_Piece]], list[list[int]]]:
    """The pieces of each block, and where those of each bucket end, counted from its start."""
    pieces: list[list[_Piece]] = [[] for _ in stops]
    ends: list[list[int]] = []
    for i, bucket in enumerate(buckets):
        ends.append([])
        start, block = bucket.start, bisect_left(stops, bucket.start + 1)
        while start < bucket.stop:
            stop = min(stops[block], bucket.stop)
            first = stops[block - 1] if block else 0
            pieces[block].append(_Piece(i, len(ends[i]), slice(start - first, stop - first)))
            ends[i].append(stop - bucket.start)
            start, block = stop, block + 1
    return pieces, ends


class EagerSum:
    """sum: (d,), nothing between a Step and the first bucket that arrives after it.

    Expected is a Step like the last two: the mean of one push each of the same workers. What it will add up is added as
    its buckets arrive, before the policy decides, by the operations of the combiner `mean`, in its order, so that the
    bits are the same; if the policy decides otherwise it is thrown away.
    """

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
