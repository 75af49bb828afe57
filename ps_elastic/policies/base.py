"""What a policy is: a dataclass with hooks that yield actions."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from ps_elastic.plugins import Checked, Registry
from ps_elastic.policies.events import Action, Push, PushId, Release

if TYPE_CHECKING:
    from ps_elastic.policies.ledger import Ledger
    from ps_elastic.policies.theory import Bound, Facts


class Policy(Checked, ABC):
    """A consistency policy. Its init fields are its YAML keys; `field(init=False)` fields are its state.

    State is saved by a checkpoint and may hold numbers, strings, lists, PushIds and dicts keyed by
    any of these. A hook runs to its end for every event; holding a push is ordering nothing. One that yields sees the
    ledger with each action in effect when it goes on; one that returns a tuple is quicker.
    """

    layerwise: ClassVar[bool] = False  # one copy and one ledger per bucket
    keeps_last: ClassVar[bool] = False  # each worker's last payload may be used again
    own_views: ClassVar[bool] = False  # releases with `own`: a push is kept until its worker is released
    jobs: ClassVar[int] = 1  # most jobs a worker may have: the one it computes and those queued
    units: ClassVar[tuple[str, ...]] = ("gradient", "update")  # of pushes that its Steps make sense for
    optimizers: ClassVar[tuple[str, ...]] = ("sgd", "adam", "adamw")  # that it is exact, or bounded, with
    needs_views: ClassVar[bool] = False  # asks for distances or for x - v: the server must keep every view in use
    bounds_views: ClassVar[bool] = False  # promises a bound on ||x - v|| from views as they are given
    uses_reach: ClassVar[bool] = False  # reads `ledger.reach`: the server then measures what it needs at each Step
    lockstep: ClassVar[bool] = False  # no Step while any worker computes: they may read the server's model where it is
    pipelines: ClassVar[bool] = False  # its workers may run on with pushes unanswered (update.pipeline)
    adds: ClassVar[bool] = False  # uses every push once, with 1/p: workers may add theirs to the model themselves
    view_of: ClassVar[str] = "srv"  # the x_t that discrepancy is measured against: server model, or "ideal"

    def workers_needed(self) -> int:
        """The fewest workers it can run with; more are refused at load time."""
        return 1

    def longest_pipeline(self) -> float:
        """The most pushes that its workers may leave unanswered, where it `pipelines` at all."""
        return inf

    def declared_bound(self, facts: Facts) -> Bound | None:
        """The constant B of ||x_t - v|| <= alpha B that its theory gives it; None where the policy does not say."""
        return None

    def limit(self) -> float:
        """Most that ||x_t - v|| over the largest alpha between view and use can be at the next Step; inf: none."""
        return inf

    def on_start(self, ledger: Ledger) -> Iterable[Action]:
        """The run begins; every worker computes on version 0."""
        return ()

    @abstractmethod
    def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
        """`push` arrived: it is in `ledger.held` and its worker in `ledger.waiting`."""

    def on_join(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` became a member; it does not wait yet."""
        return ()

    def on_leave(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` is gone."""
        return self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterable[Action]:
        """Act if the policy's condition holds now: it may have waited for a worker that is gone."""
        return ()

    def on_ask(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` waits and nothing of it is under way."""
        yield Release((worker,))

    def on_wake(self, ledger: Ledger) -> Iterable[Action]:
        """The time of the last Wake has come."""
        return ()


policies: Registry[Policy] = Registry("policy", "ps_elastic.policies.rules")


def save_state(policy: Policy) -> dict[str, Any]:
    """The policy's state as plain JSON values, tuples and non-string keys included."""
    return {f.name: _pack(getattr(policy, f.name)) for f in _state_fields(policy)}


def load_state(policy: Policy, saved: dict[str, Any]) -> None:
    """Give `policy` the state that `save_state` took from another of its kind."""
    for field in _state_fields(policy):
        setattr(policy, field.name, _unpack(saved[field.name]))


def _state_fields(policy: Policy) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(policy) if not field.init)  # type: ignore[arg-type]


def _pack(value: Any) -> Any:
    match value:
        case PushId():
            return {"push": list(value)}
        case tuple() | list():
            return {type(value).__name__: [_pack(item) for item in value]}
        case dict():
            return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a policy's state has {type(value).__name__}: expected numbers, strings, lists, PushIds or dicts")


def _unpack(value: Any) -> Any:
    match value:
        case {"push": id}:
            return PushId(*id)
        case {"list": items}:
            return [_unpack(item) for item in items]
        case {"tuple": items}:
            return tuple(_unpack(item) for item in items)
        case {"dict": items}:
            return {_unpack(key): _unpack(item) for key, item in items}
    return value
