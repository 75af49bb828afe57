"""Which step size was the largest since a view was sent: what discrepancies are measured in."""

from __future__ import annotations

from bisect import bisect_left

_TRIM = 1024


class Alphas:
    """The step sizes of the versions of one model, as far back as somebody may ask."""

    def __init__(self) -> None:
        self._falling: list[tuple[int, float]] = []  # (version, alpha): each the largest since its version
        self._trim_at = _TRIM

    def note(self, version: int, alpha: float, oldest: int) -> None:
        """The step from `version` is made with `alpha`; nobody will ask for what was before version `oldest`."""
        falling = self._falling
        if len(falling) > self._trim_at:
            del falling[: bisect_left(falling, oldest, key=lambda entry: entry[0])]
            self._trim_at = _TRIM + 2 * len(falling)
        while falling and falling[-1][1] <= alpha:
            falling.pop()
        falling.append((version, alpha))

    def largest(self, since: int) -> float:
        """The largest step size of the steps made from version `since` on; 0 without any."""
        falling = self._falling
        if falling and falling[0][0] >= since:
            return falling[0][1]
        at = bisect_left(falling, since, key=lambda entry: entry[0])
        return falling[at][1] if at < len(falling) else 0.0
