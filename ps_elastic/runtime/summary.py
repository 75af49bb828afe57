"""How a run ends: the final model written and evaluated, and summary.json, with B against the policy's constant."""

from __future__ import annotations

import math
import re
from typing import Any

from ps_elastic.config.schema import Config
from ps_elastic.errors import OK, describe, exit_code
from ps_elastic.policies.theory import Bound, Facts, b_error_feedback
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import Parts
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.server import Server
from ps_elastic.server.totals import SLACK
from ps_elastic.vectors.layout import load_statistics


def finish(
    config: Config,
    parts: Parts,
    server: Server,
    evaluator: Evaluator,
    record: RunWriter,
    now: float,
    wall_s: float,
    code: int = OK,
    **more: Any,
) -> dict[str, Any]:
    """Write the final model, evaluate it and write summary.json, with `more` in it; return the summary."""
    assert server.store.x is not None  # in a timing-only simulation there is no model to write
    load_statistics(parts.model, evaluator.statistics)
    record.write_model(parts.model)
    sha256 = parts.layout.sha256(parts.model)  # before a task can do anything to the model
    evaluator.submit(server.x, server.totals.samples, server.ledger.version, now, final=True)
    evaluator.wait()
    for _ in server.tick(now):
        raise AssertionError("a finished server answers nobody")
    summary = {**summarise(config, server, now, wall_s, code), "parameters_sha256": sha256, "record": None}
    return {**record.write_summary({**summary, **more}), "run_dir": str(record.directory)}


def summarise(config: Config, server: Server, now: float, wall_s: float, code: int, **more: Any) -> dict[str, Any]:
    """summary.json, all but the hash of the parameters and the record's seal."""
    return {
        "name": config.name,
        "policy": config.policy.text(),
        "compressor": config.compressor.text(),
        "task": config.task.text(),
        "workers": server.totals.workers,
        "seed": config.seed,
        "wall_s": wall_s,
        **server.totals.summary(now),
        "stop_at": config.train.stop_at,
        "versions": server.ledger.version,
        "snapshots_max": server.store.snapshots.peak,
        **against_theory(config, server),
        "lost_workers": server.lost_workers,
        "parameters_sha256": None,
        "exit": code,
        **more,
    }


def failed(
    config: Config, server: Server, error: BaseException, now: float, wall_s: float, **more: Any
) -> dict[str, Any]:
    """summary.json of a run that `error` ended: what was counted until then, and why it ended."""
    return summarise(config, server, now, wall_s, exit_code(error), **more, error=describe(error))


def against_theory(config: Config, server: Server) -> dict[str, Any]:
    """The part of summary.json that holds the measured B against the one that the policy declares."""
    measures, totals, units = server.measures, server.totals, config.update.plugin.build().units
    facts = measures.facts(int(totals.staleness.as_dict("max")["max"] or 0), config.optimizer, units)
    bound = server.policy.declared_bound(facts)
    residual = _residual(config, server, facts)
    told: dict[str, Any] = {"B_theory": None, "B_theory_kind": None, "bound_holds": None}
    if bound is None:
        text = "the policy declares no constant"
    elif bound.value is None:
        text = bound.formula
    else:
        holds, doubt = _holds(server, bound, facts)
        told = {"B_theory": bound.value, "B_theory_kind": bound.kind, "bound_holds": holds}
        text = "; ".join([f"B = {bound.formula}", *_terms(bound, facts), *doubt, *_asides(config, units, residual)])
    return {**told, "B_theory_text": text, "B_residual": residual}


def _holds(server: Server, bound: Bound, facts: Facts) -> tuple[bool | None, list[str]]:
    """Whether B_rms is below the bound (D/alpha of every push, if the policy promises that); why it cannot be said."""
    assert bound.value is not None
    scaled, limit = server.totals.scaled.as_dict("rms", "max"), bound.value * (1 + SLACK)
    rms, largest = scaled["rms"], scaled["max"]
    if rms is None or largest is None:
        return None, ["nothing was measured"]
    if server.store.x is None:
        return None, ["distances are estimates from norms"]
    if bound.every_push:
        promised = server.policy.limit() < math.inf
        return (server.measures.beyond == 0 if promised else largest <= limit), []
    if rms > limit and server.policy.view_of == "ideal":
        most = server.measures.pushes.as_dict("max")["max"] or 0.0
        worst = server.policy.declared_bound(facts._replace(M=most, M_push=most, M_applied=most))
        if worst is not None and worst.value is not None and rms <= worst.value:
            return None, ["late gradients were larger than M, the rms of all pushes: nothing follows"]
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
        asides.append("it bounds the distance to the server's model; error feedback keeps back B_residual in addition")
    elif config.compressor.plugin.build().biased:
        asides.append("without error feedback what the compressor leaves out is lost: updates are biased")
    if units == "update":
        asides.append("what local steps move a worker by is not in it")
    return asides


def _residual(config: Config, server: Server, facts: Facts) -> dict[str, float | None] | None:
    """Of ||(1/p) SUM e_i||, in gradient units: the rms of the ||e_i||, and sqrt(gamma)/(1 - sqrt(gamma)) M; or None."""
    if not config.compressor.feeds_back or server.store.x is None:
        return None
    compressor = config.compressor.plugin.build()
    gammas = [compressor.gamma(bucket.numel) for bucket in server.store.layout.buckets]
    gamma = 1.0 if None in gammas else max(gammas)
    most = b_error_feedback(gamma, server.measures.gradients.as_dict("rms")["rms"] or 0.0)
    theory = most if math.isfinite(most) else None
    return {"rms": server.measures.residuals.as_dict("rms")["rms"], "theory": theory}
