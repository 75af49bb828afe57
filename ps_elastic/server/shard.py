"""One ledger's part of a run: a copy of the rule, its ledger, the store of its vectors, and what it observed.

It asks the rule what to do with each event (`decide`), carries the actions out by its store, and tells what
happened. What concerns workers and the run as a whole (messages, replies, the budget) is the server's. A rule that
takes whole pushes has one shard; a layerwise rule has one for each bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ps_elastic.errors import PolicyError
from ps_elastic.policies.base import Policy
from ps_elastic.policies.decide import Decision, decide
from ps_elastic.policies.events import (
    Applied,
    Drop,
    Event,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    ReplyId,
    Step,
)
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.discrepancy import DiscrepancyMeter, StepSizes
from ps_elastic.server.totals import BoundFacts, Totals
from ps_elastic.transport.messages import MOST_SETTLED, PushMessage, Reply, Settled

if TYPE_CHECKING:
    from ps_elastic.server.protocols import Store

Outgoing = Iterator[tuple[int, Reply]]


class Arrived(NamedTuple):
    """A push that is here, and how many samples it is worth."""

    header: Push
    samples: int


class Fate(NamedTuple):
    """What became of a push; weight = alpha x share x weight it was applied with (share x weight if not a gradient)."""

    outcome: str
    discrepancy: float = math.nan
    weight: float = 0.0


HELD = Fate("held")


class Run(Protocol):
    """What a shard asks of the run that it belongs to: the server."""

    totals: Totals
    measures: BoundFacts
    tracker: Tracker
    units: str  # of the pushes
    owed: dict[int, int]  # worker -> the step that its next reply answers

    @property
    def over(self) -> bool:
        """Whether the run has all it wants."""

    def alpha(self) -> float:
        """The step size now."""

    def arrived(self, push: Push, head: PushMessage) -> None:
        """A push is held, and its payload lies in the transport's memory."""

    def stepped(self, version: int, now: float) -> None:
        """The model is `version` now."""

    def use(self, push: PushId, samples: int, shard: Shard) -> None:
        """A push is used, for the first time."""

    def drop(self, push: PushId) -> None:
        """A push is dropped."""

    def release(self, worker: int, shard: Shard) -> Reply | None:
        """The rule lets a worker go: its reply, if one is due."""

    def stop(self, now: float) -> Outgoing:
        """End the run."""


