from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from helpers import Blobs
from torch import nn

from ps_elastic.errors import ConfigError
from ps_elastic.tasks.copies import copy_model


class Locked(nn.Module):
    """deepcopy refuses the lock."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lock, self.a, self.b = threading.Lock(), nn.Linear(2, width), nn.Dropout()
        self.register_buffer("hidden", torch.rand(3), persistent=False)


@dataclass
class Refusing(Blobs):
    """other: what `model` does the second time."""

    other: str = ""
    made: int = 0

    def model(self, seed: int) -> nn.Module:
        self.made += 1
        if self.other == "same":
            self.first = getattr(self, "first", None) or Locked(2)
            return self.first
        return Locked(self.made if self.other == "shape" else 2)


def test_a_model_that_deepcopy_refuses_is_built_again_with_its_state() -> None:
    task = Refusing()
    model = task.model(0)
    model.b.eval()
    model.a.bias.requires_grad_(False)
    copied = copy_model(task, model, 0)
    assert task.made == 2 and copied is not model
    for mine, own in zip(
        (*model.parameters(), *model.buffers()), (*copied.parameters(), *copied.buffers()), strict=True
    ):
        assert torch.equal(mine, own) and mine.data_ptr() != own.data_ptr()
        assert mine.requires_grad == own.requires_grad
    assert [module.training for module in copied.modules()] == [True, True, False]


@pytest.mark.parametrize(("other", "message"), [("same", "the same one each time"), ("shape", "another one the next")])
def test_one_that_is_not_the_same_the_next_time_is_refused(other: str, message: str) -> None:
    task = Refusing(other=other)
    with pytest.raises(ConfigError, match=rf"task: the model cannot be copied \(.*lock.*\), and .*{message}"):
        copy_model(task, task.model(0), 0)


def test_a_scripted_model_is_built_again_since_a_deep_copy_cannot_be_trained() -> None:
    @dataclass
    class Scripted(Blobs):
        def model(self, seed: int) -> nn.Module:
            return torch.jit.script(super().model(seed))

    task = Scripted()
    copied = copy_model(task, task.model(0), 0)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in copied.parameters())


def test_what_can_be_copied_is_not_built_again() -> None:
    task = Refusing()
    model = nn.Sequential(nn.Linear(2, 2))
    assert torch.equal(copy_model(task, model, 0)[0].weight, model[0].weight) and task.made == 0
