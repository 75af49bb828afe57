"""Simulated runs that are not plain rounds of push and reply: pipelined, layer by layer, with inconsistent reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Any

import torch
from torch import Tensor

from ps_elastic.policies.events import ReplyId
from ps_elastic.simulation.nodes import Node, Taken
from ps_elastic.simulation.simulator import MESSAGE_BYTES, Simulator
from ps_elastic.transport.messages import Farewell, PushMessage, Reply
from ps_elastic.vectors.layout import Layout

FORWARD = 1 / 3
PIECES = 64  # most moments at which a model is read


class AheadSimulator(Simulator):
    """As `Simulator`; pipeline: pushes that a worker may leave unanswered while it goes on.

    Such a worker takes replies in when it has finished a push, and goes on without one where it may.
    """

    def __init__(self, *arguments: Any, pipeline: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pipeline = pipeline
        self._plain = False  # when a reply comes the worker computes already

    def _get(self, node: Node, reply: Reply) -> None:
        if not node.alive or reply.step <= node.told:
            return
        waits = node.arrived == inf
        node.told = reply.step
        node.mail.append(Taken(reply, self.now, self.now - node.since if waits else 0.0))
        node.since = self.now
        if waits:
            self._go_on(node)

    def _go_on(self, node: Node) -> None:
        """Begin the next push if the worker may, on the last reply; or come to the end."""
        machine = node.machine
        if node.mail and node.mail[-1].reply.model is None:
            node.stopping = True
        if node.stopping:
            for taken in node.mail:
                machine.stop(taken.reply, taken.arrived, taken.wait_s)
            node.mail.clear()
            if node.told == machine.step:
                node.alive = False
                self._arrive_later(node, MESSAGE_BYTES, 0.0, self._take, [Farewell(node.rank, node.told)])
            return
        step = max(machine.step, node.told)
        if node.told < 0 or step - node.told > self._pipeline:
            if not node.armed:
                self._arm(node)
            return
        node.arrived, node.taken, node.mail = self.now, node.mail, []
        self._at(
            self._span(node, step + 1, self.now, node.draw())[1],
            self._finish_ahead,
            node,
            ReplyId(node.rank, node.told),
        )

    def _finish_ahead(self, node: Node, given: ReplyId) -> None:
        """A worker has its push, which it computes now, on the model of the reply `given`; sends it, and goes on."""
        if not node.alive:
            return
        messages = node.machine.go_on(node.taken, given, node.arrived, self.now)
        node.arrived, node.since, node.sent = inf, self.now, self.now
        self._send_push(node, messages)
        if node.leaving:
            self._go(node)
        else:
            self._go_on(node)


def ready_after(sizes: Sequence[int]) -> list[float]:
    """The part of the computation after which each bucket, of so many parameters, is ready."""
    behind = [0, *accumulate(reversed(sizes))]
    return [FORWARD + (1 - FORWARD) * done / behind[-1] for done in reversed(behind[1:])]


class LayerSimulator(Simulator):
    """As `Simulator`; sizes: parameters of each bucket. cut_s: after so long a computation is cut off, if ever.

    Pushes leave bucket by bucket, as backward comes to them: from the last layer to the first. Of a computation the
    first third is the forward pass, and backward, which takes about twice as long, spends on each bucket in proportion
    to its parameters. So a bucket is ready when everything behind it in the vector is, and itself. An update that is
    cut off sends what is ready then; the other buckets leave at that moment, empty.
    """

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
        copies, delay = self._outcome(node, reply.step + 1)
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
            node.arrived, node.since, node.sent = inf, self.now, self.now
            self._rest(node)


def pieces_of(layout: Layout) -> tuple[Tensor, ...]:
    """The entries of the flat vector (n,) that are read at one moment, in turn: all parameters, no padding."""
    entries = torch.cat([torch.arange(slot.offset, slot.offset + slot.numel) for slot in layout.slots])
    return torch.tensor_split(entries, min(PIECES, entries.numel()))


class TornSimulator(Simulator):
    """As `Simulator`, with inconsistent reads (`views: torn`). copies: what each worker read (d,). read_s: how long.

    A read takes a while and goes through the entries in their order, as a copy of memory does; a step of the server
    falls between two entries of it. So each entry of a copy lacks the steps that came after it was read, and no others.
    Source: the shared-memory model of Nadiradze et al., "Elastic Consistency", AAAI 2021, table 1.
    """

    def __init__(
        self, *arguments: Any, layout: Layout, copies: Mapping[int, Tensor], read_s: float, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._pieces, self._copies, self._read_s = pieces_of(layout), copies, read_s

    def _compute(self, node: Node, reply: Reply, begins: float, ends: float) -> None:
        """Piece i of n is read at (i + 1/2) / n of the time that reading takes; then the worker computes."""
        for i, piece in enumerate(self._pieces):
            self._at(begins + (i + 0.5) / len(self._pieces) * self._read_s, self._read, node, piece)
        super()._compute(node, reply, begins, ends + self._read_s)

    def _read(self, node: Node, piece: Tensor) -> None:
        if node.alive:
            self._copies[node.rank][piece] = self._server.x[piece]
