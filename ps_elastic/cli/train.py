from __future__ import annotations

import json
from typing import Any

import click


@click.command(short_help="Train under mpirun (this process is one rank), or in one process.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--in-process", is_flag=True, help="Run server and workers in this process, in turn, without MPI.")
@click.option("--workers", type=int, help="Workers, with --in-process.")
@click.option("--run-dir", help="Folder of the run (default: runs/NAME-UTC); an existing one must be empty.")
@click.option("--check", is_flag=True, help="Exit 6 if the stated target or bound fails.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout.")
def command(
    config: str,
    overrides: tuple[str, ...],
    in_process: bool,
    workers: int | None,
    run_dir: str | None,
    check: bool,
    as_json: bool,
) -> int:
    """Train what CONFIG says: `mpirun -n 4 ps-elastic train CONFIG policy=stale_synchronous policy.bound=4`.

    Rank 0 is the server, the others are workers. Every KEY=VALUE overrides the file.
    """
    from ps_elastic.runtime.train import train

    if in_process != (workers is not None):
        raise click.UsageError("--in-process and --workers N go together")
    summary = train(config, overrides, workers=workers, run_dir=run_dir, quiet=False)
    if summary is None:
        return 0
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
    return (
        f"{summary['samples']} samples in {summary['wall_s']:.1f} s; {metrics}; discrepancy {measured}; "
        f"{summary['used']} pushes used, {summary['dropped']} dropped; {summary['run_dir']}"
    )
