"""What a run tells of its constant, and of the one that its rule declares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Desk, Run, fit

from ps_elastic.cli._options import recheck
from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import CHECK_FAILED
from ps_elastic.policies import Policy, theory
from ps_elastic.policies.events import Action, Push, Release, Step
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.elastic_bound import ElasticBound
from ps_elastic.policies.rules.norm_bounded import NormBounded
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.policies.rules.variance_bounded import VarianceBounded
from ps_elastic.policies.theory import Bound, Facts

QUADRATIC = {"task": "quadratic", "optimizer": {"lr": 1 / 60}}


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def quadratic(folder: Path, *overrides: str, workers: int = 4, samples: int = 200) -> Run:
    return fit(folder, QUADRATIC, *overrides, workers=workers, samples=samples)


# ---- the measured quantities


def test_M_is_the_rms_of_decoded_pushes_for_plain_sgd_and_else_of_what_was_applied(tmp_path: Path) -> None:
    plain = quadratic(tmp_path, "policy=asynchronous")
    expected = 3 * rms(plain.column("payload_norm")) / 4
    assert plain.summary["B_theory"] == pytest.approx(expected, rel=1e-12)
    heavy = quadratic(tmp_path, "policy=asynchronous", "optimizer.momentum=0.9")
    assert heavy.summary["B_theory"] > 3 * expected and heavy.summary["bound_holds"]
    assert "applied updates" in heavy.summary["B_theory_text"]


def test_what_was_applied_is_the_move_over_alpha_and_share() -> None:
    desk = Desk(Asynchronous(), 2, optimizer=Optimizer(lr=0.5, momentum=0.5))
    desk.push(1, 1.0)
    desk.push(2, 1.0)
    facts = desk.server.measures.facts(1, Optimizer(momentum=0.5), "gradient")
    assert facts.M == facts.M_applied == pytest.approx(8 * rms([1.0, 1.5]))  # 64 entries
    assert facts.M_push == pytest.approx(8) and not facts.plain and facts.sigma is None


def test_sigma_is_the_spread_of_the_pushes_of_a_step() -> None:
    for policy, missing in ((Synchronous(), 0), (VarianceBounded(quorum=0.5, substitute="mean"), 2)):
        desk = Desk(policy, 4)
        vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 2
        for worker in range(4 - missing):
            desk.push(worker + 1, vectors[worker])
        used = vectors[: 4 - missing].double()
        spread = float((used - used.mean(dim=0)).pow(2).sum()) / (len(used) - 1)
        assert desk.server.measures.facts(0, Optimizer(), "gradient").sigma == pytest.approx(
            math.sqrt(spread), rel=1e-4
        )


def test_a_zero_that_stands_in_does_not_change_sigma() -> None:
    desk = Desk(VarianceBounded(quorum=0.5), 4)
    desk.push(1, 3.0)
    desk.push(2, 1.0)
    sigma = desk.server.measures.facts(0, Optimizer(), "gradient").sigma
    assert sigma == pytest.approx(8 * math.sqrt(2), rel=1e-6)


def test_debts_are_counted_with_how_late_they_were_and_which_were_lost() -> None:
    desk = Desk(NormBounded(beta=0.3), 4)
    for worker in (1, 2, 3, 4):
        desk.push(worker)
    measures = desk.server.measures
    for _ in range(2):
        desk.push(1)
        desk.push(2)
    assert (measures.owed, measures.lateness, measures.lost) == (2, 2, 0)
    desk.take(desk.server.leave(4, 20.0))
    desk.push(3)
    assert (measures.owed, measures.lateness, measures.lost) == (2, 2, 1)


def test_what_the_end_of_a_run_cuts_off_is_not_lost() -> None:
    desk = Desk(NormBounded(beta=0.3), 4)
    for worker in (1, 2, 3, 4, 1, 2):
        desk.push(worker)
    assert desk.server.ledger.debts
    desk.take(desk.server.stop(20.0))
    assert not desk.server.ledger.debts and desk.server.measures.lost == 0


def test_workers_are_counted_as_they_come_and_go() -> None:
    desk = Desk(Asynchronous(), 3)
    desk.take(desk.server.leave(2, 1.0))
    desk.take(desk.server.leave(3, 1.0))
    for worker in (2, 3, 4, 5):
        desk.take(desk.server.join(worker, 2.0))
    measures = desk.server.measures
    assert (measures.fewest, measures.most) == (1, 5)


# ---- the summary


def test_a_bound_that_holds_on_every_push_says_so(tmp_path: Path) -> None:
    summary = quadratic(tmp_path, "policy=elastic_bound:bound=2.0", "optimizer.momentum=0.5").summary
    assert (summary["B_theory"], summary["B_theory_kind"], summary["bound_holds"]) == (2.0, "declared", True)
    assert 1.0 < summary["B_max"] <= 2.0 * (1 + 1e-5)
    assert "admits" in summary["B_theory_text"]


def test_a_budget_in_multiples_tells_its_value_at_the_end(tmp_path: Path) -> None:
    run = quadratic(tmp_path, "policy=elastic_bound:bound=2M")
    assert run.summary["B_theory"] == pytest.approx(2 * rms(run.column("payload_norm")), rel=0.02)
    assert run.summary["bound_holds"] is True and "admits 8 pushes" in run.summary["B_theory_text"]


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("schedule", ["warmup_samples=60", "name=cosine"])
def test_elastic_bound_keeps_its_promise_through_momentum_decay_and_schedules(
    tmp_path: Path, settings: dict[str, Any], schedule: str
) -> None:
    words = [f"optimizer.{key}={str(value).lower()}" for key, value in settings.items()]
    run = quadratic(tmp_path, "policy=elastic_bound:bound=3.0", f"schedule.{schedule}", *words, samples=160)
    assert run.summary["bound_holds"] is True
    assert max(run.column("B")) <= 3.0 * (1 + 1e-5)
    assert max(run.column("B")) > 1.5 and run.summary["held_max"] > 1  # and it had to hold for it


@dataclass
class Boaster(ElasticBound):
    """Promises a tenth of what it keeps to."""

    def limit(self) -> float:
        return super().limit() / 10


@dataclass
class Liar(Asynchronous):
    """Declares a constant that no asynchronous run has."""

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(1e-3, "1e-3")


@pytest.mark.parametrize("rule", ["Boaster:bound=3.0", "Liar"])
def test_a_broken_promise_is_told_and_fails_the_check(tmp_path: Path, rule: str) -> None:
    run = quadratic(tmp_path, f"policy={__name__}:{rule}")
    assert run.summary["bound_holds"] is False
    assert recheck(run.summary)["exit"] == CHECK_FAILED


@dataclass
class Quiet(Policy):
    """A rule from outside that says nothing of a constant."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        yield Release((push.id.worker,))


