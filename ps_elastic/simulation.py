"""A simulated run from configuration to summary.json: what `training.py` is for a real one."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ps_elastic.costs import Cores, Durations, Wires, typical_s
from ps_elastic.errors import OK, ConfigError
from ps_elastic.fault_plan import Plan
from ps_elastic.rundir import new_run_dir

if TYPE_CHECKING:
    from torch import Tensor

    from ps_elastic.assemble import Parts
    from ps_elastic.calculator import Calculator
    from ps_elastic.config import Config
    from ps_elastic.evaluate import Evaluator
    from ps_elastic.layout import Layout
    from ps_elastic.record import Record
    from ps_elastic.server import Server
    from ps_elastic.simulate import Simulator
    from ps_elastic.simulate_node import Machine

LIVES = 100  # times what one worker alone would need, after which a run is given up where no deadline is stated


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
    """Run in virtual time as `ps-elastic simulate` does, and return summary.json's content.

    headers_only: nothing is computed, headers alone move; norms: a recorded run to take their norms from.
    Raises the errors of `errors.py`; what the user's own code raises passes through.
    """
    from ps_elastic.config import load
    from ps_elastic.threads import set_threads

    if workers < 1:
        raise ConfigError(f"got {workers}, expected a number of workers >= 1", key="--workers")
    if norms is not None and not headers_only:
        raise ConfigError("goes with --headers-only: a run that computes has norms of its own", key="--norms")
    source = source if isinstance(source, Mapping) else str(source)
    set_threads(load(source, overrides, plugins=False, simulated=True).threads, 1)
    from ps_elastic.assemble import make_parts
    from ps_elastic.live import Live
    from ps_elastic.record import Record

    config = load(source, overrides, simulated=True).settled()
    if headers_only and config.views == "torn":
        raise ConfigError("got 'torn', expected exact: with headers alone no entry of a model is read", key="views")
    if config.writers == "workers":
        raise ConfigError("got 'workers', expected server: in virtual time nobody but the server writes", key="writers")
    joining = config.faults.check(workers)
    parts = make_parts(config, workers)
    setting = HeaderSetting(config, parts, norms) if headers_only else Setting(config, parts, workers + joining)
    directory = new_run_dir(config.name, None if run_dir is None else os.fspath(run_dir))
    record = Record(directory, 0)
    record.write_setting(config, workers, transport="simulated", headers_only=headers_only)
    server = setting.server(workers, record)
    live = Live(server, config, quiet=quiet)
    started = time.perf_counter()
    simulator: Simulator | None = None
    try:
        make = partial(setting.worker, server=server)
        on_turn = None if quiet else live.update
        simulator = make_simulator(config, parts, server, workers, make, on_turn, setting.copies)
        with live:
            started, processor = time.perf_counter(), time.process_time()
            now = simulator.run()
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - processor
            summary = setting.finish(server, record, now, wall_s)
            return _told(record, summary, virtual_s=now, cpu_s=cpu_s, headers_only=headers_only)
    except BaseException as error:
        _failed(config, record, server, error, simulator.now if simulator else 0.0, time.perf_counter() - started)
        raise
    finally:
        setting.close()
        record.close()


class Setting:
    """Server and workers that compute. All workers share one module and its memory, since they take turns."""

    def __init__(self, config: Config, parts: Parts, ranks: int) -> None:
        from ps_elastic.assemble import choose_device
        from ps_elastic.turns import Stopwatch
        from ps_elastic.workbench import Workbench

        self._stopwatch = Stopwatch()
        self._config, self._parts, self._ranks = config, parts, ranks
        model = copy.deepcopy(parts.model).to(choose_device(config.device, 0))
        self._shared = parts._replace(model=model)
        self._bench = Workbench(model, parts.layout)
        self._evaluator: Evaluator | None = None
        self._pages: list[Pages] = []
        self._directory = Path()
        self.copies: dict[int, Tensor] | None = None  # with torn views, what each worker read last (d,)
        if config.views == "torn":
            self.copies = {rank: parts.layout.empty() for rank in range(1, ranks + 1)}

    def server(self, workers: int, record: Record) -> Server:
        from ps_elastic.assemble import make_server

        self._directory = record.directory
        log = record.events().write
        made, self._evaluator = make_server(
            self._config, self._parts, workers, record.tracker, log, background=False, copies=self.copies
        )
        made.calculator.keeps_versions = not self.copies  # else a worker computes on a model that was sent long before
        return made

    def worker(self, rank: int, server: Server) -> Machine:
        from ps_elastic.assemble import make_worker
        from ps_elastic.tracker import Tracker
        from ps_elastic.turns import Turns

        pages = Pages(self._directory / "metrics" / f"rank-{rank:03d}.jsonl")
        self._pages.append(pages)
        worker = make_worker(
            self._config, self._shared, rank, self._ranks, Tracker(rank, pages.write), bench=self._bench,
            clock=self._stopwatch,
        )  # fmt: skip
        return Turns(worker, self._stopwatch, server.calculator.view)

    def finish(self, server: Server, record: Record, now: float, wall_s: float) -> dict[str, Any]:
        from ps_elastic.training import finish

        assert self._evaluator is not None
        return finish(self._config, self._parts, server, self._evaluator, record, now, wall_s)

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        for pages in self._pages:
            pages.flush()


class HeaderSetting:
    """Server and workers of which headers alone are there."""

    copies: None = None

    def __init__(self, config: Config, parts: Parts, norms: str | os.PathLike[str] | None) -> None:
        from ps_elastic.headers import RecordedNorms

        self._config, self._layout = config, parts.layout
        self._bucket_bytes = [parts.compressor.max_nbytes(bucket.numel) for bucket in parts.layout.buckets]
        steps = getattr(config.update.plugin.build(), "local_steps", 1)
        self._samples = parts.task.batch_size * config.update.accumulate * steps  # of a push
        self._norms = None if norms is None else RecordedNorms(os.fspath(norms))

    def server(self, workers: int, record: Record) -> Server:
        from ps_elastic.headers import HeaderCalculator, joined
        from ps_elastic.lanes import LanesServer
        from ps_elastic.optimizer import learning_rate
        from ps_elastic.server import Server
        from ps_elastic.slices import Slices

        config, train = self._config, self._config.train
        coherence = config.simulation.norms.coherence

        def calculator(part: Layout) -> Calculator:
            made = HeaderCalculator(config.optimizer, 4 * part.size, part.numel, coherence)
            return cast("Calculator", made)  # what the server asks of one

        alpha = partial(learning_rate, config.optimizer, config.schedule, budget=train.samples)
        policy, make = config.policy.build(), partial(Server, config.policy.build(), workers, calculator(self._layout))
        if policy.layerwise:
            parts = self._layout.parts()
            slices = Slices(self._layout, None, [calculator(part) for part in parts], joined)
            make = partial(LanesServer, [config.policy.build() for _ in parts], workers, slices)
        return make(
            alpha, train.samples, record.tracker, record.events().write,
            discrepancy=config.tracker.discrepancy, units=config.update.plugin.build().units,
            pipeline=config.update.pipeline,
        )  # fmt: skip

    def worker(self, rank: int, server: Server) -> Machine:
        from ps_elastic.headers import HeaderWorker, LayerHeaderWorker, modelled

        config, totals = self._config, server.totals
        model = config.simulation.norms
        headers = self._norms.of(rank) if self._norms else modelled(model, rank, config.seed, lambda: totals.samples)
        if config.policy.build().layerwise:
            return LayerHeaderWorker(rank, headers, self._layout, self._bucket_bytes, self._samples)
        return HeaderWorker(rank, headers, sum(self._bucket_bytes), self._samples)

    def finish(self, server: Server, record: Record, now: float, wall_s: float) -> dict[str, Any]:
        from ps_elastic.training import summarise

        summary = summarise(self._config, server, now, wall_s, OK)
        return {**summary, "run_dir": str(record.directory)}

    def close(self) -> None:
        """Nothing is open."""


class Pages:
    """A file of lines that is open only while it is written: there may be more of them than may be open at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines, self._size = path, list[str](), 0
        path.write_bytes(b"") if not path.exists() else None

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > 1 << 14:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n".join(self._lines) + "\n")
            self._lines.clear()
            self._size = 0


