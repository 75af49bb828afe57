"""Workers that run ahead: each computes on the model of an earlier reply less its own pushes that this lacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ps_elastic.errors import PolicyError
from ps_elastic.policies.events import Push, PushId, ReplyId
from ps_elastic.policies.ledger import Ledger
from ps_elastic.server.discrepancy import DiscrepancyMeter, StepSizes
from ps_elastic.server.protocols import Store
from ps_elastic.server.totals import BoundFacts
from ps_elastic.transport.messages import MOST_SETTLED, Settled


class Pipelining:
    """What the workers of one ledger were given, and what their copies contain.

    rate: what a worker answered now is to multiply its pushes by. arrived: the metadata of pushes that are here.
    """

    def __init__(
        self, ledger: Ledger, store: Store, meter: DiscrepancyMeter, step_sizes: StepSizes, measures: BoundFacts,
        rate: Callable[[], float], arrived: Mapping[PushId, Push],
    ) -> None:  # fmt: skip
        self._ledger, self._store, self._meter, self._step_sizes = ledger, store, meter, step_sizes
        self._measures, self._rate, self._arrived = measures, rate, arrived
        self._rates: dict[int, dict[int, float]] = {}  # worker -> by reply, what it re-applies with
        self._contained: dict[PushId, tuple[float, tuple[PushId, ...]]] = {}  # push not settled -> its rate, own pushes
        self._weights: dict[PushId, float] = {}  # of pushes used that copies may contain: what they were applied with

    def give(self, worker: int) -> tuple[int, Any]:
        """The version and the model of the last reply to a worker."""
        told, given = self._ledger.told(worker)
        rates = self._rates.setdefault(worker, {})
        if told not in rates:
            rates[told] = self._rate()
            self._meter.give(ReplyId(worker, told), given.version)
        return given.version, self._store.hand(ReplyId(worker, told), given.version)

    def rate(self, worker: int) -> float:
        """What `worker` multiplies pushes by that the model of its last reply lacks."""
        return self._rates[worker][self._ledger.told(worker)[0]]

    def arrive(self, push: Push) -> None:
        """A push is here: note its copy, and forget replies that no copy can be of now."""
        worker, step = push.id
        told, contained = step - 1 - push.ahead, self._ledger.contained(push.id)
        if self._store.workers_write:  # its own pushes are in the model, and so in what it read of that
            contained = ()
        rates, reply = self._rates[worker], ReplyId(worker, told)
        reapplied = rates[told] * sum(self._arrived[own].payload_norm for own in contained)
        self._contained[push.id] = rates[told], contained
        self._meter.derive(push.id, reply, reapplied)
        self._store.derive(push.id, reply, rates[told], contained)
        for older in [other for other in rates if other < told]:
            del rates[older]
            self._meter.end(ReplyId(worker, older))

    def left(self, worker: int) -> None:
        """`worker` is gone: nothing will come of what it was given."""
        for told in self._rates.pop(worker, ()):
            self._meter.end(ReplyId(worker, told))

    def use(self, push: PushId) -> None:
        """Tell how much of its own the copy behind `push` contains, and how much else of that the model has."""
        rate, contained = self._contained[push]
        largest = self._step_sizes.largest(self._meter.sent[push].version)
        if largest:
            astray = sum(abs(self._weights.get(own, 0.0) - rate) for own in contained)
            self._measures.note_reapplied(rate * len(contained) / largest, astray / largest)

    def used(self, weights: Mapping[PushId, float]) -> None:
        """A step has applied pushes with these weights."""
        self._weights.update(weights)

    def settled(self, push: PushId) -> None:
        self._contained.pop(push, None)

    def freed(self, push: PushId) -> None:
        self._weights.pop(push, None)

    def oldest(self, version: int) -> int:
        """As `oldest` of the meter, where the replies to pushes kept for later may have been forgotten."""
        sent = self._meter.sent
        return min([self._meter.oldest(version), *(sent[push].version for push in self._ledger.held)])

    def still_held(self, worker: int) -> list[Settled]:
        """Pushes of `worker` that the model given to it last does not contain yet."""
        last, given = self._ledger.told(worker)
        still = [Settled(push.step, "held", float("nan")) for push in given.flying if push.step != last]
        if len(still) > MOST_SETTLED:
            raise PolicyError(
                f"{len(still)} pushes of worker {worker} are kept for later; expected at most {MOST_SETTLED}"
            )
        return still
