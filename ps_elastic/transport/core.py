"""Which core this thread runs on, and how a process is woken on another one."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from functools import cache


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def this_core() -> int:
    """The core that this thread runs on just now (Linux)."""
    core: int = _library().sched_getcpu()
    return core


def wake_elsewhere(process: int, wake: Callable[[], object]) -> None:
    """Do `wake`, by which the main thread of `process` goes on, and on another core than this thread, if it may.

    On a host that was busy until now Linux does not look for an idle core when it wakes a thread, but puts it on the
    core of the one who wakes it: then one of the two waits for the other's time slice to end.
    """
    allowed: set[int] = set()
    with contextlib.suppress(OSError):  # it died, or this is not allowed here
        allowed = os.sched_getaffinity(process)
        if others := allowed - {this_core()}:
            os.sched_setaffinity(process, others)
    try:
        wake()
    finally:
        if len(allowed) > 1:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(process, allowed)
