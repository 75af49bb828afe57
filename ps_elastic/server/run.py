"""What the shards of a run have in common, and what is counted of pushes as a whole, however many parts they have.

Where each part of the model has a shard, a push is here when all its parts are, each part used is worth its fraction of
the samples by the number of its parameters, and the push is used if anything of it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ps_elastic.errors import WireError
from ps_elastic.policies.events import Applied, Push, PushId
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.protocols import Store
from ps_elastic.server.totals import BoundFacts, Totals
from ps_elastic.transport.messages import PushMessage

if TYPE_CHECKING:
    from torch import Tensor

    from ps_elastic.server.evaluator import Evaluator


class Gathered:
    """A push of which some parts are here, or will not come: so many, with so many bytes."""

    __slots__ = ("count", "first", "nbytes")

    def __init__(self, first: PushMessage) -> None:
        self.first, self.count, self.nbytes = first, 0, 0


class Run:
    """sizes: parameters of the part of each of `ledgers`. x: the model (d,), where there is one to evaluate.

    alpha: step size after so many samples were used, or all along. budget: samples of used pushes that end the run.
    """

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        sizes: Sequence[int],
        totals: Totals,
        measures: BoundFacts,
        tracker: Tracker,
        units: str,
        alpha: Callable[[int], float] | float,
        budget: int,
        evaluator: Evaluator | None,
        x: Tensor | None,
    ) -> None:
        self.totals, self.measures, self.tracker, self.units = totals, measures, tracker, units
        self.owed: dict[int, int] = {}  # worker -> the step that its next reply answers
        self.over = False  # the run has all it wants: every reply from now on says stop
        self._ledgers, self._held = ledgers, [ledger.held for ledger in ledgers]
        self._sizes, self._size, self._used = sizes, sum(sizes), 0  # used: samples x parameters
        self._parts = len(sizes)  # of a push
        self._schedule = alpha if callable(alpha) else None
        self.alpha = alpha(0) if callable(alpha) else alpha  # the step size after the samples used so far
        self._budget, self._evaluator, self._x, self._version = budget, evaluator, x, 0
        self._gathered: dict[int, Gathered] = {}  # worker -> its push that is not whole yet
        self._met: dict[PushId, list[bool]] = {}  # push -> of its parts that met their end, which were used

    def arrived(self, head: PushMessage, nbytes: int) -> None:
        """A push or a part of one is here, or will not come: its worker waits for an answer."""
        worker = head.worker
        self.owed[worker] = head.step
        if self._evaluator and head.statistics is not None:
            self._evaluator.statistics[worker] = head.statistics.copy()
        if self._parts > 1:
            gathered = self._gathered.get(worker)
            if gathered is None or gathered.first.step != head.step:
                gathered = self._gathered[worker] = Gathered(head)
            gathered.count, gathered.nbytes = gathered.count + 1, gathered.nbytes + nbytes
            if gathered.count < self._parts:
                return
            nbytes = self._gathered.pop(worker).nbytes
        totals, held = self.totals, len(self._held[0]) if self._parts == 1 else max(map(len, self._held))
        totals.pushes += 1
        totals.samples_computed += head.samples
        totals.bytes_up += nbytes
        if held > totals.held_max:
            totals.held_max = held
        totals.loss = head.loss
        totals.waited[worker] = head.waited_s

    def met(self, push: PushId, *, used: bool) -> None:
        """A push, or a part of one, met its end; the last of its parts is that of the push."""
        if self._parts > 1:
            met = self._met.setdefault(push, [])
            met.append(used)
            if len(met) < self._parts:
                return
            used = any(self._met.pop(push))
        self.totals.used += used
        self.totals.dropped += not used

    def stepped(self, version: int, fresh: Sequence[Push], samples: int, shard: int, now: float) -> None:
        """A shard's part of the model is `version` now: it may be time to evaluate the whole.

        fresh: pushes of so many samples, or their parts of this shard, that were used for the first time.
        """
        totals, evaluator = self.totals, self._evaluator
        self._used += samples * self._sizes[shard]
        totals.samples = self._used // self._size
        if self._schedule is not None:
            self.alpha = self._schedule(totals.samples)
        if totals.samples >= self._budget:
            self.over = True
        if self._parts > 1:
            for push in fresh:
                self.met(push.id, used=True)
        else:
            totals.used += len(fresh)
        told = self._version + 1
        if version > self._version:
            self._version = version
        if evaluator is not None and totals.samples >= evaluator.due:
            assert self._x is not None
            evaluator.submit(self._x, totals.samples, told, now)

    def left(self, worker: int) -> None:
        """`worker` is about to go: what is not here of its push will not come."""
        if (gathered := self._gathered.get(worker)) is not None:
            first = gathered.first
            for ledger in self._ledgers:
                if ledger.workers[worker].seen < first.step:
                    self.arrived(first, 0)
                    self.met(PushId(worker, first.step), used=False)
        self.owed.pop(worker, None)


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


def own_rate(run: Run, ledger: Ledger) -> float:
    """What a worker multiplies its own push by, as if it was used as soon as it is here: updates are scaled already."""
    return (run.alpha if run.units == "gradient" else 1.0) * (1 / len(ledger.workers))


def with_reach(store: Store, run: Run, version: int, moved: float, alpha: float) -> Applied:
    """The answer to a Step for a policy that asks how far the next one may go.

    rounding = 2^-24 ||x|| / alpha: how far float32 may move the model beyond its step.
    """
    rounding = 2.0**-24 * store.x_norm() / run.alpha if run.alpha else 0.0
    return Applied(version, moved, alpha, *store.coast(), rounding)
