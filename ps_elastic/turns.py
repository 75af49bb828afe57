"""Many workers in one process and one memory: each computes its push at one moment, then the next takes its turn."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ps_elastic.events import PushId
from ps_elastic.messages import PushMessage, Reply

if TYPE_CHECKING:
    from ps_elastic.worker import Worker


class Stopwatch:
    """A worker's clock: it shows when the computation began, and from the second look on when it ended."""

    def __init__(self) -> None:
        self._times = [0.0]

    def set(self, began: float, ended: float) -> None:
        self._times = [ended, began]

    def __call__(self) -> float:
        return self._times.pop() if len(self._times) > 1 else self._times[0]


class Turns:
    """A `Worker` that takes turns with others in the same memory; `stopwatch` is its clock.

    view: the model that the server keeps for a push under way.
    """

    def __init__(self, worker: Worker, stopwatch: Stopwatch, view: Callable[[PushId], Any]) -> None:
        self._worker, self._stopwatch, self._view = worker, stopwatch, view

    @property
    def step(self) -> int:
        return self._worker.step

    @step.setter
    def step(self, step: int) -> None:
        self._worker.step = step

    def compute(
        self, reply: Reply, arrived: float, now: float, wait_s: float, cut: Collection[int] = ()
    ) -> list[PushMessage]:
        self._stopwatch.set(arrived, now)
        model = self._view(PushId(self._worker.rank, reply.step + 1))
        self._worker.load(reply._replace(model=model))
        self._worker.note(reply, arrived, 0.0, wait_s)
        messages: list[PushMessage] = []
        self._worker.push(messages.append, cut)
        return messages

    def stop(self, reply: Reply, arrived: float, wait_s: float) -> None:
        self._worker.load(reply)
        self._worker.note(reply, arrived, 0.0, wait_s)
