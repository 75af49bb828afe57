"""One rank of a job under MPI, from the moment its threads are set to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ps_elastic.cluster.environment import cgroup_quota, local_rank
from ps_elastic.config.load import load
from ps_elastic.config.sources import Source
from ps_elastic.records.run_dir import Given, new_run_dir
from ps_elastic.runtime.build import make_parts, reads_in_place, shares_steps
from ps_elastic.runtime.rank_setup import RankSetup, settle_buckets
from ps_elastic.runtime.signals import Signals
from ps_elastic.runtime.worker_rank import be_worker
from ps_elastic.server.shared_step_memory import common_bytes
from ps_elastic.transport.collectives import agree, broadcast, compare, meet
from ps_elastic.transport.links import Links, join
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.windows import WindowSizes


def run_rank(
    comm: MPI.Comm,
    source: Source,
    overrides: Sequence[str],
    run_dir: Given,
    threads: str,
    signals: Signals,
    *,
    quiet: bool,
) -> dict[str, Any] | None:
    """Be one rank of the job; return the summary on rank 0, None elsewhere. threads: that were set, for the user."""
    setting = _prepare(comm, source, overrides, run_dir, threads)
    links = _join(comm, setting)
    summary = None
    if comm.Get_rank() == 0:
        from ps_elastic.runtime.server_rank import be_server  # 40 ms for rich, with which workers show nothing

        summary = be_server(comm, setting, links, signals, quiet=quiet)
    else:
        be_worker(comm, setting, links)
    meet(comm)
    links.free()
    comm.Free()
    return summary


def _prepare(comm: MPI.Comm, source: Source, overrides: Sequence[str], run_dir: Given, threads: str) -> RankSetup:
    """Load and make, on every rank, what is the same on all of them; refuse what differs."""
    rank, workers = comm.Get_rank(), comm.Get_size() - 1
    config = agree(comm, lambda: load(source, overrides))
    compare(comm, "the configuration", config.digest())
    # One rank of each host first: what it fetches, the others find.
    early = agree(comm, lambda: None if local_rank() else make_parts(config, workers))
    parts = agree(comm, lambda: early or make_parts(config, workers))
    compare(comm, "the model's layout", parts.layout.digest)
    config, parts, said = settle_buckets(comm, config, parts)
    folder = agree(comm, lambda: "" if rank else str(new_run_dir(config.name, run_dir).absolute()))
    return RankSetup(config, parts, threads, said, Path(broadcast(comm, folder, 0)))


def _join(comm: MPI.Comm, setting: RankSetup) -> Links:
    config, parts = setting.config, setting.parts
    written = config.update.pipeline + 1 if config.writers == "workers" else 0
    # A window has one frame for each worker, unless nothing but metadata is sent.
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
