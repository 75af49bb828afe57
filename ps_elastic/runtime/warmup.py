"""A short warm-up of one worker: when its gradients are final, and how long a bucket takes to leave."""

from __future__ import annotations

import copy
import dataclasses
import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from ps_elastic.compressors.identity import Identity
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.auto_buckets import Line
from ps_elastic.runtime.build import make_worker, working_copies
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.worker.places import Place
from ps_elastic.worker.push import Courier, Parcel
from ps_elastic.worker.staging import InPlace

if TYPE_CHECKING:
    from ps_elastic.config.load import Config
    from ps_elastic.runtime.build import Parts

PUSHES = 4  # the first does not count
_FEW, _MANY = 1 << 10, 1 << 20  # floats of the buckets that are timed


def time_gradients(config: Config, parts: Parts, rank: int, workers: int, local: int) -> tuple[float, ...]:
    """When each tensor's gradient was final, in seconds from the start of a push: medians of a few pushes.

    They are real ones, on a copy of the model and on batches of their own, that go nowhere.
    """
    tracker = dataclasses.replace(config.tracker, discrepancy="off")
    plain = parts._replace(model=copy.deepcopy(parts.model), layout=Layout(parts.model, "layer"), compressor=Identity())
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
        courier = Courier(rank, (Bucket(0, numel),), (coder,), InPlace(g, [[Place(g)]]), time.perf_counter, lends=False)

        def send(message: PushMessage, frame: np.ndarray = frame) -> None:
            nonlocal nbytes
            nbytes = 0
            for array in message.arrays:
                if copies:
                    frame[nbytes : nbytes + array.nbytes].view(array.dtype)[:] = array
                nbytes += array.nbytes

        for _ in range(PUSHES):
            started = time.perf_counter()
            parcel = Parcel(courier, 1, 0, send)
            parcel.close(1, 0.0, parcel.norm(), 0.0, None)
            times.append(time.perf_counter() - started)
        points.append((float(numel), median(times[1:])))
    return Line.through(*points), nbytes / _MANY
