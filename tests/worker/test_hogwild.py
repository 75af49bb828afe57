"""Workers that write: what is added, what is taken back, what is measured on the way, and what is left for a server."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.config.load import load
from ps_elastic.policies.events import PushId, ReplyId, Step
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.build import make_parts, make_worker
from ps_elastic.server.written import WrittenStore
from ps_elastic.transport.messages import PushMessage, Reply, Settled
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.model_writer import ModelWriter, SharedModel, runs_of
from ps_elastic.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("kernels")
RATE = 0.25


class Noted(contextlib.AbstractContextManager[None]):
    """A lock that knows whether it is held, and how often it was."""

    held, times = False, 0

    def __enter__(self) -> None:
        self.held, self.times = True, self.times + 1

    def __exit__(self, *_: object) -> None:
        self.held = False


class Pen:
    """A writer beside what it works on: a model, a view that has fallen behind it, and places for two distances."""

    def __init__(self, layout: Layout, *, measures: bool = True) -> None:
        self.x, self.lock, self.distances = layout.empty().normal_(), Noted(), np.zeros(2)
        for name, view in layout.views(layout.empty().normal_()).items():  # the padding stays 0
            layout.views(self.x)[name].copy_(view)
        self.view = self.x.clone()
        for view in layout.views(self.view).values():
            view.add_(torch.randn_like(view), alpha=0.01)
        self.writer = ModelWriter(SharedModel(self.x, self.lock, self.distances), self.view, layout, measures=measures)

    @property
    def away(self) -> float:
        return float(np.linalg.norm((self.x - self.view).double()))


SMALL = Layout(nn.Sequential(nn.Linear(40, 7), nn.Linear(7, 7)), "layer")
LARGE = Layout(nn.Sequential(nn.Linear(400, 200), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(300, 200)))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.1)])
@pytest.mark.parametrize("layout", [SMALL, LARGE])
def test_a_writer_subtracts_what_the_server_would_have_and_measures_the_model_before(
    layout: Layout, compressor: Compressor, reads: bool
) -> None:
    pen = Pen(layout)
    expected, view, away, square = pen.x.clone(), pen.view.clone(), pen.away, 0.0
    for i, bucket in enumerate(layout.buckets):
        payload = compressor.encode(torch.randn(bucket.numel))
        square += pen.writer.write(i, compressor, payload, RATE, reads=reads)
        expected[bucket.start : bucket.stop] -= RATE * compressor.decode(payload, bucket.numel)
    torch.testing.assert_close(pen.x, expected)
    assert math.sqrt(square) == pytest.approx(away, rel=1e-5)
    assert torch.equal(pen.view, pen.x if reads else view)
    assert pen.lock.times >= len(layout.buckets) and not pen.lock.held
    pen.writer.leave(3, square)
    assert pen.distances.tolist() == [0.0, math.sqrt(square)]


def test_a_writer_that_does_not_measure_leaves_nan() -> None:
    pen = Pen(SMALL, measures=False)
    square = pen.writer.write(0, Identity(), (torch.ones(SMALL.buckets[0].numel),), RATE, reads=False)
    pen.writer.leave(0, square)
    assert math.isnan(pen.distances[0])


def test_a_layout_is_cut_into_large_tensors_and_runs_of_small_ones() -> None:
    runs = runs_of(LARGE)
    assert [name for run in runs for name in run.names] == [slot.name for slot in LARGE.slots]
    assert [len(run.names) for run in runs] == [1, 5, 1, 1]
    for run in runs:
        inside = [slot for slot in LARGE.slots if slot.name in run.names]
        assert (run.start, run.stop) == (inside[0].offset, inside[-1].offset + inside[-1].numel)


def parts_of(layout: Layout) -> tuple[Tensor, list[Tensor]]:
    g = layout.empty()
    for view in layout.views(g).values():
        view.normal_()
    return g, [g[run.start : run.stop].clone() for run in runs_of(layout)]


@pytest.mark.parametrize("reads", [False, True])
def test_a_gradient_in_parts_is_written_and_taken_back(reads: bool) -> None:
    pen = Pen(LARGE)
    start, view, away = pen.x.clone(), pen.view.clone(), pen.away
    g, parts = parts_of(LARGE)
    square, size = pen.writer.write_parts(parts, RATE, reads=reads)
    torch.testing.assert_close(pen.x, start - RATE * g)
    assert torch.equal(pen.view, pen.x if reads else view)
    assert (math.sqrt(square), size) == pytest.approx((away, float(np.linalg.norm(g.double()))), rel=1e-5)
    pen.writer.take_parts_back(parts, RATE)
    torch.testing.assert_close(pen.x, start)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, -1])  # in the first block, and in the last
def test_nothing_is_written_of_a_gradient_that_is_not_finite(bad: float, place: int) -> None:
    pen = Pen(LARGE)
    start = pen.x.clone()
    _, parts = parts_of(LARGE)
    parts[place][place] = bad
    assert not math.isfinite(pen.writer.write_parts(parts, RATE, reads=False)[1])
    torch.testing.assert_close(pen.x, start)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norms_beyond_the_squares_of_float32_are_right(size: float) -> None:
    pen = Pen(SMALL)
    g, parts = parts_of(SMALL)
    assert pen.writer.write_parts([part * size for part in parts], 0.0, reads=False)[1] == pytest.approx(
        size * float(np.linalg.norm(g.double())), rel=1e-5
    )


def test_a_server_whose_workers_write_changes_nothing_and_tells_what_they_measured() -> None:
    x = LARGE.empty().normal_()
    before, distances = x.clone(), {1: np.array([0.5, 0.25]), 2: np.array([0.125])}
    made = WrittenStore(LARGE, x, distances)
    for push, size in ((PushId(1, 3), 4.0), (PushId(2, 1), 2.0)):
        made.derive(push, ReplyId(push.worker, 0), RATE, ())
        made.take(push, [PushMessage(*push, 0, (), payload_norm=size)])
    assert made.give(PushId(1, 4), None, 1.0).ctypes.data == x.data_ptr()  # type: ignore[arg-type]
    made.combine(one := Step.mean([PushId(1, 3)], share=0.5))
    assert made.apply(one, RATE, [PushId(1, 3)]) == RATE * 4.0
    made.combine(both := Step.mean([PushId(1, 3), PushId(2, 1)], share=1.0))
    assert made.apply(both, RATE, [PushId(2, 1)]) == RATE * 3.0 == RATE * made.direction_norm()
    assert (made.distance_when_used(PushId(1, 3)), made.distance_when_used(PushId(2, 1))) == (0.25, 0.125)
    assert made.snapshots.version == 2 and torch.equal(x, before)


def working(compressor: Any = "identity", **settings: Any) -> tuple[Worker, Tensor, Layout]:
    config = load({"task": "helpers:Blobs", "compressor": compressor, **settings})
    parts = make_parts(config, 1)
    x = parts.layout.empty()
    for view in parts.layout.views(x).values():
        view.normal_()
    shared_model = SharedModel(x, contextlib.nullcontext(), np.zeros(config.update.pipeline + 1))
    worker = make_worker(config, parts, 1, 1, Tracker(1, lambda line: None), shared_model=shared_model)
    return worker, x, parts.layout


@pytest.mark.parametrize("settings", [{"buckets": "layer"}, {}, {"optimizer": {"clip_norm": 0.01}}])
@pytest.mark.parametrize("compressor", ["identity", "top_k:ratio=0.2", {"name": "top_k", "error_feedback": False}])
@pytest.mark.parametrize("outcome", ["used", "dropped"])
def test_a_push_is_in_the_model_before_it_leaves_and_taken_back_if_it_was_dropped(compressor, outcome, settings):
    worker, x, layout = working(compressor, **settings)
    start = x.clone()
    assert worker.load(Reply(1, 0, 0, x.numpy(), alpha=2 * RATE, rate=RATE))
    sent: list[PushMessage] = []

    def emit(message: PushMessage) -> None:
        bucket = layout.buckets[message.bucket]
        assert not torch.equal(x[bucket.start : bucket.stop], start[bucket.start : bucket.stop])
        sent.append(message)

    worker.push(emit)
    assert {message.bucket for message in sent} == set(range(len(layout.buckets)))
    assert all(message.arrays == () for message in sent)
    written = start - x
    assert float(written.norm()) == pytest.approx(RATE * sent[-1].payload_norm, rel=1e-4)
    if not (compressor == "identity" and "optimizer" in settings):
        assert (sent[-1].payload_norm < sent[-1].norm) == (compressor != "identity")
    assert not worker.load(Reply(1, 1, 1, None, outcome, alpha=2 * RATE))
    torch.testing.assert_close(x, start if outcome == "dropped" else start - written)


def test_alone_it_computes_what_a_plain_loop_does():
    worker, x, _ = working(train={"samples": 10})
    config = load({"task": "helpers:Blobs"})
    parts = make_parts(config, 1)
    plain = parts.layout.empty()
    parts.layout.attach(parts.model, plain)
    plain.copy_(x)
    sgd, batches = torch.optim.SGD(parts.model.parameters(), lr=RATE), parts.task.batches(1, 1, config.seed)
    for step in range(4):
        assert worker.load(Reply(1, step, step, x.numpy(), "used", alpha=RATE, rate=RATE))
        worker.push(lambda message: None)
        sgd.zero_grad()
        parts.task.loss(parts.model, next(batches)).backward()
        sgd.step()
    torch.testing.assert_close(x, plain)


def test_who_runs_ahead_reads_the_model_as_it_writes_and_says_which_reply_was_the_last_before():
    worker, x, _ = working(policy="asynchronous", update={"pipeline": 2})
    sent: list[PushMessage] = []
    worker.load(Reply(1, 0, 0, x.numpy(), alpha=RATE, rate=RATE))
    worker.push(sent.append)
    assert worker.may_go_on and torch.equal(worker.x, x)
    worker.load(Reply(1, 1, 7, x.numpy(), "used", alpha=RATE, rate=RATE))  # what it read is older than this
    x += 1.0  # another's write
    worker.push(sent.append)
    worker.push(sent.append)
    assert worker.may_go_on
    worker.push(sent.append)
    assert not worker.may_go_on  # so it reads again what it goes on with
    x += 1.0
    worker.load(Reply(1, 3, 9, x.numpy(), "used", alpha=RATE, rate=RATE, settled=(Settled(2, "used", 0.0),)))
    worker.push(sent.append)
    assert [(message.step, message.base, message.ahead) for message in sent] == [
        (1, 0, 0), (2, 0, 1), (3, 7, 1), (4, 7, 2), (5, 9, 1)
    ]  # fmt: skip


def test_every_push_that_was_dropped_is_taken_back():
    worker, x, _ = working(policy="asynchronous", update={"pipeline": 2})
    worker.load(Reply(1, 0, 0, x.numpy(), alpha=RATE, rate=RATE))
    worker.push(lambda message: None)
    kept = x.clone()
    worker.push(lambda message: None)
    worker.push(lambda message: None)
    assert not worker.load(Reply(1, 2, 1, None, "dropped", settled=(Settled(1, "used", 0.0),)))
    assert not worker.load(Reply(1, 3, 1, None, "dropped"))
    torch.testing.assert_close(x, kept)
