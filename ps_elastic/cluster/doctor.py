"""What could keep a job from running well on this machine, one finding for each thing looked at.

MPI is started once, as a job of two ranks in processes of their own; nothing here initialises it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ps_elastic.cluster import environment, leftovers
from ps_elastic.cluster.environment import Mpi
from ps_elastic.cluster.launcher import by_hand, run_heard
from ps_elastic.cluster.leftovers import SHM, forsaken_segments, unmapped
from ps_elastic.errors import Interrupted, PlatformError
from ps_elastic.transport.waking import find_futex
from ps_elastic.vectors import kernels

SHM_WARN, SHM_FAIL = 1 << 30, 64 << 20  # bytes; Open MPI maps 16 MB a rank before anything is sent
PACKAGES = {"torch": "pip install torch", "numpy": "pip install numpy", "mpi4py": "pip install mpi4py"}
PING_LIMIT_S = 60
_NAMES = {"openmpi": "Open MPI v{}", "mpich": "MPICH Version: {}", "intel": "Intel(R) MPI Library {}"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `remedy` is what to do where it is not ok."""

    check: str
    status: Literal["ok", "warn", "fail"]
    value: str
    remedy: str = ""


def examine(ranks: int = 4) -> Iterator[Finding]:
    """Yield the findings, for a job of `ranks` ranks on this host, as they are made."""
    yield Finding("python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    yield from map(package, PACKAGES)
    try:
        mpi = environment.find_mpi()
    except PlatformError as error:
        yield Finding("mpi", "fail", str(error), f"{environment.INSTALL} in an environment of its own")
    else:
        yield Finding("mpi", "ok", f"{mpi}, {mpi.mpirun}")
        yield on_path(mpi, ranks)
        yield from two_ranks(mpi)
    yield waiting()
    yield compiled()
    yield cores(ranks)
    yield threads()
    yield shared_memory()
    yield stray_segments()
    yield stray_sessions()
    yield slurm()


def package(name: str) -> Finding:
    """Whether a package is installed, by its metadata alone."""
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "not installed", PACKAGES[name])


def on_path(mpi: Mpi, ranks: int = 4) -> Finding:
    """Whether a plain `mpirun` would be the one that belongs to our MPI, and what it needs here."""
    found = shutil.which("mpirun")
    if found is None:
        return Finding("mpirun on PATH", "ok", "none; `ps-elastic launch` needs none")
    if Path(found).resolve() == mpi.mpirun.resolve():
        line = by_hand(mpi, ranks, "ps-elastic train CONFIG")
        return Finding("mpirun on PATH", "ok", f"{found}; a plain one needs here: {line}")
    remedy = f"use `ps-elastic launch`, or for a plain mpirun: export PATH={mpi.mpirun.parent}:$PATH"
    return Finding("mpirun on PATH", "warn", f"{found}, of another MPI than {mpi}", remedy)


def two_ranks(mpi: Mpi) -> Iterator[Finding]:
    """What two ranks see: the library they load against the launcher, and how fast they talk."""
    try:
        seen = ping(mpi)
    except PlatformError as error:
        yield Finding("two ranks", "fail", str(error), "try by hand: mpirun -n 2 python -m ps_elastic.transport.ping")
        return
    yield library(mpi, seen)
    if seen["size"] == 2:
        speed = f"{seen['latency_us']:.3g} us for 8 bytes, {seen['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s for 8 MB"
        yield Finding("two ranks", "ok", speed)


def waiting() -> Finding:
    """Whether ranks of one host can wake each other."""
    if find_futex() is not None:
        return Finding("waiting", "ok", "ranks of one host sleep until they are woken")
    remedy = "nothing to do but to allow futex(2), which a container's profile may forbid: waiting is slower without"
    return Finding("waiting", "warn", "no futex here: a rank that waits looks again and again", remedy)


def compiled() -> Finding:
    """Whether passes over large models are compiled."""
    if kernels.kernels_for(kernels.LEAST) is not None:
        return Finding("kernels", "ok", f"{kernels.described()}, for models of {kernels.LEAST:,} numbers or more")
    value = f"{kernels.described()}; with it ({kernels.EXTRA}) large models take fewer passes over memory"
    return Finding("kernels", "ok", value)


