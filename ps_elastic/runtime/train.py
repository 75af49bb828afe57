"""A training run from its command line: what comes before torch, then all the rest at once.

OpenMP and BLAS read how many threads they may use when torch and numpy are imported. So a run has two stages: this file
sets the threads, and imports nothing that imports either; then it imports the run, which imports what it needs on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ps_elastic.cluster.environment import INSTALL, launcher_rank, refuse_split_world
from ps_elastic.cluster.threads import set_server_threads, set_threads
from ps_elastic.config.load import load
from ps_elastic.config.sources import Source
from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.records.run_dir import Given
from ps_elastic.runtime.signals import Signals
from ps_elastic.transport.collectives import Told, agree, ending_all

if TYPE_CHECKING:
    from ps_elastic.transport.mpi import MPI


def train(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    run_dir: Given = None,
    quiet: bool = True,
) -> dict[str, Any] | None:
    """Train as `ps-elastic train` does, and return the content of summary.json (`None` on the ranks of workers).

    - `source`: a YAML file, or a mapping with the same keys.
    - `overrides`: texts as on the command line, such as "optimizer.lr=0.05".
    - `workers`: as many workers in this process (>= 1); `None`: this process is one rank of an MPI job.
    - `run_dir`: folder of the run, new or empty; `None`: runs/NAME-UTC.
    - `quiet`: show no progress on stderr.

    Raises ConfigError for a wrong value, PlatformError without a usable MPI, and the other errors of
    `ps_elastic.errors`. What your own code raises passes through in one process; in an MPI job an error on one rank
    ends the whole job.
    """
    source = source if isinstance(source, Mapping) else str(source)
    if workers is None:
        return _be_rank(source, overrides, run_dir, quiet=quiet)
    if workers < 1:
        raise ConfigError(f"got {workers}, expected a number of workers >= 1", key="--workers")
    set_threads(load(source, overrides, plugins=False).threads, 1)
    from ps_elastic.runtime.in_process import run_in_process

    return run_in_process(source, overrides, workers, run_dir, quiet=quiet)


def _be_rank(source: Source, overrides: Sequence[str], run_dir: Given, *, quiet: bool) -> dict[str, Any] | None:
    """Be one rank of the job, and end the whole job where it fails.

    Raises PlatformError without a usable MPI, ConfigError with a world of one, JobFailed on rank 0 (SystemExit with
    the same code elsewhere) where some rank cannot begin.
    """
    comm = _world()
    with ending_all(comm):
        signals = Signals(comm.Get_rank())
        threads = agree(comm, lambda: _set_threads(source, overrides, comm.Get_rank()))
        from ps_elastic.runtime.rank import run_rank

        return run_rank(comm, source, overrides, run_dir, threads, signals, quiet=quiet)


def _world() -> MPI.Comm:
    try:
        from ps_elastic.transport.mpi import MPI  # which initialises it
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise PlatformError(f"no MPI library could be loaded ({why}); `{INSTALL}` installs one") from None
    size = MPI.COMM_WORLD.Get_size()
    try:
        refuse_split_world(size)
    except PlatformError as error:
        if launcher_rank():  # the launcher's rank 0 stands alone too, and tells
            raise Told(error.exit_code) from None
        raise
    if size < 2:
        raise ConfigError(
            "got 1 rank, expected at least 2 (rank 0 is the server): start it by `ps-elastic launch -n 4 ...` or by "
            "`mpirun -n 4 ps-elastic train ...` (`ps-elastic doctor` prints what mpirun needs on this machine), or in "
            "one process with --in-process --workers 3"
        )
    return MPI.COMM_WORLD.Dup()


def _set_threads(source: Source, overrides: Sequence[str], rank: int) -> str:
    config = load(source, overrides, plugins=False)
    return set_threads(config.threads) if rank else set_server_threads(config.server_threads, config.threads)
