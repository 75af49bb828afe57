from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import PERCEPTRON, Phase, run_phases, steps_s
from ps_elastic.plugins import expect

RANKS = 3  # two workers and the server
WARM_UP = 3  # steps of each phase that are not counted
OF_DDP = {True: 0.12, False: 0.15}  # from 10 M parameters on, and below
OF_ALLREDUCE = 0.8


@benchmarks.register("step")
@dataclass
class StepOverhead(Benchmark):
    """What a synchronous step of two workers and a server takes beyond the best local loop, beside DDP and Allreduce.

    A perceptron, momentum SGD. All loops take turns in the same three processes; the local one runs in both workers
    at the same time. An overhead is the median over the turns of (median step - median local step).
    """

    sizes: tuple[int, ...] = (300_000, 3_000_000, 10_000_000)  # parameters
    steps: tuple[int, ...] = (80, 30, 12)  # of each turn, for each of the sizes
    repeats: Turns = 5  # turns of each loop; more: steadier
    batch_size: int = 32
    buckets: str | int = "whole"  # of our runs, as in a configuration

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(len(self.steps) == len(self.sizes), self, "steps", f"{len(self.sizes)} numbers, one for each size")
        expect(all(steps >= 2 for steps in self.steps), self, "steps", "numbers of steps >= 2")

    def rows(self) -> Iterator[Row]:
        plan = [
            (f"{kind} {size}", phase)
            for size, steps in zip(self.sizes, self.steps, strict=True)
            for turn in range(self.repeats)
            for kind, phase in self._turn(size, steps + WARM_UP, turn)
        ]
        found = run_phases(RANKS, plan)
        for size in self.sizes:
            yield from _rows(size, {kind: found[f"{kind} {size}"] for kind in ("ours", "ddp", "allreduce", "local")})

    def _turn(self, size: int, steps: int, turn: int) -> Iterator[tuple[str, Phase]]:
        task = {"parameters": size, "batch_size": self.batch_size}
        config = {
            "task": {"name": PERCEPTRON, **task},
            "policy": "synchronous",
            "optimizer": {"lr": 0.01, "momentum": 0.9},
            "buckets": self.buckets,
            "train": {"samples": (steps + 1) * (RANKS - 1) * self.batch_size},
        }
        yield "local", {"do": "local", "task": task, "steps": steps}
        yield "ours", {"do": "train", "config": config}
        yield "ddp", {"do": "ddp", "task": task, "steps": steps, "meeting_point": f"gloo-{size}-{turn}"}
        yield "allreduce", {"do": "allreduce", "task": task, "steps": steps}


def _rows(size: int, found: dict[str, list[list[Any]]]) -> Iterator[Row]:
    found["ours"] = [[None, *map(steps_s, turn[1:])] for turn in found["ours"]]
    each = {kind: [_step_ms(turn) for turn in turns] for kind, turns in found.items()}
    case, local = f"{size / 1e6:g} M parameters", median(each["local"])
    over = {
        kind: median(step - alone for step, alone in zip(steps, each["local"], strict=True))
        for kind, steps in each.items()
    }
    for kind, name, share in (
        ("ddp", "DDP with gloo", OF_DDP[size >= 10_000_000]),
        ("allreduce", "MPI Allreduce", OF_ALLREDUCE),
    ):
        baseline = over[kind] if over[kind] > 0 else None  # no ratio where a baseline came out below the local loop
        yield row(f"{case}, overhead", over["ours"], "ms", baseline, name, f"ratio <= {share}")
    yield row(f"{case}, whole step", median(each["ours"]), "ms", local, "local loop")


def _step_ms(turn: Sequence[Any]) -> float:
    """The mean over the workers of each one's median step."""
    each: list[float] = [median(steps[WARM_UP:]) for steps in turn[1:]]
    return 1e3 * mean(each)
