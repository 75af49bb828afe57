from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from ps_elastic.errors import PolicyError, Stalled, WireError
from ps_elastic.policies import Policy
from ps_elastic.policies.events import (
    ZERO,
    Action,
    Asked,
    Done,
    Drop,
    Joined,
    Left,
    Measure,
    Push,
    PushId,
    Release,
    Step,
    Term,
    Wake,
)
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.asynchronous import Asynchronous
from tests.law.rules import LastOfEverybody, TwoJobs
from tests.law.story import Story, plain


@dataclass
class Puppet(Policy):
    """Does what the story says next: `says` is the answer to each event in turn."""

    says: list[Any] = field(default_factory=list)

    def on_push(self, push: Push, ledger: Ledger) -> list[Action]:
        return self.says.pop(0) if self.says else []

    def on_leave(self, worker: int, ledger: Ledger) -> list[Action]:
        return self.says.pop(0) if self.says else []


class LastingPuppet(Puppet):
    keeps_last: ClassVar[bool] = True


def refused(actions: Sequence[Action], law: str, workers: int = 3, policy: type[Puppet] = Puppet) -> None:
    """Worker 1 has pushed; these actions must break a law."""
    with pytest.raises(PolicyError, match=law):
        Story(policy([actions]), workers).push(1)


def test_the_run_starts_with_everybody_computing_step_1_on_version_0() -> None:
    ledger = Story(Puppet(), 3).ledger
    assert list(ledger.views) == [(1, 1), (2, 1), (3, 1)]
    assert set(ledger.views.values()) == {(0, 0.0, None, 0.0, 0.0)}
    assert (ledger.version, ledger.now, ledger.bucket) == (0, 0.0, (0, 1))
    assert (list(ledger.waiting), ledger.computing, ledger.slowest, ledger.oldest_view) == ([], 3, 0, (1, 1))


def test_a_push_that_nothing_is_done_with_is_held_and_its_worker_waits() -> None:
    story = Story(Puppet())
    assert story.push(2) == []
    assert (list(story.ledger.held), list(story.ledger.waiting), story.ledger.computing) == ([(2, 1)], [2], 2)
    assert (2, 1) not in story.ledger.views


def test_a_push_is_freed_once_it_is_used_or_dropped() -> None:
    story = Story(Puppet([[plain((1, 1))], [Drop(PushId(2, 1), "late")]]))
    story.push(1)
    assert story.freed == [(1, 1)]
    story.push(2)
    assert story.freed == [(2, 1)]


def test_law_1_a_push_is_used_or_dropped_only_once_and_only_after_it_came() -> None:
    one = PushId(1, 1)
    breaches: list[list[Action]] = [
        [plain((1, 1)), plain((1, 1))],
        [plain((1, 1)), Drop(one, "late")],
        [Drop(one, "late"), plain((1, 1))],
        [Step((Term(one), Term(one)))],
        [Step((Term(one), Term(one, stands_for=PushId(2, 1)), Term(one)))],
        [plain((2, 1))],
        [Drop(PushId(2, 1), "late")],
        [plain((1, 1)), Release((1,), own=0.5)],  # the view would need a payload that is gone
        [Step((Term(one), Term(PushId(0, 1))))],
    ]
    for actions in breaches:
        refused(actions, "invariant 1")


def test_law_2_only_a_worker_that_waits_is_released_and_only_once() -> None:
    for workers in ((2,), (1, 1), (9,)):
        refused([plain((1, 1)), Release(workers)], "invariant 2")


def test_law_2_a_joiner_is_not_released_before_it_asks() -> None:
    for jobs in (Puppet, type("TwoJobPuppet", (Puppet,), {"jobs": 2})):
        story = Story(jobs([[plain((1, 1)), Release((1, 4))]]))
        story.tell(Joined(4))
        with pytest.raises(PolicyError, match="invariant 2: worker 4"):
            story.push(1)


def test_law_3_a_rule_that_lets_nobody_go_is_stalled_and_the_message_says_who_waits() -> None:
    story = Story(Puppet(), 2)
    story.push(2)
    with pytest.raises(Stalled, match=r"version 0: workers \[2, 1\] all wait; held: \(2, 1\), \(1, 1\)"):
        story.push(1)


