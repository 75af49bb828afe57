"""One ledger's part of a run: a copy of the rule, its ledger, the store of its vectors, and what it observed.

It asks the rule what to do with each event (policies/decide.py), carries the actions out by its store, and tells what
happened. What concerns workers and the run as a whole (messages, replies, the budget) is the server's. A rule that
takes whole pushes has one shard; a layerwise rule has one for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

from ps_elastic.policies.base import Policy
from ps_elastic.policies.decide import TAKES, begin, end
from ps_elastic.policies.events import (
    Action,
    Applied,
    Drop,
    Event,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
)
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.transitions import note_applied, note_measured
from ps_elastic.server.debts import Debts
from ps_elastic.server.discrepancy import DiscrepancyMeter, StepSizes, Use, use_line
from ps_elastic.server.outcomes import Outcome, Outcomes
from ps_elastic.server.pipelining import Pipelining
from ps_elastic.server.protocols import Store
from ps_elastic.server.run import Run, own_rate, with_reach
from ps_elastic.transport.messages import PushMessage, Reply, Settled

Outgoing = Iterator[tuple[int, Reply]]
_weight = itemgetter(1)  # of a term


class Shard:
    """A rule at work on one ledger. `event` and `push` yield (worker, reply) as soon as each is ready.

    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the path length instead; "off" neither.
    release: is told of each worker that the rule lets go, and has its reply, if one is due. stop: ends the run.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        ledger: Ledger,
        store: Store,
        discrepancy: str,
        release: Callable[[int, Shard], Reply | None],
        stop: Callable[[float], Outgoing],
    ) -> None:
        self.policy, self.ledger, self.store = policy, ledger, store
        self._run, self._release, self._stop = run, release, stop
        self._totals, self._measures, self._tracker = run.totals, run.measures, run.tracker
        self._applied: Callable[[int, float, float], Applied] = Applied
        if policy.uses_reach:
            self._applied = partial(with_reach, store, run)
        self._step_sizes = StepSizes()
        self._meter = DiscrepancyMeter(store, self._step_sizes, discrepancy)
        is_exact, x = discrepancy == "exact", policy.view_of
        promises = is_exact and x == "srv" and type(policy).limit is not Policy.limit
        self._promised = policy.limit if promises else None  # of what is known at a use
        self._own_rate = partial(own_rate, run, ledger)
        self._scaled = run.units == "gradient"  # pushes are multiplied by the step size: updates are already
        self._bucket = ledger.bucket[0]
        self._named = {"bucket": self._bucket} if ledger.layerwise else {}  # in lines of the log
        end = f', "bucket": {self._bucket}}}' if ledger.layerwise else "}"
        self._line = partial(use_line, rank=run.tracker.rank, x=x, end=end)
        self._debts = Debts(store, run.measures, self._note, is_ideal=is_exact and x == "ideal")
        self._arrived: dict[PushId, Push] = {}
        self._samples: dict[PushId, int] = {}  # that a push which is here is worth
        self._borrowed: dict[int, PushId] = {}  # worker -> push whose payload lies in the transport's memory
        self.outcomes = Outcomes(self._bucket)
        self._keeps_all = is_exact or not ledger.pipeline  # else payloads are not kept for views alone
        self._pipelining: Pipelining | None = None
        if ledger.pipeline:
            self._pipelining = Pipelining(
                ledger, store, self._meter, self._step_sizes, run.measures, self._own_rate, self._arrived
            )
        self._oldest = self._meter.oldest if self._pipelining is None else self._pipelining.oldest

    def start(self, now: float) -> Outgoing:
        return self.event(self._applied(0, 0.0, self._run.alpha), now)

    def event(self, event: Event, now: float) -> Outgoing:
        """Let the rule decide (the event is noted before this returns), then carry its actions out."""
        return self._carry_out(begin(self.policy, self.ledger, event, now), now)

    def ending(self, worker: int, event: Event, now: float) -> Outgoing:
        """As `event`, where what `worker` computes or has queued may come to nothing by it."""
        ledger, member = self.ledger, self.ledger.workers.get(worker)
        under_way = range(member.seen + 1, member.assigned + 1) if member else ()
        outgoing = self.event(event, now)
        for push in [PushId(worker, step) for step in under_way]:
            if push not in ledger.views and push not in ledger.held:
                self._meter.end(push)
        if isinstance(event, Left):
            self.outcomes.answered.pop(worker, None)  # there is nobody to be told
            if self._pipelining is not None:
                self._pipelining.left(worker)
        return outgoing

    def push(self, push: Push, parts: list[PushMessage], now: float) -> Outgoing:
        """As `event`, of a push that came in `parts`."""
        (worker, step), ledger = push.id, self.ledger
        member = ledger.workers.get(worker)
        if member is not None and step > member.seen + 1:
            outgoing = self.ending(worker, push, now)
        else:
            outgoing = self._carry_out(begin(self.policy, ledger, push, now), now)
        if push.id in ledger.held and push.id not in self._arrived:
            head = parts[0]
            self.store.take(push.id, parts)
            self._arrived[push.id], self._samples[push.id] = push, head.samples
            if self._pipelining is not None:
                self._pipelining.arrive(push)
                if (outcome := self.outcomes.answered.pop(worker, None)) is not None:  # no reply has answered it
                    self.outcomes.tell(PushId(worker, self._run.owed[worker]), outcome)
            self._borrowed[worker] = push.id
            self._run.arrived(head, push.nbytes)
        return outgoing

    def keep(self, worker: int) -> None:
        """`worker` is answered, and its push may be overwritten: keep what will be read again."""
        push = self._borrowed.pop(worker, None)
        if push is not None and push in self._arrived and (self._keeps_all or push in self.ledger.held):
            self.store.keep(push)

    def give(self, worker: int) -> tuple[int, Any]:
        """The version and the model that the next push of `worker` is to be computed on."""
        if self._pipelining is not None:
            return self._pipelining.give(worker)
        return self.lend(PushId(worker, self.ledger.workers[worker].seen + 1))

    def queue(self, worker: int) -> None:
        """Keep the models of the jobs queued last for a worker that computes."""
        member = self.ledger.workers[worker]
        for step in range(member.assigned, member.seen + 1, -1):
            if (job := PushId(worker, step)) in self._meter.sent:
                break
            self.lend(job)

    def rate(self, worker: int) -> float:
        """What `worker` multiplies pushes by that it applies: those that its model lacks, or those that it writes."""
        if self.store.workers_write:
            return self._own_rate()
        return 0.0 if self._pipelining is None else self._pipelining.rate(worker)

    def told(self, worker: int, most: int) -> tuple[Outcome, tuple[Settled, ...]]:
        """What to tell `worker` of the push answered now, and of `most` earlier ones."""
        pipelining = self._pipelining
        return self.outcomes.take(worker, most, () if pipelining is None else pipelining.still_held(worker))

    def _carry_out(self, actions: Iterable[Action], now: float) -> Outgoing:
        run, ledger, freed, owed = self._run, self.ledger, self.ledger.freed, self._debts.owed
        try:
            if freed:
                self._carried_out(now)
            for action in actions:
                TAKES[type(action)](ledger, action)
                if isinstance(action, Step):  # a match of classes with their fields takes several times as long
                    self._step(action, now)
                elif isinstance(action, Release):
                    for worker in action.workers:
                        if (reply := self._release(worker, self)) is not None:
                            yield worker, reply
                elif isinstance(action, Drop):
                    self._drop(action, now)
                elif isinstance(action, Measure):
                    for push in action.pushes:
                        note_measured(ledger, Measured(push, self._meter.measure(push)))
                if freed or owed:
                    self._carried_out(now)
        except BaseException:
            end(ledger, broken_off=True)
            raise
        end(ledger)
        if run.over and not ledger.done:
            yield from self._stop(now)

    def _carried_out(self, now: float) -> None:
        """Forget the payloads that nobody needs any more, and what debts were closed."""
        ledger, pipelining, debts = self.ledger, self._pipelining, self._debts
        for push in ledger.freed:
            self._arrived.pop(push, None)
            self._samples.pop(push, None)
            if pipelining is not None:
                pipelining.freed(push)
            self.store.free(push)
        ledger.freed.clear()
        if debts.owed:
            self.outcomes.tell_late(debts.forgiven(ledger.debts, now, ended=ledger.done))

    def _drop(self, drop: Drop, now: float) -> None:
        worker, step = drop.push
        self._run.met(drop.push, used=False)
        self._measures.lost += not self.ledger.done
        self._tracker.note("dropped", now, worker=worker, step=step, reason=drop.reason, **self._named)
        self._settle(drop.push, Outcome("dropped"))

    def _step(self, step: Step, now: float) -> None:
        meter, run, version, fresh = self._meter, self._run, self.ledger.version, list[Push]()
        alpha, sent = run.alpha, meter.sent
        self.store.combine(step)
        for id, _, missing in step.terms:
            if missing is None and id in sent:
                fresh.append(self._arrived[id])
                run.use(id, self._samples[id], self._bucket)
        if step.apply == "amend":
            alpha, moved = self._amend(step.terms[0].push, now)
        else:
            moved = self._use(step, alpha, now)
            self._measures.note_step(step, fresh, moved)
        self._step_sizes.note(version, alpha, self._oldest)
        run.stepped(version + 1, now)
        note_applied(self.ledger, self._applied(version + 1, moved, alpha))

    def _use(self, step: Step, alpha: float, now: float) -> float:
        """Make the step, and tell of the views of the pushes that it uses for the first time, and of those it owes.

        Returns ||x_new - x_old|| / alpha.
        """
        meter, debts, pipelining, arrived = self._meter, self._debts, self._pipelining, self._arrived
        terms, share, version, sent = step.terms, step.share, self.ledger.version, self._meter.sent
        scale = (alpha if self._scaled else 1.0) * share
        views = meter.watch(step)
        if waits := bool(debts.owed):
            debts.watch(views)
            waits = debts.is_ideal
        moved, measures, promised = self.store.apply(step, scale, views), self._measures, self._promised
        total = 1.0 if step.combine == "sum" else sum(map(_weight, terms))
        weights: dict[PushId, float] = {}
        owes = False
        for push, weight, missing in terms:
            weight /= total
            if missing is not None:
                owes = True
                if missing in sent:
                    use = meter.used(missing, None, version, alpha, weight, share)
                    measures.note_use(use, promised)
                    debts.hold(use)
            elif push in sent:
                if pipelining is not None:
                    pipelining.use(push)
                    weights[push] = scale * weight
                use = meter.used(push, arrived[push], version, alpha, weight, share)
                if promised is not None or use.shares > measures.shares:
                    measures.note_use(use, promised)
                if waits:
                    use = debts.hold(use)
                else:
                    self._totals.note_used(use)
                    self._tracker.later(self._line, use, now)
                self._settle(push, Outcome("used", use.distance, scale * weight))
        if pipelining is not None:
            pipelining.used(weights)  # not sooner: what the step uses was in no model before it
        meter.stepped(share, moved)
        if owes or debts.owed:
            debts.stepped(step, alpha, meter.steps)
        return moved / alpha if alpha else share * self.store.direction_norm()

    def _note(self, use: Use, now: float) -> None:
        """A push is used, and what is to be known of that is known."""
        self._totals.note_used(use)
        self._tracker.later(self._line, use, now)

    def _amend(self, missing: PushId, now: float) -> tuple[float, float]:
        """Repay the debt on `missing`; return (largest alpha since it was made, motion divided by it)."""
        alpha, push = self._debts.owed[missing].alpha, self._arrived[missing]
        moved = self.store.amend(missing)
        self._settle(missing, Outcome("used"))
        self._meter.amended(moved)
        self._measures.note_push(push)
        self.outcomes.tell_late(self._debts.repaid(push, now))
        return alpha, moved / alpha if alpha else 0.0

    def lend(self, view: PushId) -> tuple[int, Any]:
        """The version and the model that the push `view` is to be computed on; both are remembered."""
        given, debts = self.ledger.views[view], self._debts
        self._meter.give(view, given.version, debts.alpha if debts.owed else 0.0)
        return given.version, self.store.give(view, given, self.ledger.applied.alpha if self._scaled else 1.0)

    def _settle(self, push: PushId, outcome: Outcome) -> None:
        """`push` has met its end: so does its view, and its worker is told with the next reply."""
        self._meter.end(push)
        if self._pipelining is not None:
            self._pipelining.settled(push)
        if self._run.owed.get(push.worker) == push.step:
            self.outcomes.answered[push.worker] = outcome
        else:
            self.outcomes.tell(push, outcome)