def test_a_rule_that_declares_nothing_gets_nulls(tmp_path: Path) -> None:
    summary = quadratic(tmp_path, f"policy={__name__}:Quiet").summary
    assert [summary[key] for key in ("B_theory", "B_theory_kind", "bound_holds")] == [None, None, None]
    assert summary["B_theory_text"] == "the policy declares no constant" and summary["B_rms"] > 0


def test_a_constant_that_does_not_apply_says_why(tmp_path: Path) -> None:
    summary = quadratic(tmp_path, "policy=variance_bounded", "optimizer.momentum=0.9").summary
    assert summary["B_theory"] is None and summary["bound_holds"] is None
    assert "momentum" in summary["B_theory_text"]


def test_adam_is_measured_by_what_it_applies(tmp_path: Path) -> None:
    run = quadratic(tmp_path, "policy=asynchronous", "optimizer.name=adam")
    assert run.summary["bound_holds"] is True and "applied updates" in run.summary["B_theory_text"]
    assert run.summary["B_theory"] == pytest.approx(3 / 4 * 2, rel=0.5)  # Adam moves each of 4 entries by about alpha


def test_with_discrepancy_off_nothing_is_said_to_hold(tmp_path: Path) -> None:
    summary = quadratic(tmp_path, "policy=asynchronous", "tracker.discrepancy=off").summary
    assert summary["B_theory"] is not None and summary["bound_holds"] is None
    assert "nothing was measured" in summary["B_theory_text"]


def test_error_feedback_and_its_absence_are_told(tmp_path: Path) -> None:
    fed, lost = (
        quadratic(tmp_path, "compressor=top_k:ratio=0.02", f"compressor.error_feedback={on}").summary
        for on in ("true", "false")
    )
    assert fed["B_residual"]["rms"] > 0 and "error feedback keeps back B_residual" in fed["B_theory_text"]
    assert lost["B_residual"] is None and "what the compressor leaves out is lost" in lost["B_theory_text"]


def test_the_residuals_bound_is_that_of_the_compressor(tmp_path: Path) -> None:
    run = quadratic(tmp_path, "compressor=top_k:ratio=0.02")
    gamma = run.config.compressor.plugin.build().gamma(64)
    M = rms(run.column("norm"))
    assert run.summary["B_residual"]["theory"] == pytest.approx(theory.b_error_feedback(gamma, M), rel=1e-9)


def test_owed_pushes_larger_than_the_rest_prove_nothing() -> None:
    """One gradient of 100, owed for long among gradients of 1: M, an rms, says nothing about it."""
    desk = Desk(NormBounded(beta=0.3), 4)
    for worker in (1, 2, 3, 4):
        desk.push(worker, 1.0)
    for _ in range(40):
        for worker in (1, 2, 3):
            desk.push(worker, 1.0)
    desk.push(4, 100.0)
    totals, facts = desk.server.totals, desk.server.measures.facts(0, Optimizer(), "gradient")
    bound = desk.server.policy.declared_bound(facts)
    assert bound is not None and bound.value is not None
    scaled = totals.scaled.as_dict("rms")["rms"]
    assert scaled is not None and scaled > bound.value
    from ps_elastic.config.load import load
    from ps_elastic.runtime.summary import against_theory

    told = against_theory(load({"task": "quadratic", "policy": "norm_bounded:beta=0.3"}), desk.server)
    assert told["bound_holds"] is None and "larger than M" in told["B_theory_text"]
