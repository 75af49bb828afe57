"""What the parts of the server ask of each other, where there is more than one that can answer."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, Protocol

from torch import Tensor

from ps_elastic.policies.events import PushId, ReplyId, Step
from ps_elastic.policies.ledger import View
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout


class Snapshots(Protocol):
    """What a store kept of past models."""

    @property
    def peak(self) -> int | None:
        """Most copies alive at once; None where there are no numbers."""


class Model(Protocol):
    """What there is to see of a store from outside: the model x (d,), None where headers alone move."""

    @property
    def layout(self) -> Layout: ...

    @property
    def x(self) -> Tensor | None: ...

    @property
    def snapshots(self) -> Snapshots: ...

    def view(self, view: PushId | ReplyId) -> Any:
        """The model given for the push `view`, where versions are kept, whatever x has become since."""


class Store(Model, Protocol):
    """Everything of a part of the model that has d entries, as a shard asks for it: by PushId, and numbers come back.

    So a run can be simulated by a store without tensors. It decides nothing.
    workers_write: the steps that it is told of have been made by workers.
    """

    @property
    def workers_write(self) -> bool: ...

    # Payloads.

    def foresee(self, part: PushMessage) -> None:
        """A bucket of a push is here, and what will probably be done with it may be begun. Raises WireError."""

    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None:
        """Note the payload of a push; it stays in the transport's memory until `keep`. Raises WireError."""

    def keep(self, push: PushId) -> None:
        """Copy what is still needed of a push out of the transport's memory."""

    def free(self, push: PushId) -> None:
        """Nobody needs the payload any more."""

    # Views.

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The model that the push `view` is to be computed on, as a numpy array that stays as it is until x changes."""

    def hand(self, reply: ReplyId, version: int) -> Any:
        """The model for a worker that runs ahead, as a numpy array that stays as it is until `end`."""

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        """The push `view` was computed on the model of `reply` less rate x each of `pushes`, in this order."""

    def end(self, view: PushId | ReplyId) -> None:
        """Nobody will ask for this view again."""

    def distance(self, view: PushId) -> float:
        """||x - v||_2 of a view given."""

    # Steps.

    def combine(self, step: Step) -> None:
        """Take the terms of the step that `apply` or `amend` makes next."""

    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        """Make the next version, `rate` = alpha x share; return ||x_new - x_old||.

        views: of the pushes that the step uses; their distances are measured on the way, and those of its terms end.
        """

    def distance_when_used(self, view: PushId) -> float:
        """||x - v||_2 of a view that the last step measured, x the model that the step was made from."""

    def direction_norm(self) -> float:
        """||direction|| of the step just made at rate 0."""

    def coast(self) -> tuple[float, float]:
        """(coast, gain) of the next step, as `Applied` carries them."""

    def x_norm(self) -> float:
        """||x||_2."""

    # Debts.

    def amend(self, missing: PushId) -> float:
        """Repay a debt with the vector combined: x += c_x delta, m += c_m delta; return ||x_new - x_old||."""

    def forgive(self, missing: PushId) -> None:
        """The debt on `missing` is closed unpaid."""

    def ideal(self, view: PushId) -> Ideal:
        """Begin to follow how far a view given is from the model with every debt open now settled."""

    def delta(self) -> Any:
        """The vector of the amend just made: what the debt owed."""


class Settlement(Protocol):
    """The debts open at one moment, and what they add to the model of then as they are closed."""

    @property
    def debts(self) -> Sized: ...

    def settle(self, missing: PushId, delta: Any) -> None:
        """The debt on `missing` is closed: repaid with `delta` of its store, or with None not at all."""


class Ideal(Protocol):
    """The distance of a view from the model with the debts of a moment settled."""

    @property
    def settlement(self) -> Settlement:
        """Shared by all uses of that moment."""

    @property
    def distance(self) -> float | None:
        """||x_ideal - v||, or None while a debt is open."""
