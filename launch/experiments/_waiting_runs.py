"""The runs of the study of waiting: every policy at several settings, in every cell of delays, workers and starts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from _page import REPOSITORY

from ps_elastic.analysis.verify import play
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.policies.events import PushId, Step
from ps_elastic.server.server import Server

OUT = REPOSITORY / "runs" / "evidence" / "waiting"
ALPHA = 1 / 60  # 1/(6L) of the quadratic

DELAYS: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "exponential": {"name": "exponential"},
    "pareto": {"name": "pareto", "shape": 2.5},
    "unequal speeds": {"name": "constant", "spread": 0.5},
    "stragglers": {"name": "exponential", "straggler_chance": 0.02, "straggler_factor": 10},
}
STARTS = {"training": 1.0, "at rest": 0.0}  # x_0 of the quadratic, whose optimum is 0: at rest there is noise alone
SIZES = {3: (12, 40), 8: (12, 30), 32: (8, 20), 256: (3, 12)}  # workers: (seeds, pushes of each worker)
RUNS = {"training": (3, 8, 32, 256), "at rest": (8, 32)}

BUDGETS = (0.0, 0.15, 0.25, 0.4, 0.65, 1.0, 1.6)  # of the B_sup of `asynchronous`
OURS, EXACT = "elastic_bound", "elastic_bound, exact step"
SSP, VALUE, NORM = "stale_synchronous", "value_bounded", "norm_bounded"
POLICIES = {
    OURS: [f"{OURS}:bound={{{b}}}" for b in BUDGETS],
    EXACT: [f"_exact_step:ExactStep:bound={{{b}}}" for b in BUDGETS],
    SSP: [f"{SSP}:bound={b}" for b in (0, 1, 2, 4)],
    NORM: [f"{NORM}:beta={b}" for b in (0.9, 0.65, 0.4, 0.2, 0.05)],
    VALUE: [f"{VALUE}:threshold={{{b}}}:falling=false" for b in (*BUDGETS, 3.0, 6.0)],
}


class Scale(NamedTuple):
    """D/alpha by three measures."""

    sup: float  # B_sup: the largest over t of the rms over seeds, t the number of the push
    max: float  # of any push of any seed
    rms: float  # over all pushes


class Point(NamedTuple):
    """One policy with one setting: its B by its own x_t and by the server's model, and the wait time, a fraction."""

    policy: str
    own: Scale
    server: Scale
    waiting: float


class Cell(NamedTuple):
    """Where the workers start, how long they take, how many they are."""

    start: str
    delays: str
    workers: int


def all_cells() -> list[Cell]:
    return [Cell(start, delays, p) for start, sizes in RUNS.items() for delays in DELAYS for p in sizes]


def points(cell: Cell) -> dict[str, list[Point]]:
    """All policies in one cell; the budgets are fractions of the B_sup that `asynchronous` has there."""
    free = measure(cell, "asynchronous")
    found = {"asynchronous": [free]}
    for policy, settings in POLICIES.items():
        found[policy] = [measure(cell, filled(text, free.own.sup)) for text in settings]
    return found


def filled(text: str, scale: float) -> str:
    """`text` with the part {of the scale} in braces worked out, to three digits."""
    before, brace, rest = text.partition("{")
    part, _, after = rest.partition("}")
    return f"{before}{float(part) * scale:.3g}{after}" if brace else text


def measure(cell: Cell, policy: str) -> Point:
    """One point, from the file of an earlier call if there is one."""
    kept = OUT / cell.start / cell.delays / str(cell.workers) / f"{policy}.json"
    if not kept.exists():
        seeds, pushes = SIZES[cell.workers]
        runs = [run(configuration(cell, policy, pushes, seed), cell.workers) for seed in range(seeds)]
        own, server, waiting = zip(*runs, strict=True)
        point = Point(policy, scale(own), scale(server), sum(waiting) / seeds)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(point))
        print(f"{', '.join(map(str, cell))}: {policy}", file=sys.stderr)
    name, own, server, waits = json.loads(kept.read_text())
    return Point(name, Scale(*own), Scale(*server), waits)


def configuration(cell: Cell, policy: str, pushes: int, seed: int) -> Config:
    run: dict[str, Any] = {
        "task": {"name": "quadratic", "start": STARTS[cell.start]},
        "policy": policy,
        "optimizer": {"lr": ALPHA},
        "train": {"samples": pushes * cell.workers, "evaluate_every_samples": None},
        "simulation": {"compute": DELAYS[cell.delays]},
        "seed": seed,
    }
    return load(run, simulated=True)


def run(config: Config, workers: int) -> tuple[list[float], list[float], float]:
    """D/alpha of each push in the order of use, by the policy's own x_t and by the server's model; the wait time."""
    on_server: list[float] = []

    def look(server: Server) -> None:
        if (watch := getattr(server.policy, "watch", None)) is not None:
            watch(server)
        if server.policy.view_of != "srv":
            listen(server, on_server)

    played = play(config, workers, look)
    if played.measures.beyond:
        raise AssertionError(f"{config.policy.text()}: {played.measures.beyond} pushes lay beyond the bound")
    return played.scaled, on_server or played.scaled, played.waiting


def listen(server: Server, scaled: list[float]) -> None:
    """Note ||x - v|| / alpha on the server's model of each push when it is first added to it, late or not."""
    store = server.store
    apply, combine = store.apply, store.combine

    def note(step: Step) -> None:
        fresh = [term.push for term in step.terms if term.stands_for is None and term.push.worker]
        scaled.extend(store.distance(push) / ALPHA for push in fresh)

    def applied(step: Step, rate: float, views: Sequence[PushId] = ()) -> float:
        note(step)
        return apply(step, rate, views)

    def combined(step: Step) -> None:
        if step.apply == "amend":  # any other is combined as it is applied
            note(step)
        combine(step)

    store.apply, store.combine = applied, combined  # type: ignore[method-assign]


def scale(runs: tuple[list[float], ...]) -> Scale:
    shortest = min(map(len, runs))
    squares = np.array([values[:shortest] for values in runs]) ** 2  # (seeds, pushes)
    return Scale(*(float(math.sqrt(s)) for s in (squares.mean(axis=0).max(), squares.max(), squares.mean())))
