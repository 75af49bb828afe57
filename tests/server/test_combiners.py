from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Desk
from torch import Tensor, nn

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import ConfigError, PolicyError
from ps_elastic.policies.rules.delay_compensated import DelayCompensated as DelayCompensatedRule
from ps_elastic.server.combiners import Combiner, Part, combiners, make_combiner
from ps_elastic.server.combiners.delay_compensated import DelayCompensated

N = 40


def vectors(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, generator=generator) for _ in range(count)]


def part(vector: Tensor | None, weight: float = 1.0, drift: Tensor | None = None, by: Compressor | None = None) -> Part:
    """A term that carries `vector`, compressed by `by`; x - v is `drift`."""

    def x_minus_v() -> Tensor:
        if drift is None:
            raise PolicyError("no view")
        return drift.clone()

    return Part(None if vector is None else (by or Identity()).encode(vector), None, weight, x_minus_v)


def combined(combiner: Combiner, parts: list[Part], by: Compressor | None = None) -> Tensor:
    out = torch.full((N,), float("nan"))
    combiner.combine(by or Identity(), parts, out)
    return out


@pytest.mark.parametrize("by", [Identity(), TopK(ratio=0.25)], ids=str)
def test_sum_and_mean_weigh_what_decodes(by: Compressor) -> None:
    weights = [0.5, 2.0, -1.0]
    given = vectors(0, 3)
    decoded = [by.decode(by.encode(v.clone()), N).double() for v in given]
    total = sum(w * v for w, v in zip(weights, decoded, strict=True))
    parts = [part(v, w, by=by) for v, w in zip(given, weights, strict=True)]
    assert torch.allclose(combined(make_combiner("sum"), parts, by).double(), total, atol=1e-6)
    assert torch.allclose(combined(make_combiner("mean"), parts, by).double(), total / 1.5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, _ in combiners.items()])
def test_a_zero_vector_counts_by_its_weight_alone_and_payloads_stay_as_they_are(name: str) -> None:
    (g,) = vectors(1, 1)
    kept = g.clone()
    drift = torch.zeros(N)
    out = combined(make_combiner(name), [part(g, 1.0, drift), part(None, 3.0)])
    assert torch.allclose(out, g if name == "sum" else g / 4) and torch.equal(g, kept)


@pytest.mark.parametrize("name", [name for name, _ in combiners.items()])
def test_a_vector_made_by_the_server_counts_as_it_is(name: str) -> None:
    g, dense = vectors(2, 2)
    made = Part(None, dense, 1.0, part(None).drift)  # it was computed on no view
    out = combined(make_combiner(name), [part(g, 1.0, torch.zeros(N)), made])
    assert torch.allclose(out, (g + dense) / (1 if name == "sum" else 2))


@pytest.mark.parametrize("by", [Identity(), TopK(ratio=0.25)], ids=str)
def test_delay_compensation_adds_lambda_g_g_times_the_drift_to_each_push(by: Compressor) -> None:
    (g, h, dg, dh), scale = vectors(3, 4), 0.3
    out = combined(make_combiner(f"delay_compensated:scale={scale}"), [part(g, 1, dg, by), part(h, 3, dh, by)], by)
    g, h = (by.decode(by.encode(v), N).double() for v in (g, h))
    expected = (g + scale * g * g * dg + 3 * (h + scale * h * h * dh)) / 4
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_adaptive_delay_compensation_divides_by_the_running_root_mean_square() -> None:
    combiner, scale, decay = make_combiner("delay_compensated:scale=2.0:decay=0.9"), 2.0, 0.9
    mean_square = np.zeros(N)
    for seed in range(5):
        g, drift = vectors(seed, 2)
        out = combined(combiner, [part(g, 1.0, drift)])
        g, drift = g.double().numpy(), drift.double().numpy()
        mean_square = decay * mean_square + (1 - decay) * g * g
        assert np.allclose(out.numpy(), g + scale / np.sqrt(mean_square + 1e-7) * g * g * drift, rtol=1e-4, atol=1e-5)


class Valley(nn.Module):
    """Two tensors, so that buckets can differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.linspace(1, 2, 64)), nn.Parameter(torch.linspace(-3, -1, 64))


@pytest.mark.parametrize("buckets", ["whole", "layer"])
def test_a_compensated_gradient_is_that_of_the_model_as_it_is_now(buckets: str) -> None:
    """f = c x^2/2 in each coordinate with one g for all: lambda = c/g^2 makes c v + lambda (c v)^2 (x - v) = c x."""
    c, alpha = 0.7, 0.25
    model = Valley()
    with torch.no_grad():
        model.first.fill_(2.0), model.second.fill_(-2.0)
    rule = DelayCompensatedRule(scale=c / (c * 2.0) ** 2)
    desk = Desk(rule, 2, model=model, buckets=buckets, optimizer=Optimizer(lr=alpha))
    stale = torch.from_numpy(desk.views[2].model.copy())
    push(desk, 1, c * torch.from_numpy(desk.views[1].model))
    now = desk.x.clone()
    assert float((now - stale).norm()) > 1
    push(desk, 2, c * stale)
    assert torch.allclose(desk.x, now - alpha * c * now, rtol=1e-6)


def test_the_running_mean_square_is_kept_bucket_by_bucket() -> None:
    ends = []
    for buckets in ("whole", "layer"):
        desk = Desk(DelayCompensatedRule(adaptive=True), 2, model=Valley(), buckets=buckets)
        generator = torch.Generator().manual_seed(0)
        for turn in range(8):
            push(desk, turn % 2 + 1, torch.randn(128, generator=generator))
        ends.append(desk.x.clone())
    assert torch.equal(*ends)


def push(desk: Desk, worker: int, vector: Tensor) -> None:
    """The next push of `worker`, a message a bucket."""
    whole = desk.message(worker, vector)
    buckets = desk.layout.buckets
    for i, bucket in enumerate(buckets):
        array = vector[bucket.start : bucket.stop].clone().numpy()
        desk.send(whole._replace(arrays=(array,), bucket=i, buckets=len(buckets)))


@pytest.mark.parametrize("text", ["delay_compensated:scale=-1", "delay_compensated:decay=1", "median", "mean:trim=1"])
def test_an_unknown_combiner_or_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        make_combiner(text)


def test_a_combiner_that_a_step_names_starts_without_state() -> None:
    one, other = make_combiner("delay_compensated:decay=0.5"), make_combiner("delay_compensated:decay=0.5")
    combined(one, [part(*vectors(0, 1), 1.0, torch.zeros(N))])
    assert isinstance(other, DelayCompensated) and other.mean_square is None
