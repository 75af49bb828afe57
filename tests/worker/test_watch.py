from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import OddModel
from torch import nn

from ps_elastic.errors import TaskError
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.flat_module import FlatModule

CHANGES: dict[str, tuple[Callable[[OddModel], object], str]] = {
    "frozen": (lambda m: m.out.bias.requires_grad_(False), "'out.bias' was trained .* requires no gradient now"),
    "released": (lambda m: m.frozen.weight.requires_grad_(True), "'frozen.weight' was frozen .* requires a gradient"),
    "moved": (lambda m: setattr(m.out.weight, "data", m.out.weight.data.clone()), "'out.weight' lives in other memory"),
    "moved as a whole": (lambda m: m.double(), r"'[\w.]+' lives in other memory"),
    "replaced": (lambda m: setattr(m.out, "bias", nn.Parameter(torch.ones(3))), "'out.bias' was replaced"),
    "untied": (lambda m: setattr(m.again, "weight", nn.Parameter(torch.ones(9, 9))), "'again.weight' was replaced"),
    "removed": (lambda m: setattr(m.out, "bias", None), "'out.bias' was removed"),
    "thawed by another": (
        lambda m: setattr(m.frozen, "weight", nn.Parameter(torch.ones(9, 6))),
        "'frozen.weight' was frozen .* requires a gradient",
    ),
}


def test_a_square_parameter_that_was_transposed_in_its_place_is_named() -> None:
    model, flat = watched()
    model.twice.weight.data = model.twice.weight.data.t()
    with pytest.raises(TaskError, match=r"'twice\.weight' lives in other memory"):
        flat.watch.look(3)


def watched() -> tuple[OddModel, FlatModule]:
    model = OddModel()
    return model, FlatModule(model, Layout(model))


@pytest.mark.parametrize("step", [1, 10, 11, 12, 13, 98, 1000])
@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_that_does_not_stay_is_named_within_three_steps(name: str, step: int) -> None:
    model, flat = watched()
    change, message = CHANGES[name]
    flat.watch.look(step)
    change(model)
    with pytest.raises(TaskError, match=rf"^step \d+: parameter {message}"):
        for later in range(step, step + 3):
            flat.watch.look(later)


def test_a_parameter_that_was_added_is_named_in_the_hundredth_step() -> None:
    model, flat = watched()
    model.more = nn.Linear(2, 2)
    for step in range(11, 100):
        flat.watch.look(step)
    with pytest.raises(TaskError, match=r"^step 100: parameter 'more\.bias' was added"):
        flat.watch.look(100)


def test_what_stays_is_no_error_nor_is_what_a_frozen_tensor_holds() -> None:
    model, flat = watched()
    with torch.no_grad():
        model.out.weight.mul_(2)
        model.out.weight.data.clamp_(-1, 1)
    model.frozen.weight.data = torch.zeros(9, 6)
    model.eval()
    for step in range(1, 202):
        flat.watch.look(step)
