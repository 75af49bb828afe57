"""What the two forms of SALF share: rounds of one layer, each of a fixed length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_elastic.plugins import Duration
from ps_elastic.policies import Action, Bound, Drop, Facts, Ledger, Policy, Push, Release, Step, Wake, exact


@dataclass
class LayerRounds(Policy):
    """Rounds of `deadline_s`: whose layer is here by then is used, and what others still send of it is late.

    A round lasts to its deadline though everybody be early, so that the rounds of all layers begin and end together.
    A worker that computes when a round ends was sent its model before, so what it sends is late, whatever the version
    (a round without a push makes none); it is discarded, and the worker is released at once. A worker that was stopped
    before this layer (it asks) waits for the end of the round like those whose layer is here.
    """

    layerwise = True
    deadline_s: Duration = 1.0  # seconds of a round; larger: more layers of slow workers, fewer rounds
    late: dict[int, None] = field(default_factory=dict, init=False)  # who computes for a round that is over

    def declared_bound(self, facts: Facts) -> Bound:
        return exact("0 against the server's model: every layer used is of its current version")

    @abstractmethod
    def step(self, ledger: Ledger) -> Step:
        """The Step that uses all pushes kept; there is at least one."""

    def on_start(self, ledger: Ledger) -> Iterator[Action]:
        yield Wake(ledger.now + self.deadline_s)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if push.id.worker in self.late:
            del self.late[push.id.worker]
            yield Drop(push.id, "late")
            yield Release((push.id.worker,))

    def on_ask(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        if worker in self.late:
            del self.late[worker]
            yield Release((worker,))

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        self.late.pop(worker, None)
        return iter(())

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        if ledger.held:
            yield self.step(ledger)
        self.late = {worker: None for worker in ledger.workers if worker not in ledger.waiting}
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))
        yield Wake(ledger.now + self.deadline_s)
