"""Discrepancy D: how far the worker's copy was from the server's model when its push was used, if copies are known."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import NamedTuple

from ps_elastic.policies.events import Push, PushId, ReplyId, Step, repeated
from ps_elastic.records.tracker import number
from ps_elastic.server.protocols import Store

_WIDER = 1 + 4e-6  # a distance, and the moves whose sum bounds it, are good to norms.ACCURACY = 1.2e-6 each
_TRIM = 1024
_weight = itemgetter(1)  # of a term


class Sent(NamedTuple):
    """A copy sent to a worker: its version, and how far the model had travelled by then."""

    version: int
    path: float
    shares: float  # of all steps until then
    owed_alpha: float  # the largest step size since any step that had a placeholder open then
    reapplied: float = 0.0  # norms of what its worker re-applied, times their rate


class Use(NamedTuple):
    """A push that the step from `version` counts in, and how far its worker's copy was from that version."""

    id: PushId
    push: Push | None  # None: only a placeholder is here
    version: int
    distance: float  # nan where it is not known
    scaled: float  # distance over `largest`, see `over`
    path: float  # that the model went since the copy was sent: at least the distance, if no push is late
    shares: float  # of the steps since
    largest: float  # step size since, those of pushes late when the copy was sent included
    alpha: float
    weight: float
    share: float


class DiscrepancyMeter:
    """Follows every worker's copy from the reply that carries it to the use of its push.

    B is ||x - v|| over the largest step size between copy and use, those of pushes late when it was sent included.
    mode: "exact" measures ||x - v||, "bound" tells the cumulative step length instead, "off" neither.
    """

    def __init__(self, store: Store, step_sizes: StepSizes, mode: str) -> None:
        self.sent: dict[PushId | ReplyId, Sent] = {}
        self.steps = 0  # made so far, those of late gradients left out
        self._store, self._step_sizes, self._mode = store, step_sizes, mode
        self._path = 0.0  # sum of ||x_{s+1} - x_s||
        self._shares = 0.0  # sum of the shares of all steps

    def give(self, view: PushId | ReplyId, version: int, owed_alpha: float = 0.0) -> None:
        """A copy of `version`, for the push `view`, is on its way, perhaps for the second time."""
        if view not in self.sent:
            self.sent[view] = Sent(version, self._path, self._shares, owed_alpha)

    def derive(self, view: PushId, reply: ReplyId, reapplied: float) -> None:
        """The push `view` was computed on the model of `reply`; reapplied: norms of what was subtracted from it."""
        self.sent[view] = self.sent[reply]._replace(reapplied=reapplied)

    def end(self, view: PushId | ReplyId) -> None:
        """Nobody will ask for this copy again."""
        if self.sent.pop(view, None) is not None:
            self._store.end(view)

    def oldest(self, version: int) -> int:
        """The version of the oldest copy not ended, `version` without any: they are sent in the order of versions."""
        first = next(iter(self.sent.values()), None)
        return version if first is None else first.version

    def uses(self, step: Step, arrived: Mapping[PushId, Push], version: int, alpha: float) -> list[Use]:
        """How far the copies were of pushes that `step`, from `version`, uses for the first time or replaces.

        The store has made the step, but `stepped` was not told of it yet. arrived: the metadata of those it uses.
        """
        terms, share, combine, _ = step
        total = 1.0 if combine == "sum" else sum(map(_weight, terms))
        sent, mode, falling, uses = self.sent, self._mode, self._step_sizes.falling, list[Use]()
        for push, weight, missing in terms:
            view = push if missing is None else missing
            if view not in sent:
                continue
            given, path_then, shares_then, largest, path = sent[view]
            if given != version:
                # The sum of moves bounds the distance only to rounding: widen it by what the roundings can amount to.
                path += (self._path - path_then) * _WIDER + 2 * math.ulp(self._path)
                first, most = falling[0]
                since = most if first >= given else self._step_sizes.largest(given)
                if since > largest:
                    largest = since
            distance = path if mode == "bound" else math.nan
            if mode == "exact":
                distance = self._store.distance_when_used(view)
            scaled = distance / largest if largest else (0.0 if distance == 0 else math.nan)
            metadata = arrived[view] if missing is None else None
            shares = self._shares - shares_then
            uses.append(
                Use(view, metadata, version, distance, scaled, path, shares, largest, alpha, weight / total, share)
            )
        return uses

    def stepped(self, share: float, moved: float, version: int, alpha: float, oldest: Callable[[int], int]) -> None:
        """The step from `version` moved the model by ||x_new - x_old|| = `moved`; the rest: see StepSizes.note."""
        self._path += moved
        self._shares += share
        self.steps += 1
        falling = self._step_sizes.falling
        if len(falling) == 1 and falling[0][1] <= alpha:  # as it is where the step size stays
            falling[0] = version, alpha
        else:
            self._step_sizes.note(version, alpha, oldest)

    def amended(self, moved: float, version: int, alpha: float, oldest: Callable[[int], int]) -> None:
        """As `stepped`, of one that applied a late gradient."""
        self._path += moved
        self._step_sizes.note(version, alpha, oldest)

    def measure(self, view: PushId) -> float:
        """||x - v|| / (largest alpha since the copy was sent); 0 if that is 0."""
        largest = self._step_sizes.largest(self.sent[view].version)
        return self._store.distance(view) / largest if largest else 0.0


