from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from ps_elastic.analysis.bench.base import Benchmark, Row, Several, benchmarks, row
from ps_elastic.analysis.bench.jobs import PERCEPTRON
from ps_elastic.cluster.threads import set_threads
from ps_elastic.config.load import load
from ps_elastic.plugins import Rounds
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import make_parts, make_server, make_worker
from ps_elastic.transport.messages import Message, Reply

_MOST = {300_000: 0.03, 10_000_000: 0.10}  # of a step, by parameters
_ROUNDS = {300_000: 40, 10_000_000: 9}  # in which every worker pushes once


@benchmarks.register("tracker")
@dataclass
class Tracking(Benchmark):
    """What exact discrepancy costs the server, beside a whole step: gradient, push, update, pull, in one process.

    Two runs take turns that differ in `tracker.discrepancy` alone, exact and off, with their logs on disk. The cost is
    the difference of the server's processor times, medians over rounds of all workers: distances, the models kept for
    them, and the lines. Synchronous copies are of the current version, so that their distance is known to be 0.
    """

    workers: Several = 3
    batch_size: int = 32
    rounds: Rounds | None = None  # null: enough for the size of the model

    def rows(self) -> Iterator[Row]:
        for parameters, most in _MOST.items():
            for policy, target in (("asynchronous", most), ("synchronous", 0.01)):
                with tempfile.TemporaryDirectory(prefix="ps-elastic-bench-") as folder:
                    ours, step = self._compare(parameters, policy, Path(folder))
                case = f"{policy}, {parameters / 1e6:g} M parameters"
                yield row(case, 1e3 * ours, "ms/push", 1e3 * step, "a step without it", f"ratio <= {target}")

    def _compare(self, parameters: int, policy: str, folder: Path) -> tuple[float, float]:
        """(seconds more, seconds of a step) of each push."""
        runs = {
            mode: _Run(parameters, policy, mode, self.workers, self.batch_size, folder / mode)
            for mode in ("exact", "off")
        }
        rounds = self.rounds or _ROUNDS[parameters]
        served: dict[str, list[float]] = {mode: [] for mode in runs}
        whole = []
        for number in range(2 + rounds):
            for mode, run in runs.items():
                server_s, step_s = run.round()
                if number >= 2:
                    served[mode].append(server_s)
                    whole += [step_s] if mode == "off" else []
        distances = runs["exact"].close()
        runs["off"].close()
        assert len(distances) > self.workers and any(distances) == (policy == "asynchronous")
        return (median(served["exact"]) - median(served["off"])) / self.workers, median(whole) / self.workers


class _Run:
    """A server and its workers in this process."""

    def __init__(self, parameters: int, policy: str, mode: str, workers: int, batch_size: int, folder: Path) -> None:
        tree: dict[str, Any] = {
            "task": {"name": PERCEPTRON, "parameters": parameters, "batch_size": batch_size},
            "policy": policy,
            "optimizer": {"lr": 1e-3, "momentum": 0.9},
            "train": {"samples": 1 << 40},
            "tracker": {"discrepancy": mode},
        }
        set_threads(1, 1)
        config = load(tree)
        parts = make_parts(config, workers)
        self._record, self._folder = RunWriter(folder, 0), folder
        silent = RunWriter(folder / "workers", 1)
        self._workers = [
            make_worker(config, parts._replace(model=copy.deepcopy(parts.model)), rank, workers, silent.tracker)
            for rank in range(1, workers + 1)
        ]
        log = self._record.events().note
        self._server, self._evaluator = make_server(config, parts, workers, self._record.tracker, log, background=False)
        self._closers: list[Callable[[], None]] = [self._evaluator.close, self._record.close, silent.close]
        self._load(self._server.start(0.0))

    def round(self) -> tuple[float, float]:
        """Let every worker push once; return the seconds that the server took, and those of all."""
        served, started = 0.0, process_time()
        for worker in self._workers:
            messages: list[Message] = []
            worker.push(messages.append)
            pushed = process_time()
            replies = [reply for message in messages for reply in self._server.receive(message, pushed)]
            served += process_time() - pushed
            self._load(iter(replies))
        return served, process_time() - started

    def close(self) -> list[float | None]:
        """End the run; return the discrepancies that it logged."""
        for close in self._closers:
            close()
        lines = (self._folder / "metrics" / "rank-000.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["discrepancy"] for line in map(json.loads, lines) if line["event"] == "used"]

    def _load(self, replies: Iterator[tuple[int, Reply]]) -> None:
        for rank, reply in replies:
            self._workers[rank - 1].load(reply)
