"""Views that are read while the model is written: the copy that a worker left is its view, and D is taken from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROGRAMS, Job, Several, ranks_command
from torch import nn

from ps_elastic import train
from ps_elastic.cluster import launcher
from ps_elastic.cluster.environment import Mpi
from ps_elastic.compressors.identity import Identity
from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import LOST, ConfigError
from ps_elastic.policies.events import PushId, Step
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.store import ParameterStore
from ps_elastic.simulation.simulate import simulate
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout

FIRST, NEXT = PushId(1, 1), PushId(1, 2)
GIVEN = View(0, 0.0, None, 0.0, 0.0)


@pytest.fixture
def store() -> ParameterStore:
    layout = Layout(nn.Linear(30, 7))
    x = layout.empty().normal_()
    copies = {1: torch.zeros_like(x), 2: torch.zeros_like(x)}
    made = ParameterStore(layout, x, FlatOptimizer(Optimizer(lr=0.5), layout, x), [Identity()], copies=copies)
    made.take(FIRST, [PushMessage(1, 1, 0, (torch.ones_like(x).numpy(),))])
    return made


def away(store: ParameterStore, copy: torch.Tensor) -> float:
    return float(np.linalg.norm(store.x.double().numpy() - copy.double().numpy()))


def test_a_worker_is_given_the_live_model_itself(store):
    given = store.give(FIRST, GIVEN, 0.5)
    store.x[3] = 77.0
    assert given[3] == 77.0


def test_the_distance_of_a_push_is_that_of_the_copy_left_by_its_worker(store):
    store.give(FIRST, GIVEN, 0.5)
    copy = store.views._copies[1].copy_(store.x)
    copy[::2] += 0.25  # it missed something there
    expected = away(store, copy)
    assert store.distance(FIRST) == pytest.approx(expected, rel=1e-5)
    store.combine(Step.mean([FIRST], share=1.0))
    store.apply(Step.mean([FIRST], share=1.0), 0.5, [FIRST])
    assert store.distance_when_used(FIRST) == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_a_push_that_is_used_after_its_worker_went_on_keeps_the_copy_that_it_was_made_on(store):
    store.give(FIRST, GIVEN, 0.5)
    copy = store.views._copies[1].copy_(store.x + 0.5)
    expected = away(store, copy)
    store.keep(FIRST)  # and its worker is answered
    store.give(NEXT, GIVEN, 0.5)
    copy.zero_()
    assert store.distance(FIRST) == pytest.approx(expected, rel=1e-5)
    assert store.distance(NEXT) == pytest.approx(away(store, copy), rel=1e-5)


def test_torn_views_are_refused_where_no_ranks_share_memory(tmp_path: Path):
    config = {"task": "quadratic", "policy": "asynchronous", "views": "torn", "train": {"samples": 10}}
    with pytest.raises(ConfigError, match="views: got 'torn', expected exact: only ranks that share memory"):
        train(config, workers=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_in_virtual_time_nobody_but_the_server_writes(tmp_path: Path):
    config = {"task": "quadratic", "policy": "asynchronous", "views": "torn", "writers": "workers"}
    with pytest.raises(ConfigError, match="writers: got 'workers', expected server"):
        simulate(config, workers=2, run_dir=tmp_path / "run")


# ---- real ranks

SERVER: dict[str, Any] = {
    "task": "helpers:Blobs", "policy": "asynchronous", "views": "torn", "optimizer": {"lr": 0.3},
    "train": {"samples": 1600},
}  # fmt: skip
LOCK = {**SERVER, "writers": "workers"}
RUNS = {
    "server": SERVER,
    "server, held": {**SERVER, "policy": "fedbuff:k=2"},
    "lock": LOCK,
    "lock, top_k": {**LOCK, "compressor": "top_k:ratio=0.1", "buckets": "layer"},
    "lock, delay": {**LOCK, "policy": "delay_bounded:bound=2"},
    "lock, CNN": {
        **LOCK, "task": "helpers:Images", "compressor": {"name": "top_k", "ratio": 0.1, "error_feedback": False},
    },
    "lock, ahead": {**LOCK, "update": {"pipeline": 3}},
    "lock, ahead, top_k": {**LOCK, "compressor": "top_k:ratio=0.1", "update": {"pipeline": 1}},
    "plain": {**LOCK, "writing": "plain"},
    "plain, top_k": {**LOCK, "writing": "plain", "compressor": "top_k:ratio=0.1"},
}  # fmt: skip
MORE = {"lock, delay", "lock, ahead", "plain"}  # of which others have what is written, and how, and more
LOCKED = [name for name in RUNS if "lock" in name]


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in names]


class Found(dict[str, list[dict[str, Any]]]):
    """What each rank of mpi_programs/torn.py found of each run; those of MORE are made when asked for."""

    def __init__(self, several: Several, folder: Path) -> None:
        self._several, self._folder = several, folder
        self._make([name for name in RUNS if name not in MORE])

    def __missing__(self, name: str) -> list[dict[str, Any]]:
        self._make([name])
        return self[name]

    def _make(self, names: list[str]) -> None:
        orders = self._folder / f"order-{len(self)}"
        orders.mkdir()
        each = self._several.order({"torn": [RUNS[name] for name in names]}, orders)
        self.update({name: [rank[i] for rank in each] for i, name in enumerate(names)})


@pytest.fixture(scope="module")
def found(several: Several, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(several, tmp_path_factory.mktemp("torn"))


@pytest.mark.mpi
@pytest.mark.parametrize("name", params(RUNS))
def test_it_learns(found, name):
    assert found[name][0]["summary"]["metrics"]["loss"] < 0.8  # 1.1 at the start


@pytest.mark.mpi
@pytest.mark.parametrize("name", params(RUNS))
def test_the_copy_that_is_measured_is_the_one_that_the_worker_computed_on(found, name):
    used = {push: norm for rank in found[name][1:] for push, norm in rank["copies"].items()}
    seen = {push: norm for rank in found[name] for push, norm in rank["seen"].items()}
    assert len(seen) >= found[name][0]["summary"]["used"] >= 400  # the last step may have used several
    assert seen == {push: used[push] for push in seen}


@pytest.mark.mpi
@pytest.mark.parametrize("name", params(["server", "server, held", *LOCKED]))
def test_the_distance_logged_is_that_of_the_copy_from_the_model_without_the_push_itself(found, name):
    measured = [pair for rank in found[name] for pair in rank["distances"]]
    assert len(measured) == found[name][0]["summary"]["used"]
    logged, computed = np.array(measured).T
    np.testing.assert_allclose(logged, computed, rtol=1e-4, atol=2e-6)
    assert computed.max() > 0.01


@pytest.mark.mpi
@pytest.mark.parametrize("name", params(LOCKED))
def test_each_rank_logs_the_distance_of_its_own_copy(found, name):
    told = [pair for rank in found[name][1:] for pair in rank["told"]]
    assert len(told) == found[name][0]["summary"]["used"]
    assert all(by_server == by_worker for by_server, by_worker in told)


@pytest.mark.mpi
@pytest.mark.parametrize("name", params(["server", *LOCKED]))
def test_the_model_at_the_end_is_that_of_the_start_less_every_update_used(found, name):
    gone, missing, rounding = found[name][0]["x"]
    assert missing < rounding < 1e-3 * gone


@pytest.mark.mpi
@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_holds_the_lock_ends_the_run_by_name(mpi: Mpi, tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps([{**LOCK, "train": {"samples": 100_000_000}, "dies": True}]))
    program = [sys.executable, str(PROGRAMS / "torn.py"), str(tmp_path / "plan.json"), str(tmp_path)]
    job = Job(ranks_command(mpi, 4, program), launcher.mpi_environment(mpi), tmp_path)
    try:
        ended = job.wait(60)
    finally:
        job.kill()
    assert ended.code != 0
    summary = json.loads((tmp_path / "run-0" / "summary.json").read_text())
    assert summary["exit"] == LOST
    assert "ranks [2] died" in summary["error"] or "a worker died while it wrote the shared model" in summary["error"]
