"""A recorded run is computed again to the same bits: under the real mpirun, in one process and simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Several, Trained
from helpers import Blobs, Images, fit
from torch import Tensor, nn

from ps_elastic.analysis.replay.recompute import Recomputed, compute_on, recompute, warnings
from ps_elastic.cluster.threads import set_threads
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError, TaskError
from ps_elastic.policies import policies
from ps_elastic.records.reader import RunReader, open_run
from ps_elastic.simulation.simulate import simulate

WORKERS = 3
DIGITS = str(ROOT / "configs" / "digits.yaml")
SHORT = ("train.samples=1500",)
WARM = ("optimizer.momentum=0.9", "optimizer.lr=0.02", "schedule=cosine", "schedule.warmup_samples=700")
FED = ("compressor=top_k:ratio=0.05",)  # with error feedback, as `auto` says
PLAIN = ("optimizer.momentum=0",)
SHORT_ROUNDS = ("policy.deadline_s=0.01", *PLAIN)
NEEDS = {  # of rules that do not go with gradients, or would go on for long
    "consensus": ("update=sisa", *PLAIN),
    "salf": SHORT_ROUNDS,
    "salf_fill": SHORT_ROUNDS,
}
RULES = {
    rule: (*SHORT, *NEEDS.get(rule, ("optimizer.momentum=0.5",)), f"policy={rule}") for rule, _ in policies.items()
}
# Of the rules as they come, in the quick suite those that order what no other does: no step at once, steps by the
# server's own vector, draws, a timer, a budget. The runs after them have settings that are harder than any rule is.
QUICK_RULES = {"synchronous", "random_subset", "consensus", "salf_fill", "elastic_bound"}
RUNS: dict[str, tuple[str, ...]] = {
    **RULES,
    "the hard one": (*SHORT, *WARM, *FED, "policy=asynchronous"),
    "the hard one, in buckets": (*SHORT, *WARM, *FED, "policy=asynchronous", "buckets=layer"),
    "dropped and fed back": (*SHORT, *WARM, *FED, "policy=first_k:k=1"),
    "corrected late": (*SHORT, *WARM, *FED, "policy=variance_bounded:quorum=0.4"),
    "asked on a timer": (*SHORT, *FED, "policy=deadline:deadline_s=0.002", "survive.ask_again_s=0.05"),
    "local steps": (*SHORT, *FED, "policy=fedbuff", "update=local_sgd:local_steps=2", *PLAIN),
    "run ahead": (*SHORT, *WARM, *FED, "policy=message_passing", "update.pipeline=3", "buckets=layer"),
    "run ahead, dropped": (*SHORT, *FED, "policy=tests.law.rules:Lottery", "update.pipeline=2"),
    "run ahead, with megabytes": (
        "task=quadratic:dimension=300000", "train.samples=40", *PLAIN, "policy=message_passing:delay=4",
        "update.pipeline=2",
    ),
    "more threads": (*SHORT, *FED, "policy=asynchronous", "threads=2", "server_threads=1"),
    "cut off": (*SHORT, *FED, "policy=salf:deadline_s=0.006", "update=cut_sgd:deadline_s=0.0015", "optimizer.lr=0.02"),
    "not measured": (*SHORT, *FED, "policy=asynchronous", "tracker.discrepancy=off"),
    "stopped early": (
        "train.samples=30000", *FED, "policy=asynchronous", "train.stop_at=accuracy>=0.5",
        "train.evaluate_every_samples=300",
    ),
}  # fmt: skip


MORE = set(RULES) - QUICK_RULES


@pytest.fixture(scope="module")
def runs(several: Several, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """RUNS, trained by a server and three workers."""
    pytest.importorskip("sklearn")
    plan = {name: {"argv": ["train", DIGITS, *overrides]} for name, overrides in RUNS.items()}
    return Trained(several, plan, [name for name in RUNS if name not in MORE], tmp_path_factory.mktemp("runs"))


def again(run: Path, change: Callable[[list[str]], list[str]] = lambda lines: lines, **settings: Any) -> Recomputed:
    """The run in a folder computed again, its lines changed before and its configuration too."""
    record = open_run(str(run))
    config = replace(load(record.config, simulated=True), **settings)
    threads = record.env["torch_threads"]
    set_threads(config.threads, 1)
    try:
        lines = change(list(record.lines()))
        return recompute(config, lines, record.workers, server_threads=threads, source="events.jsonl")
    finally:
        compute_on(1)


def assert_the_same(run: Path) -> RunReader:
    record, found = open_run(str(run)), again(run)
    assert found.replay.first_mismatch is None, str(found.replay.first_mismatch)
    assert found.replay.match and found.replay.events == sum(1 for _ in record.lines())
    assert found.parameters_sha256 == record.parameters_sha256 is not None
    return record


@pytest.mark.mpi
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in RUNS]
)
def test_a_run_under_mpirun_is_computed_again_bit_for_bit(runs: Trained, name: str) -> None:
    record = assert_the_same(runs[name])
    assert record.summary is not None and record.summary["used"] > 10


@pytest.mark.mpi
def test_the_runs_under_mpirun_have_what_makes_them_hard(runs: Trained) -> None:
    hard = open_run(str(runs["the hard one"]))
    pushes = [line for line in map(json.loads, hard.lines()) if line["event"] == "push"]
    assert max(line["residual_norm"] for line in pushes) > 0
    assert [line["worker"] for line in pushes] != [1 + i % WORKERS for i in range(len(pushes))]
    step_sizes = [action[3] for line in pushes for action in line["actions"] if action[0] == "applied"]
    assert step_sizes[0] == 0 < step_sizes[1] < step_sizes[9] and step_sizes[-1] < max(step_sizes)
    dropped = open_run(str(runs["dropped and fed back"])).summary
    assert dropped is not None and dropped["dropped"] > 5
    early = open_run(str(runs["stopped early"])).summary
    assert early is not None and early["time_to_target_s"] is not None and early["samples"] < 30000


@dataclass
class Parted(Blobs):
    """The batches of a worker depend on the number of workers, as parts of a data set do."""

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return super().batches(worker + 100 * workers, workers, seed)


def simulated(folder: Path, *overrides: str, workers: int = 5) -> Path:
    simulate(
        {"task": "test_recompute:Parted", "simulation": {"compute": {"name": "exponential"}}},
        [*FED, *WARM, "train.samples=400", "schedule.warmup_samples=150", *overrides],
        workers=workers,
        run_dir=folder / "simulated",
    )
    return folder / "simulated"


def test_a_run_in_one_process_is_computed_again_bit_for_bit(tmp_path: Path) -> None:
    for overrides in (
        (*FED, "policy=stale_synchronous:bound=2"),
        (*FED, "policy=elastic_bound:bound=2M", "buckets=layer"),
        ("policy=synchronous",),  # the gradients themselves, all held for a while
    ):
        assert_the_same(fit(tmp_path, "helpers:Blobs", *WARM, *overrides, samples=200).directory)


def test_statistics_and_frozen_and_tied_parameters_are_those_of_each_worker(tmp_path: Path) -> None:
    for task in ("helpers:Images", "helpers:Odd"):
        assert_the_same(fit(tmp_path, task, "policy=asynchronous", samples=200).directory)


def test_a_simulated_run_is_computed_again_bit_for_bit(tmp_path: Path) -> None:
    assert_the_same(simulated(tmp_path, "policy=asynchronous", workers=40))


FAULTS = {
    "lost pushes": ("policy=deadline:deadline_s=0.3", "faults={lost_push: {chance: 0.1}}", "survive.ask_again_s=1"),
    "duplicates": ("policy=asynchronous", "faults={duplicate: {chance: 0.3}}"),
    "who comes and goes": (
        "policy=stale_synchronous",
        "faults={crash: {workers: 2, at_s: 0.5}, join: [{workers: 2, at_s: 1}, {workers: 6, at_s: 0.8}], "
        "leave: {workers: 3, at_s: 1.5}}",
    ),
}
SIGNS = {"lost pushes": '"asked"', "duplicates": '"duplicate"', "who comes and goes": '"joined"'}


@pytest.mark.parametrize("name", FAULTS)
def test_what_went_wrong_goes_wrong_again(tmp_path: Path, name: str) -> None:
    run = simulated(tmp_path, *FAULTS[name])
    assert SIGNS[name] in (run / "events.jsonl").read_text()
    assert_the_same(run)


def test_a_reply_that_was_lost_is_the_same_when_it_is_sent_again(tmp_path: Path) -> None:
    faults = "faults={lost_reply: {chance: 0.2, from_s: 0.01}}"
    assert_the_same(simulated(tmp_path, "policy=asynchronous", faults, "survive.ask_again_s=1"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fit(tmp_path, "helpers:Blobs", *FED, "policy=asynchronous", samples=100).directory


def test_a_header_that_differs_is_named_by_line_push_and_field(run: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        record = json.loads(lines[7])
        return [*lines[:7], lines[7].replace(repr(record["residual_norm"]), "0.125"), *lines[8:]]

    line = json.loads(list(open_run(str(run)).lines())[7])
    found = again(run, change)
    assert not found.replay.match and found.parameters_sha256 is None and found.replay.events == 8
    assert str(found.replay.first_mismatch) == (
        f"line 8 (event push worker {line['worker']} step {line['step']}): residual_norm was 0.125, and is "
        f"{line['residual_norm']!r} now"
    )


def test_an_answer_that_differs_is_named(run: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        actions = json.loads(lines[3])["actions"]
        return [*lines[:3], lines[3].replace(repr(actions[1][2]), "0.5"), *lines[4:]]

    assert "action 2 was" in str(again(run, change).replay.first_mismatch)


def test_another_seed_gives_another_push_from_the_first_on(run: Path) -> None:
    found = again(run, seed=1)
    assert "line 2 (event push worker 1 step 1): norm was" in str(found.replay.first_mismatch)


def test_another_order_of_arrival_is_not_the_same_run(run: Path) -> None:
    found = again(run, lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]])
    assert found.replay.first_mismatch is not None and found.replay.first_mismatch.line == 3


def test_a_record_that_ends_too_soon_or_too_late_is_noticed(run: Path) -> None:
    lines = list(open_run(str(run)).lines())
    done = next(i for i, line in enumerate(lines) if '"done"' in line)
    ended = again(run, lambda lines: lines[:done]).replay.first_mismatch
    assert ended is not None and (ended.line, ended.recorded, ended.replayed) == (done + 1, "", lines[done])
    assert "the record ends before" in str(ended)
    with pytest.raises(ConfigError, match=rf"events.jsonl:{len(lines) + 1}: .*was not released"):
        again(run, lambda lines: [*lines, lines[-1]])
    with pytest.raises(ConfigError, match="no events are recorded here"):
        again(run, lambda lines: [])


@dataclass
class Counting(Blobs):
    """The loss is multiplied by the number of threads that it is computed on."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.get_num_threads() * super().loss(model, batch)


