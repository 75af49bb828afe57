"""Where gradients stand: what is known of their squares is what one pass over them would find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.flat_module import FlatModule
from ps_elastic.worker.staging import GradientRegion, measured

pytestmark = pytest.mark.usefixtures("kernels")
SIZES = (1, 5000, 1 << 18, (1 << 18) + 70_001)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", SIZES)
def test_what_is_squared_on_its_way_has_the_bits_of_what_is_squared_there(size: int) -> None:
    gradient, found = normal(size), []
    for final in (True, False):
        place = GradientRegion(torch.empty(size))
        place.put(gradient, final=final)
        assert torch.equal(place.view, gradient)
        found.append(place.square())
    assert found[0] == found[1] == pytest.approx(float((gradient.double() ** 2).sum()), rel=2.4e-6)


def test_what_changes_afterwards_is_squared_again() -> None:
    gradient = normal(1 << 18)
    place = GradientRegion(torch.empty(512, 512))
    place.put(gradient.view(512, 512), final=True)
    once = place.square()
    place.add(gradient.view(512, 512))
    assert place.square() == pytest.approx(4 * once, rel=1e-6)
    place.clear()
    assert place.square() == 0.0 and not place.view.any()


def test_a_gradient_of_other_strides_comes_to_its_place() -> None:
    gradient = normal(512, 1024).t()
    place = GradientRegion(torch.empty(1024, 512))
    place.put(gradient, final=True)
    assert torch.equal(place.view, gradient)
    assert place.square() == pytest.approx(float((gradient.double() ** 2).sum()), rel=2.4e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_what_is_not_finite_or_nearly_so_is_seen(value: float) -> None:
    gradient = normal(1 << 18)
    gradient[70_000] = value
    place = GradientRegion(torch.empty(1 << 18))
    place.put(gradient, final=True)
    expected = float((gradient.double() ** 2).sum())
    assert place.square() == pytest.approx(expected, rel=2.4e-6, nan_ok=True)


@pytest.mark.parametrize("buckets", ["whole", "layer", 1 << 19])
def test_every_tensor_is_measured_once_large_ones_alone_and_small_ones_together(buckets: str | int) -> None:
    model = nn.ParameterList(torch.zeros(n) for n in (3, 100, 1 << 18, 7, 1 << 19, (1 << 18) - 1))
    layout = Layout(model, buckets)
    g = layout.empty()
    places = [GradientRegion(view) for view in layout.views(g).values()]
    found = [list(measured(layout, bucket, places, g)) for bucket in layout.buckets]
    count = torch.zeros(layout.size)
    for place in (place for inside in found for place in inside):
        start = (place.view.data_ptr() - g.data_ptr()) // 4
        count[start : start + place.view.numel()] += 1
    assert all((view == 1).all() for view in layout.views(count).values())
    assert [place for place in places if place.is_large] == [p for of in found for p in of if p.is_large]
    assert len(found[0]) == {"whole": 5, "layer": 1}.get(str(buckets), 2)


def test_a_backward_measures_what_it_leaves() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 3))
    bench = FlatModule(model, Layout(model))
    found = []
    for final in (True, False):
        with bench.gradient.collecting(final=final):
            model(normal(4, 512)).square().sum().backward()
        found.append(bench.staging.fetch(0))
    assert found[0] == found[1] and len(found[0]) == 2
    assert sum(found[0]) == pytest.approx(float((bench.g.double() ** 2).sum()), rel=2.4e-6)
