"""Accuracy against time under three policies, one worker slow: the simulated runs of the tutorial on comparing."""

from __future__ import annotations

import json
import tempfile
from itertools import dropwhile
from pathlib import Path
from typing import Any

from drawings.svg import BLUE, GREEN, GREY, ORANGE, Drawing

from ps_elastic import simulate

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = 3
SETTINGS = ["faults.slow.workers=1", "faults.slow.factor=5", "train.evaluate_every_samples=1500"]
STYLES = {  # colour and dashes: curves are told apart without their colours
    "synchronous": (BLUE, ""),
    "stale_synchronous:bound=2": (GREEN, "8 4"),
    "asynchronous": (ORANGE, "9 3 2 3"),
}
LEFT, RIGHT, TOP, BOTTOM = 60, 610, 44, 270
LOWEST, HIGHEST = 0.8, 1.0
Figures = dict[str, list[tuple[float, float]]]


def measure() -> Figures:
    """Of each policy: simulated seconds and accuracy at each evaluation. Takes about half a minute."""
    found: Figures = {}
    for policy in STYLES:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"policy={policy}", *SETTINGS]
            simulate(REPOSITORY / "configs/digits.yaml", overrides, workers=WORKERS, run_dir=f"{folder}/run")
            lines = (Path(folder) / "run" / "metrics" / "rank-000.jsonl").read_text().splitlines()
        found[policy] = [_point(event) for event in map(json.loads, lines) if event["event"] == "evaluated"]
    return found


def _point(event: dict[str, Any]) -> tuple[float, float]:
    return round(event["t_s"], 4), round(event["accuracy"], 5)


def draw(figures: Figures) -> str:
    end = max(points[-1][0] for points in figures.values())
    d = Drawing(
        640,
        320,
        "Accuracy against simulated time",
        "Three workers train the digits on the same number of samples; one takes five times as long as the others. "
        + "; ".join(f"{name} takes {points[-1][0]:.1f} seconds" for name, points in figures.items()),
    )

    def x(time: float) -> float:
        return LEFT + (RIGHT - LEFT) * time / end

    def y(accuracy: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (accuracy - LOWEST) / (HIGHEST - LOWEST)

    for percent in range(80, 101, 5):
        d.line([(LEFT, y(percent / 100)), (RIGHT, y(percent / 100))], GREY, width=0.5)
        d.text(LEFT - 8, y(percent / 100) + 4, f"{percent} %", anchor="end", style=["small"])
    for second in range(0, int(end) + 1, 50):
        d.line([(x(second), BOTTOM), (x(second), BOTTOM + 5)], GREY, width=1)
        d.text(x(second), BOTTOM + 19, str(second), style=["small"])
    d.text(
        (LEFT + RIGHT) / 2,
        BOTTOM + 40,
        "simulated time in seconds",
        style=["small"],
    )
    d.text(4, TOP - 20, "accuracy", anchor="start", style=["small"])
    left = LEFT + 20.0
    for policy, points in figures.items():
        colour, dashes = STYLES[policy]
        shown = list(dropwhile(lambda point: point[1] < LOWEST, points))
        d.line([(x(time), y(max(accuracy, LOWEST))) for time, accuracy in shown], colour, dashes=dashes)
        d.dot((x(points[-1][0]), y(points[-1][1])), 3.5, colour)
        d.line([(left, TOP - 24), (left + 30, TOP - 24)], colour, dashes=dashes)
        d.text(left + 36, TOP - 20, policy, anchor="start", style=["small"])
        left += 70 + 7 * len(policy)
    return d.svg()
