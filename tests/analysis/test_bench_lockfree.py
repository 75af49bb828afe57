"""`bench lockfree`: what it makes of the times found, and that both sides of it run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ps_elastic.analysis.bench import hogwild, lockfree, run_benchmark
from ps_elastic.config.load import load

STEPS = 20


def steps(step_s: float) -> dict[str, Any]:
    """The times of a worker's replies, after a slow start."""
    return {"replies": {"t_s": [-5.0, -4.0, -3.0, -2.0, -1.0, *(step_s * i for i in range(STEPS))]}}


def found(ranks: int, plan: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, list[list[Any]]]:
    """2 workers, 10 ms a step of ours and 20 of theirs; 2 s to the loss of ours and 4 of theirs."""
    assert ranks == 3
    made: dict[str, list[list[Any]]] = {}
    for name, phase in plan:
        if "config" in phase:
            load(phase["config"])
        answers: dict[str, list[Any]] = {
            "train": [{"summary": {"time_to_target_s": 2.0}}, steps(0.01), steps(0.01)],
            "lost": [0.25, None, None],
            "hogwild": [[{"steps_s": [[9.0] * 5 + [0.02] * STEPS] * 2, "target_s": 4.0}] * 3, None, None],
        }
        made.setdefault(name, []).append(answers[phase["do"]])
    return made


def test_updates_are_those_of_all_workers_and_seconds_those_to_the_target(monkeypatch):
    monkeypatch.setattr(lockfree, "run_phases", found)
    rows = {line["case"]: line for line in run_benchmark("lockfree:sizes=[1000000]:steps=[20]:repeats=2")["rows"]}
    alone = rows["1 M parameters, compute alone"]
    assert (round(alone["ours"]), alone["ratio"], alone["met"]) == (100, 1.0, None)
    dense = rows["1 M parameters, dense, plain"]
    assert (round(dense["ours"]), round(dense["baseline"]), dense["met"]) == (200, 100, True)
    assert rows["1 M parameters, top_k 1 %, plain"]["met"] == (dense["ratio"] >= 2)
    assert rows["digits to a loss of 0.5, dense, plain"]["ratio"] == 0.5
    assert rows["1 M parameters, dense, lock, share lost"]["met"] is False
    assert rows["1 M parameters, dense, plain, share lost"]["ours"] == 0.25


@pytest.mark.slow
def test_hogwild_comes_to_the_loss_and_stops_there(monkeypatch):
    ended = hogwild.run({"name": "digits"}, workers=2, steps=20_000, rate=0.05, target=0.8, every=50)
    assert 0 < ended["target_s"] < 60
    assert all(0 < len(times) < 20_000 for times in ended["steps_s"])


@pytest.mark.slow
@pytest.mark.mpi
def test_a_small_one_runs_and_loses_nothing_under_the_lock():
    rows = run_benchmark("lockfree:sizes=[20000]:steps=[30]:repeats=1")["rows"]
    assert [line["ours"] for line in rows if "lock, share lost" in line["case"]] == [0.0, 0.0]
    assert all(line["ours"] > 0 and line["baseline"] > 0 for line in rows if "lost" not in line["case"])
