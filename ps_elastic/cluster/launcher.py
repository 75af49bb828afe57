"""A training job under mpirun: the command line this MPI needs here, and one run of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ps_elastic.cluster import environment, mpirun
from ps_elastic.cluster.environment import Mpi
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.records.run_dir import outcome

QUIET = ("OMPI_MCA_osc", "^ucx")  # else osc/ucx complains on every rank that makes a shared window


def train_command(config: str, overrides: Sequence[str], run_dir: Path, check: bool = False) -> list[str]:
    """What every rank of a job runs."""
    last = ["--check"] if check else []
    return [sys.executable, "-m", "ps_elastic", "train", config, *overrides, "--run-dir", str(run_dir), *last]


def mpirun_command(
    mpi: Mpi, ranks: int, argv: Sequence[str], *, cores: int, threads: int = 1, slots: int | None = None
) -> list[str]:
    """The command line that starts `argv` on `ranks` ranks of `threads` threads.

    cores: physical cores of this host. slots: ranks that the SLURM allocation has room for; None outside of one.
    MPICH needs no flags: its launcher neither binds nor counts slots.
    """
    flags = placement(ranks, cores=cores, threads=threads, slots=slots) if mpi.flavour == "openmpi" else []
    return [str(mpi.mpirun), *flags, "-n", str(ranks), *argv]


def placement(ranks: int, *, cores: int, threads: int, slots: int | None) -> list[str]:
    """Open MPI's flags for where the ranks go.

    A job that would fit on these cores twice is not bound: mpirun always begins at the first core, so a second job
    would be bound to the very same ones.
    """
    room = cores if slots is None else slots
    crowd = ["--oversubscribe"] if ranks > room else []
    if slots is None and cores < 2 * ranks * threads <= 2 * cores:
        return ["--map-by", f"slot:PE={threads}", "--bind-to", "core"]
    return ["--bind-to", "none", *crowd]


def by_hand(mpi: Mpi, ranks: int, program: str) -> str:
    """The line for a shell that starts `program` on `ranks` ranks of this host by a plain mpirun."""
    permission = environment.root_permission() if mpi.flavour == "openmpi" else {}
    crowd = ["--oversubscribe"] if mpi.flavour == "openmpi" and ranks > environment.physical_cores() else []
    return " ".join([*map("=".join, permission.items()), "mpirun", *crowd, "-n", str(ranks), program])


def mpi_environment(mpi: Mpi) -> dict[str, str]:
    """The variables this MPI needs: leave to run as root, and quiet."""
    if mpi.flavour != "openmpi":
        return {}
    quiet = {} if QUIET[0] in os.environ else dict([QUIET])
    return {**environment.root_permission(), **quiet}


def run_job(
    config: str, ranks: int, overrides: Sequence[str], run_dir: Path, *, check: bool = False, **streams: IO[Any] | None
) -> int:
    """Train `config` on `ranks` ranks (rank 0 serves) and return the run's exit code; its folder tells the rest.

    streams: stdout, stderr, open files where the ranks write; ours by default. Raises ConfigError or PlatformError
    before anything is started. Call it from the main thread; Ctrl-C and SIGTERM end the run, which then returns 130.
    """
    settings = load(config, overrides, plugins=False)
    argv = train_command(config, overrides, run_dir, check)
    return run_ranks(argv, ranks, run_dir, settings.most_threads, **streams)


def run_ranks(
    argv: Sequence[str],
    ranks: int,
    run_dir: Path,
    threads: int,
    *,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | None = None,
) -> int:
    """Run `argv` on `ranks` ranks and return what the run in `run_dir` ended with."""
    refuse_unfit(ranks)
    mpi = environment.find_mpi()
    cores, slots = environment.physical_cores(), environment.slurm_slots()
    command = mpirun_command(mpi, ranks, argv, cores=cores, threads=threads, slots=slots)
    ended = mpirun.run(command, rank_environment(mpi, ranks, threads, stdout), run_dir, stdout, stderr)
    if ended.outlived:
        _tell(f"{len(ended.outlived)} processes outlived mpirun and were killed: {ended.outlived}", stderr)
    ending = outcome(run_dir, ended.code, ended.interrupted)
    if ending.message:
        _tell(ending.message, stderr)
    return ending.exit


def run_heard(
    mpi: Mpi, ranks: int, argv: Sequence[str], folder: Path, *, limit_s: float, **variables: str
) -> tuple[mpirun.Ended, str]:
    """Run `argv` on `ranks` ranks of one thread, killed after `limit_s`; return how it ended, and all that it said."""
    cores, slots = environment.physical_cores(), environment.slurm_slots()
    command = mpirun_command(mpi, ranks, argv, cores=cores, slots=slots)
    with open(folder / "output", "w+") as output:
        around = {**rank_environment(mpi, ranks, 1, output), **variables}
        ended = mpirun.run(command, around, folder, output, subprocess.STDOUT, limit_s)
        output.seek(0)
        return ended, output.read()


def rank_environment(mpi: Mpi, ranks: int, threads: int, stdout: IO[Any] | None = None) -> dict[str, str]:
    """Our environment, and what the ranks need besides.

    Open MPI gives every rank a terminal of its own as stdout, so TTY_COMPATIBLE tells rich whether ours is one.
    """
    screen = (stdout or sys.stdout).isatty()
    return {
        **os.environ,
        **mpi_environment(mpi),
        **environment.thread_plan(ranks, environment.usable_cores(), threads),
        "TTY_COMPATIBLE": "1" if screen else "0",
    }


def describe(ranks: int, threads: int) -> str:
    """One line on what a job of this size gets here: ranks, place, binding, MPI."""
    mpi, cores, slots = environment.find_mpi(), environment.physical_cores(), environment.slurm_slots()
    flags = mpirun_command(mpi, ranks, (), cores=cores, threads=threads, slots=slots)
    bound = f"each bound to {threads} of {cores} cores" if "--map-by" in flags else "not bound to cores"
    place = "" if slots is None else f" in SLURM job {os.environ['SLURM_JOB_ID']}"
    return f"{ranks} ranks{place}, {bound}, {mpi}"


def refuse_unfit(ranks: int) -> None:
    """Raise where no job of `ranks` ranks can start: ConfigError if too few, PlatformError inside another job."""
    if ranks < 2:
        raise ConfigError(f"expected 2 or more, rank 0 as server and at least one worker; got {ranks}", key="-n")
    expected = environment.launcher_expects()
    if expected is not None and expected > 1:
        raise PlatformError(
            f"this is one of {expected} processes that a launcher started, and each would start a job: call "
            "`ps-elastic launch` by itself, or `ps-elastic train` under mpirun"
        )


def _tell(message: str, stderr: IO[Any] | None) -> None:
    os.write((stderr or sys.stderr).fileno(), f"ps-elastic: {message}\n".encode())
