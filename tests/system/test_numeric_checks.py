"""The numbers that theory gives for small systems, found again in what our rules, compressors and server do.

Where noise is averaged over, it is over the coordinates of one run: a quadratic of many coordinates alike is as many
independent runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import Desk, Point, fit
from torch import Tensor, nn

from ps_elastic.analysis.verify import play, verify
from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.compressors.top_k import TopK
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.config.sections import Optimizer
from ps_elastic.policies import Policy, theory
from ps_elastic.policies.rules.deadline import Deadline
from ps_elastic.policies.rules.norm_bounded import NormBounded
from ps_elastic.policies.rules.variance_bounded import VarianceBounded
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime import loops
from ps_elastic.runtime.build import make_parts, make_server, make_worker
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.tasks import Task
from ps_elastic.vectors.layout import Layout


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As every command sets it: threads that wait for work on so few numbers cost more than they do."""
    torch.set_num_threads(1)


MANY = 19_968  # coordinates: a multiple of the padding


def watch(source: dict[str, Any], workers: int) -> tuple[list[Tensor], dict[str, Any]]:
    """x after every push of a run in turn, without the padding; and the summary's counts."""
    config = load(source)
    parts = make_parts(config, workers)
    server, _ = make_server(config, parts, workers, _silent(0), lambda line: None, background=False)
    made = {rank: make_worker(config, _own_model(parts, config), rank, workers, _silent(rank))
            for rank in range(1, workers + 1)}  # fmt: skip
    seen: list[Tensor] = []
    loops.take_turns(server, made, lambda now: seen.append(server.store.x[: parts.layout.numel].clone()))
    return seen, server.totals.summary(1.0)


def _silent(rank: int) -> Tracker:
    return Tracker(rank, lambda line: None)


def _own_model(parts: Any, config: Config) -> Any:
    return parts._replace(model=parts.task.model(config.seed))


# ---- 5: noise through a delay of one step


def test_noise_through_a_delay_of_one_has_its_variance_and_its_discrepancy(tmp_path: Path) -> None:
    """Two workers in turn, a = alpha c = 0.2: E x^2 = alpha^2 sigma^2 (1+a)/((1-a)(2a+a^2)), E D^2 as below."""
    task = {"name": "quadratic", "curvature": [1.0], "dimension": MANY, "noise": math.sqrt(MANY), "start": 0.0}
    run = {"task": task, "policy": "asynchronous", "optimizer": {"lr": 0.4}, "train": {"samples": 120}}
    seen, _ = watch(run, 2)
    a = 0.2
    variance = sum(float(x.pow(2).mean()) for x in seen[40:120]) / 80
    # As many coordinates, and 80 steps that forget within ten: 0.3 % and less.
    assert (
        variance
        == pytest.approx(a**2 * (1 + a) / ((1 - a) * (2 * a + a**2)), rel=0.01)
        == pytest.approx(0.136364, rel=1e-5)
    )
    lines = fit(tmp_path, run, workers=2).lines(0, "used")[40:]
    squares = sum(line["discrepancy"] ** 2 for line in lines) / len(lines) / MANY
    assert squares == pytest.approx(2 * a**2 / ((1 - a) * (2 + a)), rel=0.01) == pytest.approx(0.0454545, rel=1e-5)


# ---- 6: what stands in for missing gradients

P, M = 8, 3


