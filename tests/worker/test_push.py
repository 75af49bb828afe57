"""Buckets on their way out: when each leaves, and that nothing else depends on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, Images, Odd
from test_worker import Hand
from torch import Tensor, nn

from ps_elastic.compressors.top_k import TopK
from ps_elastic.errors import Stalled, TaskError
from ps_elastic.tasks import Task
from ps_elastic.transport.messages import PushMessage
from ps_elastic.worker.updates.sgd import Sgd
from ps_elastic.worker.updates.sisa import Sisa


class Mark(torch.autograd.Function):
    """The identity; its backward notes that it was reached, and multiplies the gradient by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any], what: str, factor: float) -> Tensor:
        ctx.seen, ctx.what, ctx.factor = seen, what, factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.seen.append(ctx.what)
        return gradients[0] * ctx.factor, None, None, None


class Marked(nn.Module):
    """Three layers; backward is marked between them. The gradient of what lies before layer `sick` is infinite."""

    def __init__(self, seen: list[Any], sick: int) -> None:
        super().__init__()
        self.seen, self.sick = seen, sick
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)] + [nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i:
                x = Mark.apply(x, self.seen, f"backward of layer {i - 1}", math.inf if i == self.sick else 1.0)
            x = torch.tanh(layer(x)) + 0.1
        return x


@dataclass
class Watched(Blobs):
    """seen: marks of backward, and what a test adds."""

    seen: list[Any] = field(default_factory=list)
    sick: int = 0  # 0: none

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Marked(self.seen, self.sick)


LAYER = 4 * (36 + 6 + 86)  # bytes of a layer of Marked, with its gaps: a bucket each


def leaving(task: Watched, **options: Any) -> tuple[Hand, list[Any]]:
    """A worker that computed a push: what was seen, its messages by their bucket."""
    hand = Hand(task, buckets=LAYER, **options)
    hand.worker.load(hand.reply())
    hand.worker.push(lambda message: task.seen.append(message.bucket))
    return hand, task.seen


def test_a_bucket_leaves_before_backward_goes_on_to_the_layer_before_it() -> None:
    hand, seen = leaving(Watched())
    assert len(hand.layout.buckets) == 3
    assert seen == [2, "backward of layer 1", 1, "backward of layer 0", 0]


@dataclass
class Doubled(Sgd):
    def run(self, gradient: Any, x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        loss = gradient()
        g.mul_(2)
        return loss


@pytest.mark.parametrize(
    "options",
    [{"overlap": False}, {"clip_norm": 1e-3}, {"on_nonfinite": "drop"}, {"update": Doubled()}, {"update": Sisa()}],
    ids=["switched off", "clipped", "may be dropped", "changed by an update", "another update"],
)
def test_nothing_leaves_before_backward_ends_where_the_gradient_may_still_change(options: dict[str, Any]) -> None:
    _, seen = leaving(Watched(), **options)
    assert seen == ["backward of layer 1", "backward of layer 0", 2, 1, 0]


def test_of_accumulated_batches_buckets_leave_in_the_last_alone() -> None:
    _, seen = leaving(Watched(), accumulate=3)
    assert seen[:4] == ["backward of layer 1", "backward of layer 0"] * 2
    assert sorted(map(str, seen[4:])) == ["0", "1", "2", "backward of layer 0", "backward of layer 1"]
    assert seen.index(2) < len(seen) - 1 - seen[::-1].index("backward of layer 0")


def steps(task: Task, **options: Any) -> Iterator[tuple[PushMessage, ...]]:
    """The messages of five pushes, the second of which was dropped, sorted by bucket, with copies of their arrays."""
    hand = Hand(task, **options)
    for step in range(5):
        x = hand.start * (1 + 0.1 * step)
        pushed = hand.go(x, step, outcome="dropped" if step == 2 else "used", alpha=0.1 * (step + 1))
        yield tuple(m._replace(arrays=tuple(a.copy() for a in m.arrays)) for m in pushed)


@pytest.mark.parametrize("task", [Blobs, Images, Odd], ids=lambda task: task.__name__)
@pytest.mark.parametrize("coding", [{}, {"compressor": TopK(ratio=0.2), "feedback": True}], ids=["all", "top_k"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cut", ["layer", 300])
def test_the_messages_are_the_same_whether_or_not_buckets_leave_early(
    task: type[Task], coding: dict[str, Any], accumulate: int, cut: str | int
) -> None:
    options = {**coding, "accumulate": accumulate, "buckets": cut}
    for early, late in zip(steps(task(), **options), steps(task(), overlap=False, **options), strict=True):
        for one, other in zip(early, late, strict=True):
            for a, b in zip(one.arrays, other.arrays, strict=True):
                assert a.tobytes() == b.tobytes()
            assert np.array_equal(one.statistics, other.statistics) or one.statistics is other.statistics is None
            numbers = slice(PushMessage._fields.index("bucket"), PushMessage._fields.index("waited_s"))
            assert str(one[numbers]) == str(other[numbers])  # loss is nan but in the first


def test_a_bucket_that_is_not_finite_stays_and_so_does_all_after_it() -> None:
    task = Watched(sick=2)
    hand = Hand(task, compressor=TopK(ratio=0.05), feedback=True, buckets=LAYER)
    hand.worker.load(hand.reply())
    with pytest.raises(TaskError, match=r"step 1: the gradient is not finite \(norm (nan|inf), loss [\d.]+\)"):
        hand.worker.push(lambda message: task.seen.append(message.bucket))
    assert [mark for mark in task.seen if isinstance(mark, int)] == [2]
    residuals = [coder.residual for coder in hand.coders]  # type: ignore[union-attr]
    assert [bool(residual.any()) for residual in residuals] == [False, False, True]


def test_where_a_gradient_may_be_dropped_nothing_of_it_leaves_or_is_kept() -> None:
    task = Watched(sick=2)
    hand = Hand(task, compressor=TopK(ratio=0.05), feedback=True, buckets=LAYER, on_nonfinite="drop")
    hand.worker.load(hand.reply())
    with pytest.raises(TaskError, match="10 gradients in a row were not finite"):
        hand.worker.push(lambda message: task.seen.append(message.bucket))
    assert not [mark for mark in task.seen if isinstance(mark, int)]
    assert not hand.residual.any()


def test_what_fails_in_sending_comes_out_of_backward_as_it_is() -> None:
    def refuse(message: PushMessage) -> None:
        raise Stalled("nobody takes it")

    hand = Hand(Watched(), buckets=LAYER)
    hand.worker.load(hand.reply())
    with pytest.raises(Stalled, match="nobody takes it"):
        hand.worker.push(refuse)


def test_the_time_of_encoding_and_sending_is_not_counted_as_computing() -> None:
    """On a clock that only encoding and sending move: a second a bucket each."""
    now = 0.0

    class Slow(TopK):
        def encode(self, vector: Tensor) -> tuple[Tensor, ...]:
            nonlocal now
            now += 1.0
            return super().encode(vector)

    def send(message: PushMessage) -> None:
        nonlocal now
        now += 1.0

    hand = Hand(Watched(), compressor=Slow(ratio=0.5), buckets=LAYER, clock=lambda: now)
    hand.worker.load(hand.reply())
    hand.worker.push(send)
    hand.worker.note(hand.reply(), now, 0.0, 0.0)
    assert [(note["compute_s"], note["encode_s"]) for note in hand.notes] == [(0.0, 3.0)]
