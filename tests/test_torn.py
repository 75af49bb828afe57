"""Views that are read while the model is written: the copy that a worker left is its view, and D is taken from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ps_elastic import train
from ps_elastic.compressors.identity import Identity
from ps_elastic.config import Optimizer
from ps_elastic.errors import ConfigError
from ps_elastic.events import PushId, Step
from ps_elastic.layout import Layout
from ps_elastic.ledger import View
from ps_elastic.messages import PushMessage
from ps_elastic.optimizer import FlatOptimizer
from ps_elastic.torn import TornCalculator

FIRST, NEXT = PushId(1, 1), PushId(1, 2)
GIVEN = View(0, 0.0, None, 0.0, 0.0)


@pytest.fixture
def calculator() -> TornCalculator:
    layout = Layout(nn.Linear(30, 7))
    x = layout.empty().normal_()
    copies = {1: torch.zeros_like(x), 2: torch.zeros_like(x)}
    made = TornCalculator(layout, x, FlatOptimizer(Optimizer(lr=0.5), layout, x), [Identity()], copies)
    made.take(FIRST, [PushMessage(1, 1, 0, (torch.ones_like(x).numpy(),))])
    return made


def away(calculator: TornCalculator, copy: torch.Tensor) -> float:
    return float(np.linalg.norm(calculator.x.double().numpy() - copy.double().numpy()))


def test_a_worker_is_given_the_live_model_itself(calculator):
    given = calculator.give(FIRST, GIVEN, 0.5)
    calculator.x[3] = 77.0
    assert given[3] == 77.0


def test_the_distance_of_a_push_is_that_of_the_copy_left_by_its_worker(calculator):
    calculator.give(FIRST, GIVEN, 0.5)
    copy = calculator._copies[1].copy_(calculator.x)
    copy[::2] += 0.25  # it missed something there
    expected = away(calculator, copy)
    assert calculator.distance(FIRST) == pytest.approx(expected, rel=1e-5)
    calculator.combine(Step.mean([FIRST], share=1.0))
    calculator.apply(Step.mean([FIRST], share=1.0), 0.5, [FIRST])
    assert calculator.distance_when_used(FIRST) == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_a_push_that_is_used_after_its_worker_went_on_keeps_the_copy_that_it_was_made_on(calculator):
    calculator.give(FIRST, GIVEN, 0.5)
    copy = calculator._copies[1].copy_(calculator.x + 0.5)
    expected = away(calculator, copy)
    calculator.keep(FIRST)  # and its worker is answered
    calculator.give(NEXT, GIVEN, 0.5)
    copy.zero_()
    assert calculator.distance(FIRST) == pytest.approx(expected, rel=1e-5)
    assert calculator.distance(NEXT) == pytest.approx(away(calculator, copy), rel=1e-5)


def test_torn_views_are_refused_where_no_ranks_share_memory(tmp_path: Path):
    config = {"task": "quadratic", "policy": "asynchronous", "views": "torn", "train": {"samples": 10}}
    with pytest.raises(ConfigError, match="views: got 'torn', expected exact: only ranks that share memory"):
        train(config, workers=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
