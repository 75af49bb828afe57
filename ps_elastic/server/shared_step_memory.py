"""A step made by several ranks (shared_step.py) in shared windows: who takes part, who wakes them, how rank 0 waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import Stalled
from ps_elastic.server.optimizer import FlatOptimizer, block_count
from ps_elastic.server.shared_step import Helper, Leader, TaskBoard, board_bytes
from ps_elastic.server.steppers import moment_count
from ps_elastic.server.totals import Totals
from ps_elastic.transport.lock import LOCK_BYTES, RobustLock
from ps_elastic.transport.waking import wake_elsewhere
from ps_elastic.transport.wire import HEADER_BYTES
from ps_elastic.vectors.layout import Layout

if TYPE_CHECKING:
    from ps_elastic.transport.doorbells import Doorbells
    from ps_elastic.transport.windows import Windows

_SPIN_S = 300e-6  # for a block that somebody is at work on; a wake from sleep would take a third of that
_NAP_S, _LOOK_S = 1e-3, 0.1  # longest sleep, and between two looks at who died


def common_bytes(settings: Optimizer, layout: Layout, ranks: int) -> int:
    """What a crew of so many ranks shares besides model and payloads."""
    return _moments_start(settings, layout, ranks) + 4 * layout.size * moment_count(settings)


class SharedStepMemory:
    """The memory of a crew of all ranks of the server's host, as this rank sees it; rank 0 calls `make` before any.

    most: of the `ranks`, that compute at the same time.
    """

    def __init__(
        self, windows: Windows, doorbells: Doorbells, most: int, settings: Optimizer, layout: Layout, ranks: int,
        patience_s: float,
    ) -> None:  # fmt: skip
        memory = windows.common()
        assert memory is not None
        self._doorbells, self._model, self._settings, self._layout = doorbells, windows.model(), settings, layout
        self._most, self._patience_s = most, patience_s
        self._memory, self._lock = memory, RobustLock(memory[:LOCK_BYTES], patience_s)
        self._board = TaskBoard(memory[LOCK_BYTES:], ranks, block_count(settings, layout))
        floats = memory[_moments_start(settings, layout, ranks) :].view(np.float32)
        self.moments = [torch.from_numpy(row) for row in floats.reshape(moment_count(settings), layout.size)]
        self._frames = {worker: _payload(windows.frames(worker)[0], layout) for worker in windows.workers}
        self._look: Callable[[], None] | None = None  # on rank 0
        self._leader: Leader | None = None
        self.processes: Mapping[int, int] = {}  # of the ranks, by which rank 0 wakes them on other cores than its own

    def make(self, look: Callable[[], None]) -> None:
        """look: raises what ends the run, if there is anything."""
        self._memory[:], self._look = 0, look
        self._lock.make()

    def leader(self, optimizer: FlatOptimizer) -> Leader:
        """Rank 0's part; its optimizer has `moments`."""
        assert self._look is not None, "nothing was made"
        wait = partial(self._wait, self._look)
        self._leader = Leader(optimizer, self._frames, self._board, self._lock, self._most, self._call, wait)
        return self._leader

    def count(self, totals: Totals) -> None:
        """Let `totals` have how many steps were shared, and how much of them."""
        assert self._leader is not None
        totals.shared_steps, totals.helped = self._leader.steps, self._leader.helped

    def helper(self, rank: int) -> Callable[[], bool]:
        """What a worker calls while it waits."""
        optimizer = FlatOptimizer(self._settings, self._layout, torch.from_numpy(self._model), self.moments)
        helper, wake = Helper(rank, optimizer, self._frames, self._board, self._lock), self._doorbells.wake

        def help() -> bool:
            helped = helper.help()
            if helped:
                wake(0)  # which may wait for the last block
            return helped

        return help

    def _call(self, workers: Sequence[int], count: int) -> None:
        """Wake `count` of `workers`, first those that sleep: who does not may be in the midst of its last message."""
        for worker in sorted(workers, key=self._doorbells.is_asleep, reverse=True)[:count]:
            wake_elsewhere(self.processes[worker], partial(self._doorbells.wake, worker))

    def _wait(self, look: Callable[[], None], at_work: Callable[[], Sequence[int]]) -> None:
        """Return when nobody is at work. Raises Stalled by name, and what `look` raises."""
        started = looked = time.monotonic()
        while ranks := at_work():
            now = time.monotonic()
            if now - started <= _SPIN_S:
                continue
            if now - started > self._patience_s:
                raise Stalled(f"ranks {ranks} did not finish their part of an update in {self._patience_s:.0f} s")
            if now - looked > _LOOK_S:
                looked = now
                look()
            self._doorbells.sleep(_NAP_S, lambda: not at_work())


def _moments_start(settings: Optimizer, layout: Layout, ranks: int) -> int:
    return LOCK_BYTES + -(-board_bytes(ranks, block_count(settings, layout)) // 64) * 64


def _payload(frame: np.ndarray, layout: Layout) -> Tensor:
    return torch.from_numpy(frame[HEADER_BYTES : HEADER_BYTES + 4 * layout.size].view(np.float32))
