"""Train with torn views and look at them from outside: `mpirun -n 4 python torn.py PLAN FOLDER`.

PLAN: a JSON list of configurations; with one more key, `dies`, rank 2 is killed while it writes its 20th push. Each
rank writes FOLDER/rank-N.json, a list of: on rank 0 {summary, distances: [logged, computed], x: [||x_end - x_0||,
||x_end - x_0 + all updates used||, a bound on the rounding], copies: {"worker step": norm}}, on workers {copies}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ps_elastic import train, worker, writers
from ps_elastic.transport import shared
from ps_elastic.transport.slot import MPI

sys.path.append(str(Path(__file__).parents[1]))  # where the tasks are
windows: list[shared.Windows] = []
seen: dict[str, Any] = {}


class Windows(shared.Windows):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        windows[:] = [self]


def watched(cls: type) -> None:
    """Let `cls.apply` note, in double precision, what there is to see before each step."""
    apply = cls.apply

    def noted(self: Any, step: Any, rate: float, views: Any = ()) -> float:
        own = np.zeros(self.x.numel())
        for push in [term.push for term in step.terms]:
            own += rate / len(step.terms) * self._decoded(push).double().numpy()
        with windows[0].lock(10.0) if self.workers_write else contextlib.nullcontext():
            if "x" not in seen:
                seen["x"], seen["used"] = seen["start"].copy(), np.zeros(own.size)
            x = self.x.double().numpy()
            expected = {}
            for view in views:
                copy = self._own[view].double().numpy()
                seen["copies"][f"{view.worker} {view.step}"] = float(np.linalg.norm(copy))
                expected[view] = float(np.linalg.norm(x - copy + (own if self.workers_write else 0.0)))
            moved = apply(self, step, rate, views)
        seen["used"] += own
        seen["steps"] += 1
        seen["distances"] += [[self.distance_when_used(view), expected[view]] for view in views]
        return moved

    cls.apply = noted  # type: ignore[attr-defined]


class Worker(worker.Worker):
    def push(self, *args: Any, **kwargs: Any) -> None:
        super().push(*args, **kwargs)
        seen["copies"][f"{self.rank} {self.step}"] = float(np.linalg.norm(self.computed_on))

    def _finite_gradient(self, *args: Any) -> Any:
        self.computed_on = self.x.double().numpy().copy()
        return super()._finite_gradient(*args)


class Dying(writers.Writer):
    writes = 0

    def write(self, i: int, compressor: Any, payload: Any, rate: float) -> None:
        Dying.writes += 1
        if Dying.writes == 20:
            with self._lock:
                os.kill(os.getpid(), signal.SIGKILL)
        super().write(i, compressor, payload, rate)


plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank = MPI.COMM_WORLD.Get_rank()
shared.Windows = Windows  # type: ignore[misc]
from ps_elastic import assemble, torn, training  # noqa: E402

assemble.Worker = Worker  # type: ignore[misc]
watched(torn.TornCalculator)
made, ended = assemble.make_server, training.finish


def make_server(*args: Any, **kwargs: Any) -> Any:
    server, evaluator = made(*args, **kwargs)
    seen["start"] = server.calculator.x.double().numpy().copy()
    return server, evaluator


def finish(config: Any, parts: Any, server: Any, *args: Any) -> Any:
    seen["end"] = server.calculator.x.double().numpy().copy()  # every worker has said farewell
    return ended(config, parts, server, *args)


assemble.make_server, training.finish = make_server, finish
found = []
for i, config in enumerate(plan):
    if config.pop("dies", False) and rank == 2:
        writers.Writer = Dying  # type: ignore[misc]
    seen.clear()
    seen.update(copies={}, distances=[], steps=0)
    summary = train(config, run_dir=folder / f"run-{i}")
    if rank:
        found.append({"copies": seen["copies"]})
        continue
    end = seen["end"]
    gone = end - seen["start"]
    largest = max(np.abs(end).max(), np.abs(seen["start"]).max()) + np.abs(seen["used"]).max()
    rounding = 2.0**-24 * largest * (seen["steps"] + 20) * np.sqrt(end.size)
    x = [float(np.linalg.norm(gone)), float(np.linalg.norm(gone + seen["used"])), float(rounding)]
    found.append({"summary": summary, "distances": seen["distances"], "x": x, "copies": seen["copies"]})
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
