from __future__ import annotations

import click

from ps_elastic.cli import _options
from ps_elastic.runtime.train import train


@click.command("train")
@_options.configuration
@click.option("--in-process", is_flag=True, help="Run server and workers in this process, in turn, without MPI.")
@click.option("--workers", type=int, help="Workers, with --in-process.")
@_options.ending
def command(
    config: str, overrides: tuple[str, ...], in_process: bool, workers: int | None, run_dir: str | None, **how: bool
) -> int:
    """Train CONFIG: `mpirun -n 4 ps-elastic train CONFIG policy=stale_synchronous policy.bound=4`.

    Rank 0 is the server, the others are workers. Every KEY=VALUE overrides the file.
    """
    if in_process != (workers is not None):
        raise click.UsageError("--in-process and --workers N go together")
    summary = train(config, overrides, workers=workers, run_dir=run_dir, quiet=False)
    return 0 if summary is None else _options.end(summary, **how)
