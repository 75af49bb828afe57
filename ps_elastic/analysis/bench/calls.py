from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import numpy as np
from torch import Tensor

from ps_elastic.analysis.bench.base import Benchmark, Row, benchmarks, row
from ps_elastic.analysis.bench.jobs import wide
from ps_elastic.config.load import load
from ps_elastic.plugins import Pushes, Range, Workers
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import make_parts, make_server
from ps_elastic.server.server import Server
from ps_elastic.transport.messages import PushMessage

_MOST = {"asynchronous": (45, 120), "synchronous": (42, 100)}  # frames, and calls of any kind
_GRADIENT = 1e-3  # of every entry; of zeros the norms would take another way


class Calls(NamedTuple):
    """What was called, a push. tensor: those of `builtin` that are torch's; named: tuples with names that were made."""

    frames: float
    builtin: float
    tensor: float
    named: float


@benchmarks.register("calls")
@dataclass
class CallCount(Benchmark):
    """Calls a push on the server, from the message to the reply, in this process: the same on any machine.

    SGD with momentum, exact discrepancy, events and metrics logged to files; headers are packed and unpacked elsewhere.
    Frames are the times that a Python function begins or a generator goes on. Calls are these and those of built-in
    functions. Profilers tell of no type that is called, and hide what a named tuple costs behind a frame without a
    name: here each one made is one built-in call. What is done once a batch counts by its share.
    """

    pushes: Pushes = 1024  # of each worker; as many again come before
    workers: Workers = 3
    parameters: Annotated[int, Range("a number of parameters >= 1")] = 16

    def rows(self) -> Iterator[Row]:
        for policy, (frames, calls) in _MOST.items():
            counted = self._count(policy)
            case = f"{policy}, {self.parameters} parameters"
            yield row(case, counted.frames, "frames/push", None, "", f"<= {frames}")
            yield row(case, counted.frames + counted.builtin, "calls/push", None, "", f"<= {calls}")
            yield row(case, counted.tensor, "tensor calls/push", None, "")
            yield row(case, counted.named, "named tuples/push", None, "")

    def _count(self, policy: str) -> Calls:
        config = load(
            wide(self.parameters, self.workers, 1 << 40, policy=policy, optimizer={"lr": 1e-3, "momentum": 0.9})
        )
        parts = make_parts(config, self.workers)
        with tempfile.TemporaryDirectory(prefix="ps-elastic-bench-") as folder:
            record = RunWriter(Path(folder), 0)
            log = record.events().note
            server, evaluator = make_server(config, parts, self.workers, record.tracker, log, background=False)
            with closing(record), closing(evaluator):
                rounds = _Rounds(server, parts.layout.size, self.workers)
                rounds.go(self.pushes)
                return rounds.counted(self.pushes)


class _Rounds:
    """Workers that push in turn, each as soon as it was answered."""

    def __init__(self, server: Server, size: int, workers: int) -> None:
        self._server, self._workers = server, workers
        self._arrays = (np.full(size, _GRADIENT, np.float32),)
        self._norm = float(np.linalg.norm(self._arrays[0]))
        self._bases = {worker: reply.version for worker, reply in server.start(0.0)}
        self._step, self._now = 0, 0.0

    def go(self, rounds: int, profile: Callable[[FrameType, str, Any], None] | None = None) -> None:
        """Let every worker push `rounds` times; profile: told of what is called meanwhile."""
        for _ in range(rounds):
            self._step += 1
            for worker in range(1, self._workers + 1):
                self._now += 1e-4
                push = PushMessage(
                    worker, self._step, self._bases[worker], self._arrays, samples=1, norm=self._norm,
                    payload_norm=self._norm,
                )  # fmt: skip
                before = sys.getprofile()
                sys.setprofile(profile or before)
                replies = list(self._server.receive(push, self._now))
                sys.setprofile(before)
                self._bases.update((to, reply.version) for to, reply in replies)

    def counted(self, rounds: int) -> Calls:
        frames = builtin = tensor = named = 0

        def note(frame: FrameType, event: str, called: Any) -> None:
            nonlocal frames, builtin, tensor, named
            if event == "call":
                if frame.f_code.co_varnames[:1] == ("_cls",):  # as `collections.namedtuple` writes its constructors
                    named += 1  # whose tuple.__new__ is the built-in call
                else:
                    frames += 1
            elif event == "c_call" and called is not sys.setprofile:
                builtin += 1
                tensor += isinstance(called.__self__, Tensor) or "torch" in str(called.__module__)

        self.go(rounds, note)
        pushes = rounds * self._workers
        return Calls(frames / pushes, builtin / pushes, tensor / pushes, named / pushes)
