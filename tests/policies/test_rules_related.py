"""The rules of related systems, each told a story; and every registered rule once with real numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from helpers import fit

from ps_elastic.errors import ConfigError
from ps_elastic.policies import Policy, policies
from ps_elastic.policies.events import Action, Asked, Drop, Joined, Left, PushId, Release, Step, Term
from ps_elastic.policies.rules.asgrad import AsGrad
from ps_elastic.policies.rules.consensus import Consensus
from ps_elastic.policies.rules.delay_compensated import DelayCompensated
from ps_elastic.policies.rules.fedbuff import FedBuff
from ps_elastic.policies.rules.random_subset import RandomSubset
from ps_elastic.policies.rules.rennala import Rennala
from ps_elastic.policies.rules.ringmaster import Ringmaster
from ps_elastic.policies.rules.softsync import Softsync
from ps_elastic.policies.rules.staleness_aware import StalenessAware
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.server.combiners import make_combiner
from ps_elastic.server.combiners.delay_compensated import DelayCompensated as Compensator
from tests.law.story import Story, plain


def weighted(*terms: tuple[tuple[int, int], float], share: float = 1.0) -> Step:
    return Step(tuple(Term(PushId(*push), weight) for push, weight in terms), share, combine="sum")


# ---- with real numbers


def natural(name: str) -> list[str]:
    """The overrides that a rule is meant to run with."""
    units = dict(policies.items())[name].units
    return [f"policy={name}", *([] if "gradient" in units else ["update=sisa:precondition=false:rho=20:sigma=5"])]


@pytest.mark.parametrize("name", [name for name, _ in policies.items()])
def test_every_rule_gets_nearer_to_the_optimum_and_its_record_replays(tmp_path: Path, name: str) -> None:
    """`fit` replays the decisions."""
    task = {"name": "quadratic", "noise": 0.1}
    run = fit(tmp_path, {"task": task, "optimizer": {"lr": 0.02}}, *natural(name), workers=4, samples=400)
    start = 0.5 * (1 + 2 + 5 + 10)
    assert run.summary["metrics"]["loss"] < start / 100
    assert run.summary["used"] >= 100 and run.summary["exit"] == 0
    assert all(line["discrepancy"] <= line["path_length"] for line in run.lines(0, "used") if line["x"] == "srv")


# ---- softsync, staleness_aware, delay_compensated


def test_staleness_aware_divides_by_the_staleness() -> None:
    story = Story(StalenessAware(), 4)
    shares = [story.push(worker)[0].share for worker in (1, 2, 3, 4, 1, 4)]
    assert shares == [1, 1, 1 / 2, 1 / 3, 1 / 3, 1]  # the second push of 4 has missed one version


@pytest.mark.parametrize(("n", "size"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_softsync_steps_on_every_pth_part_of_n(n: int, size: int) -> None:
    story, sizes = Story(Softsync(n), 4), []
    for turn in range(12):
        *step, release = story.push(turn % 4 + 1)
        assert release == Release((turn % 4 + 1,))
        sizes += [len(action.terms) for action in step if action.share == 1 / n]
    assert sizes == [size] * (12 // size)


def test_softsync_takes_several_of_one_worker() -> None:
    story = Story(Softsync(1))
    assert story.push(1) == [Release((1,))] == story.push(1)
    assert story.push(1) == [plain((1, 1), (1, 2), (1, 3)), Release((1,))]


def test_delay_compensated_names_the_combiner_with_the_defaults_of_its_source() -> None:
    for rule, expected in (
        (DelayCompensated(), Compensator(0.04)),
        (DelayCompensated(adaptive=True), Compensator(2.0, 0.95)),
        (DelayCompensated(scale=1e-5), Compensator(1e-5)),
        (DelayCompensated(adaptive=True, scale=0.5, decay=0.0), Compensator(0.5, 0.0)),
    ):
        step, release = Story(rule).push(2)
        assert (step.terms, step.share, release) == ((Term(PushId(2, 1)),), 1.0, Release((2,)))
        assert make_combiner(step.combine) == expected


# ---- fedbuff, rennala, ringmaster


def test_fedbuff_damps_each_update_by_its_own_staleness() -> None:
    story = Story(FedBuff(k=2))
    assert story.push(1) == [Release((1,))]
    assert story.push(2) == [weighted(((1, 1), 1 / 2), ((2, 1), 1 / 2)), Release((2,))]
    assert story.push(2) == [Release((2,))]
    late = (1 + 1) ** -0.5 / 2
    step, release = story.push(3)
    assert step.combine == "sum" and release == Release((3,))
    assert {tuple(term.push): term.weight for term in step.terms} == {(2, 2): 1 / 2, (3, 1): pytest.approx(late)}


def test_fedbuff_without_damping_is_the_plain_mean_at_its_rate() -> None:
    story = Story(FedBuff(k=2, rate=0.5, damped=False))
    for worker in (1, 2, 1):
        story.push(worker)
    assert story.push(3) == [weighted(((1, 2), 1 / 2), ((3, 1), 1 / 2), share=0.5), Release((3,))]


def test_rennala_takes_several_of_a_fast_worker_and_drops_what_is_stale() -> None:
    story = Story(Rennala(batch=3))
    assert story.push(1) == story.push(1) == [Release((1,))]
    assert story.push(2) == [plain((1, 1), (1, 2), (2, 1)), Release((2,))]
    assert story.push(3) == [Drop(PushId(3, 1), "stale"), Release((3,))]
    assert story.push(1) == [Drop(PushId(1, 3), "stale"), Release((1,))]  # given before the step
    assert story.push(1) == [Release((1,))]


def test_ringmaster_in_lock_step_accepts_r_of_p_and_only_the_first_r_ever_contribute() -> None:
    def lock_step(delay: int) -> tuple[float, int, set[int]]:
        story, used, delays, workers = Story(Ringmaster(delay), 8), 0, [0], set()
        for turn in range(8 * 50):
            worker = turn % 8 + 1
            step = story.ledger.workers[worker].seen + 1
            behind = story.ledger.version - story.ledger.views[PushId(worker, step)].version
            first, release = story.push(worker)
            assert release == Release((worker,))
            if first == plain((worker, step)):
                used, workers = used + 1, workers | {worker}
                delays.append(behind)
            else:
                assert first == Drop(PushId(worker, step), "stale")
        return used / 400, max(delays), workers

    assert lock_step(3) == (0.375, 2, {1, 2, 3})
    assert lock_step(1) == (0.125, 0, {1})
    assert lock_step(10**9) == (1.0, 7, set(range(1, 9)))


# ---- asgrad


class Jobs:
    """A run of AsGrad in which whoever has a job may finish next; `given` lists to whom jobs were handed out."""

    def __init__(self, rule: AsGrad, workers: int, seed: int = 0) -> None:
        self.story, self.random = Story(rule, workers), Random(seed)
        self.given: list[tuple[int, ...]] = []
        self.steps: list[Step] = []

    def busy(self) -> list[int]:
        return sorted({push.worker for push in self.story.ledger.views})

    def finish(self, times: int) -> None:
        for _ in range(times):
            self.note(self.story.push(self.random.choice(self.busy())))

    def note(self, actions: list[Action]) -> None:
        self.given += [action.workers for action in actions if type(action) is Release]  # not a queued job that begins
        self.steps += [action for action in actions if isinstance(action, Step)]


def test_pure_asgrad_lets_those_go_on_that_finished() -> None:
    story = Story(AsGrad(assignment="pure", wait=2))
    assert story.push(3) == []
    assert story.push(1) == [plain((1, 1), (3, 1)), Release((3, 1))]


@pytest.mark.parametrize("seed", [0, 1])
def test_pure_asgrad_that_waits_for_all_is_synchronous(seed: int) -> None:
    random, rules = Random(seed), (Story(AsGrad("pure", wait=4), 4), Story(Synchronous(), 4))
    for _ in range(40):
        worker = random.choice([w for w in range(1, 5) if w not in rules[0].ledger.waiting])
        assert rules[0].push(worker) == rules[1].push(worker)


@pytest.mark.parametrize("wait", [1, 3])
@pytest.mark.parametrize("assignment", ["random", "shuffled"])
def test_asgrad_keeps_as_many_jobs_under_way_as_there_are_workers(assignment: str, wait: int) -> None:
    run = Jobs(AsGrad(assignment, wait), 5)
    for _ in range(200):
        run.finish(1)
        assert len(run.story.ledger.views) + len(run.story.ledger.held) == 5
    assert {len(step.terms) for step in run.steps} == {len(to) for to in run.given} == {wait}
    assert {step.share for step in run.steps} == {1.0}


@pytest.mark.parametrize("wait", [1, 2])
def test_shuffled_asgrad_hands_out_one_permutation_after_the_other(wait: int) -> None:
    run = Jobs(AsGrad("shuffled", wait, seed=3), 4)
    run.finish(400)
    flat = [worker for to in run.given for worker in to]
    rounds = [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]
    assert {tuple(sorted(order)) for order in rounds} == {(1, 2, 3, 4)}
    assert len(set(rounds)) == 24  # all of them came


def test_random_asgrad_draws_every_worker_alike_whoever_finished() -> None:
    run = Jobs(AsGrad("random", seed=1), 4)
    run.finish(4000)
    pairs = Counter((step.terms[0].push.worker, to[0]) for step, to in zip(run.steps, run.given, strict=True))
    for done in range(1, 5):
        total = sum(pairs[done, to] for to in range(1, 5))
        chi_square = sum((pairs[done, to] - total / 4) ** 2 / (total / 4) for to in range(1, 5))
        assert chi_square < 16.3  # 3 degrees of freedom: one in a thousand is above


def test_asgrad_draws_anew_for_another_seed() -> None:
    given = []
    for seed in (0, 0, 1):
        run = Jobs(AsGrad("random", seed=seed), 4)
        run.finish(50)
        given.append(run.given)
    assert given[0] == given[1] != given[2]


@pytest.mark.parametrize("assignment", ["pure", "random", "shuffled"])
@pytest.mark.parametrize("seed", range(6))
def test_asgrad_goes_on_when_one_leaves_with_the_jobs_it_had_queued(assignment: str, seed: int) -> None:
    run = Jobs(AsGrad(assignment, wait=3, seed=seed), 4, seed)
    run.finish(20)
    run.note(run.story.tell(Left(run.busy()[0])))
    run.finish(60)  # a stall would raise
    ledger = run.story.ledger
    assert len(ledger.views) + len(ledger.held) == 3
    assert {len(step.terms) for step in run.steps[-10:]} == {3}


def test_asgrad_uses_what_is_held_when_nobody_computes_any_more() -> None:
    """Worker 1 leaves with two of the three jobs."""
    rule = AsGrad("shuffled", wait=2)
    story = Story(rule)
    rule.order = [2, 1]
    story.push(2)
    assert story.push(3)[-1] == Release((1, 2))
    assert story.tell(Left(1)) == []
    step, release = story.push(2)  # the only job under way
    assert step == plain((2, 2)) and sorted(release.workers) == [2, 3]


def test_asgrad_gives_a_job_to_everybody_when_the_one_with_all_the_jobs_leaves() -> None:
    rule = AsGrad("shuffled", wait=2)
    story = Story(rule)
    rule.order = [1, 1]
    story.push(2)
    assert story.push(3)[-1] == Release((1, 1))
    assert story.tell(Left(1)) == [Release((2, 3))]


def test_asgrad_gives_jobs_to_a_joiner_once_it_asked() -> None:
    run = Jobs(AsGrad("random"), 2)
    run.note(run.story.tell(Joined(3)))
    run.finish(50)
    assert not any(3 in to for to in run.given)
    assert run.story.tell(Asked(3, 0)) == [Release((3,))]
    run.finish(50)
    assert any(3 in to for to in run.given)


# ---- random_subset, consensus


def test_random_subset_uses_q_of_all_and_tells_the_others() -> None:
    story, seen = Story(RandomSubset(q=2, seed=5)), Counter[tuple[int, ...]]()
    for turn in range(1, 601):
        assert story.push(3) == story.push(1) == []
        dropped, step, release = story.push(2)
        used = tuple(term.push.worker for term in step.terms)
        assert dropped == Drop(PushId(6 - sum(used), turn), "not drawn")
        assert step == plain(*((worker, turn) for worker in used)) and release == Release((3, 1, 2))
        seen[used] += 1
    assert set(seen) == {(1, 2), (1, 3), (2, 3)} and min(seen.values()) > 160  # 200 each, deviation 11.5


def test_random_subset_of_all_is_synchronous() -> None:
    story = Story(RandomSubset(q=3))
    story.push(1)
    story.push(2)
    assert story.push(3) == [plain((1, 1), (2, 1), (3, 1)), Release((1, 2, 3))]
    assert story.tell(Left(1)) == []
    story.push(3)
    assert story.push(2) == [plain((2, 2), (3, 2)), Release((3, 2))]


def models(*pushes: tuple[int, int]) -> Step:
    return Step(tuple(Term(PushId(*push)) for push in pushes), apply="assign")


def test_consensus_sets_the_model_to_the_mean_of_all() -> None:
    story = Story(Consensus())
    assert story.push(2) == story.push(3) == []
    assert story.push(1) == [models((1, 1), (2, 1), (3, 1)), Release((2, 3, 1))]
    assert story.push(1) == []


def test_a_late_worker_stands_by_its_last_contribution() -> None:
    story = Story(Consensus(quorum=0.5), 4)
    story.push(1)
    assert story.push(2) == story.push(3) == []  # 4 has contributed nothing that it could stand by
    assert story.push(4) == [models((1, 1), (2, 1), (3, 1), (4, 1)), Release((1, 2, 3, 4))]
    assert story.push(2) == []
    assert story.push(4) == [models((1, 1), (2, 2), (3, 1), (4, 2)), Release((2, 4))]
    assert set(story.freed) == {PushId(2, 1), PushId(4, 1)}
    story.push(1)
    assert story.push(2) == [models((1, 2), (2, 3), (3, 1), (4, 2)), Release((1, 2))]


def test_consensus_waits_for_the_first_contribution_of_a_joiner_even_if_another_left() -> None:
    story = Story(Consensus(quorum=0.5), 2)
    story.push(1)
    story.push(2)
    story.tell(Joined(3))
    story.tell(Asked(3, 0))
    story.push(2)
    assert story.tell(Left(2)) == []  # 2 and its push are no substitute for 3
    assert story.push(1) == []
    assert story.push(3) == [models((1, 2), (2, 2), (3, 1)), Release((1, 3))]


# ---- settings, and what they need


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        (Softsync, "n", 0),
        (DelayCompensated, "scale", -1.0),
        (DelayCompensated, "decay", 1.0),
        (FedBuff, "k", 0),
        (FedBuff, "rate", 0.0),
        (FedBuff, "rate", 1.5),
        (Rennala, "batch", 0),
        (Ringmaster, "delay", 0),
        (AsGrad, "assignment", "fair"),
        (AsGrad, "wait", 0),
        (RandomSubset, "q", 0),
        (Consensus, "quorum", 0.0),
        (Consensus, "quorum", 2.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(rule: type[Policy], setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: got {value!r}, expected"):
        rule(**{setting: value})


@pytest.mark.parametrize(("policy", "needed"), [("first_k:k=5", 5), ("random_subset:q=4", 4), ("asgrad:wait=4", 4)])
def test_a_rule_that_would_wait_for_workers_there_are_not_is_refused(tmp_path: Path, policy: str, needed: int) -> None:
    with pytest.raises(ConfigError, match=f"{policy} needs {needed} workers, got 3"):
        fit(tmp_path, "helpers:Blobs", f"policy={policy}", workers=3)


@pytest.mark.parametrize("policy", ["fedbuff:k=50", "rennala:batch=50", "softsync:n=50", "asgrad:wait=1"])
def test_a_rule_that_collects_from_whoever_comes_runs_with_any_number_of_workers(tmp_path: Path, policy: str) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={policy}", workers=2, samples=400)
    assert run.summary["used"] > 0
