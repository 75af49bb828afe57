"""The loops of a run: the server's and a worker's under MPI, and both in turns in one process.

The first two end, or raise, within their deadlines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from ps_elastic.errors import Stalled, WireError, describe, exit_code
from ps_elastic.server.server import Server
from ps_elastic.transport.messages import Ask, Farewell, Message, PushMessage, Reply
from ps_elastic.vectors.norms import quiet
from ps_elastic.worker.worker import Worker

_TICK_S = 0.1  # longest the server waits for a message
_TURN_S = 0.01  # and looks at nothing but its messages while they come
_ABORT_WITHIN_S = 5.0  # rank 0 ends the job within this after a rank failed; then the rank does it itself
_LONGEST_TEXT = 60_000  # bytes of a traceback that travel to rank 0


class Channel(Protocol):
    """One rank's end of the transport."""

    rank: int
    size: int

    def send(self, dest: int, message: Message) -> None:
        """Start sending; the arrays of the message must stay as they are (see messages.py)."""

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its source, or None after `timeout` seconds."""

    def taken(self) -> None:
        """The model of the last reply was read, and may change."""

    def flush(self) -> None:
        """Return when the arrays of everything sent may change."""

    def idle(self) -> bool:
        """Whether everything sent has left."""


@quiet
def serve(
    server: Server,
    endpoint: Channel,
    clock: Callable[[], float],
    *,
    warn: Callable[[str], None],
    warning_s: float,
    deadline_s: float,
    on_turn: Callable[[float], None],
) -> None:
    """Run the server to its end. Raises Stalled, naming who is awaited, when no push arrives for `deadline_s`.

    warn: told once per silence of `warning_s`. on_turn: called with the time, every 0.1 s at least, and not more often
    than every 10 ms while messages come.
    """
    for worker, reply in server.start(clock()):
        endpoint.send(worker, reply)
    heard = turned = clock()
    warned, gone = False, set[int]()
    while not server.finished:
        wake_at = server.wake_at
        received = endpoint.recv(_TICK_S if wake_at is None else min(_TICK_S, max(0.0, wake_at - clock())))
        now = clock()
        if received is None:
            outgoing = server.tick(now)
        else:
            if not isinstance(received[1], Ask):  # those who wait ask again and again while nobody gets on
                heard, warned = now, False
            if isinstance(received[1], Farewell):
                gone.add(received[0])
            outgoing = server.receive(received[1], now)
        for worker, reply in outgoing:
            endpoint.send(worker, reply)
        if received is not None and now < turned + _TURN_S:
            continue
        turned = now
        on_turn(now)
        if now - heard > deadline_s:
            raise Stalled(f"no push for {now - heard:.0f} s; {awaited(server, gone)}")
        if now - heard > warning_s and not warned:
            warned = True
            warn(f"no push for {now - heard:.0f} s; {awaited(server, gone)}")


def awaited(server: Server, gone: Collection[int] = ()) -> str:
    """Who computes and who waits, in words; `gone` do neither."""
    ledger = server.ledger
    computing = [w for w in ledger.workers if w not in ledger.waiting and w not in gone]
    return f"awaited: workers {computing}; waiting: {list(ledger.waiting)}; version {ledger.version}"


def work(
    worker: Worker, endpoint: Channel, clock: Callable[[], float], *, ask_again_s: float, deadline_s: float
) -> None:
    """Run a worker to its end. Raises Stalled when the server does not answer for `deadline_s`.

    It waits for a reply only where it may not continue without, and at the end, for those to all it has sent.
    """
    send_s, going = 0.0, True

    def send(message: PushMessage) -> None:
        nonlocal send_s
        started = clock()
        endpoint.send(0, message)
        send_s += clock() - started

    while going or worker.unanswered:
        began = clock()
        if going and worker.may_go_on:
            reply = _reply_here(worker, endpoint)
        else:
            reply = _await_reply(worker, endpoint, clock, ask_again_s, deadline_s)
        if reply is not None:
            going = worker.load(reply) and going
            endpoint.taken()
            now = clock()
            worker.note(reply, now, send_s, now - began)
            continue
        send_s = 0.0
        worker.push(send)
    endpoint.send(0, Farewell(worker.rank, worker.step))
    endpoint.flush()


def _reply_here(worker: Worker, endpoint: Channel) -> Reply | None:
    """A reply that has come already, for a worker that may continue without it: any other has none to expect."""
    while worker.pipeline and (received := endpoint.recv(0)) is not None:
        if (reply := _new_reply(worker, received[1])) is not None:
            return reply
    return None


def _new_reply(worker: Worker, message: Message) -> Reply | None:
    """`message`, unless it is a second copy of an earlier reply. Raises WireError where it is none."""
    if not isinstance(message, Reply):
        raise WireError(f"worker {worker.rank} got a {type(message).__name__}")
    return message if worker.told < message.step <= worker.step else None


def _await_reply(
    worker: Worker, endpoint: Channel, clock: Callable[[], float], ask_again_s: float, deadline_s: float
) -> Reply:
    started = asked = clock()
    while True:
        received = endpoint.recv(min(1.0, ask_again_s))
        if received is not None:
            if (reply := _new_reply(worker, received[1])) is not None:
                return reply
            continue
        now = clock()
        if now - started > deadline_s:
            raise Stalled(f"worker {worker.rank}: no reply from the server for {now - started:.0f} s")
        if now - asked > ask_again_s and endpoint.idle():  # an Ask that overtook its push would make it a lost one
            asked = now
            endpoint.send(0, Ask(worker.rank, worker.step))


def tell_server(endpoint: Channel, rank: int, error: BaseException) -> None:
    """Leave it to rank 0 to tell the user of a worker's error and to end the job; return if it does not."""
    text = describe(error).encode()[-_LONGEST_TEXT:].decode(errors="ignore")
    endpoint.send(0, Farewell(rank, 0, text, exit_code(error)))
    deadline = time.monotonic() + _ABORT_WITHIN_S
    while time.monotonic() < deadline:
        endpoint.recv(0.2)


def take_turns(
    server: Server, workers: Mapping[int, Worker], on_turn: Callable[[float], None] = lambda now: None
) -> float:
    """Run to the end; return the time. Time is logical: a round of all workers takes one second.

    on_turn: called after each push, with the time.

    The workers take turns in their order: the same run every time. With `update.pipeline` a worker has all pushes on
    the way that it may: a push is at the server when its worker cannot continue without a reply, after the turns
    of its next `pipeline` pushes.
    """
    now = 0.0
    ready: deque[Worker] = deque()
    inbox: deque[Message] = deque()
    send_buffer: dict[int, deque[list[Message]]] = {rank: deque() for rank in workers}  # pushes on the way

    @quiet
    def deliver(replies: Iterable[tuple[int, Reply]]) -> None:
        for rank, reply in replies:
            worker = workers[rank]
            going = worker.load(reply)
            worker.note(reply, now, 0.0, 0.0)
            if going:
                ready.append(worker)
            elif send_buffer[rank]:
                inbox.extend(send_buffer[rank].popleft())
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
            send_buffer[worker.rank].append(push)
            if worker.may_go_on:
                ready.append(worker)
            else:
                for message in send_buffer[worker.rank].popleft():
                    deliver(server.take(message, now))
                deliver(server.tick(now))  # at equal times every bucket of a push comes before a Wake
            on_turn(now)
        elif server.wake_at is not None:
            now = max(now, server.wake_at)
            deliver(server.tick(now))
        else:
            raise Stalled(f"no worker has anything to do at version {server.ledger.version}")
    return now
