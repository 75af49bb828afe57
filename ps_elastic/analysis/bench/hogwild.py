"""Lock-free SGD as torch.multiprocessing does it: `python -m ps_elastic.analysis.bench.hogwild CASES`, without MPI.

Processes share the parameters of one module; each computes its gradient on them and lets its own optimizer change them,
at its best: fused, gradients set to None. CASES: a JSON list of mappings, the arguments of `run`. Prints a JSON list of
what each gave.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn

from ps_elastic.config.plugin import built
from ps_elastic.tasks import Task

_LOOK_S = 0.5e-3  # between two looks at how far the workers are
_LIMIT_S = 120.0  # longest a worker may take to start, or to end


def run(
    task: dict[str, Any],
    workers: int,
    steps: int,
    rate: float,
    target: float | None = None,
    every: int = 1,
    steps_write: bool = True,
) -> dict[str, Any]:
    """{steps_s: of each worker, the seconds of each step; target_s: when an evaluation saw the loss at `target`}.

    steps: of each worker, at most. rate: what a gradient is multiplied by. every: updates between two evaluations.
    steps_write: False leaves out the optimizer, so that what takes time is forward and backward.
    """
    made = _task(task)
    model = made.model(0).train().share_memory()
    done, times = torch.zeros(workers, dtype=torch.int64), torch.zeros(workers, steps)
    for shared in (done, times):
        shared.share_memory_()
    fork = multiprocessing.get_context("fork")  # nothing computes on threads here, and to import torch takes seconds
    start = fork.Barrier(workers + 1)
    arguments = [(worker, task, model, rate, done, times, start) for worker in range(1, workers + 1)]
    processes = [fork.Process(target=_work, args=(*given, steps, steps_write), daemon=True) for given in arguments]
    for process in processes:
        process.start()
    start.wait(_LIMIT_S)
    target_s = _watch(made, model, done, steps, target, every) if target is not None else None
    for process in processes:
        process.join(_LIMIT_S)
        if process.exitcode != 0:
            raise SystemExit(f"a process of Hogwild ended with {process.exitcode}")
    return {"steps_s": [row[row > 0].tolist() for row in times], "target_s": target_s}


def _task(settings: dict[str, Any]) -> Task:
    task: Task = built("task", settings)
    task.prepare()
    return task


def _work(
    worker: int,
    task: dict[str, Any],
    model: nn.Module,
    rate: float,
    done: Tensor,
    times: Tensor,
    start: Any,
    steps: int,
    steps_write: bool,
) -> None:
    torch.set_num_threads(1)
    made, mine = _task(task), worker - 1
    batches = made.batches(worker, len(done), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    start.wait(_LIMIT_S)
    for i in range(steps):
        if done[mine] < 0:
            break
        began = time.perf_counter()
        made.loss(model, next(batches)).backward()
        if steps_write:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times[mine, i] = time.perf_counter() - began
        done[mine] += 1


def _watch(task: Task, model: nn.Module, done: Tensor, steps: int, target: float, every: int) -> float | None:
    """Evaluate after every `every` updates until the loss is there; then let the workers stop."""
    began, due = time.perf_counter(), every
    while int(done.min()) < steps:
        if int(done.sum()) < due:
            time.sleep(_LOOK_S)
            continue
        due = int(done.sum()) + every
        with torch.no_grad():
            loss = task.evaluate(model)["loss"]
        if loss <= target:
            took = time.perf_counter() - began
            done.fill_(-steps - 1)
            return took
    return None


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps([run(**case) for case in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
