"""`ps-elastic simulate`: a run in virtual time."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command(short_help="Run in virtual time, with as many workers as you like.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--workers", type=int, required=True, help="Workers beside the server.")
@click.option("--headers-only", is_flag=True, help="Compute nothing: headers move, norms are made up.")
@click.option("--norms", metavar="RUN", help="With --headers-only: take the norms from this recorded run.")
@click.option("--run-dir", help="Folder of the run (default: runs/NAME-UTC); an existing one must be empty.")
@click.option("--check", is_flag=True, help="Exit 6 if the stated target or bound fails.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout.")
def command(
    config: str,
    overrides: tuple[str, ...],
    workers: int,
    headers_only: bool,
    norms: str | None,
    run_dir: str | None,
    check: bool,
    as_json: bool,
) -> int:
    """Run what CONFIG says in virtual time: `ps-elastic simulate CONFIG --workers 4096 simulation.compute.mean_s=0.2`.

    Server, rule, workers and compressors are those of a real run; `simulation` says what computing and sending take,
    `faults` what goes wrong. One seed gives one log, byte for byte.
    """
    from ps_elastic.simulation.simulate import simulate

    summary = simulate(
        config, overrides, workers=workers, run_dir=run_dir, headers_only=headers_only, norms=norms, quiet=False
    )
    if check:
        from ps_elastic.runtime.summary import recheck

        summary = recheck(summary)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(_ending(summary), err=True)
    return int(summary["exit"])


def _ending(summary: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items() if value is not None)
    rms, largest = summary["discrepancy"]["rms"], summary["discrepancy"]["max"]
    measured = "not measured" if rms is None else f"{rms:.3g} rms, {largest:.3g} max"
    estimated = " (estimated)" if summary["headers_only"] and rms is not None else ""
    return (
        f"{summary['samples']} samples in {summary['virtual_s']:.4g} virtual s ({summary['wall_s']:.1f} s, "
        f"{summary['pushes_per_s']:.0f} pushes a second); {metrics or 'nothing computed'}; "
        f"discrepancy {measured}{estimated}; {summary['used']} pushes used, {summary['dropped']} dropped; "
        f"{summary['run_dir']}"
    )
