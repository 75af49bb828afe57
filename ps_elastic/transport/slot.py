"""Where messages arrive, and from where they leave: memory cut into chunks, each with a request of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import mpi4py
import numpy as np

mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI
os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # which says on each rank that makes a window that it has no network
os.environ.setdefault("OMPI_MCA_btl", "^ofi")  # access to memory across a network: not used, and sleeps 1 s to say so

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
        self.name = f"rank {comm.Get_rank()}: message from rank {source}"
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

    @property
    def whole(self) -> bool:
        """Whether a frame is always in one chunk."""
        return len(self.requests) == 1

    def has_first(self) -> bool:
        return 0 in self._here

    def free(self) -> None:
        for i, request in enumerate(self.requests):
            if i not in self._idle:
                request.Cancel()
                request.Wait()
            request.Free()


class Outbox:
    """What is sent to one rank under one tag, one message at a time.

    memory: where every message starts, so that its requests are made once for messages of one size; None: anywhere.
    """

    def __init__(self, comm: MPI.Comm, dest: int, tag: int, memory: np.ndarray | None = None) -> None:
        self.dest, self.memory = dest, memory
        self.flying = False  # what was started may not have left
        self._comm, self._tag, self._nbytes = comm, tag, -1
        self._requests: list[MPI.Request] = []

    def start(self, data: np.ndarray) -> None:
        """Begin to send `data` (uint8). What was sent before must have left."""
        self.flying = True
        if self.memory is None:
            parts = enumerate(chunks(data))
            self._requests = [self._comm.Isend([part, MPI.BYTE], self.dest, self._tag + i) for i, part in parts]
            return
        if data.size != self._nbytes:
            self.free()
            parts, self._nbytes = enumerate(chunks(self.memory[: data.size])), data.size
            self._requests = [self._comm.Send_init([part, MPI.BYTE], self.dest, self._tag + i) for i, part in parts]
        for request in self._requests:
            request.Start()  # type: ignore[attr-defined]

    def left(self) -> bool:
        """Whether the last message has left, so that its memory may change."""
        if self.flying:
            if len(self._requests) == 1:  # half the time of asking for a list
                self.flying = not self._requests[0].Test()
            else:
                self.flying = not MPI.Request.Testall(self._requests)
        return not self.flying

    def free(self) -> None:
        if self.memory is not None:
            for request in self._requests:
                request.Free()
        self._requests, self._nbytes = [], -1
