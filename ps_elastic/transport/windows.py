"""One host, one memory: the server's model and the frames of each worker lie where both of them see them.

A push is then a header: the worker made its payload where the server reads it, and does not touch it until the reply
comes. A reply is a header too: the worker copies the server's model, says that it has, and only then does the server
change it; or it computes on the server's model itself, where no step can come before its push.

A worker says how many models it is done with by a count in its part of the window; the server compares it with how
many it gave. The server waits for that before it changes the model, so that no read is inconsistent. With `views: torn`
it does not wait, and each worker's copy is in the worker's part, where the server sees what was read. Of workers that
write the model themselves the payloads go nowhere, and their part has the distances that they measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ps_elastic.transport.host import SHM, Host, Window
from ps_elastic.transport.lock import LOCK_BYTES, RobustLock
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.wire import HEADER_BYTES

_COUNT_BYTES = 64  # a cache line for the count
_SLACK = 1.05, 16 << 20  # room in shared memory beyond the windows' own: MPI takes some as it goes


class WindowSizes(NamedTuple):
    """What the ranks of the server's host share, and so how large the part of each is.

    frames: most bytes that each bucket's frame can take. model_bytes: of the flat model.
    in_place: workers compute on the server's model itself. torn: they copy it while it may change. written: they write
    it themselves, with so many pushes under way at most; 0: they do not. common: bytes, a multiple of 64, that all of
    them may write.
    """

    frames: Sequence[int]
    model_bytes: int
    in_place: bool
    torn: bool = False
    written: int = 0
    common: int = 0

    def part_bytes(self, rank: int) -> int:
        """The size of the part of `rank`."""
        if not rank:
            more = self.common + (LOCK_BYTES if self.torn else 0)
            return _line_up(self.model_bytes) + more if more else self.model_bytes
        if self.written:
            return _COUNT_BYTES + _line_up(8 * self.written)
        end = self.places()[-1][1]
        return _line_up(end) + self.model_bytes if self.torn else end

    def places(self) -> list[tuple[int, int]]:
        """Start and stop of each frame in a worker's part: what follows its header begins at a multiple of 64 bytes."""
        places, end = [], _COUNT_BYTES
        for nbytes in self.frames:
            start = _line_up(end + HEADER_BYTES) - HEADER_BYTES
            places.append((start, start + nbytes))
            end = start + nbytes
        return places


class Windows:
    """The windows of rank 0 and the workers on its host, made and freed by all of them; settings: see Sharing."""

    def __init__(self, host: Host, rank: int, sharing: WindowSizes) -> None:
        self.workers = tuple(other for other in host.ranks if other)
        self.in_place, self.torn, self.written = sharing.in_place, sharing.torn, sharing.written
        self._rank, self._model_bytes, self._common = rank, sharing.model_bytes, sharing.common
        self._places, self._end = sharing.places(), sharing.part_bytes(0)
        self._window = Window(host, sharing.part_bytes(rank))
        self.sync = self._window.sync

    def populate(self) -> bool:
        """Whether there was memory for this rank's part."""
        return self._window.populate(self._rank)

    def model(self) -> np.ndarray:
        """The server's model (d,), float32."""
        return self._window.of(0)[: self._model_bytes].view(np.float32)

    def common(self) -> np.ndarray | None:
        """What all may write, uint8 at a multiple of 64, zeros at first; None where there was no room for it."""
        return self._window.of(0)[self._end - self._common : self._end] if self._common else None

    def lock(self, patience_s: float) -> RobustLock:
        """The lock of the model, with `views: torn`; see RobustLock for `patience_s`."""
        start = _line_up(self._model_bytes)
        return RobustLock(self._window.of(0)[start : start + LOCK_BYTES], patience_s)

    def frames(self, worker: int) -> list[np.ndarray]:
        """Where the frames of `worker` lie, uint8, one for each bucket."""
        memory = self._window.of(worker)
        return [memory[start:stop] for start, stop in self._places]

    def copy(self, worker: int) -> np.ndarray:
        """The model (d,), float32, as `worker` read it last, with `views: torn`."""
        start = _line_up(self._places[-1][1])
        return self._window.of(worker)[start : start + self._model_bytes].view(np.float32)

    def distances(self, worker: int) -> np.ndarray:
        """What `worker` measured, (written,) float64, where workers write: of push s at s modulo their number."""
        return self._window.of(worker)[_COUNT_BYTES : _COUNT_BYTES + 8 * self.written].view(np.float64)

    def taken(self, worker: int) -> memoryview:
        """The count of models that `worker` is done with, one number."""
        return self._window.of(worker)[:8].data.cast("q")

    def free(self) -> None:
        self._window.free()


def _line_up(nbytes: int) -> int:
    """The next multiple of 64."""
    return -(-nbytes // 64) * 64


def free_bytes() -> int:
    """How much shared memory is left on this host; 0 where there is none at all."""
    try:
        found = os.statvfs(SHM)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def make_windows(comm: MPI.Comm, host: Host, sharing: WindowSizes) -> tuple[Windows | None, str]:
    """The windows of the server's host, on its ranks; and why there are none, or "". All ranks of `comm` take part.

    There are none where the server has no worker on its host, or too little memory to share; where there is too little
    for the common bytes alone, there are none of these.
    """
    rank = comm.Get_rank()
    workers = len(host.ranks) - 1
    least = sharing._replace(common=0)
    needs = [kind.part_bytes(0) + workers * kind.part_bytes(1) for kind in (least, sharing)]
    room, (wanted, more) = free_bytes(), [int(_SLACK[0] * size) + _SLACK[1] for size in needs]
    verdict = np.array([0 if not workers else 1 if room < wanted else 2 if room < more else 3], np.int32)
    comm.Bcast(verdict, 0)  # rank 0's counts
    windows = None
    if verdict[0] >= 2 and 0 in host.ranks:
        windows = Windows(host, rank, sharing if verdict[0] == 3 else least)
        populated = np.array([windows.populate()], np.int32)
        everywhere = np.zeros(1, np.int32)
        host.comm.Allreduce(populated, everywhere, MPI.MIN)
        if not everywhere[0]:
            windows.free()
            windows, verdict[0], room = None, 1, min(room, free_bytes())
    why = f"shared windows need {wanted / 1e6:.0f} MB in {SHM}, which has {room / 1e6:.0f} MB"
    return windows, why if verdict[0] == 1 else ""
