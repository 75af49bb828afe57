"""Another rule on recorded arrivals: who arrives when, what it uses, and the motion that headers allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Run, fit

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.analysis.replay.hindsight import Hindsight, Motion, PolicyTotals
from ps_elastic.errors import Stalled
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Applied, Asked, Done, Joined, Left, Push, PushId, Step, Term
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.deadline import Deadline
from ps_elastic.policies.rules.elastic_bound import ElasticBound
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.records.reader import read_line
from ps_elastic.simulation.simulate import simulate
from tests.law.story import Story


def arrivals(*pushes: tuple[int, float], end: float, workers: int = 2) -> list[str]:
    """The record of an asynchronous run: who pushed at which second."""
    lines: list[str] = []
    story = Story(Asynchronous(), workers, log=lines.append)
    for worker, now in pushes:
        story.push(worker, now=now)
    story.tell(Done(), now=end)
    return lines


def ask(policy: Policy, lines: list[str], workers: int = 2, motion: Motion | None = None) -> dict[str, Any]:
    told = (read_line(line, "", first=i == 0) for i, line in enumerate(lines))
    return Hindsight(policy, workers, motion or Motion()).run(told)


def test_a_worker_that_was_not_released_pushes_as_soon_as_it_is() -> None:
    figures = ask(Synchronous(), arrivals((1, 1.0), (1, 2.0), (1, 3.0), (2, 4.0), end=6.0))
    # 1 waits from 1 to 4, and pushes its second there at once; its third is never sent.
    assert figures == {
        "pushes": 3, "used": 2, "dropped": 0, "held": 1, "releases": 2, "versions": 1,
        "staleness": {"mean": 0.0, "max": 0}, "wait_s": 3.0 + 2.0, "wait_share": 5.0 / 12.0, "unsent": 1,
    }  # fmt: skip


def test_a_worker_that_was_released_earlier_arrives_no_earlier() -> None:
    lines: list[str] = []
    story = Story(Synchronous(), 2, log=lines.append)
    for worker, now in ((1, 1.0), (2, 5.0), (1, 6.0), (2, 7.0)):
        story.push(worker, now=now)
    figures = ask(Asynchronous(), lines)
    assert (figures["used"], figures["wait_s"], figures["staleness"]) == (4, 0.0, {"mean": 0.75, "max": 1})


def test_what_this_rule_wants_to_be_woken_for_comes_at_its_time() -> None:
    lines = arrivals((1, 1.0), (1, 1.2), (2, 3.0), (1, 3.5), end=4.0)
    figures = ask(Deadline(deadline_s=1.0), lines)
    # The round of 1 ends at 2.0 without 2; 1 pushes its second there, and no round waits for 2, which is late at 3.0.
    assert (figures["used"], figures["dropped"], figures["held"], figures["versions"]) == (2, 1, 1, 2)
    assert figures["wait_s"] == (2.0 - 1.0) + (4.0 - 3.5)
    on_time = ask(Deadline(deadline_s=2.0), lines)  # woken and pushed at 3.0: the push comes first
    assert on_time["dropped"] == 0 and on_time["used"] >= 2


def test_the_run_ends_where_the_recorded_one_did() -> None:
    lines = arrivals((1, 1.0), (2, 2.0), (1, 3.0), end=3.0)
    story: list[str] = [*lines, lines[-1].replace('"done"', '"woke"')]
    assert ask(Synchronous(), story)["held"] == 1
    assert ask(Asynchronous(), lines[:-1])["used"] == 3


def test_a_worker_that_leaves_takes_what_it_has_not_sent_with_it() -> None:
    lines: list[str] = []
    story = Story(Asynchronous(), 3, log=lines.append)
    story.push(1, now=1.0)
    story.push(1, now=2.0)
    story.push(2, now=3.0)
    story.tell(Left(1), now=4.0)
    story.tell(Joined(4), now=5.0)
    story.tell(Asked(4, 0), now=5.0)
    story.push(4, now=6.0)
    story.push(3, now=7.0)
    figures = ask(Synchronous(), lines, 3)
    assert (figures["pushes"], figures["used"], figures["unsent"], figures["versions"]) == (4, 4, 1, 1)


def test_a_push_that_was_lost_is_lost_and_a_reply_that_was_lost_is_not() -> None:
    lines: list[str] = []
    story = Story(Asynchronous(), 2, log=lines.append)
    story.push(1, now=1.0)
    story.tell(Asked(1, 1), now=2.0)  # the reply did not come: it is sent again
    story.push(1, now=3.0)
    story.tell(Push(PushId(1, 2), 1), now=4.0)  # a second copy
    story.tell(Asked(1, 3), now=5.0)  # the third push did not come
    story.push(1, now=6.0)
    story.push(2, now=7.0)
    assert '"actions": [["release", [1], 0.0]]' in lines[2]
    figures = ask(Asynchronous(), lines)
    assert (figures["pushes"], figures["used"], figures["releases"], figures["staleness"]["max"]) == (4, 4, 5, 3)
    tally = PolicyTotals()
    assert replay_decisions(Asynchronous(), lines, [1, 2], watch=tally.note).match
    assert figures == {**tally.figures(), "unsent": 0}
    assert ask(Synchronous(), lines)["used"] == 2


def test_a_rule_that_would_have_stalled_says_so() -> None:
    class Idle(Synchronous):
        def on_push(self, push: Push, ledger: object) -> Iterator[Step]:
            yield from ()

    with pytest.raises(Stalled, match=r"workers \[1, 2\] all wait"):
        ask(Idle(), arrivals((1, 1.0), (2, 2.0), end=3.0))


RULES = (
    "synchronous", "asynchronous", "stale_synchronous:bound=1", "first_k:k=1", "variance_bounded:quorum=0.4",
    "norm_bounded:beta=0.5", "asgrad", "softsync:n=2", "delay_bounded:bound=2",
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_recorded_rule_decides_as_it_did(tmp_path: Path, rule: str) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={rule}", samples=120)
    tally = PolicyTotals()
    replay_decisions(run.config.policy.build(), run.events, range(1, 4), watch=tally.note)
    figures = ask(run.config.policy.build(), run.events, 3)
    assert figures["used"] >= 20
    assert figures == {**tally.figures(), "unsent": 0}


def test_a_recorded_rule_with_a_clock_decides_as_it_did(tmp_path: Path) -> None:
    source = {"task": "helpers:Blobs", "policy": "deadline:deadline_s=0.08"}
    simulate(
        {**source, "simulation": {"compute": {"name": "exponential"}}}, ["train.samples=200"], workers=5,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    lines, tally = (tmp_path / "run" / "events.jsonl").read_text().splitlines(), PolicyTotals()
    assert sum('"woke"' in line for line in lines) > 5
    replay_decisions(Deadline(deadline_s=0.08), lines, range(1, 6), watch=tally.note)
    assert ask(Deadline(deadline_s=0.08), lines, 5) == {**tally.figures(), "unsent": 0}


def motions(run: Run) -> Iterator[tuple[Applied, float]]:
    """(what headers allow, what the model did) for each step of a run."""
    optimizer = run.config.optimizer
    motion = Motion(optimizer.momentum, optimizer.nesterov)
    for line in map(json.loads, run.events):
        if line["event"] == "push":
            motion.arrived(Push(PushId(line["worker"], line["step"]), 0, payload_norm=line["payload_norm"]))
        step = None
        for name, *fields in line["actions"]:
            if name == "step":
                terms = [Term(PushId(w, s), weight, stands and PushId(*stands)) for w, s, weight, stands in fields[0]]
                step = Step(tuple(terms), *fields[1:])
            elif name == "applied":
                assert step is not None
                yield motion.applied(step, fields[0]), fields[1]


@pytest.mark.parametrize(
    "sgd", [(), ("optimizer.momentum=0.8",), ("optimizer.momentum=0.8", "optimizer.nesterov=true")]
)
@pytest.mark.parametrize("rule", ["asynchronous", "fedbuff", "variance_bounded:quorum=0.4"])
def test_the_model_moves_no_farther_than_headers_allow(tmp_path: Path, rule: str, sgd: tuple[str, ...]) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={rule}", *sgd, "optimizer.lr=0.05", samples=160)
    pairs = list(motions(run))
    assert len(pairs) > 15
    for allowed, moved in pairs:
        assert moved <= allowed.moved * (1 + 1e-4)  # float32: norms and steps are rounded
    if rule == "asynchronous" and not sgd:
        assert all(moved == pytest.approx(allowed.moved, rel=1e-4) for allowed, moved in pairs)


def test_the_next_step_is_within_reach_of_the_last(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", "optimizer.momentum=0.8", samples=100)
    pairs = [allowed for allowed, _ in motions(run)]
    norms = [line["payload_norm"] for line in map(json.loads, run.events) if line["event"] == "push"]
    for last, now, norm in zip(pairs, pairs[1:], norms[1:], strict=False):
        assert now.moved == pytest.approx((last.coast + last.gain * norm) / 3)


def test_a_rule_with_a_budget_holds_by_the_norms_recorded() -> None:
    lines = arrivals((1, 1.0), (1, 2.0), (1, 3.0), (2, 4.0), end=5.0)
    assert ask(ElasticBound(bound="inf"), lines)["used"] == 4
    # Each step of share 1/2 moves the model by 1/2: two of them fit below 1.2, and the third waits for worker 2.
    held = ask(ElasticBound(bound=1.2), lines)
    assert (held["used"], held["versions"], held["wait_s"]) == (4, 3, 1.0)
    assert ask(ElasticBound(bound=0.0), lines)["versions"] == 1
