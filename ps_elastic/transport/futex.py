"""futex(2), by which a process sleeps until another one that shares a word of memory with it wakes it."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable

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
