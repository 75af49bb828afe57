"""Doorbells: a rank that waits for another of its host looks at a word, then sleeps in the kernel until that one rings.

Each rank has a line of shared memory with a word that is 1 while it sleeps, and one that is 1 when it was rung. Who
waits sets the first, lets that be seen, looks once more for what it waits for, and sleeps while the word is 1. Who
sends lets the message be seen, sets the second, then looks at the first. So either the waiter sees the message or the
sender sees that it sleeps (Dekker's argument: each writes, fences and reads what the other writes), and no wake is
lost; a sleep ends after its timeout all the same. To look at a word costs a hundredth of asking MPI, which where ranks
outnumber cores also gives the core away each time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ps_elastic.transport.host import Host, Window
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.waking import WAIT, WAKE, Time, find_futex

LINE_BYTES = 64  # the words of each rank have a cache line of their own
_ASLEEP, _RUNG, _LONG = 0, 1, 2


class Doorbells:
    """The doorbells of a host, made and freed by all its ranks together."""

    def __init__(self, host: Host, rank: int) -> None:
        futex = find_futex()
        assert futex is not None
        self._futex = futex
        self._window = Window(host, LINE_BYTES)
        lines = {other: self._window.of(other) for other in host.ranks}
        self._words = {other: line[:12].data.cast("i") for other, line in lines.items()}
        self._addresses = {other: line.ctypes.data for other, line in lines.items()}
        self._own, self._address, self._timeout = self._words[rank], self._addresses[rank], Time()
        self._own[_ASLEEP] = self._own[_RUNG] = self._own[_LONG] = 0
        host.comm.Barrier()

    def __contains__(self, rank: int) -> bool:
        return rank in self._words

    def ring(self, rank: int, *, long: bool = False) -> None:
        """Tell `rank` that a message is there, which must have been sent already, and wake it if it sleeps.

        long: the message travels as both sides look after it, for nobody knows how long: `rung` is true from now on.
        """
        words = self._words.get(rank)
        if words is not None:
            words[_RUNG] = 1
            if long:
                words[_LONG] = 1
            self.wake(rank)

    def wake(self, rank: int) -> None:
        """Wake `rank` if it sleeps: what it waits for, other than a message, must have been written already."""
        words = self._words.get(rank)
        if words is None:
            return
        self._window.sync()
        if words[_ASLEEP]:
            words[_ASLEEP] = 0
            self._futex(self._addresses[rank], WAKE, 1)

    def rung(self) -> bool:
        """Whether somebody rang since this was asked last."""
        if not self._own[_RUNG]:
            return bool(self._own[_LONG])
        self._own[_RUNG] = 0
        self._window.sync()
        return True

    def is_asleep(self, rank: int) -> bool:
        """Whether `rank`, of this host, sleeps, or is about to."""
        self._window.sync()
        return self._words[rank][_ASLEEP] == 1

    def sleep(self, timeout_s: float, here: Callable[[], bool]) -> None:
        """Return when this rank's bell rings, or after `timeout_s`; at once where `here` says that there is no need."""
        self._own[_ASLEEP] = 1
        self._window.sync()
        if not here():
            self._timeout.s, nanoseconds = divmod(int(1e9 * timeout_s), 1_000_000_000)
            self._timeout.ns = nanoseconds
            self._futex(self._address, WAIT, 1, self._timeout)
        self._own[_ASLEEP] = 0

    def free(self) -> None:
        self._words.clear()
        del self._own
        self._window.free()


def make_doorbells(host: Host, rank: int) -> Doorbells | None:
    """Doorbells for the ranks of `host`, by all of them; None where one of them cannot wait by futex, or all are
    alone."""
    able, everywhere = np.array([find_futex() is not None], np.int32), np.zeros(1, np.int32)
    host.comm.Allreduce(able, everywhere, MPI.MIN)
    return Doorbells(host, rank) if everywhere[0] and len(host.ranks) > 1 else None
