"""Workers that run ahead: `update.pipeline` in virtual time.

Such a worker takes replies in when it has finished a push, and goes on without one where it may.
"""

from __future__ import annotations

from math import inf
from typing import Any

from ps_elastic.policies.events import ReplyId
from ps_elastic.simulation.nodes import Node
from ps_elastic.simulation.simulator import MESSAGE_BYTES, Simulator
from ps_elastic.simulation.turns import Taken
from ps_elastic.transport.messages import Farewell, Reply


class AheadSimulator(Simulator):
    """As `Simulator`; pipeline: pushes that a worker may leave unanswered while it goes on."""

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
