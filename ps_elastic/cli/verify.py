"""`ps-elastic verify`: the measured constant of policies against the one that their theory gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ps_elastic import policies as consistency
from ps_elastic.analysis.verdict import Verdict
from ps_elastic.cluster.threads import set_threads
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.errors import CHECK_FAILED, OK, ConfigError
from ps_elastic.plugins import parse_one_line
from ps_elastic.worker.updates import updates

SAMPLES = 240  # of a run where no configuration says how long it is
ARRIVALS = {"compute": {"name": "exponential", "mean_s": 0.5}}  # long beside a deadline of 1 s, so that some pass it
WORDS = {  # verdict -> what a person reads
    "identity": "exact", "within": "below bound", "exceeded": "above bound", "not applicable": "conditions not met"
}  # fmt: skip


@click.command("verify")
@click.argument("policies", nargs=-1, metavar="[POLICY]...")
@click.option("--seeds", type=click.IntRange(min=2), default=20, show_default=True, help="Runs of each policy.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Workers of each run.")
@click.option("--task", help="The task, as in quadratic:heterogeneity=3. [default: quadratic]")
@click.option("--config", "file", metavar="CONFIG", help="A configuration for all but the policy and the seeds.")
@click.option("--keep", metavar="DIR", help="Folder of verdicts: those there are kept, the others are made.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr.")
def command(
    policies: tuple[str, ...],
    seeds: int,
    workers: int,
    task: str | None,
    file: str | None,
    keep: str | None,
    as_json: bool,
) -> int:
    """Estimate B = max over t of sqrt(mean over seeds of (D_t/alpha)^2) for each POLICY, and judge it by its theory.

    POLICY: as in stale_synchronous:bound=4; if you name none, all. The runs are in simulated time. Exit 6 if a policy
    is above its bound in the conditions of its theorem.
    """
    if task is not None and file is not None:
        raise click.UsageError("--task and --config exclude each other")
    source = file if file is not None else _setting(task or "quadratic")
    named = policies or tuple(name for name, _ in consistency.policies.items())
    console, verdicts = Console(stderr=True, soft_wrap=True), []
    for name in named:
        asked = {"policy": name, "source": source, "workers": workers, "seeds": seeds}
        verdict = kept(keep, asked, partial(_verdict, source, name, workers, seeds, lenient=not policies))
        verdicts.append(verdict)
        console.print(f"{name}: {said(verdict)}", markup=False, highlight=False)
    exceeded = [verdict.policy for verdict in verdicts if verdict.verdict == "exceeded"]
    code = CHECK_FAILED if exceeded else OK
    if as_json:
        rows = [asdict(verdict) for verdict in verdicts]
        click.echo(json.dumps({"workers": workers, "seeds": seeds, "rows": rows, "exceeded": exceeded, "exit": code}))
    else:
        out = Console()
        if not out.is_terminal:
            out.width = 160
        out.print(_table(verdicts))
    return code


def kept(folder: str | None, asked: dict[str, Any], verify: Callable[[], Verdict]) -> Verdict:
    """The verdict on what is `asked`, from `folder` if an earlier call left it there; else `verify` finds it.

    Raises ConfigError where what lies there answers something else.
    """
    if folder is None:
        return verify()
    path = Path(folder) / f"{quote(asked['policy'], safe=':=.,')}.json"
    if not path.exists():
        verdict = verify()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"asked": asked, "verdict": asdict(verdict)}, indent=1) + "\n")
        return verdict
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        verdict, was = Verdict(**found["verdict"]), found["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"no verdict can be read: {error}", key="--keep", source=str(path)) from None
    if was != asked:
        raise ConfigError(f"the verdict here is on {was}, not on {asked}", key="--keep", source=str(path))
    return verdict


def _setting(task: str) -> dict[str, Any]:
    """What a run of `task` is where nobody says: alpha = 1/(6L) for a task that knows its L."""
    config = load({"task": task})
    smoothness = getattr(config.task.build(), "smoothness", None)
    rate = {} if smoothness is None else {"optimizer": {"lr": 1 / (6 * smoothness)}}
    samples = SAMPLES * config.task.settings["batch_size"]
    return {"task": task, "train": {"samples": samples}, "simulation": ARRIVALS, **rate}


def _verdict(source: Any, name: str, workers: int, seeds: int, *, lenient: bool) -> Verdict:
    """lenient: a policy that does not fit the rest is a row that says so."""
    try:
        config = _load(source, name)
        set_threads(config.threads, 1)
        from ps_elastic.analysis.verify import verify

        return verify(config, workers, seeds)
    except ConfigError as error:
        if not lenient:
            raise
        return Verdict(name, "not applicable", str(error))


def _load(source: Any, name: str) -> Config:
    """The configuration with the policy `name`, and with an update that fits it where no file says which."""
    quiet = ["train.evaluate_every_samples=null", "train.stop_at=null", "tracker.discrepancy=exact"]
    units = consistency.policies.load(parse_one_line(name)[0]).units
    if "gradient" not in units and not isinstance(source, str):
        quiet += [f"update={update}" for update, cls in updates.items() if cls.units in units][:1]
    return load(source, [f"policy={name}", *quiet], simulated=True)


def said(verdict: Verdict) -> str:
    """The verdict in words; JSON keeps its value."""
    return WORDS.get(verdict.verdict, verdict.verdict)


def _table(verdicts: list[Verdict]) -> Table:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    table = Table()
    for heading in ("policy", "B_sup [95 %]", "B_theory", "tightness", "verdict", "why, or the formula"):
        table.add_column(heading, justify="right" if heading in ("B_theory", "tightness") else "left", overflow="fold")
    for v in verdicts:
        interval = "" if v.low is None else f" [{number(v.low)}, {number(v.high)}]"
        cells = (v.policy, number(v.B_sup) + interval, number(v.B_theory), number(v.tightness), said(v))
        table.add_row(*map(Text, (*cells, v.reason or v.formula)))
    return table