def one_round_late(policy: Policy, mean: float, full_rounds: int) -> float:
    """E D^2/alpha^2 of a coordinate where 3 of 8 workers miss a round and come before the next ends."""
    generator = torch.Generator().manual_seed(0)
    desk = Desk(policy, P, MANY, optimizer=Optimizer(lr=0.5))

    def push(worker: int) -> None:
        desk.push(worker, mean + torch.randn(MANY, generator=generator))

    for worker in list(range(1, P + 1)) * full_rounds:
        push(worker)
    for worker in range(1, P - M + 1):
        push(worker)
    assert len(desk.server.ledger.debts) == M
    for worker in range(P - M + 1, P + 1):  # late
        push(worker)
    for worker in range(1, P - M + 1):
        push(worker)
    step = full_rounds + 2
    lines = [line for line in desk.told("used") if line["step"] == step and line["worker"] <= P - M]
    assert len(lines) == P - M and all(line["x"] == "ideal" for line in lines)
    return sum((line["discrepancy"] / 0.5) ** 2 for line in lines) / len(lines) / MANY


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_own_gradient_as_stand_in(mean: float) -> None:
    measured = one_round_late(VarianceBounded(quorum=5 / 8), mean, 0)
    assert measured == pytest.approx(theory.b_own_placeholder(M, P, 1.0) ** 2, rel=0.02) == pytest.approx(0.1875)
    assert measured <= theory.b_variance_bounded(M, P, 1.0) ** 2 == pytest.approx(1.265625)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_mean_of_the_received_as_stand_in(mean: float) -> None:
    measured = one_round_late(VarianceBounded(quorum=5 / 8, substitute="mean"), mean, 0)
    assert measured == pytest.approx(theory.b_mean_placeholder(M, P, 1.0) ** 2, rel=0.02) == pytest.approx(0.075)


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 0.046875), (1.0, 0.1875)])
@pytest.mark.parametrize("rule", [lambda: Deadline(deadline_s=3.9, missing="substitute"), lambda: NormBounded(0.62)])
def test_zero_as_stand_in(rule: Any, mean: float, expected: float) -> None:
    policy = rule()
    measured = one_round_late(policy, mean, 0 if isinstance(policy, Deadline) else 1)
    assert (
        measured == pytest.approx(theory.b_zero_placeholder(M, P, 1.0, mean) ** 2, rel=0.03) == pytest.approx(expected)
    )


def three_late(policy: str, heterogeneity: float = 0.0, samples: int = 4000) -> Config:
    """Eight workers on the quadratic, of whom three are a hair slower than the others: late in every round."""
    task = {"name": "quadratic", "heterogeneity": heterogeneity}
    speeds = [1.0] * (P - M) + [0.9999] * M
    compute = {"name": "constant", "mean_s": 1.0, "speeds": speeds}
    run = {"task": task, "optimizer": {"lr": 1 / 60}, "train": {"samples": samples}, "simulation": {"compute": compute}}
    return load({**run, "policy": policy}, simulated=True)


@pytest.mark.parametrize(
    ("policy", "noise", "bound"),
    [
        ("variance_bounded:quorum=0.625", theory.b_own_placeholder(M, P, 1.0), 1.125),
        pytest.param(
            "variance_bounded:quorum=0.625:substitute=mean",
            theory.b_mean_placeholder(M, P, 1.0),
            1.125,
            marks=pytest.mark.slow,
        ),
        ("norm_bounded:beta=0.3", theory.b_zero_placeholder(M, P, 1.0, 0.0), None),
    ],
)
def test_in_a_full_loop_B_is_little_above_the_noise_of_the_stand_in(
    policy: str, noise: float, bound: float | None
) -> None:
    run = play(three_late(policy), P)
    facts = run.measures.facts(run.staleness, Optimizer(), "gradient")
    assert facts.lateness == 1 and facts.lost == 0
    on_time = [b for turn, b in enumerate(run.scaled[2000:]) if turn % P < P - M]  # a round has 8, in worker order
    measured = math.sqrt(sum(b * b for b in on_time) / len(on_time))
    if bound is None:  # at most how many are missing is for the norms to say
        assert measured <= theory.b_norm_bounded(facts.owed, P, facts.M)
    else:
        assert facts.owed == M
        assert 0.95 * noise < measured < 1.2 * noise < bound


@pytest.mark.parametrize("substitute", ["own", pytest.param("mean", marks=pytest.mark.slow)])
def test_far_from_the_optimum_too_no_view_is_farther_than_the_noise_of_its_stand_ins(substitute: str) -> None:
    """Where gradients are eleven times their noise: zero in place of one would be 11/8, with 3 sigma m/p = 9/8."""
    verdict = verify(three_late(f"variance_bounded:quorum=0.625:substitute={substitute}", samples=400), P, 6)
    assert verdict.verdict == "within" and verdict.formula == "3 sigma m/p"
    assert verdict.B_theory == pytest.approx(1.125, rel=0.15) and verdict.B_theory_kind == "declared"


def test_with_data_that_differ_an_own_gradient_does_not_do() -> None:
    verdict = verify(three_late("variance_bounded:quorum=0.625", heterogeneity=6.0, samples=800), P, 2)
    assert verdict.verdict == "not applicable" and "equal data" in verdict.reason
    assert verdict.B_sup is not None and verdict.B_theory is not None
    assert verdict.low > verdict.B_theory == pytest.approx(1.125, rel=0.1)
    assert verdict.conditions is not None
    assert [name for name, holds in verdict.conditions.items() if not holds] == ["equal data on all workers"]


