"""The faults of one run as they fall, step by step, for whoever carries the run: virtual time or a real network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from ps_elastic.config.faults import Crash, Faults


class Happening(NamedTuple):
    """A crash, join, leave, or the notice of a crash: what happens to `worker` at a time."""

    at_s: float
    what: Literal["crash", "notice", "join", "leave"]
    worker: int


@dataclass
class Plan:
    """The faults of one run as they fall: asked at each step of each worker, always in the worker's own order."""

    faults: Faults
    seed: int
    _randoms: dict[tuple[str, int, int], Random] = field(default_factory=dict)
    _done: set[tuple[str, int, int, int]] = field(default_factory=set)  # a reply may be sent again for its step

    def happenings(self, workers: int) -> list[Happening]:
        """Who comes and goes, in the order of time; `workers`: all that ever take part."""
        found = []
        for entry in (*self.faults.crash, *self.faults.join, *self.faults.leave):
            for worker in entry.ranks or range(1, workers + 1):
                found.append(Happening(entry.at_s, type(entry).__name__.lower(), worker))  # type: ignore[arg-type]
                if isinstance(entry, Crash):
                    found.append(Happening(entry.at_s + entry.noticed_s, "notice", worker))
        return sorted(found, key=lambda happening: happening.at_s)

    def factor(self, worker: int, step: int, now: float) -> float:
        """How many times as long the push of `step` takes that begins now."""
        return math.prod(entry.factor for entry in self._concerned("slow", worker, step, now))

    def end(self, worker: int, begins: float, duration: float) -> float:
        """When a computation of `duration` ends, with all pauses on its way."""
        ends = begins + duration
        for pause in sorted(self.faults.pause, key=lambda pause: pause.at_s):
            if (pause.ranks is None or worker in pause.ranks) and pause.at_s < ends:
                ends += max(0.0, pause.at_s + pause.for_s - max(begins, pause.at_s))
        return ends

    def delay(self, of: str, worker: int, step: int, now: float) -> float:
        """How much longer a message of this kind, sent now, is under way."""
        return math.fsum(entry.delay_s for entry in self._concerned("delay", worker, step, now) if entry.of == of)

    def happens(
        self, kind: Literal["lost_push", "lost_reply", "duplicate"], worker: int, step: int, now: float
    ) -> bool:
        """Whether this message, sent now, is lost, or comes twice."""
        return bool(list(self._concerned(kind, worker, step, now)))  # all of them draw, whatever the first one says

    def _concerned(self, kind: str, worker: int, step: int, now: float) -> Iterator[Any]:
        for i, entry in enumerate(getattr(self.faults, kind)):
            if entry.ranks is None or worker in entry.ranks:
                key = (kind, i, worker)
                random = self._randoms.get(key) or self._randoms.setdefault(key, Random(f"{self.seed}:{key}"))
                if (*key, step) not in self._done and entry.concerns(now, step, random):
                    if entry.steps:
                        self._done.add((*key, step))
                    yield entry
