from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

from ps_elastic.analysis.bench.base import Benchmark, Row, Runs, Several, benchmarks, row
from ps_elastic.plugins import Pushes, expect, parse_one_line
from ps_elastic.policies import policies
from ps_elastic.policies.events import Action, Push, PushId, Release, Step, event_text
from ps_elastic.simulation.simulate import simulate

# Policies that discard what comes too late: with half of the workers per step, half of the pushes at most.
HALF = {"first_k": "k", "random_subset": "q", "rennala": "batch", "ringmaster": "delay"}
_SPEED_EACH, _GROWTH_EACH = 10, 4  # pushes of each worker
SPEED = {True: 30_000, False: 5_000}  # pushes a second that are asked for, with headers alone and with numbers


class Cost(NamedTuple):
    """Microseconds a push, by the clock on the wall and by that of the processor, which others slow down less."""

    wall: float
    cpu: float


@benchmarks.register("simulate")
@dataclass
class Simulate(Benchmark):
    """Pushes a second of the simulator, its log on, and how its cost per push grows with the workers.

    The bare loop is what any simulator in Python must do: a heap, metadata, a policy that yields, a line of log.
    """

    workers: int = 4096
    few: Several = 64  # workers that the growth is measured from
    pushes: Pushes = 2_000  # of each run at least; and ten of each worker for its speed, four for how its cost grows
    repeats: Runs = 3  # of each measurement and its baseline in turn; the best counts
    rules: tuple[str, ...] = ()  # whose growth is measured; empty: every policy

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.workers >= self.few, self, "workers", f"a number of workers >= few = {self.few}")

    def rows(self) -> Iterator[Row]:
        for headers_only in (True, False):
            for policy in ("synchronous", "asynchronous"):
                ours, bare = self._best(
                    partial(self._run, policy, self.workers, _SPEED_EACH, headers_only),
                    partial(_bare, self.workers, self._pushes(self.workers, _SPEED_EACH)),
                )
                with_what = "headers only" if headers_only else "a quadratic of 4 numbers"
                case, target = f"{policy}, {with_what}, {self.workers} workers", f">= {SPEED[headers_only]}"
                yield row(case, 1e6 / ours.wall, "pushes/s", 1e6 / bare.wall, "bare event loop", target)
                yield row(f"{case}, processor time", 1e6 / ours.cpu, "pushes/s", 1e6 / bare.cpu, "bare event loop")
        for policy in self.rules or [name for name, _ in policies.items()]:
            many, few = self._best(
                partial(self._run, policy, self.workers, _GROWTH_EACH, True),
                partial(self._run, policy, self.few, _GROWTH_EACH, True),
            )
            case = f"{_with_settings(policy, self.workers)}, headers only, {self.workers} workers"
            yield row(case, many.cpu, "us/push", few.cpu, f"{self.few} workers", "ratio <= 1.6")

    def _best(self, ours: Callable[[], Cost], baseline: Callable[[], Cost]) -> tuple[Cost, Cost]:
        """The least of each, measured in turn, so that a busy moment of the machine falls on both."""
        pairs = [(ours(), baseline()) for _ in range(self.repeats)]
        return _least([mine for mine, _ in pairs]), _least([other for _, other in pairs])

    def _pushes(self, workers: int, each: int) -> int:
        return max(self.pushes, each * workers)

    def _run(self, policy: str, workers: int, each: int, headers_only: bool) -> Cost:
        return _measure(_with_settings(policy, workers), workers, self._pushes(workers, each), headers_only)


def _least(costs: list[Cost]) -> Cost:
    return Cost(min(cost.wall for cost in costs), min(cost.cpu for cost in costs))


def _with_settings(policy: str, workers: int) -> str:
    """`policy` with the setting that it needs for so many workers."""
    return f"{policy}:{HALF[policy]}={workers // 2}" if policy in HALF else policy


def _measure(policy: str, workers: int, pushes: int, headers_only: bool) -> Cost:
    name, _ = parse_one_line(policy)
    config: dict[str, Any] = {
        "task": "quadratic",
        "policy": policy,
        "update": "sgd" if "gradient" in policies.load(name).units else "sisa",
        "optimizer": {"lr": 1e-4},
        "train": {"samples": pushes},
        "simulation": {"compute": {"name": "exponential"}},
    }
    with tempfile.TemporaryDirectory(prefix="ps-elastic-bench-") as folder:
        summary = simulate(config, workers=workers, run_dir=Path(folder) / "run", headers_only=headers_only)
    return Cost(1e6 / summary["pushes_per_s"], 1e6 * summary["cpu_s"] / summary["pushes"])


def _bare(workers: int, pushes: int) -> Cost:
    """A loop that does nothing but what every simulator must."""

    def policy(push: Push) -> Iterator[Action]:
        yield Step.mean([push.id], share=1 / workers)
        yield Release((push.id.worker,))

    heap = [(float(worker), 1, worker) for worker in range(1, workers + 1)]
    held: dict[PushId, Push] = {}
    log: list[str] = []
    started, processor = time.perf_counter(), time.process_time()
    for number in range(pushes):
        now, step, worker = heappop(heap)
        push = Push(PushId(worker, step), number, 1.0, 1.0, 0.0, 16)
        held[push.id] = push
        for action in policy(push):
            log.append(f"{{{event_text(push)}, {now!r}, {action!r}}}")
        del held[push.id]
        heappush(heap, (now + workers + number % 7, step + 1, worker))
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - processor
    return Cost(1e6 * wall_s / pushes, 1e6 * cpu_s / pushes)
