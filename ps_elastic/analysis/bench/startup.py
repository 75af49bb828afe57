from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ps_elastic.analysis.bench.base import Benchmark, Ranks, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import LIMIT_S, run_ranks

_TASK = "{name: 'ps_elastic.analysis.bench.tasks:Wide', parameters: 1000}"


@benchmarks.register("startup")
@dataclass
class Startup(Benchmark):
    """How long `ps-elastic --help` takes, and a run of one step beside a bare mpirun whose ranks only import torch."""

    ranks: Ranks = 3
    repeats: Turns = 5  # turns; more: steadier

    def rows(self) -> Iterator[Row]:
        helps, bares = [], []
        for _ in range(self.repeats):
            bares.append(_run_s(["-c", "pass"]))
            helps.append(_run_s(["-m", "ps_elastic", "--help"]))
        yield row("ps-elastic --help", median(helps), "s", median(bares), "python that does nothing", "<= 0.3")
        with tempfile.TemporaryDirectory(prefix="ps-elastic-bench-") as name:
            folder, ours, imports = Path(name), [], []
            config = folder / "step.yaml"
            config.write_text(f"task: {_TASK}\npolicy: synchronous\ntrain: {{samples: {self.ranks - 1}}}\n")
            for turn in range(self.repeats):
                imports.append(run_ranks(self.ranks, ["-c", "import torch"], folder))
                train = ["-m", "ps_elastic", "train", str(config), "--run-dir", str(folder / f"run-{turn}")]
                ours.append(run_ranks(self.ranks, train, folder))
        case = f"train of one step, {self.ranks} ranks"
        yield row(case, median(ours), "s", median(imports), "mpirun that imports torch", "ratio <= 1.3")


def _run_s(arguments: Sequence[str]) -> float:
    started = time.perf_counter()
    run = [sys.executable, *arguments]
    subprocess.run(run, capture_output=True, check=True, timeout=LIMIT_S)  # with nothing to read it would look at times
    return time.perf_counter() - started
