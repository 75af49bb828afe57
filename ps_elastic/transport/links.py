"""How the ranks of a job are joined: what each worker's payloads travel by, and how a rank waits for messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.transport.collectives import agree
from ps_elastic.transport.doorbells import Doorbells, make_doorbells
from ps_elastic.transport.host import Host, find_host
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.windows import Windows, WindowSizes, make_windows

LEAST_BYTES = 1 << 20  # of a model whose steps are shared: to wake somebody takes as long as half a block
# Probes before a waiting rank sleeps, with a core for each thread and without: of a word in memory, and of MPI.
_SPINS_RUNG, _SPINS_POLLED = (4000, 30), (1000, 10)


@dataclass
class Links:
    """What joins this rank to the others. crowded: its host has fewer cores than its ranks have threads.

    spins: probes of a waiting rank before it sleeps. transports: worker -> shared or messages. note: what the user
    should know of the choice, or "".
    """

    host: Host
    crowded: bool
    spins: int
    doorbells: Doorbells | None
    windows: Windows | None
    transports: dict[int, str]
    note: str

    @property
    def waiting(self) -> str:
        """How ranks of this host wait."""
        return "bells" if self.doorbells else "polling"

    def text(self) -> str:
        """What each worker uses, in a few words."""
        ranks = {kind: [w for w, used in self.transports.items() if used == kind] for kind in ("shared", "messages")}
        used = {kind: workers for kind, workers in ranks.items() if workers}
        parts = [kind if len(used) == 1 else f"{kind} {workers}" for kind, workers in used.items()]
        return f"transport: {', '.join(parts)}" + (f" ({self.note})" if self.note else "")

    def free(self) -> None:
        """By all ranks together, when nothing travels any more."""
        if self.windows is not None:
            self.windows.free()
        if self.doorbells is not None:
            self.doorbells.free()
        self.host.comm.Free()


def join(comm: MPI.Comm, transport: str, threads: int, sharing: WindowSizes, quota: float | None = None) -> Links:
    """Join the ranks of `comm`, all together. transport: auto, messages or shared. threads: of a rank.
    quota: of the host's cores, that the job may use.

    sharing: as this rank would have it. Workers of the server's host compute on its model in place if all ranks there
    can; with `views: torn`, every worker must share memory; and there are common bytes, by which ranks work together,
    where the model is large enough and there are cores for two of them.
    Raises, as `agree` does, ConfigError where a worker that is to share memory is on another host than the server, and
    PlatformError where there is too little of it.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    host = find_host(comm, quota)
    beside = np.zeros(size, np.uint8)
    comm.Allgather(np.array([0 in host.ranks], np.uint8), beside)
    apart, torn = [worker for worker in range(1, size) if not beside[worker]], sharing.torn
    if (transport == "shared" or torn) and apart:
        agree(comm, lambda: _refuse(apart, torn))
    windows, note, doorbells = None, "", make_doorbells(host, rank)
    if transport != "messages":
        readers = np.array([sharing.in_place], np.int32)
        host.comm.Allreduce(MPI.IN_PLACE, readers, MPI.MIN)
        sharing = sharing._replace(in_place=bool(readers[0]))
        if doorbells is None or sharing.model_bytes < LEAST_BYTES or host.cores < 2 * threads:
            sharing = sharing._replace(common=0)
        windows, note = make_windows(comm, host, sharing)
        note = f"{note}: messages instead" if note else ""
    if transport == "shared" or torn:
        agree(comm, lambda: _refuse_without(windows, note, torn))
    shared = np.array([windows is not None], np.uint8)
    comm.Bcast(shared, 0)
    transports = {worker: "shared" if shared[0] and beside[worker] else "messages" for worker in range(1, size)}
    crowded = host.crowded(threads)
    spins = (_SPINS_RUNG if doorbells else _SPINS_POLLED)[crowded]
    return Links(host, crowded, spins, doorbells, windows, transports, note)


def _refuse(apart: list[int], torn: bool) -> None:
    if torn:
        raise ConfigError(
            f"got torn, but ranks {apart} are on other hosts than the server; expected exact, or all on one host, "
            "where workers can read the model while it is written",
            key="views",
        )
    raise ConfigError(
        f"got shared, but ranks {apart} are on other hosts than the server; expected auto, by which those beside it "
        "share memory and the others send messages",
        key="transport",
    )


def _refuse_without(windows: Windows | None, note: str, torn: bool) -> None:
    if windows is None:
        asked = "views: torn" if torn else "transport: shared"
        raise PlatformError(f"{asked}, but {note.removesuffix(': messages instead')}")
