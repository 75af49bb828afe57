"""A worker of a simulated run, as the world sees it, and what computes for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol

from ps_elastic.policies.events import ReplyId
from ps_elastic.simulation.turns import Taken
from ps_elastic.transport.messages import PushMessage, Reply


class Machine(Protocol):
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

    def __init__(self, rank: int, machine: Machine, draw: Callable[[], float]) -> None:
        self.rank, self.machine, self.draw = rank, machine, draw
        self.alive, self.leaving = True, False
        self.arrived = inf  # when the reply arrives that it computes for; infinite while it waits for one
        self.since = self.sent = 0.0  # when it began to wait, and when it last sent something
        self.told, self.stopping = -1, False  # of one that may run ahead: the last step answered, and whether it ends
        self.mail, self.taken = list[Taken](), list[Taken]()  # replies that came since it began, and before that
        self.armed = False  # whether a moment to ask again lies ahead
        self.up = self.down = 0.0  # when the last message to and from the server arrives: none overtakes another
