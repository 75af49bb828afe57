"""How a bucket of the gradient comes to the CPU, measured: it is there already, or it is copied from a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ps_elastic.vectors.layout import Bucket
from ps_elastic.worker.places import Place


class Staging(Protocol):
    """g: the gradient (d,) on the CPU, of which each bucket is right from when it was fetched."""

    g: Tensor

    def begin(self, i: int) -> None:
        """Bucket i is final, as seen from the stream that backward uses: what can be done without waiting is begun."""

    def fetch(self, i: int) -> list[float]:
        """Return when bucket i is in g: the sum of its squares, in parts."""


class InPlace:
    """Backward leaves the gradient in g itself. places: those that make up each bucket."""

    def __init__(self, g: Tensor, places: Sequence[Sequence[Place]]) -> None:
        self.g, self._places = g, places

    def begin(self, i: int) -> None:
        """There is nothing to be done."""

    def fetch(self, i: int) -> list[float]:
        return [place.square() for place in self._places[i]]


class FromGpu:
    """made (d,) is on a GPU: buckets are copied into pinned memory on a stream of their own, while backward goes on."""

    def __init__(self, made: Tensor, buckets: Sequence[Bucket]) -> None:
        self.g = torch.zeros(made.shape, pin_memory=True)
        self._made, self._buckets, self._stream = made, buckets, torch.cuda.Stream(made.device)
        self._norms = torch.zeros(len(buckets), pin_memory=True)
        self._events: dict[int, torch.cuda.Event] = {}

    def begin(self, i: int) -> None:
        bucket = self._buckets[i]
        part = slice(bucket.start, bucket.stop)
        self._stream.wait_stream(torch.cuda.current_stream(self._made.device))
        with torch.cuda.stream(self._stream):
            norm = torch.linalg.vector_norm(self._made[part])
            self._norms[i].copy_(norm, non_blocking=True)
            self.g[part].copy_(self._made[part], non_blocking=True)
            self._events[i] = self._stream.record_event()

    def fetch(self, i: int) -> list[float]:
        if i not in self._events:
            self.begin(i)
        self._events.pop(i).synchronize()
        return [float(self._norms[i]) ** 2]
