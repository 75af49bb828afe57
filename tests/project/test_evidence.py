"""The pages of docs/evidence, made from comparisons that were made up."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ps_elastic.policies.theory import EQUAL_DATA, REPAID

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
ENV = {
    "workers": 3,
    "versions": {"ps_elastic": "0.1.0", "torch": "2.13.0"},
    "host": "someone's",
    "platform": "Linux",
    "processor": "AVX2",
    "cores": 2,
    "mpi": "Open MPI v5.0.11",
}


@pytest.fixture
def fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(LAUNCH / "experiments"))
    yield importlib.import_module("fashion_mnist")
    for name in ("fashion_mnist", "_page"):
        sys.modules.pop(name, None)


def row(policy: str, compressor: str, accuracy: float) -> dict[str, Any]:
    return {
        "policy": policy,
        "compressor": compressor,
        "accuracy": {"mean": accuracy, "sd": None},
        "wall_s": 61.4,
        "bytes_up": 2.5e9,
        "bytes_down": 11.7e9,
        "staleness": {"mean": 1.998, "max": 7},
        "discrepancy": {"rms": 0.08154, "max": 0.416},
        "wait_share": 0.254,
    }


def comparison(folder: Path, *rows: dict[str, Any]) -> Path:
    """A finished comparison with these rows, and the run folder of one cell."""
    run_dir = folder / "cells" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "env.json").write_text(json.dumps(ENV))
    (run_dir / "summary.json").write_text("{}")
    os.utime(run_dir / "summary.json", (1_700_000_000, 1_700_000_000))
    document = {"rows": rows, "cells": [{"run_dir": "cells/one", "summary": {"exit": 0}}]}
    (folder / "comparison.json").write_text(json.dumps(document))
    return folder


def test_a_page_states_command_day_machine_versions_and_figures(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    out = comparison(tmp_path / "out", row("synchronous", "identity", 0.9012), row("asynchronous", "identity", 0.8999))
    assert fashion_mnist.publish(fashion_mnist.evidence(out), tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "fashion_mnist.md").read_text()
    assert "ps-elastic compare configs/fashion_mnist.yaml --workers 3" in page
    assert "on 2023-11-14: 2 cores (AVX2), Linux; ps_elastic 0.1.0, torch 2.13.0;\nOpen MPI v5.0.11." in page
    figures = "61 | 2,500.0 | 11,700.0 | 2.00 / 7 | 0.0815 / 0.416 | 25% |"
    assert f"| synchronous | identity | 90.12% | {figures}" in page
    assert f"| asynchronous | identity | 89.99% | {figures}" in page
    assert "- holds: synchronous with identity reaches 88% (90.12%)" in page
    assert "someone's" not in page


def test_the_json_beside_it_holds_the_same(fashion_mnist: ModuleType, tmp_path: Path) -> None:
    rows = [row("synchronous", "identity", 0.9), row("synchronous", "top_k:ratio=0.01", 0.91)]
    fashion_mnist.publish(fashion_mnist.evidence(comparison(tmp_path / "out", *rows)), tmp_path)
    facts = json.loads((tmp_path / "fashion_mnist.json").read_text())
    assert facts["data"]["rows"] == rows
    assert facts["setting"]["date"] == "2023-11-14"
    assert [claim["holds"] for claim in facts["claims"]] == [True, True]


@pytest.mark.parametrize(
    ("base", "other", "holds"),
    [(0.88, 0.8701, [True, True]), (0.8799, 0.90, [False, True]), (0.90, 0.889, [True, False])],
)
def test_a_claim_that_fails_is_said_and_ends_with_6(
    fashion_mnist: ModuleType, tmp_path: Path, base: float, other: float, holds: list[bool]
) -> None:
    out = comparison(tmp_path / "out", row("synchronous", "identity", base), row("asynchronous", "identity", other))
    evidence = fashion_mnist.evidence(out)
    assert [claim.holds for claim in evidence.claims] == holds
    assert fashion_mnist.publish(evidence, tmp_path) == (0 if all(holds) else 6)
    assert (tmp_path / "fashion_mnist.md").read_text().count("- FAILS: ") == holds.count(False)


# ---- rules against their constants


def verdict(policy: str, said: str, reason: str = "") -> dict[str, Any]:
    figures = {"B_sup": 2.0, "low": 1.5, "high": 2.5, "B_theory": 4.0, "tightness": 0.5, "pushes": 240}
    return {"policy": policy, "verdict": said, "reason": reason, "formula": "tau M", **figures}


def verified(module: ModuleType, said: str, reason: str) -> dict[str, list[dict[str, Any]]]:
    """Every part with one rule: `said` where nothing is broken, not applicable for `reason` where something is."""
    parts = module.PARTS.items()
    return {
        name: [verdict("a_rule", "not applicable", reason) if part.broken else verdict("a_rule", said)]
        for name, part in parts
    }


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(LAUNCH / "experiments"))
    yield importlib.import_module("verify")
    for name in ("verify", "_page"):
        sys.modules.pop(name, None)


def test_the_page_of_verdicts_has_every_part_and_says_which_condition_is_broken(
    rules: ModuleType, tmp_path: Path
) -> None:
    found = verified(rules, "within", f"not so: {rules.UNEQUAL}; not so: {rules.UNPAID}")
    assert rules.publish(rules.evidence(found), tmp_path) == 0
    page = (tmp_path / "verify.md").read_text()
    assert page.count("- holds: ") == len(rules.PARTS)
    assert "| Fashion-MNIST | a_rule | within | 2 | 1.5 to 2.5 | 4 | 0.5 | 240 | tau M |" in page
    assert "ps-elastic verify --task fashion_mnist --seeds 5 --keep runs/evidence/verify/fashion_mnist --json" in page


@pytest.mark.parametrize(("said", "reason"), [("exceeded", "all"), ("within", "something else")])
def test_a_rule_exceeded_or_a_broken_condition_not_named_fails(
    rules: ModuleType, said: str, reason: str, tmp_path: Path
) -> None:
    named = f"not so: {rules.UNEQUAL}; not so: {rules.UNPAID}" if reason == "all" else reason
    made = rules.evidence(verified(rules, said, named))
    assert rules.publish(made, tmp_path) == 6
    broken = [claim for claim in made.claims if not claim.holds]
    assert len(broken) == 2 and all(("exceeded" in claim.text) == (said == "exceeded") for claim in broken)


def test_the_conditions_to_be_broken_are_those_of_the_theory(rules: ModuleType) -> None:
    assert {part.broken for part in rules.PARTS.values()} == {None, EQUAL_DATA, REPAID}


@pytest.mark.parametrize("argument", ["", "nothing", "_page", "../experiments/_page"])
def test_an_experiment_that_there_is_not_is_answered_with_those_there_are(argument: str) -> None:
    ended = subprocess.run([LAUNCH / "evidence", *filter(None, [argument])], capture_output=True, text=True, timeout=10)
    assert ended.returncode == 2
    known = sorted(path.stem for path in (LAUNCH / "experiments").glob("[!_]*.py"))
    assert ended.stderr.split()[-len(known) :] == known
