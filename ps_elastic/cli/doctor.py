"""`ps-elastic doctor`: whether jobs can run here, and what to do where not."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ps_elastic.cli import _options
from ps_elastic.cluster import doctor, leftovers
from ps_elastic.cluster.doctor import Finding
from ps_elastic.errors import ENVIRONMENT, OK

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command("doctor")
@click.option("-n", "--ranks", type=click.IntRange(min=2), default=4, show_default=True, help="Ranks of the job.")
@_options.as_json
@click.option("--sweep", is_flag=True, help="First remove what killed jobs of yours left behind.")
def command(ranks: int, as_json: bool, sweep: bool) -> int:
    """Look at MPI, launcher, cores, shared memory and SLURM; exit 3 if something would keep a job from running."""
    if sweep:
        stray = leftovers.forsaken_folders(Path(tempfile.gettempdir()))
        for path in [
            *leftovers.remove_segments(leftovers.forsaken_segments(leftovers.SHM)),
            *leftovers.remove_folder(stray),
        ]:
            click.echo(f"ps-elastic: removed {path}", err=True)
    findings = list(doctor.examine(ranks))
    if as_json:
        click.echo(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        show(findings)
    return ENVIRONMENT if any(finding.status == "fail" for finding in findings) else OK


def show(findings: list[Finding]) -> None:
    """Print a table of what was found, then the remedies, each on a line that can be copied."""
    table = Table("check", "", "found", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.check, Text(finding.status, style=_STYLES[finding.status]), Text(finding.value))
    console = Console()
    console.print(table)
    for finding in findings:
        if finding.status != "ok":
            console.print(f"{finding.check}: {finding.remedy}", soft_wrap=True, markup=False, highlight=False)