def test_law_3_a_pending_wake_is_hope() -> None:
    story = Story(Puppet([[Wake(5.0)]]), 1)
    story.push(1)
    assert story.ledger.wake_at == 5.0


def test_a_step_must_have_terms_finite_weights_and_a_share_in_0_to_1() -> None:
    one = PushId(1, 1)
    for step in (
        Step(()),
        Step((), combine="sum"),
        Step((Term(one),), share=0.0),
        Step((Term(one),), share=1.01),
        Step((Term(one),), share=-0.5),
        Step((Term(one),), share=float("nan")),
        Step((Term(one, 0.0),)),
        Step((Term(one, -1.0),)),
        Step((Term(one, float("nan")),)),
        Step((Term(one, float("inf")),), combine="sum"),
    ):
        refused([step], "empty Step|share|weights")


def test_a_wake_and_an_own_part_must_be_finite() -> None:
    refused([Wake(float("inf"))], "a Wake at inf")
    refused([Release((1,), own=float("nan"))], "own = nan")


def test_a_sum_may_have_weights_that_cancel() -> None:
    story = Story(Puppet([[], [Step((Term(PushId(1, 1)), Term(PushId(2, 1), -1)), combine="sum")]]))
    story.push(1)
    story.push(2)
    assert story.ledger.version == 1


def test_a_clock_counts_pushes_and_a_joiner_starts_at_the_slowest() -> None:
    go = [[plain((1, n)), Release((1,))] for n in (1, 2, 3)] + [[plain((2, 1)), Release((2,))]]
    story = Story(Puppet(go), 2)
    for _ in range(3):
        story.push(1)
    assert (story.ledger.clock(1), story.ledger.clock(2), story.ledger.slowest) == (3, 0, 0)
    story.push(2)
    assert story.ledger.slowest == 1
    story.tell(Joined(3))
    assert story.ledger.clock(3) == 1
    story.tell(Left(2))
    assert story.ledger.slowest == 1
    story.tell(Left(3))
    assert story.ledger.slowest == 3


def test_the_slowest_clock_survives_an_empty_run() -> None:
    story = Story(Puppet([[plain((1, 1)), Release((1,))]]), 1)
    story.push(1)
    story.tell(Left(1))
    story.tell(Joined(2))
    assert (story.ledger.slowest, story.ledger.clock(2)) == (1, 1)


def test_a_repeated_push_and_one_of_a_departed_worker_are_ignored() -> None:
    story = Story(Puppet([[plain((1, 1)), Release((1,))]]))
    story.push(1)
    ledger = story.ledger
    assert story.tell(Push(PushId(1, 1), 0)) == []
    assert (list(ledger.held), ledger.clock(1), list(ledger.waiting)) == ([], 1, [])
    story.tell(Left(2))
    assert story.tell(Push(PushId(2, 1), 0)) == []
    assert not ledger.held


def test_a_push_that_was_never_assigned_or_names_another_base_is_refused() -> None:
    story = Story(Puppet())
    with pytest.raises(WireError, match=r"\(1, 2\) of worker 1 was never assigned; expected step 1"):
        story.tell(Push(PushId(1, 2), 0))
    with pytest.raises(WireError, match=r"\(1, 1\) says base 3, but its model was version 0"):
        story.tell(Push(PushId(1, 1), 3))
    assert story.push(1) == []


def test_an_ask_after_a_lost_push_forgets_it_and_the_rule_lets_the_worker_go() -> None:
    story = Story(Puppet())
    assert story.tell(Asked(1, 1)) == [Release((1,))]
    assert [push for push in story.ledger.views if push.worker == 1] == [(1, 2)]
    assert story.ledger.clock(1) == 0


def test_an_ask_after_a_lost_reply_sends_the_same_reply_again_without_the_rule() -> None:
    story = Story(Puppet([[plain((1, 1)), Release((1,))]]))
    story.push(1)
    views = dict(story.ledger.views)
    assert story.tell(Asked(1, 1)) == [Release((1,))] == story.tell(Asked(1, 1))
    assert story.ledger.views == views


