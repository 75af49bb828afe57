"""Whether a model's parameters are still those that training began with: what leaves the flat vector is not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ps_elastic.errors import TaskError

_EARLY, _EVERY = 10, 100  # steps: all is looked at in each of the first ones, and in every hundredth
_TURNS = 3  # steps in which each parameter is looked at once
_MOVED = "lives in other memory, since its `.data` was set or the model was moved or cast; expected to stay where it is"


class ParameterWatch:
    """Raises TaskError by name for a parameter that was frozen, released, moved, replaced or added since it was made.

    trained: name -> where the parameter lives. A step looks at a third of the parameters, since a look at one takes
    some 0.2 us: what changed is noticed within three steps.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, Tensor]) -> None:
        self._model = model
        places = {id(parameter): trained[name] for name, parameter in model.named_parameters() if name in trained}
        self._trained: list[tuple[str, Mapping[str, Any], str, Tensor, int]] = []
        self._forms: list[tuple[str, Tensor, Tensor]] = []
        self._frozen: list[tuple[str, Mapping[str, Any], str]] = []
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                name = f"{prefix}.{key}" if prefix else key
                if parameter is None:
                    continue
                # A module of TorchScript has no such dict: of it only the tensors themselves are looked at.
                owner = module._parameters if isinstance(module._parameters, dict) else {key: parameter}
                if id(parameter) in places:
                    place = places[id(parameter)]
                    self._trained.append((name, owner, key, parameter, place.data_ptr()))
                    self._forms.append((name, parameter, place))
                elif not parameter.requires_grad:
                    self._frozen.append((name, owner, key))
        self._names = self._all_names()

    def look(self, step: int) -> None:
        """Look at what is due in push `step`."""
        if step <= _EARLY or step % _EVERY == 0:
            self.look_at_all(step)
        else:
            self._look(step, step % _TURNS, _TURNS)

    def look_at_all(self, step: int) -> None:
        """Look at every parameter, and at its shape."""
        self._look(step, 0, 1)
        for name, parameter, place in self._forms:
            if parameter.shape != place.shape or parameter.stride() != place.stride():
                raise TaskError(f"step {step}: parameter '{name}' {_MOVED}")
        if added := self._all_names() - self._names:
            raise TaskError(
                f"step {step}: parameter '{min(added)}' was added during training; expected in what `model` returns"
            )

    def _look(self, step: int, first: int, every: int) -> None:
        for name, owner, key, parameter, start in self._trained[first::every]:
            if owner.get(key) is not parameter or not parameter.requires_grad or parameter.data_ptr() != start:
                raise TaskError(f"step {step}: parameter '{name}' {_change(owner.get(key), parameter)}")
        for name, owner, key in self._frozen[first::every]:
            if (found := owner.get(key)) is not None and found.requires_grad:
                raise TaskError(
                    f"step {step}: parameter '{name}' was frozen when training began and requires a gradient now; "
                    "expected from the start: set `requires_grad` in `model`, or train in two runs, by `train.init`"
                )

    def _all_names(self) -> set[str]:
        return {name for name, _ in self._model.named_parameters(remove_duplicate=False)}


def _change(found: Tensor | None, parameter: Tensor) -> str:
    if found is None:
        return "was removed during training; expected to stay in the model"
    if found is not parameter:
        return "was replaced by another one during training; expected the one that `model` returned"
    if not parameter.requires_grad:
        return (
            "was trained when training began and requires no gradient now; expected as at the start: "
            "set `requires_grad` in `model`, or train in two runs, by `train.init`"
        )
    return _MOVED
