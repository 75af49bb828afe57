"""The server of a layerwise rule: a copy of the rule and a ledger, a shard, for each bucket.

Every bucket is a push of its own to its shard, which has its own version, clock and path. What concerns a push as a
whole is counted once: it is here when all its buckets are, each part of a bucket used is worth its share of the
samples by the number of its parameters, and the push is used if anything of it was. Its worker goes on when every shard
has released it. A bucket without arrays says that its worker was cut off before it: to the shard that is an Asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ps_elastic.config.sections import Target
from ps_elastic.errors import WireError
from ps_elastic.policies.base import Policy
from ps_elastic.policies.events import Asked, Done, Joined, Left, Push, PushId, Woke
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.discrepancy import Use
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.layerwise_store import LayerwiseStore
from ps_elastic.server.server import Server, header
from ps_elastic.server.shard import HELD, Outcome, Outgoing, Shard
from ps_elastic.server.totals import Totals
from ps_elastic.transport.messages import MOST_SETTLED, Ask, Farewell, Layer, Message, PushMessage, Reply, Settled


class LayerTotals(Totals):
    """`used` counts whole pushes, and the server does it; staleness and discrepancy are of buckets."""

    def note_used(self, use: Use) -> None:
        used = self.used
        super().note_used(use)
        self.used = used


class Ledgers:
    """The ledgers of all shards as one, for those who look at the run from outside."""

    pipeline = 0  # a push is answered when every layer is released: nobody runs ahead

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._ledgers = [shard.ledger for shard in shards]
        self.workers = self._ledgers[0].workers

    @property
    def waiting(self) -> dict[int, None]:
        """Workers of whom some bucket is here, and not released."""
        return {worker: None for worker in self.workers if any(worker in one.waiting for one in self._ledgers)}

    @property
    def version(self) -> int:
        """Of the bucket that has most."""
        return max(one.version for one in self._ledgers)

    @property
    def done(self) -> bool:
        return any(one.done for one in self._ledgers)

    @property
    def wake_at(self) -> float | None:
        return min((one.wake_at for one in self._ledgers if one.wake_at is not None), default=None)

    @property
    def held(self) -> int:
        """How many pushes the bucket that holds most holds."""
        return max(len(one.held) for one in self._ledgers)


class Gathered:
    """A push of which some buckets are here, or cut off: `count` of them, with `nbytes` in all, `last` the last."""

    __slots__ = ("count", "here", "last", "nbytes", "step")

    def __init__(self, message: PushMessage) -> None:
        self.step, self.last, self.count, self.nbytes = message.step, message, 0, 0
        self.here: list[int] = []  # buckets whose payload lies in the transport's memory


class LayerwiseServer(Server):
    """As `Server`; `policies` are copies of one rule, one for each bucket."""

    _totals = LayerTotals

    def __init__(
        self,
        policies: Sequence[Policy],
        workers: int,
        store: LayerwiseStore,
        alpha: Callable[[int], float],
        budget: int,
        tracker: Tracker,
        log: Callable[[str], None] | None = None,
        evaluator: Evaluator | None = None,
        discrepancy: str = "exact",
        target: Target | None = None,
        units: str = "gradient",
        pipeline: int = 0,
    ) -> None:
        assert not pipeline, "refused where the configuration is read"
        count = len(policies)
        super().__init__(
            policies[0], workers, store.parts[0], alpha, budget, tracker, log, evaluator, discrepancy, target,
            units, (0, count),
        )  # fmt: skip
        rest = zip(policies[1:], store.parts[1:], strict=True)
        others = [
            Shard(self, policy, workers, part, log, discrepancy, (i, count)) for i, (policy, part) in enumerate(rest, 1)
        ]
        self._shards = [self._shard, *others]
        self._slices = self.store = store  # type: ignore[assignment]
        self._ledgers = self.ledger = Ledgers(self._shards)  # type: ignore[assignment]
        sizes = [part.numel for part in store.layout.parts()]
        self._sizes, self._size = dict(zip(self._shards, sizes, strict=True)), sum(sizes)
        self._used = 0  # samples x parameters
        self._waking = False
        self._left_at: dict[int, int] = {}  # worker -> the last step that any shard had given it when it left
        self._gathered: dict[int, Gathered] = {}  # worker -> its push that is not answered yet
        self._met: dict[PushId, list[bool]] = {}  # push -> of its buckets that met their outcome, which were used
        self._told: dict[int, tuple[int, float, list[Outcome], tuple[Settled, ...]]] = {}  # worker -> its last answer

    def start(self, now: float) -> Outgoing:
        for shard in self._shards:
            yield from shard.start(now)
        for worker in self.ledger.workers:
            yield worker, self._reply(worker, 0)

    def _take(self, message: Message, now: float) -> Outgoing:
        match message:
            case PushMessage():
                return self._take_bucket(message, now)
            case Ask(worker, step):
                return self._take_ask(Ask(worker, step), now)
            case Farewell():
                return super()._take(message, now)
        raise WireError(f"the server got a {type(message).__name__}")

    def _take_bucket(self, message: PushMessage, now: float) -> Outgoing:
        worker, step, bucket = message.worker, message.step, message.bucket
        if bucket >= len(self._shards):
            raise WireError(f"worker {worker}: got bucket {bucket}, expected one of {len(self._shards)}")
        shard = self._shards[bucket]
        if message.arrays:
            return shard.push(header([message], self.units), [message], now)
        member = shard.ledger.workers.get(worker)
        is_new = member is not None and member.seen < step
        outgoing = shard.ending(worker, Asked(worker, step), now)
        if is_new:
            self._gather(message, 0)
            self._meet(PushId(worker, step), used=False)
        return outgoing

    def _take_ask(self, ask: Ask, now: float) -> Outgoing:
        worker = ask.worker
        new = worker not in self.owed
        self.owed.setdefault(worker, ask.step)
        for shard in self._shards:
            yield from shard.ending(worker, Asked(worker, ask.step), now)
        if new and worker not in self.ledger.waiting:
            self.owed.pop(worker, None)

    def tick(self, now: float) -> Outgoing:
        self._waking = True
        for shard in self._shards:
            if (at := shard.ledger.wake_at) is not None and now >= at:
                yield from shard.event(Woke(), now)
        self._waking = False
        if self.over and not self.ledger.done:
            yield from self.stop(now)
        yield from self._report(now)

    def join(self, worker: int, now: float) -> Outgoing:
        self._gone.discard(worker)
        self._told.pop(worker, None)  # of its earlier life
        step = self._left_at.get(worker, 0)
        for shard in self._shards:
            yield from shard.event(Joined(worker, step), now)
        self.measures.note_workers(len(self.ledger.workers))

    def leave(self, worker: int, now: float) -> Outgoing:
        self.lost_workers.append(worker)
        if (torn := self._gathered.get(worker)) is not None:
            for shard in self._shards:
                if shard.ledger.workers[worker].seen < torn.step:  # this bucket will not come
                    self._gather(torn.last, 0)
                    self._meet(PushId(worker, torn.step), used=False)
            del self._gathered[worker]
        self.owed.pop(worker, None)
        members = [shard.ledger.workers[worker] for shard in self._shards if worker in shard.ledger.workers]
        self._left_at[worker] = max([member.assigned for member in members], default=0)
        for shard in self._shards:
            shard.forget(worker)
            yield from shard.ending(worker, Left(worker), now)
        if not self.ledger.done:
            self.measures.note_workers(len(self.ledger.workers))

    def stop(self, now: float) -> Outgoing:
        if self._waking:  # a round that ends in all shards at once is used in all of them: `tick` stops after it
            return
        for shard in self._shards:
            if not shard.ledger.done:
                yield from shard.event(Done(), now)

    # What the shards ask for.

    def arrived(self, push: Push, last: PushMessage) -> None:
        self._gather(last, push.nbytes).here.append(last.bucket)

    def stepped(self, version: int, now: float) -> None:
        super().stepped(self.ledger.version + 1, now)  # its Applied is not noted yet

    def use(self, push: PushId, samples: int, shard: Shard) -> None:
        self._used += samples * self._sizes[shard]
        self.totals.samples = self._used // self._size
        self._meet(push, used=True)

    def drop(self, push: PushId) -> None:
        self._meet(push, used=False)

    def release(self, worker: int, shard: Shard) -> Reply | None:
        """A shard lets a worker go: its slice of the model is kept until all have, and then goes with the reply."""
        if not self.over:
            shard.give(worker)
        step = self.owed.get(worker)
        if step is None or any(one.ledger.workers[worker].assigned <= step for one in self._shards):
            return None
        del self.owed[worker]
        return self._reply(worker, step)

    def _gather(self, message: PushMessage, nbytes: int) -> Gathered:
        """A bucket is here, or cut off; the last of its push makes it one push more."""
        worker, step = message.worker, message.step
        gathered = self._gathered.get(worker)
        if gathered is None or gathered.step != step:
            gathered = self._gathered[worker] = Gathered(message)
        self.owed[worker] = step
        if self._evaluator and message.statistics is not None:
            self._evaluator.statistics[worker] = message.statistics.copy()
        gathered.count, gathered.nbytes = gathered.count + 1, gathered.nbytes + nbytes
        if gathered.count == len(self._shards):
            whole = Push(PushId(worker, step), message.base, nbytes=gathered.nbytes)
            self.totals.note_push(whole, message.samples, message.loss, self._ledgers.held, message.waited_s)
        return gathered

    def _meet(self, push: PushId, *, used: bool) -> None:
        """A bucket of `push` met its end; the last of them is that of the push."""
        met = self._met.setdefault(push, [])
        met.append(used)
        if len(met) == len(self._shards):
            del self._met[push]
            self.totals.used += any(met)
            self.totals.dropped += not any(met)

    def _reply(self, worker: int, step: int) -> Reply:
        if (gathered := self._gathered.pop(worker, None)) is not None:
            for bucket in gathered.here:
                self._shards[bucket].store.keep(PushId(worker, gathered.step))
        last = self._told.get(worker)
        if last is None or last[0] != step:
            last = self._told[worker] = step, self.alpha(), *self._outcomes(worker)
        versions, model = [shard.ledger.version for shard in self._shards], None
        if not self.over:
            given = [shard.give(worker) for shard in self._shards]
            versions = [version for version, _ in given]
            model = self._slices.join([part for _, part in given])
            self.totals.bytes_down += model.nbytes
        _, alpha, outcomes, settled = last
        layers = tuple(Layer(v, outcome.what, outcome.weight) for v, outcome in zip(versions, outcomes, strict=True))
        return Reply(
            worker, step, min(versions), model, _outcome(outcomes), _distance(outcomes), alpha, 0.0, settled, layers
        )

    def _outcomes(self, worker: int) -> tuple[list[Outcome], tuple[Settled, ...]]:
        outcomes, told = [], list[Settled]()
        for shard in self._shards:
            outcome, settled = shard.told(worker, MOST_SETTLED - len(told))
            outcomes.append(outcome)
            told += settled
        return outcomes, tuple(told)


def _outcome(outcomes: Sequence[Outcome]) -> str:
    """Of a push: used if anything of it was, held if nothing of it has met its end."""
    kinds = {outcome.what for outcome in outcomes}
    return next((name for name in ("used", "dropped") if name in kinds), HELD.what)


def _distance(outcomes: Sequence[Outcome]) -> float:
    """||x - v|| over the buckets that were used."""
    known: Iterator[float] = (outcome.discrepancy for outcome in outcomes if outcome.what == "used")
    distances = list(known)
    return math.hypot(*distances) if distances else math.nan
