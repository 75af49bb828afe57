"""Whole runs in one process: what a user asks for in a configuration, and what is found in the run's folder."""

from __future__ import annotations

import builtins
import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, Images, Slope, fit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ps_elastic
from ps_elastic.cli._options import recheck
from ps_elastic.errors import ConfigError, PlatformError, TaskError
from ps_elastic.policies import policies
from ps_elastic.records.run_dir import read_summary

SUMMARY_KEYS = {
    "policy", "compressor", "task", "workers", "seed", "wall_s", "samples", "samples_computed", "pushes", "used",
    "dropped", "held_max", "bytes_up", "bytes_down", "staleness", "discrepancy", "B_rms", "B_max", "B_theory",
    "B_theory_kind", "bound_holds", "wait_share", "lost_workers", "metrics", "time_to_target_s", "parameters_sha256",
    "exit", "shared_steps", "shared_by_workers",
}  # fmt: skip


def test_a_run_leaves_the_files_of_the_contract(tmp_path: Path) -> None:
    run = fit(tmp_path, {"name": "tiny", "task": "helpers:Images"}, samples=60)
    found = {str(path.relative_to(run.directory)) for path in run.directory.rglob("*") if path.is_file()}
    assert found == {
        "config.yaml", "env.json", "events.jsonl", "metrics/rank-000.jsonl", "metrics/rank-001.jsonl",
        "metrics/rank-002.jsonl", "metrics/rank-003.jsonl", "model.safetensors", "summary.json",
    }  # fmt: skip
    assert json.loads((run.directory / "env.json").read_text())["workers"] == 3


