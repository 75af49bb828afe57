"""The folder that Open MPI's mpirun keeps while it runs, and what becomes of those that killed ones leave behind.

It is called ompi.PID after mpirun's own process and lies in the folder for temporary files. An mpirun that was killed
leaves it there, and the next mpirun that the system gives the same process id finds another's files where its own
should be, and ends at once ("The PMIx server's listener thread failed to start", exit code 213).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

BASE = "PRTE_MCA_prte_local_tmpdir_base"  # where mpirun makes its folder; those it starts on other hosts do not heed it
_CLOCK_S = 60.0  # what clocks may differ by: when a process began is known by the time since boot


@contextmanager
def own(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Inside, `environment` with a folder of its own for an mpirun; at the end that folder is gone, killed or not."""
    prefix = f"ps-elastic-mpirun.{os.getpid()}.{_host()}."
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield {BASE: folder, **environment}


def forsaken(folder: Path) -> set[Path]:
    """The folders in `folder` that processes of ours left which run no more: mpiruns, and launchers like this one.

    Only of this host, by a name in them: a container whose processes cannot be seen from here may share the folder.
    """
    mpiruns = {file.parent: file for file in folder.glob(f"ompi.*/pmix.{_host()}.*tool")}
    launchers = {path: path for path in folder.glob(f"ps-elastic-mpirun.*.{_host()}.*")}
    return {path for path, made in (mpiruns | launchers).items() if _is_over(path, made)}


def remove(folders: set[Path]) -> list[Path]:
    """Remove these folders and all that is in them; return those that were still there."""
    there = sorted(path for path in folders if path.exists())
    for path in there:
        shutil.rmtree(path, ignore_errors=True)
    return there


def _host() -> str:
    return os.uname().nodename.split(".")[0]


def _is_over(folder: Path, made: Path) -> bool:
    """Whether the process whose id follows the first dot of `folder`, and which made `made` when it began, is gone."""
    import psutil

    process = folder.name.split(".")[1]
    try:
        about = made.stat()
        if not process.isdigit() or about.st_uid != os.geteuid():
            return False
        return psutil.Process(int(process)).create_time() > about.st_mtime + _CLOCK_S  # else it is another by now
    except OSError:  # removed since, or not for us to look into
        return False
    except psutil.NoSuchProcess:
        return True
