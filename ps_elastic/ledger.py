"""What the server remembers about every push, view and debt, and the laws that hold of it.

`decide` is the only writer: it notes an event, asks the rule, and lets each action take effect as
the rule yields it. The laws, checked as it runs (a breach raises PolicyError naming rule and push):

1. a push is used or dropped exactly once; only one kept by a debt, by `own` or by `keeps_last` may be used again;
2. at most one reply per unanswered push or ask;
3. never stalled: if all live workers wait and no Wake is pending, `Stalled` says who waits and what is held;
4. for every debt the stand-in and the later terms sum to what was owed, or it is closed by a drop, a
   departure or an Asked, and logged;
5. the same events give the same actions, byte for byte (so nothing here depends on a clock, a set or an address).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import NamedTuple

from ps_elastic.errors import PolicyError, Stalled, WireError
from ps_elastic.events import (
    ZERO,
    Applied,
    Drop,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
    Term,
    Wake,
)
from ps_elastic.runahead import Course, Given


class View(NamedTuple):
    """What a push under way is computed on: the model of `version`, plus c * own * `own_push` if own is not 0.

    Of a worker that runs ahead: the oldest that it may be computing on, until its push says which it was.
    """

    version: int
    own: float
    own_push: PushId | None
    travelled: float  # of the ledger when it was sent, or as corrected by a Measured
    sent_at: float  # seconds


class Debt(NamedTuple):
    """A missing push that `stand_in` replaced, with `part` = its share of the weights of that Step."""

    stand_in: PushId
    part: float
    version: int  # the Step that owes it made this version


class Seat:
    """A worker: the last step seen of it, the last assigned to it, and how many pushes it completed."""

    __slots__ = ("assigned", "clock", "course", "last", "newest", "seen")

    def __init__(self) -> None:
        self.seen = self.assigned = self.clock = 0
        self.last: PushId | None = None  # its last used push, where the rule keeps it
        self.newest: PushId | None = None  # its push that waits for a reply, where the reply may contain it
        self.course = Course()  # where it may run ahead


class Ledger:
    """The server's memory of headers. Rules read the public attributes; only `decide` writes.

    workers, waiting: live workers, and those with nothing to do until released, in a fixed order. A worker that may
    run on with `pipeline` pushes unanswered waits from the first of them on.
    held: pushes neither used nor dropped, in order of arrival. views: what each push under way is computed on.
    version: updates so far. travelled: sum of `moved`, so travelled - view.travelled bounds
    ||x - v|| / (largest alpha since). now: seconds. debts: missing push -> Debt. bucket: (index, count) of the part
    of the model that this ledger is of, where the rule is layerwise; None: of the whole.
    """

    def __init__(
        self,
        workers: Iterable[int],
        *,
        jobs: int = 1,
        keeps_last: bool = False,
        own_views: bool = False,
        pipeline: int = 0,
        log: Callable[[str], None] | None = None,
        bucket: tuple[int, int] | None = None,
    ) -> None:
        self.workers: dict[int, Seat] = {worker: Seat() for worker in workers}
        self.waiting: dict[int, None] = {}
        self.held: dict[PushId, Push] = {}
        self.views: dict[PushId, View] = {}
        self.debts: dict[PushId, Debt] = {}
        self.version, self.now, self.travelled = 0, 0.0, 0.0
        self.applied = Applied(0)  # the last one
        self.slowest = 0  # least clock of the live workers
        self.bucket, self.layerwise = bucket or (0, 1), bucket is not None  # index, count
        self.jobs, self.keeps_last, self.own_views, self.log = jobs, keeps_last, own_views, log
        self.pipeline = pipeline
        self.started = self.done = False
        self.wake_at: float | None = None
        self._refs: dict[PushId, int] = {}
        self._own: dict[PushId, tuple[PushId, ...]] = {}  # held push -> the pushes its view contains
        self._gone: dict[int, Seat] = {}  # a worker that comes back must not repeat a PushId
        self._at_clock = {0: len(self.workers)}  # clock -> how many live workers stand at it
        # Views in the order sent, which is the order of `travelled`; a plain dict finds its first key in O(p).
        self._unmeasured: OrderedDict[PushId, float] = OrderedDict()
        self._measured: list[tuple[float, PushId]] = []  # heap, entries may be stale
        self._owed: Step | list[PushId] | None = None  # what the server has still to answer
        self.freed: list[PushId] = []  # since last taken
        self.closed: list[PushId] = []  # debts closed unpaid, since last taken
        self.texts: list[str] = []  # of the actions and answers of the current event

    def clock(self, worker: int) -> int:
        """Pushes completed by `worker`; a joiner starts at `slowest`."""
        return self.workers[worker].clock

    @property
    def computing(self) -> int:
        """How many live workers are not waiting."""
        return len(self.workers) - len(self.waiting)

    def is_kept(self, push: PushId) -> bool:
        """Whether a debt, a view or `keeps_last` still needs the payload of `push`."""
        return push in self._refs

    def contained(self, push: PushId) -> tuple[PushId, ...]:
        """The pushes of its own worker that the view of `push`, which is held, contains, in the order pushed."""
        return self._own.get(push, ())

    def told(self, worker: int) -> tuple[int, Given]:
        """The last step of `worker` that a reply answered, and that reply, where workers run ahead."""
        course = self.workers[worker].course
        return course.told, course.given[course.told]

    def last(self, worker: int) -> PushId | None:
        """The last push of `worker` that was used, where the rule keeps it."""
        return self.workers[worker].last

    @property
    def oldest_view(self) -> PushId | None:
        """The push under way whose view is the farthest behind; None if nothing is under way. O(1) amortised."""
        heap = self._measured
        while heap and ((view := self.views.get(heap[0][1])) is None or view.travelled != heap[0][0]):
            heappop(heap)
        first = next(iter(self._unmeasured), None)
        if heap and (first is None or heap[0][0] < self._unmeasured[first]):
            return heap[0][1]
        return first

    def reach(self, norm: float, share: float) -> float:
        """Upper bound on the next Step's `moved`, for G = sum of weight x payload_norm over total weight = `norm`.

        share (coast + gain G) + rounding, with coast, gain and rounding of the last Applied.
        """
        return share * (self.applied.coast + self.applied.gain * norm) + self.applied.rounding

    def amend(self, push: PushId) -> Step:
        """The Step that repays the debt on `push`: + part x push - part x its stand-in."""
        debt = self.debts[push]
        return Step((Term(push, debt.part), Term(debt.stand_in, -debt.part)), combine="sum", apply="amend")

    # What follows is for `decide` alone: events first, then actions, then payloads that must live on.

    def note_push(self, push: Push) -> str | None:
        """Take the push in; or say why it is ignored."""
        worker, step = push.id
        seat = self.workers.get(worker)
        if seat is None:
            return "departed"
        if step <= seat.seen:
            return "duplicate"
        if push.id not in self.views:
            raise WireError(
                f"push {tuple(push.id)} of worker {worker} was never assigned; expected step {seat.seen + 1}"
            )
        if self.pipeline:
            self._note_ahead(push, seat)
            return None
        if push.base != (version := self.views[push.id].version):
            raise WireError(f"push {tuple(push.id)} says base {push.base}, but its view was version {version}")
        for lost in range(seat.seen + 1, step):
            self._forget(PushId(worker, lost))
        seat.seen = step
        view = self._take_view(push.id)
        if view.own_push is not None:
            self._own[push.id] = (view.own_push,)
        self.held[push.id] = push
        self.waiting[worker] = None
        if self.own_views:
            seat.newest = push.id
            self._ref(push.id)
        self._advance(seat)
        return None

    def note_asked(self, worker: int, step: int) -> str | None:
        """Return "" if the rule must be asked, "again" if the last reply must be sent again, else why it is ignored."""
        seat = self.workers.get(worker)
        if seat is None:
            return "departed"
        if worker in self.waiting:
            return "waiting"
        if step > (seat.seen if seat.course.given else seat.assigned):  # nothing of one that runs ahead gets lost
            raise WireError(f"worker {worker} asks after step {step}; it was assigned {seat.assigned}")
        if seat.assigned > seat.seen:  # else it has just joined
            if step <= seat.seen:  # less than `seen` from one that came back, and does not know its earlier steps
                return "again"
            for lost in range(seat.seen + 1, seat.assigned + 1):
                self._forget(PushId(worker, lost))
            seat.seen = seat.assigned = step
        self.waiting[worker] = None
        return ""

    def note_joined(self, worker: int, step: int) -> str | None:
        if worker in self.workers:
            return "member"
        seat = self._gone.pop(worker, None) or Seat()
        seat.clock = self.slowest
        seat.seen = seat.assigned = max(seat.assigned, step)
        seat.course = Course(seat.seen)
        self.workers[worker] = seat
        self._at_clock[seat.clock] = self._at_clock.get(seat.clock, 0) + 1
        return None

    def note_left(self, worker: int) -> str | None:
        seat = self.workers.pop(worker, None)
        if seat is None:
            return "departed"
        self._gone[worker] = seat
        self.waiting.pop(worker, None)
        for lost in range(seat.seen + 1, seat.assigned + 1):
            self._forget(PushId(worker, lost))
        seat.seen = seat.assigned
        if self.pipeline:
            self._end_course(seat)
        for kept in (seat.last, seat.newest):
            if kept is not None:
                self._unref(kept)
        seat.last = seat.newest = None
        self._at_clock[seat.clock] -= 1
        self._settle_slowest()
        return None

    def note_applied(self, answer: Applied) -> None:
        if not self.started:
            self.started, self.applied = True, answer
            for worker in self.workers:
                self._assign(worker, 0.0)
            return
        if not isinstance(self._owed, Step):
            raise PolicyError(f"version {answer.version} was applied, but no Step awaits it")
        if answer.version != self.version + 1:
            raise PolicyError(f"version {answer.version} was applied after version {self.version}")
        self._owed = None
        self.version, self.applied = answer.version, answer
        self.travelled += answer.moved

    def note_measured(self, answer: Measured) -> None:
        if not isinstance(self._owed, list) or answer.push not in self._owed:
            raise PolicyError(f"view {tuple(answer.push)} was measured, but no Measure asked for it")
        self._owed.remove(answer.push)
        view = self.views[answer.push]._replace(travelled=self.travelled - answer.distance)
        self.views[answer.push] = view
        self._unmeasured.pop(answer.push, None)
        heappush(self._measured, (view.travelled, answer.push))

    def check_answered(self) -> None:
        if self._owed:
            raise PolicyError(f"the server left {self._owed} unanswered")

    def take_step(self, step: Step) -> None:
        if not step.terms:
            raise PolicyError("an empty Step")
        if not 0 < step.share <= 1:
            raise PolicyError(f"share {step.share} of a Step with {tuple(step.terms[0].push)}: expected 0 < share <= 1")
        if step.apply == "amend":
            self._take_amend(step)
        else:
            self._take_terms(step)
        self._owed = step

    def take_drop(self, drop: Drop) -> None:
        if drop.push not in self.held:
            raise PolicyError(f"law 1: push {tuple(drop.push)} is dropped ({drop.reason}) but not held")
        if drop.push in self.debts:
            self._close_debt(drop.push)
        self._let_go(drop.push)

    def take_release(self, release: Release) -> None:
        if not math.isfinite(release.own):
            raise PolicyError(f"a Release with own = {release.own}")
        for worker in release.workers:
            seat = self.workers.get(worker)
            if seat is None:
                raise PolicyError(f"law 2: worker {worker} is released but not a member")
            if worker in self.waiting:
                del self.waiting[worker]
            elif not 0 < seat.assigned - seat.seen < self.jobs:
                raise PolicyError(
                    f"law 2: worker {worker} is released but does not wait (its step {seat.assigned} is under way, "
                    "or it has not asked yet)"
                )
            self._assign(worker, release.own)
            if seat.newest is not None:
                self._unref(seat.newest)
                seat.newest = None

    def take_wake(self, wake: Wake) -> None:
        if not math.isfinite(wake.at):
            raise PolicyError(f"a Wake at {wake.at}")
        self.wake_at = wake.at

    def take_measure(self, measure: Measure) -> None:
        for push in measure.pushes:
            if push not in self.views:
                raise PolicyError(f"view {tuple(push)} is to be measured but not under way")
        self._owed = list(measure.pushes)

    def start_job(self, worker: int) -> bool:
        """Let a worker that waits begin the job queued for it, if there is one."""
        seat = self.workers[worker]
        if seat.assigned == seat.seen:
            return False
        del self.waiting[worker]
        job = PushId(worker, seat.seen + 1)
        self.views[job] = self.views[job]._replace(sent_at=self.now)
        return True

    def finish(self) -> tuple[PushId, ...]:
        """Enter the end of the run; return the pushes to be dropped."""
        self.done, self.wake_at = True, None
        for push in tuple(self.debts):
            self._close_debt(push)
        return tuple(self.held)

    def check_stalled(self) -> None:
        stuck = len(self.waiting) == len(self.workers) and self.wake_at is None and not self.views
        if stuck and self.workers and self.started and not self.done:
            held = ", ".join(str(tuple(push)) for push in self.held) or "nothing"
            raise Stalled(f"stalled at version {self.version}: workers {list(self.waiting)} all wait; held: {held}")

    def _take_terms(self, step: Step) -> None:
        total = sum([term.weight for term in step.terms])
        if not (math.isfinite(total) and (total > 0 or step.combine == "sum")):
            raise PolicyError(f"the weights of a Step sum to {total}")
        if step.combine == "sum":
            total = 1.0
        used: dict[PushId, None] = {}
        for term in step.terms:
            if term.stands_for is not None:
                self._open_debt(term, term.weight / total)
            elif term.push in self.held and term.push not in used:
                if term.push in self.debts:
                    raise PolicyError(f"law 4: push {tuple(term.push)} is owed; repay it with ledger.amend")
                used[term.push] = None
            elif term.push in used or term.push not in self._refs:
                raise PolicyError(f"law 1: push {tuple(term.push)} is used but neither held nor kept")
        for push in used:
            if self.keeps_last and (seat := self.workers.get(push.worker)) is not None:
                previous, seat.last = seat.last, push
                self._ref(push)
                if previous is not None:
                    self._unref(previous)
            self._let_go(push)

    def _open_debt(self, term: Term, part: float) -> None:
        missing, stand_in = term.stands_for, term.push
        if missing is None or missing not in self.views or missing in self.debts:
            raise PolicyError(f"law 4: {stand_in} cannot stand for {missing}, which is not under way or already owed")
        alive = stand_in in self.held or stand_in in self._refs
        if not alive and stand_in not in (ZERO, PushId(0, self.version + 1)):
            raise PolicyError(f"law 1: push {tuple(stand_in)} is a stand-in but neither held nor kept")
        self.debts[missing] = Debt(stand_in, part, self.version + 1)
        self._ref(stand_in)

    def _take_amend(self, step: Step) -> None:
        missing = step.terms[0].push
        if missing not in self.held or missing not in self.debts or step != self.amend(missing):
            raise PolicyError(f"law 4: the amend of {tuple(missing)} is not what its debt owes")
        self._unref(self.debts.pop(missing).stand_in)
        self._let_go(missing)

    def _close_debt(self, push: PushId) -> None:
        self._unref(self.debts.pop(push).stand_in)
        self.closed.append(push)

    def _assign(self, worker: int, own: float) -> None:
        seat = self.workers[worker]
        if self.pipeline:
            self._answer_ahead(worker, seat, own)
            return
        own_push = PushId(worker, seat.seen) if own else None
        if own_push is not None:
            if own_push not in self.held and own_push not in self._refs:
                raise PolicyError(f"law 1: the view of worker {worker} needs its push {tuple(own_push)}, which is gone")
            self._ref(own_push)
        seat.assigned += 1
        push = PushId(worker, seat.assigned)
        self.views[push] = View(self.version, own, own_push, self.travelled, self.now)
        self._unmeasured[push] = self.travelled

    def _note_ahead(self, push: Push, seat: Seat) -> None:
        """A push of a worker that runs ahead: its header says which reply it was computed on."""
        course, (worker, step) = seat.course, push.id
        reply = course.named(push, self.pipeline)
        self._take_view(push.id)
        for unneeded in course.leave_behind(reply):
            self._unref(unneeded)
        if course.flying:
            self._own[push.id] = tuple(course.flying)
            for contained in course.flying:
                self._ref(contained)
        course.flying[push.id] = None
        self._ref(push.id)
        seat.seen = step
        self.held[push.id] = push
        self.waiting[worker] = None
        if step - course.told <= self.pipeline:
            self._send_on(worker, seat, course.given[reply])
        self._advance(seat)

    def _answer_ahead(self, worker: int, seat: Seat, own: float) -> None:
        """A reply: the worker may be computing already, on an older one; else this is what it goes on with."""
        if own:
            raise PolicyError(f"worker {worker} is released with own = {own}, but it re-applies its own pushes itself")
        course = seat.course
        course.told = seat.seen
        given = Given(self.version, tuple([p for p in course.flying if p in self.held]), self.travelled, self.now)
        course.given[seat.seen] = given
        if seat.assigned == seat.seen:
            for unneeded in course.leave_behind(seat.seen):
                self._unref(unneeded)
            self._send_on(worker, seat, given)

    def _send_on(self, worker: int, seat: Seat, oldest: Given) -> None:
        """Let the next push be under way; no reply older than `oldest` is its view."""
        seat.assigned = seat.seen + 1
        push = PushId(worker, seat.assigned)
        self.views[push] = View(oldest.version, 0.0, None, oldest.travelled, oldest.sent_at)
        heappush(self._measured, (oldest.travelled, push))  # views come in no order here

    def _end_course(self, seat: Seat) -> None:
        """The worker is gone; what it has sent may still come, and is not taken in."""
        course = seat.course
        if course.given:
            seat.seen = seat.assigned = course.told + self.pipeline + 1
        for unneeded in course.flying:
            self._unref(unneeded)
        seat.course = Course()

    def _take_view(self, push: PushId) -> View:
        self._unmeasured.pop(push, None)
        return self.views.pop(push)

    def _forget(self, push: PushId) -> None:
        """Nothing will come of this push: its view goes, and what it owed is closed."""
        own_push = self._take_view(push).own_push
        if own_push is not None:
            self._unref(own_push)
        if push in self.debts:
            self._close_debt(push)

    def _let_go(self, push: PushId) -> None:
        del self.held[push]
        for own_push in self._own.pop(push, ()):
            self._unref(own_push)
        if push not in self._refs:
            self.freed.append(push)

    def _ref(self, push: PushId) -> None:
        if push != ZERO:
            self._refs[push] = self._refs.get(push, 0) + 1

    def _unref(self, push: PushId) -> None:
        if push == ZERO:
            return
        self._refs[push] -= 1
        if not self._refs[push]:
            del self._refs[push]
            if push not in self.held:
                self.freed.append(push)

    def _advance(self, seat: Seat) -> None:
        at = self._at_clock
        at[seat.clock] -= 1
        seat.clock += 1
        at[seat.clock] = at.get(seat.clock, 0) + 1
        self._settle_slowest()

    def _settle_slowest(self) -> None:
        at = self._at_clock
        while self.workers and not at.get(self.slowest):
            at.pop(self.slowest, None)
            self.slowest += 1
