"""Torn views in virtual time: what each entry of a view lacks follows from when it was read."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.simulation.simulate import simulate
from ps_elastic.simulation.variants import PIECES, pieces_of
from ps_elastic.tasks import Task
from ps_elastic.vectors.layout import Layout

SLOPE = (3.0, -4.0, 12.0, 1.0)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(len(SLOPE)))


@dataclass
class Slope(Task):
    """loss = <SLOPE, x>: the same gradient everywhere, so that views show in distances alone."""

    batch_size: int = 1

    def model(self, seed: int) -> nn.Module:
        return Point()

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(SLOPE)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model.x * batch).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float((model.x * torch.tensor(SLOPE)).sum())}


def run(folder: Path, *overrides: str, workers: int = 5, **more: Any) -> Run:
    config = {"task": "test_torn_simulator:Slope", "policy": "asynchronous", "train": {"samples": 120}, "seed": 3}
    fixed = ("optimizer.lr=0.5", "simulation.compute.name=exponential", "simulation.network.latency_s=0")
    directory = folder / f"run-{len(list(folder.iterdir()))}"
    return Run(directory, simulate(config, [*fixed, *overrides], workers=workers, run_dir=directory, **more))


def test_each_entry_lacks_the_steps_that_came_after_it_was_read(tmp_path: Path) -> None:
    read_s, workers = 0.7, 5
    made = run(tmp_path, "views=torn", f"simulation.read_s={read_s}", workers=workers)
    pushes = [line for line in map(json.loads, made.events) if line["event"] == "push"]
    steps = [line["t_s"] for line in pushes if any(action[0] == "step" for action in line["actions"])]
    began = dict.fromkeys(range(1, workers + 1), 0.0)
    expected, torn = [], 0
    for version, line in enumerate(pushes[: len(steps)]):
        moments = [began[line["worker"]] + (i + 0.5) / len(SLOPE) * read_s for i in range(len(SLOPE))]
        lacking = [version - bisect_right(steps, moment) for moment in moments]
        torn += len(set(lacking)) > 1
        expected.append(0.5 / workers * math.hypot(*(n * g for n, g in zip(lacking, SLOPE, strict=True))))
        began[line["worker"]] = line["t_s"]
    assert made.column("discrepancy") == pytest.approx(expected, rel=1e-5)
    assert torn > len(steps) / 4


def test_what_is_torn_is_within_the_sum_of_the_steps_missed(tmp_path: Path) -> None:
    made = run(tmp_path, "views=torn", "simulation.read_s=2.0")
    paths = made.column("path_length")
    assert all(distance <= path for distance, path in zip(made.column("discrepancy"), paths, strict=True))


def test_a_read_that_takes_no_time_tears_nothing(tmp_path: Path) -> None:
    torn, exact = run(tmp_path, "views=torn"), run(tmp_path)
    assert torn.events == exact.events
    assert torn.column("discrepancy") == pytest.approx(exact.column("discrepancy"), rel=1e-5)


def test_one_seed_gives_one_log(tmp_path: Path) -> None:
    overrides = ("views=torn", "simulation.read_s=0.5", "task=quadratic")
    one, other = run(tmp_path, *overrides), run(tmp_path, *overrides)
    assert one.events == other.events
    assert one.summary["parameters_sha256"] == other.summary["parameters_sha256"]


def test_every_parameter_is_read_once_and_no_padding() -> None:
    layout = Layout(nn.Linear(30, 7))
    pieces = pieces_of(layout)
    entries = torch.cat(pieces).tolist()
    assert entries == sorted(set(entries)) and len(entries) == layout.numel and len(pieces) == PIECES


def test_headers_alone_cannot_be_torn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="views: got 'torn', expected exact: a timing-only"):
        run(tmp_path, "views=torn", headers_only=True)
