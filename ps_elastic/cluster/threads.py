"""How many threads this rank computes on: set before torch is imported where that is possible."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from ps_elastic.cluster.environment import crowding, local_size, spare_threads, thread_variables, usable_cores


def set_threads(threads: int, ranks_here: int | None = None) -> str:
    """Let this process compute on `threads` threads; return one line on threads and cores for the user."""
    ranks, cores = ranks_here or local_size(), usable_cores()
    line = f"{_set(threads, ranks, cores, ranks * threads)}, {threads} threads a rank"
    warning = crowding(ranks, cores, threads)
    return f"{line}; {warning}" if warning else line


def set_server_threads(setting: int | str, threads: int) -> str:
    """The same for the server, whose workers compute on `threads` each; "auto": on what they leave of its host."""
    if isinstance(setting, int):
        return set_threads(setting)
    ranks, cores = local_size(), usable_cores()
    spare = spare_threads(ranks, cores, threads)
    return f"{_set(spare, ranks, cores, (ranks - 1) * threads + spare)}, {spare} threads for the server"


@contextlib.contextmanager
def giving_way(needed: bool) -> Iterator[None]:
    """Inside, this thread waits for its turn when it wakes: for a worker, where ranks outnumber cores.

    A worker that is woken would else push the server off its core in the midst of a round of replies, and the others
    would not begin until that worker is done. A batch task (sched(7)) pushes nobody off.
    """
    gives_way = needed and hasattr(os, "SCHED_BATCH") and _reschedule(os.SCHED_OTHER, os.SCHED_BATCH)
    try:
        yield
    finally:
        if gives_way:
            _reschedule(os.SCHED_BATCH, os.SCHED_OTHER)


def _reschedule(before: int, after: int) -> bool:
    """Whether this thread is scheduled by policy `after` now, and was by `before`: a container may forbid it."""
    try:
        if os.sched_getscheduler(0) != before:
            return False
        os.sched_setscheduler(0, after, os.sched_param(0))
    except OSError:
        return False
    return True


def _set(threads: int, ranks: int, cores: int, together: int) -> str:
    """together: threads of all ranks of this host."""
    if "torch" not in sys.modules:  # OpenMP reads its variables once, when torch is imported
        os.environ.update(thread_variables(threads, crowded=together > cores))
        _import_torch()
    import torch

    torch.set_num_threads(threads)
    return f"{ranks} ranks on this host, {cores} cores (this rank may use {len(os.sched_getaffinity(0))})"


def _import_torch() -> None:
    """Import torch with no look for garbage meanwhile: a quarter of a million objects come that live as long as we do.

    Nor later, when the process ends: that would take a quarter as long as the import.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        if collects:
            gc.enable()
