"""The decisions of a recorded run, made again: the same events must give the same actions, byte for byte."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import zip_longest
from typing import NamedTuple

from ps_elastic.errors import ConfigError, PolicyError, Stalled, WireError
from ps_elastic.policies.base import Policy
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import Action, Applied, Event, Measure, Measured, Step, Told, lines_of
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.reader import Answer, RecordedEvent, read_line

Watch = Callable[[Ledger, Event | Action, float], None]


class Mismatch(NamedTuple):
    """The first line that came out otherwise, counted from 1; `error` is why the policy could not continue there."""

    line: int
    recorded: str
    replayed: str
    error: str | None

    def __str__(self) -> str:
        at = f"line {self.line}"
        if not self.recorded or not self.replayed:
            ends = "the record ends before" if self.replayed else "nothing comes of"
            return f"{at}: {ends} {self.replayed or self.recorded}" + (f" ({self.error})" if self.error else "")
        recorded, replayed = json.loads(self.recorded), json.loads(self.replayed)
        name = " ".join(f"{key} {recorded[key]}" for key in ("event", "worker", "step") if key in recorded)
        for key in recorded | replayed:
            was, is_now = recorded.get(key), replayed.get(key)
            if key == "actions" and was != is_now:
                number, was, is_now = next(
                    (i, *pair) for i, pair in enumerate(zip_longest(was, is_now), 1) if pair[0] != pair[1]
                )
                key = f"action {number}"
            if was != is_now:
                why = f" ({self.error})" if self.error else ""
                return f"{at} ({name}): {key} was {json.dumps(was)}, and is {json.dumps(is_now)} now{why}"
        return f"{at} ({name}): written otherwise, with the same meaning"


class Replay(NamedTuple):
    """How many events were fed and how many actions they gave, up to the first mismatch if there is one."""

    events: int
    actions: int
    match: bool
    first_mismatch: Mismatch | None


def replay_decisions(
    policy: Policy,
    lines: Iterable[str],
    workers: Iterable[int],
    source: str = "events.jsonl",
    watch: Watch = lambda ledger, what, now: None,
    *,
    pipeline: int = 0,
) -> Replay:
    """Feed the recorded events to `policy`, fresh, and compare what it orders: to a copy for each bucket if layerwise.

    lines: of events.jsonl; workers: the initial ones. Steps and Measures are answered as the record says. A run that
    ended in the middle of an event (an error of the policy, a server that failed in a Step) must end there again.
    pipeline: pushes that a worker might leave unanswered.
    watch: told of each event once the ledger has it, and of each action once it is in effect.
    Raises ConfigError naming the line if the record is cut, malformed, or not of these workers.
    """
    produced: list[Told] = []
    shards: dict[int | None, tuple[Policy, Ledger]] = {}
    members = list(workers)
    events = actions = 0
    ended: str | None = None
    for number, line in enumerate(lines, 1):
        recorded = line.rstrip("\n")
        if ended is not None:
            return Replay(events, actions, False, Mismatch(number, recorded, "", ended))
        told = read_line(recorded, f"{source}:{number}", first=number == 1)
        if told.bucket not in shards:
            own = policy if told.bucket is None else copy.deepcopy(policy)
            shards[told.bucket] = own, _ledger(policy, members, pipeline, told, produced, f"{source}:{number}")
        own, ledger = shards[told.bucket]
        if ledger.started and isinstance(told.event, Applied):
            raise ConfigError("got 'applied', expected an event of its own", source=f"{source}:{number}")
        try:
            taken, ended = _replay_event(own, ledger, told, watch)
        except WireError as error:
            raise ConfigError(
                f"{error}; is the record damaged, or of other workers?", source=f"{source}:{number}"
            ) from error
        events, actions = events + 1, actions + taken
        (replayed,) = lines_of([produced.pop()])
        if replayed != recorded:
            return Replay(events, actions, False, Mismatch(number, recorded, replayed, ended))
    if not events:
        raise ConfigError("no events are recorded here", source=source)
    return Replay(events, actions, True, None)


def _ledger(
    policy: Policy, workers: Iterable[int], pipeline: int, told: RecordedEvent, produced: list[Told], where: str
) -> Ledger:
    """The ledger whose first line this is."""
    if policy.layerwise != (told.bucket is not None):
        takes, has = ("layers", "whole pushes") if policy.layerwise else ("whole pushes", "layers")
        raise ConfigError(f"policy {type(policy).__name__} takes {takes}, and the record is of {has}", source=where)
    bucket = None
    if told.bucket is not None:
        if told.buckets is None:
            raise ConfigError(f"got an event of bucket {told.bucket}, expected version 0 applied to it", source=where)
        bucket = told.bucket, told.buckets
    return Ledger(
        workers, jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views, log=produced.append,
        bucket=bucket, pipeline=pipeline,
    )  # fmt: skip


def _replay_event(policy: Policy, ledger: Ledger, told: RecordedEvent, watch: Watch) -> tuple[int, str | None]:
    """How many actions the event gave, and why it broke off, if it did."""
    event, now, answers = told.event, told.t_s, iter(told.answers)
    actions = 0
    try:
        with closing(decide(policy, ledger, event, now)) as decisions:  # type: ignore[type-var]
            watch(ledger, event, now)
            for action, _ in decisions:
                if action is None:
                    continue
                actions += 1
                watch(ledger, action, now)
                for wanted in _answers_of(action):
                    answer = next(answers, None)
                    if not isinstance(answer, wanted):
                        return actions, f"no answer to {action} is recorded"
                    list(decide(policy, ledger, answer, now))
    except (PolicyError, Stalled) as error:
        return actions, f"{type(error).__name__}: {error}"
    return actions, None


def _answers_of(action: Action) -> tuple[type[Answer], ...]:
    match action:
        case Step():
            return (Applied,)
        case Measure(pushes):
            return (Measured,) * len(pushes)
    return ()
