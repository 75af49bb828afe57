"""What a rule did, counted from the record alone, is what the server counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import fit

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.analysis.replay.hindsight import PolicyTotals
from ps_elastic.policies.events import Asked, Done, Joined, Left, Push, PushId
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.records.reader import open_run
from tests.law.story import Story

RULES = (
    "synchronous", "asynchronous", "stale_synchronous:bound=1", "first_k:k=1", "variance_bounded:quorum=0.4",
    "variance_bounded:quorum=0.4:substitute=mean", "asgrad", "random_subset", "elastic_bound:bound=2M",
    "deadline:deadline_s=0.4:missing=substitute",
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_figures_are_those_of_the_summary(tmp_path: Path, rule: str) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={rule}", samples=120)
    record, tally = open_run(str(run.directory)), PolicyTotals()
    assert replay_decisions(run.config.policy.build(), record.lines(), range(1, 4), watch=tally.note).match
    figures, summary = tally.figures(), run.summary
    at_the_end = sum(line["reason"] == "done" for line in run.lines(0, "dropped"))
    late = sum(json.loads(line)["event"] == "push" for line in run.events) - figures["pushes"]
    assert figures["used"] == summary["used"] > 20
    assert figures["dropped"] == summary["dropped"] - at_the_end
    assert figures["held"] == at_the_end - late
    assert figures["versions"] == summary["versions"]
    assert figures["staleness"] == summary["staleness"]
    assert figures["pushes"] == figures["used"] + figures["dropped"] + figures["held"]


def told(lines: list[str], workers: int, tally: PolicyTotals) -> dict[str, Any]:
    assert replay_decisions(Synchronous(), lines, range(1, workers + 1), watch=tally.note).match
    return tally.figures()


def test_waiting_counts_from_the_push_to_the_release_of_who_is_there() -> None:
    lines: list[str] = []
    story = Story(Synchronous(), 2, log=lines.append)
    story.push(1, now=1.0)
    story.tell(Push(PushId(1, 1), 0), now=2.0)  # a second copy
    story.tell(Joined(3), now=3.0)
    story.tell(Left(2), now=4.0)
    story.tell(Asked(3, 0), now=5.0)
    story.push(3, now=6.0)  # a step of both, and both go on
    story.push(1, now=7.0)
    story.tell(Done(), now=8.0)
    story.push(3, now=9.0)
    figures = told(lines, 2, tally := PolicyTotals())
    assert (figures["pushes"], figures["used"], figures["held"], figures["dropped"]) == (3, 2, 1, 0)
    assert (figures["versions"], figures["releases"]) == (1, 3)
    assert figures["wait_s"] == (6.0 - 1.0) + (8.0 - 7.0)
    assert tally.present_s == 8.0 + 4.0 + 5.0
    assert figures["wait_share"] == 6.0 / 17.0


def test_a_run_without_done_ends_with_its_last_event() -> None:
    lines: list[str] = []
    story = Story(Asynchronous(), 2, log=lines.append)
    story.push(1, now=1.0)
    story.push(2, now=4.0)
    tally = PolicyTotals()
    replay_decisions(Asynchronous(), lines, [1, 2], watch=tally.note)
    figures = tally.figures()
    assert (figures["used"], figures["releases"], figures["wait_s"], tally.present_s) == (2, 2, 0.0, 8.0)
