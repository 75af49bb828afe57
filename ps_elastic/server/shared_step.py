"""A step of the optimizer made by several ranks of a host together: its blocks are dealt out as each of them gets on.

Rank 0 writes down what is to be done, wakes some of the workers that wait for it, and takes the first block. Whoever
has nothing to do takes the next one, under a lock that all share, until there are none: who never comes is not missed,
and rank 0 waits at the end for those alone who took a block. An entry of the new model depends on the same entries of
the vectors only, so that it has the same bits whoever makes it; and the squares of the moves are added in the order of
the blocks, so that the length of the move has too.

What is shared is in memory that all of them see: the model and the optimizer's moments, the payloads, and a board.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ps_elastic.compressors import Payload
from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import PushId, Step
from ps_elastic.server.combiners import Part, make_combiner
from ps_elastic.server.combiners.base import no_drift
from ps_elastic.server.optimizer import FlatOptimizer

_COMBINERS = ("sum", "mean")
_WORD, _LINE = 8, 64  # bytes
_NUMBER, _NTH, _RATE, _COMBINE, _TERMS, _SEATS, _NEXT = range(7)  # of the words of a board


class Task(NamedTuple):
    """What is to be done. number: of the tasks so far; nth: of the optimizer's steps; terms: (worker, weight)."""

    number: int
    nth: int
    rate: float
    combine: int
    terms: Sequence[tuple[int, float]]


class TaskBoard:
    """The memory (uint8, zeros at first) by which a crew of ranks 0 .. `ranks` - 1 agrees. Read and write it locked.

    busy: rank -> whether it is at work on a block. done: rank -> how many blocks it has made. squares: of the move of
    each block. A count only that says that there is something new may be read at any time: `number`.
    """

    def __init__(self, memory: np.ndarray, ranks: int, blocks: int) -> None:
        words: memoryview[int] = memory[: board_bytes(ranks, blocks)].data
        first, busy, done, workers, weights, squares = (words[i:j] for i, j in _parts(ranks, blocks))
        self._words, self._rates = first.cast("q"), first.cast("d")
        self.busy, self.done = busy.cast("q"), done.cast("q")
        self._workers, self._weights, self.squares = workers.cast("q"), weights.cast("d"), squares.cast("d")
        self.blocks = blocks

    @property
    def number(self) -> int:
        return self._words[_NUMBER]

    def write(self, task: Task, members: int) -> None:
        """Let `members` others take part in `task`."""
        words = self._words
        words[_NTH], words[_COMBINE], words[_TERMS] = task.nth, task.combine, len(task.terms)
        self._rates[_RATE] = task.rate
        for k, (worker, weight) in enumerate(task.terms):
            self._workers[k], self._weights[k] = worker, weight
        words[_SEATS], words[_NEXT], words[_NUMBER] = members, 0, task.number

    def join(self) -> Task | None:
        """Take a member: the task, None where no member or no block is left."""
        words = self._words
        if not words[_SEATS] or words[_NEXT] >= self.blocks:
            return None
        words[_SEATS] -= 1
        terms = [(self._workers[k], self._weights[k]) for k in range(words[_TERMS])]
        return Task(words[_NUMBER], words[_NTH], self._rates[_RATE], words[_COMBINE], terms)

    def take(self, rank: int, number: int) -> int | None:
        """The next block of the task `number`, for `rank`, which has made the one before; None where none is left."""
        words, i = self._words, self._words[_NEXT]
        if i >= self.blocks or words[_NUMBER] != number:
            self.busy[rank] = 0
            return None
        words[_NEXT], self.busy[rank] = i + 1, 1
        return i


def board_bytes(ranks: int, blocks: int) -> int:
    return _parts(ranks, blocks)[-1][1]


