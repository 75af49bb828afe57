"""The definition estimated over seeds: verdicts, intervals, reasons, exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ps_elastic.analysis.verify import OTHER, Verdict, estimate, noise, play, verify
from ps_elastic.cli import main
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.policies import policies
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.elastic_bound import ElasticBound
from ps_elastic.policies.theory import EQUAL_DATA, REPAID, SMALL_STEP, Bound, Facts

HERE = __name__


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As every command sets it: threads that wait for work on so few numbers cost more than they do."""
    torch.set_num_threads(1)


def setting(policy: str, *overrides: str, **sections: Any) -> Config:
    run: dict[str, Any] = {
        "task": "quadratic",
        "optimizer": {"lr": 1 / 60},
        "train": {"samples": 120},
        "simulation": {"compute": {"name": "exponential", "mean_s": 0.5}},
    }
    return load({**run, "policy": policy, **sections}, overrides, simulated=True)


# ---- the estimate


def test_b_sup_is_the_largest_over_pushes_of_the_rms_over_seeds() -> None:
    squares = np.array([[1.0, 9.0, 0.0], [1.0, 16.0, 25.0]])
    sup, low, high = estimate(squares)
    assert sup == pytest.approx(math.sqrt(12.5))
    assert low <= sup <= high


def test_of_seeds_that_agree_the_interval_is_a_point() -> None:
    assert estimate(np.full((5, 3), 4.0)) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """B^2 = 4 at every push: exponential squares of mean 4, 20 seeds and 5 pushes."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        _, low, high = estimate(generator.exponential(4.0, (20, 5)))
        covered += low <= 2.0 <= high
    assert covered >= 48


# ---- verdicts


def test_every_rule_is_within_its_bound_on_the_quadratic_or_says_why_it_does_not_apply() -> None:
    for name, _ in policies.items():
        extra = ["update=sisa"] if name == "consensus" else []
        verdict = verify(setting(name, "train.samples=60", *extra), 4, 2)
        assert verdict.verdict in ("identity", "within", "not applicable"), verdict
        assert verdict.reason if verdict.verdict == "not applicable" else verdict.formula


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("synchronous", "identity"),
        ("elastic_bound:bound=3.0", "identity"),
        ("delay_bounded:bound=0", "identity"),
        ("asynchronous", "within"),
        ("stale_synchronous:bound=1", "within"),
        ("ringmaster:delay=3", "within"),
        pytest.param("deadline:missing=substitute", "within", marks=pytest.mark.slow),
        ("variance_bounded", "within"),
        pytest.param("variance_bounded:substitute=mean", "within", marks=pytest.mark.slow),
    ],
)
def test_a_bound_is_kept_and_by_how_much_is_told(policy: str, expected: str) -> None:
    verdict = verify(setting(policy), 4, 6)
    assert verdict.verdict == expected
    assert verdict.B_sup is not None and verdict.B_theory is not None and verdict.pushes > 90
    if verdict.B_theory:
        assert verdict.tightness == pytest.approx(verdict.B_sup / verdict.B_theory) and verdict.tightness > 0.02


@dataclass
class Modest(Asynchronous):
    """Declares a tenth of the constant it has, or just about that."""

    factor: float = 0.1

    def declared_bound(self, facts: Facts) -> Bound:
        bound = super().declared_bound(facts)
        assert bound.value is not None
        return bound._replace(value=self.factor * bound.value)


@dataclass
class Boaster(ElasticBound):
    """Promises a tenth of what it keeps to."""

    def limit(self) -> float:
        return super().limit() / 10


def test_a_constant_that_is_too_small_is_exceeded() -> None:
    assert verify(setting(f"{HERE}:Modest:factor=0.02"), 4, 6).verdict == "exceeded"
    assert verify(setting(f"{HERE}:Boaster:bound=3.0"), 4, 2).verdict == "exceeded"


def test_a_constant_inside_the_interval_is_inconclusive() -> None:
    within = verify(setting("asynchronous"), 4, 6)
    assert within.B_sup is not None and within.B_theory is not None
    factor = within.B_sup / within.B_theory
    verdict = verify(setting(f"{HERE}:Modest:factor={factor}"), 4, 6)
    assert verdict.verdict == "inconclusive"
    assert verdict.low is not None and verdict.high is not None and verdict.B_theory is not None
    assert verdict.low < verdict.B_theory < verdict.high


@pytest.mark.parametrize("seeds", [(40, 100, 180), pytest.param(range(0, 200, 20), marks=pytest.mark.slow)], ids=len)
def test_a_bound_that_is_attained_is_not_exceeded_by_the_noise_of_its_M(seeds: Sequence[int]) -> None:
    """With delay 2 the second push may miss the first, which is the largest of all: B_sup comes up to M itself."""
    verdicts = [verify(setting("ringmaster:delay=2", f"seed={seed}"), 4, 4) for seed in seeds]
    assert {verdict.verdict for verdict in verdicts} <= {"within", "inconclusive"}
    assert max(verdict.tightness or 0.0 for verdict in verdicts) > 0.95


# ---- conditions


def broken(verdict: Verdict) -> list[str]:
    assert verdict.verdict == "not applicable" and verdict.conditions is not None and verdict.B_sup is not None
    return [name for name, holds in verdict.conditions.items() if holds is False]


def test_data_that_differ_break_a_theorem_on_the_variance() -> None:
    verdict = verify(setting("variance_bounded", task={"name": "quadratic", "heterogeneity": 3.0}), 4, 2)
    assert broken(verdict) == [EQUAL_DATA] and EQUAL_DATA in verdict.reason


def test_a_step_size_beyond_a_sixth_of_1_over_L_breaks_it() -> None:
    assert broken(verify(setting("variance_bounded", optimizer={"lr": 0.02}), 4, 2)) == [SMALL_STEP]


@pytest.mark.parametrize("policy", ["norm_bounded:beta=0.3", "deadline:missing=substitute"])
def test_a_loss_that_is_never_repaid_breaks_a_theorem_on_omissions(policy: str) -> None:
    faults = {"lost_push": [{"workers": [2], "chance": 0.3}]}
    survive = {"ask_again_s": 3.0}
    verdict = verify(setting(policy, faults=faults, survive=survive), 4, 2)
    assert broken(verdict) == [REPAID] and "repaid" in verdict.reason


def test_a_deadline_that_drops_the_late_is_exact_to_its_own_model_and_says_what_is_lost() -> None:
    verdict = verify(setting("deadline:deadline_s=0.5"), 4, 2)
    assert broken(verdict) == [REPAID] and (verdict.B_sup, verdict.B_theory) == (0.0, 0.0)


def test_momentum_leaves_no_constant_for_variance_bounded_and_error_feedback_is_beside_any() -> None:
    heavy = verify(setting("variance_bounded", "optimizer.momentum=0.9"), 4, 2)
    assert (heavy.verdict, heavy.B_theory) == ("not applicable", None) and "momentum" in heavy.reason
    fed = verify(setting("asynchronous", compressor="top_k:ratio=0.02"), 4, 2)
    assert fed.verdict == "not applicable" and "error feedback" in fed.reason and fed.tightness is not None


# ---- M and sigma


def test_M_and_sigma_come_from_other_seeds() -> None:
    config = setting("asynchronous")
    verdict = verify(config, 4, 4)
    others = [play(replace(config, seed=config.seed + OTHER + k), 4) for k in range(2)]
    norms = np.array([run.measures.pushes.values for run in others])  # type: ignore[attr-defined]
    assert verdict.figures is not None
    assert verdict.figures["M"] == pytest.approx(np.sqrt((norms**2).mean(axis=0).max()), rel=1e-12)
    assert verdict.figures["sigma"] == pytest.approx(1.0, rel=0.3)  # 2 points, 4 workers, 2 seeds of 4 entries


def test_sigma_does_not_see_how_much_workers_differ() -> None:
    config = setting("synchronous", task={"name": "quadratic", "heterogeneity": 50.0, "dimension": 4000})
    from ps_elastic.runtime.build import make_parts

    parts = make_parts(config, 4)
    assert noise(config, parts, 4, parts.layout.empty()) == pytest.approx(1.0, rel=0.03)


def test_one_seed_gives_one_verdict() -> None:
    assert verify(setting("norm_bounded"), 4, 2) == verify(setting("norm_bounded"), 4, 2)


# ---- the command


def test_the_command_prints_a_table_or_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "synchronous", "asynchronous", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "exact" in out and "below bound" in out and "rule" not in out and "tau M/p" in out
    assert main(["verify", "asynchronous", "--seeds", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert (row["policy"], row["verdict"], row["seeds"], document["exceeded"]) == ("asynchronous", "within", 2, [])
    assert set(row) == set(Verdict.__dataclass_fields__)


def test_an_exceeded_bound_is_exit_6(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{HERE}:Modest:factor=0.02", "synchronous", "--seeds", "4", "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["exceeded"] == [f"{HERE}:Modest:factor=0.02"] and document["exit"] == 6


def test_another_task_or_a_configuration_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = "quadratic:heterogeneity=3"
    assert main(["verify", "variance_bounded", "--task", task, "--seeds", "2", "--json"]) == 0
    assert EQUAL_DATA in json.loads(capsys.readouterr().out)["rows"][0]["reason"]
    file = tmp_path / "one.yaml"
    file.write_text(
        "task: helpers:Blobs\noptimizer: {momentum: 0.5}\ntrain: {samples: 160, evaluate_every_samples: 40}\n"
    )
    assert main(["verify", "stale_synchronous:bound=1", "--config", str(file), "--seeds", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["verdict"] == "within" and not row["figures"]["plain"]


def test_a_kept_verdict_is_taken_and_only_for_what_it_is_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["verify", "stale_synchronous:bound=1", "--seeds", "2", "--keep", str(tmp_path), "--json"]
    assert main(call) == 0
    document = capsys.readouterr().out
    monkeypatch.setattr("ps_elastic.analysis.verify.verify", None)
    assert main(call) == 0
    assert capsys.readouterr().out == document
    call[3] = "3"
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "--keep" in said and "the verdict here is on" in said
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:40])
    assert main(call) == 2
    assert f"{file.name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "stale_synchronus"], "nearest 'stale_synchronous'"),
        (["verify", "consensus:quorum=2"], "expected 0 < quorum <= 1"),
        (["verify", "first_k:k=9", "--workers", "2"], "needs 9 workers, got 2"),
        (["verify", "--task", "quadratic", "--config", "x.yaml"], "--task and --config exclude each other"),
        (["verify", "synchronous", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["verify", "--seeds", "1"], "1 is not in the range"),
    ],
)
def test_bad_input_is_exit_2_with_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_among_all_rules_one_that_does_not_fit_is_a_row_that_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "adam.yaml"
    file.write_text("task: quadratic\noptimizer: {name: adam}\ntrain: {samples: 40}\n")
    assert main(["verify", "--config", str(file), "--seeds", "2", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["elastic_bound"]["verdict"] == "not applicable" and "adam" in rows["elastic_bound"]["reason"]
    assert rows["asynchronous"]["verdict"] == "within"
