"""Bounds as functions: against the recursions they solve, the published numbers, and one another."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ps_elastic.policies import Policy, policies, theory
from ps_elastic.policies.theory import EQUAL_DATA, REPAID, SMALL_STEP, Facts

SOME: dict[str, Any] = {"alpha": 0.01, "L": 10.0, "B": 3.0, "sigma": 2.0}
FACTS = Facts(p=8, fewest=8, M=2.0, M_push=2.0, M_applied=2.0, sigma=0.5, tau=6, shares=1.5, owed=3, lateness=1)


# ---- rates


def test_the_terms_of_the_nonconvex_rate_are_those_of_its_theorem() -> None:
    start = theory.nonconvex_single(5.0, 0.01, 100, 10.0, 0.0, 0.0)
    inconsistency = theory.nonconvex_single(0.0, 0.01, 100, 10.0, 3.0, 0.0)
    noise = theory.nonconvex_single(0.0, 0.01, 100, 10.0, 0.0, 2.0)
    assert (start, inconsistency, noise) == pytest.approx((10.0, 0.09, 0.4))
    assert theory.nonconvex_single(5.0, T=100, **SOME) == pytest.approx(start + inconsistency + noise)


def test_steps_of_everybody_gain_a_factor_p_in_the_noise_and_steps_of_half_lose_a_factor_2() -> None:
    single = theory.nonconvex_single(5.0, 0.01, 100, 10.0, 3.0, 2.0 / math.sqrt(8))
    everybody = theory.nonconvex_parallel(5.0, T=100, p=8, everybody=True, **SOME)
    assert everybody == pytest.approx(single)
    assert theory.nonconvex_parallel(5.0, T=100, p=8, **SOME) == pytest.approx(2 * everybody)
    assert theory.nonconvex_any_size(5.0, S=100, p=8, **SOME) == pytest.approx(everybody)


def test_the_convex_rate_is_what_its_recursion_comes_to() -> None:
    """e <- (1 - alpha c/2) e + alpha^2 sigma^2 + alpha^3 (2L + c) B^2 is its one-step form; p = 4, everybody."""
    alpha, c, L, B, sigma, p = 0.02, 1.0, 10.0, 3.0, 2.0, 4
    error, bounds = 7.0, []
    for T in range(400):
        bounds.append(theory.convex_parallel(7.0, alpha, T, L, c, B, sigma, p, everybody=True))
        assert error <= bounds[-1]
        error = (1 - alpha * c / 2) * error + alpha**2 * sigma**2 / p + alpha**3 * (2 * L + c) * B**2
    for _ in range(10_000):
        error = (1 - alpha * c / 2) * error + alpha**2 * sigma**2 / p + alpha**3 * (2 * L + c) * B**2
    assert error == pytest.approx(theory.convex_parallel(7.0, alpha, 10**5, L, c, B, sigma, p, everybody=True))
    assert theory.convex_single(7.0, alpha, 9, L, c, B, sigma) == theory.convex_parallel(
        7.0, alpha, 9, L, c, B, sigma, 1, everybody=True
    )
    assert theory.convex_parallel(7.0, alpha, 50, L, c, B, sigma, p) > bounds[50]  # half of them may be missing


def test_the_polyak_lojasiewicz_rate_is_what_its_recursion_comes_to() -> None:
    """e <- (1 - alpha c) e + alpha L^2 alpha^2 B^2/2 + L alpha^2 sigma^2/(2p)."""
    alpha, c, L, B, sigma, p = 0.02, 1.0, 10.0, 3.0, 2.0, 4
    error = 7.0
    for T in range(3000):
        assert error <= theory.polyak_lojasiewicz(7.0, alpha, T, L, c, B, sigma, p) * (1 + 1e-12)
        error = (1 - alpha * c) * error + alpha * (L * alpha * B) ** 2 / 2 + L * (alpha * sigma) ** 2 / (2 * p)
    assert error == pytest.approx(theory.polyak_lojasiewicz(7.0, alpha, 10**5, L, c, B, sigma, p))


@pytest.mark.parametrize(
    "call",
    [
        lambda alpha: theory.nonconvex_single(1.0, alpha, 10, 10.0, 1.0, 1.0),
        lambda alpha: theory.nonconvex_parallel(1.0, alpha, 10, 10.0, 1.0, 1.0, 4),
        lambda alpha: theory.nonconvex_any_size(1.0, alpha, 10, 10.0, 1.0, 1.0, 4),
        lambda alpha: theory.convex_single(1.0, alpha / 2, 10, 10.0, 1.0, 1.0, 1.0),
        lambda alpha: theory.convex_parallel(1.0, alpha / 2, 10, 10.0, 1.0, 1.0, 1.0, 4),
        lambda alpha: theory.polyak_lojasiewicz(1.0, alpha, 10, 10.0, 1.0, 1.0, 1.0),
    ],
)
def test_a_rate_outside_its_condition_is_refused(call: Any) -> None:
    call(0.1)
    with pytest.raises(ValueError, match=r"the bound needs alpha L <= 1(/2)?, got alpha = 0\.\d+, L = 10"):
        call(0.1001)


# ---- constants


@pytest.mark.parametrize(
    ("gamma", "derived", "published"), [(0.5, 2.414, 2.449), (0.9, 18.49, 31.46), (0.99, 198.5, 1000)]
)
def test_error_feedback_has_the_tabled_constants(gamma: float, derived: float, published: float) -> None:
    assert theory.b_error_feedback(gamma, 1.0) == pytest.approx(derived, rel=1e-3)
    assert theory.b_error_feedback_published(gamma, 1.0) == pytest.approx(published, rel=6e-3)
    assert theory.b_error_feedback_single(gamma, 1.0, 4) == 4 * theory.b_error_feedback(gamma, 1.0)


def test_without_a_contraction_residuals_have_no_bound() -> None:
    assert theory.b_error_feedback(1.0, 1.0) == theory.b_error_feedback_published(1.0, 1.0) == math.inf


def test_constants_of_the_table() -> None:
    assert theory.b_shared_memory(5, 2.0) == 10
    assert (
        theory.b_message_passing(8, 6, 2.0) == 7 * 6 * 2 / 8 < theory.b_message_passing(8, 6, 2.0, reapplies_own=False)
    )
    assert theory.b_message_passing_variance(8, 6, 0.5) == 3 * 7 * 6 * 0.5 / 8
    assert theory.b_stale_synchronous(4, 2, 2.0) == 5 * 3 * 2 / 4
    assert theory.b_crash(2, 8, 2.0) == theory.b_norm_bounded(2, 8, 2.0) == 0.5
    assert theory.b_crash_variance(2, 8, 0.5) == theory.b_variance_bounded(2, 8, 0.5) == 3 * 2 * 0.5 / 8
    assert theory.b_norm_bounded_announced(0.8, 2.0) == pytest.approx(0.4)
    assert theory.b_local_steps(5, 1.0, 2) == 4


def test_late_by_one_round_costs_nothing_more_and_each_further_one_m_M_over_4p() -> None:
    bounds = [theory.b_variance_bounded(3, 8, 0.5, lateness, 2.0) for lateness in (0, 1, 2, 3)]
    assert bounds[0] == bounds[1] and [b - bounds[1] for b in bounds[2:]] == pytest.approx([6 / 32, 12 / 32])


def test_stand_ins_rank_as_theory_says() -> None:
    """The mean of the received beats an own gradient; zero beats both where the gradient is 0 and loses far off."""
    own, mean = theory.b_own_placeholder(3, 8, 1.0), theory.b_mean_placeholder(3, 8, 1.0)
    assert theory.b_zero_placeholder(3, 8, 1.0, 0.0) < mean < own < theory.b_zero_placeholder(3, 8, 1.0, 1.1)
    assert theory.b_zero_placeholder(3, 8, 1.0, 1.0) == pytest.approx(own)
    assert theory.b_own_placeholder(7, 8, 1.0) == pytest.approx(theory.b_mean_placeholder(7, 8, 1.0))  # one received


# ---- what rules declare

DECLARED: dict[str, float] = {
    "asgrad": 6 * 2, "asynchronous": 6 * 2 / 8, "consensus": 0, "deadline": 0, "deadline:substitute": 3 * 2 / 8,
    "delay_bounded": 4 * 2, "delay_compensated": 6 * 2, "elastic_bound": 4 * 2, "fedbuff": 6 * 2, "first_k": 0,
    "norm_bounded": 3 * 2 / 8, "random_subset": 0, "rennala": 0, "ringmaster": 3 * 2, "softsync": 6 * 2,
    "stale_synchronous": 9 * 7 * 2 / 8, "staleness_aware": 1.5 * 2, "synchronous": 0, "value_bounded": 10,
    "variance_bounded": 3 * 0.5 * 4 / 8,
}  # fmt: skip
OBSERVED = {"asgrad", "asynchronous", "delay_compensated", "fedbuff", "norm_bounded", "softsync", "staleness_aware"}


def test_every_rule_declares_its_constant_or_why_there_is_none() -> None:
    silent = [name for name, cls in policies.items() if cls.declared_bound is Policy.declared_bound]
    assert not silent
    for name, cls in policies.items():
        bound = cls().declared_bound(FACTS)
        assert bound is not None and bound.formula
        if name in DECLARED:
            assert bound.value == pytest.approx(DECLARED[name]), name
            assert bound.kind == ("observed" if name in OBSERVED else "declared"), name


def test_a_deadline_that_lets_zero_stand_in_has_the_constant_of_omissions() -> None:
    rule = policies.load("deadline")(missing="substitute")  # type: ignore[call-arg]
    bound = rule.declared_bound(FACTS)
    assert bound is not None and (bound.value, bound.kind) == (DECLARED["deadline:substitute"], "observed")
    assert bound.conditions == (REPAID,) and not bound.broken


@pytest.mark.parametrize("name", ["deadline", "norm_bounded", "variance_bounded"])
def test_a_loss_that_is_not_repaid_breaks_the_theorem(name: str) -> None:
    bound = policies.load(name)().declared_bound(FACTS._replace(lost=1))
    assert bound is not None and bound.broken == (REPAID,)


def test_variance_bounded_needs_small_steps_equal_data_and_plain_sgd() -> None:
    rule = policies.load("variance_bounded")()
    bound = rule.declared_bound(FACTS)
    assert bound is not None and bound.conditions == (SMALL_STEP, EQUAL_DATA, REPAID)
    for facts, word in ((FACTS._replace(momentum=0.9), "momentum"), (FACTS._replace(sigma=None), "sigma")):
        bound = rule.declared_bound(facts)
        assert bound is not None and bound.value is None and word in bound.formula


def test_an_own_gradient_that_stands_in_for_long_costs_more_and_a_mean_does_not() -> None:
    late = FACTS._replace(lateness=3)
    for substitute, more in (("own", 2 * 4 * 2 / (4 * 8)), ("mean", 0.0)):
        bound = policies.load("variance_bounded")(substitute=substitute).declared_bound(late)  # type: ignore[call-arg]
        assert bound is not None and bound.value == pytest.approx(DECLARED["variance_bounded"] + more)
        assert bound.kind == ("observed" if more else "declared")


def test_with_momentum_an_owed_push_weighs_up_to_1_over_1_minus_mu() -> None:
    bound = policies.load("norm_bounded")().declared_bound(FACTS._replace(momentum=0.9, plain=False, M=7.0))
    assert bound is not None and bound.value == pytest.approx(10 * 3 * 2 / 8)


def test_a_threshold_is_a_bound_for_plain_sgd_alone() -> None:
    bound = policies.load("value_bounded")().declared_bound(FACTS._replace(plain=False))
    assert bound is not None and bound.value is None and "momentum" in bound.formula


def test_shares_count_the_fewest_workers_there_were() -> None:
    left = FACTS._replace(fewest=4)
    for name in ("asynchronous", "stale_synchronous", "norm_bounded", "variance_bounded"):
        bound = policies.load(name)().declared_bound(left)
        assert bound is not None and bound.value == pytest.approx(2 * DECLARED[name]), name


def test_an_endless_budget_promises_no_more_than_was_seen() -> None:
    bound = policies.load("elastic_bound")(bound="inf").declared_bound(FACTS)  # type: ignore[call-arg]
    assert bound is not None and (bound.value, bound.kind, bound.every_push) == (1.5 * 2, "observed", False)
