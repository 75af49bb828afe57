"""`ps-elastic launch`: `train` under mpirun, with the flags this MPI needs here."""

from __future__ import annotations

import json
import sys

import click

from ps_elastic.cli import _options
from ps_elastic.cluster import launcher
from ps_elastic.config.load import find_modules, load
from ps_elastic.records.run_dir import new_run_dir, read_summary


@click.command("launch")
@_options.configuration
@click.option("-n", "--ranks", type=int, required=True, help="Processes, as mpirun counts: one server and workers.")
@click.option("--run-dir", metavar="DIR", help="The run's folder, new or empty. [default: runs/NAME-UTC]")
@click.option("--check", is_flag=True, help="End with 6 if a stated target or bound fails.")
@click.option("--json", "as_json", is_flag=True, help="summary.json on stdout, all else on stderr.")
def command(
    config: str, overrides: tuple[str, ...], ranks: int, run_dir: str | None, check: bool, as_json: bool
) -> int:
    """Train CONFIG on one server and RANKS - 1 workers.

    Ctrl-C ends the run after the step under way; a second one ends it at once. Inside a SLURM allocation the job runs
    there. The exit code is the run's own: what summary.json in its folder says.
    """
    launcher.refuse_unfit(ranks)
    settings = load(config, overrides, plugins=False)
    find_modules(settings)
    plan = launcher.describe(ranks, settings.most_threads)
    folder = new_run_dir(settings.name, run_dir)
    click.echo(f"ps-elastic: {plan}; run folder {folder}", err=True)
    code = launcher.run_job(
        config, ranks, overrides, folder, check=check, stdout=sys.stderr if as_json else None, stderr=None
    )
    if as_json:
        click.echo(json.dumps(read_summary(folder) or {"exit": code, "run_dir": str(folder)}))
    return code
