"""Server and workers of a run in this process, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ps_elastic.config.compatibility import refuse_alone
from ps_elastic.config.load import load
from ps_elastic.config.sources import Source
from ps_elastic.records.run_dir import Given, new_run_dir
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime import loops
from ps_elastic.runtime.build import make_parts, make_server, make_worker
from ps_elastic.runtime.live import Live
from ps_elastic.runtime.summary import failed, finish


def run_in_process(
    source: Source, overrides: Sequence[str], workers: int, run_dir: Given, *, quiet: bool
) -> dict[str, Any]:
    """One server and `workers` workers taking turns: deterministic, for tests and debugging."""
    config = load(source, overrides).settled()
    refuse_alone(config)
    parts = make_parts(config, workers)
    directory = new_run_dir(config.name, run_dir)
    records = [RunWriter(directory, rank) for rank in range(workers + 1)]
    records[0].write_setting(config, workers, transport="in process")
    made = [
        make_worker(config, parts.copied(config.seed), rank, workers, records[rank].tracker)
        for rank in range(1, workers + 1)
    ]
    log = records[0].events().note
    server, evaluator = make_server(config, parts, workers, records[0].tracker, log, background=False)
    live = Live(server, config, quiet=quiet)
    for note in parts.notes:
        live.say(note)
    started = time.perf_counter()
    try:
        with live:
            now = loops.take_turns(server, {worker.rank: worker for worker in made}, live.update)
            wall_s = time.perf_counter() - started
            summary = finish(config, parts, server, evaluator, records[0], now, wall_s)
    except BaseException as error:
        wall_s = time.perf_counter() - started
        records[0].write_summary(failed(config, server, error, wall_s, wall_s))
        raise
    finally:
        evaluator.close()
        for record in records:
            record.close()
    return summary
