"""What a run adds up to: counts and sums for the live line and summary.json, and what constants B are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add, attrgetter, mul, sub
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ps_elastic.config.sections import Optimizer, Target
from ps_elastic.policies.events import ZERO, Push, Step
from ps_elastic.policies.theory import Facts
from ps_elastic.records.tracker import finite
from ps_elastic.server.evaluator import Evaluation

if TYPE_CHECKING:
    from ps_elastic.server.discrepancy import Use

SLACK = 1e-5  # relative: roundings of float32 that norms and bounds are made of
_BATCH = 1024  # values that are added up together: a third of the time of adding each


class Mean:
    """Mean, root mean square and maximum of the finite values noted, added up in the order noted, many at a time."""

    def __init__(self) -> None:
        self.gather: Callable[[], None] | None = None  # brings the values that are still elsewhere
        self._count, self._sum, self._squares, self._max = 0, 0.0, 0.0, -math.inf
        self._new: list[float] = []

    def note(self, value: float) -> None:
        new = self._new
        new.append(value)
        if len(new) == _BATCH:
            self._add()

    def as_dict(self, *names: str) -> dict[str, float | None]:
        """The statistics called `names` ("mean", "rms", "max"); null where nothing was noted."""
        if self.gather is not None:
            self.gather()
        self._add()
        n = self._count
        values = {"mean": self._sum / n, "rms": math.sqrt(self._squares / n), "max": self._max} if n else {}
        return {name: values.get(name) for name in names}

    def _add(self) -> None:
        new, self._new = self._new, []
        self._add_up(new)

    def note_all(self, new: Iterable[float]) -> None:
        """As a note of each, added up at once."""
        self._add()
        self._add_up(new)

    def note_times(self, new: Iterable[tuple[float, int]]) -> None:
        """As so many notes of each value."""
        self._add()
        for value, times in new:
            if times and value - value == 0:
                self._count += times
                self._sum += times * value
                self._squares += times * value * value
                if value > self._max:
                    self._max = value

    def _add_up(self, new: Iterable[float]) -> None:
        values = [value for value in new if value - value == 0]  # finite, sooner than by a call
        if values:
            self._count += len(values)
            self._sum = reduce(add, values, self._sum)  # `sum` compensates roundings from Python 3.12 on
            self._squares = reduce(add, map(mul, values, values), self._squares)
            self._max = max(self._max, *values)


Row = TypeVar("Row")


class Rows(Generic[Row]):
    """What several means are made of, row by row: `add` notes the rows there, many at a time."""

    def __init__(self, add: Callable[[Sequence[Row]], None], *means: Mean) -> None:
        self._add, self._rows = add, list[Row]()
        for mean in means:
            mean.gather = self.gather

    def note(self, *rows: Row) -> None:
        self._rows += rows
        if len(self._rows) >= _BATCH:
            self.gather()

    def gather(self) -> None:
        if self._rows:
            rows, self._rows = self._rows, []
            self._add(rows)


class Totals:
    """What happened so far. `samples`: of the pushes used."""

    def __init__(self, workers: int, target: Target | None = None) -> None:
        self.workers = workers
        self.samples = self.samples_computed = self.pushes = self.used = self.dropped = 0
        self.held_max = self.bytes_up = self.bytes_down = 0
        self.staleness, self.discrepancy, self.scaled = Mean(), Mean(), Mean()
        # How far the copies of pushes were that are used, or of parts; `push` of each is here.
        self.note_used = Rows(self._add_uses, self.staleness, self.discrepancy, self.scaled).note
        self.loss = math.nan  # of the last push
        self.metrics: dict[str, float] = {}
        self.target = target
        self.time_to_target_s: float | None = None
        self.shared_steps = 0  # those that workers could take part in
        self.helped: float | None = None  # the fraction of them that workers made
        self.waited = dict.fromkeys(range(1, workers + 1), 0.0)  # seconds for replies, as each says

    def _add_uses(self, uses: Sequence[Use]) -> None:
        _, pushes, versions, distances, scaled, *_ = zip(*uses, strict=True)
        self.staleness.note_all(map(sub, versions, map(attrgetter("base"), pushes)))
        self.discrepancy.note_all(distances)
        self.scaled.note_all(scaled)

    def note_evaluation(self, evaluation: Evaluation) -> bool:
        """Take the metrics in; whether the target is reached by them."""
        self.metrics = evaluation.metrics
        if self.target is None or not self.target.reached(evaluation.metrics):
            return False
        if self.time_to_target_s is None:
            self.time_to_target_s = evaluation.t_s
        return True

    def summary(self, now: float) -> dict[str, Any]:
        """The part of summary.json that comes from counting; `now`: seconds since the start."""
        scaled = self.scaled.as_dict("rms", "max")
        return {
            "samples": self.samples,
            "samples_computed": self.samples_computed,
            "pushes": self.pushes,
            "used": self.used,
            "dropped": self.dropped,
            "held_max": self.held_max,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "staleness": self.staleness.as_dict("mean", "max"),
            "discrepancy": self.discrepancy.as_dict("rms", "max"),
            "B_rms": scaled["rms"],
            "B_max": scaled["max"],
            "shared_steps": self.shared_steps,
            "shared_by_workers": self.helped,
            "wait_share": {str(w): waited / now if now > 0 else None for w, waited in self.waited.items()},
            "metrics": {"loss": None, "accuracy": None} | {k: finite(v) for k, v in self.metrics.items()},
            "time_to_target_s": self.time_to_target_s,
        }


class BoundFacts:
    """Norms, counts and spreads of one run, in gradient units. The server notes them. mean: adds up those of pushes."""

    def __init__(self, workers: int, mean: Callable[[], Mean] = Mean) -> None:
        self.most = self.fewest = workers  # live at a time
        self.gradients, self.pushes, self.applied, self.residuals = Mean(), mean(), mean(), Mean()
        self._steps = Rows(self._add_steps, self.gradients, self.pushes, self.applied, self.residuals)
        # A step, the pushes that it used, those for the first time with their metadata, and how far the model moved
        # over alpha.
        self.note_step = self._steps.note
        self.shares = 0.0  # of the steps between a copy and its use, most
        self.reapplied = self.astray = 0.0  # weight/alpha of own pushes in a copy, and what the model has else, most
        self.owed = self.lateness = self.lost = self.beyond = 0
        self._deviation, self._freedom = 0.0, 0

    def note_workers(self, count: int) -> None:
        self.most, self.fewest = max(self.most, count), min(self.fewest, max(1, count))

    def note_use(self, use: Use, promised: Callable[[], float] | None) -> None:
        """A step counts a push in; promised: what its policy says of the most that `scaled` can be, if it does."""
        if use.shares > self.shares:
            self.shares = use.shares
        if promised is not None and use.scaled > promised() * (1 + SLACK):
            self.beyond += 1

    def note_reapplied(self, weight: float, astray: float) -> None:
        """A copy contains pushes of its worker of this weight/alpha in all; the model has that but for `astray`."""
        self.reapplied, self.astray = max(self.reapplied, weight), max(self.astray, astray)

    def note_debts(self, count: int, lateness: int) -> None:
        """So many pushes are late after a step, the oldest of them since `lateness` steps, this one included."""
        self.owed, self.lateness = max(self.owed, count), max(self.lateness, lateness)

    def _add_steps(self, rows: Sequence[tuple[Step, Sequence[Push], float]]) -> None:
        pushes, applied = list[Push](), list[tuple[float, int]]()
        for step, fresh, moved in rows:
            pushes += fresh
            if step.apply != "amend":  # which moves the model by what earlier steps lacked
                count, direction = len(fresh), moved / step.share
                applied.append((direction, count))
                if count > 1 and step.combine == "mean":
                    self._add_deviation(step, fresh, direction)
        self.applied.note_times(applied)
        if pushes:
            _, _, norms, payload_norms, residual_norms, *_ = zip(*pushes, strict=True)
            self.gradients.note_all(norms)
            self.pushes.note_all(payload_norms)
            self.residuals.note_all(residual_norms)

    def _add_deviation(self, step: Step, fresh: Sequence[Push], direction: float) -> None:
        """How far the pushes of a step are from their mean, where the step is along the mean of them and of zeros."""
        pushes = terms = 0
        for id, weight, _ in step.terms:
            if id.worker or id == ZERO:  # not the mean of the others
                if weight != 1:
                    return
                pushes, terms = pushes + (id.worker > 0), terms + 1
        if pushes == len(fresh):
            mean, squares = direction * terms / pushes, 0.0
            for push in fresh:
                squares += push.payload_norm**2
            self._deviation += max(0.0, squares - pushes * mean**2)
            self._freedom += pushes - 1

    def facts(self, tau: int, optimizer: Optimizer, units: str) -> Facts:
        """tau: largest staleness of a push used. units: of the pushes."""
        self._steps.gather()
        plain = optimizer.name == "sgd" and not optimizer.momentum and not optimizer.weight_decay
        push, applied = (mean.as_dict("rms")["rms"] or 0.0 for mean in (self.pushes, self.applied))
        scaled = units == "gradient"
        return Facts(
            p=self.most,
            fewest=self.fewest,
            M=push if plain and scaled else applied,
            M_push=push,
            M_applied=applied,
            sigma=math.sqrt(self._deviation / self._freedom) if self._freedom and plain and scaled else None,
            tau=tau,
            shares=self.shares,
            owed=self.owed,
            lateness=self.lateness,
            lost=self.lost,
            momentum=optimizer.momentum if optimizer.name == "sgd" else 0.0,
            plain=plain and scaled,
            reapplied=self.astray if plain and scaled else self.reapplied,
        )
