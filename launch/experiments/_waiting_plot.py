"""The plots of the study of waiting: a panel for a cell, a curve for each policy. They alone need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from _curves import curve
from _waiting_runs import DELAYS, EXACT, NORM, OURS, RUNS, SSP, VALUE, Cell, Point

matplotlib.use("agg")
matplotlib.rcParams |= {"font.size": 8}

STYLES = {
    OURS: ("C3", "-"),
    EXACT: ("C3", ":"),
    VALUE: ("C1", "-"),
    SSP: ("C0", "-"),
    NORM: ("C2", "-"),
    f"{NORM}, server model": ("C2", ":"),
}


def plot_one(found: dict[Cell, dict[str, list[Point]]], cell: Cell, path: Path) -> None:
    """Draw one cell, large enough to be read, into `path`: of the same points, the same bytes."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4))
    _panel(panel, found[cell])
    panel.set_xlabel("B_sup / B_sup of asynchronous")
    panel.set_ylabel("wait time, %")
    panel.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def plot(found: dict[Cell, dict[str, list[Point]]], path: Path) -> None:
    """Draw the wait time against B_sup over that of `asynchronous` into `path`: of the same points, the same bytes."""
    from matplotlib import pyplot

    rows = [(start, p) for start, sizes in RUNS.items() for p in sizes]
    figure, axes = pyplot.subplots(
        len(rows), len(DELAYS), figsize=(11, 1.9 * len(rows)), sharex=True, sharey="row", squeeze=False
    )
    for (start, p), line in zip(rows, axes, strict=True):
        for delays, panel in zip(DELAYS, line, strict=True):
            _panel(panel, found[Cell(start, delays, p)])
            panel.set_title(f"{start}, {delays}, {p} workers", fontsize=7)
        line[0].set_ylabel("wait time, %")
    for panel in axes[-1]:
        panel.set_xlabel("B_sup / asynchronous")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(STYLES), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72, metadata={"Software": None})
    pyplot.close(figure)


def _panel(panel: Any, by_policy: dict[str, list[Point]]) -> None:
    """One cell: points, and what is the least within each B as a line; B = 0 stands at the left edge."""
    (free,) = by_policy["asynchronous"]
    for policy, (colour, style) in STYLES.items():
        points = by_policy[policy if policy in by_policy else NORM]
        scales = [point.own if policy in by_policy else point.server for point in points]
        pairs = [
            (max(s.sup / free.own.sup, 0.02), 100 * point.waiting) for s, point in zip(scales, points, strict=True)
        ]
        xs, ys = zip(*curve(pairs), strict=True)
        panel.plot(xs, ys, style, color=colour, marker=".", markersize=3, linewidth=1, label=policy)
    panel.set_xscale("log")
    panel.set_xlim(0.018, 1.5)
    panel.set_ylim(0, 90)
    panel.grid(alpha=0.3, linewidth=0.5)
    panel.minorticks_off()
