"""A tiny world around `decide`: workers that push and ask, a network that may lose things, and the model of the law.

A push here is its header; the world answers each Step and Measure with numbers that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ps_elastic.policies import Policy
from ps_elastic.policies.base import load_state, save_state
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import (
    Action,
    Applied,
    Asked,
    Done,
    Drop,
    Event,
    Joined,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
    Wake,
    Woke,
)
from ps_elastic.policies.ledger import Ledger
from tests.law.model import Model
from tests.law.story import as_lines


class Node(NamedTuple):
    """A worker as it knows itself: its last finished step, and what it computes, if anything."""

    done: int
    step: int | None  # None: it waits for a reply
    base: int
    left: int  # pushes that it may still make
    stopped: bool = False
    told: int = 0  # of a worker that runs ahead: the last of its steps that a reply answered, as it knows; -1: none yet


class Mail(NamedTuple):
    """A reply on its way to a worker that runs ahead."""

    told: int
    version: int
    stop: bool


class Move(NamedTuple):
    """Something that may happen next. `fault`: only where the schedule allows for one."""

    kind: str
    worker: int = 0
    fault: bool = False


class World:
    """The rule, the ledger, the model, and the workers. `do` one of `moves` after the other, then `drain`."""

    def __init__(
        self,
        policy: Policy,
        workers: int,
        pushes: int,
        number: Callable[[], float] = lambda: 1.0,
        log: Callable[[str], None] | None = None,
        pipeline: int = 0,
    ) -> None:
        everybody = range(1, workers + 1)
        self.policy, self.number, self.pipeline = policy, number, pipeline
        self.ledger = Ledger(
            everybody, jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views,
            log=as_lines(log), pipeline=pipeline, bucket=(1, 3) if policy.layerwise else None,
        )  # fmt: skip
        self.model = Model(everybody, policy.jobs, policy.keeps_last, policy.own_views, pipeline)
        self.nodes = {worker: Node(0, 1, 0, pushes) for worker in everybody}
        self.absent = {workers + 1: pushes}  # who may join, and with how many pushes
        self.flying: dict[int, Push] = {}  # last push of each worker; it may arrive again, or after its sender left
        self.mail: dict[int, tuple[Mail, ...]] = dict.fromkeys(everybody, ())
        self.now = 0.0
        self.feed(Applied(0, alpha=0.1))

    def moves(self) -> list[Move]:
        """All that may happen next, in a fixed order."""
        found = []
        for worker, node in self.nodes.items():
            if node.stopped:
                continue
            if self.pipeline:
                found += self._moves_ahead(worker, node)
            elif node.step is not None:
                if node.left:
                    found += [Move("push", worker), Move("lose push", worker, True)]
                found += [Move("lose reply", worker, True), Move("ask late", worker, True)]
            else:
                known = worker in self.model.unanswered
                found.append(Move("ask", worker, fault=known))
            found.append(Move("leave", worker, True))
        found += [Move("repeat", worker, fault=worker in self.nodes) for worker in self.flying]
        found += [Move("join", worker, True) for worker in self.absent]
        if self.ledger.wake_at is not None:
            found += [Move("wake"), Move("wake early", fault=True)]
        return found

    def _moves_ahead(self, worker: int, node: Node) -> Iterator[Move]:
        """Of a worker that runs ahead, whose pushes arrive at once and whose replies take their time."""
        if node.step is not None and node.left:
            yield Move("push", worker)
        if self.mail[worker]:
            yield Move("read", worker)
        yield Move("ask late", worker, True) if self.model.given[worker] else Move("ask", worker)

    @property
    def over(self) -> bool:
        """Whether everybody was told that the run has ended."""
        return self.model.done and all(node.stopped for node in self.nodes.values())

    def do(self, move: Move) -> None:
        """Let it happen. Raises AssertionError where a law does not hold."""
        worker = move.worker
        match move.kind:
            case "push":
                self.feed(self._push(worker))
            case "lose push":
                self._push(worker)
            case "lose reply":
                self.nodes[worker] = self.nodes[worker]._replace(step=None)
            case "ask" | "ask late":
                self.feed(Asked(worker, self.nodes[worker].done))
            case "read":
                self._read(worker)
            case "repeat":
                push = self.flying[worker] if worker in self.nodes else self.flying.pop(worker)
                self.feed(push)
            case "leave":
                node = self.nodes.pop(worker)
                self.mail[worker] = ()
                self.absent[worker] = node.left
                if node.step is not None and node.left:
                    self.flying[worker] = self._header(worker, node)
                self.feed(Left(worker))
            case "join":
                self.nodes[worker], self.mail[worker] = Node(0, None, 0, self.absent.pop(worker), told=-1), ()
                self.feed(Joined(worker))
            case "wake":
                self.now = max(self.now, self.ledger.wake_at or 0.0)
                self.feed(Woke())
            case "wake early":
                self.feed(Woke())
            case "done":
                self.feed(Done())

    def forget_faults(self) -> None:
        """No fault will happen any more: what only a fault needs is no part of the world."""
        self.absent.clear()
        self.flying = {worker: push for worker, push in self.flying.items() if worker not in self.nodes}

    def drain(self) -> None:
        """End the run, and see that everybody is let go and every payload freed."""
        if not self.model.done:
            self.feed(Done())
        for worker in tuple(self.nodes):
            while self.mail[worker]:
                self._read(worker)
            node = self.nodes[worker]
            if not node.stopped:
                self.feed(Asked(worker, node.done) if node.step is None else self._push(worker))
            while self.mail[worker]:
                self._read(worker)
            assert self.nodes[worker].stopped, f"worker {worker} is never told that the run is over"
        assert not self.model.held, "invariant 1: pushes neither used nor dropped"
        for worker in tuple(self.nodes):
            self.feed(Left(worker))
        assert not self.model.alive, f"payloads never freed: {self.model.alive}"

    def reload(self) -> None:
        """Go on with a new rule that was given the state of the old one, through JSON."""
        saved = json.dumps(save_state(self.policy))
        init = {name: getattr(self.policy, name) for name in self.policy.__match_args__}  # type: ignore[attr-defined]
        self.policy = type(self.policy)(**init)
        load_state(self.policy, json.loads(saved))

    def feed(self, event: Event) -> None:
        may_act = self._note(event)
        for action, freed in decide(self.policy, self.ledger, event, self.now):
            assert may_act or action is None, f"{event} is to be ignored, but the answer is {action}"
            if action is not None:
                self._carry_out(action)
            self.model.freed(freed)
            self.model.check_between(self.ledger)
        self.model.check(self.ledger)
        self.model.closed.clear()

    def _note(self, event: Event) -> bool:
        match event:
            case Applied():
                return self.model.start()
            case Push():
                return self.model.push(event)
            case Asked(worker, step):
                return self.model.asked(worker, step)
            case Joined(worker):
                return self.model.joined(worker)
            case Left(worker):
                return self.model.left(worker)
            case Woke():
                return self.model.woke(self.now)
            case Done():
                return self.model.finish()
        raise TypeError(event)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Step():
                assert not (self.policy.lockstep and self.ledger.computing), "a Step while a worker computes"
                self.model.step(action)
                moved = self.number()
                self.model.applied(self.model.version + 1, moved)
                self._answer(Applied(self.model.version, moved, alpha=0.1))
            case Drop():
                self.model.drop(action)
            case Release(workers, own):
                self._reply(workers, own)
            case Wake(at):
                self.model.wake = at
            case Measure(pushes):
                for push in pushes:
                    distance = (self.ledger.travelled - self.ledger.views[push].travelled) / 2
                    self.model.measured(push, distance)
                    self._answer(Measured(push, distance))

    def _answer(self, answer: Applied | Measured) -> None:
        assert list(decide(self.policy, self.ledger, answer, self.now)) == []

    def _reply(self, workers: Iterable[int], own: float) -> None:
        for worker in workers:
            job = self.model.release(worker, own)
            if job is None:
                continue
            node = self.nodes[worker]
            if self.pipeline:
                told = self.model.given[worker][-1]
                self.mail[worker] += (Mail(told.told, told.version, self.model.done),)
                continue
            if node.step is not None:  # a second copy of the reply: the worker ignores it
                assert (node.step, node.base) == (job.id.step, job.version)
            else:
                node = node._replace(step=job.id.step, base=job.version)
            self.nodes[worker] = node._replace(stopped=self.model.done)

    def _read(self, worker: int) -> None:
        """A worker that runs ahead takes a reply in; a second copy tells it nothing."""
        reply, *rest = self.mail[worker]
        self.mail[worker] = tuple(rest)
        node = self.nodes[worker]
        if reply.told > node.told:
            done = max(node.done, reply.told)  # one that came back learns where it stood
            step = done + 1 if done - reply.told <= self.pipeline else None
            node = node._replace(done=done, step=step, base=reply.version, told=reply.told)
        self.nodes[worker] = node._replace(stopped=reply.stop)

    def _push(self, worker: int) -> Push:
        node = self.nodes[worker]
        push = self.flying[worker] = self._header(worker, node)
        if self.pipeline:
            step = push.id.step + 1 if push.id.step - node.told <= self.pipeline else None
            self.nodes[worker] = node._replace(done=push.id.step, step=step, left=node.left - 1)
            return push
        self.nodes[worker] = node._replace(done=push.id.step, step=None, left=node.left - 1)
        return push

    def _header(self, worker: int, node: Node) -> Push:
        norm, step = self.number(), node.step or 0
        ahead = step - 1 - node.told if self.pipeline else 0
        return Push(PushId(worker, step), node.base, norm, payload_norm=norm, nbytes=8, ahead=ahead)
