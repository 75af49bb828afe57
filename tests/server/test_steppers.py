"""Which stepper an optimizer gets: ours with torch's bits, else torch's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ps_elastic.config.sections import Optimizer
from ps_elastic.server.steppers import CompiledStepper, TorchStepper, agree, make_stepper
from ps_elastic.vectors import kernels as compiled
from ps_elastic.vectors.norms import Difference

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.02},
    {"momentum": 0.7, "nesterov": True},
    {"name": "adam", "weight_decay": 0.1},
    {"name": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.99)},
]


@pytest.fixture
def kernels() -> ModuleType:
    found = compiled.kernels_for(compiled.LEAST)
    if found is None:
        pytest.skip(compiled.why_not())
    return found


def stepper_of(kernels: ModuleType | None, **settings: Any) -> object:
    return make_stepper(Optimizer(lr=0.1, **settings), Difference(1 << 10, kernels), kernels)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_without_kernels_it_is_torchs(settings: dict[str, Any]) -> None:
    assert isinstance(stepper_of(None, **settings), TorchStepper)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kernels_of_other_bits_are_not_taken(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    def nudged(kernel: Any) -> Any:
        def changed(x: np.ndarray, *more: Any) -> float:
            square = kernel(x, *more)
            x[7] = np.nextafter(x[7], np.float32(np.inf))
            return float(square)

        return changed

    sgd, adam = kernels.sgd, kernels.adam
    monkeypatch.setattr(kernels, "sgd", lambda *flags: nudged(sgd(*flags)))
    monkeypatch.setattr(kernels, "adam", lambda *flags: nudged(adam(*flags)))
    assert isinstance(stepper_of(kernels, **settings), TorchStepper)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ours_is_taken_exactly_where_it_agrees(kernels: ModuleType, settings: dict[str, Any]) -> None:
    """On a processor without fma, or where torch was built in another way, it need not."""
    config, difference = Optimizer(lr=0.1, **settings), Difference(1 << 10, kernels)
    plain = TorchStepper(config, difference, True)
    agrees = agree(config, plain, CompiledStepper(config, plain, kernels, True))
    assert isinstance(stepper_of(kernels, **settings), CompiledStepper) == agrees


def test_betas_for_which_torch_computes_otherwise_are_left_to_torch(kernels: ModuleType) -> None:
    assert isinstance(stepper_of(kernels, name="adam", betas=(0.3, 0.9)), TorchStepper)
