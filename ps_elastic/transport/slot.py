"""Where messages arrive: memory cut into chunks, each with a receive of its own that is posted ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator

import mpi4py
import numpy as np

mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI

from mpi4py import MPI  # noqa: E402

CHUNK_BYTES = int(os.environ.get("PS_ELASTIC_CHUNK_BYTES", 1 << 30))  # below 2 GiB, which MPI counts in an int


def chunks(memory: np.ndarray) -> Iterator[np.ndarray]:
    """The pieces in which `memory` (uint8) travels, as views."""
    for start in range(0, memory.size, CHUNK_BYTES):
        yield memory[start : start + CHUNK_BYTES]


def chunk_count(nbytes: int) -> int:
    """How many chunks a message of `nbytes` is."""
    return -(-nbytes // CHUNK_BYTES)


class Slot:
    """A piece of memory into which one frame at a time is received, by persistent requests, a chunk each."""

    def __init__(self, comm: MPI.Comm, source: int, tag: int, memory: np.ndarray) -> None:
        self.source, self.memory = source, memory
        self.requests = [comm.Recv_init([chunk, MPI.BYTE], source, tag + i) for i, chunk in enumerate(chunks(memory))]
        self._here: set[int] = set()
        self._idle = list(range(len(self.requests)))

    def start(self) -> None:
        """Be ready for the next frame: what the last one left may be overwritten from now on."""
        for i in self._idle:
            self.requests[i].Start()
        self._idle.clear()
        self._here.clear()

    def arrived(self, chunk: int) -> None:
        self._here.add(chunk)
        self._idle.append(chunk)

    def complete(self, nbytes: int) -> bool:
        """Whether all chunks of a frame of `nbytes` are here."""
        return len(self._here) == chunk_count(nbytes)

    def has_first(self) -> bool:
        return 0 in self._here

    def free(self) -> None:
        for i, request in enumerate(self.requests):
            if i not in self._idle:
                request.Cancel()
                request.Wait()
            request.Free()
