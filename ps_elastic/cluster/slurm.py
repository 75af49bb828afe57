"""A training job for SLURM: its batch script, and handing it in."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ps_elastic.cluster.environment import Mpi, thread_plan
from ps_elastic.cluster.launcher import mpi_environment, mpirun_command
from ps_elastic.errors import ConfigError, PlatformError, unknown
from ps_elastic.records.run_dir import SCRIPT

NOTICE_S = 60  # seconds before the end of its time at which a job is told
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")


@dataclass(frozen=True)
class SlurmJob:
    """What to ask of SLURM, and what to run there; paths absolute."""

    name: str
    config: str
    overrides: Sequence[str]
    run_dir: Path
    chdir: Path
    nodes: int
    tasks_per_node: int
    time: str  # as SLURM writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S
    threads: int = 1
    partition: str | None = None
    account: str | None = None
    python: str = sys.executable

    def __post_init__(self) -> None:
        for key, value in (("--nodes", self.nodes), ("--tasks-per-node", self.tasks_per_node)):
            if value < 1:
                raise ConfigError(f"expected 1 or more, got {value}", key=key)
        if self.ranks < 2:
            raise ConfigError(
                "1 node of 1 task is 1 rank; expected 2 or more, a server and a worker", key="--tasks-per-node"
            )
        seconds(self.time)

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def seconds(time: str) -> int:
    """The length of a SLURM time limit. Raises ConfigError if it is none, or zero, which means no limit to SLURM."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"expected HH:MM:SS, MM:SS, minutes or D-HH:MM:SS, got '{time}'", key="--time")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    given = sum(part is not None for part in match.groups()[1:])
    if match["days"] is not None or given == 3:
        hours, minutes, rest = parts
    elif given == 2:
        hours, minutes, rest = 0, parts[0], parts[1]
    else:
        hours, minutes, rest = 0, parts[0], 0
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if total == 0:
        raise ConfigError(f"expected more than no time, got '{time}'", key="--time")
    return total


def sbatch_text(job: SlurmJob, mpi: Mpi, template: str) -> str:
    """The batch script: `template` with the job's values in the place of its @{names}, quoted for the shell."""
    names = ("name", "nodes", "tasks_per_node", "time", "chdir", "run_dir", "python")
    quoted = {
        **{name: str(getattr(job, name)) for name in names},
        "cpus_per_task": str(job.threads),
        # A short job would hear it at its start: SLURM may be up to a minute early.
        "notice_s": str(min(NOTICE_S, seconds(job.time) // 5)),
        "output": str(job.run_dir).replace("%", "%%") + "/slurm-%j.out",
    }
    lines = {
        "options": "\n".join(
            f"#SBATCH --{key}={shlex.quote(value)}"
            for key, value in (("partition", job.partition), ("account", job.account))
            if value is not None
        ),
        "exports": "\n".join(f"export {key}={shlex.quote(value)}" for key, value in exports(job, mpi).items()),
        "mpirun": shlex.join(
            mpirun_command(mpi, job.ranks, (), cores=job.threads, threads=job.threads, slots=job.ranks)
        ),
        "config": shlex.join([job.config, *job.overrides]),
    }
    return fill(template, {key: shlex.quote(value) for key, value in quoted.items()} | lines)


def exports(job: SlurmJob, mpi: Mpi) -> dict[str, str]:
    """The variables of the ranks. Open MPI gives each a terminal as stdout, so rich is told that there is none."""
    threads = thread_plan(job.tasks_per_node, job.tasks_per_node * job.threads, job.threads)
    return {**mpi_environment(mpi), **threads, "TTY_COMPATIBLE": "0"}


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with each @{name} replaced; a line that held nothing but an empty one is left out."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ConfigError(unknown("name in @{}", match[1], values), key="--template")
        return values[match[1]]

    lines = ((line, re.sub(r"@\{(\w+)\}", value, line)) for line in template.splitlines())
    return "".join(f"{text}\n" for line, text in lines if text.strip() or not line.strip())


def read_template(path: str | None) -> str:
    """The text of the template file, or of the one that comes with the package. Raises ConfigError."""
    if path is None:
        return resources.files("ps_elastic.cluster").joinpath("sbatch.template").read_text()
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read this template: {error}", key="--template", source=path) from error


def require_sbatch() -> str:
    """The path of sbatch. Raises PlatformError."""
    path = shutil.which("sbatch")
    if path is None:
        raise PlatformError("no sbatch on PATH: this machine cannot submit to SLURM (--dry-run needs none)")
    return path


def hand_in(run_dir: Path, text: str) -> tuple[int, Path]:
    """Submit the script, which stays in the run's folder, and return (the job's number, the script's path).

    Raises ConfigError if another job's script is there, PlatformError with SLURM's own words if it refuses.
    """
    command, script = require_sbatch(), run_dir / SCRIPT
    try:
        with script.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        message = f"a job was submitted to this folder before (it holds {SCRIPT}): name a new one"
        raise ConfigError(message, key="--run-dir", source=str(run_dir)) from error
    try:
        return sbatch(command, script), script
    except PlatformError:
        script.unlink()  # or the folder would be refused when the mistake is mended
        raise


def sbatch(command: str, script: Path) -> int:
    """Hand the script to SLURM and return the job's number. Raises PlatformError."""
    try:
        done = subprocess.run(
            [command, "--parsable", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformError("sbatch did not answer within 60 s: is the SLURM controller up?") from error
    if done.returncode != 0:
        raise PlatformError(f"sbatch refused the job: {done.stderr.strip()}")
    return int(done.stdout.strip().split(";")[0])  # NUMBER or NUMBER;CLUSTER


def absolute(path: str) -> Path:
    """`path` seen from the folder we are in, links left as they are: a node may know them under that name alone."""
    return Path(os.path.abspath(path))
