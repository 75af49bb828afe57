"""Rules for tests alone: together they use every word of the vocabulary that a rule may say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from ps_elastic.policies import Policy
from ps_elastic.policies.events import ZERO, Action, Drop, Measure, Push, PushId, Release, Step, Term, Wake
from ps_elastic.policies.ledger import Ledger


@dataclass
class Deadline(Policy):
    """Wait at most `patience_s` for a round, then let a stand-in take the place of what is missing."""

    patience_s: float = 1.0
    repay: bool = True  # the late push by an amend, or drop it

    def stand_in(self, missing: PushId, ledger: Ledger) -> PushId:
        return ZERO

    def own(self, missing: int, ledger: Ledger) -> float:
        return 0.0

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if push.id in ledger.debts:
            yield ledger.amend(push.id) if self.repay else Drop(push.id, "late")
            yield Release((push.id.worker,))
        elif self._awaited(ledger) == 0:
            yield from self._step(ledger)
        elif ledger.wake_at is None:
            yield Wake(ledger.now + self.patience_s)

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        if ledger.held and self._awaited(ledger) == 0:
            yield from self._step(ledger)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        if ledger.held:
            yield from self._step(ledger)

    def _awaited(self, ledger: Ledger) -> int:
        return ledger.computing - len(ledger.debts)

    def _step(self, ledger: Ledger) -> Iterator[Action]:
        missing = [push for push in ledger.views if push not in ledger.debts]
        terms = [Term(push) for push in sorted(ledger.held)]
        terms += [Term(self.stand_in(push, ledger), stands_for=push) for push in missing]
        yield Step(tuple(terms))
        if ledger.waiting:
            yield Release(tuple(ledger.waiting), own=self.own(len(missing), ledger))


@dataclass
class MeanStandsIn(Deadline):
    """The mean of those present stands for the missing."""

    def stand_in(self, missing: PushId, ledger: Ledger) -> PushId:
        return PushId(0, ledger.version + 1)


@dataclass
class LastStandsIn(Deadline):
    """What a worker contributed last stands for what it owes."""

    keeps_last: ClassVar[bool] = True

    def stand_in(self, missing: PushId, ledger: Ledger) -> PushId:
        return ledger.last(missing.worker) or ZERO


@dataclass
class OwnStandsIn(Deadline):
    """Zero stands in, and each worker adds its own gradient to its view for those that are missing."""

    own_views: ClassVar[bool] = True

    def own(self, missing: int, ledger: Ledger) -> float:
        return missing / len(ledger.workers)


@dataclass
class TwoJobs(Policy):
    """Asynchronous, with a job queued for each worker while it computes."""

    jobs: ClassVar[int] = 2

    def on_start(self, ledger: Ledger) -> Iterator[Action]:
        yield Release(tuple(ledger.workers))

    def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        yield Release((push.id.worker,))

    def on_ask(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        yield Release((worker,))
        yield Release((worker,))


@dataclass
class WithinBudget(Policy):
    """Hold pushes while a step could take the oldest view farther than `budget` from the model."""

    budget: float = 1.0

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from self._steps(ledger)

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        yield from self._steps(ledger)

    def _steps(self, ledger: Ledger) -> Iterator[Action]:
        while ledger.held:
            push = next(iter(ledger.held.values()))
            share = 1 / max(1, len(ledger.workers))
            oldest = ledger.oldest_view
            if oldest is not None and self._exceeds(oldest, push, share, ledger):
                yield Measure((oldest,))
                oldest = ledger.oldest_view or oldest
                if self._exceeds(oldest, push, share, ledger):
                    return
            yield Step.mean([push.id], share)
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))

    def _exceeds(self, oldest: PushId, push: Push, share: float, ledger: Ledger) -> bool:
        return ledger.travelled + ledger.reach(push.payload_norm, share) - ledger.views[oldest].travelled > self.budget


@dataclass
class ReleaseFirst(Policy):
    """Let every worker go on at once, perhaps on its own gradient; step when `k` pushes are held, of whomever."""

    k: int = 2
    own: float = 0.0

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Release((push.id.worker,), self.own)
        if len(ledger.held) >= self.k:
            yield Step.mean(ledger.held)


@dataclass
class LastOfEverybody(Policy):
    """Step on each push together with what every other worker contributed last."""

    keeps_last: ClassVar[bool] = True

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        others = (ledger.last(worker) for worker in ledger.workers if worker != push.id.worker)
        yield Step.mean([push.id, *(last for last in others if last is not None)])
        yield Release((push.id.worker,))


@dataclass
class Averaging(Policy):
    """Set the model to the mean of local models once everybody is there."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if not ledger.computing:
            yield from self._step(ledger)

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        if ledger.held and not ledger.computing:
            yield from self._step(ledger)

    def _step(self, ledger: Ledger) -> Iterator[Action]:
        part = 1 / len(ledger.held)
        yield Step(tuple(Term(push, part) for push in sorted(ledger.held)), combine="sum", apply="assign")
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))


@dataclass
class Lottery(Policy):
    """Drop pushes by lot, and remember for each worker which were used: a rule with state of every kind."""

    seed: int = 0
    count: int = field(init=False, default=0)
    drawn: list[float] = field(init=False, default_factory=list)
    used: dict[PushId, tuple[int, str]] = field(init=False, default_factory=dict)
    per_worker: dict[int, int] = field(init=False, default_factory=dict)
    pipelines: ClassVar[bool] = True

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        worker = push.id.worker
        self.drawn.append(Random(f"{self.seed}:{self.count}").random())
        self.count += 1
        if self.drawn[-1] < 0.5 and self.per_worker.get(worker, 0):
            yield Drop(push.id, f"drawn {self.drawn[-1]}")
        else:
            self.used[push.id] = (self.count, "used")
            self.per_worker[worker] = self.per_worker.get(worker, 0) + 1
            yield Step.mean([push.id], share=1 / max(len(ledger.workers), len(self.used)))
        yield Release((worker,))


@dataclass
class HoldsAhead(Policy):
    """Workers run ahead; it steps on `k` pushes of whomever, answers them before or after by lot, and drops some."""

    pipelines: ClassVar[bool] = True
    k: int = 2
    count: int = field(init=False, default=0)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        self.count = (self.count + 1) % 5
        if self.count in (1, 2):
            yield Release((push.id.worker,))
        if self.count == 3 and len(ledger.held) > 1:
            yield Drop(next(iter(ledger.held)), "the third")
        if len(ledger.held) >= self.k or not ledger.views:
            yield Step.mean(ledger.held)
            if ledger.waiting:
                yield Release(tuple(ledger.waiting))

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))


TEST_RULES: dict[str, type[Policy]] = {
    cls.__name__: cls
    for cls in (
        Deadline,
        MeanStandsIn,
        LastStandsIn,
        OwnStandsIn,
        TwoJobs,
        WithinBudget,
        ReleaseFirst,
        LastOfEverybody,
        Averaging,
        Lottery,
        HoldsAhead,
    )
}
