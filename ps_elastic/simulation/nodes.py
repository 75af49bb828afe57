"""A worker of a simulated run, as the world sees it, and what computes for it: workers that take turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Any, NamedTuple, Protocol

from ps_elastic.policies.events import PushId, ReplyId
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.worker.worker import Worker


class VirtualWorker(Protocol):
    """A worker that computes at one moment what it was given at another: `Turns`, or `HeaderWorker`."""

    step: int  # the last one finished

    def compute(
        self, reply: Reply, arrived: float, now: float, wait_s: float, cut: Collection[int] = ()
    ) -> list[PushMessage]:
        """The next push, whose arrays stay as they are; `reply`, which it answers, came at `arrived` after `wait_s`.

        cut: buckets that it does not come to, where its update is cut off.
        """

    def go_on(self, replies: Sequence[Taken], given: ReplyId, began: float, now: float) -> list[PushMessage]:
        """As `compute`, of one that may run ahead: `replies` came since its last push; the last of all is `given`."""

    def stop(self, reply: Reply, arrived: float, wait_s: float) -> None:
        """The run is over, as `reply` says."""


class Node:
    """A worker as the world sees it. One that comes back is another node: of this one nothing more will come."""

    __slots__ = (
        "alive", "armed", "arrived", "down", "draw", "leaving", "machine", "mail", "rank", "sent", "since",
        "stopping", "taken", "told", "up",
    )  # fmt: skip

    def __init__(self, rank: int, machine: VirtualWorker, draw: Callable[[], float]) -> None:
        self.rank, self.machine, self.draw = rank, machine, draw
        self.alive, self.leaving = True, False
        self.arrived = inf  # when the reply arrives that it computes for; infinite while it waits for one
        self.since = self.sent = 0.0  # when it began to wait, and when it last sent something
        self.told, self.stopping = -1, False  # of one that may run ahead: the last step answered, and whether it ends
        self.mail, self.taken = list[Taken](), list[Taken]()  # replies that came since it began, and before that
        self.armed = False  # whether a moment to ask again lies ahead
        self.up = self.down = 0.0  # when the last message to and from the server arrives: none overtakes another


class Taken(NamedTuple):
    """A reply that a worker took in, when it came, and how long the worker had waited for it."""

    reply: Reply
    arrived: float
    wait_s: float


class Stopwatch:
    """A worker's clock: it shows when the computation began, and from the second look on when it ended."""

    def __init__(self) -> None:
        self._times = [0.0]

    def set(self, began: float, ended: float) -> None:
        self._times = [ended, began]

    def __call__(self) -> float:
        return self._times.pop() if len(self._times) > 1 else self._times[0]


class TurnTakingWorker:
    """A `Worker` that takes turns with others in the same memory; `stopwatch` is its clock.

    view: the model that the server keeps for a push under way, or of a reply.
    """

    def __init__(self, worker: Worker, stopwatch: Stopwatch, view: Callable[[PushId | ReplyId], Any]) -> None:
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
        return self._pushed(cut)

    def _pushed(self, cut: Collection[int] = ()) -> list[PushMessage]:
        messages: list[PushMessage] = []
        self._worker.push(messages.append, cut)
        return messages

    def go_on(self, replies: Sequence[Taken], given: ReplyId, began: float, now: float) -> list[PushMessage]:
        self._stopwatch.set(began, now)
        model = self._view(given)
        for reply, arrived, wait_s in replies:
            self._worker.load(reply._replace(model=model))
            self._worker.note(reply, arrived, 0.0, wait_s)
        if not replies:
            self._worker.resume(model)
        return self._pushed()

    def stop(self, reply: Reply, arrived: float, wait_s: float) -> None:
        self._worker.load(reply)
        self._worker.note(reply, arrived, 0.0, wait_s)
