"""Every interleaving of a small world, breadth first; worlds that cannot be told apart are walked once."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

from ps_elastic.events import PushId
from ps_elastic.ledger import Ledger, Seat
from ps_elastic.policies import Policy
from ps_elastic.runahead import Course
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
    for name, value in vars(thing).items():
        if type(value) in (dict, OrderedDict, set, list):
            value = value.copy()
        elif type(value) in (Ledger, Model):
            value = fork(value)
        new.__dict__[name] = value
    if type(thing) is Ledger:
        new.workers = {worker: _copy_seat(seat) for worker, seat in new.workers.items()}
        new._gone = {worker: _copy_seat(seat) for worker, seat in new._gone.items()}
    elif type(thing) is World:
        new.reload()
    return new


def _copy_seat(seat: Seat) -> Seat:
    new = Seat()
    for name in Seat.__slots__:
        setattr(new, name, getattr(seat, name))
    new.course = seat.course.copy()
    return new


def freeze(thing: Any) -> Hashable:
    """A key that is equal for two worlds exactly where nothing in them differs."""
    match thing:
        case PushId():
            return thing
        case dict():
            return tuple((key, freeze(value)) for key, value in thing.items())
        case set():
            return frozenset(thing)
        case list():
            return tuple(freeze(value) for value in thing)
        case Seat():
            return tuple(freeze(getattr(thing, name)) for name in Seat.__slots__)
        case Course():
            return tuple(freeze(getattr(thing, name)) for name in Course.__slots__)
        case World() | Ledger() | Model() | Policy():
            return tuple(freeze(value) for name, value in vars(thing).items() if name not in TRANSIENT)
    return thing  # numbers, strings and the law's own tuples
