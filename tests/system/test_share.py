"""p pushes of share 1/p move the model as one round of share 1 does; share 1 is torch.optim to the bit.

The share multiplies the learning rate, so that decay and Adam move in proportion. What remains between the two, on a
constant gradient g, with a = alpha the rate of a round:

- sgd without decay: nothing but rounding, p (a/p) g = a g;
- decay w: (1 - a w / p)^p against 1 - a w, and the gradient is followed from p points instead of one: to second order
  (a w)^2 (1 - 1/p) / 2 of |x| and of |g| / w;
- momentum mu and Nesterov: momentum lives by versions, so that p pushes age it p times. From rest that is a head start
  (p pushes have more of it behind them); once m has become g / (1 - mu), every round is a g / (1 - mu) for both;
- adam: with a constant gradient both moments are exact from the first step on, each step is a/p sign(g), so p of them
  are one round's, to rounding and eps / |g|.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Desk, Point
from torch import Tensor

from ps_elastic.config.sections import Optimizer
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.stale_synchronous import StaleSynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.vectors.layout import Layout

SIZE, ROUNDS, WARM_UP = 64, 5, 250
G = torch.linspace(-1, 1, SIZE)  # no entry is zero
START = torch.linspace(2, -1, SIZE)

SETTINGS: dict[str, tuple[dict[str, Any], int, float]] = {  # optimizer, rounds of warm-up, relative tolerance
    # Rounding: moves of 0.01 |g| are read off a model of size 1 to 2^-24, some 40 times: 40 * 2^-24 / 0.01.
    "sgd": ({}, 0, 3e-4),
    "sgd with decay": ({"weight_decay": 0.1}, 0, 5e-4),
    "momentum": ({"momentum": 0.9}, WARM_UP, 3e-4),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, WARM_UP, 3e-4),
    "adam": ({"name": "adam"}, 0, 3e-4),
    "adamw": ({"name": "adamw"}, 0, 3e-4),
    "adamw with decay": ({"name": "adamw", "weight_decay": 0.1}, 0, 5e-4),
}
RATE = 0.01


def desk_of(rule: Any, workers: int, settings: dict[str, Any]) -> Desk:
    return Desk(rule(), workers, SIZE, optimizer=Optimizer(lr=RATE, **settings), model=Point(START.clone()))


def play_round(desk: Desk, workers: int) -> None:
    for worker in range(1, workers + 1):
        desk.push(worker, G.clone())


@pytest.mark.parametrize("rule", [Asynchronous, StaleSynchronous])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_round_of_single_pushes_moves_the_model_as_one_mean_does(name: str, workers: int, rule: Any) -> None:
    settings, warm_up, tolerance = SETTINGS[name]
    apart, together = desk_of(rule, workers, settings), desk_of(Synchronous, workers, settings)
    for _ in range(warm_up):
        play_round(apart, workers)
        play_round(together, workers)
    for _ in range(ROUNDS):
        before = apart.x.clone(), together.x.clone()
        play_round(apart, workers)
        play_round(together, workers)
        moves = apart.x - before[0], together.x - before[1]
        assert float((moves[0] - moves[1]).norm()) <= tolerance * float(moves[1].norm())
    assert [line["share"] for line in apart.told("used")[-workers:]] == [1 / workers] * workers
    assert [line["share"] for line in together.told("used")[-workers:]] == [1.0] * workers


def test_from_rest_momentum_gives_single_pushes_a_head_start_and_no_more() -> None:
    """Two pushes from rest: (a/2) g + (a/2) (1 + mu) g = a (1 + mu / 2) g, where one round is a g."""
    apart, together = (desk_of(rule, 2, {"momentum": 0.9}) for rule in (Asynchronous, Synchronous))
    play_round(apart, 2)
    play_round(together, 2)
    assert torch.allclose(START - together.x, RATE * G, atol=3e-7)
    assert torch.allclose(START - apart.x, RATE * 1.45 * G, atol=3e-7)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, lr=RATE, foreach=False)),
    "momentum": ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, foreach=False)),
    "nesterov": (
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    ),
    "adam": ({"name": "adam"}, lambda p: torch.optim.Adam(p, lr=RATE, fused=True)),
    "adamw": (
        {"name": "adamw", "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, fused=True),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_share_1_is_torch_to_the_bit(name: str) -> None:
    settings, make = KINDS[name]
    vector = torch.nn.Parameter(START.clone())
    reference = make([vector])
    desk = desk_of(Synchronous, 2, settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradients = [torch.randn(SIZE, generator=generator) for _ in range(2)]
        vector.grad = (gradients[0] + gradients[1]) / 2
        reference.step()
        for worker, gradient in enumerate(gradients, 1):
            desk.push(worker, gradient)
    assert torch.equal(desk.x, vector.detach())


@pytest.mark.parametrize("name", KINDS)
def test_a_share_is_a_factor_of_the_learning_rate_and_of_nothing_else(name: str) -> None:
    settings, make = KINDS[name]
    layout = Layout(Point(START.clone()))
    x: Tensor = layout.empty()
    layout.attach(Point(START.clone()), x)
    flat = FlatOptimizer(Optimizer(lr=RATE, **settings), layout, x)
    vector = torch.nn.Parameter(START.clone())
    reference = make([vector])
    reference.param_groups[0]["lr"] = RATE * 0.25
    for _ in range(10):
        vector.grad = G.clone()
        reference.step()
        flat.step(G.clone(), RATE * 0.25)
    assert torch.equal(x, vector.detach())
