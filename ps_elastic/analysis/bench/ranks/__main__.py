"""One rank of a benchmark: runs of ours and of what they are compared to, in turn, in the same processes.

`mpirun -n RANKS python -m ps_elastic.analysis.bench.ranks PLAN FOLDER`. PLAN: a JSON list of phases, each a mapping of
`do`, the name of a function in `PHASES`, and its arguments. Each rank writes FOLDER/rank-N.json: a list of what each
phase gave there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ps_elastic.analysis.bench.ranks import bare, lockfree, rivals, runs
from ps_elastic.cluster.threads import set_threads
from ps_elastic.transport.collectives import JobFailed, ending_all, meet
from ps_elastic.transport.mpi import MPI

PHASES: Mapping[str, Callable[..., Any]] = {
    phase.__name__: phase
    for phase in (
        runs.train, runs.send, runs.weigh, bare.blocking_server, bare.echo, bare.exchange, bare.ping_pong,
        lockfree.hogwild, lockfree.lost, rivals.local, rivals.ddp, rivals.allreduce,
    )
}  # fmt: skip


def main() -> None:
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.chdir(folder)
    set_threads(1)
    world = MPI.COMM_WORLD
    try:
        with ending_all(world):
            found = [_measured(world, **phase) for phase in plan]
    except JobFailed as error:  # on rank 0; the others end by themselves
        sys.exit(f"ps-elastic: {error}")
    (folder / f"rank-{world.Get_rank()}.json").write_text(json.dumps(found))


def _measured(world: MPI.Comm, do: str, **arguments: Any) -> Any:
    meet(world)
    return PHASES[do](world, **arguments)


if __name__ == "__main__":
    main()