def _parts(ranks: int, blocks: int) -> list[tuple[int, int]]:
    """Start and stop of the parts of a board: words, busy, done, workers, weights, squares."""
    parts, end = [], 0
    for words in (_LINE // _WORD, ranks, ranks, ranks, ranks, blocks):
        parts.append((end, end + _WORD * words))
        end = _LINE * math.ceil(parts[-1][1] / _LINE)
    return parts


class Sharer:
    """What all of a crew can do. rank: who this is. frames: worker -> where its payload lies (d,).

    optimizer: of the shared model, with the shared moments. lock: of the board. None of them changes anything of a task
    that it has not a block of.
    """

    def __init__(
        self,
        rank: int,
        optimizer: FlatOptimizer,
        frames: Mapping[int, Tensor],
        board: TaskBoard,
        lock: AbstractContextManager[object],
    ) -> None:
        self._rank, self._optimizer, self._board, self._lock = rank, optimizer, board, lock
        stops = optimizer.stops
        self._lengths = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
        self._frames = {worker: frame.split_with_sizes(self._lengths) for worker, frame in frames.items()}
        self._compressor, self._combiners = Identity(), [make_combiner(name) for name in _COMBINERS]
        self._room = torch.empty(max(self._lengths))

    def _work(self, task: Task) -> None:
        """Make blocks of `task` until there are no more."""
        board, rank, lock = self._board, self._rank, self._lock
        make = self._making(task)
        with lock:
            i = board.take(rank, task.number)
        while i is not None:
            square = make(i)
            with lock:
                board.squares[i] = square
                board.done[rank] += 1
                i = board.take(rank, task.number)

    def _making(self, task: Task) -> Callable[[int], float]:
        """What makes a block and gives back the square of its move."""
        combiner, terms = self._combiners[task.combine], [(self._frames[w], weight) for w, weight in task.terms]
        lengths, room, compressor, optimizer = self._lengths, self._room, self._compressor, self._optimizer

        def make(i: int) -> float:
            parts = [Part((frame[i],), None, weight, no_drift) for frame, weight in terms]
            return optimizer.step_block(i, *combiner.quotient(compressor, parts, room[: lengths[i]]), task.rate)

        return make


class Helper(Sharer):
    """A worker's part in a crew."""

    _seen = 0  # number of the last task that it looked at

    def help(self) -> bool:
        """Take part in the task that is new, if one is, and needs more hands; return whether this was done."""
        board = self._board
        if board.number == self._seen:
            return False
        with self._lock:
            self._seen, task = board.number, board.join()
        if task is None:
            return False
        self._optimizer.go_to(task.nth)
        self._work(task)
        return True


class Leader(Sharer):
    """Rank 0's part in a crew. most: ranks that can be at work on the host without being in each other's way.

    call: wakes so many of the workers given. wait: returns when what it is given names no more ranks, or raises.
    """

    def __init__(
        self,
        optimizer: FlatOptimizer,
        frames: Mapping[int, Tensor],
        board: TaskBoard,
        lock: AbstractContextManager[object],
        most: int,
        call: Callable[[Sequence[int], int], None],
        wait: Callable[[Callable[[], Sequence[int]]], None],
    ) -> None:
        super().__init__(0, optimizer, frames, board, lock)
        self._most, self._call, self._wait = most, call, wait
        self._places = {worker: frame.data_ptr() for worker, frame in frames.items()}
        self.steps = 0  # that were shared

    @property
    def helped(self) -> float | None:
        """The fraction of the blocks of all these steps that others made."""
        own, *others = self._board.done.tolist()
        return sum(others) / (own + sum(others)) if self.steps else None

    def step(self, step: Step, payloads: Mapping[PushId, Sequence[Payload]], rate: float) -> float | None:
        """Make `step`, if others can help: return ||x_new - x_old||; None where it is to be made in the usual way.

        They can whose payload is used and lies in their frame: they wait for the answer. Others of the host compute.
        """
        terms: list[tuple[int, float]] = []
        for push, weight, _ in step.terms:
            payload = payloads.get(push)
            if payload is None or payload[0][0].data_ptr() != self._places.get(push.worker):
                return None
            terms.append((push.worker, weight))
        members = min(len(terms), self._most - 1 - (len(self._places) - len(terms)))
        if members < 1 or step.combine not in _COMBINERS:
            return None
        board, combine = self._board, _COMBINERS.index(step.combine)
        task = Task(board.number + 1, self._optimizer.go_on(), rate, combine, terms)
        with self._lock:
            board.write(task, members)
        self._call([worker for worker, _ in terms], members)
        self._work(task)
        self._wait(self._at_work)
        with self._lock:  # all that they wrote is seen now
            squares = board.squares.tolist()
        self.steps += 1
        moved = 0.0
        for square in squares:  # not `sum`, which makes up for rounding: a pass adds one after another
            moved += square
        return math.sqrt(moved)

    def _at_work(self) -> list[int]:
        return [rank for rank, busy in enumerate(self._board.busy.tolist()) if busy]
