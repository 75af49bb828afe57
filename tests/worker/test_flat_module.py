from __future__ import annotations

import threading

import pytest
import torch
from helpers import Blobs, Odd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ps_elastic.errors import TaskError
from ps_elastic.tasks import Task
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.flat_module import FlatModule


class Told:
    """A bench whose backward is told of; `filled` are the buckets in the order in which they were full."""

    def __init__(self, model: nn.Module, buckets: str | int = "layer") -> None:
        self.model, self.layout = model, Layout(model, buckets)
        self.bench = FlatModule(model, self.layout)
        self.filled: list[int] = []

    def backward(self, *losses: Tensor) -> dict[str, Tensor]:
        """Of each loss; the last is told of. Returns the gradients."""
        gradient = self.bench.gradient
        with gradient.collecting():
            for number, loss in enumerate(losses, 1):
                if number == len(losses):
                    gradient.tell(self.filled.append)
                loss.backward()
        return gradient.views


def loss_of(task: Task, model: nn.Module) -> Tensor:
    return task.loss(model, next(task.batches(1, 1, 0)))


def test_a_bucket_is_told_of_when_the_last_of_its_gradients_is_there() -> None:
    task = Blobs()
    told = Told(task.model(0), buckets="layer")
    seen: list[tuple[int, bool]] = []
    gradient = told.bench.gradient
    expected = torch.autograd.grad(loss_of(task, told.model), list(told.model.parameters()))
    with gradient.collecting():
        gradient.tell(lambda i: seen.append((i, torch.equal(list(gradient.views.values())[i], expected[i]))))
        loss_of(task, told.model).backward()
    assert sorted(seen) == [(i, True) for i in range(4)]
    assert {i for i, _ in seen[:2]} == {2, 3}  # the last layer first


def test_a_tied_parameter_is_counted_once_and_an_unused_one_holds_its_bucket_back() -> None:
    task = Odd()
    told = Told(task.model(0))
    views = told.backward(loss_of(task, told.model))
    names = [slot.name for slot in told.layout.slots]
    assert sorted(names[i] for i in told.filled) == sorted(name for name in names if not name.startswith("unused"))
    assert not views["unused.weight"].any()


def test_only_the_last_backward_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    told = Told(model)
    first = model[0](torch.ones(2)).sum()  # of the first layer alone
    views = told.backward(first, model[1](torch.ones(2)).sum())
    assert sorted(told.filled) == [2, 3]
    assert views["0.weight"].any() and views["1.weight"].any()
    told.filled.clear()
    with told.bench.gradient.collecting():
        model(torch.ones(2)).sum().backward()
    assert told.filled == []


class Segments(nn.Module):
    """One layer used in two segments that are computed again in backward: each is a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return self.out(x)


def test_a_second_gradient_after_its_bucket_had_left_is_an_error_by_name() -> None:
    x = torch.ones(3, requires_grad=True)
    told = Told(Segments())
    with pytest.raises(TaskError, match=r"'layer\.\w+' got a second gradient after its bucket had left.*whole"):
        told.backward(told.model(x).sum())
    untold, reference = Told(Segments()), nn.Module()
    with untold.bench.gradient.collecting():
        untold.model(x).sum().backward()
    reference = Segments()
    reference.load_state_dict(untold.model.state_dict())
    (reference.out(reference.layer(reference.layer(x)))).sum().backward()
    assert torch.allclose(untold.bench.gradient.views["layer.weight"], reference.layer.weight.grad)


def test_what_another_thread_finishes_is_told_of_when_backward_is_over() -> None:
    task = Blobs()
    told = Told(task.model(0))
    gradient = told.bench.gradient
    with gradient.collecting():
        gradient.tell(told.filled.append)
        thread = threading.Thread(target=lambda: loss_of(task, told.model).backward())
        thread.start()
        thread.join(60)
        assert not thread.is_alive() and told.filled == []
        gradient.told()
    assert sorted(told.filled) == [0, 1, 2, 3] and {*told.filled[:2]} == {2, 3}
    assert all(view.any() for view in gradient.views.values())
