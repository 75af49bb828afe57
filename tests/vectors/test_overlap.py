from __future__ import annotations

import pytest
import torch
from helpers import OddModel
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.vectors.layout import Layout
from ps_elastic.vectors.overlap import overlaps

BASE = torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (BASE, BASE, True),
        (BASE[:4], BASE[3:], True),
        (BASE[:4], BASE[4:], False),
        (BASE[:, :4], BASE[:, 4:], False),  # between each other, and yet apart
        (BASE[:, :5], BASE[:, 4:], True),
        (BASE.t(), BASE[7:], True),
        (BASE, torch.zeros(8, 8), False),
        (BASE[:0], BASE, False),
        (BASE.view(torch.uint8)[:, :4], BASE[:, :1], True),  # of another type
        (BASE.view(torch.uint8)[:, :4], BASE[:, 1:], False),
    ],
)
def test_tensors_overlap_where_they_have_a_number_in_common(a: Tensor, b: Tensor, shared: bool) -> None:
    assert list(overlaps([("a", a), ("b", b)])) == [] if not shared else list(overlaps([("a", a), ("b", b)])) != []


def test_an_expanded_tensor_overlaps_itself_and_a_transposed_one_does_not() -> None:
    assert list(overlaps([("a", torch.zeros(1, 3).expand(4, 3)), ("b", torch.zeros(2, 3).t())])) == [("a", "a")]


def test_neighbours_of_one_vector_are_apart() -> None:
    model = OddModel()
    layout = Layout(model)
    layout.attach(model, layout.empty())
    assert Layout(model).digest == layout.digest


def tied() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_parameters_that_share_memory_without_being_one_are_refused_by_both_names() -> None:
    model = tied()
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ConfigError, match=r"task: '0.weight' and '1.weight' share memory .*`b.weight = a.weight`"):
        Layout(model)
    base = torch.zeros(20)
    model[0].weight.data, model[1].bias.data = base[:16].view(4, 4), base[15:19]
    with pytest.raises(ConfigError, match=r"'0.weight' and '1.bias' share memory"):
        Layout(model)


def test_a_buffer_or_frozen_copy_in_the_memory_of_a_trained_parameter_is_refused() -> None:
    model = tied()
    model.register_buffer("seen", model[0].bias.detach())
    with pytest.raises(ConfigError, match=r"'0\.bias' and 'seen'|'seen' and '0.bias'"):
        Layout(model)
    model = tied()
    model[1].bias.data = model[0].bias.data
    model[1].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'0\.bias' and '1.bias'"):
        Layout(model)
    model[0].bias.requires_grad_(False)
    Layout(model)  # neither of them moves


def test_an_expanded_parameter_is_refused() -> None:
    model = tied()
    model[0].bias = nn.Parameter(torch.zeros(1).expand(4))
    with pytest.raises(ConfigError, match=r"'0\.bias' has several entries in one place"):
        Layout(model)
