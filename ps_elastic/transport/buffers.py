"""Where messages arrive, and from where they leave: memory cut into chunks, each with a request of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from ps_elastic.transport.mpi import MPI

CHUNK_BYTES = int(os.environ.get("PS_ELASTIC_CHUNK_BYTES", 1 << 30))  # below 2 GiB, which MPI counts in an int


def chunks(memory: np.ndarray, chunk_bytes: int) -> Iterator[np.ndarray]:
    """The pieces in which `memory` (uint8) travels, as views."""
    for start in range(0, memory.size, chunk_bytes):
        yield memory[start : start + chunk_bytes]


def chunk_count(nbytes: int, chunk_bytes: int) -> int:
    """How many chunks a message of `nbytes` is."""
    return -(-nbytes // chunk_bytes)


class ReceiveBuffer:
    """A piece of memory into which one frame at a time is received, by persistent requests, a chunk each.

    chunk_bytes: of a chunk, CHUNK_BYTES unless given.
    """

    def __init__(self, comm: MPI.Comm, source: int, tag: int, memory: np.ndarray, chunk_bytes: int = 0) -> None:
        self.source, self.memory, self._chunk_bytes = source, memory, chunk_bytes or CHUNK_BYTES
        self.name = f"rank {comm.Get_rank()}: message from rank {source}"
        parts = enumerate(chunks(memory, self._chunk_bytes))
        self.requests = [comm.Recv_init([chunk, MPI.BYTE], source, tag + i) for i, chunk in parts]
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
        return len(self._here) == chunk_count(nbytes, self._chunk_bytes)

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


class SendBuffer:
    """What is sent to one rank under one tag, one message at a time.

    memory: where every message starts, so that its requests are made once for messages of one size; None: anywhere.
    chunk_bytes: of a chunk, CHUNK_BYTES unless given.
    """

    def __init__(
        self, comm: MPI.Comm, dest: int, tag: int, memory: np.ndarray | None = None, chunk_bytes: int = 0
    ) -> None:
        self.dest, self.memory, self._chunk_bytes = dest, memory, chunk_bytes or CHUNK_BYTES
        self.flying = False  # what was started may not have left
        self._comm, self._tag, self._nbytes = comm, tag, -1
        self._requests: list[MPI.Request] = []

    def start(self, data: np.ndarray) -> None:
        """Begin to send `data` (uint8). What was sent before must have left."""
        self.flying = True
        if self.memory is None:
            self.begin()
            self.reach(data, data.size)
            return
        if data.size != self._nbytes:
            self.free()
            parts, self._nbytes = enumerate(chunks(self.memory[: data.size], self._chunk_bytes)), data.size
            self._requests = [self._comm.Send_init([part, MPI.BYTE], self.dest, self._tag + i) for i, part in parts]
        for request in self._requests:
            request.Start()  # type: ignore[attr-defined]

    def begin(self) -> None:
        """Begin a message of which `reach` sends the chunks. What was sent before must have left."""
        self._requests.clear()

    def reach(self, data: np.ndarray, stop: int) -> bool:
        """Send, from where it is, what of `data` is in chunks that end by byte `stop`; whether there was any."""
        begun = len(self._requests)
        for start in range(begun * self._chunk_bytes, stop, self._chunk_bytes):
            end = min(start + self._chunk_bytes, data.size)
            if end > stop:
                break
            tag = self._tag + len(self._requests)
            self._requests.append(self._comm.Isend([data[start:end], MPI.BYTE], self.dest, tag))
            self.flying = True
        return len(self._requests) > begun

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
