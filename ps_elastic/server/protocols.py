"""What the parts of the server ask of each other, where there is more than one that can answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any, Protocol

from torch import Tensor

from ps_elastic.policies.events import PushId, ReplyId, Step
from ps_elastic.policies.ledger import Member, View
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout


class LedgerView(Protocol):
    """What there is to see from outside of what the server remembers: of one ledger, or of several as one."""

    @property
    def workers(self) -> dict[int, Member]: ...
    @property
    def waiting(self) -> dict[int, None]: ...
    @property
    def version(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def wake_at(self) -> float | None: ...


class Snapshots(Protocol):
    """What a store kept of past models. peak: most copies alive at once; None where there are no numbers."""

    @property
    def peak(self) -> int | None: ...


class Model(Protocol):
    """What there is to see of a store from outside. x: the model (d,), None in a timing-only simulation."""

    @property
    def layout(self) -> Layout: ...
    @property
    def x(self) -> Tensor | None: ...
    @property
    def snapshots(self) -> Snapshots: ...
    # The model given for the push `view`, where versions are kept, whatever x has become since: numpy's, (d,).
    def view(self, view: PushId | ReplyId) -> Any: ...


class Store(Model, Protocol):
    """Everything of a part of the model that has d entries, as a shard asks for it: by PushId, and numbers come back.

    So a run can be simulated by a store without tensors. It decides nothing. workers_write: the steps that it is told
    of have been made by workers.
    """

    @property
    def workers_write(self) -> bool: ...

    # A bucket of a push is here, and what will probably be done with it may be begun. Raises WireError.
    def foresee(self, part: PushMessage) -> None: ...
    # Note the payload of a push; it stays in the transport's memory until `keep`. Raises WireError.
    def take(self, push: PushId, parts: Sequence[PushMessage]) -> None: ...
    # Copy the payload out of the transport's memory, if it is still needed.
    def keep(self, push: PushId) -> None: ...
    def free(self, pushes: Iterable[PushId]) -> None: ...

    # The worker's copy that the push `view` is to be computed on, as a numpy array that stays as it is until x changes.
    def give(self, view: PushId, given: View, alpha: float) -> Any: ...
    # The model for a worker that runs ahead, as a numpy array that stays as it is until `end`.
    def hand(self, reply: ReplyId, version: int) -> Any: ...
    # The push `view` was computed on the model of `reply` less rate x each of `pushes`, in this order.
    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None: ...
    # Nobody will ask for this copy again.
    def end(self, view: PushId | ReplyId) -> None: ...
    # ||x - v||_2 of a copy given.
    def distance(self, view: PushId) -> float: ...

    # Take the terms of the step that `amend` makes next.
    def combine(self, step: Step) -> None: ...
    # Make the next version, `rate` = alpha x share; return ||x_new - x_old||. views: of the pushes that the step uses;
    # their distances are measured on the way, and those of its terms end.
    def apply(self, step: Step, rate: float, views: Sequence[PushId] = ()) -> float: ...
    # ||x - v||_2 of a copy that the last step measured, x the model that the step was made from.
    def distance_when_used(self, view: PushId) -> float: ...
    # ||direction|| of the step just made at rate 0.
    def direction_norm(self) -> float: ...
    # (coast, gain) of the next step, as `Applied` carries them.
    def coast(self) -> tuple[float, float]: ...
    def x_norm(self) -> float: ...

    # Apply a late gradient by the vector combined: x += c_x delta, m += c_m delta; return ||x_new - x_old||.
    def amend(self, missing: PushId) -> float: ...
    # The push `missing` will not be applied late.
    def forgive(self, missing: PushId) -> None: ...
    # Begin to follow how far a copy given is from the model including the gradients that are late now.
    def ideal(self, view: PushId) -> Ideal: ...
    # The vector of the amend just made: late gradient less placeholder.
    def delta(self) -> Any: ...


class Settlement(Protocol):
    """The debts open at one moment (see debts.py), and what they add to the model of then as they are closed.

    settle: the debt on `missing` is closed, applied late with `delta` of its store, or with None not at all.
    """

    @property
    def debts(self) -> Sized: ...
    def settle(self, missing: PushId, delta: Any) -> None: ...


class Ideal(Protocol):
    """A use's distance from the model including the gradients late at its moment; None while one of them is open."""

    @property
    def settlement(self) -> Settlement: ...
    @property
    def distance(self) -> float | None: ...
