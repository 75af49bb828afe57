"""One ledger's part of a run: a copy of the policy, its ledger, the store of its vectors, and what it observed.

It asks the policy what to do with each event (policies/decide.py), carries the actions out by its store, and tells
what happened. What concerns workers and the run as a whole (messages, replies, the budget) is the server's. A policy
that takes whole pushes has one shard; a layerwise policy has one for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
from ps_elastic.server.discrepancy import DiscrepancyMeter, StepSizes, Use, use_lines
from ps_elastic.server.outcomes import Outcome, Outcomes
from ps_elastic.server.pipelining import Pipelining
from ps_elastic.server.protocols import Store
from ps_elastic.server.run import Run, own_rate, with_reach
from ps_elastic.transport.messages import PushMessage, Reply, Settled

Outgoing = Iterator[tuple[int, Reply]]


class Shard:
    """A policy at work on one ledger. `event` and `push` yield (worker, reply) as soon as each is ready.

    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the sum of step lengths; "off" neither.
    release: is told of each worker that the policy releases, and has its reply, if one is due. stop: ends the run.
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
        self._is_exact, x = discrepancy == "exact", policy.view_of
        promises = self._is_exact and x == "srv" and type(policy).limit is not Policy.limit
        self._promised = policy.limit if promises else None  # of what is known at a use
        self._own_rate = partial(own_rate, run, ledger)
        self._scaled = run.units == "gradient"  # pushes are multiplied by the step size: updates are already
        self._bucket = ledger.bucket[0]
        self._named = {"bucket": self._bucket} if ledger.layerwise else {}  # in lines of the log
        end = f', "bucket": {self._bucket}}}' if ledger.layerwise else "}"
        self._lines = partial(use_lines, rank=run.tracker.rank, x=x, end=end)
        self._debts = Debts(store, run.measures, self._note, is_ideal=self._is_exact and x == "ideal")
        self.arrived: dict[PushId, Push] = {}  # the metadata of payloads that are here
        self._samples: dict[PushId, int] = {}  # that a push which is here is worth
        self.borrowed: dict[int, PushId] = {}  # worker -> push whose payload lies in the transport's memory
        self.outcomes = Outcomes(self._bucket)
        self._keeps_all = self._is_exact or not ledger.pipeline  # else payloads are not kept for workers' copies alone
        self._pipelining: Pipelining | None = None
        if ledger.pipeline:
            self._pipelining = Pipelining(
                ledger, store, self._meter, self._step_sizes, run.measures, self._own_rate, self.arrived
            )
        self._oldest = self._meter.oldest if self._pipelining is None else self._pipelining.oldest

    def start(self, now: float) -> Outgoing:
        return self.event(self._applied(0, 0.0, self._run.alpha), now)

    def event(self, event: Event, now: float) -> Outgoing:
        """Let the policy decide (the event is noted before this returns), then carry its actions out."""
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

    def push(self, parts: Sequence[PushMessage], now: float) -> Outgoing:
        """As `event`, of a push that came in `parts`."""
        head, run, ledger, nbytes = parts[0], self._run, self.ledger, 0
        for part in parts:
            for array in part.arrays:
                nbytes += array.nbytes
        id = worker, step = PushId(head.worker, head.step)
        push = Push(id, head.base, head.norm, head.payload_norm, head.residual_norm, nbytes, run.units, head.ahead)
        if worker in ledger.workers and step > ledger.workers[worker].seen + 1:
            outgoing = self.ending(worker, push, now)
        else:
            outgoing = self._carry_out(begin(self.policy, ledger, push, now), now)
        if id in ledger.held and id not in self.arrived:
            self.store.take(id, parts)
            self.arrived[id], self._samples[id] = push, head.samples
            if self._pipelining is not None:
                self._pipelining.arrive(push)
                if (outcome := self.outcomes.answered.pop(worker, None)) is not None:  # no reply has answered it
                    self.outcomes.tell(PushId(worker, run.owed[worker]), outcome)
            self.borrowed[worker] = id
            run.arrived(head, nbytes)
        return outgoing

    def keep(self, worker: int) -> None:
        """`worker` is answered, and its push may be overwritten: keep what will be read again."""
        push = self.borrowed.pop(worker, None)
        if push in self.arrived and (self._keeps_all or push in self.ledger.held):
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
                if type(action) is Step:  # a match of classes with their fields takes several times as long
                    self._step(action, now)
                elif isinstance(action, Release):
                    for worker in action.workers:
                        if (reply := self._release(worker, self)) is not None:
                            yield worker, reply
                elif type(action) is Drop:
                    self._drop(action, now)
                elif type(action) is Measure:
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
        """Forget the payloads that nobody needs any more, and the late gradients that will not come."""
        ledger, pipelining, debts = self.ledger, self._pipelining, self._debts
        for push in ledger.freed:
            if push in self.arrived:
                del self.arrived[push], self._samples[push]
            if pipelining is not None:
                pipelining.freed(push)
        self.store.free(ledger.freed)
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
        run, version, samples = self._run, self.ledger.version, 0
        if step.apply == "amend":
            alpha, moved, fresh = self._amend(step, now)
        else:
            alpha = run.alpha
            moved, fresh = self._use(step, alpha, version, now)
        self._measures.note_step((step, fresh, moved))
        for push in fresh:
            samples += self._samples[push.id]
        run.stepped(version + 1, fresh, samples, self._bucket, now)
        note_applied(self.ledger, self._applied(version + 1, moved, alpha))

    def _use(self, step: Step, alpha: float, version: int, now: float) -> tuple[float, list[Push]]:
        """Make the step; return ||x_new - x_old|| / alpha, and the pushes that it uses for the first time."""
        meter, debts, pipelining, arrived = self._meter, self._debts, self._pipelining, self.arrived
        sent, views, fresh, owes = meter.sent, list[PushId](), list[Push](), bool(debts.owed)
        for push, _, missing in step.terms:
            owes = owes or missing is not None
            if (view := push if missing is None else missing) in sent:
                views.append(view)
                if missing is None:
                    fresh.append(arrived[push])
        scale = (alpha if self._scaled else 1.0) * step.share
        if waits := debts.is_ideal and bool(debts.owed):
            debts.watch(views)
        moved = self.store.apply(step, scale, views if self._is_exact else ())
        measures, promised, outcomes, owed = self._measures, self._promised, self.outcomes, self._run.owed
        weights, uses = dict[PushId, float](), meter.uses(step, arrived, version, alpha)
        known = uses if not owes else [] if waits else [use for use in uses if use.push is not None]
        for use in uses:
            id = worker, nth = use.id
            if promised is not None or use.shares > measures.shares:
                measures.note_use(use, promised)
            if use.push is None:
                debts.hold(use)
                continue
            weight = scale * use.weight
            if pipelining is not None:
                pipelining.use(id)
                weights[id] = weight
            if waits:
                use = debts.hold(use)
            del sent[id]  # the step ended it
            outcome = Outcome("used", use.distance, weight)
            if worker in owed and owed[worker] == nth:
                outcomes.answered[worker] = outcome
            else:
                outcomes.tell(id, outcome)
        if known:
            self._totals.note_used(*known)
            self._tracker.later(self._lines, known, now, lines=len(known))
        if pipelining is not None:
            pipelining.used(weights)  # not sooner: what the step uses was in no model before it
        meter.stepped(step.share, moved, version, alpha, self._oldest)
        if owes:
            debts.stepped(step, alpha, meter.steps)
        return moved / alpha if alpha else step.share * self.store.direction_norm(), fresh

    def _note(self, use: Use, now: float) -> None:
        """A push is used, and what is to be known of that is known."""
        self._totals.note_used(use)
        self._tracker.later(self._lines, (use,), now)

    def _amend(self, step: Step, now: float) -> tuple[float, float, list[Push]]:
        """Apply a push late; return the largest alpha since its placeholder, the motion divided by it, and the push."""
        missing = step.terms[0].push
        alpha, push = self._debts.owed[missing].alpha, self.arrived[missing]
        self.store.combine(step)
        moved = self.store.amend(missing)
        self._settle(missing, Outcome("used"))
        self._meter.amended(moved, self.ledger.version, alpha, self._oldest)
        self.outcomes.tell_late(self._debts.repaid(push, now))
        return alpha, moved / alpha if alpha else 0.0, [push]

    def lend(self, view: PushId) -> tuple[int, Any]:
        """The version and the model that the push `view` is to be computed on; both are remembered."""
        given, debts = self.ledger.views[view], self._debts
        self._meter.give(view, given.version, debts.alpha if debts.owed else 0.0)
        return given.version, self.store.give(view, given, self.ledger.applied.alpha if self._scaled else 1.0)

    def _settle(self, push: PushId, outcome: Outcome) -> None:
        """`push` has its outcome: its copy ends, and its worker is told with the next reply."""
        self._meter.end(push)
        if self._pipelining is not None:
            self._pipelining.settled(push)
        if self._run.owed.get(push.worker) == push.step:
            self.outcomes.answered[push.worker] = outcome
        else:
            self.outcomes.tell(push, outcome)
