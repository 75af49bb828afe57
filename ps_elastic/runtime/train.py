"""A training run from configuration to summary.json, under MPI or in one process."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ps_elastic.errors import ConfigError
from ps_elastic.records.run_dir import new_run_dir
from ps_elastic.runtime.summary import failed, finish


def train(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> dict[str, Any] | None:
    """Train as `ps-elastic train` does, and return summary.json's content (None on the ranks of workers).

    source: a YAML file or a mapping. workers: so many in this process; None: this process is one rank of an MPI job.
    Raises the errors of `errors.py`; what the user's own code raises passes through in one process.
    """
    if workers is None:
        from ps_elastic.runtime.rank import run_rank

        return run_rank(source, overrides, run_dir, quiet=quiet)
    return run_in_process(source, overrides, workers, run_dir, quiet=quiet)


def run_in_process(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str],
    workers: int,
    run_dir: str | os.PathLike[str] | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """One server and `workers` workers taking turns: deterministic, for tests and debugging."""
    from ps_elastic.cluster.threads import set_threads
    from ps_elastic.config.load import load

    if workers < 1:
        raise ConfigError(f"got {workers}, expected a number of workers >= 1", key="--workers")
    source = source if isinstance(source, Mapping) else str(source)
    set_threads(load(source, overrides, plugins=False).threads, 1)
    from ps_elastic.config.compatibility import refuse_alone
    from ps_elastic.records.writer import RunWriter
    from ps_elastic.runtime import loops
    from ps_elastic.runtime.build import make_parts, make_server, make_worker
    from ps_elastic.runtime.live import Live

    config = load(source, overrides).settled()
    refuse_alone(config)
    parts = make_parts(config, workers)
    directory = new_run_dir(config.name, None if run_dir is None else os.fspath(run_dir))
    records = [RunWriter(directory, rank) for rank in range(workers + 1)]
    records[0].write_setting(config, workers, transport="in process")
    made = [
        make_worker(config, parts._replace(model=copy.deepcopy(parts.model)), rank, workers, records[rank].tracker)
        for rank in range(1, workers + 1)
    ]
    log = records[0].events().write
    server, evaluator = make_server(config, parts, workers, records[0].tracker, log, background=False)
    live = Live(server, config, quiet=quiet)
    started = time.perf_counter()
    try:
        with live:
            now = loops.take_turns(server, {worker.rank: worker for worker in made}, live.update)
            wall_s = time.perf_counter() - started
            summary = finish(config, parts, server, evaluator, records[0], now, wall_s)
    except BaseException as error:
        records[0].write_summary(failed(config, server, error, time.perf_counter() - started))
        raise
    finally:
        evaluator.close()
        for record in records:
            record.close()
    return summary