def test_the_summary_has_every_key_of_the_contract(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=stale_synchronous:bound=2", "compressor=top_k:ratio=0.1",
              "seed=4", samples=60)  # fmt: skip
    written = read_summary(run.directory)
    assert written is not None and written.keys() >= SUMMARY_KEYS
    assert {**written, "run_dir": str(run.directory)} == run.summary
    expected = {
        "policy": "stale_synchronous:bound=2", "compressor": "top_k:ratio=0.1", "task": "helpers:Blobs", "workers": 3,
        "seed": 4, "samples": 60, "used": 15, "dropped": 2, "pushes": 17, "samples_computed": 68, "held_max": 1,
        "lost_workers": [], "time_to_target_s": None, "exit": 0,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert written["bytes_up"] == 17 * 8 * int(0.1 * 256)  # index and value; 256 floats with padding
    assert written["bytes_down"] == (3 + 14) * 4 * 256  # version 0 to each, and every reply but the last of all
    assert written["wait_share"].keys() == {"1", "2", "3"}
    assert written["metrics"].keys() >= {"loss", "accuracy"}


def test_every_line_has_event_time_and_rank(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=first_k:k=2", samples=60)
    for rank in range(4):
        text = (run.directory / "metrics" / f"rank-{rank:03d}.jsonl").read_text()
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        assert len(lines) > 4
        assert all(line["rank"] == rank and line["t_s"] >= 0 and line["event"] for line in lines)
    events = [json.loads(line) for line in run.events]
    assert {event["event"] for event in events} == {"applied", "push", "done"}
    reply = run.lines(1, "reply")[0]
    assert reply.keys() == {
        "event", "t_s", "rank", "step", "version", "discrepancy", "moved", "residual_norm", "outcome", "compute_s",
        "encode_s", "send_s", "wait_s",
    }  # fmt: skip
    assert {line["outcome"] for rank in (1, 2, 3) for line in run.lines(rank, "reply")} == {"used", "dropped"}


def test_from_python_a_run_is_one_call(tmp_path: Path) -> None:
    summary = ps_elastic.train({"task": "helpers:Blobs"}, ["train.samples=60"], workers=2, run_dir=tmp_path / "run")
    assert summary is not None and summary["exit"] == 0 and summary["samples"] == 64


def test_it_learns(tmp_path: Path) -> None:
    for policy in ("synchronous", "asynchronous", "stale_synchronous", "first_k"):
        run = fit(tmp_path, "helpers:Blobs", f"policy={policy}", samples=2000)
        assert run.summary["metrics"]["accuracy"] > 0.75, policy


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["identity", "top_k:ratio=0.05"])
@pytest.mark.parametrize("policy", ["synchronous", "asynchronous", "stale_synchronous", "first_k"])
def test_digits_are_read_nine_times_in_ten(tmp_path: Path, policy: str, compressor: str) -> None:
    run = fit(tmp_path, "digits", f"policy={policy}", f"compressor={compressor}", "optimizer.momentum=0.9",
              samples=20_000)  # fmt: skip
    assert run.summary["metrics"]["accuracy"] > 0.9


# ---- every rule, in every mode of the tracker


@pytest.mark.parametrize("mode", ["exact", "bound", "off"])
@pytest.mark.parametrize("policy", ["asynchronous", "first_k", "stale_synchronous", "synchronous"])
def test_the_tracker_changes_nothing_but_what_is_known(tmp_path: Path, policy: str, mode: str) -> None:
    assert policy in dict(policies.items())
    overrides = (f"policy={policy}", "compressor=top_k:ratio=0.1", "optimizer.momentum=0.5")
    exact = fit(tmp_path, "helpers:Blobs", *overrides, samples=120)
    run = fit(tmp_path, "helpers:Blobs", *overrides, f"tracker.discrepancy={mode}", samples=120)
    assert run.summary["parameters_sha256"] == exact.summary["parameters_sha256"]
    assert run.events == exact.events
    distances = run.column("discrepancy")
    if mode == "off":
        assert set(distances) == {None} and run.summary["discrepancy"]["rms"] is None
    else:
        assert all(a >= b for a, b in zip(distances, exact.column("discrepancy"), strict=True))
    if mode == "bound":
        assert distances == exact.column("path_length")
        assert all(line["moved"] is None for line in run.lines(1, "reply"))
        assert run.summary["snapshots_max"] == 0


# ---- evaluation and targets


def test_evaluations_come_at_their_intervals_and_at_the_end(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "train.evaluate_every_samples=50", samples=200)
    assert run.column("samples", event="evaluated") == [60, 108, 156, 204, 204]
    assert run.lines(0, "evaluated")[-1]["accuracy"] == run.summary["metrics"]["accuracy"]
    once = fit(tmp_path, "helpers:Blobs", samples=200)
    assert once.column("samples", event="evaluated") == [204]
    assert once.summary["parameters_sha256"] == run.summary["parameters_sha256"]


def test_a_run_stops_at_its_target(tmp_path: Path) -> None:
    overrides = ("train.evaluate_every_samples=24", "train.stop_at=accuracy>=0.7")
    run = fit(tmp_path, "helpers:Blobs", *overrides, samples=100_000)
    reached = next(line for line in run.lines(0, "evaluated") if line["accuracy"] >= 0.7)
    assert run.summary["samples"] == reached["samples"] < 2000
    assert run.summary["time_to_target_s"] == pytest.approx(reached["samples"] / 12)  # rounds of three pushes
    assert run.summary["exit"] == 0 and recheck(run.summary) == run.summary


def test_a_target_missed_is_told_and_fails_the_check(tmp_path: Path) -> None:
    overrides = ("train.evaluate_every_samples=24", "train.stop_at=loss<=0.0001")
    run = fit(tmp_path, "helpers:Blobs", *overrides, samples=60)
    assert run.summary["time_to_target_s"] is None and run.summary["exit"] == 0
    checked = recheck(run.summary)
    assert checked["exit"] == 6 and checked["error"] == "the target loss<=0.0001 was not reached"
    written = read_summary(run.directory)
    assert written is not None and written["exit"] == 6


def test_a_target_that_the_task_does_not_measure_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_at: unknown metric 'acc'; nearest 'accuracy'"):
        fit(tmp_path, "helpers:Blobs", "train.evaluate_every_samples=24", "train.stop_at=acc>=0.9", samples=60)


# ---- gradients that are not finite


def poisoned(*bad: int, value: float = 0.0) -> dict[str, Any]:
    return {"task": {"name": "helpers:Poisoned", "bad": list(bad), "value": value}}


@pytest.mark.parametrize("value", [0.0, 1e-300])
def test_a_gradient_that_is_not_finite_stops_the_run_by_name(tmp_path: Path, value: float) -> None:
    with pytest.raises(TaskError, match="step 4: the gradient is not finite") as error:
        fit(tmp_path, poisoned(4, value=value), samples=60)
    written = read_summary(next(tmp_path.iterdir()))
    assert written is not None
    assert (written["exit"], written["error"]) == (1, str(error.value))
    assert written["samples"] == 9  # three rounds, and the parameters of a failed run are nobody's
    assert written["parameters_sha256"] is None


def test_it_is_dropped_on_request_and_the_rule_never_sees_it(tmp_path: Path) -> None:
    run = fit(tmp_path, poisoned(4, 5, 8), "train.on_nonfinite=drop", samples=30)
    clean = fit(tmp_path, poisoned(), samples=30)
    assert run.summary["parameters_sha256"] == clean.summary["parameters_sha256"]
    assert run.events == clean.events


def test_ten_in_a_row_are_given_up(tmp_path: Path) -> None:
    fit(tmp_path, poisoned(*range(4, 13)), "train.on_nonfinite=drop", samples=30)
    with pytest.raises(TaskError, match="step 4: 10 gradients in a row were not finite"):
        fit(tmp_path, poisoned(*range(4, 14)), "train.on_nonfinite=drop", samples=30)


# ---- warm start


def test_a_run_starts_where_another_ended(tmp_path: Path) -> None:
    first = fit(tmp_path, "helpers:Images", samples=240)
    init = first.directory / "model.safetensors"
    again = fit(tmp_path, "helpers:Images", f"train.init={init}", "optimizer.lr=1e-30", samples=12)
    assert again.summary["parameters_sha256"] == first.summary["parameters_sha256"]
    assert again.summary["metrics"]["loss"] < 1.05 * first.summary["metrics"]["loss"]


def test_a_start_that_does_not_fit_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            ps_elastic.train({"task": "helpers:Slope"}, [f"train.init={path}"], workers=2, run_dir=tmp_path / "never")
        assert not (tmp_path / "never").exists()
        return str(error.value)

    path = tmp_path / "init.safetensors"
    assert f"train.init: no file '{path}'" in refusal()
    save_file({"x": torch.zeros(5)}, path)
    assert "'x' is (5,), expected (2,)" in refusal()
    save_file({"y": torch.zeros(2)}, path)
    assert "lacks ['x'] and has ['y']" in refusal()


# ---- numbers and devices


def test_workers_may_compute_in_bfloat16(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Images", "train.autocast=bfloat16", samples=600)
    plain = fit(tmp_path, "helpers:Images", samples=600)
    assert run.summary["parameters_sha256"] != plain.summary["parameters_sha256"]
    assert run.summary["metrics"]["accuracy"] > 0.6
    saved = load_file(run.directory / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values() if t.is_floating_point())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="device: cuda, but torch finds no GPU here"):
        fit(tmp_path, "helpers:Blobs", "device=cuda", samples=12)


def test_the_default_generator_of_the_caller_does_not_matter(tmp_path: Path) -> None:
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        hashes.add(fit(tmp_path, "helpers:Dropout", samples=60).summary["parameters_sha256"])
    assert len(hashes) == 1


def test_dropout_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    """With a rate too small to move the model, each (worker, step) has the same loss under any rule."""
    norms = []
    for policy in ("synchronous", "asynchronous", "helpers:Ahead"):
        run = fit(tmp_path, "helpers:Dropout", f"policy={policy}", "optimizer.lr=1e-30", samples=60)
        norms.append({(line["worker"], line["step"]): line["norm"] for line in run.lines(0, "used")})
    common = norms[0].keys() & norms[1].keys() & norms[2].keys()
    assert len(common) >= 12
    assert all(norms[0][key] == norms[1][key] == norms[2][key] for key in common)


# ---- BatchNorm


def test_the_running_statistics_saved_are_the_mean_over_the_workers(tmp_path: Path) -> None:
    """Each worker's own network sees its own batches at the models of a plain loop."""
    run = fit(tmp_path, "helpers:Images", samples=120)
    task = Images()
    model = task.model(0)
    locals_ = [copy.deepcopy(model).train() for _ in range(3)]
    batches = [task.batches(worker, 3, 0) for worker in (1, 2, 3)]
    for _ in range(10):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for local, own in zip(locals_, batches, strict=True):
            for p, q in zip(local.parameters(), model.parameters(), strict=True):
                p.data.copy_(q)
                p.grad = None
            task.loss(local, next(own)).backward()
            for total, p in zip(sums, local.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad
        with torch.no_grad():
            for p, total in zip(model.parameters(), sums, strict=True):
                p.sub_(0.1 * total / 3)
    saved = load_file(run.directory / "model.safetensors")
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        expected = torch.stack([local.get_buffer(name) for local in locals_]).mean(0)
        assert torch.allclose(saved[name], expected, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(locals_[0].get_buffer(name), locals_[1].get_buffer(name))
    model.load_state_dict(saved)
    with torch.no_grad():
        assert run.summary["metrics"]["loss"] == pytest.approx(task.evaluate(model.eval())["loss"], rel=1e-5)


# ---- the fate of pushes


def test_held_pushes_are_settled_when_they_are_used(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=helpers:Ahead:need=6", samples=240)
    used = {(line["worker"], line["step"]): line["discrepancy"] for line in run.lines(0, "used")}
    assert len(used) == 60
    told = {}
    for rank in (1, 2, 3):
        assert {line["outcome"] for line in run.lines(rank, "reply")} <= {"held", "used", "dropped"}
        assert run.column("outcome", rank, "reply").count("held") > 15
        for line in run.lines(rank, "settled"):
            if line["outcome"] == "used":
                told[rank, line["step"]] = line["discrepancy"]
    assert told.items() <= used.items() and len(told) > 45
    assert max(run.column("staleness")) > 0


@pytest.mark.parametrize("rule", ["first_k:k=2", "helpers:Ahead:need=6:scorned=2"])
def test_what_is_dropped_goes_back_into_the_residual(tmp_path: Path, rule: str) -> None:
    """For every worker: gradients = what the server used + what was still kept, held or on its way at the end."""
    run = fit(tmp_path, "helpers:Ledgered", f"policy={rule}", "compressor=identity", "compressor.error_feedback=true",
              samples=80)  # fmt: skip
    dropped = [line for line in run.lines(0, "dropped") if line["reason"] != "done"]
    assert len(dropped) > 5
    losers = {line["worker"] for line in dropped}
    pushes = [json.loads(line) for line in run.events if '"event": "push"' in line]
    for worker in losers:
        norms = [push["payload_norm"] for push in pushes if push["worker"] == worker]
        # Identity with error feedback keeps nothing back; a gradient of norm 1 grows only by what was dropped.
        assert norms[0] == 1 and max(norms) >= 2
    if rule.startswith("first_k"):
        third = [push["payload_norm"] for push in pushes if push["worker"] == 3]
        late = [line["step"] for line in dropped if line["worker"] == 3]
        assert late and all(third[step] == third[step - 1] + 1 for step in late if step < len(third))


def test_first_k_tells_whom_it_drops(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=first_k:k=2", samples=80)
    dropped = {(line["worker"], line["step"]) for line in run.lines(0, "dropped")}
    told = {
        (rank, line["step"]) for rank in (1, 2, 3) for line in run.lines(rank, "reply") if line["outcome"] == "dropped"
    }
    assert dropped == told and len(dropped) == run.summary["dropped"] > 5
    assert {line["reason"] for line in run.lines(0, "dropped")} <= {"late", "done"}


# ---- refusals


def test_fewer_workers_than_the_rule_needs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy: first_k:k=4 needs 4 workers, got 3"):
        fit(tmp_path, "helpers:Blobs", "policy=first_k:k=4", samples=12)
    with pytest.raises(ConfigError, match=r"--workers: got 0, expected a number of workers >= 1"):
        fit(tmp_path, "helpers:Blobs", workers=0, samples=12)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    with pytest.raises(ConfigError, match="this folder is not empty"):
        ps_elastic.train({"task": "helpers:Blobs"}, workers=2, run_dir=tmp_path / "run")


@dataclass
class Crashing(Blobs):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise ZeroDivisionError("in the user's own code")


def test_what_the_users_code_raises_passes_and_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="in the user's own code"):
        fit(tmp_path, f"{__name__}:Crashing", samples=12)
    written = read_summary(next(tmp_path.iterdir()))
    assert written is not None and written["exit"] == 1
    assert "ZeroDivisionError: in the user's own code" in written["error"]


@dataclass
class Interrupted(Slope):
    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        yield from [torch.ones(2)] * 3
        raise KeyboardInterrupt


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, f"{__name__}:Interrupted", samples=60)
    written = read_summary(next(tmp_path.iterdir()))
    assert written is not None and written["exit"] == 130 and written["samples"] == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit, MemoryError])
def test_a_run_that_fails_leaves_every_line_it_gathered(tmp_path: Path, error: type[BaseException]) -> None:
    task = {"task": {"name": f"{__name__}:Failing", "error": error.__name__}}
    with pytest.raises(error):
        fit(tmp_path, task, samples=60)
    directory = next(tmp_path.iterdir())
    written = read_summary(directory)
    lines = [json.loads(line) for line in (directory / "metrics" / "rank-000.jsonl").read_text().splitlines()]
    events = (directory / "events.jsonl").read_text()
    assert written is not None and written["used"] == 9 == sum(line["event"] == "used" for line in lines)
    assert events.endswith("\n") and events.count("\n") == written["record"]["events"] > 9
    assert hashlib.sha256(events.encode()).hexdigest() == written["record"]["events_sha256"]


@dataclass
class Failing(Slope):
    error: str = ""

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        yield from [torch.ones(2)] * 3
        raise getattr(builtins, self.error)


def test_numbers_in_the_summary_are_json(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Slope", samples=12)
    json.loads((run.directory / "summary.json").read_text(), parse_constant=pytest.fail)
    assert run.summary["metrics"]["loss"] < 0 and run.summary["metrics"]["accuracy"] is None
    assert math.isfinite(run.summary["wall_s"]) and np.isfinite(run.summary["B_rms"])
