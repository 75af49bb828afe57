from __future__ import annotations

import json
import math

import pytest
from helpers import Desk

from ps_elastic.config.sections import Target
from ps_elastic.errors import ConfigError
from ps_elastic.policies.events import Push, PushId
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.discrepancy import Use
from ps_elastic.server.evaluator import Evaluation
from ps_elastic.server.run import Run
from ps_elastic.server.totals import BoundFacts, Mean, Totals
from ps_elastic.transport.messages import PushMessage


def use(staleness: int, distance: float, scaled: float) -> Use:
    return Use(PushId(1, 1), Push(PushId(1, 1), 0), staleness, distance, scaled, 0.0, 0.0, 0.0, 0.1, 1.0, 1.0)


def test_a_mean_is_of_the_finite_values_alone() -> None:
    mean = Mean()
    assert mean.as_dict("mean", "rms", "max") == {"mean": None, "rms": None, "max": None}
    for value in (3.0, math.nan, -4.0, math.inf):
        mean.note(value)
    assert mean.as_dict("mean", "rms", "max") == {"mean": -0.5, "rms": math.sqrt(12.5), "max": 3.0}


def test_the_maximum_of_negative_values_is_one_of_them() -> None:
    mean = Mean()
    mean.note(-2.0)
    assert mean.as_dict("max") == {"max": -2.0}


def test_pushes_bytes_and_samples_are_counted() -> None:
    totals, ledger = Totals(2), Ledger([1, 2])
    run = Run([ledger], [1], totals, BoundFacts(2), Tracker(0, print), "gradient", 0.1, 1 << 10, None, None)
    ledger.held[PushId(1, 1)] = Push(PushId(1, 1), 0)
    run.arrived(PushMessage(1, 1, 0, (), samples=32, loss=0.5, waited_s=0.25), 100)
    ledger.held[PushId(2, 1)] = Push(PushId(2, 1), 0)
    run.arrived(PushMessage(2, 1, 0, (), samples=32, loss=0.7, waited_s=0.5), 50)
    del ledger.held[PushId(2, 1)]
    run.arrived(PushMessage(1, 2, 0, (), samples=16, loss=0.4, waited_s=1.0), 100)
    summary = totals.summary(4.0)
    expected = {"pushes": 3, "samples_computed": 80, "bytes_up": 250, "held_max": 2, "samples": 0, "used": 0}
    assert {key: summary[key] for key in expected} == expected
    assert summary["wait_share"] == {"1": 0.25, "2": 0.125}
    assert (summary["shared_steps"], summary["shared_by_workers"]) == (0, None)
    assert totals.loss == 0.4


def test_a_summary_of_nothing_is_zeros_and_nulls_in_json() -> None:
    summary = Totals(2).summary(0.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["wait_share"] == {"1": None, "2": None}
    assert summary["staleness"] == {"mean": None, "max": None}
    assert summary["discrepancy"] == {"rms": None, "max": None}
    assert summary["metrics"] == {"loss": None, "accuracy": None}


def test_discrepancy_and_its_multiple_of_the_step_size_are_counted_apart() -> None:
    totals = Totals(1)
    totals.note_used(use(3, 2.0, 4.0))
    totals.note_used(use(1, 3.0, 12.0))
    summary = totals.summary(1.0)
    assert summary["B_rms"] == math.sqrt((4.0**2 + 12.0**2) / 2) and summary["B_max"] == 12.0
    assert summary["staleness"] == {"mean": 2.0, "max": 3}
    assert summary["discrepancy"] == {"rms": math.sqrt((4 + 9) / 2), "max": 3.0}


def test_a_discrepancy_that_is_not_known_counts_in_nothing_but_the_pushes() -> None:
    desk = Desk(Asynchronous(), 2, discrepancy="off")
    desk.push(1)
    desk.push(2)
    summary = desk.server.totals.summary(1.0)
    assert (summary["used"], summary["staleness"]["mean"]) == (2, 0.5)
    assert summary["discrepancy"] == {"rms": None, "max": None} and summary["B_rms"] is None


def test_the_time_to_the_target_is_that_of_the_first_evaluation_to_reach_it() -> None:
    totals = Totals(1, Target("accuracy", ">=", 0.9))
    reached = [
        totals.note_evaluation(Evaluation(samples, 1, t_s, {"loss": 1.0, "accuracy": accuracy}))
        for samples, t_s, accuracy in [(10, 1.0, 0.5), (20, 2.0, 0.9), (30, 3.0, 0.95), (40, 4.0, 0.2)]
    ]
    assert reached == [False, True, True, False]
    summary = totals.summary(5.0)
    assert summary["time_to_target_s"] == 2.0
    assert summary["metrics"] == {"loss": 1.0, "accuracy": 0.2}


def test_a_target_that_the_task_does_not_tell_is_refused_by_name() -> None:
    totals = Totals(1, Target("acuracy", ">=", 0.9))
    with pytest.raises(ConfigError, match=r"train\.stop_at: unknown metric 'acuracy'; nearest 'accuracy'"):
        totals.note_evaluation(Evaluation(10, 1, 1.0, {"loss": 1.0, "accuracy": 0.5}))


def test_a_metric_that_is_not_finite_is_null_in_the_summary() -> None:
    totals = Totals(1)
    totals.note_evaluation(Evaluation(10, 1, 1.0, {"loss": math.nan}))
    assert totals.summary(1.0)["metrics"] == {"loss": None, "accuracy": None}
