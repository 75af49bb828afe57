from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Images, Point, Slope
from torch import Tensor, nn

from ps_elastic.server.evaluator import Evaluator
from ps_elastic.vectors.layout import Layout, load_statistics, statistics_of


@dataclass
class Watched(Slope):
    """Notes every model it evaluates; waits for `gate` first, where there is one."""

    seen: list[tuple[float, bool, bool]] = field(default_factory=list)
    gate: threading.Semaphore | None = None

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.gate is not None:
            assert self.gate.acquire(timeout=20)
        x = model.get_parameter("x")
        self.seen.append((float(x[0]), model.training, torch.is_grad_enabled()))
        return {"loss": float(x[0])}


class Bench:
    def __init__(self, every: int | None, *, background: bool = False) -> None:
        self.task = Watched(gate=threading.Semaphore(0) if background else None)
        model = Point(torch.zeros(2))
        self.layout = Layout(model)
        self.evaluator = Evaluator(self.task, model, self.layout, every, background=background)

    def submit(self, samples: int, **options: Any) -> None:
        """The model then holds `samples` in its first entry."""
        x = self.layout.empty()
        x[0] = samples
        self.evaluator.submit(x, samples, samples // 10, float(samples), **options)
        x[0] = -1  # the server goes on

    def finished(self) -> list[int]:
        return [result.samples for result in self.evaluator.finished()]


@pytest.fixture
def background() -> Iterator[Bench]:
    bench = Bench(10, background=True)
    yield bench
    assert bench.task.gate is not None
    for _ in range(10):
        bench.task.gate.release()
    bench.evaluator.close()


def test_a_model_is_evaluated_whenever_so_many_more_samples_were_used() -> None:
    bench = Bench(10)
    for samples in (4, 9, 12, 19, 20, 45, 49, 50):
        bench.submit(samples)
    assert bench.finished() == [12, 20, 45, 50]
    assert bench.finished() == []


def test_without_an_interval_only_the_end_is_evaluated() -> None:
    bench = Bench(None)
    bench.submit(1000)
    assert bench.finished() == []
    bench.submit(1000, final=True)
    assert bench.finished() == [1000]


def test_a_result_tells_samples_version_and_the_time_it_was_asked_for() -> None:
    bench = Bench(10)
    bench.submit(30)
    assert list(bench.evaluator.finished()) == [(30, 3, 30.0, {"loss": 30.0})]


def test_the_model_is_a_copy_in_eval_mode_without_gradients() -> None:
    bench = Bench(10)
    bench.submit(30)
    assert bench.task.seen == [(30.0, False, False)]


def test_in_the_background_the_newest_due_replaces_any_that_waits(background: Bench) -> None:
    for samples in (10, 20, 30, 40):
        background.submit(samples)
    assert background.finished() == []  # nobody waited for the first
    assert background.task.gate is not None
    background.task.gate.release()
    background.task.gate.release()
    background.evaluator.wait()
    assert background.finished() == [10, 40]
    assert [seen for seen, *_ in background.task.seen] == [10.0, 40.0]  # and not -1: x was copied


def test_copies_are_written_again_and_the_final_model_is_not_copied() -> None:
    bench, places = Bench(10), []

    def note(model: nn.Module) -> dict[str, float]:
        places.append(model.get_parameter("x").data_ptr())
        return {}

    bench.task.evaluate = note  # type: ignore[method-assign]
    x = bench.layout.empty()
    for samples in (10, 20, 30):
        bench.evaluator.submit(x, samples, 0, 0.0)
    bench.evaluator.submit(x, 30, 0, 0.0, final=True)
    first, *_, last = places
    assert places == [first, first, first, last] and last == x.data_ptr() != first


def test_what_the_task_raises_is_raised_to_the_server(background: Bench) -> None:
    def fail(model: nn.Module) -> dict[str, float]:
        raise ZeroDivisionError("in the task")

    background.task.evaluate = fail  # type: ignore[method-assign]
    background.submit(10)
    with pytest.raises(ZeroDivisionError, match="in the task"):
        background.evaluator.wait()


def test_the_statistics_of_batchnorm_are_its_running_means_and_variances() -> None:
    model = Images().model(0)
    shapes = [tuple(buffer.shape) for buffer in statistics_of(model)]
    assert shapes == [(5,), (5,), (7,), (7,)]
    assert statistics_of(Point(torch.zeros(2))) == []


def test_running_statistics_are_averaged_over_the_workers() -> None:
    model = Images().model(0)
    first, second = np.arange(24, dtype=np.float32), np.full(24, 2.0, np.float32)
    load_statistics(model, {2: second, 1: first})
    loaded = torch.cat([buffer.flatten() for buffer in statistics_of(model)])
    assert loaded.tolist() == [(a + 2) / 2 for a in range(24)]


def test_without_statistics_the_model_keeps_its_own() -> None:
    model = Images().model(0)
    load_statistics(model, {})
    assert all(set(buffer.tolist()) <= {0.0, 1.0} for buffer in statistics_of(model))


def test_an_evaluation_uses_the_statistics_of_the_time_it_was_asked_for() -> None:
    @dataclass
    class Reader(Images):
        gate: threading.Event = field(default_factory=threading.Event)

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            assert self.gate.wait(timeout=20)
            return {"loss": float(model.get_buffer("1.running_mean")[0])}

    task = Reader()
    model = task.model(0)
    layout = Layout(model)
    evaluator = Evaluator(task, model, layout, 1)
    blocked = layout.empty()
    evaluator.submit(blocked, 1, 1, 0.0)
    evaluator.statistics[1] = np.full(24, 3.0, np.float32)
    evaluator.submit(blocked, 2, 2, 0.0)  # waits behind the first
    evaluator.statistics[1] = np.full(24, 9.0, np.float32)
    task.gate.set()
    evaluator.wait()
    assert [result.metrics["loss"] for result in evaluator.finished()] == [0.0, 3.0]
    evaluator.close()


def test_the_batch_moves_no_statistics_of_the_server(tmp_path: Any) -> None:
    task = Images()
    model = task.model(0)
    layout = Layout(model)
    x: Tensor = layout.empty()
    layout.attach(model, x)
    evaluator = Evaluator(task, model, layout, 1, background=False)
    before = x.clone()
    evaluator.submit(x, 1, 1, 0.0)
    assert torch.equal(x, before)
    assert set(evaluator.finished()[0].metrics) == {"loss", "accuracy"}
