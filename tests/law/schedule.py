"""A random schedule, drawn by hypothesis, carried out on a world."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from ps_elastic.policies import Policy
from tests.law.cases import pipeline_of
from tests.law.harness import Move, World

SETTINGS = settings(
    deadline=None, derandomize=True, database=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
ONE_PASS = settings(SETTINGS, phases=[Phase.generate])  # for mutants: to find it is enough

workers = st.integers(1, 4)
draws = st.lists(st.integers(0, 2**20), min_size=10, max_size=80)


def play(make: Callable[[], Policy], workers: int, draws: list[int], *, reload: bool = False) -> list[str]:
    """The log of the run in which each draw picks the next move, its time and the numbers that go with it."""
    lines: list[str] = []
    random = Random(0)
    policy = make()
    most = max(workers, policy.workers_needed())
    world = World(policy, most, len(draws), random.random, lines.append, pipeline_of(make))
    for draw in draws:
        random.seed(draw)
        move = pick(world, random)
        if move is None or world.over:
            break
        world.now += random.choice((0.0, 0.5, 3.0)) if move.kind != "wake" else 0.0
        world.do(move)
        if reload:
            world.reload()
    world.drain()
    return lines


def pick(world: World, random: Random) -> Move | None:
    """The next move: two in three without a fault, every kind of fault alike, rarely the end of the run."""
    if random.random() < 1 / 64 and not world.model.done:
        return Move("done")
    moves = world.moves()
    plain = [move for move in moves if not move.fault]
    if plain and random.random() < 2 / 3:
        return random.choice(plain)
    faults = [move for move in moves if move.fault]
    kind = random.choice(sorted({move.kind for move in faults})) if faults else ""
    return random.choice([move for move in faults if move.kind == kind] or plain or [None])
