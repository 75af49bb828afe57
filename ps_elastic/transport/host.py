"""The ranks that share a host with the server: who they are, how many cores they have, and memory they all see."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import NamedTuple

import numpy as np

from ps_elastic.transport.mpi import MPI

SHM = "/dev/shm"  # where MPI makes windows
APART = os.environ.get("PS_ELASTIC_APART", "")  # ranks, as in "2,3", to be treated as if on hosts of their own
_CPUS = 4096  # most that a host can have
_POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14


class Host(NamedTuple):
    """The ranks of this rank's host, by their rank in the job, and the communicator of them alone."""

    comm: MPI.Comm
    ranks: tuple[int, ...]
    cores: float  # that they have together

    def crowded(self, threads: int) -> bool:
        """Whether `threads` threads a rank are more than there are cores."""
        return len(self.ranks) * threads > self.cores


def find_host(comm: MPI.Comm, quota: float | None = None) -> Host:
    """The host of this rank, as all ranks of `comm` find theirs together; to be freed with `comm`.

    quota: of its cores, that the job may use; None: all.
    """
    rank = comm.Get_rank()
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if APART:
        apart = [int(word) for word in APART.split(",")]
        whole, here = here, here.Split(1 + rank if rank in apart else 0)
        whole.Free()
    ranks, cpus = np.zeros(here.Get_size(), np.int64), np.zeros(_CPUS, np.uint8)
    here.Allgather(np.array([rank], np.int64), ranks)
    mine = np.zeros(_CPUS, np.uint8)
    mine[list(os.sched_getaffinity(0))] = 1
    here.Allreduce(mine, cpus, MPI.MAX)  # a rank that is bound sees its own cores alone
    cores = float(cpus.sum())
    return Host(here, tuple(ranks.tolist()), cores if quota is None else min(cores, quota))


def processes_here(comm: MPI.Comm) -> dict[int, int]:
    """Rank -> process id of the ranks on this host."""
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    found = np.zeros((here.Get_size(), 2), np.int64)
    here.Allgather(np.array([comm.Get_rank(), os.getpid()], np.int64), found)
    here.Free()
    return {int(rank): int(pid) for rank, pid in found}


class Window:
    """Memory of all ranks of a host: `of(rank)` is a rank's part, (nbytes,) uint8, at the start of a page.

    Every rank of the host makes it, with its own size, and frees it.
    """

    def __init__(self, host: Host, nbytes: int) -> None:
        self._ranks, self._nbytes = host.ranks, nbytes
        info = MPI.Info.Create()
        info.Set("alloc_shared_noncontig", "true")
        self._win = MPI.Win.Allocate_shared(nbytes, 1, info, host.comm)  # type: ignore[arg-type]
        info.Free()
        self._win.Lock_all(MPI.MODE_NOCHECK)  # so that Sync may be called

    def of(self, rank: int) -> np.ndarray:
        """The part of `rank` of the job."""
        memory, _ = self._win.Shared_query(self._ranks.index(rank))
        return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload, no-any-return, unused-ignore]

    def populate(self, rank: int) -> bool:
        """Take the memory of `rank`, this one, now; False where there is none left, which later would be fatal."""
        ctypes.set_errno(0)
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        failed = advise(self.of(rank).ctypes.data, self._nbytes, _POPULATE_WRITE) != 0
        return not failed or ctypes.get_errno() not in (errno.EFAULT, errno.ENOMEM)

    def sync(self) -> None:
        """What was written before is seen before anything that is read or written after."""
        self._win.Sync()

    def free(self) -> None:
        self._win.Unlock_all()
        self._win.Free()
