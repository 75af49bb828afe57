from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import run_phases, wide
from ps_elastic.plugins import Pushes, Range

WORKERS = 2
WORKER_VECTORS = 3  # that a worker may have beyond the model's own
SERVER_VECTORS = 2  # that the server may have beyond model, optimizer, payloads and snapshots


@benchmarks.register("memory")
@dataclass
class Memory(Benchmark):
    """The most memory that server and workers take at once, in vectors of the model's size, momentum SGD.

    Resident memory at its peak during a run, less that before it; a run of a tiny model goes first, so that what is
    imported on the way is not counted. Allowed for the server: model, momentum, the most payloads held at once, the
    most snapshots in use, and two more; for a worker: the model and three more.
    """

    parameters: Annotated[int, Range("a whole number >= 1000000: smaller ones drown")] = 50_000_000
    tensors: int = 10
    pushes: Pushes = 3  # of each worker
    repeats: Turns = 1  # the peak hardly varies

    def rows(self) -> Iterator[Row]:
        for name in ("synchronous", "asynchronous"):
            turns = [self._weigh(name) for _ in range(self.repeats)]
            held, snapshots = (max(turn[0]["summary"][key] for turn in turns) for key in ("held_max", "snapshots_max"))
            case = f"{name}, {self.parameters / 1e6:g} M parameters"
            allowed = 2 + held + snapshots + SERVER_VECTORS
            yield self._row(f"{case}, server", [self._vectors(turn[0]) for turn in turns], allowed)
            workers = [max(map(self._vectors, turn[1:])) for turn in turns]
            yield self._row(f"{case}, worker", workers, 1 + WORKER_VECTORS)

    def _weigh(self, policy: str) -> list[dict[str, Any]]:
        """What each rank found, in a job of its own: what an earlier run has freed does not all go back to the host."""
        tiny = {"do": "weigh", "config": self._config(1000, 1)}
        large = {"do": "weigh", "config": {**self._config(self.parameters, self.tensors), "policy": policy}}
        return run_phases(WORKERS + 1, [("tiny", tiny), ("large", large)])["large"][0]

    def _config(self, parameters: int, tensors: int) -> dict[str, Any]:
        optimizer = {"lr": 1e-3, "momentum": 0.9}
        return wide(parameters, WORKERS, self.pushes, tensors=tensors, optimizer=optimizer)

    def _vectors(self, rank: dict[str, Any]) -> float:
        grown: int = rank["peak_bytes"] - rank["before_bytes"]
        return grown / (4 * self.parameters)

    @staticmethod
    def _row(case: str, found: list[float], allowed: float) -> Row:
        return row(case, median(found), "vectors", allowed, "allowed", "ratio <= 1")