# ---- 7, 9, 11: error feedback


@dataclass
class Contraction(Compressor):
    """Q(w) = (1 - sqrt(gamma)) w: attains the bound on residuals."""

    square: float = 0.5  # gamma

    def encode(self, vector: Tensor) -> Payload:
        return (vector * (1 - math.sqrt(self.square)),)

    def accumulate(self, payload: Payload, out: Tensor, weight: float = 1.0) -> None:
        out.add_(payload[0], alpha=weight)

    def check(self, payload: Payload, numel: int) -> None:
        assert payload[0].shape == (numel,)

    def max_nbytes(self, numel: int) -> int:
        return 4 * numel

    def gamma(self, numel: int) -> float:
        return self.square


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_residual_of_a_contraction_attains_its_bound(gamma: float) -> None:
    feedback = ErrorFeedback(Contraction(gamma), 2)
    for _ in range(400):
        feedback.encode(torch.tensor([3.0, 4.0]))
    derived, published = theory.b_error_feedback(gamma, 5.0), theory.b_error_feedback_published(gamma, 5.0)
    assert float(feedback.residual.norm()) == pytest.approx(derived, rel=1e-5)
    assert derived < published


def test_a_run_tells_the_residuals_part_beside_its_bound(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Slope", "policy=synchronous", f"compressor={__name__}:Contraction:square=0.5",
              workers=2, samples=400)  # fmt: skip
    residual = run.summary["B_residual"]
    assert residual["theory"] == pytest.approx(2.41421 * 5, rel=1e-4)
    assert residual["rms"] == pytest.approx(residual["theory"], rel=0.05) and residual["rms"] <= residual["theory"]
    assert "error feedback" in run.summary["B_theory_text"]
    assert (run.summary["B_theory"], run.summary["bound_holds"]) == (0.0, True)


def test_residuals_of_top_10_of_100_random_entries_are_far_below_their_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    workers = [ErrorFeedback(TopK(ratio=0.1), 100) for _ in range(4)]
    squares, of_mean, norms = 0.0, 0.0, 0.0
    for step in range(1200):
        for feedback in workers:
            g = torch.randn(100, generator=generator)
            norms += float(g.pow(2).sum()) * (step >= 200)
            feedback.encode(g)
            squares += float(feedback.residual.pow(2).sum()) * (step >= 200)
        of_mean += float((sum(f.residual for f in workers) / 4).pow(2).sum()) * (step >= 200)
    m = math.sqrt(norms / 4000)
    each, mean = math.sqrt(squares / 4000) / m, math.sqrt(of_mean / 1000) / m
    gamma = TopK(ratio=0.1).gamma(100)
    assert theory.b_error_feedback(gamma, 1.0) == pytest.approx(18.49, rel=1e-3)
    assert theory.b_error_feedback_published(gamma, 1.0) == pytest.approx(31.46, rel=1e-3)
    # Of independent residuals the mean has half the norm of each.
    assert mean == pytest.approx(each / 2, rel=0.05) and each < 4


@dataclass
class Valleys(Task):
    """f_i = <a_i, x>^2 + |x|^2/4, a_i the cyclic shifts of (-3, 2, 2): the largest entry of no gradient tells."""

    batch_size: int = 1
    slopes: ClassVar[list[list[float]]] = [[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]]

    def model(self, seed: int) -> nn.Module:
        return Point(torch.ones(3))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(self.slopes[worker - 1])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        x = model.get_parameter("x")
        return (batch @ x) ** 2 + (x @ x) / 4

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(model.get_parameter("x").detach().norm())}


def test_top_1_without_error_feedback_diverges_where_workers_differ() -> None:
    compressor = {"name": "top_k", "ratio": 0.01, "error_feedback": False}
    run = {"task": f"{__name__}:Valleys", "compressor": compressor, "optimizer": {"lr": 0.05}}
    seen, _ = watch({**run, "train": {"samples": 60}}, 3)
    for round_, x in enumerate(seen[2:60:3], 1):
        assert x == pytest.approx([(1 + 11 * 0.05 / 6) ** round_] * 3, rel=1e-5)
    assert float(seen[2][0]) == pytest.approx(1.091667, rel=1e-6)


