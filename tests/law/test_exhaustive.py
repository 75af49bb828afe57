"""Every interleaving of a small world, for every rule: see tests/law/walker.py for what is checked on the way."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import pytest

from tests.law.cases import CASES, pipeline_of
from tests.law.harness import World
from tests.law.walker import fork, freeze, walk

SETTINGS = [case for case in CASES if ":" in case and "+" not in case]
# Of what stands in for a gradient OwnStandsIn is walked in full, and who may leave two pushes unanswered may leave one.
ALIKE = ["MeanStandsIn", "LastStandsIn", "Lottery+1", "asynchronous+1"]
# Quick: every rule as it comes, and each way to run ahead. Of its other settings the worlds are smaller then; random
# schedules go through them all, with faults.
SLOW = [*SETTINGS, *ALIKE]
QUICK = [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]


@pytest.mark.parametrize("case", SLOW)
def test_no_order_of_the_pushes_of_two_breaks_a_law(case: str) -> None:
    walk(CASES[case], workers=2, pushes=2)


@pytest.mark.parametrize("case", QUICK)
def test_no_order_of_pushes_breaks_a_law(case: str) -> None:
    if pipeline_of(CASES[case]):  # replies are moves of their own: as many worlds with fewer workers
        walk(CASES[case], workers=2, pushes=2)
        walk(CASES[case], workers=1, pushes=4)
    else:
        walk(CASES[case], workers=3, pushes=2)


@pytest.mark.parametrize("case", QUICK)
def test_no_order_with_one_fault_breaks_a_law(case: str) -> None:
    walk(CASES[case], workers=1 if pipeline_of(CASES[case]) else 2, pushes=2, faults=1, wakes=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not pipeline_of(CASES[case])])
def test_no_order_with_one_fault_and_two_wakes_breaks_a_law(case: str) -> None:
    walk(CASES[case], workers=2, pushes=2, faults=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_order_of_three_workers_with_one_fault_breaks_a_law(case: str) -> None:
    if pipeline_of(CASES[case]):
        walk(CASES[case], workers=2, pushes=3)
        if pipeline_of(CASES[case]) == 1:
            walk(CASES[case], workers=2, pushes=2, faults=1)
        else:  # two unanswered pushes make a difference from the third push on
            walk(CASES[case], workers=1, pushes=3, faults=1)
    else:
        walk(CASES[case], workers=3, pushes=2, faults=1, wakes=1)


def test_merging_worlds_loses_none() -> None:
    for case, number in {"asynchronous": 6, "first_k:k=1": 6, "synchronous": 4}.items():  # 4! / (2! 2!), 2 x 2
        start = World(CASES[case](), workers=2, pushes=2)
        start.forget_faults()
        orders: list[Hashable] = []
        reached = {freeze(start), *everything(start, orders)}
        assert len(orders) == number
        assert walk(CASES[case], workers=2, pushes=2).states == len(reached)


def everything(world: World, orders: list[Hashable]) -> Iterator[Hashable]:
    """The key of every world that can come of this one, order by order, nothing merged."""
    moves = [move for move in world.moves() if not move.fault]
    if not moves:
        orders.append(freeze(world))
    for move in moves:
        child = fork(world)
        child.do(move)
        child.forget_faults()
        yield freeze(child)
        yield from everything(child, orders)
