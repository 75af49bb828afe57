"""A crew of processes: it makes the step of one, and a mate that dies or stops in the middle ends it by name."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import Stalled, WorkersLost
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.shared_step import Leader
from ps_elastic.server.shared_step_memory import SharedStepMemory, common_bytes
from ps_elastic.server.totals import Totals
from ps_elastic.transport.wire import HEADER_BYTES
from ps_elastic.vectors.layout import Layout

LIMIT_S = 40.0  # of whatever is waited for
SETTINGS = Optimizer(momentum=0.9)
STEP, RATE = Step((Term(PushId(1, 1)), Term(PushId(2, 1)))), 0.1


class Doorbells:
    """Nobody sleeps for long, and a call waits until its worker is at work."""

    def __init__(self) -> None:
        self.called: Callable[[], object] = lambda: None
        self.asleep: tuple[int, ...] = ()
        self.rung: list[int] = []

    def wake(self, rank: int) -> None:
        self.rung.append(rank)
        self.called()

    def is_asleep(self, rank: int) -> bool:
        return rank in self.asleep

    def sleep(self, timeout_s: float, here: Callable[[], bool]) -> None:
        time.sleep(1e-3)


class Host:
    """Rank 0 with the memory of a host of two workers, which forked processes share."""

    def __init__(self, patience_s: float) -> None:
        torch.manual_seed(0)
        self.layout = Layout(nn.Linear(1000, 300))
        d = self.layout.size
        start = HEADER_BYTES + -HEADER_BYTES % 64
        frames = {worker: _shared(start + 4 * d)[start - HEADER_BYTES :] for worker in (1, 2)}
        model, common = _shared(4 * d).view(np.float32), _shared(common_bytes(SETTINGS, self.layout, 3))
        windows = SimpleNamespace(
            workers=(1, 2), model=lambda: model, common=lambda: common, frames=lambda w: [frames[w]]
        )
        self.doorbells, self.end = Doorbells(), SimpleNamespace(look=lambda: None)
        self.step_memory = SharedStepMemory(windows, self.doorbells, 4, SETTINGS, self.layout, 3, patience_s)  # type: ignore[arg-type]
        self.step_memory.make(lambda: self.end.look())
        self.step_memory.processes = dict.fromkeys((1, 2), os.getpid())
        self.x = torch.from_numpy(model).normal_()
        optimizer = FlatOptimizer(SETTINGS, self.layout, self.x, self.step_memory.moments)
        self.leader: Leader = self.step_memory.leader(optimizer)
        self.board, self.payloads = self.leader._board, {}
        for worker, memory in frames.items():
            payload = torch.from_numpy(memory[HEADER_BYTES:].view(np.float32)).normal_()
            self.payloads[PushId(worker, 1)] = ((payload,),)

    def step(self) -> float | None:
        return self.leader.step(STEP, self.payloads, RATE)


def _shared(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


@pytest.fixture
def patience_s() -> float:
    return LIMIT_S


@pytest.fixture
def host(patience_s: float) -> Iterator[Host]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Host(patience_s)
    torch.set_num_threads(threads)


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Start a copy of this process that does something again and again: fork(action) -> its process."""
    started = []

    def begin(action: Callable[[], object]) -> int:
        if not (pid := os.fork()):
            try:
                ends = time.monotonic() + LIMIT_S
                while time.monotonic() < ends:
                    action()
            finally:
                os._exit(1)
        started.append(pid)
        return pid

    yield begin
    for pid in started:
        os.kill(pid, signal.SIGKILL)  # one that died already is a zombie until now
        os.waitpid(pid, 0)


def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(1e-3)


def test_a_process_beside_rank_0_makes_a_part_of_its_steps(host, fork):
    x = host.x.clone()
    alone = FlatOptimizer(SETTINGS, host.layout, x)
    host.doorbells.called = lambda: until(lambda: host.board.busy[2] or sum(host.board.done.tolist()[1:]))
    fork(host.step_memory.helper(2))
    mean = sum(payload[0][0] for payload in host.payloads.values()) / 2
    for steps in range(1, 4):
        assert host.step() == pytest.approx(alone.step(mean, RATE))
        assert torch.equal(host.x, x) and torch.equal(host.step_memory.moments[0], alone._moments[0])
        totals = Totals(2)
        host.step_memory.count(totals)
        assert totals.shared_steps == steps and 0 < (totals.helped or 0) <= 1


def test_of_several_those_who_sleep_are_woken_first_and_no_more_than_asked_for(host):
    for asleep, count, expected in (((1, 2), 1, [1]), ((2,), 1, [2]), ((2,), 2, [2, 1]), ((), 1, [1]), ((), 2, [1, 2])):
        host.doorbells.asleep = asleep
        host.step_memory._call((1, 2), count)
        assert host.doorbells.rung == expected
        host.doorbells.rung.clear()


def failing_in_a_block(host: Host, fail: Callable[[], object]) -> Callable[[], object]:
    """What a worker does that fails as soon as it has a block."""
    helper: Any = host.step_memory.helper(1)
    take = type(host.board).take

    def and_fail(*args: Any) -> int | None:
        if (i := take(*args)) is not None:
            fail()
        return i

    def act() -> None:  # in the forked process alone, again and again until there is a block
        type(host.board).take = and_fail  # type: ignore[method-assign]
        helper()

    return act


def test_a_worker_that_was_killed_in_a_block_ends_the_step_long_before_the_patience_does(host, fork):
    def in_a_block() -> None:
        host.leader._lock.__exit__()  # so that it dies in the block, not in the lock
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(failing_in_a_block(host, in_a_block))

    def look() -> None:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise WorkersLost("ranks [1] died")

    host.end.look = look
    host.doorbells.called = lambda: until(lambda: host.board.busy[1])
    started = time.monotonic()
    with pytest.raises(WorkersLost, match=r"ranks \[1\] died"):
        host.step()
    assert time.monotonic() - started < LIMIT_S / 2


def test_a_worker_that_was_killed_while_it_took_a_block_ends_the_step(host, fork):
    fork(failing_in_a_block(host, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    host.doorbells.called = lambda: until(lambda: host.board.busy[1])
    with pytest.raises(WorkersLost, match="died"):
        host.step()


@pytest.mark.parametrize("patience_s", [1.0])
def test_a_worker_that_stopped_in_a_block_is_named_when_the_patience_ends(host, fork):
    def in_a_block() -> None:
        host.leader._lock.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)

    fork(failing_in_a_block(host, in_a_block))
    host.doorbells.called = lambda: until(lambda: host.board.busy[1])
    with pytest.raises(Stalled, match=r"ranks \[1\] did not finish their part of an update in 1 s"):
        host.step()
