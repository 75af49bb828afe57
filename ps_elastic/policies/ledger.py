"""What the server remembers about every push, worker's copy and late gradient, and the invariants of that.

decide.py is the only writer: it notes an event (transitions.py), asks the policy, and lets each action take effect
(actions.py) as the policy yields it. The invariants, checked as it runs (PolicyError names policy and push):

1. a push is used or dropped exactly once; only one kept by a debt, by `own` or by `keeps_last` may be used again;
2. at most one reply per unanswered push or retry request;
3. never stalled: if all live workers wait and no Wake is pending, `Stalled` says who waits and what is kept;
4. placeholder and later terms sum to the late gradient, or a drop, a departure or an Asked closes its debt, logged;
5. the same events give the same actions, byte for byte (so nothing here depends on a clock, a set or an address).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Any, NamedTuple

from ps_elastic.errors import PolicyError, WireError
from ps_elastic.policies.events import ZERO, Action, Applied, Measured, Push, PushId, Step, Term, Told


class View(NamedTuple):
    """The worker's copy of the model that a push under way is computed on.

    It is the model of `version`, plus c * own * `own_push` if own is not 0 (see `Release`). Of a worker that runs
    ahead: the oldest that it may be computing on, until its push says which it was.
    """

    version: int
    own: float
    own_push: PushId | None
    travelled: float  # of the ledger when it was sent, or as corrected by a Measured
    sent_at: float  # seconds


class Debt(NamedTuple):
    """A late gradient: `stand_in` replaced it as placeholder, with the fraction `part` of the weights of that Step."""

    stand_in: PushId
    part: float
    version: int  # made by that Step


class Member:
    """A worker: the last step seen of it, the last assigned to it, and how many pushes it completed."""

    __slots__ = ("assigned", "clock", "due", "last", "newest", "pipeline_state", "seen")

    def __init__(self) -> None:
        self.seen = self.assigned = self.clock = 0
        self.due = ZERO  # its push under way, or the first of several
        self.last: PushId | None = None  # its last used push, if the policy keeps it
        self.newest: PushId | None = None  # its push that waits for a reply, where the reply may contain it
        self.pipeline_state = PipelineState()  # where it may run ahead


class Ledger:
    """The server's memory of who sent what and who waits. Policies read the public attributes; only `decide` writes.

    - `workers`: keys are the live workers, 1..p
    - `waiting`: keys are those that wait for a reply, in a fixed order; with `pipeline`, from the first unanswered on
    - `held`: PushId -> Push, kept for later: neither used nor dropped, in order of arrival
    - `views`: PushId of each push under way -> View: the worker's copy, its `version`, `travelled`, `sent_at` (s)
    - `version`: number of server steps so far
    - `travelled`: sum of step length / alpha; ||x - v|| <= (largest alpha since) x (`travelled` - `view.travelled`)
    - `now`: seconds since the start of the run
    - `debts`: PushId of each late gradient -> Debt, the placeholder that a Step used for it
    - `slowest`: the least `clock` of the live workers; `bucket`: (index, count) if layerwise, else (0, 1)
    """

    def __init__(
        self,
        workers: Iterable[int],
        *,
        jobs: int = 1,
        keeps_last: bool = False,
        own_views: bool = False,
        pipeline: int = 0,
        log: Callable[[Told], None] | None = None,
        bucket: tuple[int, int] | None = None,
    ) -> None:
        self.workers: dict[int, Member] = {worker: Member() for worker in workers}
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
        # What follows is for decide.py and what it calls alone.
        self.containing: dict[PushId, tuple[PushId, ...]] = {}  # held push -> the pushes its copy contains
        self.gone: dict[int, Member] = {}  # a worker that comes back must not repeat a PushId
        self.at_clock = {0: len(self.workers)}  # clock -> how many live workers stand at it
        # Once a policy has asked for the oldest: views in the order sent, which is that of `travelled`. A plain dict
        # finds its first key in O(p).
        self.unmeasured: OrderedDict[PushId, None] | None = None
        self.measured: list[tuple[float, PushId]] = []  # heap, entries may be stale
        self.owed: Step | list[PushId] | None = None  # what the server has still to answer
        self.freed: list[PushId] = []  # payloads that nobody needs any more, until who keeps them has emptied this
        self.closed: list[PushId] = []  # debts never settled, since last taken
        self.turn: Any = None  # (policy, event, its time, why it is ignored): what is going on
        self.acts: list[Action | Applied | Measured] = []  # and answers, of the current event: for the log

    def clock(self, worker: int) -> int:
        """Pushes completed by `worker`; a joiner starts at `slowest`. Raises KeyError if it is no live worker."""
        return self.workers[worker].clock

    @property
    def computing(self) -> int:
        """How many live workers are not waiting."""
        return len(self.workers) - len(self.waiting)

    def is_kept(self, push: PushId) -> bool:
        """Whether a debt, a worker's copy or `keeps_last` still needs the payload of `push`."""
        return push in self._refs

    def contained(self, push: PushId) -> tuple[PushId, ...]:
        """The pushes of its own worker that the copy behind `push`, which is held, contains, in the order pushed."""
        return self.containing.get(push, ())

    def told(self, worker: int) -> tuple[int, PipelinedReply]:
        """The last step of `worker` that a reply answered, and that reply, where workers run ahead."""
        pipeline_state = self.workers[worker].pipeline_state
        return pipeline_state.told, pipeline_state.given[pipeline_state.told]

    def last(self, worker: int) -> PushId | None:
        """The last push of `worker` that was used, if the policy has `keeps_last`."""
        return self.workers[worker].last

    @property
    def oldest_view(self) -> PushId | None:
        """The push under way whose copy is the farthest behind; None if nothing is under way. O(1) amortised."""
        heap = self.measured
        while heap and ((view := self.views.get(heap[0][1])) is None or view.travelled != heap[0][0]):
            heappop(heap)
        if self.unmeasured is None:
            known = {push for travelled, push in heap if push in self.views and self.views[push].travelled == travelled}
            self.unmeasured = OrderedDict.fromkeys(push for push in self.views if push not in known)
        first = next(iter(self.unmeasured), None)
        if heap and (first is None or heap[0][0] < self.views[first].travelled):
            return heap[0][1]
        return first

    def reach(self, norm: float, share: float) -> float:
        """The largest move of the next Step: share (coast + gain norm) + rounding, bounds its `Applied.moved`.

        norm: (sum of weight x payload_norm) / (sum of weights). The others are of the last Applied.
        """
        return share * (self.applied.coast + self.applied.gain * norm) + self.applied.rounding

    def amend(self, push: PushId) -> Step:
        """The Step that applies `push` late: + part x push - part x its placeholder. KeyError if it has none."""
        debt = self.debts[push]
        return Step((Term(push, debt.part), Term(debt.stand_in, -debt.part)), combine="sum", apply="amend")

    def breach(self, what: str) -> PolicyError:
        """The error of a policy that broke an invariant: which one, and on what event."""
        policy, event, _, _ = self.turn
        return PolicyError(f"policy {type(policy).__name__} on {event}: {what}")

    def unanswered(self) -> PolicyError:
        return self.breach(f"the server left {self.owed} unanswered")

    # What follows is for what decide.py calls alone: copies first, then payloads that must live on.

    def keep_own(self, worker: int, member: Member) -> PushId:
        """The last push of a worker whose next copy contains it."""
        own_push = PushId(worker, member.seen)
        if own_push not in self.held and own_push not in self._refs:
            raise self.breach(f"invariant 1: the model for worker {worker} needs {tuple(own_push)}, which is gone")
        self.ref(own_push)
        return own_push

    def answer_ahead(self, worker: int, member: Member, own: float) -> None:
        """A reply: the worker may be computing already, on an older one; else this is what it goes on with."""
        if own:
            raise self.breach(f"worker {worker} is released with own = {own}, but it re-applies its own pushes itself")
        pipeline_state = member.pipeline_state
        pipeline_state.told = member.seen
        given = PipelinedReply(
            self.version, tuple([p for p in pipeline_state.flying if p in self.held]), self.travelled, self.now
        )
        pipeline_state.given[member.seen] = given
        if member.assigned == member.seen:
            for unneeded in pipeline_state.leave_behind(member.seen):
                self.unref(unneeded)
            self.send_on(worker, member, given)

    def send_on(self, worker: int, member: Member, oldest: PipelinedReply) -> None:
        """Let the next push be under way; it is computed on no older reply than `oldest`."""
        member.assigned = member.seen + 1
        member.due = push = PushId(worker, member.assigned)
        self.views[push] = View(oldest.version, 0.0, None, oldest.travelled, oldest.sent_at)
        heappush(self.measured, (oldest.travelled, push))  # views come in no order here

    def take_view(self, push: PushId) -> View:
        """The copy behind a push that is under way no more."""
        if self.unmeasured is not None:
            self.unmeasured.pop(push, None)
        return self.views.pop(push)

    def forget(self, push: PushId) -> None:
        """Nothing will come of this push: its copy goes, and its debt is closed."""
        own_push = self.take_view(push).own_push
        if own_push is not None:
            self.unref(own_push)
        if push in self.debts:
            self.close_debt(push)

    def close_debt(self, push: PushId) -> None:
        """`push` will not be applied late."""
        self.unref(self.debts.pop(push).stand_in)
        self.closed.append(push)

    def let_go(self, pushes: Iterable[PushId]) -> None:
        """These are used or dropped; the payload of each goes as soon as nothing else needs it."""
        for push in pushes:
            del self.held[push]
            if push in self.containing:
                for own_push in self.containing.pop(push):
                    self.unref(own_push)
            if push not in self._refs:
                self.freed.append(push)

    def ref(self, push: PushId) -> None:
        """One more needs the payload of `push`."""
        if push != ZERO:
            self._refs[push] = self._refs.get(push, 0) + 1

    def unref(self, push: PushId) -> None:
        """One fewer needs it."""
        if push == ZERO:
            return
        self._refs[push] -= 1
        if not self._refs[push]:
            del self._refs[push]
            if push not in self.held:
                self.freed.append(push)


