"""The terms of a Step as one vector: whole, or block by block as the optimizer goes over the model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.server.combiners import Combiner, Part, make_combiner
from ps_elastic.server.optimizer import Quotient
from ps_elastic.vectors.layout import Bucket, Layout

PartsOf = Callable[[int, Bucket], list[Part]]  # the terms of a Step in one bucket


class _Piece(NamedTuple):
    """What one block and one bucket have in common: the bucket's k-th piece, and its place in the block."""

    bucket: int
    k: int
    place: slice


class Terms:
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
                blocks = [vector] if len(self._lengths) == 1 else vector.split(self._lengths)
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
