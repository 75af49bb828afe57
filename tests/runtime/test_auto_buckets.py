from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers import Images

from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.runtime.auto_buckets import PUSHES, time_gradients, time_leaving
from ps_elastic.runtime.build import make_parts


class Slowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return gradients[0]


class Halting(Images):
    """Backward halts before the convolution, the first layer."""

    def loss(self, model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden = Slowed.apply(model[0](batch[0]))
        return torch.nn.functional.cross_entropy(model[1:](hidden), batch[1])


def setting(*overrides: str) -> Config:
    return load({"task": "test_auto_buckets:Halting"}, ["buckets=auto", *overrides])


def test_gradients_are_timed_as_backward_makes_them() -> None:
    config = setting()
    parts = make_parts(config, 2)
    before = parts.layout.sha256(parts.model)
    ready = time_gradients(config, parts, 2, 2, 0)
    names = [slot.name for slot in parts.layout.slots]
    assert len(ready) == len(names)
    first = min(ready[names.index(name)] for name in ("0.weight", "0.bias"))
    rest = max(time for name, time in zip(names, ready, strict=True) if not name.startswith("0."))
    assert first > rest + 0.045
    assert parts.layout.sha256(parts.model) == before  # of the run's own model nothing has changed
    assert not parts.model[1].running_mean.any()


def test_where_nothing_may_leave_early_all_are_ready_at_the_end() -> None:
    config = setting("optimizer.clip_norm=1.0")
    ready = time_gradients(config, make_parts(config, 2), 1, 2, 0)
    assert min(ready) > 0.05 and max(ready) - min(ready) < 0.04


@pytest.mark.parametrize(("compressor", "nbytes"), [("identity", 4.0), ("top_k:ratio=0.25", 2.0)])
def test_a_bucket_is_encoded_as_in_the_run(compressor: str, nbytes: float) -> None:
    config = setting(f"compressor={compressor}")
    line, found = time_leaving(config, make_parts(config, 2), 1, copies=True)
    assert found == pytest.approx(nbytes, rel=1e-3)
    assert line.at(1 << 20) > 0
    assert PUSHES > 1
