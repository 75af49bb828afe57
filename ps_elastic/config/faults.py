"""What goes wrong in a run on purpose: one schema for simulated and real runs, every draw seeded.

    faults:
      slow: {workers: [1, 2], factor: 3}
      lost_push: [{chance: 0.01}, {workers: 4, steps: [7]}]
      crash: {workers: 3, at_s: 12}

Under each key stands one entry or a list of entries. Seconds count from the start of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

from ps_elastic.config.sections import Share
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import Duration, Positive, Range, Time, expect, plain, show

Ranks = Annotated[Literal["all"] | int | tuple[int, ...], Range("all, or ranks >= 1")]
Steps = Annotated[tuple[int, ...], Range("steps >= 0")]


@dataclass(frozen=True)
class Fault:
    """Something that happens to some workers."""

    workers: Ranks = "all"  # ranks, or all

    def __post_init__(self) -> None:
        expect(self.ranks != (), self, "workers", "all, or ranks >= 1")

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The ranks named; None: all."""
        if self.workers == "all":
            return None
        return (self.workers,) if isinstance(self.workers, int) else tuple(self.workers)


@dataclass(frozen=True)
class Sometimes(Fault):
    """Something that happens to the pushes of some steps, each with a chance."""

    steps: Steps = ()  # worker steps from 1, each once; of a reply: the step that it answers, from 0. Empty: all
    chance: Share = 1.0  # probability that it happens at a step
    from_s: float = 0.0  # seconds from the start of the run; not before
    until_s: float | None = None  # seconds from the start of the run; not after. null: to the end

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.until_s is None or self.until_s > self.from_s, self, "until_s", "null, or later than from_s")

    def concerns(self, now: float, step: int, random: Random) -> bool:
        """Whether it happens at this step. One number is drawn at each call where the chance is neither 0 nor 1."""
        if not self.from_s <= now < (math.inf if self.until_s is None else self.until_s):
            return False
        if self.steps and step not in self.steps:
            return False
        return self.chance == 1 or (self.chance > 0 and random.random() < self.chance)


@dataclass(frozen=True)
class Slow(Sometimes):
    """A push takes `factor` times as long to compute."""

    factor: Positive = 5.0  # times as long as usual that the push takes


@dataclass(frozen=True)
class Delay(Sometimes):
    """A message takes `delay_s` longer, and so do those that the same worker or server sends behind it."""

    delay_s: Time = 1.0  # seconds longer that the message is under way
    of: Literal["push", "reply"] = "push"  # which messages


@dataclass(frozen=True)
class LostPush(Sometimes):
    """A push is computed and sent, and never arrives."""


@dataclass(frozen=True)
class LostReply(Sometimes):
    """The reply to a push (of step 0: the first model) never arrives."""


@dataclass(frozen=True)
class Duplicate(Sometimes):
    """A push arrives twice."""


@dataclass(frozen=True)
class Moment(Fault):
    """Something that happens to some workers at one time."""

    at_s: Time = 0.0  # seconds from the start of the run


@dataclass(frozen=True)
class Pause(Moment):
    """A worker stands still for `for_s`: its computation ends so much later."""

    for_s: Duration = 1.0  # seconds that the worker stands still


@dataclass(frozen=True)
class Crash(Moment):
    """A worker disappears with the push that it computes; the server hears of it `noticed_s` later."""

    noticed_s: Time = 0.0  # seconds until the server hears of it


@dataclass(frozen=True)
class Join(Moment):
    """A worker is there from now on: one that was gone, or a new rank after the last."""


@dataclass(frozen=True)
class Leave(Moment):
    """A worker finishes its push, and leaves."""


@dataclass(frozen=True)
class Faults:
    """Everything that goes wrong on purpose.

    It is false if nothing does.
    """

    slow: tuple[Slow, ...] = ()
    pause: tuple[Pause, ...] = ()
    delay: tuple[Delay, ...] = ()
    lost_push: tuple[LostPush, ...] = ()
    lost_reply: tuple[LostReply, ...] = ()
    duplicate: tuple[Duplicate, ...] = ()
    crash: tuple[Crash, ...] = ()
    join: tuple[Join, ...] = ()
    leave: tuple[Leave, ...] = ()

    def __bool__(self) -> bool:
        return any(entries for _, entries in self.kinds())

    def kinds(self) -> Iterator[tuple[str, tuple[Fault, ...]]]:
        """Each kind, and its entries."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Plain values, as a file would state them: the kinds that have entries."""
        return {kind: [plain(vars(entry)) for entry in entries] for kind, entries in self.kinds() if entries}

    def check(self, workers: int) -> int:
        """The number of ranks that ever take part beside `workers`. Raises ConfigError for a rank that never does."""
        joining = {rank for entry in self.join for rank in entry.ranks or ()}
        most = max(joining | {workers})
        for kind, entries in self.kinds():
            for i, entry in enumerate(entries):
                at = f"faults.{kind}.{i}.workers"
                if kind == "join" and entry.ranks is None:
                    raise ConfigError("got 'all', expected the ranks that join", key=at)
                if any(rank > most for rank in entry.ranks or ()):
                    raise ConfigError(f"got {show(entry.workers)}, expected ranks from 1 to {most}", key=at)
        absent = set(range(workers + 1, most + 1)) - joining
        if absent:
            got = f"got ranks {sorted(joining)}, expected all from {workers + 1} to the last to join"
            raise ConfigError(got, key="faults.join")
        return most - workers


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
        factor: float = math.prod(entry.factor for entry in self._concerned("slow", worker, step, now))
        return factor

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
