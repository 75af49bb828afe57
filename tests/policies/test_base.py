"""Each rule told a story: three workers unless said, who push in the order named."""

from __future__ import annotations

from collections import Counter
from heapq import heapify, heappop, heappush

import pytest

from ps_elastic.errors import ConfigError
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Asked, Drop, Joined, Left, Push, PushId, Release
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.first_k import FirstK
from ps_elastic.policies.rules.stale_synchronous import StaleSynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from tests.law.story import Story, plain


def test_synchronous_waits_for_everybody_and_adds_in_worker_order() -> None:
    story = Story(Synchronous())
    assert story.push(3) == story.push(1) == []
    assert story.push(2) == [plain((1, 1), (2, 1), (3, 1)), Release((3, 1, 2))]
    assert story.push(2) == []


def test_synchronous_goes_on_without_a_worker_that_leaves() -> None:
    story = Story(Synchronous())
    story.push(1)
    story.push(2)
    assert story.tell(Left(3)) == [plain((1, 1), (2, 1)), Release((1, 2))]
    assert story.tell(Left(2)) == []
    assert story.push(1) == [plain((1, 2)), Release((1,))]


def test_synchronous_uses_what_a_departed_worker_had_pushed_with_no_more_than_a_full_share() -> None:
    story = Story(Synchronous())
    story.push(1)
    story.tell(Left(1))
    story.push(2)
    assert story.push(3) == [plain((1, 1), (2, 1), (3, 1)), Release((2, 3))]
    story = Story(Synchronous(), 1)
    assert story.tell(Left(1)) == []
    story = Story(Synchronous(), 2)
    story.push(1)
    story.tell(Left(1))
    assert story.tell(Left(2)) == [plain((1, 1))]


def test_synchronous_waits_for_a_joiner_from_the_moment_it_is_a_member() -> None:
    story = Story(Synchronous(), 1)
    story.tell(Joined(2))
    assert story.push(1) == []
    assert story.tell(Asked(2, 0)) == [Release((2,))]
    assert story.push(2) == [plain((1, 1), (2, 1)), Release((1, 2))]


def test_asynchronous_uses_each_push_at_once_with_the_share_of_one_worker() -> None:
    story = Story(Asynchronous(), 4)
    for worker in (2, 2, 4, 1):
        step = story.ledger.workers[worker].seen + 1
        assert story.push(worker) == [plain((worker, step), share=1 / 4), Release((worker,))]
    story.tell(Left(3))
    assert story.push(1)[0] == plain((1, 2), share=1 / 3)


def test_asynchronous_in_turn_is_stale_by_one_less_than_the_workers_after_warm_up() -> None:
    for workers in range(2, 9):
        story = Story(Asynchronous(), workers)
        staleness = []
        for turn in range(5 * workers):
            worker = turn % workers + 1
            view = next(view for push, view in story.ledger.views.items() if push.worker == worker)
            staleness.append(story.ledger.version - view.version)
            story.push(worker)
        assert staleness == [*range(workers), *[workers - 1] * (4 * workers)]


def test_first_k_steps_on_k_pushes_and_lets_only_their_workers_go() -> None:
    story = Story(FirstK(2))
    assert story.push(3) == []
    assert story.push(1) == [plain((1, 1), (3, 1)), Release((3, 1))]


def test_first_k_drops_the_late_push_and_tells_its_worker() -> None:
    story = Story(FirstK(2))
    story.push(3)
    story.push(1)
    assert story.push(2) == [Drop(PushId(2, 1), "late"), Release((2,))]
    assert story.push(2) == []
    assert story.push(3) == [plain((2, 2), (3, 2)), Release((2, 3))]


def test_first_k_of_fewer_workers_means_all_of_them() -> None:
    story = Story(FirstK(3))
    story.push(1)
    story.push(2)
    assert story.tell(Left(3)) == [plain((1, 1), (2, 1)), Release((1, 2))]
    story.push(1)
    assert story.tell(Left(2)) == [plain((1, 2)), Release((1,))]
    assert story.tell(Left(1)) == []


def test_first_k_needs_k_workers_and_k_is_at_least_one() -> None:
    assert FirstK(3).workers_needed() == 3
    assert Asynchronous().workers_needed() == Synchronous().workers_needed() == 1
    assert FirstK(1).k == 1
    with pytest.raises(ConfigError, match="k: got 0"):
        FirstK(0)


