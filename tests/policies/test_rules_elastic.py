"""The rules that let views fall behind by a bounded measure, each told a story: three workers unless said."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest
import torch
from helpers import Desk, fit

from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import ConfigError
from ps_elastic.policies import Policy, policies
from ps_elastic.policies.events import (
    ZERO,
    Action,
    Asked,
    Drop,
    Left,
    Measure,
    Push,
    PushId,
    Release,
    Step,
    Term,
    Wake,
    Woke,
)
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.deadline import Deadline
from ps_elastic.policies.rules.delay_bounded import DelayBounded
from ps_elastic.policies.rules.elastic_bound import ElasticBound
from ps_elastic.policies.rules.norm_bounded import NormBounded
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.policies.rules.value_bounded import ValueBounded
from ps_elastic.policies.rules.variance_bounded import VarianceBounded
from tests.law.story import Story, plain


def owed(
    *here: tuple[int, int], missing: list[tuple[int, int]], by: tuple[int, int] = ZERO, share: float = 1.0
) -> Step:
    """The mean of the pushes `here`, and of `by` in place of each one missing."""
    terms = [Term(PushId(*push)) for push in here] + [Term(PushId(*by), 1.0, PushId(*push)) for push in missing]
    return Step(tuple(terms), share)


def repaid(push: tuple[int, int], part: float, by: tuple[int, int] = ZERO) -> Step:
    return Step((Term(PushId(*push), part), Term(PushId(*by), -part)), combine="sum", apply="amend")


# ---- what they become at the ends of their range

AS_SYNCHRONOUS = [
    NormBounded(beta=1.0),
    VarianceBounded(quorum=1.0),
    VarianceBounded(quorum=1.0, substitute="mean"),
    ElasticBound(bound=0.0),
    ElasticBound(bound="0M", distance="path"),
    DelayBounded(bound=0),
]
AS_ASYNCHRONOUS = [
    ElasticBound(bound="inf"),
    DelayBounded(bound=10**9),
    ValueBounded(threshold=1e9, falling=False),
]


def written(policy: Policy) -> str:
    settings = ":".join(f"{key}={value}" for key, value in vars(policy).items() if key in SETTINGS)
    return f"{NAMES[type(policy)]}:{settings}"


NAMES = {cls: name for name, cls in policies.items()}
SETTINGS = ("beta", "quorum", "substitute", "bound", "distance", "threshold", "falling")


def told_the_same(rule: Policy, other: Policy, workers: int, seed: int) -> list[tuple[list[Action], list[Action]]]:
    """What both rules order on the same pushes of workers that take turns at random; norm 0 now and then."""
    random, stories = Random(seed), [Story(policy, workers, moved=0.3) for policy in (rule, other)]
    answers = []
    for _ in range(60):
        free = [worker for worker in range(1, workers + 1) if worker not in stories[0].ledger.waiting]
        worker, norm = random.choice(free), random.choice([0.0, 1.0, random.random()])
        answers.append((stories[0].push(worker, norm=norm), stories[1].push(worker, norm=norm)))
    return answers


@pytest.mark.parametrize("rule", AS_SYNCHRONOUS, ids=written)
def test_with_no_room_at_all_a_rule_orders_what_synchronous_does(rule: Policy) -> None:
    for seed in (0, 1):
        for got, expected in told_the_same(type(rule)(**settings_of(rule)), Synchronous(), 4, seed):
            assert got == expected


@pytest.mark.parametrize("rule", AS_ASYNCHRONOUS, ids=written)
def test_with_endless_room_a_rule_orders_what_asynchronous_does(rule: Policy) -> None:
    for seed in (0, 1):
        for got, expected in told_the_same(type(rule)(**settings_of(rule)), Asynchronous(), 4, seed):
            assert got == expected


def settings_of(rule: Policy) -> dict[str, object]:
    return {key: value for key, value in vars(rule).items() if key in SETTINGS}


@pytest.mark.parametrize("rule", [*AS_SYNCHRONOUS, Deadline()], ids=written)
def test_with_no_room_at_all_the_bits_are_those_of_synchronous(tmp_path: Path, rule: Policy) -> None:
    """Momentum, and a step size that begins at 0, included."""
    more = ("optimizer.momentum=0.9", "optimizer.weight_decay=0.01", "schedule.warmup_samples=40")
    text = written(rule).removesuffix(":")
    runs = [fit(tmp_path, "helpers:Blobs", f"policy={name}", *more, samples=200) for name in (text, "synchronous")]
    assert runs[0].summary["parameters_sha256"] == runs[1].summary["parameters_sha256"]
    assert runs[0].summary["discrepancy"]["max"] == 0


@pytest.mark.parametrize("rule", AS_ASYNCHRONOUS, ids=written)
def test_with_endless_room_the_bits_are_those_of_asynchronous(tmp_path: Path, rule: Policy) -> None:
    runs = [fit(tmp_path, "helpers:Blobs", f"policy={name}", samples=200) for name in (written(rule), "asynchronous")]
    assert runs[0].summary["parameters_sha256"] == runs[1].summary["parameters_sha256"]
    assert runs[0].summary["staleness"]["max"] == 2


# ---- deadline


def test_deadline_ends_a_round_at_once_when_all_are_here() -> None:
    story = Story(Deadline())
    assert story.push(2, 5.0) == [Wake(6.0)]
    assert story.push(1, 5.2) == []
    assert story.push(3, 5.5) == [plain((1, 1), (2, 1), (3, 1)), Release((2, 1, 3))]
    assert story.push(3, 5.9) == [Wake(6.9)]  # the new round has a deadline of its own


def test_deadline_drops_who_is_late_and_tells_them() -> None:
    story = Story(Deadline())
    story.push(1, 0.0)
    story.push(2, 0.5)
    assert story.tell(Woke(), 0.9) == []  # early
    assert story.tell(Woke(), 1.0) == [plain((1, 1), (2, 1)), Release((1, 2))]
    assert story.push(3, 1.1) == [Drop(PushId(3, 1), "late"), Release((3,))]
    assert story.push(1, 1.2) == [Wake(2.2)]
    assert story.push(2, 1.3) == []  # 3 is back: it is waited for again
    assert story.push(3, 1.4) == [plain((1, 2), (2, 2), (3, 2)), Release((1, 2, 3))]


def test_a_crash_costs_one_deadline_and_no_more() -> None:
    story = Story(Deadline(), 4)
    woken = []
    for turn in range(6):
        start = 10.0 * turn
        told = [story.push(worker, start) for worker in (1, 2, 3)]  # 4 has crashed, and nobody says so
        if story.ledger.waiting:
            woken.append(turn)
            told.append(story.tell(Woke(), start + 1))
        here = [(worker, turn + 1) for worker in (1, 2, 3)]
        assert told[0] == [Wake(start + 1)] and told[-1] == [plain(*here), Release((1, 2, 3))]
    assert woken == [0]


def test_deadline_forgets_a_suspect_that_leaves() -> None:
    story = Story(Deadline())
    story.push(1)
    assert story.tell(Woke(), 1.0) == [plain((1, 1)), Release((1,))]
    assert story.tell(Left(2), 1.5) == []
    assert story.push(1, 2.0) == [Wake(3.0), plain((1, 2)), Release((1,))]  # 3 is a suspect still
    assert story.push(3, 2.5) == [Drop(PushId(3, 1), "late"), Release((3,))]
    assert story.push(1, 2.6) == [Wake(3.6)]


def test_deadline_keeps_the_weight_of_a_worker_where_asked() -> None:
    story = Story(Deadline(missing="keep"), 4)
    for worker in (1, 2, 3):
        story.push(worker)
    assert story.tell(Woke(), 1.0) == [plain((1, 1), (2, 1), (3, 1), share=3 / 4), Release((1, 2, 3))]


def test_deadline_repays_a_late_push_once() -> None:
    story = Story(Deadline(missing="substitute"))
    story.push(1)
    story.push(3)
    step = owed((1, 1), (3, 1), missing=[(2, 1)])
    assert story.tell(Woke(), 1.0) == [step, Release((1, 3))]
    late = Push(PushId(2, 1), 0)
    assert story.tell(late, 1.5) == [repaid((2, 1), 1 / 3), Release((2,))]
    assert story.tell(late, 1.6) == []  # a duplicate
    assert story.ledger.debts == {}


def test_a_worker_that_owes_a_round_has_no_part_in_the_next() -> None:
    story = Story(Deadline(missing="substitute"))
    story.push(1)
    story.push(3)
    story.tell(Woke(), 1.0)
    story.push(1, 1.1)
    assert story.push(3, 1.2) == [plain((1, 2), (3, 2), share=2 / 3), Release((1, 3))]
    assert story.push(2, 1.3) == [repaid((2, 1), 1 / 3), Release((2,))]


def test_deadline_takes_adam_unless_debts_are_to_be_repaid() -> None:
    assert Deadline().optimizers == Deadline(missing="keep").optimizers == Synchronous().optimizers
    assert Deadline(missing="substitute").optimizers == ("sgd",)


# ---- norm_bounded


def test_norm_bounded_learns_the_norms_in_a_first_full_round() -> None:
    story = Story(NormBounded(beta=0.5))
    assert story.push(1, norm=8.0) == story.push(2, norm=1.0) == []
    assert story.push(3, norm=1.0) == [plain((1, 1), (2, 1), (3, 1)), Release((1, 2, 3))]


def test_norm_bounded_goes_on_without_the_short_and_repays_them_in_full() -> None:
    story = Story(NormBounded(beta=0.8), 4)
    for worker, norm in ((1, 5.0), (2, 3.0), (3, 1.0), (4, 1.0)):
        story.push(worker, norm=norm)
    assert story.push(3, norm=1.0) == story.push(1, norm=5.0) == []
    assert story.push(2, norm=3.0) == [owed((1, 2), (2, 2), (3, 2), missing=[(4, 2)]), Release((3, 1, 2))]
    assert story.push(4, norm=1.0) == [repaid((4, 2), 1 / 4), Release((4,))]
    assert story.push(1, norm=5.0) == []
    assert story.push(2, norm=3.0) == [owed((1, 3), (2, 3), missing=[(3, 3), (4, 3)]), Release((1, 2))]


def test_norm_bounded_never_steps_with_less_than_half_of_the_workers_taking_part() -> None:
    story = Story(NormBounded(beta=0.1), 4)
    for worker in (1, 2, 3, 4):
        story.push(worker)
    assert story.push(1) == [owed((1, 2), missing=[(2, 2), (3, 2), (4, 2)]), Release((1,))]
    assert story.push(1) == []  # the three others owe the round before: one of four takes part in this one
    assert story.push(2) == [
        repaid((2, 2), 1 / 4),
        Release((2,)),
        owed((1, 3), missing=[(2, 3)], share=1 / 2),
        Release((1,)),
    ]


def test_norm_bounded_does_not_count_the_norm_of_who_left_for_one_who_came() -> None:
    from ps_elastic.policies.events import Joined

    story = Story(NormBounded(beta=0.5), 2)
    story.push(1)
    story.push(2)
    story.tell(Left(2))
    story.tell(Joined(3))
    story.tell(Asked(3, 0))
    assert story.push(1) == []  # 1 of the norms 1 + 1 is half, but what 3 will give is not known
    assert story.push(3) == [plain((1, 2), (3, 1)), Release((1, 3))]


def test_norm_bounded_leaves_the_model_where_all_gradients_in_time_would_have() -> None:
    desk = Desk(NormBounded(beta=0.6), 3, optimizer=Optimizer(lr=0.5, momentum=0.9))
    for worker in (1, 2, 3):
        desk.push(worker, 1.0)
    desk.push(1, 1.0)
    desk.push(2, 2.0)
    desk.push(3, 4.0)
    m1, m2 = 1.0, 0.9 + (1 + 2 + 4) / 3
    assert torch.allclose(desk.x, torch.full_like(desk.x, -0.5 * (m1 + m2)), rtol=1e-6)


# ---- variance_bounded


def test_variance_bounded_lets_each_go_on_with_its_own_gradient_for_the_missing() -> None:
    story = Story(VarianceBounded(quorum=0.5), 4)
    assert story.push(4) == []
    assert story.push(2) == [owed((2, 1), (4, 1), missing=[(1, 1), (3, 1)]), Release((4, 2), own=0.5)]
    assert story.push(3) == [repaid((3, 1), 1 / 4), Release((3,), own=0.25)]  # 1 is owed still
    assert story.push(1) == [repaid((1, 1), 1 / 4), Release((1,))]
    assert story.push(1) == []
    assert story.push(3) == [owed((1, 2), (3, 2), missing=[(2, 2), (4, 2)]), Release((1, 3), own=0.5)]


def test_variance_bounded_may_let_the_mean_stand_in() -> None:
    story = Story(VarianceBounded(quorum=0.6, substitute="mean"))
    story.push(1)
    assert story.push(3) == [owed((1, 1), (3, 1), missing=[(2, 1)], by=(0, 1)), Release((1, 3))]
    assert story.push(2) == [repaid((2, 1), 1 / 3, by=(0, 1)), Release((2,))]
    assert PushId(0, 1) in story.freed
    assert VarianceBounded(substitute="own").own_views and not VarianceBounded(substitute="mean").own_views


@pytest.mark.parametrize("quorum", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_quorum_that_is_a_whole_number_of_workers_is_that_many(quorum: float) -> None:
    """0.55 x 100 is 55.00000000000001 in floating point."""
    story = Story(VarianceBounded(quorum=quorum), 100)
    count = next(n for n in range(1, 101) if story.push(n))
    assert count == round(100 * quorum)


def test_a_view_with_its_own_gradient_is_as_far_off_as_the_theory_says() -> None:
    """||x_ideal - v_i|| = (alpha/p) ||SUM over the missing of (g_j - g_i)||, known when the missing one comes."""
    desk = Desk(VarianceBounded(quorum=0.6), 3, optimizer=Optimizer(lr=0.3))
    desk.push(1, 1.0)
    replies = desk.push(2, 3.0)
    alpha, p, unit = 0.3, 3, 8.0  # 64 ones have norm 8
    for worker, own in ((1, 1.0), (2, 3.0)):
        expected = torch.full((64,), -alpha / p * (1 + 3 + own))
        assert torch.allclose(torch.from_numpy(replies[worker].model), expected, rtol=1e-6)
    desk.push(1, 0.0)
    desk.push(2, 0.0)
    desk.push(3, 7.0)
    lines = {(line["worker"], line["step"]): line for line in desk.told("used")}
    assert lines[1, 2]["x"] == "ideal"
    assert lines[1, 2]["discrepancy"] == pytest.approx(alpha / p * (7 - 1) * unit, rel=1e-5)
    assert lines[2, 2]["discrepancy"] == pytest.approx(alpha / p * (7 - 3) * unit, rel=1e-5)


# ---- elastic_bound: a Step of the story moves the model by `moved`, and is bounded by share x norm


def test_elastic_bound_holds_as_soon_as_a_step_could_leave_the_budget() -> None:
    story = Story(ElasticBound(bound=1.2), 2)
    assert story.push(1) == [plain((1, 1), share=1 / 2), Release((1,))]
    assert story.push(1) == []  # 1 travelled and 1/2 to come, while 2 still computes on version 0
    assert story.push(2) == [plain((1, 2), (2, 1)), Release((1, 2))]


def test_elastic_bound_holds_where_the_step_would_just_fill_the_budget() -> None:
    assert Story(ElasticBound(bound=0.5), 2).push(1) == []
    assert Story(ElasticBound(bound=0.5000001), 2).push(1) == [plain((1, 1), share=1 / 2), Release((1,))]


def test_elastic_bound_uses_all_that_is_held_or_nothing() -> None:
    story = Story(ElasticBound(bound=1.0), 4)
    assert story.push(1, norm=5.0) == []
    assert story.push(2, norm=0.0) == []  # by itself it would do no harm
    assert story.push(3, norm=0.0) == []  # (5 + 0 + 0)/3 with a share of 3/4 is 5/4 still
    assert story.push(4, norm=0.0) == [plain((1, 1), (2, 1), (3, 1), (4, 1)), Release((1, 2, 3, 4))]


def test_elastic_bound_asks_for_the_distance_that_blocks_once_a_version_and_goes_on_from_there() -> None:
    story = Story(ElasticBound(bound=1.2), 2, moved=0.4, distance=0.1)
    view = Measure((PushId(2, 1),))
    steps = [[plain((1, n), share=1 / 2), Release((1,))] for n in range(7)]
    assert [story.push(1), story.push(1)] == steps[1:3]
    assert story.push(1) == [view, *steps[3]]  # .8 + .5 would be too far, .1 + .5 is not
    assert story.push(1) == steps[4]
    assert story.push(1) == [view, *steps[5]]


def test_elastic_bound_holds_where_the_distance_does_not_help_and_asks_no_more() -> None:
    story = Story(ElasticBound(bound=1.2), 3, moved=0.5, distance=1.1)
    story.push(1)
    story.push(1)
    assert story.push(1) == [Measure((PushId(2, 1),))]
    assert story.tell(Left(3)) == []  # the same view, the same version
    assert story.push(2) == [plain((1, 3), (2, 1)), Release((1, 2))]


def test_elastic_bound_does_not_ask_where_it_cannot_help() -> None:
    near = Story(ElasticBound(bound=1.2), 2)
    near.push(1)
    assert near.push(1) == []  # one version back, the path is the distance
    long = Story(ElasticBound(bound=1.2), 2, moved=0.1)
    for _ in range(3):
        long.push(1)
    assert long.push(1, norm=2.4) == []  # its own reach fills the budget
    path = Story(ElasticBound(bound=1.2, distance="path"), 2, moved=0.4, distance=0.1)
    assert [path.push(1) != [] for _ in range(3)] == [True, True, False]


def test_elastic_bound_in_multiples_follows_the_running_rms_norm() -> None:
    rule = ElasticBound(bound="2M")
    story = Story(rule, 3)
    story.push(1, norm=3.0)
    story.push(2, norm=4.0)
    assert rule.budget() == pytest.approx(2 * math.sqrt((9 + 16) / 2))
    assert ElasticBound(bound="1.5").budget() == 1.5 and ElasticBound(bound="inf").budget() == math.inf


@pytest.mark.parametrize("distance", ["refreshed", "path"])
@pytest.mark.parametrize(
    ("bound", "optimizer"),
    [(0.5, {}), (3.0, {"momentum": 0.9}), (3.0, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})],
    ids=str,
)
def test_no_view_in_use_ever_leaves_the_budget(
    tmp_path: Path, distance: str, bound: float, optimizer: dict[str, object]
) -> None:
    policy = {"name": "elastic_bound", "bound": bound, "distance": distance}
    config = {"task": "helpers:Blobs", "policy": policy, "optimizer": {"lr": 0.1, **optimizer}}
    run = fit(tmp_path, config, workers=4, samples=800)
    scaled = [line["discrepancy"] / line["step_size"] for line in run.lines(0, "used")]
    assert 0 < max(scaled) <= bound * (1 + 1e-5)
    assert run.summary["held_max"] > 1 and len(scaled) == 200


# ---- delay_bounded, value_bounded


def test_delay_bounded_holds_before_a_view_falls_too_far_behind() -> None:
    story = Story(DelayBounded(bound=1), 2)
    assert story.push(1) == [plain((1, 1), share=1 / 2), Release((1,))]
    assert story.push(1) == []
    assert story.push(2) == [plain((1, 2), (2, 1)), Release((1, 2))]


def test_delay_bounded_goes_on_when_the_one_awaited_leaves() -> None:
    story = Story(DelayBounded(bound=1))
    story.push(1)
    assert story.push(1) == story.push(2) == []
    assert story.tell(Left(3)) == [plain((1, 2), (2, 1)), Release((1, 2))]


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
def test_no_push_that_delay_bounded_uses_is_staler_than_its_bound(bound: int) -> None:
    for seed in (0, 1):
        random, story, seen = Random(seed), Story(DelayBounded(bound), 5), set()
        bases: dict[PushId, int] = {}
        for _ in range(300):
            free = [w for w in range(1, 6) if w not in story.ledger.waiting]
            worker = random.choice(free[: 1 + random.randrange(len(free))])  # 1 is the fastest
            version, push = story.ledger.version, PushId(worker, story.ledger.workers[worker].seen + 1)
            bases[push] = story.ledger.views[push].version
            for action in story.push(worker):
                if isinstance(action, Step):
                    seen |= {version - bases[term.push] for term in action.terms}
        assert max(seen) == bound


def test_value_bounded_holds_while_a_view_would_miss_too_much() -> None:
    story = Story(ValueBounded(threshold=1.0, falling=False), 2, moved=0.6)
    assert story.push(1) == [plain((1, 1), share=1 / 2), Release((1,))]
    assert story.push(1) == []  # .6 travelled and a norm of 1/2 to come
    assert story.push(2) == [plain((1, 2), (2, 1)), Release((1, 2))]


def test_the_threshold_of_value_bounded_falls_with_the_root_of_the_version() -> None:
    story = Story(ValueBounded(threshold=1.0), 2, moved=0.0)
    used = 0
    while story.push(1, norm=0.5):  # 1/4 each: within 1/sqrt(t + 1) until t + 1 = 16
        used += 1
    assert used == 16


# ---- settings


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        (Deadline, "deadline_s", 0.0),
        (Deadline, "missing", "wait"),
        (NormBounded, "beta", 0.0),
        (NormBounded, "beta", 1.1),
        (VarianceBounded, "quorum", 0.0),
        (VarianceBounded, "quorum", 1.1),
        (VarianceBounded, "substitute", "zero"),
        (ElasticBound, "bound", -1.0),
        (ElasticBound, "bound", "M"),
        (ElasticBound, "bound", "three"),
        (ElasticBound, "bound", "nan"),
        (ElasticBound, "distance", "guessed"),
        (DelayBounded, "bound", -1),
        (ValueBounded, "threshold", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(rule: type[Policy], setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: got {value!r}, expected"):
        rule(**{setting: value})
