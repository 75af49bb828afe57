"""What the ranks of a job settle with each other before they begin: their buckets, their links, who shares a step."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

from ps_elastic.cluster.environment import cgroup_quota, local_rank
from ps_elastic.config.schema import Config
from ps_elastic.runtime.auto_buckets import Line, Pace, choose, time_gradients, time_leaving
from ps_elastic.runtime.build import Parts
from ps_elastic.server.shared_step_memory import SharedStepMemory
from ps_elastic.transport.collectives import agree, broadcast, meet
from ps_elastic.transport.endpoint import Traffic
from ps_elastic.transport.host import Host, find_host
from ps_elastic.transport.links import Links
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.ping import round_trips_s
from ps_elastic.vectors.layout import Layout

_SMALL, _LARGE, _ROUNDS = 112, 1 << 22, 7  # bytes of the messages timed, and how often


class RankSetup(NamedTuple):
    """What a rank knows when it may begin."""

    config: Config
    parts: Parts
    threads: str  # for the user
    buckets: str  # for the user, where they were measured
    directory: Path

    def traffic(self, links: Links, patience_s: float) -> Traffic:
        """What this rank's end of the transport is made for."""
        config, parts = self.config, self.parts
        return Traffic(
            parts.layout.digest, parts.frames(config), 4 * parts.layout.size, links.spins, patience_s, links,
            config.update.pipeline, parts.vectors(config),
        )  # fmt: skip


def settle_buckets(comm: MPI.Comm, config: Config, parts: Parts) -> tuple[Config, Parts, str]:
    """Return (a configuration that states its buckets, the parts with their layout, what to tell the user).

    Measured where `buckets` is auto; the same on all ranks. The last rank is the one most likely on another host.

    Every worker warms up, and all ranks take what the last of them finds best. Where that rank is on the server's host,
    or ranks outnumber the cores of its own, nothing is measured: the push in one piece, which is not copied, has been
    the quickest there (docs/evidence/performance.md).
    """
    if config.buckets != "auto":
        return config, parts, ""
    rank, workers = comm.Get_rank(), comm.Get_size() - 1
    host = find_host(comm, cgroup_quota())
    needless = _needless(host, config.threads)
    host.comm.Free()
    if why := broadcast(comm, needless if rank == workers else "", workers):
        return config.settled(), parts, f"buckets: auto is whole: {why}"

    def warm_up() -> Pace | None:
        if rank == 0:
            return None
        ready = time_gradients(config, parts, rank, workers, local_rank())
        # A large bucket that is the gradient itself leaves from there, as it does in one piece.
        leaving, nbytes = time_leaving(config, parts, rank, copies=not parts.is_gradient(config))
        return Pace(ready, leaving, Line(0.0, 0.0), nbytes)

    pace = agree(comm, warm_up)
    trips = [(nbytes, round_trips_s(comm, nbytes, _ROUNDS, peer=workers)) for nbytes in (_SMALL, _LARGE)]
    said = ""
    if pace is not None and rank == workers:
        small, large = ((float(size), workers * median(times) / 2) for size, times in trips)
        choice = choose(parts.layout, pace._replace(arriving=Line.through(small, large)))
        said = f"{choice.buckets}\n{choice.text}"
    meet(comm)
    written, text = broadcast(comm, said, workers).split("\n")
    buckets = written if written == "whole" else int(written)
    return config.settled(buckets), parts._replace(layout=Layout(parts.model, buckets)), text


def _needless(host: Host, threads: int) -> str:
    """Why nothing has to be measured, if so."""
    if 0 in host.ranks:
        return "on the server's host a push in one piece is quickest"
    if host.crowded(threads):
        return f"{len(host.ranks)} ranks of a host share {host.cores:g} cores"
    return ""


def find_step_memory(
    links: Links, config: Config, layout: Layout, ranks: int, patience_s: float
) -> SharedStepMemory | None:
    """The crew that this rank belongs to, if its host has one."""
    windows, doorbells = links.windows, links.doorbells
    if windows is None or doorbells is None or windows.common() is None:
        return None
    most = int(links.host.cores / config.threads)
    return SharedStepMemory(windows, doorbells, most, config.optimizer, layout, ranks, patience_s)
