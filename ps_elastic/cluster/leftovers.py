"""Files of shared memory that MPI makes in /dev/shm, and what becomes of those that killed jobs leave there.

MPI removes its files when a job ends, whatever ended it, as long as its launcher lives. Where the launcher itself was
killed nobody is left to do it but those who were in the job, or somebody who comes later and finds that no process
maps the files any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")
PATTERNS = ("sm_segment.*", "osc_sm.*", "vader_segment.*", "mpich_shm_*")
SETTLED_S = 60.0  # a file so old is mapped by whoever made it, if they live


def unmapped(folder: Path) -> set[Path]:
    """The segments of MPI in `folder` that are ours and that no process maps."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if _is_ours(path)}
    if not found:
        return found
    for maps in Path("/proc").glob("[0-9]*/maps"):
        text = _read(maps)
        found = {path for path in found if str(path) not in text}
    return found


def forsaken(folder: Path) -> set[Path]:
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


def remove(segments: Iterable[Path]) -> list[Path]:
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
