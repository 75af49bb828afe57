"""The server as a machine without I/O: a message in, messages out. No MPI, no clock, no tensor.

It gathers the buckets of a push, hands the push to the shard, which asks the rule and carries its actions out, and
answers the workers that are let go. It counts what the run uses, and ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from ps_elastic.config.sections import Target
from ps_elastic.errors import LOST, TaskError, WireError, WorkersLost
from ps_elastic.policies.base import Policy
from ps_elastic.policies.events import Asked, Done, Joined, Left, Push, PushId, Woke
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.protocols import Store
from ps_elastic.server.shard import Outcome, Outgoing, Shard
from ps_elastic.server.totals import BoundFacts, Totals
from ps_elastic.transport.messages import Ask, Farewell, Message, PushMessage, Reply, Settled


class Answer(NamedTuple):
    """What a worker was last told, in case it asks again."""

    step: int
    outcome: Outcome
    settled: tuple[Settled, ...]
    alpha: float


class Server:
    """One run's server. `start`, `receive` and `tick` yield (worker, reply) as soon as each is ready.

    alpha: step size after so many samples were used. budget: samples of used pushes that end the run.
    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the path length instead; "off" neither.
    pipeline: pushes that a worker may leave unanswered while it goes on.
    """

    _totals = Totals

    def __init__(
        self,
        policy: Policy,
        workers: int,
        store: Store,
        alpha: Callable[[int], float],
        budget: int,
        tracker: Tracker,
        log: Callable[[str], None] | None = None,
        evaluator: Evaluator | None = None,
        discrepancy: str = "exact",
        target: Target | None = None,
        units: str = "gradient",
        bucket: tuple[int, int] | None = None,
        pipeline: int = 0,
    ) -> None:
        self.policy, self.store = policy, store
        self.totals, self.measures = self._totals(workers, target), BoundFacts(workers)
        self.tracker, self.units, self._needs_views = tracker, units, discrepancy == "exact"
        self.lost_workers: list[int] = []
        self.owed: dict[int, int] = {}  # worker -> the step that its next reply answers
        self._alpha, self._budget, self._evaluator = alpha, budget, evaluator
        self._alpha_last = -1, 0.0
        self._shard = Shard(self, policy, workers, store, log, discrepancy, bucket, pipeline)
        self.ledger = self._shard.ledger
        self._gathering = BucketAssembler()
        self._borrowed: dict[int, PushId] = {}  # worker -> push whose payload lies in the transport's memory
        self._answers: dict[int, Answer] = {}
        self._gone: set[int] = set()  # workers that said farewell

    @property
    def finished(self) -> bool:
        """Whether every worker has said farewell: nothing more will come."""
        return self.ledger.done and self._gone.issuperset(self.ledger.workers)

    @property
    def over(self) -> bool:
        """Whether the run has all it wants: every reply from now on says stop."""
        return self.ledger.done or self.totals.samples >= self._budget

    @property
    def wake_at(self) -> float | None:
        """When `tick` must be called next for the rule's sake, in seconds."""
        return self.ledger.wake_at

    def start(self, now: float) -> Outgoing:
        """Give version 0 to every worker."""
        yield from self._shard.start(now)
        for worker in self.ledger.workers:
            yield worker, self._reply(worker, 0)

    def receive(self, message: Message, now: float) -> Outgoing:
        """Take one message in. Raises TaskError for a worker that failed, WireError for what cannot be."""
        return chain(self._take(message, now), self.tick(now))

    def take(self, message: Message, now: float) -> Outgoing:
        """As `receive`, but leave a Wake that is due to `tick`: more messages may be here at the same time."""
        outgoing = self._take(message, now)
        return chain(outgoing, self._report(now)) if self._evaluator else outgoing

    def _take(self, message: Message, now: float) -> Outgoing:
        """Note the message at once; the replies are to be taken from what this returns."""
        if isinstance(message, PushMessage):
            parts = self._gathering.add(message)
            if message.buckets > 1:
                self.store.foresee(message)
            return self._shard.push(header(parts, self.units), parts, now) if parts else iter(())
        match message:
            case Ask():
                return self._take_ask(message, now)
            case Farewell(worker, _, text, code):
                if code:
                    raise (WorkersLost if code == LOST else TaskError)(f"rank {worker}: {text}")
                self._gone.add(worker)
                return iter(())
        raise WireError(f"the server got a {type(message).__name__}")

    def _take_ask(self, ask: Ask, now: float) -> Outgoing:
        worker = ask.worker
        new = worker not in self.owed
        self.owed.setdefault(worker, ask.step)
        yield from self._shard.ending(worker, Asked(worker, ask.step), now)
        if new and worker not in self.ledger.waiting:
            self.owed.pop(worker, None)  # the ask was stale: no reply is due for it

    def tick(self, now: float) -> Outgoing:
        """Do what is due by the clock: the rule's Wake, and results of evaluations."""
        wake_at = self.ledger.wake_at
        if wake_at is not None and now >= wake_at:
            yield from self._shard.event(Woke(), now)
        yield from self._report(now)

    def _report(self, now: float) -> Outgoing:
        for result in self._evaluator.finished() if self._evaluator else ():
            self.tracker.note("evaluated", now, samples=result.samples, version=result.version, **result.metrics)
            if self.totals.note_evaluation(result) and not self.ledger.done:
                yield from self.stop(now)

    def join(self, worker: int, now: float) -> Outgoing:
        """`worker` becomes a member; its Ask follows."""
        self._gone.discard(worker)
        self._gathering.forget(worker)
        self._answers.pop(worker, None)  # of its earlier life
        outgoing = self._shard.event(Joined(worker), now)
        self.measures.note_workers(len(self.ledger.workers))
        yield from outgoing

    def leave(self, worker: int, now: float) -> Outgoing:
        """`worker` is gone for good."""
        self.lost_workers.append(worker)
        self.owed.pop(worker, None)
        self._gathering.forget(worker)
        self._shard.forget(worker)
        outgoing = self._shard.ending(worker, Left(worker), now)
        if not self.ledger.done:
            self.measures.note_workers(len(self.ledger.workers))
        yield from outgoing

    def stop(self, now: float) -> Outgoing:
        """End the run: held pushes are dropped, and every worker's next reply tells it to stop."""
        return self._shard.event(Done(), now)

    # What the shard asks for.

    def alpha(self) -> float:
        """The step size after the samples used so far, worked out once for each number of them."""
        samples, alpha = self._alpha_last
        if samples != self.totals.samples:
            alpha = self._alpha(self.totals.samples)
            self._alpha_last = self.totals.samples, alpha
        return alpha

    def arrived(self, push: Push, head: PushMessage) -> None:
        """A push is held: it lies in the transport's memory until its worker is answered."""
        worker = head.worker
        self._borrowed[worker], self.owed[worker] = push.id, head.step
        self.totals.note_push(push, head.samples, head.loss, len(self.ledger.held), head.waited_s)
        if self._evaluator and head.statistics is not None:
            self._evaluator.statistics[worker] = head.statistics.copy()

    def stepped(self, version: int, now: float) -> None:
        """The model is `version` now: it may be time to evaluate it."""
        if self._evaluator:
            assert self.store.x is not None
            self._evaluator.submit(self.store.x, self.totals.samples, version, now)

    def use(self, push: PushId, samples: int, shard: Shard) -> None:
        """A push is used, for the first time."""
        self.totals.samples += samples

    def drop(self, push: PushId) -> None:
        """A push is dropped."""
        self.totals.dropped += 1

    def release(self, worker: int, shard: Shard) -> Reply | None:
        """The rule lets a worker go: its reply, if one is due; else what it is given is kept until it is."""
        if (step := self.owed.pop(worker, None)) is not None:
            return self._reply(worker, self.ledger.told(worker)[0] if self.ledger.pipeline else step)
        if not self.over:
            shard.queue(worker)
        return None

    def _reply(self, worker: int, step: int) -> Reply:
        """The answer to `step` of `worker`, whose push may be overwritten once this has been sent."""
        if (borrowed := self._borrowed.pop(worker, None)) is not None and self._is_needed(borrowed):
            self.store.keep(borrowed)
        last = self._answers.get(worker)
        if last is None or last.step != step:
            outcome, settled = self._shard.told(worker)
            last = self._answers[worker] = Answer(step, outcome, settled, self.alpha())
        _, (what, discrepancy, weight), settled, alpha = last
        version, model, rate = self.ledger.version, None, 0.0
        if not self.over:
            version, model = self._shard.give(worker)
            rate = self._shard.rate(worker)
            self.totals.bytes_down += model.nbytes
        return Reply(worker, step, version, model, what, discrepancy, alpha, weight, settled, rate=rate)

    def _is_needed(self, push: PushId) -> bool:
        """Whether the payload of `push` will be read again: one kept for views alone only where these are measured."""
        return self._needs_views or not self.ledger.pipeline or push in self.ledger.held


