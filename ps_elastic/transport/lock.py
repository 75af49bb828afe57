"""A lock in shared memory that tells when its holder died: a robust mutex of POSIX threads, by ctypes."""

from __future__ import annotations

import ctypes
import errno
import sys
import time
from functools import cache

import numpy as np

from ps_elastic.errors import PlatformError, Stalled, WorkersLost

LOCK_BYTES = 128  # more than a mutex takes anywhere
_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST on Linux
_LOOK_S = 0.5  # between two looks at signals while it waits


class _Time(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class RobustLock:
    """A lock between processes, used by `with`. memory: (LOCK_BYTES,) uint8 that they share, at a multiple of 64.

    One process calls `make` before any locks. Entering raises WorkersLost where a process died that held it, now or
    earlier, and Stalled where it is not free for `patience_s`.
    """

    def __init__(self, memory: np.ndarray, patience_s: float) -> None:
        self._memory, self._address, self._patience_s = memory, ctypes.c_void_p(memory.ctypes.data), patience_s
        self._c = _functions()

    def make(self) -> None:
        attributes = ctypes.create_string_buffer(64)
        for code in (
            self._c.pthread_mutexattr_init(attributes),
            self._c.pthread_mutexattr_setpshared(attributes, _SHARED),
            self._c.pthread_mutexattr_setrobust(attributes, _ROBUST),
            self._c.pthread_mutex_init(self._address, attributes),
        ):
            if code:
                raise PlatformError(f"no robust mutex can be made here: {errno.errorcode.get(code, code)}")

    def __enter__(self) -> None:
        if (code := self._c.pthread_mutex_trylock(self._address)) == errno.EBUSY:
            code = self._wait()
        if code == errno.EOWNERDEAD:
            self._c.pthread_mutex_unlock(self._address)  # never to be locked again: all others are told too
        if code in (errno.EOWNERDEAD, errno.ENOTRECOVERABLE):
            raise WorkersLost("a worker died while it wrote the shared model, which may hold a part of its update")
        if code:
            raise Stalled(f"the lock of the shared model was not free for {self._patience_s:.0f} s")

    def __exit__(self, *_: object) -> None:
        self._c.pthread_mutex_unlock(self._address)

    def _wait(self) -> int:
        """The code of the last try, none of which takes so long that a signal would have to wait."""
        ends, code = time.monotonic() + self._patience_s, errno.ETIMEDOUT
        while code == errno.ETIMEDOUT and (left := ends - time.monotonic()) > 0:
            s, part = divmod(time.time() + min(_LOOK_S, left), 1.0)
            code = self._c.pthread_mutex_timedlock(self._address, ctypes.byref(_Time(int(s), int(1e9 * part))))
        return code


@cache
def _functions() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise PlatformError(
            f"writing: lock needs robust mutexes, which are not known on {sys.platform}; expected plain"
        )
    return ctypes.CDLL(None)
