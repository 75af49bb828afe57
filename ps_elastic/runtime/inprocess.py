"""The server and all workers in one process, taking turns in worker order: the same run every time.

A worker that may run ahead has as many pushes on the way as it may: a push is at the server when its worker cannot go
on without an answer, that is after the turns of its next `pipeline` pushes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from ps_elastic.errors import Stalled
from ps_elastic.server.server import Server
from ps_elastic.transport.messages import Farewell, Message, Reply
from ps_elastic.worker.worker import Worker


def run(server: Server, workers: Mapping[int, Worker], on_turn: Callable[[float], None] = lambda now: None) -> float:
    """Run to the end; return the time. Time is logical: a round of all workers takes one second.

    on_turn: called after each push, with the time.
    """
    now = 0.0
    ready: deque[Worker] = deque()
    inbox: deque[Message] = deque()
    outbox: dict[int, deque[list[Message]]] = {rank: deque() for rank in workers}  # pushes on the way

    def deliver(replies: Iterable[tuple[int, Reply]]) -> None:
        for rank, reply in replies:
            worker = workers[rank]
            going = worker.load(reply)
            worker.note(reply, now, 0.0, 0.0)
            if going:
                ready.append(worker)
            elif outbox[rank]:
                inbox.extend(outbox[rank].popleft())
            else:
                inbox.append(Farewell(rank, worker.step))

    deliver(server.start(now))
    while not server.finished:
        if inbox:
            deliver(server.receive(inbox.popleft(), now))
        elif ready:
            now += 1 / len(workers)
            worker, push = ready.popleft(), list[Message]()
            worker.push(push.append, cut=())  # no computation takes long in logical time
            outbox[worker.rank].append(push)
            if worker.may_go_on:
                ready.append(worker)
            else:
                for message in outbox[worker.rank].popleft():
                    deliver(server.take(message, now))
                deliver(server.tick(now))  # at equal times every bucket of a push comes before a Wake
            on_turn(now)
        elif server.wake_at is not None:
            now = max(now, server.wake_at)
            deliver(server.tick(now))
        else:
            raise Stalled(f"no worker has anything to do at version {server.ledger.version}")
    return now
