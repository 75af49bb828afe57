"""`ps-elastic replay`: what it checks, what it says, and what it ends with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers import fit

from ps_elastic import cli
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Action, Push, Release, Step
from ps_elastic.policies.ledger import Ledger
from ps_elastic.simulation.simulate import simulate

MOODY = "test_replay_command:Moody"


@dataclass
class Moody(Policy):
    """Asynchronous, with a share that is no setting of it: a record does not know it."""

    share: ClassVar[float] = 0.5

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id], self.share)
        yield Release((push.id.worker,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return fit(folder, "helpers:Blobs", f"policy={MOODY}", "compressor=top_k:ratio=0.1", samples=100).directory


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Any:
    def run_command(*arguments: str | Path) -> Said:
        capfd.readouterr()
        code = cli.main(["replay", *map(str, arguments)])
        return Said(code, *capfd.readouterr())

    return run_command


def test_a_run_that_matches_ends_with_0_and_the_document(run: Path, say: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "events.jsonl").read_text().splitlines()
    actions = sum(a[0] != "applied" for line in lines for a in json.loads(line)["actions"])
    said = say(run, "--json")
    assert (said.code, said.err) == (0, "")
    assert said.document == {
        "events": len(lines), "actions": actions, "match": True, "first_mismatch": None, "parameters_sha256": None,
        "recorded_sha256": summary["parameters_sha256"],
    }  # fmt: skip
    plain = say(run)
    assert (plain.code, plain.out) == (0, f"{len(lines)} events, {actions} actions: the same as recorded\n")


def test_a_rule_that_decides_otherwise_ends_with_6_and_the_first_difference(
    run: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moody, "share", 0.25)
    for flags in ((), ("--recompute",)):
        said = say(run, *flags, "--json")
        assert said.code == 6
        assert said.document["match"] is False and said.document["parameters_sha256"] is None
        mismatch = said.document["first_mismatch"]
        assert mismatch["line"] == said.document["events"] == 2
        recorded, replayed = json.loads(mismatch["recorded"]), json.loads(mismatch["replayed"])
        assert recorded["actions"][0][2] == 0.5 and replayed["actions"][0][2] == 0.25
        plain = say(run, *flags)
        assert plain.code == 6 and plain.out.startswith("2 events, ")
        assert "until the first difference: line 2 (event push worker 1 step 1): action 1 was" in plain.out


def test_recompute_comes_to_the_parameters_recorded(run: Path, say: Any) -> None:
    said = say(run, "--recompute", "--json")
    assert said.code == 0
    assert said.document["match"] and said.document["parameters_sha256"] == said.document["recorded_sha256"]
    assert f"parameters {said.document['recorded_sha256']}: the same as recorded" in say(run, "--recompute").out


def test_other_parameters_are_a_mismatch(run: Path, say: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "parameters_sha256": "0" * 64}))
    assert say(copy).code == 0
    said = say(copy, "--recompute", "--json")
    assert said.code == 6 and said.document["first_mismatch"]["line"] is None
    assert "every event is the same, but the parameters are" in said.document["first_mismatch"]["text"]


def test_another_processor_is_warned_of_and_the_run_computed_all_the_same(run: Path, say: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    env = json.loads((copy / "env.json").read_text())
    (copy / "env.json").write_text(json.dumps({**env, "processor": "Z80"}))
    said = say(copy, "--recompute", "--json")
    assert said.code == 0 and said.document["match"]
    assert "ps-elastic: recorded with processor Z80, and this is" in said.err
    assert say(copy).err == ""


def test_other_rules_are_told_beside_the_recorded_one(run: Path, say: Any) -> None:
    said = say(run, "--policy", "synchronous", "--policy", "first_k:k=1", "--json")
    summary, rows = json.loads((run / "summary.json").read_text()), said.document["rows"]
    assert said.code == 0
    assert [row["policy"] for row in rows] == [MOODY, "synchronous", "first_k:k=1"]
    assert [row["recorded"] for row in rows] == [True, False, False]
    assert rows[0]["used"] == summary["used"] and rows[0]["staleness"] == summary["staleness"]
    assert rows[1]["staleness"] == {"mean": 0.0, "max": 0} and rows[1]["wait_share"] > rows[0]["wait_share"] == 0
    assert rows[2]["dropped"] > 0
    table = say(run, "--policy", "synchronous").out.splitlines()
    assert table[2].split()[:3] == ["policy", "used", "discarded"] and table[4].startswith("synchronous ")
    assert table[3].startswith(f"{MOODY} (recorded)  ")


def test_a_record_that_does_not_match_has_no_row_of_its_own(
    run: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moody, "share", 0.25)
    said = say(run, "--policy", "synchronous", "--json")
    assert said.code == 6 and [row["policy"] for row in said.document["rows"]] == ["synchronous"]


def test_a_rule_that_cannot_be_asked_is_refused(run: Path, say: Any) -> None:
    for policy, message in {
        "synchronus": "policy.name: unknown policy 'synchronus'; nearest 'synchronous'",
        "first_k:k=9": "first_k:k=9 needs 9 workers, and the run had 3",
        "first_k:k=0": "policy.k: got 0",
    }.items():
        said = say(run, "--policy", policy)
        assert (said.code, said.out) == (2, "") and message in said.err, said.err
    assert say(run, "--policy", "synchronous", "--recompute").code == 2


@pytest.mark.parametrize("flags", [(), ("--recompute",), ("--policy", "synchronous")])
def test_a_record_that_was_cut_is_refused_with_2(run: Path, say: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(lines[:-1]))
    said = say(copy, *flags, "--json")
    assert (said.code, said.out) == (2, "") and "events.jsonl: cut: " in said.err


def test_a_run_that_was_killed_is_replayed_as_far_as_its_record_goes(run: Path, say: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "summary.json").unlink()
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(lines[:12]) + lines[12][:-9])
    assert say(copy).code == 2
    for flags in ((), ("--recompute",)):
        said = say(copy, "--unfinished", *flags, "--json")
        assert (said.code, said.document["events"], said.document["recorded_sha256"]) == (0, 12, None)
    assert "the record has none to compare" in say(copy, "--unfinished", "--recompute").out


def test_a_run_of_headers_alone_is_replayed_and_not_computed(tmp_path: Path, say: Any) -> None:
    simulate({"task": "helpers:Blobs"}, ["train.samples=200"], workers=4, run_dir=tmp_path / "run", headers_only=True)
    assert say(tmp_path / "run").code == 0
    assert say(tmp_path / "run", "--policy", "asynchronous").code == 0
    said = say(tmp_path / "run", "--recompute")
    assert said.code == 2 and "this was a timing-only simulation" in said.err


def test_the_decisions_alone_need_neither_torch_nor_numpy_nor_mpi(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fit(tmp_path, "helpers:Blobs", samples=60).directory, tmp_path / "copy"))
    code = (
        "import sys; from ps_elastic.cli import main; "
        f"code = main(['replay', {str(copy)!r}, '--policy', 'asynchronous']); "
        "print(code, sorted({'torch', 'numpy', 'mpi4py'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"


def test_a_recompute_in_a_process_of_its_own_comes_to_the_same(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    overrides = ("policy=asynchronous", "compressor=top_k:ratio=0.1", "optimizer.momentum=0.9")
    run = fit(tmp_path, "digits", *overrides, samples=600)
    ended = subprocess.run(
        [sys.executable, "-m", "ps_elastic", "replay", str(run.directory), "--recompute", "--json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(ended.stdout)["parameters_sha256"] == run.summary["parameters_sha256"]