def test_workers_and_server_compute_on_their_own_numbers_of_threads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ps_elastic.server.store import ParameterStore

    counted, apply = set(), ParameterStore.apply

    def noting(*arguments: Any) -> float:
        counted.add(torch.get_num_threads())
        return apply(*arguments)

    threaded = fit(tmp_path, "test_recompute:Counting", "threads=2", samples=60).directory
    monkeypatch.setattr(ParameterStore, "apply", noting)
    compute_on(1)
    record = open_run(str(threaded))
    assert record.env["torch_threads"] == 2
    lines, config = list(record.lines()), load(record.config)
    try:
        assert recompute(config, lines, 3, server_threads=2, source="").parameters_sha256 == record.parameters_sha256
        assert counted == {2}
        counted.clear()
        assert recompute(config, lines, 3, server_threads=1, source="").replay.events == len(lines)
        assert counted == {1}
    finally:
        compute_on(1)


def test_a_run_that_failed_is_computed_as_far_as_it_came(tmp_path: Path) -> None:
    with pytest.raises(TaskError):
        fit(tmp_path, {"task": {"name": "helpers:Poisoned", "bad": [3]}}, "policy=asynchronous", samples=100)
    record = open_run(str(tmp_path / "run-0"))
    found = again(tmp_path / "run-0")
    assert found.replay.match and found.replay.events == sum(1 for _ in record.lines()) > 5
    assert record.parameters_sha256 is None and found.parameters_sha256 is not None


def test_another_processor_or_library_is_warned_of(run: Path) -> None:
    env = open_run(str(run)).env
    assert list(warnings({**env, "cuda": False})) == []
    told = list(warnings({**env, "processor": "Z80", "cuda": True}))
    assert "recorded with processor Z80, and this is" in told[0] and "a GPU" in told[1]
    assert "torch 1.0" in next(warnings({**env, "versions": {**env["versions"], "torch": "1.0"}}))


def test_a_model_with_statistics_is_among_the_tasks_tested() -> None:
    assert any(isinstance(module, nn.BatchNorm2d) for module in Images().model(0).modules())