def header(parts: list[PushMessage], units: str) -> Push:
    """What the rule sees of a push."""
    head, nbytes = parts[0], 0
    for part in parts:
        for array in part.arrays:
            nbytes += array.nbytes
    return Push(
        PushId(head.worker, head.step), head.base, head.norm, head.payload_norm, head.residual_norm, nbytes, units,
        head.ahead,
    )  # fmt: skip


class BucketAssembler:
    """The buckets that are here of pushes that are not: each bucket has a channel of its own, and any may be first."""

    def __init__(self) -> None:
        self._parts: dict[PushId, dict[int, PushMessage]] = {}

    def add(self, message: PushMessage) -> list[PushMessage]:
        """All buckets of the push in their order, the first with its numbers, if this one was lacking; else none.

        Raises WireError for a bucket that cannot be.
        """
        if message.buckets == 1:
            return [message]
        push = PushId(message.worker, message.step)
        parts = self._parts.setdefault(push, {})
        if message.bucket >= message.buckets or message.bucket in parts:
            raise WireError(
                f"worker {push.worker}, step {push.step}: got bucket {message.bucket} of {message.buckets}, "
                f"expected one that is not in {sorted(parts)}"
            )
        parts[message.bucket] = message
        if len(parts) < message.buckets:
            return []
        del self._parts[push]
        return [part for _, part in sorted(parts.items())]

    def forget(self, worker: int) -> None:
        """Nothing more will come of `worker`."""
        for push in [push for push in self._parts if push.worker == worker]:
            del self._parts[push]
