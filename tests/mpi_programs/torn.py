"""Train with torn views and look at them from outside: `mpirun -n 4 python torn.py PLAN FOLDER`, or see several.py.

PLAN: a JSON list of configurations; with one more key, `dies`, rank 2 is killed while it writes its 20th push. Each
rank writes FOLDER/rank-N.json, a list of: on rank 0 {summary, x: [||x_end - x_0||, ||x_end - x_0 + all updates used||,
a bound on the rounding]}, on workers {copies: {"worker step": norm of the copy computed on}}. Who measures distances,
rank 0 or workers that write, adds {distances: [logged by rank 0, computed], seen: {"worker step": norm of the copy
measured}}, and such workers {told: [logged by rank 0, logged by the worker]}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from ps_elastic import train
from ps_elastic.runtime import build, server_rank
from ps_elastic.server import store
from ps_elastic.transport.mpi import MPI
from ps_elastic.worker import hogwild, model_writer, worker

sys.path.append(str(Path(__file__).parents[1]))  # where the tasks are
seen: dict[str, Any] = {}


def watched(apply: Any) -> Any:
    """`apply` of a store, which notes, in double precision, what there is to see before each step."""

    def noted(self: Any, step: Any, rate: float, views: Any = ()) -> float:
        own = np.zeros(self.x.numel())
        for push in [term.push for term in step.terms]:
            own += rate / len(step.terms) * self.payloads.decoded(push).double().numpy()
        x = self.x.double().numpy()
        expected = {}
        for view in views:
            copy = self.views.vector(view).double().numpy()
            seen["seen"][f"{view.worker} {view.step}"] = float(np.linalg.norm(copy))
            expected[view] = float(np.linalg.norm(x - copy))
        moved = apply(self, step, rate, views)
        seen["used"] += own
        seen["distances"] += [[self.distance_when_used(view), expected[view]] for view in views]
        return moved

    return noted


class Watched(model_writer.ModelWriter):
    """Notes, in double precision, what there is to see before each write, with the lock held meanwhile."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held, self._lock = self._lock, contextlib.nullcontext()
        self.square, self.update = 0.0, np.zeros(self._x.numel())
        seen["updates"], seen["away"] = {}, {}

    def write(self, i: int, compressor: Any, payload: Any, rate: float, *, reads: bool) -> float:
        part = slice(self._buckets[i].start, self._buckets[i].stop)
        with self.held:
            self.look(part, compressor.decode(payload, self._buckets[i].numel), rate)
            return super().write(i, compressor, payload, rate, reads=reads)

    def write_parts(self, parts: Any, rate: float, *, reads: bool) -> Any:
        with self.held:
            for (start, stop, _), part in zip(self.runs, parts, strict=True):
                self.look(slice(start, stop), part, rate)
            return super().write_parts(parts, rate, reads=reads)

    def look(self, part: slice, vector: Any, rate: float) -> None:
        x, copy = (whole[part].double().numpy() for whole in (self._x, self._copy))
        self.square += float(np.square(x - copy).sum())
        self.update[part] = rate * vector.double().numpy()
        self.copy = float(np.linalg.norm(self._copy.double().numpy()))

    def leave(self, step: int, square: float) -> None:
        seen["away"][step], seen["updates"][step] = math.sqrt(self.square), self.update
        seen["seen"][f"{rank} {step}"] = self.copy
        self.square, self.update = 0.0, np.zeros(self._x.numel())
        super().leave(step, square)


class Worker(worker.Worker):
    """Notes what each push is computed on."""

    def push(self, *args: Any, **kwargs: Any) -> None:
        super().push(*args, **kwargs)
        seen["copies"][f"{self.rank} {self.step}"] = float(np.linalg.norm(self.computed_on))

    def _gradient(self) -> float:
        self.computed_on = self.x.double().numpy().copy()
        return super()._gradient()


class Dying(model_writer.ModelWriter):
    writes = 0

    def write_parts(self, *args: Any, **kwargs: Any) -> Any:
        Dying.writes += 1
        if Dying.writes == 20:
            with self._lock:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().write_parts(*args, **kwargs)


def lines(run: Path, rank: int, *events: str) -> list[dict[str, Any]]:
    """What is in a file of a run."""
    text = (run / "metrics" / f"rank-{rank:03d}.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["event"] in events]


rank = MPI.COMM_WORLD.Get_rank()
made, ended = server_rank.make_server, server_rank.finish


def make_server(*args: Any, **kwargs: Any) -> Any:
    server, evaluator = made(*args, **kwargs)
    seen["start"] = server.store.x.double().numpy().copy()
    seen["used"] = np.zeros(seen["start"].size)
    return server, evaluator


def finish(config: Any, parts: Any, server: Any, *args: Any) -> Any:
    seen["end"] = server.store.x.double().numpy().copy()  # every worker has said farewell
    return ended(config, parts, server, *args)


def look(plan: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What this rank found of each run of the plan."""
    with (
        patch.object(build, "Worker", Worker),
        patch.object(server_rank, "make_server", make_server),
        patch.object(server_rank, "finish", finish),
        patch.object(hogwild, "ModelWriter", Watched),
        patch.object(store.ParameterStore, "apply", watched(store.ParameterStore.apply)),
    ):
        return [look_at(config, folder / f"run-{i}") for i, config in enumerate(plan)]


def look_at(config: dict[str, Any], run: Path) -> dict[str, Any]:
    if config.pop("dies", False):
        hogwild.ModelWriter = Dying if rank == 2 else model_writer.ModelWriter  # type: ignore[misc]
    seen.clear()
    seen.update(copies={}, seen={}, distances=[])
    summary = train(config, run_dir=run)
    if "updates" in seen:
        used = {line["step"]: line for line in lines(run, 0, "used") if line["worker"] == rank}
        told = {line["step"]: line for line in lines(run, rank, "reply", "settled") if line["step"]}
        seen["used"] = sum(seen["updates"][step] for step in used)
        seen["told"] = [[used[step]["discrepancy"], told[step]["discrepancy"]] for step in used]
        seen["distances"] = [[used[step]["discrepancy"], seen["away"][step]] for step in used]
    size = MPI.COMM_WORLD.bcast(seen["start"].size if rank == 0 else None)
    total = np.zeros(size)
    MPI.COMM_WORLD.Reduce(seen.get("used", np.zeros(size)), total)
    notes = {name: seen[name] for name in ("copies", "seen", "distances", "told") if name in seen}
    if rank:
        return notes
    assert summary is not None
    end = seen["end"]
    gone = end - seen["start"]
    largest = max(np.abs(end).max(), np.abs(seen["start"]).max()) + np.abs(total).max()
    rounding = 2.0**-24 * largest * (summary["used"] + 20) * np.sqrt(end.size)
    x = [float(np.linalg.norm(gone)), float(np.linalg.norm(gone + total)), float(rounding)]
    return {"summary": summary, "x": x, **notes}


if __name__ == "__main__":
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    (folder / f"rank-{rank}.json").write_text(json.dumps(look(plan, folder)))
