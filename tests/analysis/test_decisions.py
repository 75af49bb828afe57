from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.errors import ConfigError, Stalled
from ps_elastic.policies import Policy
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import Action, Asked, Done, Joined, Left, Push, PushId, Step
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.first_k import FirstK
from ps_elastic.policies.rules.stale_synchronous import StaleSynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from tests.law.rules import Deadline, Lottery, TwoJobs, WithinBudget
from tests.law.story import Story


def record(make: Callable[[], Policy] = StaleSynchronous) -> list[str]:
    """The log of a short run of three workers with a departure, a joiner and an end."""
    lines: list[str] = []
    story = Story(make(), 3, moved=0.1 + 0.2, distance=0.1, log=lines.append)
    for worker in (1, 2, 2, 3, 1):
        if worker not in story.ledger.waiting:
            story.push(worker, now=len(lines) / 3, norm=1 / worker)
    for event in (Left(3), Joined(4), Asked(4, 0), Push(PushId(3, 1), 0), Done()):
        story.tell(event, now=len(lines) / 3)
    return lines


def test_a_recorded_run_replays_to_the_same_bytes() -> None:
    for make in (StaleSynchronous, FirstK, TwoJobs, WithinBudget, Lottery, Deadline):
        lines = record(make)
        count = sum(
            action[0] not in ("applied", "measured") for line in lines for action in json.loads(line)["actions"]
        )
        assert replay_decisions(make(), [line + "\n" for line in lines], [1, 2, 3]) == (len(lines), count, True, None)


def test_another_setting_is_found_at_the_first_line_that_differs() -> None:
    lines = record()
    replay = replay_decisions(StaleSynchronous(bound=0), lines, [1, 2, 3])
    assert not replay.match
    assert replay.first_mismatch is not None
    assert (replay.first_mismatch.line, replay.first_mismatch.recorded) == (2, lines[1])
    assert json.loads(lines[1])["actions"][:2] == json.loads(replay.first_mismatch.replayed)["actions"]
    assert (replay.events, replay.actions) == (2, 1)


def test_a_single_changed_byte_of_an_action_is_found() -> None:
    lines = record()
    lines[3] = lines[3].replace('"release", [2]', '"release", [3]')
    replay = replay_decisions(StaleSynchronous(), lines, [1, 2, 3])
    assert replay.first_mismatch is not None and replay.first_mismatch.line == 4


def test_a_step_that_the_record_does_not_have_ends_the_replay_there() -> None:
    replay = replay_decisions(StaleSynchronous(), record(Synchronous), [1, 2, 3])
    assert replay.first_mismatch is not None
    assert replay.first_mismatch.line == 2
    assert replay.first_mismatch.error is not None and "no answer to Step" in replay.first_mismatch.error


def test_a_rule_that_breaks_a_law_in_the_replay_is_named() -> None:
    @dataclass
    class Wrong(Policy):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            return [Step(())]

    mismatch = replay_decisions(Wrong(), record(), [1, 2, 3]).first_mismatch
    assert mismatch is not None and mismatch.error is not None
    assert mismatch.error.startswith("PolicyError: policy Wrong on Push")


@dataclass
class Idle(Policy):
    def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
        return ()


def test_a_run_that_stalled_replays_to_the_same_stall() -> None:
    lines: list[str] = []
    with pytest.raises(Stalled):
        Story(Idle(), 1, log=lines.append).push(1)
    assert replay_decisions(Idle(), lines, [1]).match
    replay = replay_decisions(Idle(), [*lines, lines[-1]], [1])
    assert replay.first_mismatch is not None and replay.first_mismatch.line == 3
    assert replay.first_mismatch.error is not None and "Stalled" in replay.first_mismatch.error


def test_a_server_that_failed_in_the_middle_of_a_step_leaves_a_record_that_replays() -> None:
    lines: list[str] = []
    story = Story(StaleSynchronous(), 2, log=lines.append)
    push = Push(PushId(1, 1), 0)
    with pytest.raises(ZeroDivisionError):
        fail_in_the_step(story.policy, story.ledger, push)
    assert json.loads(lines[-1])["actions"] == [["step", [[1, 1, 1.0, None]], 0.5, "mean", "step"]]
    assert replay_decisions(StaleSynchronous(), lines, [1, 2]) == (2, 1, True, None)


def fail_in_the_step(policy: Policy, ledger: Ledger, push: Push) -> None:
    for _ in decide(policy, ledger, push, 0.0):
        raise ZeroDivisionError


def test_a_damaged_record_is_refused_with_the_line_and_the_reason() -> None:
    lines = record()
    start, push = lines[:2]
    for damaged, message in {
        (start, push[:-20]): "events.jsonl:2: cut or malformed",
        (start, ""): "events.jsonl:2: cut or malformed",
        (start, "[1, 2]"): "events.jsonl:2: cut or malformed",
        (start, push.replace('"push"', '"pushed"')): "events.jsonl:2: .*unknown event 'pushed'",
        (start, push.replace('"step": 1', '"step": "1"')): "events.jsonl:2: .*step is '1', expected a whole number",
        (start, push.replace('"t_s"', '"s"')): "events.jsonl:2: the line lacks 't_s'",
        (start, push.replace('"actions"', '"acts"')): "events.jsonl:2: the line lacks 'actions'",
        (start, push.replace('"actions": [', '"actions": [3, ')): "events.jsonl:2: cut or malformed",
        (start, push.replace('"applied", 1', '"applied", 1, 1, 1')): "events.jsonl:2: cut or malformed",
        (
            start,
            push.replace('"step": 1', '"step": 5'),
        ): "events.jsonl:2: .*never assigned.*damaged, or of other workers",
        (start, start): "events.jsonl:2: got 'applied', expected an event of its own",
        (push,): "events.jsonl:1: got 'push', expected the run's first, version 0 applied",
        (): "events.jsonl: no events are recorded here",
    }.items():
        with pytest.raises(ConfigError, match=message):
            replay_decisions(StaleSynchronous(), damaged, [1, 2, 3])


def test_a_record_of_other_workers_differs_or_is_refused() -> None:
    assert not replay_decisions(StaleSynchronous(), record(), [1, 2]).match
    lines: list[str] = []
    Story(StaleSynchronous(), 2, log=lines.append).tell(Asked(2, 1))
    with pytest.raises(ConfigError, match=r"events.jsonl:2: .*is the record damaged, or of other workers"):
        replay_decisions(StaleSynchronous(), [lines[0], lines[1].replace('"step": 1', '"step": 2')], [1, 2])


def test_the_record_is_named_in_the_complaint(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("{\n")
    with path.open() as lines, pytest.raises(ConfigError, match=f"{path}:1: cut or malformed"):
        replay_decisions(StaleSynchronous(), lines, [1], source=str(path))


def test_an_error_in_the_user_s_rule_is_not_taken_for_a_mismatch() -> None:
    @dataclass
    class Broken(Policy):
        def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        replay_decisions(Broken(), record(), [1, 2, 3])