def over(distance: float, largest: float) -> float:
    """distance / largest; of a model that did not move 0, whatever the step size."""
    return distance / largest if largest else (0.0 if distance == 0 else math.nan)


def use_lines(uses: Iterable[Use], now: float, rank: int, x: str, end: str) -> str:
    """As `note` of the tracker would write them, in a quarter of the time: one line for every push.

    x: the model that distances are from, "srv" or "ideal". end: of a line.
    """
    lines = list[str]()
    for _, push, version, distance, scaled, path, _, _, alpha, weight, share in uses:
        assert push is not None
        (worker, step), base, norm, payload_norm, residual_norm, _, _, _ = push
        text = repr if math.isfinite(distance + scaled + path + norm + payload_norm + residual_norm) else number
        lines.append(
            f'{{"event": "used", "t_s": {now!r}, "rank": {rank}, "worker": {worker}, "step": {step}, '
            f'"base": {base}, "version": {version}, "x": "{x}", "staleness": {version - base}, "discrepancy": '
            f'{text(distance)}, "B": {text(scaled)}, "step_size": {repeated(alpha)}, "path_length": {text(path)}, '
            f'"norm": {text(norm)}, "payload_norm": {text(payload_norm)}, "residual_norm": {text(residual_norm)}, '
            f'"weight": {repeated(weight)}, "share": {repeated(share)}{end}'
        )
    return "\n".join(lines)


class StepSizes:
    """The step sizes of the versions of one model, as far back as somebody may ask.

    Discrepancies are measured in the largest since a copy was sent.
    """

    def __init__(self) -> None:
        self.falling: list[tuple[int, float]] = []  # (version, alpha): each the largest since its version
        self._trim_at = _TRIM

    def note(self, version: int, alpha: float, oldest: Callable[[int], int]) -> None:
        """The step from `version` is made with `alpha`; nobody will ask for what was before version oldest(version)."""
        falling = self.falling
        if len(falling) > self._trim_at:
            del falling[: bisect_left(falling, (oldest(version),))]
            self._trim_at = _TRIM + 2 * len(falling)
        while falling and falling[-1][1] <= alpha:
            falling.pop()
        falling.append((version, alpha))

    def largest(self, since: int) -> float:
        """The largest step size of the steps made from version `since` on; 0 without any."""
        falling = self.falling
        if falling and falling[0][0] >= since:
            return falling[0][1]
        at = bisect_left(falling, (since,))  # before any of that version
        return falling[at][1] if at < len(falling) else 0.0
