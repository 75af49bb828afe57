from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

import pytest

from ps_elastic.errors import PolicyError, Stalled, WireError
from ps_elastic.policies import Policy, policies
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import (
    Action,
    Applied,
    Asked,
    Done,
    Drop,
    Joined,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
    Wake,
    Woke,
)
from ps_elastic.policies.ledger import Ledger
from tests.law.rules import Deadline, TwoJobs
from tests.law.story import Loop, Story, as_lines, plain


@dataclass
class Watcher(Policy):
    """Uses every push, and notes what the ledger said before and after each action."""

    seen: list[object] = field(default_factory=list)

    def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
        self.seen.append((list(ledger.held), list(ledger.waiting), ledger.version))
        yield Step.mean([push.id])
        self.seen.append((list(ledger.held), list(ledger.waiting), ledger.version))
        yield Release((push.id.worker,))
        self.seen.append((list(ledger.held), list(ledger.waiting), ledger.version))


def started(policy: Policy, workers: int = 2, log: list[str] | None = None) -> Ledger:
    ledger = Ledger(range(1, workers + 1), log=None if log is None else as_lines(log.append))
    assert list(decide(policy, ledger, Applied(0), 0.0)) == []
    return ledger


def test_the_event_is_noted_before_the_iterator_is_touched() -> None:
    ledger = started(Watcher())
    decide(Watcher(), ledger, Push(PushId(1, 1), 0), 2.5)
    assert (list(ledger.held), ledger.now) == ([(1, 1)], 2.5)


def test_each_action_is_in_effect_before_the_rule_goes_on() -> None:
    story = Story(Watcher(), 2)
    story.push(1)
    assert story.policy.seen == [([(1, 1)], [1], 0), ([], [1], 1), ([], [], 1)]


def test_freed_payloads_come_with_the_action_that_freed_them() -> None:
    ledger = started(Watcher())
    decisions = decide(Watcher(), ledger, Push(PushId(1, 1), 0), 0.0)
    assert next(decisions) == (plain((1, 1)), ((1, 1),))
    list(decide(Watcher(), ledger, Applied(1), 0.0))
    assert list(decisions) == [(Release((1,)), ())]


def test_an_event_that_frees_payloads_by_itself_says_so_first() -> None:
    story = Story(Deadline(), 2)
    story.push(1)
    ledger = story.ledger
    ledger.freed.append(PushId(9, 9))
    assert next(iter(decide(story.policy, ledger, Left(2), 1.0))) == (None, ((9, 9),))


def test_a_step_that_is_not_answered_and_an_answer_that_nobody_awaits_are_refused() -> None:
    ledger = started(Watcher())
    decisions = decide(Watcher(), ledger, Push(PushId(1, 1), 0), 0.0)
    next(decisions)
    with pytest.raises(PolicyError, match="unanswered"):
        next(decisions)
    ledger = started(Watcher())
    with pytest.raises(PolicyError, match="version 1 was applied, but no Step awaits it"):
        decide(Watcher(), ledger, Applied(1), 0.0)
    with pytest.raises(PolicyError, match=r"the copy of push \(1, 1\) was measured, but no Measure"):
        decide(Watcher(), ledger, Measured(PushId(1, 1), 0.0), 0.0)
    decisions = decide(Watcher(), ledger, Push(PushId(1, 1), 0), 0.0)
    next(decisions)
    with pytest.raises(PolicyError, match="version 3 was applied after version 0"):
        decide(Watcher(), ledger, Applied(3), 0.0)


