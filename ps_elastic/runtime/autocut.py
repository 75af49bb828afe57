"""`buckets: auto` under MPI: every worker warms up, and all ranks take what the last of them finds best.

Where that rank is on the server's host, or ranks outnumber the cores of its own, nothing is measured: the push in one
piece, which is not copied, has been the quickest there (docs/performance.md).
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from ps_elastic.cluster.environment import local_rank
from ps_elastic.transport.collectives import agree, broadcast, meet

if TYPE_CHECKING:
    from mpi4py import MPI

    from ps_elastic.config.load import Config
    from ps_elastic.runtime.build import Parts
    from ps_elastic.transport.host import Host

_SMALL, _LARGE, _ROUNDS = 112, 1 << 22, 7  # bytes of the messages timed, and how often


class Cut(NamedTuple):
    """A configuration that states its buckets, the parts with their layout, and what to tell the user."""

    config: Config
    parts: Parts
    text: str


def settle_buckets(comm: MPI.Comm, config: Config, parts: Parts) -> Cut:
    """Measure where `buckets` is auto; the same on all ranks. The last rank is the one most likely on another host."""
    if config.buckets != "auto":
        return Cut(config, parts, "")
    from ps_elastic.runtime.auto_buckets import Line, Pace, choose
    from ps_elastic.runtime.warmup import time_gradients, time_leaving
    from ps_elastic.transport.host import find_host
    from ps_elastic.transport.ping import round_trips_s
    from ps_elastic.vectors.layout import Layout

    rank, workers = comm.Get_rank(), comm.Get_size() - 1
    host = find_host(comm)
    needless = _needless(host, config.threads)
    host.comm.Free()
    if why := broadcast(comm, needless if rank == workers else "", workers):
        return Cut(config.settled(), parts, f"buckets: auto is whole: {why}")

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
    return Cut(config.settled(buckets), parts._replace(layout=Layout(parts.model, buckets)), text)


def _needless(host: Host, threads: int) -> str:
    """Why nothing has to be measured, if so."""
    if 0 in host.ranks:
        return "on the server's host a push in one piece is quickest"
    if host.crowded(threads):
        return f"{len(host.ranks)} ranks of a host share {host.cores:g} cores"
    return ""
