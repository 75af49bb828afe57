"""What became of pushes, until their workers have been told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ps_elastic.policies.events import PushId
from ps_elastic.transport.messages import Settled


class Outcome(NamedTuple):
    """What became of a push; weight = alpha x share x weight it was applied with (share x weight if not a gradient)."""

    what: str  # "used", "dropped" or "held"
    discrepancy: float = math.nan
    weight: float = 0.0


HELD = Outcome("held")


class Outcomes:
    """Of the pushes of one shard: `answered`, of those that the next replies answer, and of earlier ones."""

    def __init__(self, bucket: int) -> None:
        self.answered: dict[int, Outcome] = {}  # worker -> of its push that is not answered yet
        self.settled: dict[int, list[Settled]] = {}  # of pushes answered as "held", to be told
        self._bucket = bucket

    def tell(self, push: PushId, outcome: Outcome) -> None:
        """Let the worker know with a later reply than that to the push itself."""
        settled = Settled(push.step, outcome.what, outcome.discrepancy, self._bucket)
        self.settled.setdefault(push.worker, []).append(settled)

    def tell_late(self, known: Iterable[tuple[PushId, float]]) -> None:
        """These pushes were used a while ago, and only now their discrepancy is known."""
        for push, distance in known:
            self.tell(push, Outcome("used", distance))

    def take(self, worker: int, most: int, still: Sequence[Settled] = ()) -> tuple[Outcome, tuple[Settled, ...]]:
        """What to tell `worker` of the push answered now, and of `most` earlier ones: as many as go into one reply.

        still: of pushes that are told to be kept for later.
        """
        told = self.settled.pop(worker, None)
        outcome = self.answered.pop(worker, HELD)
        if told is None:
            return outcome, tuple(still)
        room = most - len(still)
        if rest := told[room:]:
            self.settled[worker] = rest
        return outcome, (*told[:room], *still)


def of_parts(outcomes: Sequence[Outcome]) -> Outcome:
    """Used if anything of the push was, "held" if nothing of it has an outcome yet; ||x - v|| over what was used."""
    known = [outcome.discrepancy for outcome in outcomes if outcome.what == "used"]
    if known:
        return Outcome("used", math.hypot(*known))
    return Outcome("dropped") if any(outcome.what == "dropped" for outcome in outcomes) else HELD