def library(mpi: Mpi, seen: dict[str, Any]) -> Finding:
    """Whether the library that mpi4py loaded is the launcher's."""
    loaded = " ".join(str(seen["library"]).split())  # MPICH pads its lines
    value = f"mpi4py loads {loaded.split(',')[0]}, the launcher is {mpi}"
    remedy = f"mpi4py must load the launcher's MPI: unset MPI4PY_LIBMPI and LD_LIBRARY_PATH, or {environment.INSTALL}"
    if seen["size"] != 2:
        return Finding("library", "fail", f"{value}; of 2 ranks started, each sees {seen['size']}", remedy)
    same = loaded.split(",")[0].startswith(_NAMES[mpi.flavour].format(mpi.version))
    return Finding("library", "ok", value) if same else Finding("library", "warn", value, remedy)


def ping(mpi: Mpi) -> dict[str, Any]:
    """Run `transport.ping` on two ranks and return what it printed. Raises PlatformError with the last lines."""
    program = [sys.executable, "-m", "ps_elastic.transport.ping"]
    with tempfile.TemporaryDirectory() as folder:
        ended, said = run_heard(mpi, 2, program, Path(folder), limit_s=PING_LIMIT_S)
    if ended.interrupted:
        raise Interrupted("interrupted while two ranks were talking")
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if ended.code == 0 and lines:
        found: dict[str, Any] = json.loads(lines[0])
        return found
    reason = f"no answer in {PING_LIMIT_S} s" if ended.timed_out else f"mpirun ended with {ended.code}"
    raise PlatformError(f"{reason}: {' / '.join(said.split(chr(10))[-4:])}")


def cores(ranks: int) -> Finding:
    """Whether the ranks of a job would share cores."""
    usable, physical = environment.usable_cores(), environment.physical_cores()
    value = f"{usable} usable, {physical} of them physical" if physical != usable else f"{usable} usable"
    warning = environment.crowding(ranks, usable, 1)
    if warning:
        return Finding(
            "cores", "warn", f"{value}; {warning}", "fewer ranks for timings; --ranks says how many you mean"
        )
    return Finding("cores", "ok", f"{value}, for {ranks} ranks")


def threads() -> Finding:
    """Whether the user's shell sets what the configuration decides."""
    ours = [f"{name}={os.environ[name]}" for name in environment.THREAD_VARIABLES if name in os.environ]
    if ours:
        return Finding(
            "threads", "warn", ", ".join(ours), "not heeded: `threads` and `server_threads` of the config are"
        )
    return Finding("threads", "ok", "none set in the environment; the config decides")


def shared_memory() -> Finding:
    """Whether ranks of one host have room to share memory."""
    if not SHM.is_dir():
        return Finding("shared memory", "warn", f"no {SHM}", "ranks of one host talk through it: mount a tmpfs there")
    free = shutil.disk_usage(SHM).free
    status: Literal["ok", "warn", "fail"] = "ok" if free >= SHM_WARN else "warn" if free >= SHM_FAIL else "fail"
    remedy = f"make {SHM} larger (in a container --shm-size=2g), or remove what fills it" if status != "ok" else ""
    return Finding("shared memory", status, f"{free / 1e6:.0f} MB free in {SHM}", remedy)


def stray_segments() -> Finding:
    """Whether killed jobs of ours left shared memory that no process maps any more."""
    stray = sorted(unmapped(SHM))
    if not stray:
        return Finding("stray segments", "ok", "none")
    size, settled = sum(path.stat().st_size for path in stray), forsaken_segments(SHM)
    remedies = ["ps-elastic doctor --sweep"] if settled else []
    if rest := [str(path) for path in stray if path not in settled]:
        remedies.append(f"if no job is starting: rm {' '.join(rest)}")
    return Finding("stray segments", "warn", f"{len(stray)} files, {size / 1e6:.0f} MB", "; ".join(remedies))


def stray_sessions() -> Finding:
    """Whether killed mpiruns of ours left their folders, each of which one day keeps another mpirun from starting."""
    stray = leftovers.forsaken_folders(Path(tempfile.gettempdir()))
    if not stray:
        return Finding("stray sessions", "ok", "none")
    value = f"{len(stray)} folders of mpiruns that were killed, as {min(stray)}; one with its process id cannot start"
    return Finding("stray sessions", "warn", value, "ps-elastic doctor --sweep")


def slurm() -> Finding:
    """Whether this machine can submit, and whether we are in a job."""
    if shutil.which("sbatch") is None:
        return Finding("slurm", "ok", "not here; `submit` works with --dry-run only")
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20).stdout.strip()
    slots = environment.slurm_slots()
    inside = f"; in job {os.environ['SLURM_JOB_ID']} with {slots} slots" if slots else ""
    return Finding("slurm", "ok", f"{version}{inside}")
