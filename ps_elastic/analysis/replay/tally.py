"""What a rule did with the pushes of a run, counted from events and actions alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ps_elastic.policies.events import (
    Action,
    Applied,
    Asked,
    Done,
    Drop,
    Event,
    Joined,
    Left,
    Push,
    PushId,
    Release,
    Step,
)
from ps_elastic.policies.ledger import Ledger


@dataclass
class Tally:
    """Figures of one rule over one run, up to its Done: told of events and actions as `replay_decisions` tells them."""

    pushes: int = 0
    used: int = 0
    dropped: int = 0
    held: int = 0  # at the end
    releases: int = 0  # of a worker each
    versions: int = 0
    wait_s: float = 0.0  # from a worker's push to its release, summed over workers
    present_s: float = 0.0  # that workers were members, summed over them
    _staleness: list[int] = field(default_factory=lambda: [0, 0])  # sum, maximum
    _bases: dict[PushId, int] = field(default_factory=dict)  # of pushes held
    _owed: dict[PushId, int] = field(default_factory=dict)  # missing push -> its staleness in the Step that owes it
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
            "pushes": self.pushes,
            "used": self.used,
            "dropped": self.dropped,
            "held": self.held,
            "releases": self.releases,
            "versions": self.versions,
            "staleness": {"mean": total / self.used, "max": most} if self.used else {"mean": None, "max": None},
            "wait_s": self.wait_s,
            "wait_share": self.wait_s / self.present_s if self.present_s else None,
        }

    def _note_step(self, step: Step, ledger: Ledger) -> None:
        self.versions += 1
        for push, _, missing in step.terms:
            if missing is not None:
                self._owed[missing] = ledger.version - ledger.views[missing].version
            elif (base := self._bases.pop(push, None)) is not None:
                staleness = self._owed.pop(push, ledger.version - base)
                self.used += 1
                self._staleness = [self._staleness[0] + staleness, max(self._staleness[1], staleness)]

    def _leave(self, worker: int, now: float) -> None:
        self.wait_s += now - self._since.pop(worker, now)
        self.present_s += now - self._joined.pop(worker, now)
