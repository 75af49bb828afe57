"""Every field that a run writes is described in `records.fields`, and every field described is written by some run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import Ahead
from run_folder import Reader, described, unseen

from ps_elastic.errors import PsElasticError
from ps_elastic.records.fields import FILES, TYPES
from ps_elastic.runtime.train import train
from ps_elastic.simulation.simulate import simulate


@dataclass
class LayersAhead(Ahead):
    """Releases a worker at once and uses its layers later."""

    layerwise = True


BLOBS, LINE = {"task": "helpers:Blobs"}, {"task": "quadratic", "optimizer": {"lr": 0.01}}
RANDOM = "simulation.compute={name: exponential, mean_s: 1}"
TRAINED = {  # in this process
    "plain": (BLOBS, "train={samples: 60, evaluate_every_samples: 20}"),
    "error feedback": (BLOBS, "compressor=top_k:ratio=0.2", "policy=stale_synchronous:bound=1"),
    "nothing measured": (BLOBS, "policy=asynchronous", "tracker.discrepancy=off"),
    "path lengths": (BLOBS, "policy=asynchronous", "tracker.discrepancy=bound", "train.stop_at=loss<=9",
                     "train.evaluate_every_samples=20"),
    "pipelining": (BLOBS, "policy=message_passing", "update.pipeline=2"),
    "models pushed": (BLOBS, "policy=consensus", "update=sisa"),
    "layer-wise": (BLOBS, "policy=salf", "buckets=layer"),
}  # fmt: skip
TROUBLE = (
    "faults={crash: {workers: 2, at_s: 5}, join: [{workers: 5, at_s: 7}, {workers: 2, at_s: 9}], "
    "leave: {workers: 3, at_s: 11}, duplicate: {chance: 0.2}, lost_push: {chance: 0.1}, lost_reply: {chance: 0.1}}"
)
SIMULATED: dict[str, tuple[Any, ...]] = {
    "discarded": (LINE, RANDOM, "policy=first_k:k=2"),
    "distances measured": (LINE, RANDOM, "policy=elastic_bound:bound=1M", "optimizer.momentum=0.5"),
    "late layers": (BLOBS, RANDOM, "policy=salf:deadline_s=0.5", "buckets=layer"),
    "layers kept for later": (BLOBS, RANDOM, "policy=test_fields:LayersAhead", "buckets=layer"),
    "late gradients": (LINE, RANDOM, "policy=norm_bounded:beta=0.5"),
    "late gradients that are lost": (LINE, RANDOM, "policy=variance_bounded:quorum=0.5", TROUBLE),
    "a deadline": (LINE, RANDOM, "policy=deadline:deadline_s=0.5:missing=substitute"),
    "inconsistent reads": (LINE, RANDOM, "policy=asynchronous", "views=torn", "simulation.read_s=0.5"),
    "layers cut off": (BLOBS, RANDOM, "policy=salf:deadline_s=0.5", "update=cut_sgd:deadline_s=0.4", "buckets=layer"),
    "trouble": (LINE, RANDOM, "policy=asynchronous", TROUBLE, "survive.ask_again_s=3"),
    "metadata alone": (LINE, RANDOM, "policy=value_bounded", "headers"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of all these runs, and of one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (source, *overrides) in TRAINED.items():
        train(source, ["train.samples=60", *overrides], workers=3, run_dir=folder / name)
    for name, (source, *overrides) in SIMULATED.items():
        headers = "headers" in overrides
        given = ["train.samples=60", *(text for text in overrides if text != "headers")]
        simulate(source, given, workers=4, run_dir=folder / name, headers_only=headers)
    with pytest.raises(PsElasticError):
        train({"task": "helpers:Poisoned"}, ["task.bad=[2]"], workers=2, run_dir=folder / "failed")
    return {path.name: path for path in folder.iterdir()}


def test_what_runs_write_is_described_and_what_is_described_is_written(runs: dict[str, Path]) -> None:
    reader = Reader()
    for path in runs.values():
        reader.read(path)
    assert reader.wrong == []
    assert unseen(reader.seen, but="under MPI") == []


def test_a_field_or_file_that_is_not_described_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    for path in runs["plain"].rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(runs["plain"])).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(runs["plain"])).write_bytes(path.read_bytes())
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary["wall_s"]
    summary |= {"speed": 3, "seed": "0", "samples": True, "policy": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "notes.txt").write_text("")
    with (tmp_path / "events.jsonl").open("a") as events:
        events.write('{"event": "slept", "t_s": 3.0, "rank": 0, "actions": []}\n')
        events.write('{"event": "done", "t_s": 3.0, "rank": 0, "actions": [["jump", 3], ["wake", "now"]]}\n')
    reader = Reader()
    reader.read(tmp_path)
    assert sorted(reader.wrong) == sorted([
        "notes.txt is described nowhere",
        "events.jsonl: a line 'slept'",
        "action jump with 1 values",
        "actions: wake at is 'now', not number",
        "summary.json:  speed",
        "summary.json:  seed is '0', not int",
        "summary.json:  samples is True, not int",
        "summary.json:  policy is None, not text",
        "summary.json:  lacks wall_s, which all runs have",
    ])  # fmt: skip


def test_every_description_is_whole() -> None:
    for file in FILES:
        assert file.what.endswith("."), file.name
        for field in (*file.fields, *(field for line in file.lines.values() for field in line)):
            assert field.type.rstrip("?") in TYPES and field.meaning, field
            assert "|" not in field.meaning + field.formula, field
    assert described("slurm-17.out") is not None and described("metrics/rank-017.jsonl") is not None
