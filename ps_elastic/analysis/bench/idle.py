from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import run_phases, wide
from ps_elastic.plugins import Range, Workers
from ps_elastic.transport.wire import HEADER_BYTES

WARM_UP = 2  # rounds of each turn that are not counted


@benchmarks.register("idle")
@dataclass
class Idle(Benchmark):
    """The share of a core that the server takes while its workers compute, beside one that blocks in MPI's Recv.

    The server is that of a real run, whose workers sleep in place of computing; its work on their pushes is counted.
    Ranks of another host cannot ring the server's bell, so that it has to look for their messages now and then.
    """

    workers: Workers = 3
    away_s: float = 0.05  # that a worker computes for each push
    pushes: Annotated[int, Range(f"a number of pushes >= {WARM_UP + 2}")] = 20  # of each worker and turn
    parameters: int = 16
    repeats: Turns = 5  # turns; more: steadier

    def rows(self) -> Iterator[Row]:
        yield from self._rows("one host", "<= 1")
        apart = ",".join(map(str, range(1, self.workers + 1)))
        yield from self._rows("each as if on another host", None, PS_ELASTIC_APART=apart)

    def _rows(self, where: str, target: str | None, **variables: str) -> Iterator[Row]:
        policies = ("asynchronous", "synchronous")
        config = wide(self.parameters, self.workers, self.pushes, compute_s=self.away_s)
        nbytes = HEADER_BYTES + 4 * self.parameters
        turn = [(name, {"do": "train", "watched": True, "config": {**config, "policy": name}}) for name in policies]
        blocking = {"do": "blocking_server", "nbytes": nbytes, "messages": self.pushes, "away_s": self.away_s}
        found = run_phases(self.workers + 1, [("blocking", blocking), *turn] * self.repeats, **variables)
        baseline = 100 * median(turn[0] for turn in found["blocking"])
        for name in policies:
            ours = 100 * median(_share(turn[0]["looks"], self.workers) for turn in found[name])
            case = f"{name}, {self.workers} workers of {1e3 * self.away_s:g} ms a step, {where}"
            yield row(case, ours, "% of a core", baseline, "blocking Recv", target)


def _share(looks: list[list[float]], workers: int) -> float:
    (started, cpu), (ended, cpu_then) = looks[WARM_UP * workers], looks[-1 - workers]  # without those that end the run
    return (cpu_then - cpu) / (ended - started)
