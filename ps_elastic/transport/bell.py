"""Doorbells: a rank that waits for another of its host sleeps in the kernel until that one rings.

Each rank has a line of shared memory with one word: 1 while it sleeps. Who waits sets the word, lets that be seen,
looks once more for what it waits for, and sleeps while the word is 1. Who sends lets the message be seen, then looks at
the word. So either the waiter sees the message or the sender sees the word (Dekker's argument: each writes, fences and
reads what the other writes), and no wake is lost; a sleep ends after its timeout all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ps_elastic.transport.futex import WAIT, WAKE, Time, find_futex
from ps_elastic.transport.host import Host, Window
from ps_elastic.transport.slot import MPI

LINE_BYTES = 64  # a word of its own cache line for each rank


class Bells:
    """The bells of a host, made and freed by all its ranks together."""

    def __init__(self, host: Host, rank: int) -> None:
        futex = find_futex()
        assert futex is not None
        self._futex = futex
        self._window = Window(host, LINE_BYTES)
        lines = {other: self._window.of(other) for other in host.ranks}
        self._words = {other: line[:4].data.cast("i") for other, line in lines.items()}
        self._addresses = {other: line.ctypes.data for other, line in lines.items()}
        self._word, self._address, self._timeout = self._words[rank], self._addresses[rank], Time()
        self._word[0] = 0
        host.comm.Barrier()

    def __contains__(self, rank: int) -> bool:
        return rank in self._words

    def ring(self, rank: int) -> None:
        """Wake `rank` if it sleeps; what it waits for must have been sent, or written, already."""
        word = self._words.get(rank)
        if word is None:
            return
        self._window.sync()
        if word[0]:
            word[0] = 0
            self._futex(self._addresses[rank], WAKE, 1)

    def sleep(self, timeout_s: float, here: Callable[[], bool]) -> None:
        """Return when this rank's bell rings, or after `timeout_s`; at once where `here` says that there is no need."""
        self._word[0] = 1
        self._window.sync()
        if not here():
            self._timeout.s, nanoseconds = divmod(int(1e9 * timeout_s), 1_000_000_000)
            self._timeout.ns = nanoseconds
            self._futex(self._address, WAIT, 1, self._timeout)
        self._word[0] = 0

    def free(self) -> None:
        self._words.clear()
        del self._word
        self._window.free()


def make_bells(host: Host, rank: int) -> Bells | None:
    """Bells for the ranks of `host`, by all of them; None where one of them cannot wait by futex, or all are alone."""
    able, everywhere = np.array([find_futex() is not None], np.int32), np.zeros(1, np.int32)
    host.comm.Allreduce(able, everywhere, MPI.MIN)
    return Bells(host, rank) if everywhere[0] and len(host.ranks) > 1 else None