def test_an_ask_of_a_worker_that_waits_or_left_changes_nothing() -> None:
    story = Story(Puppet())
    story.push(1)
    assert story.tell(Asked(1, 1)) == []
    story.tell(Left(2))
    assert story.tell(Asked(2, 0)) == []
    assert list(story.ledger.waiting) == [1]


def test_an_ask_after_a_step_that_was_never_assigned_is_refused() -> None:
    with pytest.raises(WireError, match="worker 1 asks after step 2; it was assigned 1"):
        Story(Puppet()).tell(Asked(1, 2))


def test_a_worker_that_comes_back_asks_from_0_and_never_repeats_a_push_id() -> None:
    story = Story(Puppet([[plain((1, 1)), Release((1,))], []]))
    story.push(1)
    story.tell(Left(1))
    assert not [push for push in story.ledger.views if push.worker == 1]
    story.tell(Joined(1))
    assert story.tell(Asked(1, 0)) == [Release((1,))]
    assert [push for push in story.ledger.views if push.worker == 1] == [(1, 3)]
    assert story.tell(Asked(1, 0)) == [Release((1,))]  # its first reply was lost
    assert [push for push in story.ledger.views if push.worker == 1] == [(1, 3)]
    assert story.tell(Push(PushId(1, 2), 1)) == []  # of its earlier life
    assert not story.ledger.held


def test_joining_twice_and_leaving_twice_change_nothing() -> None:
    story = Story(Puppet([[]]), 2)
    story.push(1)
    assert story.tell(Joined(1)) == []
    assert list(story.ledger.waiting) == [1]
    story.tell(Left(1))
    story.policy.says = [[Drop(PushId(1, 1), "late")]]
    assert story.tell(Left(1)) == []
    assert list(story.ledger.held) == [(1, 1)]  # what a departed worker pushed stays usable


def test_travelled_is_the_sum_of_moves_and_a_view_knows_where_it_was_sent() -> None:
    go = [[plain((1, n)), Release((1,))] for n in (1, 2)]
    story = Story(Puppet(go), 2, moved=0.75)
    story.push(1)
    story.push(1, now=3.0)
    ledger = story.ledger
    assert (ledger.travelled, ledger.version) == (1.5, 2)
    assert ledger.views[PushId(1, 3)] == (2, 0.0, None, 1.5, 3.0)
    assert ledger.oldest_view == (2, 1)


def test_reach_bounds_the_next_move_by_share_coast_gain_and_rounding() -> None:
    ledger = Ledger([1])
    ledger.applied = ledger.applied._replace(coast=3.0, gain=1.5, rounding=0.25)
    assert ledger.reach(2.0, 0.5) == 0.5 * (3.0 + 1.5 * 2.0) + 0.25


def test_a_measured_view_is_where_it_was_found_to_be() -> None:
    near = [[plain((1, 1)), Release((1,))], [Measure((PushId(2, 1),)), plain((1, 2)), Release((1,))]]
    story = Story(Puppet(near), 3, moved=1.0, distance=0.25)
    story.push(1)
    assert story.ledger.oldest_view == (2, 1)
    story.push(1)
    assert story.ledger.views[PushId(2, 1)].travelled == 0.75
    assert story.ledger.oldest_view == (3, 1)
    story.tell(Left(3))
    assert story.ledger.oldest_view == (2, 1)
    story.tell(Left(2))
    assert story.ledger.oldest_view == (1, 3)


def test_only_a_view_under_way_is_measured() -> None:
    refused([Measure((PushId(1, 1),))], "to be measured, but the push is not under way")


def owing(stand_in: PushId = ZERO, weight: float = 1.0, policy: type[Puppet] = Puppet) -> Story:
    """Worker 2 owes: the Step that made version 1 had a stand-in for its push."""
    terms = (Term(PushId(1, 1)), Term(stand_in, weight, stands_for=PushId(2, 1)))
    story = Story(policy([[Step(terms), Release((1,))]]), 3)
    story.push(1)
    return story


