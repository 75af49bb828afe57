"""A worker's part of a job: makes the worker and its end of the transport, and runs it to its end."""

from __future__ import annotations

import contextlib
import time

import torch

from ps_elastic.cluster.environment import local_rank
from ps_elastic.cluster.threads import giving_way
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import compares, make_worker
from ps_elastic.runtime.loops import tell_server, work
from ps_elastic.runtime.rank_setup import RankSetup, find_step_memory
from ps_elastic.transport.collectives import agree
from ps_elastic.transport.host import processes_here
from ps_elastic.transport.links import Links
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.worker_endpoint import WorkerEndpoint
from ps_elastic.worker.flat_module import Memory, ModelLives
from ps_elastic.worker.model_writer import SharedModel
from ps_elastic.worker.worker import Worker


def be_worker(comm: MPI.Comm, setting: RankSetup, links: Links) -> None:
    """Run this rank's worker to its end. Raises what ended it otherwise, once rank 0 was told."""
    survive, rank = setting.config.survive, comm.Get_rank()
    patience_s = 2 * survive.stall_deadline_s  # so that the server, which knows more, is the first to give up
    record, worker, end = agree(comm, lambda: _make(comm, setting, links, patience_s))
    processes_here(comm)
    started = time.perf_counter()
    try:
        with giving_way(links.crowded):
            work(
                worker, end, lambda: time.perf_counter() - started,
                ask_again_s=survive.ask_again_s, deadline_s=patience_s,
            )  # fmt: skip
        end.close()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be what failed; the error itself is told below
            record.close()
        tell_server(end, rank, error)
        raise
    record.close()


def _make(
    comm: MPI.Comm, setting: RankSetup, links: Links, patience_s: float
) -> tuple[RunWriter, Worker, WorkerEndpoint]:
    config, parts, layout, rank = setting.config, setting.parts, setting.parts.layout, comm.Get_rank()
    record = RunWriter(setting.directory, rank)
    end = WorkerEndpoint(comm, setting.traffic(links, patience_s), in_place=parts.in_place, compares=compares(config))
    x, g = map(torch.from_numpy, end.memory)
    own = ModelLives.WATCHED if config.views == "torn" else ModelLives.BESIDE if end.apart else ModelLives.OWN
    memory = Memory(x, g, ModelLives.SERVERS if end.reads_in_place else own)
    shared_model = None
    if (windows := links.windows) is not None and windows.written:
        lock = windows.lock(patience_s) if config.writing == "lock" else contextlib.nullcontext()
        shared_model = SharedModel(torch.from_numpy(windows.model()), lock, windows.distances(rank))
    worker = make_worker(
        config, parts, rank, comm.Get_size() - 1, record.tracker, memory, local_rank(), shared_model=shared_model
    )
    if (step_memory := find_step_memory(links, config, layout, comm.Get_size(), patience_s)) is not None:
        end.help = step_memory.helper(rank)
    return record, worker, end
