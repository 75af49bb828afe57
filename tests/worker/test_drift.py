"""What a worker sees of others: the distance of each reply's model from the old view less the own update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.vectors.layout import Bucket
from ps_elastic.worker.drift import DriftMeter, LateDriftMeter

pytestmark = pytest.mark.usefixtures("kernels")
SIZE = 70_016  # more than a block
LATE = pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
BUCKETS = {"one": [Bucket(0, SIZE)], "three": [Bucket(0, 64), Bucket(64, 65_664), Bucket(65_664, SIZE)]}


class Other:
    """A server that applies a push by given weights, and others who move the model: all in double precision."""

    def __init__(self, buckets: list[Bucket], compressor: Compressor, *, late: bool = False) -> None:
        self.random = torch.Generator().manual_seed(5)
        self.x, self.buckets, self.compressor, self.late = self.normal(), buckets, compressor, late
        self.view = torch.empty(SIZE)
        compressors = [compressor] * len(buckets)
        # The late one is told of no model: it looks at the memory where they arrive.
        self.drift_meter = (
            LateDriftMeter(self.x, buckets, compressors) if late else DriftMeter(self.view, buckets, compressors)
        )

    def normal(self, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(SIZE, generator=self.random)

    def trip(self, weights: list[float], view: Tensor | None = None, cut: tuple[int, ...] = ()) -> tuple[float, float]:
        """A push and its reply: what is seen, and what there is to see."""
        parts = [self.normal()[b.start : b.stop] for b in self.buckets]
        payloads = [() if i in cut else self.compressor.encode(part) for i, part in enumerate(parts)]
        old = (self.x if view is None else view).double()
        self.drift_meter.left(payloads, view)
        if view is not None:
            view.fill_(math.nan)  # it is the update's own, good until the next push
        self.x.copy_(self.x + self.normal(1e-2))
        own = torch.zeros(SIZE, dtype=torch.float64)
        for bucket, payload, weight in zip(self.buckets, payloads, weights, strict=True):
            if payload:
                own[bucket.start : bucket.stop] = weight * self.compressor.decode(payload, bucket.numel).double()
        self.drift_meter.came(self.x, tuple(weights))
        assert self.late or torch.equal(self.view, self.x)
        return self.drift_meter.moved, float((self.x.double() + own - old).norm())


@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.1)], ids=["identity", "top_k"])
@pytest.mark.parametrize("buckets", BUCKETS)
@LATE
def test_it_is_the_new_model_plus_the_own_update_less_the_old_view(
    late: bool, buckets: str, compressor: Compressor
) -> None:
    other = Other(BUCKETS[buckets], compressor, late=late)
    other.drift_meter.came(other.x, [0.25] * len(other.buckets))
    assert math.isnan(other.drift_meter.moved)
    steady, changed, dropped = 4 * [0.25], [0.125, 0.5], [0.0]
    for weight in (*steady, *changed, *dropped, *steady, *dropped, *dropped, *dropped, *steady):
        seen, there = other.trip([weight] * len(other.buckets))
        assert seen == pytest.approx(there, rel=1e-5)


@LATE
def test_each_bucket_counts_by_its_own_weight_and_one_that_was_not_sent_not_at_all(late: bool) -> None:
    other = Other(BUCKETS["three"], Identity(), late=late)
    other.drift_meter.came(other.x, [0.0] * 3)
    for weights in ([0.5, 0.0, 0.25], [0.5, 0.0, 0.25], [0.5, 0.0, 0.25], [0.0, 1.0, 0.25]):
        seen, there = other.trip(weights, cut=(2,))
        assert seen == pytest.approx(there, rel=1e-5)


@LATE
def test_a_gradient_taken_elsewhere_is_seen_from_there(late: bool) -> None:
    other = Other(BUCKETS["one"], Identity(), late=late)
    other.drift_meter.came(other.x, [0.0])
    for _ in range(4):
        seen, there = other.trip([0.0], view=other.normal())
        assert seen == pytest.approx(there, rel=1e-5)


@LATE
def test_whoever_is_alone_sees_nothing_of_others(late: bool) -> None:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    made = LateDriftMeter(x, BUCKETS["one"], [Identity()]) if late else None
    drift_meter = made or DriftMeter(torch.empty(SIZE), BUCKETS["one"], [Identity()])
    drift_meter.came(x, [0.0])
    for _ in range(5):
        payload = Identity().encode(torch.ones(SIZE))
        drift_meter.left([payload], None)
        x.sub_(payload[0], alpha=0.25)
        drift_meter.came(x, [0.25])
        assert drift_meter.moved == 0.0


@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.1)], ids=["identity", "top_k"])
def test_what_is_told_when_the_next_push_has_left_is_what_would_be_told_at_once(compressor: Compressor) -> None:
    asked, left = (Other(BUCKETS["three"], compressor, late=True) for _ in range(2))
    told = []
    for other in (asked, left):
        other.drift_meter.came(other.x, (0.25,) * 3)
        for k in range(6):
            other.random.manual_seed(k)
            payloads = [compressor.encode(other.normal()[b.start : b.stop]) for b in other.buckets]
            other.drift_meter.left(payloads, None)
            told.append(other.drift_meter.moved)
            other.x.copy_(other.x + other.normal(1e-2))
            other.drift_meter.came(other.x, (0.25,) * 3)
            if other is asked:
                assert other.drift_meter.moved > 0
    assert told[1:6] == pytest.approx(told[7:], rel=1e-6) and math.isnan(told[0]) and math.isnan(told[6])
