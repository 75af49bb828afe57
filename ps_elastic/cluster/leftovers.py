"""What killed jobs leave behind: files of shared memory in /dev/shm, and folders of mpirun among the temporary files.

MPI removes its files when a job ends, whatever ended it, as long as its launcher lives. Where the launcher itself was
killed nobody is left to do it but those who were in the job, or somebody who comes later and finds that no process
maps the files any more. mpirun keeps a folder named after its pid; one that is killed leaves it, and a later mpirun
with the same pid ends at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SHM = Path("/dev/shm")
PATTERNS = ("sm_segment.*", "osc_sm.*", "vader_segment.*", "mpich_shm_*")
SETTLED_S = 60.0  # a file so old is mapped by whoever made it, if they live
BASE = "PRTE_MCA_prte_local_tmpdir_base"  # where mpirun makes its folder; those it starts on other hosts do not heed it
_CLOCK_S = 60.0  # what clocks may differ by: when a process began is known by the time since boot


def unmapped(folder: Path) -> set[Path]:
    """The segments of MPI in `folder` that are ours and that no process maps."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if _is_ours(path)}
    if not found:
        return found
    for maps in Path("/proc").glob("[0-9]*/maps"):
        text = _read(maps)
        found = {path for path in found if str(path) not in text}
    return found


def forsaken_segments(folder: Path) -> set[Path]:
    """Those that can be removed at any time: unmapped, of this host by their name, and older than a minute.

    A younger one may be of a job that is just starting, and one with another host's name of a container that shares
    the folder, whose processes cannot be seen from here.
    """
    host = os.uname().nodename.split(".")[0]
    return {path for path in unmapped(folder) if host in path.name.split(".") and _age_s(path) > SETTLED_S}


def mapped_by(processes: Iterable[int]) -> set[Path]:
    """The segments that these processes map."""
    found = set()
    for process in processes:
        for line in _read(Path(f"/proc/{process}/maps")).splitlines():
            path = Path(line.split(maxsplit=5)[-1]) if "/" in line else None
            if path is not None and any(path.match(pattern) for pattern in PATTERNS) and _is_ours(path):
                found.add(path)
    return found


def remove_segments(segments: Iterable[Path]) -> list[Path]:
    """Remove these files; return those that were still there. Processes that map one keep its memory."""
    removed = []
    for path in segments:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        removed.append(path)
    return sorted(removed)


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # ended since, or another user's, who cannot map what is ours
        return ""


@contextmanager
def own_folder(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Inside, `environment` with a folder of its own for an mpirun; at the end that folder is gone, killed or not."""
    prefix = f"ps-elastic-mpirun.{os.getpid()}.{_host()}."
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield {BASE: folder, **environment}


def forsaken_folders(folder: Path) -> set[Path]:
    """The folders in `folder` that processes of ours left which run no more: mpiruns, and launchers like this one.

    Only of this host, by a name in them: a container whose processes cannot be seen from here may share the folder.
    """
    mpiruns = {file.parent: file for file in folder.glob(f"ompi.*/pmix.{_host()}.*tool")}
    launchers = {path: path for path in folder.glob(f"ps-elastic-mpirun.*.{_host()}.*")}
    return {path for path, made in (mpiruns | launchers).items() if _is_over(path, made)}


def remove_folder(folders: set[Path]) -> list[Path]:
    """Remove these folders and all that is in them; return those that were still there."""
    there = sorted(path for path in folders if path.exists())
    for path in there:
        shutil.rmtree(path, ignore_errors=True)
    return there


def _host() -> str:
    return os.uname().nodename.split(".")[0]


def _is_over(folder: Path, made: Path) -> bool:
    """Whether the process whose id follows the first dot of `folder`, and which made `made` when it began, is gone."""
    import psutil  # 15 ms, and every rank imports this file without ever asking

    process = folder.name.split(".")[1]
    try:
        about = made.stat()
        if not process.isdigit() or about.st_uid != os.geteuid():
            return False
        began: float = psutil.Process(int(process)).create_time()
        return began > about.st_mtime + _CLOCK_S  # else it is another by now
    except OSError:  # removed since, or not for us to look into
        return False
    except psutil.NoSuchProcess:
        return True