def test_law_4_a_debt_is_repaid_by_what_its_stand_in_weighed() -> None:
    story = owing(weight=3.0)
    assert story.ledger.debts == {(2, 1): (ZERO, 0.75, 1)}
    amend = story.ledger.amend(PushId(2, 1))
    assert amend == Step((Term(PushId(2, 1), 0.75), Term(ZERO, -0.75)), combine="sum", apply="amend")
    story.policy.says = [[amend, Release((2,))]]
    story.push(2)
    assert (story.ledger.debts, story.ledger.version, story.freed) == ({}, 2, [(2, 1)])


def test_law_4_what_is_owed_in_a_sum_is_the_weight_of_its_stand_in() -> None:
    terms = (Term(PushId(1, 1), 2.0), Term(ZERO, 0.5, stands_for=PushId(2, 1)))
    story = Story(Puppet([[Step(terms, combine="sum"), Release((1,))]]), 3)
    story.push(1)
    assert story.ledger.debts[PushId(2, 1)].part == 0.5


def test_law_4_what_is_owed_is_repaid_in_full_and_by_an_amend_alone() -> None:
    for wrong in (
        Step((Term(PushId(2, 1), 0.4), Term(ZERO, -0.5)), combine="sum", apply="amend"),
        Step((Term(PushId(2, 1), 0.5),), combine="sum", apply="amend"),
        Step((Term(PushId(3, 1), 0.5), Term(ZERO, -0.5)), combine="sum", apply="amend"),
        plain((2, 1)),
    ):
        story = owing()
        story.policy.says = [[wrong]]
        with pytest.raises(PolicyError, match="invariant 4"):
            story.push(2)


def test_law_4_nothing_stands_for_a_push_that_is_here_or_already_owed() -> None:
    two = PushId(2, 1)
    refused([Step((Term(ZERO, stands_for=PushId(1, 1)),))], "invariant 4")
    refused([Step((Term(PushId(1, 1)), Term(ZERO, stands_for=two), Term(ZERO, stands_for=two)))], "invariant 4")
    refused([Step((Term(PushId(1, 1)), Term(PushId(3, 9), stands_for=two)))], "invariant 1: .* is a placeholder but")
    refused([Step((Term(PushId(1, 1)), Term(PushId(0, 2), stands_for=two)))], "invariant 1: .* is a placeholder but")


def test_a_debt_is_closed_by_a_drop_a_departure_an_ask_and_the_end() -> None:
    def drop(story: Story) -> None:
        story.policy.says = [[Drop(PushId(2, 1), "late"), Release((2,))]]
        story.push(2)

    for event in (Left(2), Asked(2, 1), Done()):
        story = owing(PushId(0, 1))
        assert story.ledger.is_kept(PushId(0, 1))
        story.tell(event)
        assert (story.ledger.debts, story.freed) == ({}, [(0, 1)])
    story = owing(PushId(0, 1))
    drop(story)
    assert (story.ledger.debts, story.freed) == ({}, [(0, 1), (2, 1)])


def test_a_debt_outlives_a_departure_if_the_late_push_is_already_held() -> None:
    story = owing()
    story.policy.says = [[]]
    story.push(2)
    story.tell(Left(2))
    assert list(story.ledger.debts) == [(2, 1)]


def test_a_push_that_stands_in_is_kept_until_the_debt_closes() -> None:
    story = owing(PushId(1, 1))
    assert story.freed == []
    assert story.ledger.is_kept(PushId(1, 1))
    story.tell(Left(2))
    assert story.freed == [(1, 1)]
    assert not story.ledger.is_kept(PushId(1, 1))


def test_a_view_with_an_own_part_keeps_that_push_until_its_own_push_is_used() -> None:
    story = Story(LastingPuppet([[plain((1, 1)), Release((1,), own=0.5)]]), 2)
    story.push(1)
    assert story.ledger.views[PushId(1, 2)][:3] == (1, 0.5, (1, 1))
    story.policy.says = [[]]
    story.push(1)
    assert story.freed == []
    story.policy.says = [[plain((1, 2)), Release((1,)), plain((2, 1)), Release((2,))]]
    story.push(2)
    assert story.freed == [(1, 1)]  # (1, 2) and (2, 1) are the last of their workers


