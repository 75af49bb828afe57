"""How a process sleeps until another of its host wakes it, and how it is woken on another core: the kernel's part.

futex(2) puts a process to sleep until another one that shares a word of memory with it wakes it. This needs no MPI, so
that `doctor` may ask for it where MPI must not begin.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache

_NUMBERS = {"x86_64": 202, "amd64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
WAIT, WAKE = 0, 1  # of futex(2), between processes


class Time(ctypes.Structure):
    """How long, as the kernel wants it."""

    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


def find_futex() -> Callable[..., int] | None:
    """futex(address, operation, value, timeout) of this kernel; None where there is none, or none is allowed."""
    number = _NUMBERS.get(platform.machine().lower())
    if sys.platform != "linux" or number is None or sys.maxsize < 1 << 32:
        return None
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    time, none, word = ctypes.POINTER(Time), ctypes.c_void_p, ctypes.c_int32(0)
    syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, time, none, ctypes.c_int)

    def futex(address: int, operation: int, value: int, timeout: Time | None = None) -> int:
        woken: int = syscall(number, address, operation, value, timeout, None, 0)
        return woken

    return futex if futex(ctypes.addressof(word), WAKE, 1) == 0 else None


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
