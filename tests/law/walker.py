"""Every interleaving of a small world, breadth first; worlds that cannot be told apart are walked once."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple

from ps_elastic.policies import Policy
from ps_elastic.policies.ledger import Ledger, Member, PipelineState
from tests.law.cases import pipeline_of
from tests.law.harness import Move, World
from tests.law.model import Model

TRANSIENT = ("texts",)  # of the current event alone


class Walk(NamedTuple):
    states: int
    transitions: int


def walk(make: Callable[[], Policy], workers: int, pushes: int, faults: int = 0, wakes: int = 2) -> Walk:
    """Go through every order in which `workers` may push `pushes` times each, with at most so many faults
    and wakes: these move the time on, so that few worlds merge after them.

    The rule is exchanged for one with reloaded state after each event. From every state the run is also ended at
    once. Raises AssertionError with the path that led to a breach, from the breach itself.
    """
    gc.disable()  # worlds make no cycles, and looking for some takes a third of the time
    try:
        return _walk(make, workers, pushes, faults, wakes)
    finally:
        gc.enable()


def _walk(make: Callable[[], Policy], workers: int, pushes: int, faults: int, wakes: int) -> Walk:
    start = World(make(), workers, pushes, pipeline=pipeline_of(make))
    if not faults:
        start.forget_faults()
    queue: deque[tuple[World, int, int, tuple[Any, ...]]] = deque([(start, faults, wakes, ())])
    seen: set[Hashable] = {(freeze(start), (faults, wakes))}
    transitions = 0
    while queue:
        world, faults_left, wakes_left, path = queue.popleft()
        attempt(fork(world).drain, (path, "drain"))
        for move in world.moves():
            is_wake = move.kind == "wake"
            if (move.fault and not faults_left) or (is_wake and not wakes_left):
                continue
            transitions += 1
            child, trail = fork(world), (path, move)
            attempt(partial(_go, child, move), trail)
            budgets = faults_left - move.fault, wakes_left - is_wake
            if not budgets[0]:
                child.forget_faults()
            key = freeze(child), budgets
            if key not in seen:
                seen.add(key)
                queue.append((child, *budgets, trail))
    return Walk(len(seen), transitions)


def _go(world: World, move: Move) -> None:
    world.do(move)
    world.reload()


def attempt(action: Callable[[], None], trail: tuple[Any, ...]) -> None:
    try:
        action()
    except Exception as error:
        steps = []
        while trail:
            trail, move = trail
            steps.append(move if isinstance(move, str) else f"{move.kind} {move.worker}".strip())
        raise AssertionError(f"{type(error).__name__}: {error}; after: {', '.join(reversed(steps))}") from error


def fork(thing: Any) -> Any:
    """A copy of a world, ledger or model that shares nothing that changes."""
    new = object.__new__(type(thing))
    copied = {
        name: value if (copy := _COPIES[type(value)]) is None else copy(value) for name, value in vars(thing).items()
    }
    new.__dict__.update(copied)
    if type(thing) is Ledger:
        new.workers = {worker: _copy_seat(member) for worker, member in new.workers.items()}
        new.gone = {worker: _copy_seat(member) for worker, member in new.gone.items()}
    elif type(thing) is World:
        new.reload()
    return new


def _copy_seat(member: Member) -> Member:
    new = Member()
    for name in Member.__slots__:
        setattr(new, name, getattr(member, name))
    new.pipeline_state = member.pipeline_state.copy()
    return new


def freeze(thing: Any) -> Hashable:
    """A key that is equal for two worlds exactly where nothing in them differs."""
    freezes = _FREEZES[type(thing)]
    return thing if freezes is None else freezes(thing)


class _ByType(dict[type, Callable[[Any], Any] | None]):
    """What to do with a value by its type, found once; None: it never changes, so there is nothing to do."""

    def __init__(self, find: Callable[[type], Callable[[Any], Any] | None]) -> None:
        self._find = find

    def __missing__(self, kind: type) -> Callable[[Any], Any] | None:
        self[kind] = found = self._find(kind)
        return found


def _copy_of(kind: type) -> Callable[[Any], Any] | None:
    if kind in (dict, OrderedDict, set, list):
        return kind.copy  # type: ignore[attr-defined, no-any-return]
    return fork if kind in (Ledger, Model) else None


def _freeze_of(kind: type) -> Callable[[Any], Hashable] | None:
    if issubclass(kind, dict):
        return lambda mapping: (tuple(mapping), _all(mapping.values()))
    if issubclass(kind, list):
        return _all
    if issubclass(kind, set):
        return frozenset
    if issubclass(kind, Member | PipelineState):
        return lambda member: _all([getattr(member, name) for name in kind.__slots__])  # type: ignore[attr-defined]
    if issubclass(kind, World | Ledger | Model | Policy):
        return lambda world: _all([value for name, value in vars(world).items() if name not in TRANSIENT])
    return None  # numbers, strings and the law's own tuples


def _all(values: Iterable[Any]) -> Hashable:
    return tuple([value if (freezes := _FREEZES[type(value)]) is None else freezes(value) for value in values])


_COPIES, _FREEZES = _ByType(_copy_of), _ByType(_freeze_of)
