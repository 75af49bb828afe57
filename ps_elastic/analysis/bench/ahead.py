from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import process_time
from typing import Annotated

import torch
from torch import nn

from ps_elastic.analysis.bench.base import Benchmark, Repeats, Row, benchmarks, row
from ps_elastic.analysis.bench.update import store_of
from ps_elastic.plugins import Range
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.server.store import ParameterStore
from ps_elastic.transport.messages import PushMessage

_TENSOR = 1 << 18  # floats of each tensor of the model


@benchmarks.register("ahead")
@dataclass
class Ahead(Benchmark):
    """What adding a round up as its buckets arrive takes off the server's step, and what it costs in all.

    Milliseconds of the processor, on one thread, for a step of SGD with momentum; beside a step that adds in its own
    pass. "step": from the last bucket to the new model. "step and adding": all of it.
    """

    sizes: Annotated[tuple[int, ...], Range("numbers of parameters >= 1")] = (3_000_000, 10_000_000)
    workers: Annotated[tuple[int, ...], Range("numbers of workers >= 2")] = (2, 3)
    bucket_bytes: int = 1 << 22
    repeats: Repeats = 9

    def rows(self) -> Iterator[Row]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for size in self.sizes:
                for workers in self.workers:
                    yield from self._rows_of(size, workers)
        finally:
            torch.set_num_threads(threads)

    def _rows_of(self, size: int, workers: int) -> Iterator[Row]:
        rounds = {ahead: Rounds(size, workers, self.bucket_bytes, ahead) for ahead in (True, False)}
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(2 + self.repeats):  # what two steps did alike is expected of the third
            for ahead, made in rounds.items():
                times[ahead].append(made.round())
        (adding, step), (_, plain) = (
            [1e3 * median(column) for column in zip(*times[ahead][2:], strict=True)] for ahead in (True, False)
        )
        case, name = f"{size} parameters, {workers} workers", "adds in its pass"
        yield row(f"{case}, step", step, "ms", plain, name, "ratio <= 0.85")
        yield row(f"{case}, step and adding", adding + step, "ms", plain, name)


class Rounds:
    """A server's store that gets a push of every worker in buckets, and steps; `ahead`: it may begin to add."""

    def __init__(self, size: int, workers: int, bucket_bytes: int, ahead: bool) -> None:
        self._store, self._ahead, self._step = _store(size, bucket_bytes), ahead, 0
        vectors = [torch.randn(self._store.x.shape) for _ in range(workers)]
        self._arrays = [
            [vector[bucket.start : bucket.stop].numpy() for bucket in self._store.layout.buckets] for vector in vectors
        ]

    def round(self) -> tuple[float, float]:
        """Processor seconds until the last bucket is here, and from then on."""
        self._step += 1
        store, count = self._store, len(self._store.layout.buckets)
        parts = [
            [PushMessage(worker, self._step, 0, (array,), i, count) for i, array in enumerate(arrays)]
            for worker, arrays in enumerate(self._arrays, 1)
        ]
        started = process_time()
        for i in reversed(range(count)):
            for of_worker in parts if self._ahead else ():
                store.foresee(of_worker[i])
        here = process_time()
        terms = tuple([Term(PushId(worker, self._step)) for worker in range(1, len(parts) + 1)])
        for term, of_worker in zip(terms, parts, strict=True):
            store.take(term.push, of_worker)
        store.combine(Step(terms))
        store.apply(Step(terms), 1e-4)
        ended = process_time()
        for term in terms:
            store.free([term.push])
        return here - started, ended - here


def _store(size: int, bucket_bytes: int) -> ParameterStore:
    lengths = [min(_TENSOR, size - start) for start in range(0, size, _TENSOR)]
    model = nn.ParameterList([nn.Parameter(torch.randn(length)) for length in lengths])
    return store_of(model, {"name": "sgd", "lr": 1e-4, "momentum": 0.9}, bucket_bytes, keeps_versions=False)
