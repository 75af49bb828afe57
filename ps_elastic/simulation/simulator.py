"""The same server and workers in simulated time: a heap of what happens next, and nothing that waits.

A push is computed, in no time at all, at the moment it is finished, on the worker's copy that the server keeps for it.
At equal times what was decided first happens first, and the policy's Wake comes last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf
from typing import Any

from ps_elastic.config.faults import Happening, Plan
from ps_elastic.errors import Stalled, WorkersLost
from ps_elastic.runtime.loops import awaited
from ps_elastic.server.server import Server
from ps_elastic.simulation.costs import Cores, Durations, NetworkLinks
from ps_elastic.simulation.nodes import Node, VirtualWorker
from ps_elastic.transport.messages import Ask, Farewell, Message, PushMessage, Reply
from ps_elastic.vectors.norms import quiet

MESSAGE_BYTES = 112  # of a message without arrays
MOST_WAKES = 10_000  # in a row, at one time


Happens = tuple[float, int, Callable[[Any, Any], None], Any, Any]  # time, number, what is called with which arguments


class Simulator:
    """Workers 1..p around a server. `run` returns the simulated time at which everybody has stopped.

    make: a worker by its rank. deadline_s: Stalled after so much simulated time; silence_s: after so long without a
    push. ask_again_s: a worker without a reply asks. on_turn: called now and then, with the time.
    """

    def __init__(
        self, server: Server, workers: int, make: Callable[[int], VirtualWorker], durations: Durations,
        cores: Cores | None, wires: NetworkLinks, plan: Plan, *, service_s: float = 0.0, ask_again_s: float = 60.0,
        silence_s: float = 300.0, deadline_s: float = inf, min_workers: int = 1,
        on_turn: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self._server, self._make, self._durations, self._cores = server, make, durations, cores
        self._wires, self._plan = wires, plan
        self._faulty, self._finished = bool(plan.faults), False
        # Nobody queues and nothing is lost or late: with a reply it is known when the push that answers it is sent.
        self._plain = not (self._faulty or cores or service_s) and wires.unlimited
        self._computes_at_once = type(self)._compute is Simulator._compute
        self._latency_s = wires.latency_s
        self._service_s, self._ask_again_s, self._silence_s = service_s, ask_again_s, silence_s
        self._deadline_s, self._min_workers, self._on_turn = deadline_s, min_workers, on_turn
        self._nodes = {rank: Node(rank, make(rank), durations.of(rank)) for rank in range(1, workers + 1)}
        self._heap: list[Happens] = []
        self._arriving: deque[Happens] = deque()  # what comes in the order in which it is known
        self._number = 0
        self._heard, self._limit = 0.0, min(silence_s, deadline_s)

    @quiet
    def run(self) -> float:
        """Run to the end. Raises Stalled, WorkersLost, and what a worker or a policy raises."""
        server, heap, arriving = self._server, self._heap, self._arriving
        joining = sum(len(entry.ranks or ()) for entry in self._plan.faults.join)
        for happening in self._plan.happenings(len(self._nodes) + joining):
            self._at(happening.at_s, self._happen, happening)
        for node in tuple(self._nodes.values()):
            self._arm(node)
        self._send_all(server.start(0.0), 0.0)
        wakes = 0
        ledger = server.ledger
        while not self._finished:
            wake = ledger.wake_at
            nearest = arriving if arriving and not (heap and heap[0] < arriving[0]) else heap
            if nearest and (wake is None or nearest[0][0] <= wake):
                self.now, _, act, subject, what = heappop(heap) if nearest is heap else arriving.popleft()
                wakes = 0
                act(subject, what)
            elif wake is not None:
                wakes = wakes + 1 if wake <= self.now else 0
                self.now = max(self.now, wake)
                at = self._wires.serve(self.now, 0.0)
                self._send_all(server.tick(at), at)
                if wakes > MOST_WAKES:
                    raise Stalled(f"the policy asks to be woken at {self.now:g} s without end; {awaited(server)}")
            else:
                raise Stalled(f"nothing is left to happen; {awaited(server)}")
            if self.now > self._limit:
                self._check_silence()
        return self.now

    def _check_silence(self) -> None:
        """Give up, unless somebody was heard since the moment to do so was last worked out."""
        self._limit = min(self._heard + self._silence_s, self._deadline_s)
        if self.now > self._deadline_s:
            raise Stalled(f"not done after {self._deadline_s:g} simulated s; {awaited(self._server)}")
        if self.now > self._limit:
            raise Stalled(f"no push for {self.now - self._heard:g} simulated s; {awaited(self._server)}")

    def _at(self, time: float, act: Callable[[Any, Any], None], subject: Any, what: Any = None) -> None:
        self._number += 1
        heappush(self._heap, (time, self._number, act, subject, what))

    # From the server to a worker

    def _send_all(self, outgoing: Iterable[tuple[int, Reply]], now: float) -> None:
        nodes, send = self._nodes, self._send
        for rank, reply in outgoing:
            send(nodes[rank], reply, now)

    def _send(self, node: Node, reply: Reply, now: float) -> None:
        model = reply.model
        if self._plain and model is not None:
            self._begin(node, reply, now + self._latency_s)
            return
        arrives = self._wires.down(now, MESSAGE_BYTES if model is None else MESSAGE_BYTES + model.nbytes)
        if self._faulty:
            if self._plan.happens("lost_reply", node.rank, reply.step, now):
                return
            arrives += self._plan.delay("reply", node.rank, reply.step, now)
        node.down = arrives = max(arrives, node.down)
        self._at(arrives, self._get, node, reply)

    def _get(self, node: Node, reply: Reply) -> None:
        """A reply is here."""
        if not node.alive:
            return
        if reply.model is not None:
            self._begin(node, reply, self.now)
        elif node.arrived == inf and reply.step == node.machine.step:
            node.machine.stop(reply, self.now, self.now - node.since)
            node.alive = False
            self._arrive_later(node, MESSAGE_BYTES, 0.0, self._take, [Farewell(node.rank, reply.step)])

    def _begin(self, node: Node, reply: Reply, arrives: float) -> None:
        """Let the worker compute from `arrives` on; not on a second copy of an earlier reply, which answers no more."""
        if node.arrived != inf or reply.step != node.machine.step:
            return
        node.arrived, duration = arrives, node.draw()
        if self._plain and self._computes_at_once:
            self._number += 1
            heappush(self._heap, (arrives + duration, self._number, self._finish, node, reply))
        else:
            begins, ends = self._span(node, reply.step + 1, arrives, duration)
            self._compute(node, reply, begins, ends)

    def _compute(self, node: Node, reply: Reply, begins: float, ends: float) -> None:
        """A worker computes the push after `reply` from `begins` to `ends`."""
        self._at(ends, self._finish, node, reply)

    def _span(self, node: Node, step: int, begins: float, duration: float) -> tuple[float, float]:
        """From when to when the worker computes its push `step`, which it can begin at `begins`."""
        if self._faulty:
            duration *= self._plan.factor(node.rank, step, begins)
        if self._cores is not None:
            begins = self._cores.take(begins, duration)
        return begins, self._plan.end(node.rank, begins, duration) if self._faulty else begins + duration

    # From a worker to the server

    def _finish(self, node: Node, reply: Reply) -> None:
        """A worker has its push, which it computes now, on the model of `reply`; and sends it."""
        if not node.alive:
            return
        now, arrived = self.now, node.arrived
        messages = node.machine.compute(reply, arrived, now, arrived - node.since)
        if self._plain:
            self._number += 1
            self._arriving.append((now + self._latency_s, self._number, self._take, node, messages))
        else:
            self._send_push(node, messages)
        node.arrived, node.since, node.sent = inf, now, now
        if node.leaving or not node.armed:
            self._rest(node)

    def _rest(self, node: Node) -> None:
        """All of a worker's push is on its way: from now on it waits, or goes."""
        if node.leaving:
            self._go(node)
        elif not node.armed:
            self._arm(node)

    def _send_push(self, node: Node, messages: list[PushMessage]) -> None:
        nbytes = 0
        for message in messages:
            nbytes += MESSAGE_BYTES
            for array in message.arrays:
                nbytes += array.nbytes
        copies, delay = self._outcome(node, messages[-1].step)
        for _ in range(copies):
            self._arrive_later(node, nbytes, delay, self._take, messages)

    def _outcome(self, node: Node, step: int) -> tuple[int, float]:
        """(How many copies of a push arrive, how much later each), drawn once for all that it consists of."""
        if not self._faulty:
            return 1, 0.0
        plan = self._plan
        delay = plan.delay("push", node.rank, step, self.now)
        copies = 2 if plan.happens("duplicate", node.rank, step, self.now) else 1
        return (0 if plan.happens("lost_push", node.rank, step, self.now) else copies), delay

    def _arrive_later(
        self, node: Node, nbytes: int, delay: float, act: Callable[[Any, Any], None], what: Any = None
    ) -> None:
        """Let `act` happen when `nbytes` that the worker sends now, and that take `delay` longer, are at the server."""
        node.up = arrives = max(self._wires.up(self.now, nbytes) + delay, node.up)
        self._number += 1
        heappush(self._heap, (arrives, self._number, act, node, what))

    def _take(self, node: Node, messages: list[Message]) -> None:
        """Messages are at the server, which deals with them when it is free."""
        kind, server, plain, at = type(messages[0]), self._server, self._plain, self.now
        if not plain:
            at = self._wires.serve(at, self._service_s if kind is PushMessage else 0.0)
        if kind is not Ask:  # those who wait ask again and again while nobody gets on
            self._heard = at
        for message in messages:
            for rank, answer in server.take(message, at):
                if plain and answer.model is not None:
                    self._begin(self._nodes[rank], answer, at + self._latency_s)
                else:
                    self._send(self._nodes[rank], answer, at)
        if kind is Farewell:
            self._finished = server.finished
        if self._on_turn is not None:
            self._on_turn(at)

    def _ask(self, node: Node, _: None) -> None:
        """Ask for a reply, if the worker has been without one for long enough."""
        node.armed = False
        if not node.alive or node.arrived <= self.now:
            return
        if node.sent + self._ask_again_s <= self.now:
            node.sent = self.now
            self._arrive_later(node, MESSAGE_BYTES, 0.0, self._take, [Ask(node.rank, node.machine.step)])
        self._arm(node)

    def _arm(self, node: Node) -> None:
        """Let the worker think of asking when it has sent nothing for long enough."""
        node.armed = True
        self._at(node.sent + self._ask_again_s, self._ask, node)

    # Who comes and goes

    def _happen(self, happening: Happening, _: None) -> None:
        node = self._nodes.get(happening.worker)
        if happening.what == "join":
            if node is None or not node.alive:
                self._join(happening.worker)
        elif node is None:
            return
        elif happening.what == "notice":
            if not node.alive:
                self._leave(node, None)
        elif node.alive:
            node.leaving = happening.what == "leave"
            if happening.what == "crash":
                node.alive = False
            elif node.arrived == inf:
                self._go(node)

    def _join(self, rank: int) -> None:
        """A worker is there, new or again: a fresh process that knows only the number of its last step."""
        server = self._server
        if server.ledger.done or rank in server.ledger.workers:
            return
        before, node = self._nodes.get(rank), Node(rank, self._make(rank), self._durations.of(rank))
        if before is not None:
            node.draw, node.up, node.down = before.draw, before.up, before.down
        self._nodes[rank], node.since, node.sent = node, self.now, self.now
        at = self._wires.serve(self.now, 0.0)
        self._send_all(server.join(rank, at), at)
        node.machine.step = server.ledger.workers[rank].seen
        self._arrive_later(node, MESSAGE_BYTES, 0.0, self._take, [Ask(rank, node.machine.step)])
        self._arm(node)

    def _go(self, node: Node) -> None:
        """The worker takes its leave, behind what it has sent."""
        node.alive = False
        self._arrive_later(node, MESSAGE_BYTES, 0.0, self._leave)

    def _leave(self, node: Node, _: None) -> None:
        """The server learns that a worker is gone."""
        server = self._server
        if node.rank not in server.ledger.workers:
            return
        at = self._wires.serve(self.now, 0.0)
        self._send_all(server.leave(node.rank, at), at)
        self._finished = server.finished
        left = len(server.ledger.workers)
        if left < self._min_workers and not server.ledger.done:
            raise WorkersLost(f"{left} workers are left at {at:g} simulated s, expected at least {self._min_workers}")
