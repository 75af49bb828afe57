"""The server as a machine without I/O: a message in, messages out. No MPI, no clock, no tensor.

It hands a push to its shards, which ask the policy and carry its actions out, and answers the workers released. A
policy that takes whole pushes has one shard. A layerwise policy has one for each bucket, with a copy of the policy and
a ledger of its own, so that every bucket is a push with a version, a clock and a path of its own; what concerns a push
as a whole is counted once (run.py), and its worker goes on when every shard has released it. There a bucket without
arrays says that its worker was cut off before it: to the shard that is an Asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ps_elastic.config.sections import Target
from ps_elastic.errors import LOST, TaskError, WireError, WorkersLost
from ps_elastic.policies.base import Policy
from ps_elastic.policies.events import Asked, Done, Joined, Left, PushId, Told, Woke
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.layers import JoinedModel, Ledgers
from ps_elastic.server.protocols import LedgerView, Model, Store
from ps_elastic.server.replies import make_replies
from ps_elastic.server.run import BucketAssembler, Run
from ps_elastic.server.shard import Outgoing, Shard
from ps_elastic.server.totals import BoundFacts, Totals
from ps_elastic.transport.messages import Ask, Farewell, Message, PushMessage

if TYPE_CHECKING:
    from torch import Tensor


class Server:
    """One run's server. `start`, `receive` and `tick` yield (worker, reply) as soon as each is ready.

    policies, stores: of each shard. joined: the model whose parts the stores hold, if the policy is layerwise.
    alpha: step size after so many samples were used, or all along. budget: samples of used pushes that end the run.
    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the sum of step lengths; "off" neither.
    pipeline: pushes that a worker may leave unanswered while it goes on.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        stores: Sequence[Store],
        workers: int,
        alpha: Callable[[int], float] | float,
        budget: int,
        tracker: Tracker,
        log: Callable[[Told], None] | None = None,
        *,
        joined: JoinedModel | None = None,
        evaluator: Evaluator | None = None,
        discrepancy: str = "exact",
        target: Target | None = None,
        units: str = "gradient",
        pipeline: int = 0,
        measures: BoundFacts | None = None,
    ) -> None:
        assert joined is None or not pipeline, "refused where the configuration is read"
        self.policy, self._joined = policies[0], joined
        self.store: Model = joined or stores[0]
        self.totals, self.measures = Totals(workers, target), measures or BoundFacts(workers)
        self.tracker, self._evaluator = tracker, evaluator
        # Whether results of evaluations come, and whether anything can be due by the clock, while messages do.
        self._evaluates = evaluator is not None and evaluator.due < math.inf
        self._ticks = self._evaluates or any(type(policy).on_wake is not Policy.on_wake for policy in policies)
        self.lost_workers: list[int] = []
        ledgers = [
            Ledger(
                range(1, workers + 1), jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views,
                pipeline=pipeline, log=log, bucket=(i, len(policies)) if joined else None,
            )
            for i, policy in enumerate(policies)
        ]  # fmt: skip
        self.ledger: LedgerView = Ledgers(ledgers) if joined else ledgers[0]
        sizes = [part.numel for part in joined.layout.parts()] if joined else [1]
        self.run = Run(
            ledgers, sizes, self.totals, self.measures, tracker, units, alpha, budget, evaluator, self.store.x
        )
        self.shards: list[Shard] = []
        waits = not (pipeline or stores[0].workers_write)
        self._replies = make_replies(self.run, self.shards, self.ledger, joined, waits=waits)
        self.shards += [
            Shard(self.run, policy, ledger, store, discrepancy, self._replies.release, self.stop)
            for policy, ledger, store in zip(policies, ledgers, stores, strict=True)
        ]
        self._assembler = BucketAssembler()
        self._left_at: dict[int, int] = {}  # worker -> the last step that any of several shards had given it then
        self._waking = False
        self._gone: set[int] = set()  # workers that sent their exit message

    @property
    def finished(self) -> bool:
        """Whether every worker has sent its exit message: nothing more will come."""
        return self.ledger.done and self._gone.issuperset(self.ledger.workers)

    @property
    def x(self) -> Tensor:
        """The model (d,), which is there but in a timing-only simulation."""
        assert self.store.x is not None
        return self.store.x

    @property
    def wake_at(self) -> float | None:
        """When `tick` must be called next for the policy's sake, in seconds."""
        return self.ledger.wake_at

    def start(self, now: float) -> Outgoing:
        """Give version 0 to every worker."""
        for shard in self.shards:
            yield from shard.start(now)
        for worker in self.ledger.workers:
            yield worker, self._replies.reply(worker, 0)

    def receive(self, message: Message, now: float) -> Outgoing:
        """Take one message in. Raises TaskError for a worker that failed, WireError for what cannot be.

        The message is noted at once; the replies are to be taken from what this returns.
        """
        outgoing = self._take(message, now)
        return chain(outgoing, self.tick(now)) if self._ticks else outgoing

    def take(self, message: Message, now: float) -> Outgoing:
        """As `receive`, but leave a Wake that is due to `tick`: more messages may be here at the same time."""
        outgoing = self._take(message, now)
        return chain(outgoing, self._report(now)) if self._evaluates else outgoing

    def _take(self, message: Message, now: float) -> Outgoing:
        if type(message) is not PushMessage:
            return self._take_control(message, now)
        if self._joined is not None:
            return self._take_bucket(message, now)
        if message.buckets == 1:
            return self.shards[0].push((message,), now)
        parts = self._assembler.add(message)
        self.shards[0].store.foresee(message)
        return self.shards[0].push(parts, now) if parts else iter(())

    def _take_control(self, message: Message, now: float) -> Outgoing:
        match message:
            case Ask():
                return self._take_ask(message, now)
            case Farewell(worker, _, text, code):
                if code:
                    raise (WorkersLost if code == LOST else TaskError)(f"rank {worker}: {text}")
                self._gone.add(worker)
                return iter(())
        raise WireError(f"the server got a {type(message).__name__}")

    def _take_bucket(self, message: PushMessage, now: float) -> Outgoing:
        """A bucket is a push to its shard."""
        worker, step, bucket = message.worker, message.step, message.bucket
        if bucket >= len(self.shards):
            raise WireError(f"worker {worker}: got bucket {bucket}, expected one of {len(self.shards)}")
        shard = self.shards[bucket]
        if message.arrays:
            return shard.push((message,), now)
        member = shard.ledger.workers.get(worker)
        is_new = member is not None and member.seen < step
        outgoing = shard.ending(worker, Asked(worker, step), now)
        if is_new:
            self.run.arrived(message, 0)
            self.run.met(PushId(worker, step), used=False)
        return outgoing

    def _take_ask(self, ask: Ask, now: float) -> Outgoing:
        worker, owed = ask.worker, self.run.owed
        new = worker not in owed
        owed.setdefault(worker, ask.step)
        for shard in self.shards:
            yield from shard.ending(worker, Asked(worker, ask.step), now)
        if new and worker not in self.ledger.waiting:
            owed.pop(worker, None)  # the request was stale: no reply is due for it

    def tick(self, now: float) -> Outgoing:
        """Do what is due by the clock: the policy's Wake, and results of evaluations."""
        self._waking = True
        for shard in self.shards:
            if (at := shard.ledger.wake_at) is not None and now >= at:
                yield from shard.event(Woke(), now)
        self._waking = False
        if self.run.over and not self.ledger.done:
            yield from self.stop(now)
        if self._evaluator is not None and self._evaluator.has_begun:
            yield from self._report(now)

    def _report(self, now: float) -> Outgoing:
        for result in self._evaluator.finished() if self._evaluator else ():
            self.tracker.note("evaluated", now, samples=result.samples, version=result.version, **result.metrics)
            if self.totals.note_evaluation(result) and not self.ledger.done:
                yield from self.stop(now)

    def join(self, worker: int, now: float) -> Outgoing:
        """`worker` becomes a member; its Ask follows."""
        self._gone.discard(worker)
        self._assembler.forget(worker)
        self._replies.forget(worker)
        for shard in self.shards:
            outgoing = shard.event(Joined(worker, self._left_at.get(worker, 0)), now)
            self.measures.note_workers(len(self.ledger.workers))
            yield from outgoing

    def leave(self, worker: int, now: float) -> Outgoing:
        """`worker` is gone for good."""
        self.lost_workers.append(worker)
        self._assembler.forget(worker)
        self.run.left(worker)
        if self._joined is not None:
            members = [shard.ledger.workers[worker] for shard in self.shards if worker in shard.ledger.workers]
            self._left_at[worker] = max([member.assigned for member in members], default=0)
        for shard in self.shards:
            outgoing = shard.ending(worker, Left(worker), now)
            if not self.ledger.done:
                self.measures.note_workers(len(self.ledger.workers))
            yield from outgoing

    def stop(self, now: float) -> Outgoing:
        """End the run: pushes kept for later are discarded, and every worker's next reply tells it to stop."""
        if self._waking:  # a round that ends in all shards at once is used in all of them: `tick` stops after it
            return
        self.run.over = True
        for shard in self.shards:
            if self._joined is None or not shard.ledger.done:
                yield from shard.event(Done(), now)
