from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import run_phases, wide
from ps_elastic.plugins import expect

WARM_UP = 2  # rounds of each turn that are not counted


@benchmarks.register("scale")
@dataclass
class Scale(Benchmark):
    """CPU time that the server takes for a push, from 2 ranks to many, on tiny steps of real runs.

    The server sleeps before each look for messages, which is not counted, so that they are there when it looks and
    no waiting is counted either. The median over rounds of as many pushes as there are workers, and over turns. The
    jobs follow each other in order, then once more, as a machine's speed drifts.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    pushes: int = 240  # of each turn
    parameters: int = 16
    pause_s: float = 5e-4  # before each look; longer: surer that all messages are there
    repeats: Turns = 5  # turns in each job
    sweeps: int = 1  # times that all jobs are run; more: steadier, and longer by the start of so many ranks

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(len(self.ranks) >= 2 and min(self.ranks) >= 2, self, "ranks", "two numbers of ranks or more, each >= 2")
        expect(self.pushes >= (WARM_UP + 2) * max(self.ranks), self, "pushes", "four pushes a rank or more")
        expect(self.sweeps >= 1, self, "sweeps", "a number of sweeps >= 1")

    def rows(self) -> Iterator[Row]:
        policies = ("asynchronous", "synchronous")
        costs: dict[tuple[str, int], list[float]] = {}
        for _ in range(self.sweeps):
            for ranks in self.ranks:
                workers = ranks - 1
                config = wide(self.parameters, workers, self.pushes // workers)
                watching = {"watched": True, "pause_s": self.pause_s}
                turn = [(name, {"do": "send", "config": {**config, "policy": name}, **watching}) for name in policies]
                found = run_phases(ranks, turn * self.repeats)
                for name in policies:
                    costs.setdefault((name, ranks), []).extend(_us_a_push(turn[0], workers) for turn in found[name])
        first, *others = self.ranks
        for name in policies:
            few = median(costs[name, first])
            for ranks in others:
                ours = median(costs[name, ranks])
                yield row(f"{name}, {ranks} ranks", ours, "us CPU/push", few, f"{first} ranks", "ratio <= 1.3")


def _us_a_push(server: dict[str, list[list[float]]], workers: int) -> float:
    """looks: (time, CPU time) at each look that found a message; a round is as many looks as there are workers."""
    rounds = [cpu for _, cpu in server["looks"]][::workers][WARM_UP:]
    return 1e6 * median(after - before for before, after in pairwise(rounds)) / workers
