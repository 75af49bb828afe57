"""A lock between processes: it excludes, has a deadline, and says so when its holder died."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from ps_elastic.errors import Stalled, WorkersLost
from ps_elastic.transport.lock import LOCK_BYTES, RobustLock

LIMIT_S = 20.0


@pytest.fixture
def memory() -> np.ndarray:
    """Shared with every process forked from here: the lock, then a count."""
    shared = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    RobustLock(shared[:LOCK_BYTES], LIMIT_S).make()
    return shared


def lock(memory: np.ndarray, patience_s: float = LIMIT_S) -> RobustLock:
    return RobustLock(memory[:LOCK_BYTES], patience_s)


def forked(action: Callable[[], None]) -> int:
    """The process of a copy of this one that does `action` and ends."""
    if not (pid := os.fork()):
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it hung")


def test_what_processes_add_under_the_lock_is_all_there(memory):
    count = memory[LOCK_BYTES : LOCK_BYTES + 8].view(np.int64)

    def add() -> None:
        mine = lock(memory)
        for _ in range(2000):
            with mine:
                count[0] += 1

    assert [ended(pid) for pid in [forked(add) for _ in range(3)]] == [0, 0, 0]
    assert count[0] == 6000


def test_a_holder_that_was_killed_is_told_of_to_whoever_comes_next(memory):
    def die() -> None:
        with lock(memory):
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(die)) == -signal.SIGKILL
    for _ in range(2):  # not only to the first
        with pytest.raises(WorkersLost, match="a worker died while it wrote the shared model"), lock(memory):
            pass


def test_a_holder_that_dies_while_others_wait_frees_them(memory):
    held, waits = os.pipe()

    def die_late() -> None:
        with lock(memory):
            os.write(waits, b"1")
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)

    pid = forked(die_late)
    assert os.read(held, 1) == b"1"
    with pytest.raises(WorkersLost), lock(memory):
        pass
    assert ended(pid) == -signal.SIGKILL


def test_a_holder_that_does_not_let_go_is_waited_for_until_the_deadline(memory):
    held, waits = os.pipe()
    stop, go_on = os.pipe()

    def keep() -> None:
        with lock(memory):
            os.write(waits, b"1")
            os.read(stop, 1)

    pid = forked(keep)
    assert os.read(held, 1) == b"1"
    with pytest.raises(Stalled, match="not free for 0 s"), lock(memory, 0.1):
        pass
    os.write(go_on, b"1")
    assert ended(pid) == 0
    with lock(memory):
        pass
