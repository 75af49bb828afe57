from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import PERCEPTRON, Phase, run_phases, steps_s
from ps_elastic.plugins import Workers, expect

WARM_UP = 5  # steps of each worker that are not counted
LR = 0.01
AHEAD = 3  # pushes that a worker of ours may leave unanswered: nobody waits in Hogwild
PLAIN: dict[str, Any] = {"writing": "plain"}
TOP_K: dict[str, Any] = {**PLAIN, "compressor": "top_k:ratio=0.01"}
KINDS: dict[str, tuple[dict[str, Any], int | None]] = {  # name -> what makes it, and its target beside Hogwild
    "dense, plain": (PLAIN, 1),
    "dense, lock": ({}, None),
    "dense, plain, discrepancy off": ({**PLAIN, "tracker": {"discrepancy": "off"}}, None),
    "top_k 1 %, plain": (TOP_K, 2),
}
TO_LOSS = {"task": {"name": "digits"}, "lr": 0.1, "loss": 0.5, "samples": 400_000, "every": 1_600}
LOST = {
    f"{name}, {writing}": (compressor, writing)
    for name, compressor in (("dense", "identity"), ("top_k 1 %", "top_k"))
    for writing in ("plain", "lock")
}


@benchmarks.register("lockfree")
@dataclass
class LockFree(Benchmark):
    """Workers that read and write the shared model (`views: torn, writers: workers`), beside Hogwild of torch.

    The same model, batches and number of workers, which take turns. Ours has a server beside them, which follows every
    update, and the discrepancy of each is measured. Updates a second: of all workers together, from the time that each
    took for its steps. "compute alone" is Hogwild without its writes: no way of writing can be quicker.
    What has no target is measured in the first turn alone.
    """

    sizes: tuple[int, ...] = (300_000, 3_000_000)  # parameters
    steps: tuple[int, ...] = (200, 40)  # of each worker and turn, for each of the sizes
    workers: Workers = 2
    repeats: Turns = 5  # turns; more: steadier
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(len(self.steps) == len(self.sizes), self, "steps", f"{len(self.sizes)} numbers, one for each size")
        expect(all(steps > WARM_UP + 1 for steps in self.steps), self, "steps", f"numbers of steps > {WARM_UP + 1}")

    def rows(self) -> Iterator[Row]:
        phases = [phase for turn in range(self.repeats) for phase in self._turn(first=not turn)]
        found = run_phases(self.workers + 1, phases)
        theirs = [turn[0] for turn in found["hogwild"]]
        for i, size in enumerate(self.sizes):
            hogwild = median(_updates_per_s(turn[2 * i]["steps_s"]) for turn in theirs)
            alone = median(_updates_per_s(turn[2 * i + 1]["steps_s"]) for turn in theirs)
            yield row(f"{size / 1e6:g} M parameters, compute alone", alone, "updates/s", hogwild, "Hogwild")
            for kind, (_, least) in KINDS.items():
                ours = median(_updates_per_s(map(steps_s, turn[1:])) for turn in found[f"{kind} {size}"])
                target = f"ratio >= {least}" if least else None
                yield row(f"{size / 1e6:g} M parameters, {kind}", ours, "updates/s", hogwild, "Hogwild", target)
        reached = [turn[-1]["target_s"] for turn in theirs]
        for kind, (_, least) in KINDS.items():
            if least:
                ours = median(turn[0]["summary"]["time_to_target_s"] for turn in found[f"{kind} to loss"])
                case = f"digits to a loss of {TO_LOSS['loss']:g}, {kind}"
                yield row(case, ours, "s", median(reached), "Hogwild", f"ratio <= {1 / least:g}")
        for name in LOST:
            for size in self.sizes:
                share = found[f"lost {name} {size}"][0][0]
                target = "<= 0" if name.endswith("lock") else None
                yield row(f"{size / 1e6:g} M parameters, {name}, share lost", share, "", None, "", target)

    def _turn(self, *, first: bool) -> Iterator[tuple[str, Phase]]:
        cases: list[dict[str, Any]] = []
        wanted = [(kind, made) for kind, made in KINDS.items() if first or made[1]]
        for size, steps in zip(self.sizes, self.steps, strict=True):
            task = {"name": PERCEPTRON, "parameters": size, "batch_size": self.batch_size}
            samples = steps * self.workers * self.batch_size
            case = {"task": task, "workers": self.workers, "steps": steps, "rate": LR / self.workers}
            cases += case, {**case, "steps_write": False}
            for kind, (settings, _) in wanted:
                config = _config(task, LR, {"samples": samples}, settings)
                yield f"{kind} {size}", {"do": "train", "config": config}
            for name, (compressor, writing) in LOST.items() if first else ():
                arguments = {"parameters": size, "writes": steps, "compressor": compressor, "writing": writing}
                yield f"lost {name} {size}", {"do": "lost", **arguments}
        goal: dict[str, Any] = TO_LOSS
        train = {
            "stop_at": f"loss<={goal['loss']}",
            "evaluate_every_samples": goal["every"],
            "samples": goal["samples"],
        }
        for kind, (settings, least) in KINDS.items():
            if least:
                yield f"{kind} to loss", {"do": "train", "config": _config(goal["task"], goal["lr"], train, settings)}
        cases.append(
            {
                "task": goal["task"], "workers": self.workers, "rate": goal["lr"] / self.workers,
                "steps": goal["samples"] // 32 // self.workers, "target": goal["loss"], "every": goal["every"] // 32,
            }
        )  # fmt: skip
        yield "hogwild", {"do": "hogwild", "cases": cases}


def _config(task: dict[str, Any], lr: float, train: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task, "policy": "asynchronous", "views": "torn", "writers": "workers", "optimizer": {"lr": lr},
        "update": {"pipeline": AHEAD}, "train": train, **settings,
    }  # fmt: skip


def _updates_per_s(workers: Iterable[Sequence[float]]) -> float:
    """Of all workers together, from the seconds of the steps of each: replies may come in groups, so all of them."""
    return sum(len(steps[WARM_UP:]) / sum(steps[WARM_UP:]) for steps in workers)
