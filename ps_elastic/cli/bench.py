"""`ps-elastic bench NAME`: measure, beside a baseline."""

from __future__ import annotations

import json

import click

from ps_elastic.analysis.bench import Row, run_all, run_benchmark
from ps_elastic.cli import _options
from ps_elastic.errors import CHECK_FAILED, OK, USER_CODE


@click.command("bench")
@click.argument("name")
@click.option("--check", is_flag=True, help="Exit 6 if a target is missed.")
@_options.as_json
def command(name: str, check: bool, as_json: bool) -> int:
    """Run the benchmark NAME, such as `simulate` or `simulate:workers=1024:repeats=5`; `list benchmarks` names all.

    `bench all` runs every one of them, continues if one fails, and then ends with 1.
    """

    def show(row: Row) -> None:
        click.echo(_line(row), err=as_json)

    document = run_all(show) if name == "all" else run_benchmark(name, show)
    if name == "all":
        took = ", ".join(f"{bench} {seconds:.0f} s" for bench, seconds in document["took_s"].items())
        click.echo(f"took {sum(document['took_s'].values()):.0f} s: {took}", err=as_json)
    for failed, reason in document.get("failed", {}).items():
        click.echo(f"ps-elastic: {failed} failed: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(document))
    if document.get("failed"):
        return USER_CODE
    missed = any(row["met"] is False for row in document["rows"])
    return CHECK_FAILED if check and missed else OK


def _line(row: Row) -> str:
    compared = "" if row.baseline is None else f"; {row.baseline_name} {row.baseline:.4g}, ratio {row.ratio:.3g}"
    verdict = "" if row.met is None else f"; {row.target}: {'met' if row.met else 'MISSED'}"
    return f"{row.case}: {row.ours:.4g} {row.unit}{compared}{verdict}"
