"""Random schedules with every kind of fault, over every rule that is registered."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings

from ps_elastic.analysis.replay.decisions import replay_decisions
from tests.law.cases import CASES, pipeline_of
from tests.law.harness import Move, World
from tests.law.schedule import SETTINGS, draws, play, workers


@pytest.mark.parametrize("case", CASES)
def test_every_law_holds_and_the_log_tells_the_whole_run(case: str) -> None:
    check_laws(case, max_examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_law_holds_on_many_schedules(case: str) -> None:
    check_laws(case, max_examples=500)


def check_laws(case: str, max_examples: int) -> None:
    """The world asserts the laws; then the same draws must give the same bytes from a rule whose state goes
    through JSON after every event, and the recorded events must give the recorded actions again."""
    make = CASES[case]

    @settings(SETTINGS, max_examples=max_examples)
    @given(workers, draws)
    def check(workers: int, draws: list[int]) -> None:
        lines = play(make, workers, draws)
        assert play(make, workers, draws, reload=True) == lines
        members = range(1, max(workers, make().workers_needed()) + 1)
        replay = replay_decisions(make(), lines, members, pipeline=pipeline_of(make))
        assert (replay.match, replay.first_mismatch, replay.events) == (True, None, len(lines))

    check()


def test_the_schedules_hold_everything_that_can_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a few hundred moves each kind of move is made, early and late wakes among them."""
    made: Counter[str] = Counter()
    do = World.do

    def count(world: World, move: Move) -> None:
        early = move.kind == "wake early" and world.now < (world.ledger.wake_at or 0)
        made["wake early indeed" if early else move.kind] += 1
        do(world, move)

    monkeypatch.setattr(World, "do", count)
    for seed in range(40):
        random = Random(seed)
        play(CASES["Deadline"], 3, [random.randrange(2**20) for _ in range(60)])
    kinds = {"push", "ask", "ask late", "leave", "join", "repeat", "lose push", "lose reply", "wake", "done"}
    assert kinds | {"wake early", "wake early indeed"} == set(made)
    assert min(made.values()) >= 5, made