class PipelinedReply(NamedTuple):
    """A reply to a worker: its model, and the pushes that were here by then and are not in it yet."""

    version: int
    flying: tuple[PushId, ...]
    travelled: float  # of the ledger when it was given
    sent_at: float  # seconds


class PipelineState:
    """One worker's replies, from the one that its last push named on, and its pushes that its copies may contain.

    With `pipeline: k` a worker computes push s as long as at most k of its earlier pushes are unanswered. Its copy is
    the model of the last reply it took in, less what it re-applies to it: every push of its own that this model does
    not contain. A reply is named by the last push r that was here when it was given; missing in its model are those
    after r, and those up to r that it calls `flying`. A push says by `ahead` = s - 1 - r which reply it was computed
    on. Channels lose nothing and keep the order.
    """

    __slots__ = ("flying", "given", "told")

    def __init__(self, told: int = 0) -> None:
        self.told = told  # the last push that a reply answered
        self.given: dict[int, PipelinedReply] = {}  # by what `told` was then, oldest first
        self.flying: dict[PushId, None] = {}  # in the order pushed

    def copy(self) -> PipelineState:
        new = PipelineState(self.told)
        new.given, new.flying = self.given.copy(), self.flying.copy()
        return new

    def named(self, push: Push, pipeline: int) -> int:
        """The reply that `push` was computed on. Raises WireError where it cannot have been."""
        reply = push.id.step - 1 - push.ahead
        given = self.given.get(reply)
        if given is None or not 0 <= push.ahead <= pipeline:
            raise WireError(
                f"push {tuple(push.id)} says that {push.ahead} pushes of its worker were not answered; expected at "
                f"most {pipeline}, after one of the replies to {list(self.given)}"
            )
        if push.base != given.version:
            raise WireError(f"push {tuple(push.id)} says base {push.base}, but its model was version {given.version}")
        return reply

    def leave_behind(self, reply: int) -> Iterator[PushId]:
        """No copy will be older than `reply`: the pushes that none will contain any more."""
        for older in [step for step in self.given if step < reply]:
            del self.given[older]
        missing = self.given[reply].flying
        for push in [push for push in self.flying if push.step <= reply and push not in missing]:
            del self.flying[push]
            yield push
