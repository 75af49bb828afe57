"""What several commands have in common: options, and the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ps_elastic.errors import CHECK_FAILED, OK
from ps_elastic.records.run_dir import SUMMARY, write_json

F = TypeVar("F", bound=Callable[..., object])

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def configuration(command: F) -> F:
    """CONFIG [KEY=VALUE]..."""
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("config")(overrides(command))


def ending(command: F) -> F:
    """--run-dir, --check and --json of a command that runs here and ends with `end`."""
    folder = "Folder of the run (default: runs/NAME-UTC); an existing one must be empty."
    summary = click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout.")
    check = click.option("--check", is_flag=True, help="Exit 6 if the stated target or bound fails.")
    return click.option("--run-dir", help=folder)(check(summary(command)))


def end(summary: dict[str, Any], *, check: bool, as_json: bool) -> int:
    """Tell how the run went, and return what it ends with."""
    if check:
        summary = recheck(summary)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(_sentence(summary), err=True)
    return int(summary["exit"])


def recheck(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with exit 6, written too, where a run that ended well missed its stated target or bound."""
    missed = []
    if summary["stop_at"] and summary["time_to_target_s"] is None:
        missed.append(f"the target {summary['stop_at']} was not reached")
    if summary["bound_holds"] is False:
        missed.append(f"B_rms {summary['B_rms']} is above its bound {summary['B_theory']}")
    if summary["exit"] != OK or not missed:
        return summary
    checked = {**summary, "exit": CHECK_FAILED, "error": "; ".join(missed)}
    write_json(Path(summary["run_dir"]) / SUMMARY, {k: v for k, v in checked.items() if k != "run_dir"})
    return checked


def _sentence(summary: dict[str, Any]) -> str:
    took, nothing, estimated = f"{summary['wall_s']:.1f} s", "", ""
    if "virtual_s" in summary:
        took = f"{summary['virtual_s']:.4g} simulated s ({took}, {summary['pushes_per_s']:.0f} pushes a second)"
        nothing = "nothing computed"
        estimated = " (estimated)" if summary["headers_only"] else ""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items() if value is not None)
    rms, largest = summary["discrepancy"]["rms"], summary["discrepancy"]["max"]
    measured = "not measured" if rms is None else f"{rms:.3g} rms, {largest:.3g} max{estimated}"
    return (
        f"{summary['samples']} samples in {took}; {metrics or nothing}; discrepancy {measured}; "
        f"{summary['used']} pushes used, {summary['dropped']} discarded; {summary['run_dir']}"
    )
