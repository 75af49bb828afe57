from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import fit

from ps_elastic.vectors.layout import Bucket
from ps_elastic.worker.staging import FromGpu, GradientRegion, InPlace

BUCKETS = (Bucket(0, 64), Bucket(64, 192))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def test_what_is_on_the_cpu_is_there_and_has_its_norm() -> None:
    g = torch.randn(192, generator=torch.Generator().manual_seed(0))
    staging = InPlace(g, [[GradientRegion(g[:64])], [GradientRegion(g[64:128]), GradientRegion(g[128:])]])
    staging.begin(1)
    assert staging.g is g
    for i, bucket in enumerate(BUCKETS):
        assert sum(staging.fetch(i)) == pytest.approx(float(g[bucket.start : bucket.stop].norm()) ** 2)


@needs_gpu
def test_a_bucket_comes_from_the_gpu_as_it_was_when_it_was_begun() -> None:
    made = torch.randn(192, device="cuda")
    staging = FromGpu(made, BUCKETS)
    expected = made.cpu()
    staging.begin(1)
    assert staging.fetch(1) == pytest.approx([float(expected[64:].norm()) ** 2], rel=2e-6)
    assert torch.equal(staging.g[64:], expected[64:]) and not staging.g[:64].any()
    assert staging.fetch(0) == pytest.approx([float(expected[:64].norm()) ** 2], rel=2e-6)  # begun only now
    assert torch.equal(staging.g, expected) and staging.g.is_pinned()
    made.mul_(2)
    staging.fetch(1)
    assert torch.equal(staging.g[64:], 2 * expected[64:])


@needs_gpu
def test_on_a_gpu_the_numbers_are_the_same_whether_or_not_buckets_leave_early(tmp_path: Path) -> None:
    options = ("device=cuda", "optimizer.momentum=0.9")
    whole = fit(tmp_path, "helpers:Blobs", *options, samples=120)
    early = fit(tmp_path, "helpers:Blobs", *options, "buckets=layer", samples=120)
    late = fit(tmp_path, "helpers:Blobs", *options, "buckets=layer", "train.on_nonfinite=drop", samples=120)
    assert early.column("norm") == pytest.approx(late.column("norm"), rel=1e-5)
    assert early.summary["metrics"] == pytest.approx(whole.summary["metrics"], rel=1e-4)
    assert late.summary["metrics"] == pytest.approx(whole.summary["metrics"], rel=1e-4)