class Shard:
    """A rule at work on one ledger. `event` and `push` yield (worker, reply) as soon as each is ready.

    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the path length instead; "off" neither.
    bucket: (index, count) where the rule is layerwise.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        workers: int,
        store: Store,
        log: Callable[[str], None] | None,
        discrepancy: str,
        bucket: tuple[int, int] | None = None,
        pipeline: int = 0,
    ) -> None:
        self.policy, self.store, self._run = policy, store, run
        self._bucket = 0 if bucket is None else bucket[0]
        self._named = {} if bucket is None else {"bucket": self._bucket}  # in lines of the log
        self.ledger = Ledger(
            range(1, workers + 1),
            jobs=policy.jobs,
            keeps_last=policy.keeps_last,
            own_views=policy.own_views,
            pipeline=pipeline,
            log=log,
            bucket=bucket,
        )
        self._measures, self._tracker = run.measures, run.tracker
        self._step_sizes = StepSizes()
        self._meter = DiscrepancyMeter(
            store,
            self._step_sizes,
            run.totals,
            run.measures,
            run.tracker,
            discrepancy,
            policy.view_of,
            policy.limit,
            None if bucket is None else self._bucket,
        )
        self._arrived: dict[PushId, Arrived] = {}
        self._fates: dict[int, Fate] = {}  # worker -> of its push that is not answered yet
        self._settled: dict[int, list[Settled]] = {}  # of pushes answered as "held", to be told
        self._rates: dict[int, dict[int, float]] = {}  # worker that runs ahead -> by reply, what it re-applies with
        self._contained: dict[PushId, tuple[float, tuple[PushId, ...]]] = {}  # push not settled -> its rate, own pushes
        self._weights: dict[PushId, float] = {}  # of pushes used that views may contain: what they were applied with

    def start(self, now: float) -> Outgoing:
        return self.event(Applied(0, 0.0, self._run.alpha(), *self._bounds()), now)

    def event(self, event: Event, now: float) -> Outgoing:
        """Let the rule decide (the event is noted before this returns), then carry its actions out."""
        return self._carry_out(decide(self.policy, self.ledger, event, now), now)

    def ending(self, worker: int, event: Event, now: float) -> Outgoing:
        """As `event`, where what `worker` has under way may come to nothing by it."""
        under_way = self._under_way(worker)
        outgoing = self.event(event, now)
        self._forget(under_way)
        if isinstance(event, Left):
            for told in self._rates.pop(worker, ()):
                self._meter.end(ReplyId(worker, told))
        return outgoing

    def push(self, push: Push, parts: list[PushMessage], now: float) -> Outgoing:
        """As `event`, of a push that came in `parts`."""
        worker, step = push.id
        member = self.ledger.workers.get(worker)
        skips = member is not None and step > member.seen + 1
        outgoing = self.ending(worker, push, now) if skips else self.event(push, now)
        if push.id in self.ledger.held and push.id not in self._arrived:
            head = parts[0]
            self.store.take(push.id, parts)
            self._arrived[push.id] = Arrived(push, head.samples)
            if self.ledger.pipeline:
                self._derive(push)
            self._run.arrived(push, head)
        return outgoing

    def forget(self, worker: int) -> None:
        """`worker` is gone: nothing is to be told to it."""
        self._fates.pop(worker, None)

    def give(self, worker: int) -> tuple[int, Any]:
        """The version and the model that the next push of `worker` is to be computed on."""
        if self.ledger.pipeline:
            return self._hand(worker)
        return self._give(PushId(worker, self.ledger.workers[worker].seen + 1))

    def queue(self, worker: int) -> None:
        """Keep the models of the jobs queued last for a worker that computes."""
        member = self.ledger.workers[worker]
        for step in range(member.assigned, member.seen + 1, -1):
            if (job := PushId(worker, step)) in self._meter.sent:
                break
            self._give(job)

    def rate(self, worker: int) -> float:
        """What `worker` multiplies pushes by that it applies: those that its model lacks, or those that it writes."""
        if self.store.workers_write:
            return self._rate(self._run.alpha()) * (1 / len(self.ledger.workers))
        return self._rates[worker][self.ledger.told(worker)[0]] if self.ledger.pipeline else 0.0

    def told(self, worker: int, most: int = MOST_SETTLED) -> tuple[Fate, tuple[Settled, ...]]:
        """What to tell `worker` of the push answered now, and of `most` earlier ones: as many as go into one reply."""
        told = self._settled.pop(worker, [])
        still = self._still_held(worker) if self.ledger.pipeline else ()
        if not told and not still:
            return self._fates.pop(worker, HELD), ()
        room = most - len(still)
        if rest := told[room:]:
            self._settled[worker] = rest
        return self._fates.pop(worker, HELD), (*told[:room], *still)

    def _still_held(self, worker: int) -> list[Settled]:
        """Pushes of `worker`, which runs ahead, that the model given to it last does not contain yet."""
        last, given = self.ledger.told(worker)
        still = [Settled(push.step, "held", math.nan) for push in given.flying if push.step != last]
        if len(still) > MOST_SETTLED:
            raise PolicyError(f"{len(still)} pushes of worker {worker} are held; expected at most {MOST_SETTLED}")
        return still

    def _carry_out(self, decisions: Iterator[Decision], now: float) -> Outgoing:
        run, ledger, debts = self._run, self.ledger, self._meter.debts
        for action, freed in decisions:
            if isinstance(action, Step):  # a match of classes with their fields takes several times as long
                self._step(action, now)
            elif isinstance(action, Release):
                for worker in action.workers:
                    if (reply := run.release(worker, self)) is not None:
                        yield worker, reply
            elif isinstance(action, Drop):
                self._drop(action, now)
            elif isinstance(action, Measure):
                for push in action.pushes:
                    self._answer(Measured(push, self._meter.measure(push)), now)
            for push in freed:
                self._arrived.pop(push, None)
                self._weights.pop(push, None)
                self.store.free(push)
            if debts:
                self._tell(self._meter.forgiven(ledger.debts, now, ended=ledger.done))
        if run.over and not ledger.done:
            yield from run.stop(now)

    def _drop(self, drop: Drop, now: float) -> None:
        worker, step = drop.push
        self._run.drop(drop.push)
        self._measures.lost += not self.ledger.done
        self._tracker.note("dropped", now, worker=worker, step=step, reason=drop.reason, **self._named)
        self._settle(drop.push, Fate("dropped"))

    def _step(self, step: Step, now: float) -> None:
        meter, version, sent = self._meter, self.ledger.version, self._meter.sent
        fresh = [self._arrived[push] for push, _, missing in step.terms if missing is None and push in sent]
        alpha = self._run.alpha()
        self.store.combine(step)
        for header, samples in fresh:
            self._run.use(header.id, samples, self)
        if step.apply == "amend":
            alpha, moved = self._amend(step.terms[0].push, now)
        else:
            rate = self._rate(alpha)
            moved = self.store.apply(step, rate * step.share, meter.watch(step))
            self._use_terms(step, alpha, rate, now)
            meter.stepped(step, alpha, moved)
            moved = moved / alpha if alpha else step.share * self.store.direction_norm()
            self._measures.note_step(step, [header for header, _ in fresh], moved)
        oldest = meter.oldest(version)
        if self.ledger.pipeline:  # of pushes held the replies may have been forgotten
            oldest = min([oldest, *(sent[push].version for push in self.ledger.held)])
        self._step_sizes.note(version, alpha, oldest)
        self._run.stepped(version + 1, now)
        self._answer(Applied(version + 1, moved, alpha, *self._bounds()), now)

    def _use_terms(self, step: Step, alpha: float, rate: float, now: float) -> None:
        """Tell of the views of the pushes that the step used for the first time, and of those it owes."""
        use, sent, arrived, settle = self._meter.use, self._meter.sent, self._arrived, self._settle
        terms, share, version = step.terms, step.share, self.ledger.version
        total = 1.0 if step.combine == "sum" else sum([weight for _, weight, _ in terms])
        pipeline, scale = self.ledger.pipeline, rate * share
        weights: dict[PushId, float] = {}
        for push, weight, missing in terms:
            weight /= total
            if missing is not None:
                if missing in sent:
                    use(missing, None, version, alpha, weight, share, now)
            elif push in sent:
                if pipeline:
                    self._note_reapplied(push, *self._contained[push])
                    weights[push] = scale * weight
                distance = use(push, arrived[push].header, version, alpha, weight, share, now)
                settle(push, Fate("used", distance, scale * weight))
        if weights:
            self._weights |= weights  # not sooner: what the step uses was in no model before it

    def _amend(self, missing: PushId, now: float) -> tuple[float, float]:
        """Repay the debt on `missing`; return (largest alpha since it was made, motion divided by it)."""
        alpha = self._meter.largest_alpha_owed(missing)
        moved = self.store.amend(missing)
        self._settle(missing, Fate("used"))
        self._tell(self._meter.repaid(self._arrived[missing].header, moved, now))
        return alpha, moved / alpha if alpha else 0.0

    def _tell(self, known: list[tuple[PushId, float]]) -> None:
        """These pushes were used a while ago, and only now their discrepancy is known."""
        for push, distance in known:
            self._settled.setdefault(push.worker, []).append(Settled(push.step, "used", distance, self._bucket))

    def _rate(self, alpha: float) -> float:
        """What a push is multiplied by when the step size is `alpha`: updates are scaled already."""
        return alpha if self._run.units == "gradient" else 1.0

    def _answer(self, answer: Applied | Measured, now: float) -> None:
        decide(self.policy, self.ledger, answer, now)  # has no actions

    def _bounds(self) -> tuple[float, float, float]:
        """(coast, gain, rounding) of the next step, where the rule asks for them.

        rounding = 2^-24 ||x|| / alpha: how far float32 may move the model beyond its step.
        """
        if not self.policy.uses_reach:
            return 0.0, 1.0, 0.0
        alpha = self._run.alpha()
        return *self.store.coast(), 2.0**-24 * self.store.x_norm() / alpha if alpha else 0.0

    def _give(self, view: PushId) -> tuple[int, Any]:
        """The version and the model that the push `view` is to be computed on; both are remembered."""
        given = self.ledger.views[view]
        self._meter.give(view, given.version)
        return given.version, self.store.give(view, given, self._rate(self.ledger.applied.alpha))

    def _hand(self, worker: int) -> tuple[int, Any]:
        """The version and the model of the last reply to a worker that runs ahead."""
        told, given = self.ledger.told(worker)
        rates = self._rates.setdefault(worker, {})
        if told not in rates:
            rates[told] = self._rate(self._run.alpha()) * (1 / len(self.ledger.workers))
            self._meter.give(ReplyId(worker, told), given.version)
        return given.version, self.store.hand(ReplyId(worker, told), given.version)

    def _derive(self, push: Push) -> None:
        """A push of a worker that runs ahead is here: note its view, and forget replies that no view can be of now."""
        worker, step = push.id
        told, contained = step - 1 - push.ahead, self.ledger.contained(push.id)
        if self.store.workers_write:  # its own pushes are in the model, and so in what it read of that
            contained = ()
        rates, reply = self._rates[worker], ReplyId(worker, told)
        reapplied = rates[told] * sum(self._arrived[own].header.payload_norm for own in contained)
        self._contained[push.id] = rates[told], contained
        self._meter.derive(push.id, reply, reapplied)
        self.store.derive(push.id, reply, rates[told], contained)
        for older in [other for other in rates if other < told]:
            del rates[older]
            self._meter.end(ReplyId(worker, older))
        if (fate := self._fates.pop(worker, None)) is not None:  # of a push that no reply has answered yet
            self._settled.setdefault(worker, []).append(Settled(self._run.owed[worker], fate.outcome, fate.discrepancy))

    def _note_reapplied(self, push: PushId, rate: float, contained: tuple[PushId, ...]) -> None:
        """How much of its own the view of `push` contains, and by how much the model has something else of it."""
        largest = self._step_sizes.largest(self._meter.sent[push].version)
        if largest:
            astray = sum(abs(self._weights.get(own, 0.0) - rate) for own in contained)
            self._measures.note_reapplied(rate * len(contained) / largest, astray / largest)

    def _settle(self, push: PushId, fate: Fate) -> None:
        """`push` has met its fate: its view ends, and its worker is told with the next reply."""
        self._meter.end(push)
        self._contained.pop(push, None)
        worker, step = push
        if self._run.owed.get(worker) == step:
            self._fates[worker] = fate
        else:
            settled = Settled(step, fate.outcome, fate.discrepancy, self._bucket)
            self._settled.setdefault(worker, []).append(settled)

    def _under_way(self, worker: int) -> list[PushId]:
        """The pushes that `worker` computes or has queued."""
        member = self.ledger.workers.get(worker)
        return [PushId(worker, step) for step in range(member.seen + 1, member.assigned + 1)] if member else []

    def _forget(self, under_way: list[PushId]) -> None:
        """An event was noted: the views end of those that nothing will come of any more."""
        for push in under_way:
            if push not in self.ledger.views and push not in self.ledger.held:
                self._meter.end(push)
