"""`ps-elastic simulate`: a run in simulated time."""

from __future__ import annotations

from typing import Any

import click

from ps_elastic.cli import _options
from ps_elastic.simulation.simulate import simulate


@click.command("simulate")
@_options.configuration
@click.option("--workers", type=int, required=True, help="Workers beside the server.")
@click.option("--headers-only", is_flag=True, help="Timing-only simulation: metadata moves, norms are made up.")
@click.option("--norms", metavar="RUN", help="With --headers-only: take the norms from this recorded run.")
@_options.ending
def command(config: str, overrides: tuple[str, ...], check: bool, as_json: bool, **how: Any) -> int:
    """Run CONFIG in simulated time: `ps-elastic simulate CONFIG --workers 4096 simulation.compute.mean_s=0.2`.

    Server, policy, workers and compressors are those of a real run. `simulation` says how long computing and sending
    take, `faults` says what goes wrong. One seed gives one run log, byte for byte.
    """
    return _options.end(simulate(config, overrides, quiet=False, **how), check=check, as_json=as_json)
