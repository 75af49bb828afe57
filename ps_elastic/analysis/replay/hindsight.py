"""What another policy would have decided on the arrivals of a recorded run: metadata only, no tensors.

The question, exactly. The k-th recorded push of a worker says when that worker had its k-th gradient ready, and with
which norms. Under the other policy

- it arrives then if the worker has been released by then, and at once when the worker is released if not (a
  worker that waits is thought to have computed meanwhile); it never arrives earlier, though a policy that releases
  earlier might have had it earlier. So arrivals are taken as they are, not made again; `simulate` does that;
- its base and its copy are what this policy gave the worker, its norms those recorded, though a gradient at another
  model would have had others;
- a worker that continued without replies (`update.pipeline`) waits for every reply here;
- workers join, leave and lose pushes at the recorded times; a Wake comes when this policy asked for it;
- the run ends where the recorded one did, whatever this policy has used by then; what is kept then is told as `held`.

What only a server with the model can know is replaced by the most that metadata allow. A Step moves the model by
`Motion.applied`, an upper bound for SGD with momentum; weight decay, Adam's scaling and combiners other than mean and
sum are left out of it, and a Step that sets the model moves it by 0. The answer to a Measure is the cumulative step
length. So a policy that keeps copies within a bound keeps pushes at least as long here as it would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ps_elastic.policies.base import Policy
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import (
    ZERO,
    Action,
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
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.reader import RecordedEvent


@dataclass
class Motion:
    """The most that a Step changes the model, by the metadata; and the SGD that it is of."""

    momentum: float = 0.0
    nesterov: bool = False
    alpha: float = 0.0  # the last that the record tells of
    _size: float = 0.0  # upper bound on the norm of the momentum buffer
    _norms: dict[PushId, float] = field(default_factory=dict)

    def arrived(self, push: Push) -> None:
        self._norms[push.id] = push.payload_norm

    def freed(self, pushes: Iterable[PushId]) -> None:
        for push in pushes:
            self._norms.pop(push, None)

    def applied(self, step: Step, version: int) -> Applied:
        """The answer to a Step that makes `version`.

        moved <= share (G + mu m), with Nesterov share ((1 + mu) G + mu^2 m), for G = SUM |weight| norm / total weight
        and m the bound on the momentum before; an amend moves the model by at most G / (1 - mu).
        """
        mu, made = self.momentum, PushId(0, version)
        terms = [term for term in step.terms if term.push != made]
        total = 1.0 if step.combine == "sum" else sum(term.weight for term in terms)
        size = sum(abs(term.weight) * self._norm(term.push) for term in terms) / total
        if len(terms) < len(step.terms):
            self._norms[made] = size
        coast, gain = self._coast()
        moved = {"step": step.share * (coast + gain * size), "amend": size / (1 - mu)}.get(step.apply, 0.0)
        if step.apply != "assign":
            self._size = size + (self._size if step.apply == "amend" else mu * self._size)
        return Applied(version, moved, self.alpha, *self._coast())

    def _coast(self) -> tuple[float, float]:
        mu = self.momentum
        return (mu * mu * self._size, 1 + mu) if self.nesterov else (mu * self._size, 1.0)

    def _norm(self, push: PushId) -> float:
        return 0.0 if push == ZERO else self._norms[push]


class Hindsight:
    """One policy on the arrivals of a run with workers 1..`workers`; `figures` after `run`."""

    def __init__(self, policy: Policy, workers: int, motion: Motion) -> None:
        self.policy, self.tally, self._motion = policy, PolicyTotals(), motion
        self.ledger = Ledger(
            range(1, workers + 1), jobs=policy.jobs, keeps_last=policy.keeps_last, own_views=policy.own_views
        )
        self._backlog: dict[int, deque[Push]] = {worker: deque() for worker in self.ledger.workers}
        self._seen: dict[int, int] = {}  # worker -> its last recorded push that arrived
        self.unsent = 0  # recorded pushes whose worker was not released in time for them

    def run(self, told: Iterable[RecordedEvent]) -> dict[str, Any]:
        """The figures of the policy. Raises PolicyError and Stalled as the policy would have."""
        now = 0.0
        for recorded in told:
            now, done = recorded.t_s, isinstance(recorded.event, Done)
            self._wake(now, at_once=done)
            if done:
                break
            self._motion.alpha = next((a.alpha for a in recorded.answers if isinstance(a, Applied)), self._motion.alpha)
            if not recorded.ignored:
                self._take(recorded.event, now)
        self.tally.end(self.ledger, now)
        unsent = self.unsent + sum(map(len, self._backlog.values()))
        return {**self.tally.figures(), "unsent": unsent}

    def _wake(self, now: float, *, at_once: bool) -> None:
        """Let every Wake due before `now` come, each at its time; at_once: those due at `now` too.

        At equal times pushes come before a Wake; one that asks to be woken in the past is woken after the next event.
        """
        last = -1.0
        while (at := self.ledger.wake_at) is not None and last < at and (at < now or (at_once and at == now)):
            last = at
            self._go_on(self._feed(Woke(), at), at)

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Push(id):
                self._seen[id.worker] = id.step
                self._backlog[id.worker].append(event)
                self._go_on([id.worker], now)
            case Asked(worker, step):
                self._ask(worker, step, now)
            case Woke():  # of the recorded policy
                return
            case Left(worker):
                self.unsent += len(self._backlog.pop(worker))
                self._go_on(self._feed(event, now), now)
            case Joined(worker):
                self._backlog[worker] = deque()
                self._go_on(self._feed(event, now), now)
            case _:
                self._motion.alpha = event.alpha if isinstance(event, Applied) else self._motion.alpha
                self._go_on(self._feed(event, now), now)

    def _ask(self, worker: int, step: int, now: float) -> None:
        """A joiner asks, or one whose push was lost; one whose reply was lost has it again, which changes nothing."""
        member = self.ledger.workers[worker]
        joined = member.assigned == member.seen
        if worker not in self.ledger.waiting and (joined or step > self._seen.get(worker, 0)):
            self._go_on(self._feed(Asked(worker, member.assigned), now), now)

    def _go_on(self, released: Iterable[int], now: float) -> None:
        """Let workers that are released push what they have ready."""
        ready = deque(released)
        while ready:
            worker = ready.popleft()
            if self._backlog[worker] and worker not in self.ledger.waiting:
                ready.extend(self._feed(self._next_push(worker), now))

    def _next_push(self, worker: int) -> Push:
        id = PushId(worker, self.ledger.workers[worker].seen + 1)
        return self._backlog[worker].popleft()._replace(id=id, base=self.ledger.views[id].version, ahead=0)

    def _feed(self, event: Event, now: float) -> list[int]:
        """Let the policy decide; return the workers that it released."""
        released: list[int] = []
        decisions = decide(self.policy, self.ledger, event, now)
        if isinstance(event, Push):
            self._motion.arrived(event)
        self.tally.note(self.ledger, event, now)
        for action, freed in decisions:
            if action is not None:
                self.tally.note(self.ledger, action, now)
                for answer in self._answers(action):
                    list(decide(self.policy, self.ledger, answer, now))
            if isinstance(action, Release):
                released += action.workers
            self._motion.freed(freed)
        return released

    def _answers(self, action: Action) -> Iterator[Applied | Measured]:
        ledger = self.ledger
        if isinstance(action, Step):
            yield self._motion.applied(action, ledger.version + 1)
        elif isinstance(action, Measure):
            for push in action.pushes:
                yield Measured(push, ledger.travelled - ledger.views[push].travelled)


@dataclass
class PolicyTotals:
    """Figures of one policy over one run, up to its Done, from events and actions as `replay_decisions` tells them."""

    pushes: int = 0
    used: int = 0
    dropped: int = 0
    held: int = 0  # at the end
    releases: int = 0  # of a worker each
    versions: int = 0
    wait_s: float = 0.0  # from a worker's push to its release, summed over workers
    present_s: float = 0.0  # that workers were members, summed over them
    _staleness: list[int] = field(default_factory=lambda: [0, 0])  # sum, maximum
    _bases: dict[PushId, int] = field(default_factory=dict)  # of pushes kept
    _late: dict[PushId, int] = field(default_factory=dict)  # missing push -> its staleness in the Step without it
    _since: dict[int, float] = field(default_factory=dict)  # waiting worker -> since when
    _joined: dict[int, float] = field(default_factory=dict)
    _last: tuple[Ledger, float] | None = None
    _ended: bool = False

    def note(self, ledger: Ledger, what: Event | Action, now: float) -> None:
        """An event that the ledger has noted, or an action in effect (a Step before its Applied)."""
        if self._ended:
            return
        self._last = ledger, now
        match what:
            case Push(id, base) if id in ledger.held and id not in self._bases:
                self.pushes += 1
                self._bases[id] = base
                self._since.setdefault(id.worker, now)
            case Asked(worker) if worker in ledger.waiting:
                self._since.setdefault(worker, now)
            case Applied():
                self._joined = dict.fromkeys(ledger.workers, now)
            case Joined(worker):
                self._joined.setdefault(worker, now)
            case Left(worker):
                self._leave(worker, now)
            case Done():
                self.end(ledger, now)
            case Step():
                self._note_step(what, ledger)
            case Drop(push):
                self.dropped += 1
                self._bases.pop(push, None)
            case Release(workers):
                if type(what) is Release:  # else a queued job begins, or a lost reply is sent again
                    self.releases += len(workers)
                for worker in workers:
                    self.wait_s += now - self._since.pop(worker, now)

    def end(self, ledger: Ledger, now: float) -> None:
        """The run is over; what comes later does not count."""
        self._ended, self.held = True, len(ledger.held)
        for worker in tuple(self._joined):
            self._leave(worker, now)

    def figures(self) -> dict[str, Any]:
        """Plain values; staleness in versions, null where no push was used. The last event ends a run without Done."""
        if not self._ended and self._last is not None:
            self.end(*self._last)
        total, most = self._staleness
        return {
            **{name: getattr(self, name) for name in ("pushes", "used", "dropped", "held", "releases", "versions")},
            "staleness": {"mean": total / self.used, "max": most} if self.used else {"mean": None, "max": None},
            "wait_s": self.wait_s,
            "wait_share": self.wait_s / self.present_s if self.present_s else None,
        }

    def _note_step(self, step: Step, ledger: Ledger) -> None:
        self.versions += 1
        for push, _, missing in step.terms:
            if missing is not None:
                self._late[missing] = ledger.version - ledger.views[missing].version
            elif (base := self._bases.pop(push, None)) is not None:
                staleness = self._late.pop(push, ledger.version - base)
                self.used += 1
                self._staleness = [self._staleness[0] + staleness, max(self._staleness[1], staleness)]

    def _leave(self, worker: int, now: float) -> None:
        self.wait_s += now - self._since.pop(worker, now)
        self.present_s += now - self._joined.pop(worker, now)
