"""One rank of a job under MPI, from its command line to its end; whatever happens, the job ends."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ps_elastic.cluster.environment import INSTALL, cgroup_quota, launcher_rank, local_rank, refuse_split_world
from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.records.run_dir import new_run_dir
from ps_elastic.runtime.auto_buckets import settle_buckets
from ps_elastic.runtime.build import RankSetup
from ps_elastic.runtime.signals import Signals
from ps_elastic.transport.collectives import Told, agree, broadcast, compare, ending_all, meet

if TYPE_CHECKING:
    from ps_elastic.transport.links import Links
    from ps_elastic.transport.mpi import MPI


def run_rank(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str],
    run_dir: str | os.PathLike[str] | None,
    *,
    quiet: bool,
) -> dict[str, Any] | None:
    """Be one rank of the job; return the summary on rank 0, None elsewhere. Ends the whole job where a rank fails.

    Raises PlatformError without a usable MPI, ConfigError with a world of one, JobFailed on rank 0 (SystemExit with
    the same code elsewhere) where some rank cannot begin.
    """
    comm = _world()
    with ending_all(comm):
        signals = Signals(comm.Get_rank())
        setting = _prepare(comm, source if isinstance(source, Mapping) else str(source), overrides, run_dir)
        links = _join(comm, setting)
        summary = None
        if comm.Get_rank() == 0:
            from ps_elastic.runtime.server_rank import be_server

            summary = be_server(comm, setting, links, signals, quiet=quiet)
        else:
            from ps_elastic.runtime.worker_rank import be_worker

            be_worker(comm, setting, links)
        meet(comm)
        links.free()
        comm.Free()
    return summary


def _world() -> MPI.Comm:
    try:
        from ps_elastic.transport.mpi import MPI
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
            "got 1 rank, expected at least 2 (rank 0 is the server): start it by `mpirun -n 4 ps-elastic train ...` "
            "or `ps-elastic launch -n 4 ...`, or in one process with --in-process --workers 3"
        )
    return MPI.COMM_WORLD.Dup()


def _prepare(
    comm: MPI.Comm,
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    run_dir: str | os.PathLike[str] | None,
) -> RankSetup:
    """Load and make, on every rank, what is the same on all of them; refuse what differs."""
    from ps_elastic.config.load import load

    rank, workers = comm.Get_rank(), comm.Get_size() - 1
    threads = agree(comm, lambda: _threads(source, overrides, rank))
    from ps_elastic.runtime.build import make_parts  # torch: only after the threads are set

    config = agree(comm, lambda: load(source, overrides))
    compare(comm, "the configuration", config.digest())
    # One rank of each host first: what it fetches, the others find.
    early = agree(comm, lambda: None if local_rank() else make_parts(config, workers))
    parts = agree(comm, lambda: early or make_parts(config, workers))
    compare(comm, "the model's layout", parts.layout.digest)
    cut = settle_buckets(comm, config, parts)
    folder = agree(comm, lambda: "" if rank else str(_folder(config.name, run_dir)))
    return RankSetup(cut.config, cut.parts, threads, cut.text, Path(broadcast(comm, folder, 0)))


def _threads(source: str | Mapping[str, Any], overrides: Sequence[str], rank: int) -> str:
    from ps_elastic.cluster.threads import set_server_threads, set_threads
    from ps_elastic.config.load import load

    light = load(source, overrides, plugins=False)
    return set_threads(light.threads) if rank else set_server_threads(light.server_threads, light.threads)


def _folder(name: str, given: str | os.PathLike[str] | None) -> Path:
    return new_run_dir(name, None if given is None else os.fspath(given)).absolute()


def _join(comm: MPI.Comm, setting: RankSetup) -> Links:
    from ps_elastic.runtime.build import reads_in_place, shares_steps
    from ps_elastic.server.shared_step_memory import common_bytes
    from ps_elastic.transport.links import join
    from ps_elastic.transport.windows import WindowSizes

    config, parts = setting.config, setting.parts
    written = config.update.pipeline + 1 if config.writers == "workers" else 0
    # A window has one frame for each worker, unless nothing but headers is sent.
    transport = "messages" if config.update.pipeline and not written else config.transport
    sharing = WindowSizes(
        parts.frames(config),
        4 * parts.layout.size,
        in_place=reads_in_place(config),
        torn=config.views == "torn",
        written=written,
        common=common_bytes(config.optimizer, parts.layout, comm.Get_size()) if shares_steps(config, parts) else 0,
    )
    return join(comm, transport, config.threads, sharing, cgroup_quota())
