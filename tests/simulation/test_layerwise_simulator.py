"""Workers whose layers leave one after the other, in virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Run

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.analysis.replay.recompute import recompute
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError
from ps_elastic.records.reader import open_run
from ps_elastic.simulation.simulate import simulate
from ps_elastic.simulation.variants import ready_after

SLOW = ("simulation.compute.name=exponential", "simulation.compute.mean_s=0.8", "optimizer.lr=0.05")
SALF = ("policy=salf_fill:deadline_s=1",)
CUT = ("update=cut_sgd:deadline_s=0.97",)
FED = ("compressor=top_k:ratio=0.2", "optimizer.clip_norm=1")


def play(folder: Path, *overrides: str, workers: int = 5, samples: int = 240, **options: Any) -> Run:
    directory = folder / f"run-{len(list(folder.iterdir()))}"
    source: dict[str, Any] = {"task": "helpers:Blobs"}
    settings = [*SALF, *overrides, f"train.samples={samples}"]
    summary = simulate(source, settings, workers=workers, run_dir=directory, **options)
    run = Run(directory, summary)
    config = load(directory / "config.yaml", simulated=True)
    replay = replay_decisions(config.policy.build(), run.events, range(1, workers + 1))
    assert replay.match, replay.first_mismatch
    return run


def events(run: Run, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, run.events) if line["event"] == event]


def test_backward_comes_to_the_last_bucket_first_after_a_third_and_to_each_by_its_parameters() -> None:
    assert ready_after([100]) == [1.0]
    assert ready_after([50, 30, 20]) == pytest.approx([1.0, 1 / 3 + 2 / 3 * 0.5, 1 / 3 + 2 / 3 * 0.2])


def test_each_bucket_arrives_when_it_is_ready(tmp_path: Path) -> None:
    run = play(tmp_path, "simulation.compute.mean_s=0.3", "simulation.network.latency_s=0", workers=1, samples=8)
    times = {line["bucket"]: line["t_s"] for line in events(run, "push") if line["step"] == 1}
    sizes = [54, 9, 27, 3]
    assert sorted(times, key=lambda bucket: times[bucket]) == [3, 2, 1, 0]
    for (bucket, time), ready in zip(sorted(times.items()), ready_after(sizes), strict=True):
        assert time == pytest.approx(0.3 * ready, abs=1e-5), bucket


def test_a_deadline_takes_more_from_the_first_layers_than_from_the_last(tmp_path: Path) -> None:
    run = play(tmp_path, *SLOW, *CUT)
    used = [sum(line["bucket"] == i for line in run.lines(0, "used")) for i in range(4)]
    assert used == sorted(used) and used[0] < 0.9 * used[3]
    assert run.summary["B_max"] == 0 and run.summary["bound_holds"]


def test_who_is_cut_off_says_so_at_its_deadline_and_begins_the_next_round_with_the_others(tmp_path: Path) -> None:
    run = play(tmp_path, *SLOW, *CUT)
    asked, dropped = events(run, "asked"), run.lines(0, "dropped")
    assert asked and {round(line["t_s"] % 1, 1) for line in asked} == {1.0}
    assert {line["reason"] for line in dropped} <= {"done"}
    whole = run.summary
    assert whole["pushes"] * 4 == len(asked) + len(events(run, "push"))
    assert whole["used"] + whole["dropped"] == whole["pushes"]


def test_who_is_not_cut_off_is_late_with_the_rest_of_its_layers(tmp_path: Path) -> None:
    run = play(tmp_path, *SLOW)
    late = [line for line in run.lines(0, "dropped") if line["reason"] == "late"]
    assert late and not events(run, "asked")
    used = {(line["worker"], line["step"]) for line in run.lines(0, "used")}
    assert any((line["worker"], line["step"]) in used for line in late)  # its last layers were in time


def test_one_seed_gives_one_log_and_headers_alone_the_same_events(tmp_path: Path) -> None:
    first, again, bare = (
        play(tmp_path, *SLOW, *CUT, headers_only=headers_only) for headers_only in (False, False, True)
    )
    assert first.events == again.events
    assert first.summary["parameters_sha256"] == again.summary["parameters_sha256"]
    keys = ("event", "worker", "step", "bucket", "base", "t_s", "nbytes")
    assert [[e.get(k) for k in keys] for e in map(json.loads, bare.events)] == [
        [e.get(k) for k in keys] for e in map(json.loads, first.events)
    ]
    assert bare.summary["samples"] == first.summary["samples"]


@pytest.mark.parametrize("extra", [(), CUT, FED, (*CUT, *FED), (*CUT, *FED, "policy=salf:empty=estimated")])
def test_it_is_computed_again_bit_for_bit(tmp_path: Path, extra: tuple[str, ...]) -> None:
    run = play(tmp_path, *SLOW, *extra)
    record = open_run(str(run.directory))
    config = load(record.config, simulated=True)
    found = recompute(config, record.lines(), record.workers, server_threads=1, source="events.jsonl")
    assert found.replay.match, found.replay.first_mismatch
    assert found.parameters_sha256 == run.summary["parameters_sha256"]


FAULTS = {
    "lost": ["faults.lost_push.chance=0.2", "faults.lost_reply.chance=0.1", "survive.ask_again_s=2"],
    "twice": ["faults.duplicate.chance=0.3", "faults.delay={delay_s: 0.1, chance: 0.2}"],
    "crash": [
        "faults.crash={workers: 2, at_s: 4.2}", "faults.leave={workers: 3, at_s: 6.3}",
        "faults.join=[{workers: 2, at_s: 7.1}, {workers: 6, at_s: 2.6}]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_concern_whole_pushes_and_the_run_is_computed_again_all_the_same(tmp_path: Path, name: str) -> None:
    run = play(tmp_path, *SLOW, *FAULTS[name])
    assert run.summary["samples"] >= 240 and run.summary["exit"] == 0
    record = open_run(str(run.directory))
    config = load(record.config, simulated=True)
    found = recompute(config, record.lines(), record.workers, server_threads=1, source="events.jsonl")
    assert found.replay.match and found.parameters_sha256 == run.summary["parameters_sha256"]


def test_what_was_cut_off_and_what_was_lost_cannot_be_told_apart(tmp_path: Path) -> None:
    run = play(tmp_path, *SLOW, *CUT, *FAULTS["lost"])
    config = load(run.directory / "config.yaml", simulated=True)
    with pytest.raises(ConfigError, match="the record does not tell which"):
        recompute(config, run.events, 5, server_threads=1, source="events.jsonl")
    unlost = replace(config, faults=load({"task": "quadratic"}).faults)
    assert unlost.faults.lost_push == ()
