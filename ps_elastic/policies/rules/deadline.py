from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from ps_elastic.plugins import Duration, OneOf
from ps_elastic.policies import ZERO, Action, Drop, Ledger, Policy, Push, PushId, Release, Step, Term, Wake, policies
from ps_elastic.policies.theory import REPAID, Bound, Facts, b_crash, exact, late_norm


@policies.register("deadline")
@dataclass
class Deadline(Policy):
    """Make synchronous rounds that a deadline ends; discard late gradients, or apply them late for a placeholder.

    A round ends when everybody not suspected has pushed, or `deadline_s` after its first push; who was silent then
    is a suspect, and no round waits for a suspect until it pushes again, so that a crash costs one deadline.
    missing = "renormalise": x_{t+1} = x_t - alpha mean of the received; "keep": each weighs 1/p still;
    "substitute": zero in place of each missing one, corrected when it arrives. B <= f M/p for f missing.
    Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, crash and omission faults.
    Share: 1 (renormalise), q/p for q received (keep), 1 with the placeholders counted (substitute).
    """

    # seconds after the first push of a round; larger: fewer are late, silent workers cost more
    deadline_s: Duration = 1.0
    # for a gradient that is late. renormalise: mean of the others; keep: each weighs 1/p still; substitute: a
    # placeholder of zero, and it is applied late
    missing: Annotated[str, OneOf("renormalise, keep or substitute")] = "renormalise"
    opened: int = field(default=0, init=False)  # version that the round began with
    suspects: dict[int, None] = field(default_factory=dict, init=False)

    @property
    def optimizers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("sgd",) if self.missing == "substitute" else Policy.optimizers

    @property
    def view_of(self) -> str:  # type: ignore[override]
        return "ideal" if self.missing == "substitute" else "srv"

    def declared_bound(self, facts: Facts) -> Bound:
        broken = (REPAID,) if facts.lost else ()
        if self.missing != "substitute":
            bound = exact("0 against the server's model, for which a late push is a smaller step")
            return bound._replace(conditions=(REPAID,), broken=broken)
        M = late_norm(facts)
        formula = f"f M/p, f = {facts.owed}, M = {M:.4g} the rms of the pushes, over 1 - momentum"
        return Bound(
            b_crash(facts.owed, facts.fewest, M), formula, conditions=(REPAID,), broken=broken, kind="observed"
        )

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        self.suspects.pop(push.id.worker, None)
        if push.base < self.opened:
            yield ledger.amend(push.id) if push.id in ledger.debts else Drop(push.id, "late")
            yield Release((push.id.worker,))
            return
        if len(ledger.held) == 1:
            yield Wake(ledger.now + self.deadline_s)
        yield from self._end_round(ledger)

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        self.suspects.pop(worker, None)
        yield from self._end_round(ledger)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        if ledger.held:
            self.suspects = {worker: None for worker in ledger.workers if worker not in ledger.waiting}
            yield from self._end_round(ledger)

    def _end_round(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held or ledger.computing > len(self.suspects):
            return
        terms = [Term(push) for push in sorted(ledger.held)]
        if self.missing == "substitute":
            terms += [Term(ZERO, 1.0, push) for push in sorted(self._missing(ledger))]
        share = 1.0 if self.missing == "renormalise" else min(1.0, len(terms) / max(1, len(ledger.workers)))
        yield Step(tuple(terms), share)
        self.opened = ledger.version
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))

    def _missing(self, ledger: Ledger) -> list[PushId]:
        """Pushes of this round that are still computed; who is late for an earlier round has no part in this one."""
        return [p for p, view in ledger.views.items() if view.version >= self.opened and p not in ledger.debts]
