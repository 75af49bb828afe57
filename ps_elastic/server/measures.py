"""What constants B are made of, as a run shows it, and how the run stands against the constant of its rule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ps_elastic.policies.events import ZERO, Push, Step
from ps_elastic.policies.theory import Bound, Facts, b_error_feedback
from ps_elastic.server.totals import Mean

if TYPE_CHECKING:
    from ps_elastic.config.load import Config
    from ps_elastic.config.sections import Optimizer
    from ps_elastic.server.server import Server

SLACK = 1e-5  # relative: roundings of float32 that norms and bounds are made of


class Measures:
    """Norms, counts and spreads of one run, in gradient units. The server notes them."""

    def __init__(self, workers: int) -> None:
        self.most = self.fewest = workers  # live at a time
        self.gradients, self.pushes, self.applied, self.residuals = Mean(), Mean(), Mean(), Mean()
        self.shares = 0.0  # of the steps between a view and its use, most
        self.reapplied = self.astray = 0.0  # weight/alpha of own pushes in a view, and what the model has else, most
        self.owed = self.lateness = self.lost = self.beyond = 0
        self._deviation, self._freedom = 0.0, 0

    def note_workers(self, count: int) -> None:
        self.most, self.fewest = max(self.most, count), min(self.fewest, max(1, count))

    def note_use(self, shares: float, distance: float, limit: float) -> None:
        """A push is used after steps of `shares` in all; limit: what its rule promised of `distance`."""
        if shares > self.shares:
            self.shares = shares
        if distance > limit * (1 + SLACK):
            self.beyond += 1

    def note_reapplied(self, weight: float, astray: float) -> None:
        """A view contains pushes of its worker of this weight/alpha in all; the model has that but for `astray`."""
        self.reapplied, self.astray = max(self.reapplied, weight), max(self.astray, astray)

    def note_debts(self, count: int, lateness: int) -> None:
        """So many pushes are owed after a step, the oldest of them since `lateness` steps, this one included."""
        self.owed, self.lateness = max(self.owed, count), max(self.lateness, lateness)

    def note_push(self, push: Push) -> None:
        """`push` is used, or repaid."""
        self.gradients.note(push.norm)
        self.pushes.note(push.payload_norm)
        self.residuals.note(push.residual_norm)

    def note_step(self, step: Step, fresh: Sequence[Push], moved: float) -> None:
        """A step moved the model by alpha x `moved`, of the pushes `fresh` that were used for the first time."""
        direction = moved / step.share
        self.applied.note_times(direction, len(fresh))
        for push in fresh:
            self.note_push(push)
        if len(fresh) < 2 or step.combine != "mean":
            return
        terms = [term for term in step.terms if term.push.worker or term.push == ZERO]  # not the mean of the others
        pushes = sum(1 for term in terms if term.push.worker)
        if pushes == len(fresh) and all(term.weight == 1 for term in terms):
            mean = direction * len(terms) / len(fresh)
            self._deviation += max(0.0, sum(p.payload_norm**2 for p in fresh) - len(fresh) * mean**2)
            self._freedom += len(fresh) - 1

    def facts(self, tau: int, optimizer: Optimizer, units: str) -> Facts:
        """tau: largest staleness of a push used. units: of the pushes."""
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


def against_theory(config: Config, server: Server) -> dict[str, Any]:
    """The part of summary.json that holds the measured B against the one that the rule declares."""
    measures, totals, units = server.measures, server.totals, config.update.plugin.build().units
    facts = measures.facts(int(totals.staleness.as_dict("max")["max"] or 0), config.optimizer, units)
    bound = server.policy.declared_bound(facts)
    residual = _residual(config, server, facts)
    told: dict[str, Any] = {"B_theory": None, "B_theory_kind": None, "bound_holds": None}
    if bound is None:
        text = "the rule declares no constant"
    elif bound.value is None:
        text = bound.formula
    else:
        holds, doubt = _holds(server, bound, facts)
        told = {"B_theory": bound.value, "B_theory_kind": bound.kind, "bound_holds": holds}
        text = "; ".join([f"B = {bound.formula}", *_terms(bound, facts), *doubt, *_asides(config, units, residual)])
    return {**told, "B_theory_text": text, "B_residual": residual}


def _holds(server: Server, bound: Bound, facts: Facts) -> tuple[bool | None, list[str]]:
    """Whether B_rms is within the bound (every push, where the rule promises that), and what speaks against asking."""
    assert bound.value is not None
    scaled, limit = server.totals.scaled.as_dict("rms", "max"), bound.value * (1 + SLACK)
    rms, largest = scaled["rms"], scaled["max"]
    if rms is None or largest is None:
        return None, ["nothing was measured"]
    if server.calculator.x is None:
        return None, ["distances are estimates from norms"]
    if bound.every_push:
        promised = server.policy.limit() < math.inf
        return (server.measures.beyond == 0 if promised else largest <= limit), []
    if rms > limit and server.policy.view_of == "ideal":
        most = server.measures.pushes.as_dict("max")["max"] or 0.0
        worst = server.policy.declared_bound(facts._replace(M=most, M_push=most, M_applied=most))
        if worst is not None and worst.value is not None and rms <= worst.value:
            return None, ["what was owed was larger than M, the rms of all pushes: nothing follows"]
    return rms <= limit, []


def _terms(bound: Bound, facts: Facts) -> list[str]:
    """The figures that went into the bound, and what it rests on."""
    kind = "the rms of the " + ("pushes" if facts.plain else "applied updates over alpha x share")
    values = {"tau": facts.tau, "m": facts.owed, "p": facts.p, "s": facts.shares, "r": facts.reapplied}
    values["sigma"] = facts.sigma or 0.0
    named = set(re.findall(r"[A-Za-z]+", bound.formula))
    figures = [f"{name} = {value:.4g}" for name, value in values.items() if name in named]
    if "M" in named and "M =" not in bound.formula:
        figures.append(f"M = {facts.M:.4g} {kind}")
    needs = [f"needs {', '.join(bound.conditions)}"] if bound.conditions else []
    broken = [f"does not apply, since it is not so that {', '.join(bound.broken)}"] if bound.broken else []
    return [", ".join(figures)] * bool(figures) + needs + broken


def _asides(config: Config, units: str, residual: dict[str, float | None] | None) -> list[str]:
    asides = []
    if residual is not None:
        asides.append("it bounds the distance to the server's model; error feedback keeps back B_residual beside it")
    elif config.compressor.plugin.build().biased:
        asides.append("without error feedback what the compressor leaves out is lost: updates are biased")
    if units == "update":
        asides.append("what local steps move a worker by is not in it")
    return asides


def _residual(config: Config, server: Server, facts: Facts) -> dict[str, float | None] | None:
    """Of ||(1/p) SUM e_i||, in gradient units: the rms of the ||e_i||, and sqrt(gamma)/(1 - sqrt(gamma)) M; or None."""
    compressor, feedback = config.compressor.plugin.build(), config.compressor.error_feedback
    if not (compressor.biased if feedback == "auto" else feedback) or server.calculator.x is None:
        return None
    gammas = [compressor.gamma(bucket.numel) for bucket in server.calculator.layout.buckets]
    gamma = 1.0 if None in gammas else max(gammas)
    most = b_error_feedback(gamma, server.measures.gradients.as_dict("rms")["rms"] or 0.0)
    theory = most if math.isfinite(most) else None
    return {"rms": server.measures.residuals.as_dict("rms")["rms"], "theory": theory}
