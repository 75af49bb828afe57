"""SALF's two rules: rounds of a layer that a deadline ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from helpers import LayerDesk

from ps_elastic.errors import ConfigError
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Asked, Drop, Joined, Left, PushId, Release, Wake, Woke
from ps_elastic.policies.rules.salf import Salf
from ps_elastic.policies.rules.salf_fill import SalfFill
from ps_elastic.policies.theory import p_layer_empty
from tests.law.story import Story, plain


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def told(rule: Policy, workers: int = 3, bucket: tuple[int, int] = (0, 3)) -> Story:
    return Story(rule, workers, bucket=bucket)


def test_a_round_waits_for_its_deadline_though_everybody_be_early() -> None:
    story = told(SalfFill(deadline_s=2.0), 2)
    assert story.ledger.wake_at == 2.0
    assert story.push(1, 0.5) == [] == story.push(2, 0.6)
    assert story.tell(Woke(), 2.0) == [plain((1, 1), (2, 1)), Release((1, 2)), Wake(4.0)]


def test_fill_divides_by_everybody() -> None:
    story = told(SalfFill(), 4)
    story.push(3, 0.5)
    assert story.tell(Woke(), 1.0)[0] == plain((3, 1), share=0.25)


def test_the_correction_is_one_over_the_chance_that_anybody_is_here() -> None:
    story = told(Salf(), 4)
    story.push(2, 0.5)
    story.push(1, 0.5)
    step = story.tell(Woke(), 1.0)[0]
    assert step.combine == "sum" and step.share == 1.0
    assert [term.weight for term in step.terms] == [1 / (2 * (1 - (2 / 3) ** 4))] * 2
    assert [term.push.worker for term in step.terms] == [1, 2]


def test_the_last_layer_needs_no_correction() -> None:
    story = told(Salf(), 4, (2, 3))
    story.push(2, 0.5)
    assert story.tell(Woke(), 1.0)[0] == plain((2, 1))


def test_a_layer_that_nobody_has_stays() -> None:
    story = told(Salf(), 2)
    assert story.tell(Asked(1, 1), 0.9) == []
    assert story.tell(Woke(), 1.0) == [Release((1,)), Wake(2.0)]
    assert story.ledger.version == 0


def test_who_computes_when_a_round_ends_is_late_and_goes_on_at_once() -> None:
    story = told(SalfFill(), 2)
    story.push(1, 0.5)
    story.tell(Woke(), 1.0)
    assert story.push(2, 1.1) == [Drop(PushId(2, 1), "late"), Release((2,))]
    assert story.push(2, 1.8) == []  # begun in this round
    assert story.tell(Woke(), 2.0) == [plain((2, 2), share=0.5), Release((2,)), Wake(3.0)]
    assert story.push(1, 2.1) == [Drop(PushId(1, 2), "late"), Release((1,))]


def test_a_late_worker_that_was_cut_off_goes_on_at_once_too() -> None:
    story = told(SalfFill(), 2)
    story.tell(Woke(), 1.0)
    assert story.tell(Asked(1, 1), 1.1) == [Release((1,))]
    assert story.tell(Asked(1, 2), 1.2) == []


def test_a_worker_that_joins_begins_with_a_round_and_one_that_left_is_awaited_by_none() -> None:
    story = told(SalfFill(), 2)
    assert story.tell(Joined(3), 0.2) == [] == story.tell(Asked(3, 0), 0.3)
    story.push(1, 0.5)
    assert story.tell(Woke(), 1.0) == [plain((1, 1), share=1 / 3), Release((3, 1)), Wake(2.0)]
    assert story.tell(Left(2), 1.5) == [] and story.policy.late == {}
    story.push(1, 1.6)
    assert story.tell(Woke(), 2.0)[0] == plain((1, 2), share=0.5)


def test_the_estimate_is_the_part_that_missed_the_layer_in_rounds_past_to_the_power_of_the_workers() -> None:
    story = told(Salf(empty="estimated"), 2)
    weights = []
    for turn in range(1, 5):
        if turn > 1 and 2 in story.policy.late:
            story.tell(Asked(2, turn - 1), turn - 0.9)
        story.push(1, turn - 0.5)
        step = story.tell(Woke(), float(turn))[0]
        weights.append(step.terms[0].weight)
    assert weights == pytest.approx([1.0, *(1 / (1 - (n / (2 * n + 1)) ** 2) for n in (1, 2, 3))])


def test_probabilities_are_one_for_each_layer() -> None:
    story = told(Salf(empty=(0.5, 0.25, 0.0)), 2, (1, 3))
    story.push(1, 0.5)
    assert story.tell(Woke(), 1.0)[0].terms[0].weight == 1 / 0.75
    with pytest.raises(ConfigError, match=r"policy\.empty: got 2 numbers, expected one for each of 3"):
        told(Salf(empty=(0.5, 0.0)))


# ---- numeric check 17 of the theory: U = 4 workers, L = 3 layers, every depth as likely

U, L, ROUNDS = 4, 3, 600
DEADLINES = [float(turn) for turn in range(1, ROUNDS + 1)]


def mean_step(make: Callable[[], Policy], seed: int) -> list[float]:
    """The mean step of each layer over many rounds, in which every worker u pushes u + 1 as deep as it comes.

    Depth d is the number of layers that it does not come to, drawn anew for each worker and round.
    """
    desk, draw = LayerDesk(make, U, L, lr=1.0), random.Random(seed)
    for deadline in DEADLINES:
        for worker in range(1, U + 1):
            depth = draw.randrange(L)
            desk.push(worker, *(None if layer < depth else float(worker) for layer in range(L)))
        desk.tick(deadline)
    return [-x / ROUNDS for x in desk.model]


FULL = (1 + 2 + 3 + 4) / U  # the mean of everybody


def test_the_chance_that_nobody_has_the_first_layer() -> None:
    assert p_layer_empty(1, 3, 4) == pytest.approx(0.197531, abs=5e-7) == (2 / 3) ** 4
    assert p_layer_empty(3, 3, 4) == 0.0


@pytest.mark.slow
def test_the_corrected_mean_is_the_full_mean_in_every_layer() -> None:
    """The standard error over 600 rounds is .063 in the first layer: 10 % is four of them."""
    assert mean_step(Salf, 1) == pytest.approx([FULL] * L, rel=0.1)


@pytest.mark.slow
def test_without_the_correction_the_step_is_shrunk_by_the_rounds_with_nobody() -> None:
    shrunk = [(1 - p_layer_empty(layer, L, U)) * FULL for layer in (1, 2, 3)]
    assert mean_step(lambda: Salf(empty=(0.0, 0.0, 0.0)), 2) == pytest.approx(shrunk, rel=0.1)


@pytest.mark.slow
def test_the_fill_rule_shrinks_the_step_by_the_part_that_comes_to_the_layer() -> None:
    """(1/3) mean + (2/3) w in the first layer of three, 2/3 in the second, all of it in the last."""
    assert mean_step(SalfFill, 3) == pytest.approx([FULL / 3, FULL * 2 / 3, FULL], rel=0.1)


def test_every_set_of_depths_together_gives_the_full_mean_exactly() -> None:
    """The expectation itself: all 3^4 sets of depths once each, instead of draws."""
    for make, expected in (
        (Salf, [FULL] * L),
        (SalfFill, [FULL / 3, FULL * 2 / 3, FULL]),
    ):
        desk = LayerDesk(make, U, L, lr=1.0)
        for number in range(L**U):
            for worker in range(1, U + 1):
                depth = number // L ** (worker - 1) % L
                desk.push(worker, *(None if layer < depth else float(worker) for layer in range(L)))
            desk.tick(float(number + 1))
        assert [-x / L**U for x in desk.model] == pytest.approx(expected, rel=1e-5), make
