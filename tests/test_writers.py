"""Workers that write: what is added, what is taken back, and what a server that only watches measures."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from ps_elastic.assemble import make_parts, make_worker
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.config import Optimizer, load
from ps_elastic.layout import Layout
from ps_elastic.messages import PushMessage, Reply
from ps_elastic.optimizer import BLOCK, Sweep
from ps_elastic.tracker import Tracker
from ps_elastic.writers import Witness, Writer

RATE = 0.25


class Noted(contextlib.AbstractContextManager[None]):
    """A lock that knows whether it is held, and how often it was."""

    held, times = False, 0

    def __enter__(self) -> None:
        self.held, self.times = True, self.times + 1

    def __exit__(self, *_: object) -> None:
        self.held = False


@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.1)])
def test_a_writer_subtracts_what_the_server_would_have(compressor):
    layout, lock = Layout(nn.Sequential(nn.Linear(40, 7), nn.Linear(7, 7)), "layer"), Noted()
    x = layout.empty().normal_()
    expected, writer = x.clone(), Writer(x, layout.buckets, lock)
    for i, bucket in enumerate(layout.buckets):
        payload = compressor.encode(torch.randn(bucket.numel))
        writer.write(i, compressor, payload, RATE)
        expected[bucket.start : bucket.stop] -= RATE * compressor.decode(payload, bucket.numel)
    torch.testing.assert_close(x, expected)
    assert lock.times == len(layout.buckets)


def test_a_witness_measures_a_step_that_is_in_the_model_already():
    layout = Layout(nn.Linear(400, 200))
    assert layout.size > BLOCK
    x, g = layout.empty().normal_(), layout.empty().normal_()
    views = [x + 0.01 * torch.randn_like(x) for _ in range(2)]
    before, sweep = x.clone(), Sweep(views)
    x -= RATE * g
    after = x.clone()
    witness, size = Witness(Optimizer(lr=1.0), layout, x), float(np.linalg.norm(g.double()))
    moved = witness.step(g, RATE, sweep)
    assert torch.equal(x, after)
    assert moved == pytest.approx(RATE * size, rel=1e-5)
    witness.known = size
    assert witness.step(g, RATE, again := Sweep(views)) == witness.step(g, RATE) == RATE * size
    assert again.distances == sweep.distances
    expected = [float(np.linalg.norm((before - view).double())) for view in views]
    assert sweep.distances == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("compressor", ["identity", "top_k:ratio=0.2", {"name": "top_k", "error_feedback": False}])
@pytest.mark.parametrize("outcome", ["used", "dropped"])
def test_a_push_is_in_the_model_before_it_leaves_and_taken_back_if_it_was_dropped(compressor, outcome):
    config = load({"task": "helpers:Blobs", "compressor": compressor, "buckets": "layer"})
    parts = make_parts(config, 1)
    x = parts.layout.empty().normal_()
    start = x.clone()
    writer = Writer(x, parts.layout.buckets, contextlib.nullcontext())
    worker = make_worker(config, parts, 1, 1, Tracker(1, lambda line: None), writer=writer)
    assert worker.load(Reply(1, 0, 0, x.numpy(), alpha=2 * RATE, rate=RATE))
    sent: list[PushMessage] = []

    def emit(message: PushMessage) -> None:
        bucket = parts.layout.buckets[message.bucket]
        assert not torch.equal(x[bucket.start : bucket.stop], start[bucket.start : bucket.stop])
        sent.append(message)

    worker.push(emit)
    assert {message.bucket for message in sent} == set(range(len(parts.layout.buckets)))
    written = start - x
    expected = torch.zeros_like(x)
    for message in sent:
        bucket = parts.layout.buckets[message.bucket]
        payload = tuple(torch.from_numpy(array) for array in message.arrays)
        parts.compressor.accumulate(payload, expected[bucket.start : bucket.stop], RATE)
    torch.testing.assert_close(written, expected, atol=1e-6, rtol=1e-4)
    assert not worker.load(Reply(1, 1, 1, None, outcome, alpha=2 * RATE))
    torch.testing.assert_close(x, start if outcome == "dropped" else start - expected)
