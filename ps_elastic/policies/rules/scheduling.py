"""What the two elastic schedulers share: a round that ends before all are here, and applies late gradients exactly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_elastic.policies import ZERO, Action, Drop, Ledger, Policy, Push, PushId, Release, Step, Term


@dataclass
class ElasticScheduler(Policy):
    """Rounds that `enough` ends: a placeholder for each missing push, and `amend` when it arrives.

    A worker that is late for round t computes nothing for t + 1, so it has no part in it (weight 1/p is kept for those
    that have). At least half of the workers take part in every round, as the definition of elastic consistency asks.
    Late workers are known by their round, not by their version: an amend makes a version too.
    """

    optimizers = ("sgd",)
    view_of = "ideal"
    opened: int = field(default=0, init=False)  # version that the round began with

    @abstractmethod
    def enough(self, ledger: Ledger) -> bool:
        """Whether the pushes kept end the round."""

    def arrived(self, push: Push, ledger: Ledger) -> None:
        """Note a push, late or not."""

    def began(self, ledger: Ledger) -> None:
        """A round has ended and the next one begins; the model is stepped, nobody is released yet."""

    def placeholder(self, ledger: Ledger) -> PushId:
        return ZERO

    def own(self, ledger: Ledger) -> float:
        """The weight of a worker's own gradient in its next copy of the model, in place of all that is late now."""
        return 0.0

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        self.arrived(push, ledger)
        if push.base < self.opened:
            yield ledger.amend(push.id) if push.id in ledger.debts else Drop(push.id, "late")
            yield Release((push.id.worker,), self.own(ledger))
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held or (ledger.computing and not self.enough(ledger)):
            return
        missing = sorted(p for p, v in ledger.views.items() if v.version >= self.opened and p not in ledger.debts)
        taking_part = len(ledger.held) + len(missing)
        if ledger.computing and 2 * taking_part < len(ledger.workers):
            return
        placeholder, p = self.placeholder(ledger), max(1, len(ledger.workers))
        terms = [Term(push) for push in sorted(ledger.held)] + [Term(placeholder, 1.0, push) for push in missing]
        yield Step(tuple(terms), share=min(1.0, taking_part / p))
        self.opened = ledger.version
        self.began(ledger)
        if ledger.waiting:
            yield Release(tuple(ledger.waiting), self.own(ledger))
