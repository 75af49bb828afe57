from __future__ import annotations

from itertools import islice

import pytest
import torch

from ps_elastic.analysis.bench.tasks import Perceptron, Wide
from ps_elastic.errors import ConfigError
from ps_elastic.vectors.layout import Layout


@pytest.mark.parametrize(("parameters", "tensors"), [(1000, 1), (1003, 4)])
def test_the_shortcut_of_the_wide_task_is_its_gradient(parameters: int, tensors: int) -> None:
    task = Wide(parameters, tensors)
    model = task.model(0)
    assert [p.numel() for p in model.parameters()] == [
        parameters // tensors + (i < parameters % tensors) for i in range(tensors)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    batch = next(task.batches(1, 2, 0))
    loss = task.loss(model, batch)
    loss.backward()
    out = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    assert task.differentiate(model, batch, out) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, out[name])
    with torch.no_grad():
        assert task.evaluate(model)["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("parameters", [3_000, 300_000, 3_000_000])
def test_a_perceptron_has_about_the_parameters_asked_for(parameters: int) -> None:
    assert Layout(Perceptron(parameters).model(0)).numel == pytest.approx(parameters, rel=0.15)


def test_workers_of_a_perceptron_have_batches_of_their_own_that_come_round_again() -> None:
    task = Perceptron(3_000, batch_size=4, rounds=2)
    mine, again, other = (list(islice(task.batches(worker, 2, 0), 3)) for worker in (1, 1, 2))
    assert torch.equal(mine[0][0], again[0][0]) and torch.equal(mine[0][0], mine[2][0])
    assert not torch.equal(mine[0][0], mine[1][0]) and not torch.equal(mine[0][0], other[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wide(parameters=3, tensors=4), "tensors: got 4, expected a whole number from 1 to parameters"),
        (lambda: Wide(compute_s=-1), "compute_s: got -1, expected a number of seconds >= 0"),
        (lambda: Perceptron(parameters=100), "parameters: got 100, expected a whole number >= 795"),
    ],
)
def test_settings_that_make_no_task_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
