"""The rows of a comparison: what the seeds of one policy and compressor say together, and which row to take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ps_elastic.errors import PlatformError

ONE_POINT = 0.01  # of accuracy


def require_scipy() -> None:
    """Raise PlatformError where the statistics of several seeds cannot be made."""
    if find_spec("scipy") is None:
        missing = "a comparison of several seeds needs scipy, which is not installed"
        raise PlatformError(f"{missing}: `pip install ps_elastic[statistics]`")


def rows(cells: Sequence[dict[str, Any]], baseline: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each policy and compressor with a finished cell, in the order of the cells.

    A figure is the mean over the finished seeds, and null if one of them lacks it. Of the rest: staleness.max and
    discrepancy.max are the largest, discrepancy.rms is the root of the mean square, sd is that of a sample (null with
    one seed), and wait_share is the mean over the workers too.

    diff: accuracy minus the baseline's, paired by seed, with the 95 % interval of Student's t for paired samples;
    low and high are null with a single pair.
    """
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            groups.setdefault((cell["policy"], cell["compressor"]), {})[cell["seed"]] = cell["summary"]
    base = groups.get((baseline["policy"], baseline["compressor"]), {})
    return [
        {"policy": policy, "compressor": compressor, **_row(group, base)}
        for (policy, compressor), group in groups.items()
    ]


def _row(group: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any]:
    def each(path: str) -> list[float] | None:
        values = [figure(summary, path) for summary in group.values()]
        return None if None in values else [value for value in values if value is not None]

    def mean(path: str) -> float | None:
        values = each(path)
        return statistics.fmean(values) if values else None

    def largest(path: str) -> float | None:
        return max(each(path) or (), default=None)

    def spread(path: str) -> dict[str, float | None]:
        values = each(path) or []
        return {"mean": mean(path), "sd": statistics.stdev(values) if len(values) > 1 else None}

    rms = each("discrepancy.rms")
    shares = [share for summary in group.values() for share in (summary.get("wait_share") or {}).values()]
    return {
        "seeds": list(group),
        "accuracy": spread("metrics.accuracy"),
        "loss": spread("metrics.loss"),
        "wall_s": mean("wall_s"),
        "time_to_target_s": mean("time_to_target_s"),
        "bytes_up": mean("bytes_up"),
        "bytes_down": mean("bytes_down"),
        "staleness": {"mean": mean("staleness.mean"), "max": largest("staleness.max")},
        "discrepancy": {
            "rms": math.sqrt(statistics.fmean(value * value for value in rms)) if rms else None,
            "max": largest("discrepancy.max"),
        },
        "dropped": mean("dropped"),
        "wait_share": statistics.fmean(shares) if shares and None not in shares else None,
        "samples": mean("samples"),
        "diff": _difference(group, base),
    }


def figure(summary: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path of a summary, or None where there is none."""
    value: Any = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _difference(group: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, float | None]:
    pairs = [
        (figure(group[seed], "metrics.accuracy"), figure(base[seed], "metrics.accuracy"))
        for seed in group
        if seed in base
    ]
    differences = [own - other for own, other in pairs if own is not None and other is not None]
    if not differences:
        return {"mean": None, "low": None, "high": None}
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return {"mean": mean, "low": None, "high": None}
    from scipy import stats  # most of a second: for --help, and where one seed has no statistics, it would be wasted

    n = len(differences)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def recommend(table: Sequence[dict[str, Any]], pairs: int, seeds: Sequence[int]) -> dict[str, Any]:
    """The fastest of the rows within one point of the best accuracy, and by which figures.

    pairs: how many rows there are when all is finished. Only rows with an accuracy and a time for every seed take
    part; without one, policy and compressor are null.
    """
    able = [
        row
        for row in table
        if len(row["seeds"]) == len(seeds) and row["accuracy"]["mean"] is not None and row["wall_s"] is not None
    ]
    if not able:
        text = "No recommendation: no row has an accuracy and a time for every seed."
        return {"policy": None, "compressor": None, "text": text}
    best = max(able, key=lambda row: row["accuracy"]["mean"])
    near = [row for row in able if row["accuracy"]["mean"] >= best["accuracy"]["mean"] - ONE_POINT]
    choice = min(near, key=lambda row: row["wall_s"])
    text = f"{_name(choice)} is the fastest within one point of the best accuracy: {_figures(choice)}"
    if choice["accuracy"]["mean"] < best["accuracy"]["mean"]:
        text += f"; the best accuracy is that of {_name(best)}: {_figures(best)}"
    text += (
        ". One seed is a single observation, no statistic." if len(seeds) == 1 else f". Means of {len(seeds)} seeds."
    )
    if len(able) < pairs:
        text += f" Of {pairs} pairs, {pairs - len(able)} did not finish and took no part."
    return {"policy": choice["policy"], "compressor": choice["compressor"], "text": text}


def _name(row: dict[str, Any]) -> str:
    return f"{row['policy']} with {row['compressor']}"


def _figures(row: dict[str, Any]) -> str:
    return f"{row['accuracy']['mean']:.2%} in {row['wall_s']:.1f} s"


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row as one line of a table: `accuracy.mean` becomes `accuracy_mean`, seeds are separated by spaces."""
    line: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            line.update({f"{key}_{part}": number for part, number in value.items()})
        else:
            line[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return line
