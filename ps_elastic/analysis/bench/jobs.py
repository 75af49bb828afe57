"""Jobs that measure: phases that take turns in the same ranks, and commands as a user would give them."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ps_elastic.cluster.environment import find_mpi
from ps_elastic.cluster.launcher import run_heard
from ps_elastic.errors import Interrupted, PlatformError

PERCEPTRON = "ps_elastic.analysis.bench.tasks:Perceptron"
LIMIT_S = 240.0  # longest a job may take, on a machine busy with other things
_SAID = 2000  # characters of what a job said that its error repeats
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # all ranks are on this host

Phase = Mapping[str, Any]


def run_phases(ranks: int, phases: Sequence[tuple[str, Phase]], **variables: str) -> dict[str, list[list[Any]]]:
    """Run the phases, each with a name, in one job; return name -> [turn][rank]: what each found. See `ranks`.

    variables: of the ranks' environment. Raises PlatformError with the last lines where the job fails or takes longer
    than LIMIT_S.
    """
    with tempfile.TemporaryDirectory(prefix="ps-elastic-bench-") as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps([phase for _, phase in phases]))
        program = ["-m", "ps_elastic.analysis.bench.ranks", str(folder / "plan.json"), name]
        run_ranks(ranks, program, folder, **variables)
        each = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    found: dict[str, list[list[Any]]] = {}
    for (phase, _), *of_ranks in zip(phases, *each, strict=True):
        found.setdefault(phase, []).append(of_ranks)
    return found


def run_ranks(ranks: int, arguments: Sequence[str], folder: Path, **variables: str) -> float:
    """Run `python ARGUMENTS` on `ranks` ranks, as `ps-elastic launch` would; return the seconds it took."""
    mpi, argv, around = find_mpi(), [sys.executable, *arguments], {**_LOOPBACK, **variables}
    started = time.perf_counter()
    ended, said = run_heard(mpi, ranks, argv, folder, limit_s=LIMIT_S, **around)
    took = time.perf_counter() - started
    if ended.interrupted:
        raise Interrupted("interrupted while ranks were measuring")
    if ended.code:
        why = f"took longer than {LIMIT_S:.0f} s" if ended.timed_out else f"ended with {ended.code}"
        raise PlatformError(f"a job of {ranks} ranks {why}: {said[-_SAID:].strip()}")
    return took


def wide(parameters: int, workers: int, pushes: int, **changes: Any) -> dict[str, Any]:
    """The configuration of an asynchronous run of the task that costs one pass over memory.

    changes: settings of the task by their names, and sections of the configuration by theirs.
    """
    task = {"name": "ps_elastic.analysis.bench.tasks:Wide", "parameters": parameters}
    for key in ("tensors", "compute_s"):
        if key in changes:
            task[key] = changes.pop(key)
    return {
        "task": task,
        "policy": "asynchronous",
        "optimizer": {"lr": 1e-3},
        "train": {"samples": pushes * workers},
        **changes,
    }


def round_trips_s(found: Mapping[str, Any]) -> list[float]:
    """Seconds from the start of each push's sending until its reply was loaded, of what a worker of ours found.

    Of a worker that computes: all of each step but computing and encoding, from the second step on. What it does
    between sending and waiting is counted too, as it may come too late for the reply.
    """
    if "trips" in found:
        return list(found["trips"])
    replies = found["replies"]
    own = [computed + encoded for computed, encoded in zip(replies["compute_s"], replies["encode_s"], strict=True)]
    return [took - other for took, other in zip(steps_s(found), own[1:], strict=True)]


def steps_s(found: Mapping[str, Any]) -> list[float]:
    """Seconds from reply to reply, of what a worker of ours found."""
    return [after - before for before, after in pairwise(found["replies"]["t_s"])]


def middle(runs: Iterable[Sequence[float]], skip: int = 0) -> float:
    """The median over the runs of the median of each, without the first `skip` of each."""
    return median(median(run[skip:]) for run in runs)
