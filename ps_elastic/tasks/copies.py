"""A copy of a task's model, whatever the model is made of."""

from __future__ import annotations

import copy

from torch import nn

from ps_elastic.errors import ConfigError
from ps_elastic.tasks.base import Task


def copy_model(task: Task, model: nn.Module, seed: int) -> nn.Module:
    """A copy of `model`, which `task.model(seed)` returned: of one that deepcopy refuses, as it does tensors that
    others were computed into (the older weight_norm), locks and files, another is built and given the same state.

    Raises ConfigError where that is not the same model.
    """
    try:
        copied = copy.deepcopy(model)
        if all(parameter.is_leaf for parameter in copied.parameters()):
            return copied
        why = "deepcopy makes its parameters into results"  # of a model of TorchScript
    except Exception as error:  # whatever an object of the user's says to being copied
        why = str(error) or type(error).__name__
    again = task.model(seed)
    if again is model:
        raise ConfigError(
            f"the model cannot be copied ({why}), and `model` returns the same one each time; expected a new one",
            key="task",
        )
    try:
        again.load_state_dict(model.state_dict())
    except RuntimeError:
        raise ConfigError(
            f"the model cannot be copied ({why}), and `model({seed})` returns another one the next time; "
            "expected one with the same names and shapes",
            key="task",
        ) from None
    again.to(next(model.parameters()).device)
    buffers = dict(again.named_buffers())
    for name, buffer in model.named_buffers():  # those that are not in the state too
        buffers[name].copy_(buffer)
    for parameter, original in zip(again.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    for module, before in zip(again.modules(), model.modules(), strict=True):
        module.training = before.training
    return again
