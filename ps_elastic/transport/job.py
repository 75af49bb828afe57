"""One rank of a job under MPI, from its command line to its end; whatever happens, the job ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ps_elastic.environment import INSTALL, launcher_rank, local_rank, refuse_split_world
from ps_elastic.errors import INTERRUPTED, OK, ConfigError, PlatformError, WorkersLost
from ps_elastic.messages import Farewell
from ps_elastic.rundir import INTERRUPT, new_run_dir
from ps_elastic.training import describe, exit_code
from ps_elastic.transport.agree import Told, agree, blame, broadcast, compare, ending_all, meet, processes_here
from ps_elastic.transport.autocut import settle_buckets
from ps_elastic.transport.signals import Signals, ended_by

if TYPE_CHECKING:
    from mpi4py import MPI

    from ps_elastic.assemble import Parts
    from ps_elastic.config import Config
    from ps_elastic.evaluate import Evaluator
    from ps_elastic.server import Server
    from ps_elastic.transport.links import Links
    from ps_elastic.transport.mates import Mates
    from ps_elastic.transport.worker_end import WorkerEnd

_ABORT_WITHIN_S = 5.0  # rank 0 ends the job within this after a rank failed; then the rank does it itself
_LONGEST_TEXT = 60_000  # bytes of a traceback that travel to rank 0


class Setting(NamedTuple):
    """What a rank knows when it may begin."""

    config: Config
    parts: Parts
    threads: str  # for the user
    buckets: str  # for the user, where they were measured
    directory: Path


def run_rank(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str],
    run_dir: str | os.PathLike[str] | None,
    *,
    quiet: bool,
) -> dict[str, Any] | None:
    """Be one rank of the job; return the summary on rank 0, None elsewhere. Ends the whole job where a rank fails.

    Raises PlatformError without a usable MPI, ConfigError with a world of one, JobFailed on rank 0 (SystemExit with
    the same code elsewhere) where some rank cannot begin.
    """
    comm = _world()
    with ending_all(comm):
        signals = Signals(comm.Get_rank())
        setting = _prepare(comm, source if isinstance(source, Mapping) else str(source), overrides, run_dir)
        links = _join(comm, setting)
        summary = None
        if comm.Get_rank() == 0:
            summary = _be_server(comm, setting, links, signals, quiet=quiet)
        else:
            _be_worker(comm, setting, links)
        meet(comm)
        links.free()
        comm.Free()
    return summary


def _world() -> MPI.Comm:
    try:
        from ps_elastic.transport.slot import MPI
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise PlatformError(f"no MPI library could be loaded ({why}); `{INSTALL}` installs one") from None
    size = MPI.COMM_WORLD.Get_size()
    try:
        refuse_split_world(size)
    except PlatformError as error:
        if launcher_rank():  # the launcher's rank 0 stands alone too, and tells
            raise Told(error.exit_code) from None
        raise
    if size < 2:
        raise ConfigError(
            "got 1 rank, expected at least 2 (rank 0 is the server): start it by `mpirun -n 4 ps-elastic train ...` "
            "or `ps-elastic launch -n 4 ...`, or in one process with --in-process --workers 3"
        )
    return MPI.COMM_WORLD.Dup()


def _prepare(
    comm: MPI.Comm,
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    run_dir: str | os.PathLike[str] | None,
) -> Setting:
    """Load and make, on every rank, what is the same on all of them; refuse what differs."""
    from ps_elastic.config import load

    rank, workers = comm.Get_rank(), comm.Get_size() - 1
    threads = agree(comm, lambda: _threads(source, overrides, rank))
    from ps_elastic.assemble import make_parts  # torch: only after the threads are set

    config = agree(comm, lambda: load(source, overrides))
    compare(comm, "the configuration", config.digest())
    # One rank of each host first: what it fetches, the others find.
    early = agree(comm, lambda: None if local_rank() else make_parts(config, workers))
    parts = agree(comm, lambda: early or make_parts(config, workers))
    compare(comm, "the model's layout", parts.layout.digest)
    cut = settle_buckets(comm, config, parts)
    folder = agree(comm, lambda: "" if rank else str(_folder(config.name, run_dir)))
    return Setting(cut.config, cut.parts, threads, cut.text, Path(broadcast(comm, folder, 0)))


def _threads(source: str | Mapping[str, Any], overrides: Sequence[str], rank: int) -> str:
    from ps_elastic.config import load
    from ps_elastic.threads import set_server_threads, set_threads

    light = load(source, overrides, plugins=False)
    return set_threads(light.threads) if rank else set_server_threads(light.server_threads, light.threads)


def _folder(name: str, given: str | os.PathLike[str] | None) -> Path:
    return new_run_dir(name, None if given is None else os.fspath(given)).absolute()


def _join(comm: MPI.Comm, setting: Setting) -> Links:
    from ps_elastic.assemble import reads_in_place, shares_steps
    from ps_elastic.transport.links import join
    from ps_elastic.transport.mates import common_bytes

    config, parts = setting.config, setting.parts
    model_bytes = 4 * parts.layout.size
    written = config.update.pipeline + 1 if config.writers == "workers" else 0
    # A window has one frame for each worker, unless nothing but headers is sent.
    transport = "messages" if config.update.pipeline and not written else config.transport
    common = common_bytes(config.optimizer, parts.layout, comm.Get_size()) if shares_steps(config, parts) else 0
    return join(
        comm, transport, config.threads, parts.frames(config), model_bytes,
        in_place=reads_in_place(config), torn=config.views == "torn", written=written, common=common,
    )  # fmt: skip


def _be_server(comm: MPI.Comm, setting: Setting, links: Links, signals: Signals, *, quiet: bool) -> dict[str, Any]:
    from psutil import pid_exists

    from ps_elastic.assemble import make_server
    from ps_elastic.live import Live
    from ps_elastic.record import Record
    from ps_elastic.training import failed, finish
    from ps_elastic.transport.loops import serve
    from ps_elastic.transport.server_end import ServerEnd
    from ps_elastic.transport.slot import MPI

    config, parts, threads, buckets, directory = setting
    survive, layout, workers = config.survive, parts.layout, comm.Get_size() - 1

    mates = _mates(comm, setting, links, survive.stall_deadline_s)

    def make() -> tuple[Record, Server, Evaluator, ServerEnd]:
        import torch

        record = Record(directory, 0)
        record.write_setting(
            config, workers, mpi=MPI.Get_library_version().strip("\0\n "), transport=links.transports,
            waiting=links.waiting,
        )  # fmt: skip
        log = record.events().write
        patience_s = survive.stall_deadline_s
        end = ServerEnd(
            comm, layout.digest, parts.frames(config), 4 * layout.size, links.spins, patience_s, links=links,
            pipeline=config.update.pipeline,
        )  # fmt: skip
        x = None if end.model is None else torch.from_numpy(end.model)
        copies = distances = None
        if (windows := links.windows) is not None and windows.written:
            if config.writing == "lock":
                windows.lock(patience_s).make()  # before any worker begins
            distances = {worker: windows.distances(worker) for worker in windows.workers}
        elif windows is not None and windows.torn:
            copies = {worker: torch.from_numpy(windows.copy(worker)) for worker in windows.workers}
        if mates is not None:
            mates.make()  # before any worker begins
        server, evaluator = make_server(
            config, parts, workers, record.tracker, log, background=True, x=x, copies=copies, distances=distances,
            moments=mates.moments if mates else (), gather=partial(mates.leader, end=end) if mates else None,
        )  # fmt: skip
        return record, server, evaluator, end

    record, server, evaluator, end = agree(comm, make)
    processes = processes_here(comm)
    if mates is not None:
        mates.processes = processes
    live, code = Live(server, config, quiet=quiet), OK
    live.say(f"{config.name}: 1 server, {workers} workers; {threads}; {links.text()}; {directory}")
    if buckets:
        live.say(buckets)
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    def look() -> None:
        lost = [rank for rank, pid in processes.items() if not pid_exists(pid)]
        server.lost_workers += lost
        if signals.end:
            raise ended_by(signals.end, lost)
        if lost:
            raise WorkersLost(f"ranks {lost} died")

    def on_turn(now: float) -> None:
        nonlocal code
        if signals.end:
            look()
        if signals.stop and code == OK:
            code = INTERRUPTED
            live.say(f"asked to stop ({_word(directory)}): the workers finish their steps")
            for worker, reply in server.stop(now):
                end.send(worker, reply)
        live.update(now)
        record.rest()

    end.look = look
    try:
        with live:
            serve(
                server, end, clock, warn=live.say, warning_s=survive.stall_warning_s,
                deadline_s=survive.stall_deadline_s, on_turn=on_turn,
            )  # fmt: skip
            wall_s = clock()
            end.close()
            if mates is not None:
                mates.count(server.totals)
            summary = finish(config, parts, server, evaluator, record, wall_s, wall_s, code)
    except BaseException as error:
        record.write_summary({**failed(config, server, error, clock()), "error": blame(error, 0)})
        record.close()
        raise  # and the job is ended at once: closing the evaluator would wait for an evaluation under way
    evaluator.close()
    record.close()
    return summary


def _mates(comm: MPI.Comm, setting: Setting, links: Links, patience_s: float) -> Mates | None:
    """The ranks of the server's host that make its steps together, if this is one of them."""
    from ps_elastic.transport.mates import Mates

    if links.windows is None or links.windows.common() is None:
        return None
    return Mates(links, setting.config, setting.parts.layout, comm.Get_size(), patience_s)


