"""A run in simulated time: its parts put together, run to its end, and told of in summary.json."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ps_elastic.config.faults import Plan
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.errors import ConfigError
from ps_elastic.records.run_dir import new_run_dir
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import Parts, make_parts
from ps_elastic.runtime.live import Live
from ps_elastic.runtime.summary import failed
from ps_elastic.server.server import Server
from ps_elastic.simulation.costs import Cores, Durations, NetworkLinks, typical_s
from ps_elastic.simulation.nodes import VirtualWorker
from ps_elastic.simulation.participants import ComputingParticipants, HeaderParticipants
from ps_elastic.simulation.simulator import Simulator
from ps_elastic.simulation.variants import AheadSimulator, LayerSimulator, TornSimulator

LIVES = 100  # times what one worker alone would need, after which a run is given up where no deadline is stated


def run_in_virtual_time(
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    workers: int,
    run_dir: str | os.PathLike[str] | None,
    *,
    headers_only: bool,
    norms: str | os.PathLike[str] | None,
    quiet: bool,
) -> dict[str, Any]:
    """What `simulate` does once its threads are set."""
    config = load(source, overrides, simulated=True).settled()
    if headers_only and config.views == "torn":
        raise ConfigError("got 'torn', expected exact: a timing-only simulation reads no entry of a model", key="views")
    if config.writers == "workers":
        raise ConfigError(
            "got 'workers', expected server: in simulated time nobody but the server writes", key="writers"
        )
    joining = config.faults.check(workers)
    parts = make_parts(config, workers)
    setting = (
        HeaderParticipants(config, parts, norms)
        if headers_only
        else ComputingParticipants(config, parts, workers + joining)
    )
    directory = new_run_dir(config.name, None if run_dir is None else os.fspath(run_dir))
    record = RunWriter(directory, 0)
    record.write_setting(config, workers, transport="simulated", headers_only=headers_only)
    server = setting.server(workers, record)
    live = Live(server, config, quiet=quiet)
    for note in parts.notes:
        live.say(note)
    started = time.perf_counter()
    simulator: Simulator | None = None
    try:
        make = partial(setting.worker, server=server)
        on_turn = None if quiet else live.update
        simulator = make_simulator(config, parts, server, workers, make, on_turn, setting.copies)
        with live, _patient_collector():
            started, processor = time.perf_counter(), time.process_time()
            now = simulator.run()
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - processor
            speed = server.totals.pushes / wall_s if wall_s > 0 else None
            more = {"virtual_s": now, "cpu_s": cpu_s, "headers_only": headers_only, "pushes_per_s": speed}
            return setting.finish(server, record, now, wall_s, **more)
    except BaseException as error:
        now, wall_s = simulator.now if simulator else 0.0, time.perf_counter() - started
        record.write_summary(failed(config, server, error, now, wall_s, virtual_s=now, pushes_per_s=None))
        raise
    finally:
        setting.close()
        record.close()


def make_simulator(
    config: Config, parts: Parts, server: Server, workers: int, make: Callable[[int], VirtualWorker],
    on_turn: Callable[[float], None] | None = None, copies: Mapping[int, Tensor] | None = None,
) -> Simulator:  # fmt: skip
    """The simulator that `config` describes, around `server` and the workers that `make` makes, by rank.

    copies: with inconsistent reads, where each worker leaves what it read (d,).
    """
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
        NetworkLinks(s.network),
        Plan(config.faults, config.seed),
        service_s=s.network.service_s,
        ask_again_s=survive.ask_again_s,
        silence_s=survive.stall_deadline_s,
        deadline_s=s.deadline_s or LIVES * alone_s + survive.stall_deadline_s,
        min_workers=survive.min_workers,
        on_turn=on_turn,
    )


@contextmanager
def _patient_collector() -> Iterator[None]:
    """Within, the garbage collector looks at young objects every 100,000 instead of every 700.

    Thousands of pushes that are kept for later are no garbage, but it goes through them again and again: a quarter of
    the time of synchronous rounds of 4,096 workers.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
