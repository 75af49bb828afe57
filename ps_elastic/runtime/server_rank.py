"""Rank 0's part of a job: makes the server and its end of the transport, and runs it to its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from psutil import pid_exists

from ps_elastic.errors import INTERRUPTED, OK, WorkersLost
from ps_elastic.records.run_dir import asked_by
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import make_server
from ps_elastic.runtime.live import Live
from ps_elastic.runtime.loops import serve
from ps_elastic.runtime.rank_setup import RankSetup, find_step_memory
from ps_elastic.runtime.signals import Signals, ended_by
from ps_elastic.runtime.summary import failed, finish
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.server import Server
from ps_elastic.server.shared_step_memory import SharedStepMemory
from ps_elastic.transport import server_endpoint
from ps_elastic.transport.collectives import agree, blame
from ps_elastic.transport.host import processes_here
from ps_elastic.transport.links import Links
from ps_elastic.transport.mpi import MPI


class Made(NamedTuple):
    """What rank 0 has when its workers may begin."""

    record: RunWriter
    server: Server
    evaluator: Evaluator
    end: server_endpoint.ServerEndpoint
    step_memory: SharedStepMemory | None


def be_server(comm: MPI.Comm, setting: RankSetup, links: Links, signals: Signals, *, quiet: bool) -> dict[str, Any]:
    """Run the server to its end; return the summary, which is written. Raises what ended the run otherwise."""
    config, survive = setting.config, setting.config.survive
    made = agree(comm, lambda: _make(comm, setting, links))
    record, server, evaluator, end, step_memory = made
    processes = processes_here(comm)
    if step_memory is not None:
        step_memory.processes = processes
    live = Live(server, config, quiet=quiet)
    live.say(
        f"{config.name}: 1 server, {comm.Get_size() - 1} workers; {setting.threads}; {links.text()}; "
        f"{setting.directory}"
    )
    for note in (*filter(None, [setting.buckets]), *setting.parts.notes):
        live.say(note)
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    watch = Watch(made, signals, processes, live, setting.directory)
    end.look = watch.look
    try:
        with live:
            serve(
                server, end, clock, warn=live.say, warning_s=survive.stall_warning_s,
                deadline_s=survive.stall_deadline_s, on_turn=watch.on_turn,
            )  # fmt: skip
            wall_s = clock()
            end.close()
            if step_memory is not None:
                step_memory.count(server.totals)
            summary = finish(config, setting.parts, server, evaluator, record, wall_s, wall_s, watch.code)
    except BaseException as error:
        wall_s = clock()
        record.write_summary({**failed(config, server, error, wall_s, wall_s), "error": blame(error, 0)})
        record.close()
        raise  # and the job is ended at once: closing the evaluator would wait for an evaluation under way
    evaluator.close()
    record.close()
    return summary


class Watch:
    """What rank 0 does between messages: signals, workers that died, what the user sees, and the files."""

    def __init__(self, made: Made, signals: Signals, processes: Mapping[int, int], live: Live, directory: Path) -> None:
        self.code = OK  # that the run is to end with
        self._made, self._signals, self._processes, self._live = made, signals, processes, live
        self._directory = directory

    def look(self) -> None:
        """Raise what ends the run at once, if there is anything: a signal, or workers of this host that died."""
        lost = [rank for rank, pid in self._processes.items() if not pid_exists(pid)]
        self._made.server.lost_workers += lost
        if self._signals.end:
            raise ended_by(self._signals.end, lost)
        if lost:
            raise WorkersLost(f"ranks {lost} died")

    def on_turn(self, now: float) -> None:
        """Called now and then, whether messages come or not."""
        signals, (record, server, _, end, _) = self._signals, self._made
        if signals.end:
            self.look()
        if signals.stop and self.code == OK:
            self.code = INTERRUPTED
            self._live.say(
                f"asked to stop ({asked_by(self._directory)}): the workers finish their steps, then the model is saved"
            )
            for worker, reply in server.stop(now):
                end.send(worker, reply)
        self._live.update(now)
        record.rest()


def _make(comm: MPI.Comm, setting: RankSetup, links: Links) -> Made:
    config, parts, survive = setting.config, setting.parts, setting.config.survive
    workers, layout, patience_s = comm.Get_size() - 1, parts.layout, survive.stall_deadline_s
    record = RunWriter(setting.directory, 0)
    record.write_setting(
        config, workers, mpi=MPI.Get_library_version().strip("\0\n "), transport=links.transports,
        waiting=links.waiting,
    )  # fmt: skip
    end = server_endpoint.ServerEndpoint(comm, setting.traffic(links, patience_s))
    x = None if end.model is None else torch.from_numpy(end.model)
    copies = distances = None
    if (windows := links.windows) is not None and windows.written:
        if config.writing == "lock":
            windows.lock(patience_s).make()  # before any worker begins
        distances = {worker: windows.distances(worker) for worker in windows.workers}
    elif windows is not None and windows.torn:
        copies = {worker: torch.from_numpy(windows.copy(worker)) for worker in windows.workers}
    step_memory = find_step_memory(links, config, layout, comm.Get_size(), patience_s)
    if step_memory is not None:
        step_memory.make(look=lambda: end.look())  # before any worker begins
    server, evaluator = make_server(
        config, parts, workers, record.tracker, record.events().note, background=True, x=x, copies=copies,
        distances=distances, sharing=step_memory,
        # With `update.pipeline` models stay as they are, and small models are copied into their message.
        readers=end if end.lends and not config.update.pipeline else None,
    )  # fmt: skip
    return Made(record, server, evaluator, end, step_memory)
