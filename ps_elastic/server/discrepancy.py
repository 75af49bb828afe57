"""Discrepancy: how far each view was from the true model when its push was used, measured where the views are known."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from ps_elastic.policies.events import Push, PushId, ReplyId, Step, repeated
from ps_elastic.records.tracker import Tracker, number
from ps_elastic.server.totals import BoundFacts, Totals

if TYPE_CHECKING:
    from ps_elastic.server.protocols import Ideal, Store

_WIDER = 1 + 4e-6  # a distance, and the moves whose sum bounds it, are good to norms.ACCURACY = 1.2e-6 each
_TRIM = 1024


class Sent(NamedTuple):
    """A view given away: its version, and how far the model had travelled by then."""

    version: int
    path: float
    shares: float  # of all steps until then
    owed_alpha: float  # the largest step size since any step that owed a push then
    reapplied: float = 0.0  # norms of what its worker re-applied, times their rate


class Owed(NamedTuple):
    """A debt: the largest step size since the step that owes it, and how many steps were made by then."""

    alpha: float
    steps: int


class Use(NamedTuple):
    """A push that a step counts in: what its log line says, and what the line waits for.

    push: None while only a stand-in is here. ideal: None where `distance` is known.
    """

    id: PushId
    push: Push | None
    version: int
    distance: float
    path: float
    largest: float
    alpha: float
    weight: float
    share: float
    ideal: Ideal | None


class DiscrepancyMeter:
    """Follows every view from the reply that gives it to the line that tells of its push.

    B is ||x - v|| over the largest step size between view and use, those of pushes owed when it was given included.

    mode: "exact" measures ||x - v||, "bound" tells the path length instead, "off" neither. x: "srv" for the server's
    model, "ideal" for that model with every debt settled; then a line waits until the debts of its time are closed.
    """

    def __init__(
        self,
        store: Store,
        step_sizes: StepSizes,
        totals: Totals,
        measures: BoundFacts,
        tracker: Tracker,
        mode: str,
        x: str,
        limit: Callable[[], float],
        bucket: int | None = None,
    ) -> None:
        self.sent: dict[PushId | ReplyId, Sent] = {}
        self._store, self._step_sizes, self._tracker = store, step_sizes, tracker
        self._totals, self._measures = totals, measures
        self._mode, self._x, self._limit = mode, x, limit
        self._end = "}" if bucket is None else f', "bucket": {bucket}}}'  # of a line
        self._is_exact = mode == "exact" and x == "srv"
        self._path = 0.0  # sum of ||x_{s+1} - x_s||
        self._shares = 0.0  # sum of the shares of all steps
        self._owed_alpha = 0.0  # the largest of `_debts` at the last step
        self._open: dict[int, list[Use]] = {}  # version -> uses whose ideal model is not known yet
        self._owed_uses: dict[PushId, Use] = {}  # of pushes owed, until they are repaid and their distance is known
        self.debts: dict[PushId, Owed] = {}  # by the missing push
        self._ideals: dict[PushId, Ideal] = {}  # of the views that the step under way uses, while debts are open
        self._steps = 0

    def give(self, view: PushId | ReplyId, version: int) -> None:
        """The view of `version` is on its way to the push `view`, perhaps for the second time."""
        if view not in self.sent:
            owed_alpha = self._owed_alpha if self.debts else 0.0
            self.sent[view] = Sent(version, self._path, self._shares, owed_alpha)

    def derive(self, view: PushId, reply: ReplyId, reapplied: float) -> None:
        """The push `view` was computed on the model of `reply`; reapplied: norms of what was subtracted from it."""
        self.sent[view] = self.sent[reply]._replace(reapplied=reapplied)

    def end(self, view: PushId | ReplyId) -> None:
        """Nobody will ask for this view again."""
        if self.sent.pop(view, None) is not None:
            self._store.end(view)

    def oldest(self, version: int) -> int:
        """The version of the oldest view not ended, `version` without any: views are given in the order of versions."""
        first = next(iter(self.sent.values()), None)
        return version if first is None else first.version

    def watch(self, step: Step) -> list[PushId]:
        """The views that the step about to be made uses for the first time or owes, and is to measure."""
        if self._mode != "exact":
            return []
        views = [view for term in step.terms if (view := term.stands_for or term.push) in self.sent]
        if self._x == "ideal" and self.debts:
            self._ideals = {view: self._store.ideal(view) for view in views}
        return views

    def use(
        self, id: PushId, push: Push | None, version: int, alpha: float, weight: float, share: float, now: float
    ) -> float:
        """The step from `version` used the push `id`, or owes it (then `push` is None): tell of its view.

        The store has made the step, but `stepped` and `step_sizes` were not told of it yet. alpha: of that step.
        Returns the discrepancy, nan if it is not known yet.
        """
        given, path_then, shares_then, owed_alpha, path = self.sent[id]
        if given != version:
            # The sum of moves bounds the distance only to rounding: widen it by what the roundings can amount to.
            path += (self._path - path_then) * _WIDER + 2 * math.ulp(self._path)
        mode = self._mode
        distance = self._store.distance_when_used(id) if mode == "exact" else path if mode == "bound" else math.nan
        largest = self._step_sizes.largest(given)
        if owed_alpha > largest:
            largest = owed_alpha
        scaled = _scaled(distance, largest)
        self._measures.note_use(self._shares - shares_then, scaled if self._is_exact else math.nan, self._limit())
        ideal = None
        if self.debts and self._x == "ideal" and mode == "exact":
            ideal, distance = self._ideals.pop(id), math.nan
        if ideal is None and push is not None:
            self._note(push, distance, scaled, path, version, now, alpha, weight, share)
            return distance
        use = Use(id, push, version, distance, path, largest, alpha, weight, share, ideal)
        if push is None:
            self._owed_uses[id] = use
        if ideal is not None:
            self._open.setdefault(version, []).append(use)
        return distance

    def stepped(self, step: Step, alpha: float, moved: float) -> None:
        """A step with `alpha` moved the model by ||x_new - x_old|| = `moved`, and opened the debts it names."""
        self._path += moved
        self._shares += step.share
        self._steps += 1
        for missing, owed in self.debts.items():
            if owed.alpha < alpha:
                self.debts[missing] = owed._replace(alpha=alpha)
        for term in step.terms:
            if term.stands_for is not None:
                self.debts[term.stands_for] = Owed(alpha, self._steps)
        if self.debts:
            self._owed_alpha = max(owed.alpha for owed in self.debts.values())
            oldest = next(iter(self.debts.values()))
            self._measures.note_debts(len(self.debts), self._steps - oldest.steps + 1)

    def repaid(self, push: Push, moved: float, now: float) -> list[tuple[PushId, float]]:
        """The debt on `push` was repaid; return the pushes whose discrepancy is known by that."""
        self._path += moved
        self._measures.note_push(push)
        use = self._owed_uses[push.id] = self._owed_uses[push.id]._replace(push=push)
        waits = use.ideal is not None and use.version in self._open
        return ([] if waits else self._close(use, now)) + self._settle(push.id, now, paid=True)

    def forgiven(self, owed: Collection[PushId], now: float, *, ended: bool) -> list[tuple[PushId, float]]:
        """Debts not among `owed` were closed unpaid; return the pushes whose discrepancy is known by that.

        ended: because the run is over, so that nothing is lost by it.
        """
        known: list[tuple[PushId, float]] = []
        if len(owed) == len(self.debts):  # every debt of the ledger is known here, so none was closed
            return known
        for missing in [push for push in self.debts if push not in owed]:
            self._measures.lost += not ended
            self._store.forgive(missing)
            self._owed_uses.pop(missing, None)
            known += self._settle(missing, now, paid=False)
        return known

    def largest_alpha_owed(self, missing: PushId) -> float:
        """The largest step size since the Step that owes `missing`."""
        return self.debts[missing].alpha

    def measure(self, view: PushId) -> float:
        """||x - v|| / (largest alpha since the view was sent); 0 if that is 0."""
        largest = self._step_sizes.largest(self.sent[view].version)
        return self._store.distance(view) / largest if largest else 0.0

    def _settle(self, missing: PushId, now: float, *, paid: bool) -> list[tuple[PushId, float]]:
        """A debt is closed: note the uses that waited for no other."""
        del self.debts[missing]
        known = []
        for version, uses in tuple(self._open.items()):
            ideal = uses[0].ideal  # those of a step wait for the same debts
            assert ideal is not None
            ideal.settlement.settle(missing, self._store.delta() if paid else None)
            if not ideal.settlement.debts:
                del self._open[version]
                for use in uses:
                    known += self._close(use, now)
        return known

    def _close(self, use: Use, now: float) -> list[tuple[PushId, float]]:
        """The distance of a use is known: note it, once its push is here; never, if what it owes was forgiven."""
        if use.push is None:
            owed = self._owed_uses.get(use.id)
            if owed is None or owed.push is None:
                return []
            use = owed
        self._owed_uses.pop(use.id, None)
        distance = use.distance if use.ideal is None else use.ideal.distance
        assert use.push is not None and distance is not None
        scaled, given = _scaled(distance, use.largest), (use.version, now, use.alpha, use.weight, use.share)
        self._note(use.push, distance, scaled, use.path, *given)
        return [(use.id, distance)]

    def _note(
        self, push: Push, distance: float, scaled: float, path: float,
        version: int, now: float, alpha: float, weight: float, share: float,
    ) -> None:  # fmt: skip
        self._totals.note_used(version - push.base, distance, scaled)
        self._tracker.later(self._line, push, distance, scaled, path, version, now, alpha, weight, share)

    def _line(
        self, push: Push, distance: float, scaled: float, path: float,
        version: int, now: float, alpha: float, weight: float, share: float,
    ) -> str:  # fmt: skip
        """As `note` of the tracker would write it, in a quarter of the time: one line for every push."""
        (worker, step), base, norm, payload_norm, residual_norm, _, _, _ = push
        text = repr if math.isfinite(distance + scaled + path + norm + payload_norm + residual_norm) else number
        return (
            f'{{"event": "used", "t_s": {now!r}, "rank": {self._tracker.rank}, "worker": {worker}, "step": {step}, '
            f'"base": {base}, "version": {version}, "x": "{self._x}", "staleness": {version - base}, "discrepancy": '
            f'{text(distance)}, "B": {text(scaled)}, "step_size": {repeated(alpha)}, "path_length": {text(path)}, '
            f'"norm": {text(norm)}, "payload_norm": {text(payload_norm)}, "residual_norm": {text(residual_norm)}, '
            f'"weight": {repeated(weight)}, "share": {repeated(share)}{self._end}'
        )


def _scaled(distance: float, largest: float) -> float:
    """distance / largest; of a model that did not move 0, whatever the step size."""
    return distance / largest if largest else (0.0 if distance == 0 else math.nan)


class StepSizes:
    """The step sizes of the versions of one model, as far back as somebody may ask.

    Discrepancies are measured in the largest since a view was sent.
    """

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
