"""The server as a machine without I/O: a message in, messages out. No MPI, no clock, no tensor.

It asks the rule what to do with each push (`decide`), carries the actions out by its calculator, and tells what
happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ps_elastic.decide import Decision, decide
from ps_elastic.errors import TaskError, WireError
from ps_elastic.events import (
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
    Woke,
)
from ps_elastic.ledger import Ledger
from ps_elastic.measures import Measures
from ps_elastic.messages import MOST_SETTLED, Ask, Farewell, Message, PushMessage, Reply, Settled
from ps_elastic.observer import Observer
from ps_elastic.policies.base import Policy
from ps_elastic.totals import Totals
from ps_elastic.tracker import Tracker

if TYPE_CHECKING:
    from ps_elastic.calculator import Calculator
    from ps_elastic.config import Target
    from ps_elastic.evaluate import Evaluator

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


class Answer(NamedTuple):
    """What a worker was last told, in case it asks again."""

    step: int
    fate: Fate
    settled: tuple[Settled, ...]
    alpha: float


class Server:
    """One run's server. `start`, `receive` and `tick` yield (worker, reply) as soon as each is ready.

    alpha: step size after so many samples were used. budget: samples of used pushes that end the run.
    discrepancy: "exact" measures ||x - v|| of each push used; "bound" logs the path length instead; "off" neither.
    """

    def __init__(
        self,
        policy: Policy,
        workers: int,
        calculator: Calculator,
        alpha: Callable[[int], float],
        budget: int,
        tracker: Tracker,
        log: Callable[[str], None] | None = None,
        evaluator: Evaluator | None = None,
        discrepancy: str = "exact",
        target: Target | None = None,
        units: str = "gradient",
    ) -> None:
        self.policy, self.calculator = policy, calculator
        self.ledger = Ledger(
            range(1, workers + 1),
            jobs=policy.jobs,
            keeps_last=policy.keeps_last,
            own_views=policy.own_views,
            log=log,
        )
        self.totals = Totals(workers, target)
        self.lost_workers: list[int] = []
        self._alpha, self._budget, self._tracker, self._evaluator = alpha, budget, tracker, evaluator
        self._units, self._alpha_last = units, (-1, 0.0)
        self.measures = Measures(workers)
        self._observer = Observer(
            calculator, self.totals, self.measures, tracker, discrepancy, policy.view_of, policy.limit
        )
        self._arrived: dict[PushId, Arrived] = {}
        self._partial: dict[int, list[PushMessage]] = {}  # worker -> the buckets here so far
        self._borrowed: dict[int, PushId] = {}  # worker -> push whose payload lies in the transport's memory
        self._owed: dict[int, int] = {}  # worker -> the step that its next reply answers
        self._answers: dict[int, Answer] = {}
        self._fates: dict[int, Fate] = {}  # worker -> of its push that is not answered yet
        self._settled: dict[int, list[Settled]] = {}  # of pushes answered as "held", to be told
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
        yield from self._event(Applied(0, 0.0, self._alpha(0), *self._bounds()), now)
        for worker in self.ledger.workers:
            yield worker, self._reply(worker, 0)

    def receive(self, message: Message, now: float) -> Outgoing:
        """Take one message in. Raises TaskError for a worker that failed, WireError for what cannot be."""
        yield from self._take(message, now)
        yield from self.tick(now)

    def take(self, message: Message, now: float) -> Outgoing:
        """As `receive`, but leave a Wake that is due to `tick`: more messages may be here at the same time."""
        outgoing = self._take(message, now)
        return chain(outgoing, self._report(now)) if self._evaluator else outgoing

    def _take(self, message: Message, now: float) -> Outgoing:
        """Note the message at once; the replies are to be taken from what this returns."""
        match message:
            case PushMessage():
                parts = [message] if message.buckets == 1 else self._partial.setdefault(message.worker, [])
                if message.buckets > 1:
                    parts.append(message)
                    if len(parts) < message.buckets:
                        return iter(())
                    del self._partial[message.worker]
                return self._take_push(parts, now)
            case Ask():
                return self._take_ask(message, now)
            case Farewell(worker, _, text, code):
                if code:
                    raise TaskError(f"rank {worker}: {text}")
                self._gone.add(worker)
                return iter(())
        raise WireError(f"the server got a {type(message).__name__}")

    def _take_ask(self, ask: Ask, now: float) -> Outgoing:
        worker = ask.worker
        new = worker not in self._owed
        self._owed.setdefault(worker, ask.step)
        under_way = self._under_way(worker)
        outgoing = self._event(Asked(worker, ask.step), now)
        self._forget(under_way)
        yield from outgoing
        if new and worker not in self.ledger.waiting:
            self._owed.pop(worker, None)  # the ask was stale: no reply is due for it

    def tick(self, now: float) -> Outgoing:
        """Do what is due by the clock: the rule's Wake, and results of evaluations."""
        if self.wake_at is not None and now >= self.wake_at:
            yield from self._event(Woke(), now)
        yield from self._report(now)

    def _report(self, now: float) -> Outgoing:
        for result in self._evaluator.finished() if self._evaluator else ():
            self._tracker.note("evaluated", now, samples=result.samples, version=result.version, **result.metrics)
            if self.totals.note_evaluation(result) and not self.ledger.done:
                yield from self.stop(now)

    def join(self, worker: int, now: float) -> Outgoing:
        """`worker` becomes a member; its Ask follows."""
        self._gone.discard(worker)
        self._answers.pop(worker, None)  # of its earlier life
        outgoing = self._event(Joined(worker), now)
        self.measures.note_workers(len(self.ledger.workers))
        yield from outgoing

    def leave(self, worker: int, now: float) -> Outgoing:
        """`worker` is gone for good."""
        self.lost_workers.append(worker)
        for of_worker in (self._owed, self._fates, self._partial):
            of_worker.pop(worker, None)  # type: ignore[attr-defined]
        under_way = self._under_way(worker)
        outgoing = self._event(Left(worker), now)
        self._forget(under_way)
        if not self.ledger.done:
            self.measures.note_workers(len(self.ledger.workers))
        yield from outgoing

    def stop(self, now: float) -> Outgoing:
        """End the run: held pushes are dropped, and every worker's next reply tells it to stop."""
        yield from self._event(Done(), now)

    def _take_push(self, parts: list[PushMessage], now: float) -> Outgoing:
        last = parts[-1]
        nbytes = 0
        for part in parts:
            for array in part.arrays:
                nbytes += array.nbytes
        push = Push(
            PushId(last.worker, last.step),
            last.base,
            last.norm,
            last.payload_norm,
            last.residual_norm,
            nbytes,
            self._units,
        )
        seat = self.ledger.workers.get(last.worker)
        skipped = self._under_way(last.worker) if seat and last.step > seat.seen + 1 else None
        outgoing = self._event(push, now)
        if skipped:
            self._forget(skipped)
        if push.id in self.ledger.held and push.id not in self._arrived:
            self.calculator.take(push.id, parts)
            self._arrived[push.id] = Arrived(push, last.samples)
            self._borrowed[last.worker], self._owed[last.worker] = push.id, last.step
            self.totals.note_push(push, last.samples, last.loss, len(self.ledger.held), last.waited_s)
            if self._evaluator and last.statistics is not None:
                self._evaluator.statistics[last.worker] = last.statistics.copy()
        return outgoing

    def _event(self, event: Event, now: float) -> Outgoing:
        """Let the rule decide (the event is noted before this returns), then carry its actions out."""
        return self._carry_out(decide(self.policy, self.ledger, event, now), now)

    def _carry_out(self, decisions: Iterator[Decision], now: float) -> Outgoing:
        for action, freed in decisions:
            match action:
                case Step():
                    self._step(action, now)
                case Release(workers):
                    for worker in workers:
                        if (step := self._owed.pop(worker, None)) is not None:
                            yield worker, self._reply(worker, step)
                        elif not self.over:
                            self._queue(worker)
                case Drop(push, reason):
                    self.totals.dropped += 1
                    self.measures.lost += not self.ledger.done
                    self._tracker.note("dropped", now, worker=push.worker, step=push.step, reason=reason)
                    self._settle(push, Fate("dropped"))
                case Measure(pushes):
                    for push in pushes:
                        self._answer(Measured(push, self._observer.measure(push)), now)
            for push in freed:
                self._arrived.pop(push, None)
                self.calculator.free(push)
            if self._observer.debts:
                self._tell(self._observer.forgiven(self.ledger.debts, now, ended=self.ledger.done))
        if self.over and not self.ledger.done:
            yield from self.stop(now)

    def _step(self, step: Step, now: float) -> None:
        observer, version = self._observer, self.ledger.version
        fresh = [term for term in step.terms if term.stands_for is None and term.push in observer.sent]
        alpha = self._alpha_now()
        self.calculator.combine(step)
        total = 1.0 if step.combine == "sum" else sum([term.weight for term in step.terms])
        for term in fresh:
            self.totals.samples += self._arrived[term.push].samples
        if step.apply == "amend":
            alpha, moved = self._amend(step.terms[0].push, now)
        else:
            rate = self._rate(alpha)
            self._use_terms(step, alpha, rate, total, now)
            moved = self.calculator.apply(step, rate * step.share)
            observer.stepped(step, alpha, moved)
            moved = moved / alpha if alpha else step.share * self.calculator.direction_norm()
            self.measures.note_step(step, [self._arrived[term.push].header for term in fresh], moved)
        self.totals.note_alpha(version, alpha, observer.oldest(version))
        if self._evaluator:
            self._evaluator.submit(self.calculator.x, self.totals.samples, version + 1, now)
        self._answer(Applied(version + 1, moved, alpha, *self._bounds()), now)

    def _use_terms(self, step: Step, alpha: float, rate: float, total: float, now: float) -> None:
        """Measure the views of the pushes that the step uses for the first time, and of those it owes."""
        observer = self._observer
        for term in step.terms:
            weight, push = term.weight / total, term.stands_for or term.push
            if push not in observer.sent:
                continue
            header = None if term.stands_for else self._arrived[push].header
            distance = observer.use(push, header, self.ledger.version, alpha, weight, step.share, now)
            if header is not None:
                self._settle(push, Fate("used", distance, rate * step.share * weight))

    def _amend(self, missing: PushId, now: float) -> tuple[float, float]:
        """Repay the debt on `missing`; return (largest alpha since it was made, motion divided by it)."""
        alpha = self._observer.largest_alpha_owed(missing)
        moved = self.calculator.amend(missing)
        self._settle(missing, Fate("used"))
        self._tell(self._observer.repaid(self._arrived[missing].header, moved, now))
        return alpha, moved / alpha if alpha else 0.0

    def _tell(self, known: list[tuple[PushId, float]]) -> None:
        """These pushes were used a while ago, and only now their discrepancy is known."""
        for push, distance in known:
            self._settled.setdefault(push.worker, []).append(Settled(push.step, "used", distance))

    def _alpha_now(self) -> float:
        """The step size after the samples used so far, worked out once for each number of them."""
        samples, alpha = self._alpha_last
        if samples != self.totals.samples:
            alpha = self._alpha(self.totals.samples)
            self._alpha_last = self.totals.samples, alpha
        return alpha

    def _rate(self, alpha: float) -> float:
        """What a push is multiplied by when the step size is `alpha`: updates are scaled already."""
        return alpha if self._units == "gradient" else 1.0

    def _answer(self, answer: Applied | Measured, now: float) -> None:
        for _ in decide(self.policy, self.ledger, answer, now):
            raise AssertionError("an answer has no actions")

    def _bounds(self) -> tuple[float, float, float]:
        """(coast, gain, rounding) of the next step, where the rule asks for them.

        rounding = 2^-24 ||x|| / alpha: how far float32 may move the model beyond its step.
        """
        if not self.policy.uses_reach:
            return 0.0, 1.0, 0.0
        alpha = self._alpha_now()
        return *self.calculator.coast(), 2.0**-24 * self.calculator.x_norm() / alpha if alpha else 0.0

    def _reply(self, worker: int, step: int) -> Reply:
        """The answer to `step` of `worker`, whose push may be overwritten once this has been sent."""
        if (borrowed := self._borrowed.pop(worker, None)) is not None:
            self.calculator.keep(borrowed)
        last = self._answers.get(worker)
        if last is None or last.step != step:
            told = self._settled.pop(worker, ())
            if rest := told[MOST_SETTLED:]:
                self._settled[worker] = list(rest)
            fate = self._fates.pop(worker, HELD)
            last = self._answers[worker] = Answer(step, fate, tuple(told[:MOST_SETTLED]), self._alpha_now())
        version, model = self.ledger.version, None
        if not self.over:
            version, model = self._give(PushId(worker, self.ledger.workers[worker].seen + 1))
            self.totals.bytes_down += model.nbytes
        _, (outcome, discrepancy, weight), settled, alpha = last
        return Reply(worker, step, version, model, outcome, discrepancy, alpha, weight, settled)

    def _queue(self, worker: int) -> None:
        """Keep the models of the jobs queued last for a worker that computes."""
        seat = self.ledger.workers[worker]
        for step in range(seat.assigned, seat.seen + 1, -1):
            if (job := PushId(worker, step)) in self._observer.sent:
                break
            self._give(job)

    def _give(self, view: PushId) -> tuple[int, Any]:
        """The version and the model that the push `view` is to be computed on; both are remembered."""
        given = self.ledger.views[view]
        self._observer.give(view, given.version)
        return given.version, self.calculator.give(view, given, self._rate(self.ledger.applied.alpha))

    def _settle(self, push: PushId, fate: Fate) -> None:
        """`push` has met its fate: its view ends, and its worker is told with the next reply."""
        self._observer.end(push)
        if self._owed.get(push.worker) == push.step:
            self._fates[push.worker] = fate
        else:
            self._settled.setdefault(push.worker, []).append(Settled(push.step, fate.outcome, fate.discrepancy))

    def _under_way(self, worker: int) -> list[PushId]:
        """The pushes that `worker` computes or has queued."""
        seat = self.ledger.workers.get(worker)
        return [PushId(worker, step) for step in range(seat.seen + 1, seat.assigned + 1)] if seat else []

    def _forget(self, under_way: list[PushId]) -> None:
        """An event was noted: the views end of those that nothing will come of any more."""
        for push in under_way:
            if push not in self.ledger.views and push not in self.ledger.held:
                self._observer.end(push)