def make_simulator(
    config: Config, parts: Parts, server: Server, workers: int, make: Callable[[int], Machine],
    on_turn: Callable[[float], None] | None = None, copies: Mapping[int, Tensor] | None = None,
) -> Simulator:  # fmt: skip
    """The simulator that `config` describes, around `server` and the workers that `make` makes, by rank.

    copies: with torn views, where each worker leaves what it read (d,).
    """
    from ps_elastic.simulate import Simulator
    from ps_elastic.simulate_ahead import AheadSimulator
    from ps_elastic.simulate_layers import LayerSimulator
    from ps_elastic.simulate_torn import TornSimulator

    s, survive, layout = config.simulation, config.survive, parts.layout
    up = sum(parts.compressor.max_nbytes(bucket.numel) for bucket in layout.buckets)
    pushes = -(-config.train.samples // (parts.task.batch_size * config.update.accumulate))
    alone_s = pushes * typical_s(s.compute, s.network, up, 4 * layout.size)
    kind: Callable[..., Simulator] = Simulator
    if config.policy.build().layerwise:
        sizes = [part.numel for part in layout.parts()]
        kind = partial(LayerSimulator, sizes=sizes, cut_s=config.update.plugin.build().cut_s)
    elif config.update.pipeline:
        kind = partial(AheadSimulator, pipeline=config.update.pipeline)
    elif copies is not None:
        kind = partial(TornSimulator, layout=layout, copies=copies, read_s=s.read_s)
    return kind(
        server,
        workers,
        make,
        Durations(s.compute, workers, config.seed),
        Cores(s.compute.cores) if s.compute.cores else None,
        Wires(s.network),
        Plan(config.faults, config.seed),
        service_s=s.network.service_s,
        ask_again_s=survive.ask_again_s,
        silence_s=survive.stall_deadline_s,
        deadline_s=s.deadline_s or LIVES * alone_s + survive.stall_deadline_s,
        min_workers=survive.min_workers,
        on_turn=on_turn,
    )


def _told(record: Record, summary: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The summary, written again, with what a simulation has to add."""
    run_dir, wall_s = summary.pop("run_dir"), summary["wall_s"]
    summary |= {**more, "pushes_per_s": summary["pushes"] / wall_s if wall_s > 0 else None}
    return {**record.write_summary(summary), "run_dir": run_dir}


def _failed(config: Config, record: Record, server: Server, error: BaseException, now: float, wall_s: float) -> None:
    from ps_elastic.training import describe, exit_code, summarise

    summary = summarise(config, server, now, wall_s, exit_code(error))
    record.write_summary({**summary, "virtual_s": now, "pushes_per_s": None, "error": describe(error)})
