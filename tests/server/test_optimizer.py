from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ps_elastic.config.sections import Optimizer, Schedule
from ps_elastic.errors import PolicyError
from ps_elastic.server.optimizer import FlatOptimizer, learning_rate
from ps_elastic.vectors.layout import Layout

SGD: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.02},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.02},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
]
pytestmark = pytest.mark.usefixtures("kernels")
RATES = (0.1, 0.1, 0.03, 0.0, 0.25, 0.1)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def large() -> nn.Module:
    """More than two of the optimizer's blocks, which do not end where the tensors do."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(301, 700), nn.Linear(700, 101))


class Pair:
    """The same model twice: flat, and as a plain module; both get the same random gradients."""

    def __init__(self, make: Callable[[], nn.Module], settings: Optimizer) -> None:
        self.plain = make()
        self.layout = Layout(make())
        self.x = self.layout.empty()
        self.layout.attach(make(), self.x)
        self.flat = FlatOptimizer(settings, self.layout, self.x)
        self._generator = torch.Generator().manual_seed(1)

    def gradient(self) -> Tensor:
        g = self.layout.empty()
        for name, view in self.layout.views(g).items():
            view.normal_(generator=self._generator)
            self.plain.get_parameter(name).grad = view.clone()
        return g

    def parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        views = self.layout.views(self.x)
        return ((views[name], p.detach()) for name, p in self.plain.named_parameters())


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize("settings", SGD, ids=str)
def test_sgd_has_the_bits_of_torch_tensor_by_tensor(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    pair = Pair(make, Optimizer(**settings))
    reference = torch.optim.SGD(pair.plain.parameters(), lr=0.1, foreach=False, fused=False, **settings)
    for rate in RATES:
        g = pair.gradient()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        pair.flat.step(g, rate)
    assert all(torch.equal(ours, theirs) for ours, theirs in pair.parameters())


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.02, "betas": (0.8, 0.99), "eps": 1e-6}], ids=str)
def test_adam_has_the_bits_of_torchs_fused_form_on_the_padded_vector(
    make: Callable[[], nn.Module], name: Any, kind: Any, more: dict[str, Any]
) -> None:
    pair = Pair(make, Optimizer(name=name, **more))
    vector = pair.x.clone().requires_grad_()
    reference = kind([vector], lr=0.1, fused=True, **{"weight_decay": 0.0, **more})
    for rate in RATES:
        vector.grad = pair.gradient()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        pair.flat.step(vector.grad.clone(), rate)
    assert torch.equal(pair.x, vector.detach())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_left_out_of_decay_on_request(name: Any) -> None:
    pair = Pair(small, Optimizer(name=name, weight_decay=0.3, decay_norm_and_bias=False))
    before = [ours.clone() for ours, _ in pair.parameters()]
    pair.flat.step(pair.layout.empty(), 0.5)
    for (ours, _), old in zip(pair.parameters(), before, strict=True):
        assert torch.allclose(ours, old * (0.85 if old.ndim > 1 else 1.0), rtol=1e-6)
        assert torch.equal(ours, old) == (old.ndim <= 1)


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_tells_how_far_the_model_moved(make: Callable[[], nn.Module], name: Any) -> None:
    pair = Pair(make, Optimizer(name=name))
    for rate in RATES:
        old = pair.x.clone()
        moved = pair.flat.step(pair.gradient(), rate)
        assert math.isclose(moved, float((pair.x.double() - old.double()).norm()), rel_tol=1e-6, abs_tol=0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_padding_stays_zero(name: Any) -> None:
    pair = Pair(small, Optimizer(name=name, weight_decay=0.1))
    used = torch.zeros(pair.layout.size, dtype=torch.bool)
    for slot in pair.layout.slots:
        used[slot.offset : slot.offset + slot.numel] = True
    for rate in RATES:
        pair.flat.step(pair.gradient(), rate)
    assert not pair.x[~used].any() and pair.x[used].any()


@pytest.mark.parametrize("settings", SGD, ids=str)
def test_no_step_is_longer_than_coast_and_gain_say(settings: dict[str, Any]) -> None:
    pair = Pair(small, Optimizer(**settings))
    tightest = 0.0
    for rate in RATES:
        g = pair.gradient()
        coast, gain = pair.flat.coast()
        reach = rate * (coast + gain * float(g.norm()))
        rounding = 2.0**-24 * float(pair.x.norm())
        moved = pair.flat.step(g, rate)
        assert moved <= reach + rounding
        tightest = max(tightest, moved / reach if reach else 0.0)
    assert tightest > 0.5  # and it says more than nothing


def test_adam_has_no_reach() -> None:
    assert Pair(small, Optimizer(name="adam")).flat.coast() == (math.inf, math.inf)


@pytest.mark.parametrize("settings", SGD, ids=str)
def test_at_rate_zero_the_direction_is_what_a_small_step_would_move_by(settings: dict[str, Any]) -> None:
    still, moving = (Pair(small, Optimizer(**settings)) for _ in range(2))
    for _ in range(3):
        still.flat.step(g := still.gradient(), 0.0)
        moved = moving.flat.step(moving.gradient(), 1e-3)
        # The moving one decays what it has moved by: within a few thousandths of it.
        assert math.isclose(still.flat.direction_norm(g), moved / 1e-3, rel_tol=1e-2)


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("settings", SGD, ids=str)
@pytest.mark.parametrize("late", [0, 1, 4])
def test_what_was_withheld_from_a_step_is_made_good_later(settings: dict[str, Any], late: int, decay_all: bool) -> None:
    """A debt repaid `late` steps after the owed one leaves model and momentum as if nothing had been missing."""
    owing, whole = (Pair(small, Optimizer(decay_norm_and_bias=decay_all, **settings)) for _ in range(2))
    delta = owing.layout.empty()
    for view in owing.layout.views(delta).values():
        view.normal_(generator=torch.Generator().manual_seed(5))
    for pair, withheld in ((owing, 0.0), (whole, 1.0)):
        pair.flat.step(pair.gradient(), 0.1)
        pair.flat.step(pair.gradient() + withheld * delta, 0.2)
    response = owing.flat.respond(0.2)
    for rate in (0.1, 0.05, 0.3, 0.1)[:late]:
        owing.flat.step(owing.gradient(), rate)
        whole.flat.step(whole.gradient(), rate)
        owing.flat.continue_response(response, rate)
    old = owing.x.clone()
    moved = owing.flat.amend(delta, response)
    assert math.isclose(moved, float((owing.x - old).norm()), rel_tol=1e-5)
    # Some ten float32 roundings of numbers up to about 10 each.
    assert torch.allclose(owing.x, whole.x, rtol=0, atol=2e-6)
    owing.flat.step(owing.gradient(), 0.1)
    whole.flat.step(whole.gradient(), 0.1)
    assert torch.allclose(owing.x, whole.x, rtol=0, atol=3e-6)


def test_adam_cannot_repay_a_debt() -> None:
    with pytest.raises(PolicyError, match="adam does not respond to gradients by a factor"):
        Pair(small, Optimizer(name="adam")).flat.respond(0.1)


LR = Optimizer(lr=0.4)


def rates(schedule: Schedule, *samples: int, budget: int = 1000) -> list[float]:
    return [learning_rate(LR, schedule, s, budget) for s in samples]


def test_a_constant_rate_is_constant() -> None:
    assert rates(Schedule(), 0, 500, 5000) == [0.4, 0.4, 0.4]


def test_a_step_multiplies_the_rate_after_each_so_many_samples() -> None:
    schedule = Schedule(name="step", step_samples=100, gamma=0.5)
    assert rates(schedule, 0, 99, 100, 199, 200, 350) == [0.4, 0.4, 0.2, 0.2, 0.1, 0.05]


def test_a_cosine_falls_to_its_final_part_and_stays() -> None:
    schedule = Schedule(name="cosine", final=0.1)
    assert rates(schedule, 0, 500, 1000, 1500) == pytest.approx([0.4, 0.22, 0.04, 0.04], rel=1e-12)
    assert rates(Schedule(name="cosine"), 1000) == pytest.approx([0.0], abs=1e-15)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warm_up_rises_linearly_from_zero(name: Any) -> None:
    warm, cold = Schedule(name=name, warmup_samples=200), Schedule(name=name)
    after = rates(cold, 0, 50, 100, 199, 200, 700)
    assert rates(warm, 0, 50, 100, 199, 200, 700) == pytest.approx(
        [a * f for a, f in zip(after, (0, 0.25, 0.5, 0.995, 1, 1), strict=True)], rel=1e-12
    )