def test_a_breach_names_the_rule_and_the_event() -> None:
    class Wrong(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return [Drop(PushId(2, 1), "late")]

    with pytest.raises(PolicyError, match=r"policy Wrong on Push\(id=PushId\(worker=1, step=1\).*invariant 1"):
        Story(Wrong()).push(1)


def test_a_rule_that_yields_something_else_is_told_what_is_expected() -> None:
    class Wrong(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return [push.id]  # type: ignore[list-item]

    with pytest.raises(PolicyError, match=r"yielded PushId\(worker=1, step=1\); expected a Step, Drop"):
        Story(Wrong()).push(1)


def test_time_never_runs_backwards_and_stands_still_while_an_event_is_answered() -> None:
    story = Story(Watcher())
    story.push(1, now=5.0)
    story.push(2, now=3.0)
    assert story.ledger.now == 5.0
    ledger = started(Watcher())
    decisions = decide(Watcher(), ledger, Push(PushId(1, 1), 0), 1.0)
    next(decisions)
    list(decide(Watcher(), ledger, Applied(1), 9.0))
    assert ledger.now == 1.0


def test_a_woke_before_its_time_is_swallowed_and_one_wake_gives_one_call() -> None:
    story = Story(Deadline(patience_s=2.0), 2)
    assert story.push(1, now=1.0) == [Wake(3.0)]
    assert story.tell(Woke(), now=2.9) == []
    step, release = story.tell(Woke(), now=3.0)
    assert isinstance(step, Step)
    assert release == Release((1,))
    assert story.tell(Woke(), now=4.0) == []


def test_a_later_wake_replaces_the_earlier() -> None:
    class Sleeper(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
            yield Wake(2.0)
            yield Wake(8.0)

        def on_wake(self, ledger: Ledger) -> Iterator[Action]:
            yield Step.mean(ledger.held)
            yield Release(tuple(ledger.waiting))

    story = Story(Sleeper(), 1)
    story.push(1)
    assert story.tell(Woke(), now=3.0) == []
    assert len(story.tell(Woke(), now=8.0)) == 2


def test_a_joiner_computes_nothing_until_it_asks() -> None:
    story = Story(Watcher())
    assert story.tell(Joined(4)) == []
    assert story.tell(Asked(4, 0)) == [Release((4,))]
    assert (4, 1) in story.ledger.views


def test_a_rule_hears_of_joins_departures_and_asks_once_each() -> None:
    heard: list[str] = []

    class Listener(Watcher):
        def on_start(self, ledger: Ledger) -> tuple[Action, ...]:
            heard.append("start")
            return ()

        def on_join(self, worker: int, ledger: Ledger) -> tuple[Action, ...]:
            heard.append(f"join {worker}")
            return ()

        def on_leave(self, worker: int, ledger: Ledger) -> tuple[Action, ...]:
            heard.append(f"leave {worker}")
            return ()

        def on_ask(self, worker: int, ledger: Ledger) -> list[Action]:
            heard.append(f"ask {worker}")
            return [Release((worker,))]

    story = Story(Listener(), 2)
    for event in (Joined(3), Joined(3), Asked(3, 0), Asked(3, 0), Left(1), Left(1), Done(), Joined(4), Left(2)):
        story.tell(event)
    assert heard == ["start", "join 3", "ask 3", "leave 1"]


def test_after_the_end_who_asks_is_let_go_whatever_the_rule_would_say() -> None:
    class Mute(Watcher):
        def on_ask(self, worker: int, ledger: Ledger) -> tuple[Action, ...]:
            return ()

    story = Story(Mute(), 2)
    story.tell(Done())
    assert story.tell(Asked(1, 1)) == [Release((1,))]


def test_the_rule_of_a_queued_job_sees_its_worker_at_work_already() -> None:
    waiting: list[int] = []

    class Eager(TwoJobs):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            waiting.extend(ledger.waiting)
            return [plain(push.id), Release((push.id.worker,))]

    Story(Eager(), 2).push(1)
    assert waiting == []


def test_every_event_is_one_line_with_its_actions_and_answers_in_place() -> None:
    lines: list[str] = []
    story = Story(Watcher(), 1, moved=0.5, log=lines.append)
    story.push(1, now=1.25)
    story.tell(Asked(1, 2), now=2)
    start, push, asked = map(json.loads, lines)
    assert (asked["actions"], asked["t_s"]) == ([["release", [1], 0.0]], 2)
    assert (start["event"], start["version"], start["t_s"], start["rank"], start["actions"]) == (
        "applied",
        0,
        0.0,
        0,
        [],
    )
    assert (push["event"], push["worker"], push["step"], push["t_s"]) == ("push", 1, 1, 1.25)
    assert push["actions"] == [
        ["step", [[1, 1, 1.0, None]], 1.0, "mean", "step"],
        ["applied", 1, 0.5, 0.1, 0.0, 1.0, 0.0],
        ["release", [1], 0.0],
    ]


def test_measurements_stand_in_the_record_where_they_were_made() -> None:
    class Measurer(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
            yield Measure((PushId(2, 1), PushId(3, 1)))
            yield Release((push.id.worker,))

    lines: list[str] = []
    Story(Measurer(), 3, distance=0.5, log=lines.append).push(1)
    assert json.loads(lines[-1])["actions"] == [
        ["measure", [[2, 1], [3, 1]]],
        ["measured", 2, 1, 0.5],
        ["measured", 3, 1, 0.5],
        ["release", [1], 0.0],
    ]


def test_ignored_events_and_closed_debts_are_recorded() -> None:
    lines: list[str] = []
    story = Story(Deadline(), 2, log=lines.append)
    story.push(1)
    story.tell(Push(PushId(1, 1), 0))
    story.tell(Woke(), now=0.5)
    story.tell(Asked(1, 1))
    story.tell(Woke(), now=2.0)
    story.tell(Left(2))
    story.tell(Left(2))
    story.tell(Push(PushId(2, 1), 0))
    story.tell(Joined(1))
    story.tell(Done())
    story.tell(Done())
    records = [json.loads(line) for line in lines]
    assert [record.get("ignored") for record in records[2:5]] == ["duplicate", "early", "waiting"]
    assert records[6]["closed"] == [[2, 1]]
    assert [record.get("ignored") for record in records[7:]] == ["departed", "departed", "member", None, "done"]
    assert [record.get("closed") for record in records[:6] + records[7:]] == [None] * 11


def test_a_line_is_written_even_where_the_rule_breaks_a_law_or_stalls() -> None:
    class Idle(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return ()

    lines: list[str] = []
    with pytest.raises(Stalled):
        Story(Idle(), 1, log=lines.append).push(1)
    assert json.loads(lines[-1])["event"] == "push"


def test_a_loop_of_ones_own_is_what_decide_does_for_every_rule_and_pipeline() -> None:
    for name, cls in policies.items():
        for pipeline in (0, 2) if cls.pipelines else (0,):
            logs: list[list[str]] = [[], []]
            random = [Random(7), Random(7)]
            for kind, log, draw in zip((Story, Loop), logs, random, strict=True):
                story = kind(cls(), 3, log=log.append, pipeline=pipeline)
                log.append(str(tumult(story, draw)))
            assert logs[0] == logs[1], name


def tumult(story: Story, draw: Random) -> list[object]:
    """What comes of pushes, faults and the end, in an order drawn at random."""
    found: list[object] = []
    for now in range(60):
        ready = [id for id in story.ledger.views if id.step == story.ledger.workers[id.worker].seen + 1]
        id = draw.choice(ready) if ready else PushId(1, 1)
        worker = draw.randint(1, 4)
        faults = [Asked(id.worker, id.step), Left(worker), Joined(worker), Asked(worker, 0), Push(PushId(worker, 1), 0)]
        event = draw.choice([*faults, Woke()]) if not ready or draw.random() < 0.1 else None
        try:
            actions = story.push(id.worker, now=now) if event is None else story.tell(event, now=now)
            found.append((actions, story.freed, story.ledger.version))
        except (PolicyError, Stalled, WireError) as error:
            found.append(str(error))
    found.append((story.tell(Done(), now=61), story.freed))
    return found


def test_a_loop_that_an_error_ends_has_its_line_and_no_answer_is_forgiven() -> None:
    class Unanswered(Loop):
        def _answer(self, action: Action, now: float) -> None:
            pass

    for rule, message in ((Watcher(), "unanswered"), (policies.load("asynchronous")(), "unanswered")):
        lines: list[str] = []
        with pytest.raises(PolicyError, match=f"policy {type(rule).__name__} on Push.*{message}"):
            Unanswered(rule, log=lines.append).push(1)
        assert [json.loads(line)["event"] for line in lines] == ["applied", "push"]

    class StepsAlone(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return (Step.mean([push.id]),)

    lines = []
    with pytest.raises(PolicyError, match=r"policy StepsAlone on Push.*unanswered"):
        Unanswered(StepsAlone(), log=lines.append).push(1)
    assert json.loads(lines[-1])["actions"] == [["step", [[1, 1, 1.0, None]], 1.0, "mean", "step"]]


def test_a_rule_that_breaks_a_law_of_its_own_is_named_whether_it_yields_or_returns() -> None:
    def breach(push: Push, ledger: Ledger) -> Iterable[Action]:
        raise PolicyError("a law of its own")

    class Returns(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return breach(push, ledger)

    class Yields(Watcher):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            yield from breach(push, ledger)

    for rule in (Returns(), Yields()):
        for kind in (Story, Loop):
            with pytest.raises(PolicyError, match=rf"^policy {type(rule).__name__} on Push\(.*: a law of its own$"):
                kind(rule).push(1)


def test_without_a_log_nothing_is_kept_of_the_past() -> None:
    """What the ledger holds does not grow with the number of pushes, for any rule."""
    for name, cls in policies.items():
        story = Story(cls(), 3)
        sizes = []
        for step in range(1, 61):
            for worker in (1, 2, 3):
                story.push(worker)
            if story.ledger.waiting:  # for a deadline
                story.tell(Woke(), story.ledger.wake_at or 0.0)
            if step % 20 == 0:
                sizes.append(
                    {key: len(value) for key, value in vars(story.ledger).items() if hasattr(value, "__len__")}
                )
        assert sizes[0] == sizes[1] == sizes[2], name
