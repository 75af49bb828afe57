"""What is known in closed form of delayed and averaged SGD, of our rules and our simulator."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run
from torch import Tensor, nn

from ps_elastic.policies import theory
from ps_elastic.simulation.simulate import simulate
from ps_elastic.tasks import Task


def run(folder: Path, *overrides: str, workers: int, task: Any = "quadratic") -> Run:
    directory = folder / f"sim-{len(list(folder.iterdir()))}"
    return Run(directory, simulate({"task": task}, overrides, workers=workers, run_dir=directory))


def clean(curvature: str = "[1.0]", **more: float) -> dict[str, Any]:
    """A quadratic without noise."""
    return {"name": "quadratic", "curvature": json.loads(curvature), "noise": 0.0, **more}


# ---- delays


def test_workers_in_turn_are_p_minus_1_versions_late_after_the_first_round(tmp_path: Path) -> None:
    made = run(tmp_path, "policy=asynchronous", "train.samples=20", workers=5)
    assert made.column("staleness") == [0, 1, 2, 3] + [4] * 16


def test_ringmaster_in_lock_step_uses_the_first_workers_alone(tmp_path: Path) -> None:
    lock_step = ("optimizer.lr=0.001", "train.samples=30")
    three = run(tmp_path, "policy=ringmaster:delay=3", *lock_step, workers=8)
    assert Counter(three.column("worker")) == dict.fromkeys((1, 2, 3), 30 // 3)
    assert max(three.column("staleness")) == 2
    steps = [line for line in map(json.loads, three.events) if line["event"] == "push" and line["step"] == 5]
    assert sum(any(action[0] == "step" for action in line["actions"]) for line in steps) / len(steps) == 0.375
    every = run(tmp_path, "policy=ringmaster:delay=1000", *lock_step, workers=8)
    assert every.summary["dropped"] <= 7 and max(every.column("staleness")) == 7  # those dropped came after the end


def test_stale_synchronous_clocks_never_differ_by_more_than_the_bound_and_one(tmp_path: Path) -> None:
    overrides = ("policy=stale_synchronous:bound=2", "train.samples=400", "optimizer.lr=0.001")
    times = (1.0, 1.2, 2.0, 5.0)
    made = run(tmp_path, *overrides, f"simulation.compute.speeds={[1 / time for time in times]}", workers=4)
    clocks = Counter(dict.fromkeys(range(1, 5), 0))
    pushed: list[int] = []
    gaps, missed = set(), set()
    for line in map(json.loads, made.events):
        if line["event"] == "push" and any(action[0] == "step" for action in line["actions"]):
            missed.add(len(pushed) - line["base"])  # a version for each push used
            pushed.append(line["worker"])
            clocks[line["worker"]] += 1
            gaps.add(max(clocks.values()) - min(clocks.values()))
    assert max(gaps) == 2 + 1
    assert max(missed) == 8 <= (2 * 2 + 1) * (4 - 1)


# ---- stability and stationary variance on c x^2 / 2


@pytest.mark.parametrize(
    ("tau", "threshold"),
    [
        (0, 2.0),
        (1, 1.0),
        (2, 0.618034),
        pytest.param(5, 0.284630, marks=pytest.mark.slow),
        pytest.param(10, 0.149460, marks=pytest.mark.slow),
    ],
)
def test_delayed_descent_is_stable_up_to_its_threshold(tmp_path: Path, tau: int, threshold: float) -> None:
    """alpha c < 2 sin(pi / (2 (2 tau + 1))): 1 % below it decays, 1 % above it diverges."""
    assert 2 * math.sin(math.pi / (2 * (2 * tau + 1))) == pytest.approx(threshold, abs=1e-6)
    workers, steps = tau + 1, 300 * (tau + 1)
    for factor, grows in ((0.99, False), (1.01, True)):
        rate = f"optimizer.lr={factor * threshold * workers}"  # p workers in turn, each with 1/p of the step size
        made = run(tmp_path, "policy=asynchronous", rate, f"train.samples={steps}", workers=workers, task=clean())
        norms = made.column("norm")
        early, late = max(norms[steps // 3 : steps // 2]), max(norms[-steps // 6 :])
        assert (late > 1.05 * early) is grows and (late < 0.95 * early) is not grows


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
DIMENSION = 20_000  # as many independent copies of one coordinate: means are right to a per cent


def wide(**more: float) -> dict[str, Any]:
    """Curvature 1 and noise of deviation 1 in every coordinate, beginning at the minimum."""
    noise = math.sqrt(DIMENSION)
    return {"name": "quadratic", "curvature": [1.0], "dimension": DIMENSION, "noise": noise, "start": 0.0, **more}


def mean_square(made: Run) -> float:
    """E x^2 of a coordinate at the end."""
    return 2 * float(made.summary["metrics"]["loss"]) / DIMENSION


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 4])
def test_synchronous_sgd_has_the_variance_of_its_averaged_noise(tmp_path: Path, workers: int, seed: int) -> None:
    alpha = 0.2
    made = run(
        tmp_path, f"optimizer.lr={alpha}", f"train.samples={60 * workers}", f"seed={seed}", workers=workers, task=wide()
    )
    assert mean_square(made) == pytest.approx(alpha / (2 - alpha) / workers, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_delay_of_one_has_its_variance_and_its_discrepancy(tmp_path: Path, seed: int) -> None:
    """E x^2 = alpha^2 (1 + a) / ((1 - a)(2 a + a^2)) and E D^2 = 2 alpha^2 / ((1 - a)(2 + a)), a = alpha c = 0.2."""
    overrides = ("policy=asynchronous", "optimizer.lr=0.4", "train.samples=200", f"seed={seed}")
    made = run(tmp_path, *overrides, workers=2, task=wide())
    assert mean_square(made) == pytest.approx(0.136364, rel=0.05)
    squares = [distance**2 / DIMENSION for distance in made.column("discrepancy")[100:]]
    assert sum(squares) / len(squares) == pytest.approx(0.045455, rel=0.02)


# ---- the theorems hold with the measured B


@dataclass
class Wells(Task):
    """f(x) = SUM_k x_k^2 / (1 + x_k^2), which is not convex, with L = 2; noise of E||.||^2 = 1."""

    batch_size: int = 1
    dimension: int = 5

    def model(self, seed: int) -> nn.Module:
        made = nn.Linear(1, self.dimension, bias=False)
        nn.init.constant_(made.weight, 1.0)
        return made

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        while True:
            yield torch.randn(self.dimension, generator=generator) / math.sqrt(self.dimension)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        x = model.get_parameter("weight")[:, 0]
        return (x**2 / (1 + x**2)).sum() + batch @ x

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = model.get_parameter("weight").detach()[:, 0].double()
        gradient = 2 * x / (1 + x**2) ** 2
        return {"loss": float((x**2 / (1 + x**2)).sum()), "gradient_square": float(gradient @ gradient)}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_nonconvex_theorem_holds_under_a_delay_of_four(tmp_path: Path, seed: int) -> None:
    T, L, workers = 2000, 2.0, 5
    alpha = 1 / math.sqrt(T)
    made = run(
        tmp_path, "policy=asynchronous", f"optimizer.lr={alpha * workers}", f"train.samples={T}", f"seed={seed}",
        "train.evaluate_every_samples=1", workers=workers, task="test_theory_simulated:Wells",
    )  # fmt: skip
    squares = [5 * (2 / 4) ** 2, *made.column("gradient_square", event="evaluated")[: T - 1]]
    assert len(squares) == T and max(made.column("staleness")) == 4
    B = made.summary["B_max"] * workers  # our B is in units of lr, and each step is of lr / p
    mean = sum(squares) / T
    derived = theory.nonconvex_single(2.5, alpha, T, L, B, 1.0)
    published = 4 * 2.5 / math.sqrt(T) + 2 * B**2 * L**2 / T + 6 * L / math.sqrt(T) + 6 * L**3 * B**2 / T**1.5
    assert 0.01 < mean <= derived <= published


@pytest.mark.parametrize("seed", SEEDS)
def test_the_convex_theorems_hold_in_the_long_run_under_delays_of_three(tmp_path: Path, seed: int) -> None:
    """Curvatures 1, 2, 5, 10, one push of a quarter a step, alpha 0.02: one step of every worker is 4 of those."""
    workers, alpha, T = 4, 0.02, 3000
    overrides = ("policy=asynchronous", f"optimizer.lr={alpha * workers}", f"train.samples={T}", f"seed={seed}")
    made = run(tmp_path, *overrides, "train.evaluate_every_samples=10", workers=workers)
    late = slice(-200, None)
    gap = made.column("loss", event="evaluated")[late]
    square = [distance**2 for distance in made.column("distance", event="evaluated")[late]]
    B = workers * max(made.column("B")[-2000:])  # after the start
    L, c, forever = 10.0, 1.0, 10**6
    assert 0 < sum(gap) / len(gap) <= theory.polyak_lojasiewicz(0.0, alpha, forever, L, c, B, 1.0)
    assert 0 < sum(square) / len(square) <= theory.convex_single(0.0, alpha, forever, L, c, B, 1.0)
    M = max(made.column("norm")[-2000:])
    assert theory.b_missed_steps(3, 1.0, M) >= B
