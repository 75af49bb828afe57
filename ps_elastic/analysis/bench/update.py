from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ps_elastic.analysis.bench.base import Benchmark, Repeats, Row, benchmarks, row
from ps_elastic.compressors.identity import Identity
from ps_elastic.config.sections import Optimizer
from ps_elastic.plugins import Range, Threads
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.store import ParameterStore
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout

_SETTINGS: dict[str, dict[str, Any]] = {
    "sgd with momentum": {"name": "sgd", "lr": 1e-4, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 1e-4},
}
_STREAMS = {"sgd with momentum": 5, "adam": 7}  # of 4 bytes an entry: gradient read, model and state read and written
_COPY_STREAMS = 3  # read, allocated by the write, written


@benchmarks.register("update")
@dataclass
class Update(Benchmark):
    """Milliseconds of the server's update, and its share of the bandwidth of a copy, by the bytes that it must move.

    "measured" is what the server does, with the exact norm of the move; torch.optim then measures the same, by a copy
    of the model, a difference and a norm. "unmeasured" leaves it out on both sides. torch.optim is its fused form on
    one flat vector; a mean is made by add and div_ in place. On one thread the time is that of the processor.
    """

    parameters: Annotated[int, Range("a number of parameters >= 64")] = 10_000_000
    repeats: Repeats = 9
    threads: Threads = 1

    def rows(self) -> Iterator[Row]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for name in _SETTINGS:
                yield from self._rows_of(name)
        finally:
            torch.set_num_threads(threads)

    def _rows_of(self, name: str) -> Iterator[Row]:
        source, target = torch.randn(self.parameters), torch.empty(self.parameters)
        cases: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
        for pushes in (1, 2):
            for measured in (False, True):
                key = f"{pushes} {measured}"
                cases[f"ours {key}"] = _ours(name, self.parameters, pushes, measured)
                cases[f"torch {key}"] = _torch(name, self.parameters, pushes, measured)
        took = _medians_s(cases, self.repeats, process_time if self.threads == 1 else perf_counter)
        copy = _gigabytes(_COPY_STREAMS, self.parameters) / took["copy"]
        for pushes, what, least in ((1, "one push", 0.9), (2, "mean of 2", 0.6)):
            for measured in (False, True):
                case = f"{name}, {what}, {'measured' if measured else 'unmeasured'}"
                ours, theirs = (took[f"{who} {pushes} {measured}"] for who in ("ours", "torch"))
                yield row(case, 1e3 * ours, "ms", 1e3 * theirs, "torch.optim, fused", "ratio <= 1")
                speed = _gigabytes(_STREAMS[name] + pushes - 1, self.parameters) / ours
                yield row(case, speed, "GB/s", copy, "a copy", f"ratio >= {least}")


def _gigabytes(streams: int, parameters: int) -> float:
    return 4e-9 * streams * parameters


def _medians_s(cases: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each case, all of them in turn so that they meet the same machine; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(1 + repeats):
        for name, case in cases.items():
            started = clock()
            case()
            times[name].append(clock() - started)
    return {name: median(taken[1:]) for name, taken in times.items()}


def _ours(name: str, parameters: int, pushes: int, measured: bool) -> Callable[[], object]:
    """A step of the server's store from pushes taken to payloads freed."""
    store = make_calculator(parameters, _SETTINGS[name], measured)
    gradients = [_gradient(store.x, worker).numpy() for worker in range(1, pushes + 1)]
    step = Step(tuple(Term(PushId(worker, 1)) for worker in range(1, pushes + 1)))

    def update() -> None:
        for worker, gradient in enumerate(gradients, 1):
            store.take(PushId(worker, 1), [PushMessage(worker, 1, 0, (gradient,))])
        store.combine(step)
        store.apply(step, 1e-4)
        for term in step.terms:
            store.free([term.push])

    return update


def make_calculator(parameters: int, settings: dict[str, Any], measured: bool = True) -> ParameterStore:
    """A server's store for a model of one random tensor; unmeasured: it does not tell how far the model moved."""
    model = nn.ParameterList([torch.randn(parameters, generator=torch.Generator().manual_seed(0))])
    return store_of(model, settings, measures=measured)


def store_of(
    model: nn.Module, settings: dict[str, Any], buckets: str | int = "whole", *, measures: bool = True, **how: Any
) -> ParameterStore:
    """A server's store for `model`, with the optimizer of these settings. how: see `ParameterStore`."""
    layout = Layout(model, buckets)
    x = layout.empty()
    layout.attach(model, x)
    optimizer = FlatOptimizer(Optimizer(**settings), layout, x, measures=measures)
    return ParameterStore(layout, x, optimizer, [Identity() for _ in layout.buckets], **how)


def _torch(name: str, parameters: int, pushes: int, measured: bool) -> Callable[[], object]:
    """The same by torch.optim."""
    x = torch.nn.Parameter(torch.randn(parameters, generator=torch.Generator().manual_seed(0)))
    gradients = [_gradient(x, worker) for worker in range(1, pushes + 1)]
    total, old = torch.empty(parameters), torch.empty(parameters)
    settings = dict(_SETTINGS[name])
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[settings.pop("name")]
    optimizer = kind([x], fused=True, **settings)

    @torch.no_grad()
    def update() -> None:
        if pushes == 1:
            x.grad = gradients[0]
        else:
            x.grad = torch.add(gradients[0], gradients[1], out=total).div_(pushes)
        if measured:
            old.copy_(x)
        optimizer.step()
        if measured:
            float(torch.linalg.vector_norm(old.sub_(x)))

    return update


def _gradient(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.numel(), generator=torch.Generator().manual_seed(seed))
