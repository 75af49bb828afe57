"""`buckets: auto`: how large a bucket should be, from what a warm-up measured.

Small buckets leave earlier, and each costs something. With r_i the time at which backward has finished bucket i, c(n)
the time in which the worker encodes and hands over a bucket of n floats (backward waits meanwhile), and a + b s that in
which s bytes reach the server, the buckets leave one after the other:

    late_i = late_{i-1} + c(n_i);   arrived_i = max(arrived_{i-1}, r_i + late_i) + a + b s_i

and the size is best for which the last arrives first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from ps_elastic.compressors.identity import Identity
from ps_elastic.config.schema import Config
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.build import Parts, make_worker, working_copies
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Bucket, Layout, Slot, cut
from ps_elastic.worker.push import PushEncoder, ToServer
from ps_elastic.worker.staging import GradientRegion, InPlace

SMALLEST = 1 << 16  # bytes; a bucket of less is mostly header
_GAIN = 0.02  # of the time that a push in one piece takes: less is not worth a smaller bucket
PUSHES = 4  # the first does not count
_FEW, _MANY = 1 << 10, 1 << 20  # floats of the buckets that are timed


class Line(NamedTuple):
    """A time that grows with a size: fixed + each * size, in seconds."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        return self.fixed + self.each * size

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Through two measured points (size, seconds)."""
        (n, t), (m, u) = small, large
        each = max(0.0, u - t) / (m - n)
        return cls(max(0.0, t - each * n), each)


class Pace(NamedTuple):
    """What a warm-up measured, in seconds.

    ready: of each tensor, from the start of a push until its gradient was final. leaving: of a bucket, by the
    number of floats. arriving: by the number of bytes, of a push of every worker at once. nbytes: that a float becomes.
    """

    ready: tuple[float, ...]
    leaving: Line
    arriving: Line
    nbytes: float


class Choice(NamedTuple):
    """What `buckets` is to be. late_s, whole_s: from the end of backward until a push is whole at the server, then and
    in one piece."""

    buckets: str | int
    pieces: int
    late_s: float
    whole_s: float

    @property
    def text(self) -> str:
        size = "whole" if self.buckets == "whole" else f"{self.buckets} bytes, {self.pieces} buckets"
        return (
            f"buckets: auto is {size}; a push should be whole at the server {1e3 * self.late_s:.2f} ms after backward, "
            f"in one piece {1e3 * self.whole_s:.2f} ms"
        )


def choose(layout: Layout, pace: Pace) -> Choice:
    """The size of buckets with which a push is whole at the server first; of about equals the largest."""
    whole_s = late_s(layout.slots, (Bucket(0, layout.size),), pace)
    best = Choice("whole", 1, whole_s, whole_s)
    size = 1 << (4 * layout.size - 1).bit_length()
    while (size := size >> 1) >= SMALLEST:
        buckets = tuple(cut(layout.slots, layout.size, size))
        late = late_s(layout.slots, buckets, pace)
        if late < best.late_s - _GAIN * (whole_s + max(pace.ready)):
            best = Choice(size, len(buckets), late, whole_s)
    return best


def late_s(slots: Sequence[Slot], buckets: Sequence[Bucket], pace: Pace) -> float:
    """How long after the end of backward the last bucket is at the server; bucket 0 leaves last."""
    end = max(pace.ready)
    ready, i = [0.0] * len(buckets), 0
    for slot, at_s in zip(slots, pace.ready, strict=True):
        while slot.offset >= buckets[i].stop:
            i += 1
        ready[i] = max(ready[i], at_s)
    order = sorted(range(1, len(buckets)), key=lambda i: (ready[i], -i))
    late = arrived = 0.0
    for i in (*order, 0):
        numel = buckets[i].numel
        late += pace.leaving.at(numel)
        arrived = max(arrived, (ready[i] if i else end) + late) + pace.arriving.at(pace.nbytes * numel)
    return arrived - end


def time_gradients(config: Config, parts: Parts, rank: int, workers: int, local: int) -> tuple[float, ...]:
    """When each tensor's gradient was final, in seconds from the start of a push: medians of a few pushes.

    They are real ones, on a copy of the model and on batches of their own, that go nowhere.
    """
    tracker = dataclasses.replace(config.tracker, discrepancy="off")
    plain = parts.copied(config.seed)._replace(layout=Layout(parts.model, "layer"), compressor=Identity())
    config = dataclasses.replace(config, tracker=tracker)
    worker = make_worker(config, plain, rank, workers, Tracker(rank, lambda line: None), local=local)
    count, x = len(plain.layout.slots), worker.x.cpu().clone().numpy()
    times: list[list[float]] = []
    for _ in range(PUSHES):
        ready = [0.0] * count
        worker.load(Reply(rank, worker.step, 0, x))
        started = time.perf_counter()

        def leave(message: PushMessage, ready: list[float] = ready, started: float = started) -> None:
            ready[message.bucket] = time.perf_counter() - started

        worker.push(leave)
        times.append(ready)
    return tuple(median(of_tensor) for of_tensor in zip(*times[1:], strict=True))


def time_leaving(config: Config, parts: Parts, rank: int, *, copies: bool) -> tuple[Line, float]:
    """How long a bucket of so many floats is encoded, and copied if so; and the bytes that a float becomes."""
    points, nbytes = [], 0
    for numel in (_FEW, _MANY):
        (coder,) = working_copies(config, parts.compressor, (Bucket(0, numel),), rank)
        g = torch.randn(numel, generator=torch.Generator().manual_seed(0))
        frame, times = np.zeros(parts.compressor.max_nbytes(numel) + 64, np.uint8), []
        buckets, staging = (Bucket(0, numel),), InPlace(g, [[GradientRegion(g)]])
        outlet = ToServer(g, buckets, (), 0)
        encoder = PushEncoder(rank, buckets, (coder,), staging, time.perf_counter, outlet, lends=False)

        def send(message: PushMessage, frame: np.ndarray = frame) -> None:
            nonlocal nbytes
            nbytes = 0
            for array in message.arrays:
                if copies:
                    frame[nbytes : nbytes + array.nbytes].view(array.dtype)[:] = array
                nbytes += array.nbytes

        for _ in range(PUSHES):
            started = time.perf_counter()
            encoder.begin(1, 0, 0, send)
            encoder.close(1, 0.0, encoder.norm(), 0.0, None)
            times.append(time.perf_counter() - started)
        points.append((float(numel), median(times[1:])))
    return Line.through(*points), nbytes / _MANY
