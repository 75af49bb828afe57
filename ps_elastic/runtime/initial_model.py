"""The model that a run starts from: what the task makes, with the parameters of `train.init`."""

from __future__ import annotations

from torch import nn

from ps_elastic.config.schema import Config
from ps_elastic.records.checkpoint import load_parameters, refuse_unsavable
from ps_elastic.tasks import Task


def make_model(task: Task, config: Config) -> tuple[nn.Module, tuple[str, ...]]:
    """(the model, what the user is to be told of it). Raises ConfigError for one that could not be saved."""
    model, notes = task.model(config.seed), []
    refuse_unsavable(model)
    if config.train.init is not None and (told := load_parameters(model, config.train.init)):
        notes.append(told)
    if not any(module.training for module in model.modules()):
        notes.append("task: `model` returned a model in eval mode, and it is trained so; for train mode, `.train()` it")
    return model, tuple(notes)
