"""The usual steps of a small model (single_block.py) and plain replies (replies.py) are those of the general way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ps_elastic.errors import ConfigError
from ps_elastic.policies import policies
from ps_elastic.server.replies import Replies
from ps_elastic.server.single_block import SingleBlock
from ps_elastic.server.store import ParameterStore
from ps_elastic.simulation.simulate import simulate

COMPUTE = {"name": "exponential", "mean_s": 0.2}  # workers out of step: views are of several versions


def made(folder: Path, policy: str, **changes: Any) -> dict[str, Any]:
    """All that a simulated run leaves: the model and every line of every file; or why there was none."""
    config = {
        "task": "quadratic", "policy": policy, "train": {"samples": 90}, "optimizer": {"lr": 0.05, "momentum": 0.9},
        "simulation": {"compute": COMPUTE},
    } | changes  # fmt: skip
    try:
        summary = simulate(config, workers=3, run_dir=folder)
    except ConfigError as error:
        return {"error": str(error)}
    files = [folder / "events.jsonl", *sorted((folder / "metrics").iterdir())]
    return {"model": summary["parameters_sha256"]} | {path.name: path.read_bytes() for path in files}


def in_general(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers made from here on do nothing in a way of its own."""
    monkeypatch.setattr(SingleBlock, "of", lambda *_: None)
    monkeypatch.setattr("ps_elastic.server.server.make_replies", lambda *parts, waits: Replies(*parts))


@pytest.mark.parametrize("policy", [name for name, _ in policies.items()])
def test_a_run_is_the_same_with_the_general_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    changes = {"update": "sisa", "optimizer": {"lr": 0.05}} if policy == "consensus" else {}
    at_once = made(tmp_path / "at_once", policy, **changes)
    assert "error" not in at_once
    in_general(monkeypatch)
    assert made(tmp_path / "general", policy, **changes) == at_once


@pytest.mark.parametrize("policy", ["asynchronous", "synchronous"])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "adam", "lr": 0.01}},
        {"optimizer": {"lr": 0.05, "weight_decay": 0.01}},
        {"tracker": {"discrepancy": "bound"}},
        {"update": {"name": "sgd", "pipeline": 1}},
        {"schedule": {"name": "cosine", "warmup_samples": 20}},
        {"faults": {"lost_reply": {"chance": 0.1}, "duplicate": {"chance": 0.1}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_so_it_is_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, changes: dict[str, Any]
) -> None:
    at_once = made(tmp_path / "at_once", policy, **changes)
    in_general(monkeypatch)
    assert made(tmp_path / "general", policy, **changes) == at_once


def test_steps_of_a_small_model_are_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> float:
        raise AssertionError("in general")

    monkeypatch.setattr(ParameterStore, "_in_general", refuse)
    assert "model" in made(tmp_path / "run", "asynchronous")
