"""What the study of waiting makes of points (B, waiting): the curve of a policy, read at any B."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

Point = tuple[float, float]  # (B, part of the time spent waiting)


class Read(NamedTuple):
    """A curve at one B, and its two neighbours there; the right one is None beyond the last point."""

    waiting: float
    left: float
    right: float | None


def curve(points: Iterable[Point]) -> list[Point]:
    """The least waiting that is to be had within each B: `points` by B, without those that do worse than one before."""
    least: list[Point] = []
    for b, waiting in sorted(points):
        if not least or waiting < least[-1][1]:
            least.append((b, waiting))
    return least


def read(points: Iterable[Point], level: float) -> Read | None:
    """The curve of `points` at B = level, straight between neighbours on a scale of log B; None if all lie beyond.

    From B = 0, which such a scale has not, it stays where it is until the next point.
    """
    line = curve(points)
    within = [point for point in line if point[0] <= level]
    beyond = [point for point in line if point[0] > level]
    if not within:
        return None
    (left, waits), right = within[-1], beyond[0] if beyond else None
    if right is None or left == 0:
        return Read(waits, waits, right and right[1])
    part = math.log(level / left) / math.log(right[0] / left)
    return Read(waits + part * (right[1] - waits), waits, right[1])
