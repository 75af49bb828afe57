"""What the law says a server must remember, written a second time and plainly: sets built anew, no counters.

`Model` is told of events and actions beside the ledger. It asserts each law by itself, so that a fault of the
ledger's own checks is found too.
"""

from __future__ import annotations

from math import isclose, isfinite
from typing import NamedTuple

from ps_elastic.policies.events import ZERO, Drop, Push, PushId, Step
from ps_elastic.policies.ledger import Ledger


class Job(NamedTuple):
    """A push that a worker owes, and the view it was given for it."""

    id: PushId
    version: int
    own: PushId | None  # the push whose payload is part of the view
    travelled: float


class Given(NamedTuple):
    """A reply to a worker that runs ahead, and its pushes that were here by then and not in the reply's model."""

    told: int  # the last push here by then
    version: int
    flying: tuple[PushId, ...]
    travelled: float


class Owed(NamedTuple):
    stand_in: PushId
    part: float


class Model:
    def __init__(self, workers: range, jobs: int, keeps_last: bool, own_views: bool, pipeline: int = 0) -> None:
        self.most_jobs, self.keeps_last, self.own_views = jobs, keeps_last, own_views
        self.pipeline = pipeline
        self.given: dict[int, tuple[Given, ...]] = dict.fromkeys(workers, ())  # it may compute on these, oldest first
        self.arrived: dict[int, tuple[PushId, ...]] = dict.fromkeys(workers, ())  # since it became a member
        self.contained: dict[PushId, tuple[PushId, ...]] = {}  # held push -> of its worker, in its view
        self.version, self.travelled = 0, 0.0
        self.wake: float | None = None
        self.done = False
        self.held: dict[PushId, int] = {}  # push -> base
        self.own: dict[PushId, PushId] = {}  # held push -> the push that its view contains
        self.alive: set[PushId] = set()  # payloads that the server stores
        self.debts: dict[PushId, Owed] = {}
        self.closed: list[PushId] = []  # debts closed unpaid by the current event
        self.jobs: dict[int, tuple[Job, ...]] = dict.fromkeys(workers, ())  # member -> under way, oldest first
        self.unanswered: dict[int, None] = {}  # whose push or ask awaits its one reply
        self.resend: int | None = None  # who must get a reply before the rule says anything
        self.seen = dict.fromkeys(workers, 0)  # of members and of those that left
        self.last_step = dict.fromkeys(workers, 0)  # number ever given out
        self.clock = dict.fromkeys(workers, 0)
        self.slowest = 0
        self.last: dict[int, PushId] = {}
        self.newest: dict[int, PushId] = {}  # unanswered push that the answer's view may contain

    # Events. Each says whether the rule, or the ledger for it, may answer.

    def start(self) -> bool:
        for worker in self.jobs:
            self._give(worker, 0.0)
        return True

    def push(self, push: Push) -> bool:
        worker, step = push.id
        if worker not in self.jobs or step <= self.seen[worker]:
            return False
        if self.pipeline:
            return self._push_ahead(push)
        job, *queued = self.jobs[worker]
        assert (job.id, job.version) == (push.id, push.base)
        self.jobs[worker] = tuple(queued)
        self.seen[worker] = step
        self.held[push.id] = push.base
        self.alive.add(push.id)
        if self.own_views:
            self.newest[worker] = push.id
        if job.own is not None:
            self.own[push.id] = job.own
        self.clock[worker] += 1
        self.unanswered[worker] = None
        if queued and not self.done:
            self.resend = worker
        return True

    def asked(self, worker: int, step: int) -> bool:
        if worker not in self.jobs or worker in self.unanswered:
            return False
        if self.pipeline and self.given[worker]:
            self.resend = worker
            return True
        if self.jobs[worker]:
            if step < self.jobs[worker][0].id.step:
                self.resend = worker
                return True
            self._lose(worker)
            self.seen[worker] = self.last_step[worker] = step
        self.unanswered[worker] = None
        return True

    def joined(self, worker: int, step: int = 0) -> bool:
        if worker in self.jobs:
            return False
        self.jobs[worker] = ()
        self.seen.setdefault(worker, 0)
        self.last_step.setdefault(worker, 0)
        self.seen[worker] = self.last_step[worker] = max(self.last_step[worker], step)
        self.clock[worker] = self.slowest
        self.given[worker] = self.arrived[worker] = ()
        return True

    def left(self, worker: int) -> bool:
        if worker not in self.jobs:
            return False
        self._lose(worker)
        self.seen[worker] = self.last_step[worker]
        if self.pipeline and self.given[worker]:  # all that it may have sent
            self.seen[worker] = self.last_step[worker] = self.given[worker][-1].told + self.pipeline + 1
        self.given[worker] = self.arrived[worker] = ()
        self.unanswered.pop(worker, None)
        self.last.pop(worker, None)
        self.newest.pop(worker, None)
        del self.jobs[worker], self.clock[worker]
        return True

    def woke(self, now: float) -> bool:
        if self.wake is None or now < self.wake:
            return False
        self.wake = None
        return True

    def finish(self) -> bool:
        if self.done:
            return False
        self.done, self.wake = True, None
        self.closed += self.debts
        self.debts.clear()
        return True

    # Actions.

    def step(self, step: Step) -> None:
        assert step.terms and 0 < step.share <= 1
        assert all(isfinite(term.weight) for term in step.terms)
        combined = PushId(0, self.version + 1)
        for term in step.terms:
            assert term.push in self.alive or term.push == ZERO or (term.push == combined and term.stands_for), term
        if step.apply == "amend":
            self._amend(step)
        else:
            self._use(step)
            if combined in {owed.stand_in for owed in self.debts.values()}:
                self.alive.add(combined)

    def applied(self, version: int, moved: float) -> None:
        assert version == self.version + 1
        self.version, self.travelled = version, self.travelled + moved

    def drop(self, drop: Drop) -> None:
        if drop.push in self.debts:
            self._close(drop.push)
        self._settle(drop.push)

    def release(self, worker: int, own: float) -> Job | None:
        """The job that the worker is sent; None if it was queued."""
        if self.resend is not None:
            assert worker == self.resend, f"worker {self.resend} must be answered first"
            self.resend = None
            if self.pipeline:
                return self.jobs[worker][0]
            self.unanswered.pop(worker, None)
            return self.jobs[worker][0]
        if worker in self.unanswered:
            del self.unanswered[worker]
            given = self._give(worker, own)
            self.newest.pop(worker, None)
            return given
        assert 0 < len(self.jobs[worker]) < self.most_jobs, f"invariant 2: worker {worker} has nothing to be answered"
        self._give(worker, own)
        return None

    def freed(self, pushes: tuple[PushId, ...]) -> None:
        for push in pushes:
            assert push in self.alive, f"{push} is freed twice, or never arrived"
            self.alive.remove(push)

    # What must be so between any two actions, and after an event.

    def kept(self) -> set[PushId]:
        """Payloads that outlive their push being used or dropped, and why."""
        by_views = {job.own for jobs in self.jobs.values() for job in jobs if job.own is not None}
        by_debts = {owed.stand_in for owed in self.debts.values()} - {ZERO}
        ahead = {push for views in self.contained.values() for push in views}
        for worker in self.jobs:
            ahead.update(self._may_contain(worker))
        return by_views | by_debts | ahead | {*self.own.values(), *self.last.values(), *self.newest.values()}

    def check_between(self, ledger: Ledger) -> None:
        kept = self.kept()
        assert self.alive == self.held.keys() | kept
        assert {push for push in self.alive if ledger.is_kept(push)} == kept
        assert list(ledger.held) == list(self.held)
        assert list(ledger.waiting) == list(self.unanswered)

    def check(self, ledger: Ledger) -> None:
        self.check_between(ledger)
        assert self.resend is None, f"worker {self.resend} was not answered"
        under_way = {job.id: job for jobs in self.jobs.values() for job in jobs}
        if self.jobs and not self.done:
            going = self.pipeline and any(self.jobs.values())
            assert len(self.unanswered) < len(self.jobs) or self.wake is not None or going, "invariant 3: all wait"
        if self.jobs:
            self.slowest = max(self.slowest, min(self.clock.values()))
        assert set(ledger.workers) == set(self.jobs)
        assert {worker: ledger.clock(worker) for worker in ledger.workers} == self.clock
        assert (ledger.version, ledger.travelled, ledger.wake_at) == (self.version, self.travelled, self.wake)
        assert ledger.slowest == self.slowest
        assert ledger.computing == len(self.jobs) - len(self.unanswered)
        assert {push: (view.version, view.own_push) for push, view in ledger.views.items()} == {
            push: (job.version, job.own) for push, job in under_way.items()
        }
        assert {w: list(ledger.workers[w].pipeline_state.given) for w in self.jobs} == {
            w: [given.told for given in self.given[w]] for w in self.jobs
        }
        assert {push: seen for push in ledger.held if (seen := ledger.contained(push))} == {
            **{push: (own,) for push, own in self.own.items()},
            **{push: seen for push, seen in self.contained.items() if seen},
        }
        assert {push: debt.stand_in for push, debt in ledger.debts.items()} == {
            push: owed.stand_in for push, owed in self.debts.items()
        }
        assert {w: last for w in ledger.workers if (last := ledger.last(w))} == self.last
        oldest = ledger.oldest_view
        assert (oldest is None) == (not under_way)
        if oldest is not None:
            assert under_way[oldest].travelled == min(job.travelled for job in under_way.values())

    def measured(self, push: PushId, distance: float) -> None:
        self.jobs[push.worker] = tuple(
            job._replace(travelled=self.travelled - distance) if job.id == push else job
            for job in self.jobs[push.worker]
        )

    def _use(self, step: Step) -> None:
        total = 1.0 if step.combine == "sum" else sum(term.weight for term in step.terms)
        used: list[PushId] = []
        for term in step.terms:
            if term.stands_for is not None:
                assert term.stands_for in {job.id for jobs in self.jobs.values() for job in jobs}
                assert term.stands_for not in self.debts
                self.debts[term.stands_for] = Owed(term.push, term.weight / total)
            elif term.push in self.held:
                assert term.push not in self.debts
                used.append(term.push)
            else:
                assert term.push in self.kept(), f"invariant 1: {term.push} is used again"
        assert len(used) == len(set(used))
        for push in used:
            self._settle(push)
            if self.keeps_last and push.worker in self.jobs:
                self.last[push.worker] = push

    def _amend(self, step: Step) -> None:
        missing = step.terms[0].push
        owed = self.debts.pop(missing)
        late, back = step.terms
        assert (late.push, back.push) == (missing, owed.stand_in)
        assert isclose(owed.part + back.weight, 0, abs_tol=1e-15) and late.weight == owed.part, "invariant 4"
        assert (step.combine, step.share) == ("sum", 1)
        self._settle(missing)

    def _settle(self, push: PushId) -> None:
        assert push in self.held, f"invariant 1: {push} is settled but not held"
        del self.held[push]
        self.own.pop(push, None)
        self.contained.pop(push, None)

    def _push_ahead(self, push: Push) -> bool:
        """A push of a worker that runs ahead: it says how many of its predecessors its reply did not answer."""
        worker, step = push.id
        assert [job.id for job in self.jobs[worker]] == [push.id], "it was not to go on without a reply"
        newer = [given for given in self.given[worker] if given.told >= step - 1 - push.ahead]
        assert (newer[0].told, newer[0].version) == (step - 1 - push.ahead, push.base)
        assert push.base >= self.jobs[worker][0].version, "a view under way is the oldest that it can be"
        self.given[worker] = tuple(newer)
        self.contained[push.id] = tuple(self._may_contain(worker))
        self.arrived[worker] += (push.id,)
        self.seen[worker], self.jobs[worker] = step, ()
        self.held[push.id] = push.base
        self.alive.add(push.id)
        self.clock[worker] += 1
        self.unanswered[worker] = None
        if step - newer[-1].told <= self.pipeline:
            self._go_on(worker)
        return True

    def _answer_ahead(self, worker: int) -> Job:
        flying = tuple(push for push in self.arrived[worker] if push in self.held)
        new = Given(self.seen[worker], self.version, flying, self.travelled)
        self.given[worker] = (*self.given[worker], new) if self.jobs[worker] else (new,)
        if not self.jobs[worker]:
            self._go_on(worker)
        return self.jobs[worker][0]

    def _go_on(self, worker: int) -> None:
        oldest, step = self.given[worker][0], self.seen[worker] + 1
        self.last_step[worker] = step
        self.jobs[worker] = (Job(PushId(worker, step), oldest.version, None, oldest.travelled),)

    def _may_contain(self, worker: int) -> list[PushId]:
        """What a view of the worker may contain of its own: all that its oldest possible reply lacks."""
        if not self.given[worker]:
            return []
        oldest = self.given[worker][0]
        return [push for push in self.arrived[worker] if push.step > oldest.told or push in oldest.flying]

    def _give(self, worker: int, own: float) -> Job:
        own_push = PushId(worker, self.seen[worker]) if own else None
        assert own_push is None or own_push in self.alive
        if self.pipeline:
            assert not own
            return self._answer_ahead(worker)
        self.last_step[worker] += 1
        job = Job(PushId(worker, self.last_step[worker]), self.version, own_push, self.travelled)
        self.jobs[worker] += (job,)
        return job

    def _lose(self, worker: int) -> None:
        for job in self.jobs[worker]:
            if job.id in self.debts:
                self._close(job.id)
        self.jobs[worker] = ()

    def _close(self, push: PushId) -> None:
        del self.debts[push]
        self.closed.append(push)
