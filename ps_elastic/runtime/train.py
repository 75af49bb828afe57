"""A training run from configuration to summary.json, under MPI or in one process."""

from __future__ import annotations

import copy
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ps_elastic.errors import CHECK_FAILED, OK, USER_CODE, ConfigError, PsElasticError
from ps_elastic.records.run_dir import SUMMARY, new_run_dir

if TYPE_CHECKING:
    from ps_elastic.config.load import Config
    from ps_elastic.records.writer import Record
    from ps_elastic.runtime.build import Parts
    from ps_elastic.server.evaluator import Evaluator
    from ps_elastic.server.server import Server


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
    from ps_elastic.config.torn_fits import refuse_alone
    from ps_elastic.records.writer import Record
    from ps_elastic.runtime import inprocess
    from ps_elastic.runtime.build import make_parts, make_server, make_worker
    from ps_elastic.runtime.live import Live

    config = load(source, overrides).settled()
    refuse_alone(config)
    parts = make_parts(config, workers)
    directory = new_run_dir(config.name, None if run_dir is None else os.fspath(run_dir))
    records = [Record(directory, rank) for rank in range(workers + 1)]
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
            now = inprocess.run(server, {worker.rank: worker for worker in made}, live.update)
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


def finish(
    config: Config,
    parts: Parts,
    server: Server,
    evaluator: Evaluator,
    record: Record,
    now: float,
    wall_s: float,
    code: int = OK,
) -> dict[str, Any]:
    """Write the final model, evaluate it and write summary.json; return the summary."""
    from ps_elastic.server.evaluator import load_statistics

    load_statistics(parts.model, evaluator.statistics)
    record.write_model(parts.model)
    sha256 = parts.layout.sha256(parts.model)  # before a task can do anything to the model
    evaluator.submit(server.calculator.x, server.totals.samples, server.ledger.version, now, final=True)
    evaluator.wait()
    for _ in server.tick(now):
        raise AssertionError("a finished server answers nobody")
    summary = {**summarise(config, server, now, wall_s, code), "parameters_sha256": sha256}
    return {**record.write_summary(summary), "run_dir": str(record.directory)}


def summarise(config: Config, server: Server, now: float, wall_s: float, code: int) -> dict[str, Any]:
    """summary.json, all but the hash of the parameters."""
    from ps_elastic.server.measures import against_theory

    return {
        "name": config.name,
        "policy": config.policy.text(),
        "compressor": config.compressor.text(),
        "task": config.task.text(),
        "workers": server.totals.workers,
        "seed": config.seed,
        "wall_s": wall_s,
        **server.totals.summary(now),
        "stop_at": config.train.stop_at,
        "versions": server.ledger.version,
        "snapshots_max": server.calculator.snapshots.peak,
        **against_theory(config, server),
        "lost_workers": server.lost_workers,
        "parameters_sha256": None,
        "exit": code,
    }


def failed(config: Config, server: Server, error: BaseException, wall_s: float) -> dict[str, Any]:
    """summary.json of a run that `error` ended: what was counted until then, and why it ended."""
    summary = summarise(config, server, wall_s, wall_s, exit_code(error))
    return {**summary, "error": describe(error)}


def recheck(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with exit 6, written too, where a run that ended well missed its stated target or bound."""
    from ps_elastic.records.writer import write_json

    missed = []
    if summary["stop_at"] and summary["time_to_target_s"] is None:
        missed.append(f"the target {summary['stop_at']} was not reached")
    if summary["bound_holds"] is False:
        missed.append(f"B_rms {summary['B_rms']} exceeds its bound {summary['B_theory']}")
    if summary["exit"] != OK or not missed:
        return summary
    checked = {**summary, "exit": CHECK_FAILED, "error": "; ".join(missed)}
    write_json(Path(summary["run_dir"]) / SUMMARY, {k: v for k, v in checked.items() if k != "run_dir"})
    return checked


def exit_code(error: BaseException) -> int:
    """The documented exit code for `error`."""
    if isinstance(error, PsElasticError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else USER_CODE


def describe(error: BaseException) -> str:
    """One line for an error of ours, the traceback for any other."""
    if isinstance(error, PsElasticError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
