"""The definition of elastic consistency, estimated: runs over many seeds, compared with the constant of a policy.

    E||x_t - v_t||^2 <= alpha^2 B^2 for every t:  B_sup = max over t of sqrt(mean over seeds of (D_t / alpha)^2)

t counts the pushes used. M (the largest over t of the rms over seeds) and sigma come from other seeds. The runs are in
simulated time, with the arrivals that `simulation` and `faults` of the configuration make.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ps_elastic.analysis.verdict import Verdict
from ps_elastic.config.schema import Config
from ps_elastic.policies.theory import EQUAL_DATA, SMALL_STEP, Bound, Facts
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.build import Parts, make_parts, make_server, shared_workers
from ps_elastic.server.server import Server
from ps_elastic.server.totals import SLACK, BoundFacts, Mean
from ps_elastic.simulation.nodes import Stopwatch, TurnTakingWorker
from ps_elastic.simulation.virtual_time import make_simulator
from ps_elastic.tasks import Task

RESAMPLES = 1000
OTHER = 1_000_000  # added to a seed, it is one of the others


class Played(NamedTuple):
    """One run: D/alpha of each push used, in the order of use; norms; and what was counted."""

    scaled: list[float]
    measures: BoundFacts
    staleness: int
    sigma: float  # of a gradient, at the start or at the end of the run, whichever is larger
    waiting: float  # fraction of the time that a worker has nothing to do, the mean over workers


def verify(config: Config, workers: int, seeds: int) -> Verdict:
    """Compare the policy of `config` with its own constant. Raises ConfigError where the parts do not fit together."""
    runs = [play(replace(config, seed=config.seed + k), workers) for k in range(seeds)]
    others = [play(replace(config, seed=config.seed + OTHER + k), workers) for k in range(max(2, seeds // 2))]
    facts, at_most = _facts(config, runs, others)
    bound, loosest = (config.policy.build().declared_bound(known) for known in (facts, at_most))
    pushes = min(len(run.scaled) for run in runs)
    squares = np.array([run.scaled[:pushes] for run in runs]) ** 2  # (seeds, pushes)
    sup, low, high = estimate(squares)
    text = config.policy.text()
    said = Verdict(text, "", B_sup=sup, low=low, high=high, figures=facts._asdict(), seeds=seeds, pushes=pushes)
    if bound is None or bound.value is None:
        return replace(said, verdict="not applicable", reason=bound.formula if bound else "it declares no constant")
    conditions = _conditions(config, bound)
    said = replace(
        said,
        B_theory=bound.value,
        B_theory_kind=bound.kind,
        tightness=sup / bound.value if bound.value else None,
        formula=bound.formula,
        conditions=conditions,
    )
    reasons = [f"not so: {name}" for name, holds in conditions.items() if holds is False]
    if config.compressor.feeds_back:
        reasons.append("with error feedback D is to the server's model, and the residuals are not in it")
    if reasons:
        return replace(said, verdict="not applicable", reason="; ".join(reasons))
    assert loosest is not None and loosest.value is not None
    promised = config.policy.build().limit() < math.inf
    if bound.every_push:
        beyond = any(run.measures.beyond for run in runs) if promised else sup > bound.value * (1 + SLACK)
        return replace(said, verdict="exceeded" if beyond else "identity")
    return replace(said, verdict=_judge(low, high, bound.value, loosest.value))


def estimate(squares: NDArray[np.float64]) -> tuple[float, float, float]:
    """(B_sup, low, high) of `squares` (seeds, pushes) = (D/alpha)^2, with a 95 % interval by the bootstrap over seeds.

    The basic bootstrap, [2 B_sup - q_97.5, 2 B_sup - q_2.5], since a maximum of noisy means lies above the true one,
    and those resampled lie above it again by as much; stretched to hold B_sup.
    """
    n = len(squares)
    if not squares.shape[1]:
        return 0.0, 0.0, 0.0
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # (RESAMPLES, seeds)
    resampled = np.sqrt((counts @ squares / n).max(axis=1))
    sup = float(np.sqrt(squares.mean(axis=0).max()))
    low, high = (2 * sup - float(q) for q in np.percentile(resampled, [97.5, 2.5]))
    return sup, max(0.0, min(low, sup)), max(high, sup)


def play(config: Config, workers: int, look: Callable[[Server], object] | None = None) -> Played:
    """One run of `config` in simulated time, whose figures are kept; `look`, if any, sees the server before it."""
    parts = make_parts(config, workers)
    uses, kept = Uses(), BoundFacts(workers, Kept)
    server, evaluator = make_server(
        config, parts, workers, Tracker(0, uses.write), lambda line: None, background=False, keeps_versions=True,
        measures=kept,
    )  # fmt: skip
    stopwatch, start = Stopwatch(), server.x.clone()
    make_worker = shared_workers(config, parts, workers + config.faults.check(workers), stopwatch)

    def make(rank: int) -> TurnTakingWorker:
        return TurnTakingWorker(make_worker(rank, Tracker(rank, lambda line: None)), stopwatch, server.store.view)

    if look is not None:
        look(server)
    ended = make_simulator(config, parts, server, workers, make).run()
    evaluator.close()
    staleness = int(server.totals.staleness.as_dict("max")["max"] or 0)
    sigma = max(noise(config, parts, workers, x) for x in (start, server.x))
    waited = server.totals.waited.values()
    scaled = [scaled for _, scaled in sorted(uses.seen)]
    return Played(scaled, server.measures, staleness, sigma, sum(waited) / (len(waited) * ended) if ended else 0.0)


def noise(config: Config, parts: Parts, workers: int, x: torch.Tensor) -> float:
    """sigma at x (d,): root of half the mean squared difference of two gradients of one worker at the same x."""
    squares = []
    model = parts.copied(config.seed).model
    parts.layout.attach(model, x.clone())
    for worker in range(1, workers + 1):
        batches = parts.task.batches(worker, workers, config.seed + 2 * OTHER)
        first, second = (_gradient(parts.task, model, next(batches)) for _ in range(2))
        squares.append(float((first - second).norm()) ** 2 / 2)
    return math.sqrt(sum(squares) / len(squares) / config.update.accumulate)


def _gradient(task: Task, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(task.loss(model, batch), parameters, allow_unused=True)
    return torch.cat([gradient.to_dense().flatten() for gradient in found if gradient is not None])


class Uses:
    """Keeps (version, worker, step) and B of each push used, of the lines that a tracker writes."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, int, int], float]] = []

    def write(self, line: str) -> None:
        fields = json.loads(line)
        if fields["event"] == "used" and fields["B"] is not None:
            self.seen.append(((fields["version"], fields["worker"], fields["step"]), fields["B"]))


