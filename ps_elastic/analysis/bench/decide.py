from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from random import Random
from statistics import median
from time import process_time

from ps_elastic.analysis.bench.base import Benchmark, Row, Runs, Several, benchmarks, row
from ps_elastic.analysis.bench.simulate import HALF
from ps_elastic.plugins import Pushes, expect
from ps_elastic.policies import policies
from ps_elastic.policies.decide import ANSWERS, begin, end, take
from ps_elastic.policies.events import Applied, Event, Measure, Measured, Push, PushId, Release, Step, Woke
from ps_elastic.policies.ledger import Ledger


@benchmarks.register("decide")
@dataclass
class Decide(Benchmark):
    """Microseconds a push of ledger and policy, invariants checked and no log: metadata only, in random order.

    A figure is the median over `repeats` runs of the mean over a run, so that work done once a round counts. It is
    processor time, and has the two readings of that clock in it, about half a microsecond.
    """

    few: Several = 3  # workers that the growth is measured from
    many: int = 1024
    pushes: Pushes = 3000  # of each run, after three of each worker
    repeats: Runs = 5
    rules: tuple[str, ...] = ()  # empty: every policy

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.many >= self.few, self, "many", f"a number of workers >= few = {self.few}")

    def rows(self) -> Iterator[Row]:
        for policy in self.rules or [name for name, _ in policies.items()]:
            both = (self.few, self.many)
            runs = [[_cost_us(policy, workers, self.pushes) for workers in both] for _ in range(self.repeats)]
            few, many = (median(costs) for costs in zip(*runs, strict=True))
            if policy in ("synchronous", "asynchronous"):
                yield row(f"{policy}, {self.few} workers", few, "us/push", None, "", "<= 8")
                yield row(f"{policy}, {self.many} workers", many, "us/push", None, "", "<= 8")
            case = f"{policy}, growth to {self.many} workers"
            yield row(case, many, "us/push", few, f"{self.few} workers", "ratio <= 1.3")


def _cost_us(policy: str, workers: int, pushes: int) -> float:
    """Microseconds a push of one run."""
    run = _Run(policy, workers)
    run.go(3 * workers)
    run.spent_s = 0.0
    run.go(pushes)
    return 1e6 * run.spent_s / pushes


class _Run:
    """Workers that push as soon as they may, each after a time drawn from an exponential distribution."""

    def __init__(self, name: str, workers: int) -> None:
        settings = {HALF[name]: workers // 2} if name in HALF else {}
        self.policy = policy = policies.load(name)(**settings)
        policy = self.policy
        self.ledger = Ledger(
            range(1, workers + 1), jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views
        )
        self.spent_s, self._now, self._alpha = 0.0, 0.0, 0.1
        self._units, self._share = policy.units[0], 1.0 / workers
        self._random = Random(0)
        self._released: list[int] = []
        self._steps = dict.fromkeys(range(1, workers + 1), 0)
        self._busy = set(self._steps)
        self._feed(Applied(0, alpha=self._alpha))
        self._ready = [(self._random.expovariate(1.0), worker) for worker in self._steps]
        heapify(self._ready)

    def go(self, pushes: int) -> None:
        """Let so many pushes arrive."""
        ledger = self.ledger
        while pushes:
            wake_at = ledger.wake_at
            if wake_at is not None and (not self._ready or wake_at <= self._ready[0][0]):
                self._now = max(self._now, wake_at)
                self._feed(Woke())
            else:
                self._now, worker = heappop(self._ready)
                self._busy.discard(worker)
                self._steps[worker] += 1
                push = PushId(worker, self._steps[worker])
                self._feed(Push(push, ledger.views[push].version, 1.0, 1.0, 0.0, 4, self._units))
                pushes -= 1
            for worker in self._released:
                if worker not in self._busy:  # else a job is queued: decide gives it out when the worker is there again
                    self._busy.add(worker)
                    heappush(self._ready, (self._now + self._random.expovariate(1.0), worker))

    def _feed(self, event: Event) -> None:
        """What a server does with an event, without the numbers."""
        policy, ledger, now = self.policy, self.ledger, self._now
        released = self._released = []
        started = process_time()
        for action in begin(policy, ledger, event, now):
            take(ledger, action)
            if isinstance(action, Release):
                released += action.workers
            elif isinstance(action, Step):
                ANSWERS[Applied](ledger, Applied(ledger.version + 1, self._share, self._alpha))
            elif isinstance(action, Measure):
                for push in action.pushes:
                    ANSWERS[Measured](ledger, Measured(push, 0.0))
        end(ledger)
        ledger.freed.clear()
        self.spent_s += process_time() - started