def test_stale_synchronous_lets_a_worker_lead_by_bound_steps_and_no_more() -> None:
    story = Story(StaleSynchronous(bound=1), 2)
    assert story.push(1) == [plain((1, 1), share=1 / 2), Release((1,))]
    assert story.push(1) == [plain((1, 2), share=1 / 2)]
    assert story.push(2) == [plain((2, 1), share=1 / 2), Release((1, 2))]
    assert story.push(2) == [plain((2, 2), share=1 / 2), Release((2,))]
    assert story.push(1) == [plain((1, 3), share=1 / 2), Release((1,))]


def test_stale_synchronous_goes_on_when_the_slowest_leaves() -> None:
    story = Story(StaleSynchronous(bound=0))
    assert story.push(1) == [plain((1, 1), share=1 / 3)]
    assert story.push(2) == [plain((2, 1), share=1 / 3)]
    assert story.tell(Left(3)) == [Release((1, 2))]
    assert story.push(2) == [plain((2, 2), share=1 / 2)]
    assert story.tell(Left(2)) == []
    assert story.push(1) == [plain((1, 2), share=1), Release((1,))]


def test_stale_synchronous_lets_nobody_go_when_another_than_the_slowest_leaves() -> None:
    story = Story(StaleSynchronous(bound=0), 4)
    story.push(1)
    story.push(2)
    assert story.tell(Left(4)) == []  # worker 3 has pushed nothing yet
    assert story.push(3) == [plain((3, 1), share=1 / 3), Release((1, 2, 3))]


def test_stale_synchronous_refuses_a_negative_bound() -> None:
    assert StaleSynchronous(0).bound == 0
    with pytest.raises(ConfigError, match="bound: got -1"):
        StaleSynchronous(-1)


class Timed:
    """Workers that take `periods` seconds a step each, under a rule: what happens in virtual time."""

    def __init__(self, policy: Policy, periods: list[float], pushes: int) -> None:
        story = Story(policy, len(periods))
        ledger = story.ledger
        self.gap = self.misses = 0
        self.released: Counter[float] = Counter()
        heap = [(period, worker) for worker, period in enumerate(periods, 1)]
        heapify(heap)
        for _ in range(pushes):
            now, worker = heappop(heap)
            step = ledger.workers[worker].seen + 1
            base = ledger.views[PushId(worker, step)].version
            self.misses = max(self.misses, ledger.version - base)
            for action in story.tell(Push(PushId(worker, step), base), now):
                if isinstance(action, Release):
                    self.released[now] += len(action.workers)
                    for free in action.workers:
                        heappush(heap, (now + periods[free - 1], free))
            clocks = [ledger.clock(worker) for worker in ledger.workers]
            self.gap = max(self.gap, max(clocks) - min(clocks))


def test_stale_synchronous_clocks_differ_by_bound_plus_one_at_most_and_do_so() -> None:
    periods = [1, 1.2, 2, 5]
    for bound in range(5):
        run = Timed(StaleSynchronous(bound), periods, 400)
        assert run.gap == bound + 1
        assert 0 < run.misses <= (2 * bound + 1) * (len(periods) - 1)
    assert Timed(StaleSynchronous(2), periods, 400).misses == 8


def test_stale_synchronous_with_bound_0_lets_everybody_go_when_synchronous_does() -> None:
    periods = [1, 1.2, 2, 5]
    ssp, bsp = (Timed(rule, periods, 200).released for rule in (StaleSynchronous(0), Synchronous()))
    assert ssp == bsp
    assert set(ssp) == {5.0 * n for n in range(1, 51)} and set(ssp.values()) == {4}


def test_stale_synchronous_without_bound_is_asynchronous() -> None:
    periods = [1, 1.3, 2.1]
    ssp, free = (Timed(rule, periods, 200) for rule in (StaleSynchronous(10**9), Asynchronous()))
    assert (ssp.released, ssp.misses) == (free.released, free.misses)


def test_a_worker_whose_push_was_lost_goes_on_with_the_model_as_it_is() -> None:
    for rule in (Synchronous(), Asynchronous(), FirstK(2), StaleSynchronous(0)):
        story = Story(rule)
        story.push(2)
        assert story.tell(Asked(1, 1)) == [Release((1,))]
        assert story.ledger.views[PushId(1, 2)].version == story.ledger.version
        story.push(3)
        assert story.push(1)[-1] == Release({Synchronous: (2, 3, 1), StaleSynchronous: (2, 3, 1)}.get(type(rule), (1,)))
