"""Tell a story to a rule: give an event, get the list of actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ps_elastic.policies import Policy
from ps_elastic.policies.decide import ANSWERS, begin, decide, end, take
from ps_elastic.policies.events import Action, Applied, Event, Measure, Measured, Push, PushId, Step, Told, lines_of
from ps_elastic.policies.ledger import Ledger


def as_lines(log: Callable[[str], None] | None) -> Callable[[Told], None] | None:
    """What a ledger logs to, so that `log` gets each line at once."""
    return None if log is None else lambda told: log(lines_of([told])[0])


class Story:
    """A rule and its ledger after the start of a run with workers 1..p; each Step moves the model by `moved`."""

    def __init__(
        self,
        policy: Policy,
        workers: int = 3,
        *,
        moved: float = 1.0,
        distance: float = 0.0,
        pipeline: int = 0,
        log: Callable[[str], None] | None = None,
        bucket: tuple[int, int] | None = None,
    ) -> None:
        self.policy: Any = policy
        self.moved, self.distance = moved, distance
        self.ledger = Ledger(
            range(1, workers + 1), jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views,
            log=as_lines(log), pipeline=pipeline, bucket=bucket,
        )  # fmt: skip
        self.freed: list[PushId] = []  # by the last event
        self.told = self.tell(Applied(0, alpha=0.1))

    def tell(self, event: Event, now: float = 0.0) -> list[Action]:
        """The actions that answer `event`, each Step and Measure answered in turn."""
        actions: list[Action] = []
        self.freed = []
        for action, freed in decide(self.policy, self.ledger, event, now):
            if action is not None:
                actions.append(action)
                self._answer(action, now)
            self.freed += freed
        return actions

    def push(self, worker: int, now: float = 0.0, norm: float = 1.0) -> list[Action]:
        """The actions that answer the push which `worker` owes."""
        step = self.ledger.workers[worker].seen + 1
        base = self.ledger.views[PushId(worker, step)].version
        return self.tell(Push(PushId(worker, step), base, norm, payload_norm=norm), now)

    def _answer(self, action: Action, now: float) -> None:
        if isinstance(action, Step):
            answer = Applied(self.ledger.version + 1, self.moved, alpha=0.1)
            assert list(decide(self.policy, self.ledger, answer, now)) == []
        elif isinstance(action, Measure):
            for push in action.pushes:
                assert list(decide(self.policy, self.ledger, Measured(push, self.distance), now)) == []


class Loop(Story):
    """A story that carries the actions out in a loop of its own, as a server does."""

    def tell(self, event: Event, now: float = 0.0) -> list[Action]:
        actions: list[Action] = []
        ledger = self.ledger
        ordered = begin(self.policy, ledger, event, now)
        self.freed = list(ledger.freed)
        ledger.freed.clear()
        try:
            for action in ordered:
                take(ledger, action)
                actions.append(action)
                self._answer(action, now)
                self.freed += ledger.freed
                ledger.freed.clear()
        except BaseException:
            end(ledger, broken_off=True)
            raise
        end(ledger)
        return actions

    def _answer(self, action: Action, now: float) -> None:
        if isinstance(action, Step):
            ANSWERS[Applied](self.ledger, Applied(self.ledger.version + 1, self.moved, alpha=0.1))
        elif isinstance(action, Measure):
            for push in action.pushes:
                ANSWERS[Measured](self.ledger, Measured(push, self.distance))


def plain(*pushes: tuple[int, int], share: float = 1.0) -> Step:
    """The mean of these pushes."""
    return Step.mean([PushId(*push) for push in pushes], share)
