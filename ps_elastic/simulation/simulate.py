"""A simulated run from its command line: what comes before torch (see runtime/train.py), then all the rest at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ps_elastic.cluster.threads import set_threads
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError


def simulate(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    workers: int,
    run_dir: str | os.PathLike[str] | None = None,
    headers_only: bool = False,
    norms: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run in simulated time as `ps-elastic simulate` does, and return summary.json's content.

    headers_only: a timing-only simulation, in which nothing is computed; norms: a recorded run whose norms to take.
    Raises the errors of `errors.py`; what the user's own code raises passes through.
    """
    if workers < 1:
        raise ConfigError(f"got {workers}, expected a number of workers >= 1", key="--workers")
    if norms is not None and not headers_only:
        raise ConfigError("goes with --headers-only: a run that computes has norms of its own", key="--norms")
    source = source if isinstance(source, Mapping) else str(source)
    set_threads(load(source, overrides, plugins=False, simulated=True).threads, 1)
    from ps_elastic.simulation.virtual_time import run_in_virtual_time

    return run_in_virtual_time(source, overrides, workers, run_dir, headers_only=headers_only, norms=norms, quiet=quiet)
