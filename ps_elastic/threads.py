"""How many threads this rank computes on: set before torch is imported where that is possible."""

from __future__ import annotations

import os
import sys

from ps_elastic.environment import crowding, local_size, thread_plan, usable_cores


def set_threads(threads: int, ranks_here: int | None = None) -> str:
    """Let this process compute on `threads` threads; return one line on threads and cores for the user."""
    ranks, cores = ranks_here or local_size(), usable_cores()
    if "torch" not in sys.modules:  # OpenMP reads its variables once, when torch is imported
        os.environ.update(thread_plan(ranks, cores, threads))
    import torch

    torch.set_num_threads(threads)
    bound = sorted(os.sched_getaffinity(0))
    line = f"{ranks} ranks on this host, {cores} cores (this rank may use {len(bound)}), {threads} threads a rank"
    warning = crowding(ranks, cores, threads)
    return f"{line}; {warning}" if warning else line
