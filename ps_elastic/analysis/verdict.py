"""What `verify` says of a policy; a verdict that was kept is read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What came of one policy.

    verdict: identity (a promise about every push was kept), within (all of the 95 % interval [low, high]), exceeded
    (none of it, whatever M and sigma in theirs), inconclusive, or not applicable, for the `reason` given. conditions:
    of the theorem, and whether they hold; null where that is not known.
    """

    policy: str
    verdict: str
    reason: str = ""
    B_sup: float | None = None
    low: float | None = None
    high: float | None = None
    B_theory: float | None = None
    B_theory_kind: str | None = None
    tightness: float | None = None  # B_sup / B_theory
    formula: str = ""
    conditions: dict[str, bool | None] | None = None
    figures: dict[str, Any] | None = None  # the Facts
    seeds: int = 0
    pushes: int = 0  # of each run
