"""Whose next model may leave while the step is still being made."""

from __future__ import annotations

from collections.abc import Iterable

_IN_A_ROW = 2  # answers of this kind that a worker must have got


class EagerModels:
    """Workers whose last pushes were each answered with the model of the very step that was made of them.

    They will probably be answered so again: the pieces of the model leave to them as the step makes them. Nobody is
    answered before the policy has said so. What has left is then the rest of the answer, or, where the policy wants
    something else, is told to be stale by the next reply.
    """

    def __init__(self) -> None:
        self._row: dict[int, int] = {}  # worker -> so many answers in a row
        self._pushed: set[int] = set()  # workers of the last step's pushes that nobody answered yet

    def begin(self, workers: Iterable[int]) -> list[int]:
        """A step begins, of pushes of `workers`: those to whom its model may leave early."""
        for worker in self._pushed:
            self._row[worker] = 0
        self._pushed = set(workers)
        return sorted(worker for worker in self._pushed if self._row.get(worker, 0) >= _IN_A_ROW)

    def answered(self, worker: int, *, newest: bool) -> None:
        """A worker was answered; newest: with the model as the last step left it."""
        if worker in self._pushed:
            self._pushed.discard(worker)
            self._row[worker] = self._row.get(worker, 0) + 1 if newest else 0
