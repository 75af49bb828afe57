"""Workers whose pushes leave bucket by bucket, as backward comes to them: from the last layer to the first.

Of a computation the first third is the forward pass, and backward, which takes about twice as long, spends on each
bucket in proportion to its parameters. So a bucket is ready when everything behind it in the vector is, and itself. An
update that is cut off sends what is ready then; the other buckets leave at that moment, empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ps_elastic.simulation.nodes import Node
from ps_elastic.simulation.simulator import MESSAGE_BYTES, Simulator
from ps_elastic.transport.messages import PushMessage, Reply

FORWARD = 1 / 3


def ready_after(sizes: Sequence[int]) -> list[float]:
    """The part of the computation after which each bucket, of so many parameters, is ready."""
    behind = [0, *accumulate(reversed(sizes))]
    return [FORWARD + (1 - FORWARD) * done / behind[-1] for done in reversed(behind[1:])]


class LayerSimulator(Simulator):
    """As `Simulator`; sizes: parameters of each bucket. cut_s: after so long a computation is cut off, if ever."""

    def __init__(self, *arguments: Any, sizes: Sequence[int], cut_s: float | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ready, self._cut_s = ready_after(sizes), float("inf") if cut_s is None else cut_s

    def _compute(self, node: Node, reply: Reply, begins: float, ends: float) -> None:
        limit, ready = node.arrived + self._cut_s, [begins + part * (ends - begins) for part in self._ready]
        times = [min(limit, at) for at in ready]
        cut = {i for i, at in enumerate(ready) if at > limit}
        self._at(min(times), self._leave_all, node, (reply, times, cut))

    def _leave_all(self, node: Node, what: tuple[Reply, list[float], set[int]]) -> None:
        """The first bucket is ready, so the push can be computed; each bucket leaves at its time."""
        if not node.alive:
            return
        reply, times, cut = what
        messages = node.machine.compute(reply, node.arrived, max(times), node.arrived - node.since, cut)
        copies, delay = self._fate(node, reply.step + 1)
        for message in messages:
            self._at(times[message.bucket], self._leave_one, node, (message, copies, delay))
        self._at(max(times), self._end, node)

    def _leave_one(self, node: Node, what: tuple[PushMessage, int, float]) -> None:
        message, copies, delay = what
        if not node.alive:
            return
        nbytes = MESSAGE_BYTES + sum(array.nbytes for array in message.arrays)
        for _ in range(copies):
            self._arrive_later(node, nbytes, delay, self._take, [message])

    def _end(self, node: Node, _: None) -> None:
        if node.alive:
            self._finished_push(node)
