"""At equal inconsistency, which rule waits least? Five models of delay, several numbers of workers, in virtual time."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from _page import REPOSITORY, Claim, Evidence, publish

from ps_elastic.record import environment
from ps_elastic.simulation import simulate

NAME = "waiting"
OUT = REPOSITORY / "runs" / "evidence" / NAME
WORKERS = (3, 16, 64)
SEEDS = (0, 1)
ROUNDS = 40  # pushes of each worker, on average

DELAYS: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "exponential": {"name": "exponential"},
    "pareto": {"name": "pareto", "shape": 2.5},
    "slow workers": {"name": "constant", "spread": 0.5},
    "stragglers": {"name": "exponential", "straggler_chance": 0.02, "straggler_factor": 10},
}
BUDGETS = ("0.06M", "0.12M", "0.25M", "0.5M", "0.75M", "1M", "1.5M", "2M", "3M", "4M", "6M")
RULES: dict[str, list[str]] = {
    "elastic_bound": [f"elastic_bound:bound={b}" for b in BUDGETS],
    "elastic_bound, path": [f"elastic_bound:bound={b}:distance=path" for b in BUDGETS],
    "stale_synchronous": [f"stale_synchronous:bound={b}" for b in (0, 1, 2, 4, 8)],
    "norm_bounded": [f"norm_bounded:beta={b}" for b in (0.95, 0.9, 0.8, 0.7, 0.5, 0.3)],
    "value_bounded": [f"value_bounded:threshold={b}:falling=false" for b in (1, 2, 4, 8, 16)],
}


class Point(NamedTuple):
    """One rule in one setting: B_sup (a round of p pushes taken for one t), and the share of time that workers wait."""

    setting: str
    B_sup: float
    waiting: float


def main() -> int:
    """Run what is not finished, and write the page; 0, or 6 if a claim does not hold."""
    points = {
        (delay, p, rule): [measure(delay, p, text) for text in settings]
        for delay in DELAYS
        for p in WORKERS
        for rule, settings in RULES.items()
    }
    return publish(evidence(points))


def measure(delay: str, workers: int, policy: str) -> Point:
    """One point, from the file of an earlier call if there is one."""
    kept = OUT / delay.replace(" ", "_") / str(workers) / f"{policy}.json"
    if not kept.exists():
        runs = [run(delay, workers, policy, seed) for seed in SEEDS]
        rounds = min(len(squares) for squares, _ in runs)
        b_sup = math.sqrt(max(sum(squares[t] for squares, _ in runs) / len(runs) for t in range(rounds)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(Point(policy, b_sup, sum(waiting for _, waiting in runs) / len(runs))))
        print(f"{delay}, {workers} workers: {policy}", file=sys.stderr)
    return Point(*json.loads(kept.read_text()))


def run(delay: str, workers: int, policy: str, seed: int) -> tuple[list[float], float]:
    """The mean of (D/alpha)^2 over each round of p pushes, and the waiting share, of one run."""
    config = {
        "task": {"name": "quadratic", "noise": 2.0, "start": 0.0},  # the optimum: no start dominates the maximum
        "policy": policy,
        "optimizer": {"lr": 0.02},
        "train": {"samples": ROUNDS * workers},
        "simulation": {"compute": DELAYS[delay]},
        "seed": seed,
    }
    folder = OUT / "run"
    shutil.rmtree(folder, ignore_errors=True)
    summary = simulate(config, workers=workers, run_dir=folder)
    lines = map(json.loads, (folder / "metrics" / "rank-000.jsonl").read_text().splitlines())
    scaled = [(line["discrepancy"] / line["step_size"]) ** 2 for line in lines if line["event"] == "used"]
    rounds = [scaled[start : start + workers] for start in range(0, len(scaled) - workers + 1, workers)]
    waits = summary["wait_share"].values()
    return [sum(squares) / workers for squares in rounds], sum(waits) / len(waits)


def evidence(points: dict[tuple[str, int, str], list[Point]]) -> Evidence:
    table, claims = [["delays", "workers", "B_sup at most", *RULES]], []
    wins = losses = 0
    for delay in DELAYS:
        for p in WORKERS:
            for level in levels(points[delay, p, "stale_synchronous"]):
                waits = {rule: least(points[delay, p, rule], level) for rule in RULES}
                table.append([delay, str(p), f"{level:.3g}", *(shown(wait) for wait in waits.values())])
                others = [w for rule, w in waits.items() if not rule.startswith("elastic_bound") and w is not None]
                ours = min((w for rule, w in waits.items() if rule.startswith("elastic_bound") and w is not None))
                wins, losses = wins + (ours <= min(others) + 0.01), losses + (ours > min(others) + 0.01)
    text = (
        f"elastic_bound waits no longer than the best other rule (to 1 % of the time) in {wins} of {wins + losses} rows"
    )
    claims.append(Claim(text, losses == 0))
    data = {"points": [[*key, *point] for key, found in points.items() for point in found]}
    where = {**environment(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "mpi": "none: virtual time"}
    where = {key: where[key] for key in ("date", "versions", "platform", "processor", "cores", "mpi")}
    title = "Waiting at equal B_sup: quadratic, virtual time"
    return Evidence(NAME, title, f"launch/evidence {NAME}", where, table, claims, data)


def levels(points: list[Point]) -> Iterator[float]:
    """The values of B_sup to compare at: those that stale_synchronous reaches, synchronous pace aside."""
    yield from sorted({point.B_sup for point in points if point.B_sup > 0})


def least(points: list[Point], level: float) -> float | None:
    """The least waiting of the settings whose B_sup is at most `level` (to 2 %)."""
    return min((point.waiting for point in points if point.B_sup <= 1.02 * level), default=None)


def shown(wait: float | None) -> str:
    return "-" if wait is None else f"{wait:.1%}"


if __name__ == "__main__":
    sys.exit(main())