def _be_worker(comm: MPI.Comm, setting: Setting, links: Links) -> None:
    from ps_elastic.assemble import compares, make_worker
    from ps_elastic.record import Record
    from ps_elastic.threads import giving_way
    from ps_elastic.transport.loops import work
    from ps_elastic.transport.worker_end import WorkerEnd
    from ps_elastic.workbench import Memory
    from ps_elastic.worker import Worker
    from ps_elastic.writers import Sheet

    config, parts, _, _, directory = setting
    survive, layout, rank = config.survive, parts.layout, comm.Get_rank()
    patience_s = 2 * survive.stall_deadline_s  # so that the server, which knows more, is the first to give up

    def make() -> tuple[Record, Worker, WorkerEnd]:
        import torch

        record = Record(directory, rank)
        end = WorkerEnd(
            comm, layout.digest, parts.frames(config), 4 * layout.size, links.spins, patience_s,
            in_place=parts.in_place, links=links, pipeline=config.update.pipeline, apart=compares(config),
        )  # fmt: skip
        x, g = map(torch.from_numpy, end.memory)
        memory = Memory(x, g, foreign=end.reads_in_place, watched=config.views == "torn")
        sheet = None
        if (windows := links.windows) is not None and windows.written:
            lock = windows.lock(patience_s) if config.writing == "lock" else contextlib.nullcontext()
            sheet = Sheet(torch.from_numpy(windows.model()), lock, windows.distances(rank))
        worker = make_worker(
            config, parts, rank, comm.Get_size() - 1, record.tracker, memory, local_rank(), sheet=sheet
        )  # fmt: skip
        if (mates := _mates(comm, setting, links, patience_s)) is not None:
            end.help = mates.helper(rank)
        return record, worker, end

    record, worker, end = agree(comm, make)
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
        _tell_server(end, rank, error)
        raise
    record.close()


def _tell_server(end: WorkerEnd, rank: int, error: BaseException) -> None:
    """Leave it to rank 0 to tell the user and to end the job; return if it does not."""
    text = describe(error).encode()[-_LONGEST_TEXT:].decode(errors="ignore")
    end.send(0, Farewell(rank, 0, text, exit_code(error)))
    deadline = time.monotonic() + _ABORT_WITHIN_S
    while time.monotonic() < deadline:
        end.recv(0.2)


def _word(directory: Path) -> str:
    return "Ctrl-C or SIGTERM" if (directory / INTERRUPT).exists() else "SIGUSR1; this version writes no checkpoints"
