"""The discrepancy against the model with every debt settled, and what it is a multiple of."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Desk
from numpy.typing import NDArray

from ps_elastic.config.sections import Optimizer
from ps_elastic.policies import Policy
from ps_elastic.policies.events import PushId
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.deadline import Deadline
from ps_elastic.policies.rules.norm_bounded import NormBounded
from ps_elastic.policies.rules.variance_bounded import VarianceBounded


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As every command sets it: threads that wait for work on so few numbers cost more than they do."""
    torch.set_num_threads(1)


P, SIZE = 5, 64
Vector = NDArray[np.float64]

RULES: dict[str, Callable[[], Policy]] = {
    "own": lambda: VarianceBounded(quorum=0.4),
    "mean": lambda: VarianceBounded(quorum=0.4, substitute="mean"),
    "zero": lambda: NormBounded(beta=0.4),
    "deadline": lambda: Deadline(deadline_s=1.5, missing="substitute"),
}
SGD: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05},
    {"weight_decay": 0.1},
]


class Reference:
    """SGD in double precision that has every gradient of a step when it makes it: the model without debts."""

    def __init__(self, settings: Optimizer) -> None:
        self.x, self._m, self._settings = np.zeros(SIZE), np.zeros(SIZE), settings

    def step(self, gradient: Vector, rate: float) -> None:
        s = self._settings
        direction = gradient + s.weight_decay * self.x
        if s.momentum:
            self._m = s.momentum * self._m + direction
            direction = direction + s.momentum * self._m if s.nesterov else self._m
        self.x = self.x - rate * direction


class Story:
    """A desk where workers push random vectors in a random order, each again once it was answered."""

    def __init__(self, rule: str, settings: dict[str, Any], seed: int, turns: int) -> None:
        self.settings = Optimizer(lr=0.1, **settings)
        step_sizes = [0.1, 0.03, 0.2, 0.05]
        self.desk = Desk(RULES[rule](), P, SIZE, optimizer=self.settings, alpha=lambda n: step_sizes[n // 10 % 4])
        self.pushed: dict[PushId, Vector] = {}
        self.views: dict[PushId, Vector] = {}
        self._generator, self._random = torch.Generator().manual_seed(seed), random.Random(seed)
        ready = list(range(1, P + 1))
        while len(self.pushed) < turns or self.desk.server.ledger.debts:
            assert len(self.pushed) < 10 * turns
            ready += self._push(ready.pop(self._random.randrange(len(ready))))

    def _push(self, worker: int) -> list[int]:
        reply = self.desk.views[worker]
        id = PushId(worker, reply.step + 1)
        vector = torch.randn(SIZE, generator=self._generator) + 0.5
        self.pushed[id] = vector.double().numpy()
        self.views[id] = np.asarray(reply.model, np.float64)
        return list(self.desk.push(worker, vector))

    def check(self) -> int:
        """Every line of a push used tells ||x - v|| of the reference, where the model ends; returns the debts."""
        reference, told, owed = Reference(self.settings), {}, 0
        for line in self.desk.told("used"):
            told[PushId(line["worker"], line["step"])] = line
        for event in map(json.loads, self.desk.log):
            answers = [action for action in event["actions"] if action[0] == "applied"]
            for action in [action for action in event["actions"] if action[0] == "step"]:
                _, terms, share, _, apply = action
                alpha = answers.pop(0)[3]
                if apply == "amend":
                    continue
                counted = [PushId(*(stands_for or (worker, step))) for worker, step, _, stands_for in terms]
                owed += sum(stands_for is not None for *_, stands_for in terms)
                for id in counted:
                    if id in told:
                        distance = float(np.linalg.norm(reference.x - self.views[id]))
                        # Some tens of float32 roundings of numbers up to about 10, in each of 64 entries.
                        assert told[id]["discrepancy"] == pytest.approx(distance, rel=1e-4, abs=5e-5)
                reference.step(np.mean([self.pushed[id] for id in counted], axis=0), alpha * share)
        assert np.allclose(self.desk.x.double().numpy(), reference.x, rtol=1e-5, atol=2e-5)
        return owed


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("settings", SGD, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_late_pushes_end_where_all_in_time_would_have_and_D_is_the_distance_from_there(
    rule: str, settings: dict[str, Any], seed: int
) -> None:
    assert Story(rule, settings, seed, turns=150).check() > 20


def test_what_is_owed_is_measured_in_the_step_size_it_is_owed_at() -> None:
    """alpha falls from 1 to 0.1 after a round with one push missing, which is worth 1/2 of a step of 1, not of 0.1."""
    desk = Desk(VarianceBounded(quorum=0.5), 2, alpha=lambda samples: 1.0 if samples < 1 else 0.1)
    desk.push(1, 3.0)
    desk.push(1, 3.0)  # on a view with its own gradient for the other's
    desk.push(2, 1.0)
    second = next(line for line in desk.told("used") if (line["worker"], line["step"]) == (1, 2))
    assert second["discrepancy"] == pytest.approx(0.5 * (3 - 1) * 8)  # 64 entries
    assert second["B"] == pytest.approx(8.0) == pytest.approx(desk.server.totals.summary(1.0)["B_max"])


def test_the_step_that_uses_a_push_has_no_part_in_what_its_view_is_measured_in() -> None:
    desk = Desk(Asynchronous(), 2, alpha=lambda samples: 0.5 if samples < 1 else 2.0)
    desk.push(1)
    desk.push(2)
    (line,) = [line for line in desk.told("used") if line["worker"] == 2]
    assert line["discrepancy"] == pytest.approx(0.5 * 0.5 * 8) and line["step_size"] == 2.0
    assert line["B"] == pytest.approx(0.5 * 8)


def test_a_view_of_the_version_in_use_has_none() -> None:
    desk = Desk(Asynchronous(), 1, alpha=lambda samples: 0.0)
    desk.push(1)
    assert desk.told("used")[0]["B"] == 0.0


def test_an_own_gradient_stands_for_all_that_is_owed_of_earlier_rounds_and_for_who_comes_late_too() -> None:
    desk = Desk(VarianceBounded(quorum=0.5), 4, optimizer=Optimizer(lr=1.0))

    def added(replies: dict[int, Any], worker: int) -> float:
        return float(replies[worker].model[0] - desk.x[0])

    desk.push(1, 2.0)
    assert added(desk.push(2, 6.0), 1) == pytest.approx(-2.0 * 2 / 4)
    desk.push(1, 2.0)
    assert added(desk.push(2, 6.0), 2) == pytest.approx(-6.0 * 2 / 4)  # 3 and 4 owe the first round still
    assert added(desk.push(3, 8.0), 3) == pytest.approx(-8.0 * 1 / 4)  # and now 4 alone
    assert added(desk.push(4, 8.0), 4) == 0.0