def test_a_view_that_is_given_up_lets_its_own_push_go() -> None:
    for event in (Left(1), Asked(1, 2)):
        story = Story(Puppet([[Release((1,), own=0.5), plain((1, 1))]]), 2)
        story.push(1)
        assert story.freed == []
        story.tell(event)
        assert story.freed == [(1, 1)]


def test_the_last_push_of_each_worker_may_be_used_again_until_its_next() -> None:
    story = Story(LastOfEverybody(), 2)
    story.push(1)
    assert (story.ledger.last(1), story.ledger.last(2), story.freed) == ((1, 1), None, [])
    assert story.push(2)[0] == plain((1, 1), (2, 1))
    assert story.push(1)[0] == plain((1, 2), (2, 1))
    assert story.freed == [(1, 1)]
    story.tell(Left(2))
    assert story.freed == [(2, 1)]


def test_a_queued_job_begins_before_the_rule_is_asked_on_the_version_of_its_assignment() -> None:
    story = Story(TwoJobs(), 2)
    assert story.told == [Release((1, 2))]
    assert [view.version for view in story.ledger.views.values()] == [0, 0, 0, 0]
    again, step, release = story.push(1, now=7.0)
    assert (again, step, release) == (Release((1,)), plain((1, 1), share=0.5), Release((1,)))
    views = story.ledger.views
    assert (views[PushId(1, 2)].version, views[PushId(1, 2)].sent_at, views[PushId(1, 3)].version) == (0, 7.0, 1)
    assert not story.ledger.waiting


def test_a_worker_has_no_more_jobs_than_the_rule_says() -> None:
    class TwoJobPuppet(Puppet):
        jobs: ClassVar[int] = 2

    story = Story(TwoJobPuppet([[plain((1, 1)), Release((1,)), Release((1,)), Release((1,))]]), 2)
    with pytest.raises(PolicyError, match="invariant 2: worker 1 is released but does not wait"):
        story.push(1)


def test_jobs_that_were_queued_are_forgotten_when_their_worker_asks_or_leaves() -> None:
    story = Story(TwoJobs(), 2)
    assert story.tell(Asked(1, 1)) == [Release((1,)), Release((1,))]
    assert [push for push in story.ledger.views if push.worker == 1] == [(1, 2), (1, 3)]
    story.tell(Left(1))
    assert [push.worker for push in story.ledger.views] == [2, 2]


def test_a_later_push_means_that_the_earlier_one_was_lost() -> None:
    class TwoJobPuppet(Puppet):
        jobs: ClassVar[int] = 2

    story = Story(TwoJobPuppet([[plain((2, 1)), Release((2, 1))], []]), 2)
    story.push(2)
    assert (1, 2) in story.ledger.views
    story.tell(Push(PushId(1, 2), 1))
    assert not [push for push in story.ledger.views if push.worker == 1]
    assert list(story.ledger.held) == [(1, 2)]
    assert story.tell(Push(PushId(1, 1), 0)) == []


def test_the_end_drops_what_is_held_and_closes_what_is_owed() -> None:
    story = owing(PushId(0, 1))
    story.policy.says = [[]]
    story.push(3)
    assert story.tell(Done()) == [Drop(PushId(3, 1), "done"), Release((3,))]
    assert sorted(story.freed) == [(0, 1), (3, 1)]
    assert story.push(2) == [Drop(PushId(2, 1), "done"), Release((2,))]
    assert story.tell(Asked(1, 2)) == [Release((1,))]
    assert story.tell(Joined(4)) == story.tell(Left(3)) == story.tell(Done()) == []
    assert story.tell(Asked(4, 0)) == [Release((4,))]


def test_one_that_comes_back_goes_on_after_the_step_stated_or_its_own() -> None:
    story = Story(Asynchronous(), 2)
    story.tell(Left(1))
    story.tell(Joined(1, 5))
    assert story.ledger.workers[1].seen == story.ledger.workers[1].assigned == 5
    story.tell(Left(1))
    story.tell(Joined(1))
    assert story.ledger.workers[1].seen == 5
