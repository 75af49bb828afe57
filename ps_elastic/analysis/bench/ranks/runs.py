"""Our side of a benchmark, on one rank: runs of `ps_elastic.train`, and what is seen of them from outside."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ps_elastic
from ps_elastic.runtime import build
from ps_elastic.transport import server_endpoint
from ps_elastic.transport.collectives import meet
from ps_elastic.transport.messages import Message, PushMessage, Reply
from ps_elastic.transport.mpi import MPI
from ps_elastic.vectors import kernels
from ps_elastic.worker.worker import Worker

_KEPT = ("pushes", "wall_s", "held_max", "snapshots_max", "time_to_target_s")  # of the summary
_PARTS = ("t_s", "compute_s", "encode_s", "send_s", "wait_s")  # of a worker's line for a reply
_GRADIENT = 1e-3  # of every entry that a sender sends: of zeros the server's norms would take another way


def train(world: MPI.Comm, config: dict[str, Any], *, watched: bool = False, pause_s: float = 0.0) -> dict[str, Any]:
    """Train; return {summary} on rank 0, {replies: {t_s, compute_s, ...: a list}} on workers.

    watched: rank 0 has `looks` too: (time, CPU time of the process) in seconds at the server's look for each message
    that it got; noting them takes part of what a small push costs. Before each look the server sleeps `pause_s`,
    counted in neither, so that the messages are there when it looks.
    """
    if not watched:
        return _train(world, config)
    looks: list[tuple[float, float]] = []
    with standing_in(server_endpoint, "ServerEndpoint", partial(Watched, looks=looks, pause_s=pause_s)):
        found = _train(world, config)
    if world.Get_rank() == 0:
        assert looks, "the server of a run takes its messages from elsewhere than server_endpoint.ServerEndpoint"
        found["looks"] = looks
    return found


def send(world: MPI.Comm, config: dict[str, Any], **watching: Any) -> dict[str, Any]:
    """As `train`, with workers that compute nothing, so that only server and transport limit the pushes a second.

    On workers {trips}: seconds of each round trip.
    """
    trips: list[float] = []
    with standing_in(build, "Worker", partial(Sender, trips=trips)):
        found = train(world, config, **watching)
    return found if world.Get_rank() == 0 else {"trips": trips}


def weigh(world: MPI.Comm, config: dict[str, Any]) -> dict[str, Any]:
    """Train; return {summary, before_bytes, peak_bytes}: resident memory of this process before, and at its peak."""
    kernels.kernels_for(kernels.LEAST)  # as all that is imported on the way, not a part of what the run adds
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
    before = _status_bytes("VmRSS")
    done = _train(world, config)
    return {"before_bytes": before, "peak_bytes": _status_bytes("VmHWM"), **done}


def _train(world: MPI.Comm, config: dict[str, Any]) -> dict[str, Any]:
    folder, rank = Path("run").absolute(), world.Get_rank()
    summary = ps_elastic.train(config, run_dir=folder, quiet=True)
    if summary is not None:
        found: dict[str, Any] = {"summary": {key: summary[key] for key in _KEPT}}
    else:
        lines = (folder / "metrics" / f"rank-{rank:03d}.jsonl").read_text().splitlines()
        replies = [line for line in map(json.loads, lines) if line["event"] == "reply"]
        found = {"replies": {part: [reply[part] for reply in replies] for part in _PARTS}}
    meet(world)
    if rank == 0:
        shutil.rmtree(folder)
    return found


class Sender(Worker):
    """A worker that sends the same gradient again as soon as it has a model to compute on."""

    def __init__(self, *args: Any, trips: list[float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trips = trips
        self._norm = float(self.g.fill_(_GRADIENT).norm())

    def load(self, reply: Reply) -> bool:
        self.told = reply.step
        if reply.model is None:
            return False
        model = torch.from_numpy(reply.model)
        if model.data_ptr() != self.x.data_ptr():
            self.x.copy_(model)
        self.step, self.base = reply.step, reply.version
        return True

    def push(self, emit: Callable[[PushMessage], None], cut: Collection[int] | None = None) -> None:
        self.step += 1
        gradient, norm = (self.g.numpy(),), self._norm
        emit(PushMessage(self.rank, self.step, self.base, gradient, samples=1, norm=norm, payload_norm=norm))

    def note(self, reply: Reply, t_s: float, send_s: float, wait_s: float) -> None:
        self._trips.append(send_s + wait_s)


class Watched(server_endpoint.ServerEndpoint):
    """The server's end, which notes the time and the CPU time used at each look that found a message."""

    def __init__(self, *args: Any, looks: list[tuple[float, float]], pause_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._looks, self._pause_s = looks, pause_s
        self._paused_s = self._paused_cpu_s = 0.0

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        if self._pause_s:
            self._pause()
        looked = time.perf_counter() - self._paused_s, time.process_time() - self._paused_cpu_s
        received = super().recv(timeout)
        if received is not None:
            self._looks.append(looked)
        return received

    def _pause(self) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        time.sleep(self._pause_s)
        self._paused_s += time.perf_counter() - started
        self._paused_cpu_s += time.process_time() - cpu


@contextmanager
def standing_in(module: Any, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module.name` is `stand_in`: a run takes its parts from there when it begins."""
    usual = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, usual)


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"no {key} in /proc/self/status"
    return 1024 * int(found[1])
