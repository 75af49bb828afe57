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
    """A consistency policy: it decides when gradients are used and when workers continue.

    Derive a `@dataclass` from it. Its init fields are its YAML keys under `policy:`; fields with `field(init=False)`
    are its state. State may hold numbers, strings, lists, tuples, PushIds, and dicts keyed by any of these. A policy
    sees metadata and the ledger, never a tensor, a clock or a message. It must not write the ledger, and must draw
    random numbers from a generator of its own: a replay makes the same decisions again.

    A hook returns or yields actions, and runs to its end for every event. A push that no action names is kept for
    later. A hook that yields sees the ledger with each action in effect when it continues; one that returns a tuple is
    quicker. An action that breaks an invariant of the ledger ends the run with PolicyError.

    Class attributes say what the policy needs and what it promises:

    - `layerwise`: one copy of the policy and one ledger for each bucket.
    - `keeps_last`: the last payload of each worker may be used again.
    - `own_views`: it releases with `own`; so each push is kept until its worker is released.
    - `jobs`: most jobs a worker may have, the one that it computes included (>= 1).
    - `units`: push types that its steps make sense for: "gradient", "update" (already scaled), "model".
    - `optimizers`: optimizers that its bound or its late corrections are valid with; others are refused.
    - `needs_views`: it asks for distances or for x - v: the server keeps every worker's copy in use.
    - `bounds_views`: it promises a bound on ||x - v||: inconsistent reads (`views: torn`) are refused.
    - `uses_reach`: it reads `ledger.reach`: the server then measures what that needs at each step.
    - `lockstep`: no step while any worker computes: workers may read the server's model without a copy.
    - `pipelines`: its workers may continue with pushes that have no reply yet (`update.pipeline`).
    - `adds`: it uses every push once, with 1/p: workers may write the model themselves (`writers: workers`).
    - `view_of`: the model that D is measured to: "srv", the server model; "ideal", that with late gradients.
    """

    layerwise: ClassVar[bool] = False
    keeps_last: ClassVar[bool] = False
    own_views: ClassVar[bool] = False
    jobs: ClassVar[int] = 1
    units: ClassVar[tuple[str, ...]] = ("gradient", "update")
    optimizers: ClassVar[tuple[str, ...]] = ("sgd", "adam", "adamw")
    needs_views: ClassVar[bool] = False
    bounds_views: ClassVar[bool] = False
    uses_reach: ClassVar[bool] = False
    lockstep: ClassVar[bool] = False
    pipelines: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    view_of: ClassVar[str] = "srv"

    def workers_needed(self) -> int:
        """The fewest workers that it can run with (>= 1). A run with fewer is refused with ConfigError."""
        return 1

    def longest_pipeline(self) -> float:
        """The most pushes without a reply that a worker may have, if it `pipelines` at all; `inf`: no limit."""
        return inf

    def declared_bound(self, facts: Facts) -> Bound | None:
        """The constant B that its theory gives it, in gradient units: D = ||x_t - v|| <= alpha B.

        Called when the run is over; `facts` is what the run measured. `None`: the policy says nothing.
        """
        return None

    def limit(self) -> float:
        """Most that D over the largest alpha since the worker's copy can be at the next step; `inf`: no promise."""
        return inf

    def on_start(self, ledger: Ledger) -> Iterable[Action]:
        """The run begins: every worker computes on version 0."""
        return ()

    @abstractmethod
    def on_push(self, push: Push, ledger: Ledger) -> Iterable[Action]:
        """`push` arrived: it is in `ledger.held`, and its worker is in `ledger.waiting`."""

    def on_join(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` (1..p) became a member; it does not wait yet."""
        return ()

    def on_leave(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` is gone: it is in `ledger.workers` no more. By default `try_again`."""
        return self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterable[Action]:
        """Act if the policy's condition holds now: it may have waited for a worker that is gone."""
        return ()

    def on_ask(self, worker: int, ledger: Ledger) -> Iterable[Action]:
        """`worker` waits and nothing of it is under way: it joined, or a message was lost. Default: release it."""
        yield Release((worker,))

    def on_wake(self, ledger: Ledger) -> Iterable[Action]:
        """The time of the last `Wake` has come."""
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