@pytest.mark.parametrize(("samples", "left"), [(1500, 1e-2), pytest.param(4500, 1e-6, marks=pytest.mark.slow)])
def test_top_1_with_error_feedback_converges_there(samples: int, left: float) -> None:
    compressor = {"name": "top_k", "ratio": 0.01, "error_feedback": True}
    run = {"task": f"{__name__}:Valleys", "compressor": compressor, "optimizer": {"lr": 0.01}}
    seen, _ = watch({**run, "train": {"samples": samples}}, 3)
    assert float(seen[-1].norm()) < left  # the least curvature is 7/6: e^-5.8 of where it began, and e^-17


# ---- 10: what a late gradient leaves behind with momentum


def test_a_late_gradient_injected_as_one_leaves_an_excess_and_amended_none() -> None:
    """Withheld at one step and injected at the next: x is off by alpha mu^k delta after k more. Amended: by nothing."""
    settings, delta, zero = Optimizer(momentum=0.9), torch.tensor([1.7]), torch.zeros(1)

    def ball() -> tuple[Tensor, FlatOptimizer]:
        layout = Layout(Point(torch.zeros(1)))
        x = layout.empty()
        return x, FlatOptimizer(settings, layout, x)

    size = ball()[0].numel()
    pad = lambda g: torch.nn.functional.pad(g, (0, size - 1))  # noqa: E731
    (whole, on_time), (injected, late), (amended, exact) = ball(), ball(), ball()
    on_time.step(pad(delta), 0.1)
    late.step(pad(zero), 0.1)
    exact.step(pad(zero), 0.1)
    exact.amend(pad(delta), exact.respond(0.1))
    for k in range(6):
        on_time.step(pad(zero), 0.1)
        late.step(pad(delta if k == 0 else zero), 0.1)
        exact.step(pad(zero), 0.1)
        assert float(injected[0] - whole[0]) == pytest.approx(0.1 * 0.9 ** (k + 1) * 1.7, rel=1e-4)
        assert float(amended[0]) == pytest.approx(float(whole[0]), rel=1e-6)


# ---- 19: the rates


@dataclass
class Wells(Task):
    """f = SUM x^2/(1 + x^2) in 5 dimensions, L = 2, with noise of sigma = 1 on the gradient."""

    batch_size: int = 1

    def model(self, seed: int) -> nn.Module:
        return Point(torch.ones(5))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + worker)
        while True:
            yield torch.randn(5, generator=generator) / math.sqrt(5)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        x = model.get_parameter("x")
        return (x**2 / (1 + x**2)).sum() + batch @ x

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}


def test_the_nonconvex_rate_bounds_what_five_workers_in_turn_reach() -> None:
    T, L, alpha = 2000, 2.0, 1 / math.sqrt(2000)
    run = {"task": f"{__name__}:Wells", "policy": "asynchronous", "optimizer": {"lr": 5 * alpha}}
    seen, counted = watch({**run, "train": {"samples": T}}, 5)
    assert counted["staleness"]["max"] == 4
    xs = torch.stack(seen[:T])
    gradients = 2 * xs / (1 + xs**2) ** 2
    reached = float(gradients.pow(2).sum(dim=1).mean())
    B = 5 * counted["B_rms"]  # alpha is a fifth of the step size of a round
    bound = theory.nonconvex_single(2.5, alpha, T, L, B, 1.0)  # f(x_0) = 5/2
    published = 4 * 2.5 / math.sqrt(T) + 2 * B**2 * L**2 / T + 6 * L / math.sqrt(T) + 6 * L**3 * B**2 / T**1.5
    assert 0.02 < reached <= bound <= published < 1


@pytest.mark.parametrize("samples", [2000, pytest.param(4000, marks=pytest.mark.slow)])
def test_the_convex_rates_bound_where_four_workers_in_turn_rest(samples: int) -> None:
    alpha, c = 0.02, torch.tensor([1.0, 2.0, 5.0, 10.0])
    run = {"task": "quadratic", "policy": "asynchronous", "optimizer": {"lr": 4 * alpha}}
    seen, _ = watch({**run, "train": {"samples": samples}}, 4)
    rest = torch.stack(seen[1000:samples])
    gap, square = float((rest**2 @ c).mean()) / 2, float(rest.pow(2).sum(dim=1).mean())
    _, counted = watch({**run, "task": {"name": "quadratic", "start": 0.0}, "train": {"samples": samples}}, 4)
    B = 4 * counted["B_rms"]
    assert 0.004 < gap <= theory.polyak_lojasiewicz(70.0, alpha, 10**5, 10.0, 1.0, B, 1.0) < 0.4
    assert 0.003 < square <= theory.convex_single(4.0, alpha, 10**5, 10.0, 1.0, B, 1.0) < 0.4