class Kept(Mean):
    """A Mean that remembers all values."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[float] = []

    @property
    def values(self) -> list[float]:
        if self.gather is not None:
            self.gather()
        return self._values

    def note(self, value: float) -> None:
        super().note(value)
        self._values.append(value)

    def note_all(self, new: Iterable[float]) -> None:
        new = list(new)
        super().note_all(new)
        self._values += new

    def note_times(self, new: Iterable[tuple[float, int]]) -> None:
        new = list(new)
        super().note_times(new)
        for value, times in new:
            self._values += [value] * times


def _facts(config: Config, runs: Sequence[Played], others: Sequence[Played]) -> tuple[Facts, Facts]:
    """Counts from the runs themselves, norms and sigma from the others; and with the upper ends of their intervals."""
    units = config.update.plugin.build().units
    counted = [run.measures.facts(run.staleness, config.optimizer, units) for run in runs]
    push, applied = (_sup([getattr(o.measures, name).values for o in others]) for name in ("pushes", "applied"))
    sigma, plain = _sup([[other.sigma] for other in others]), counted[0].plain
    counts: dict[str, Any] = {
        **{name: max(getattr(f, name) for f in counted) for name in ("p", "tau", "shares", "owed", "lateness")},
        "fewest": min(f.fewest for f in counted), "lost": sum(f.lost for f in counted), "plain": plain,
        "momentum": counted[0].momentum,
    }  # fmt: skip
    facts, at_most = (
        Facts(M=m if plain else M, M_push=m, M_applied=M, sigma=s if plain else None, **counts)
        for m, M, s in zip(push, applied, sigma, strict=True)
    )
    return facts, at_most


def _sup(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """max over t of the rms over runs, and the upper end of its interval."""
    shortest = min(map(len, series))
    sup, _, high = estimate(np.array([values[:shortest] for values in series]) ** 2)
    return sup, high


def _conditions(config: Config, bound: Bound) -> dict[str, bool | None]:
    task = config.task.build()
    smoothness, heterogeneity = getattr(task, "smoothness", None), getattr(task, "heterogeneity", None)
    known = {
        SMALL_STEP: None if smoothness is None else 6 * config.optimizer.lr * smoothness <= 1 + SLACK,
        EQUAL_DATA: None if heterogeneity is None else heterogeneity == 0,
    }
    return {name: name not in bound.broken and known.get(name, True) for name in bound.conditions}


def _judge(low: float, high: float, value: float, loosest: float) -> str:
    """loosest: the bound for the largest M and sigma that the other seeds leave possible."""
    if high <= value * (1 + SLACK):
        return "within"
    return "exceeded" if low > loosest * (1 + SLACK) else "inconclusive"
