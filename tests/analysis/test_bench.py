from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ps_elastic.analysis.bench import Benchmark, Row, row, run_benchmark
from ps_elastic.cli import main
from ps_elastic.errors import CHECK_FAILED, ConfigError
from ps_elastic.policies import policies


@dataclass
class Fixed(Benchmark):
    """Measures nothing."""

    ours: float = 6.0

    def rows(self) -> Iterator[Row]:
        yield row("one", self.ours, "pushes/s", 4.0, "theirs", ">= 5")
        yield row("two", self.ours, "us", None, "nobody")


def test_a_target_is_of_the_figure_or_of_the_ratio() -> None:
    assert row("x", 6.0, "s", 4.0, "b", ">= 5")._asdict() == {
        "case": "x", "ours": 6.0, "baseline": 4.0, "baseline_name": "b", "unit": "s", "ratio": 1.5, "target": ">= 5",
        "met": True,
    }  # fmt: skip
    assert row("x", 6.0, "s", 4.0, "b", "<= 5").met is False
    assert row("x", 6.0, "s", 4.0, "b", "ratio <= 1.6").met is True
    assert row("x", 6.0, "s", 3.0, "b", "ratio <= 1.6").met is False
    assert row("x", 6.0, "s", None, "b").met is None


def test_a_document_has_the_benchmark_the_machine_and_the_rows() -> None:
    seen: list[Row] = []
    document = run_benchmark("test_bench:Fixed:ours=4", seen.append)
    assert document["bench"] == "test_bench:Fixed:ours=4" and "processor" in document["env"]
    assert [line["met"] for line in document["rows"]] == [False, None]
    assert [line._asdict() for line in seen] == document["rows"]


def test_the_command_prints_one_document_and_checks_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "test_bench:Fixed", "--json", "--check"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["ratio"] == 1.5
    assert "one: 6 pushes/s; theirs 4, ratio 1.5; >= 5: met" in captured.err
    assert main(["bench", "test_bench:Fixed:ours=4"]) == 0
    assert main(["bench", "test_bench:Fixed:ours=4", "--check"]) == CHECK_FAILED
    assert ">= 5: MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simlate", "unknown benchmark 'simlate'; nearest 'simulate'"),
        ("simulate:wrkers=3", "unknown setting 'wrkers'; nearest 'workers'"),
        ("simulate:workers=3", "workers: got 3, expected a number of workers >= few = 64"),
    ],
)
def test_a_wrong_name_or_setting_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(text)


def test_ledger_and_rule_are_measured_by_workers() -> None:
    document = run_benchmark("decide:many=8:pushes=20:repeats=1")
    rules = {name for name, _ in policies.items()}
    assert {line["case"].split(",")[0] for line in document["rows"]} == rules
    assert sum(line["target"] == "<= 8" for line in document["rows"]) == 4
    assert all(line["ours"] > 0 for line in document["rows"])


def test_the_update_is_measured_beside_torch_and_a_copy() -> None:
    rows = run_benchmark("update:parameters=70000:repeats=1")["rows"]
    assert [(line["unit"], line["target"]) for line in rows[:6]] == [
        ("ms", "ratio <= 1"), ("GB/s", "ratio >= 0.9"), ("ms", "ratio <= 1"), ("GB/s", "ratio >= 0.9"),
        ("ms", "ratio <= 1"), ("GB/s", "ratio >= 0.6"),
    ]  # fmt: skip
    assert len(rows) == 16 and all(line["ours"] > 0 and line["baseline"] > 0 for line in rows)


def test_adding_ahead_is_measured_for_what_it_saves_and_what_it_costs() -> None:
    rows = run_benchmark("ahead:sizes=[600000]:workers=[2]:repeats=3")["rows"]
    assert [line["case"].split(", ")[2] for line in rows] == ["step", "step and adding"]
    assert [line["target"] for line in rows] == ["ratio <= 0.85", None]
    assert rows[0]["ours"] < rows[1]["ours"] and rows[0]["baseline"] == rows[1]["baseline"] > 0


@pytest.mark.slow
def test_exact_discrepancy_is_measured_beside_a_step() -> None:
    rows = run_benchmark("tracker:rounds=2")["rows"]
    assert [line["case"].split(",")[0] for line in rows] == ["asynchronous", "synchronous"] * 2
    assert all(line["baseline"] > 0 for line in rows)


def test_the_simulator_is_measured_for_speed_and_for_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    document = run_benchmark("simulate:workers=32:few=8:pushes=300:repeats=1:rules=[stale_synchronous, first_k]")
    speed, growth = document["rows"][:8], document["rows"][8:]
    assert [line["target"] for line in speed] == [">= 30000", None] * 2 + [">= 5000", None] * 2
    assert [line["case"].split(",")[0] for line in growth] == ["stale_synchronous", "first_k:k=16"]
    assert [line["baseline_name"] for line in document["rows"]] == ["bare event loop"] * 8 + ["8 workers"] * 2
    assert all(line["ours"] > 0 and line["baseline"] > 0 for line in document["rows"])
    assert not list(tmp_path.iterdir())  # no run is kept


def test_every_rule_can_be_measured() -> None:
    document = run_benchmark("simulate:workers=4:few=4:pushes=40:repeats=1")
    rules = [line["case"].split(",")[0].split(":")[0] for line in document["rows"][8:]]
    assert rules == [name for name, _ in policies.items()]


MOST = {"asynchronous": (45, 120), "synchronous": (30, 84)}  # frames and calls: counts, so that no run is slower


def test_the_server_calls_no_more_for_a_small_push_than_it_did() -> None:
    rows = run_benchmark("calls:pushes=128")["rows"]
    found = {(line["case"], line["unit"]): line["ours"] for line in rows}
    for policy, (frames, calls) in MOST.items():
        case = f"{policy}, 16 parameters"
        assert found[case, "tensor calls/push"] <= 3
        assert found[case, "frames/push"] <= frames
        assert found[case, "calls/push"] <= calls
    targets = [line["target"] for line in rows if line["target"]]
    assert targets == ["<= 45", "<= 120", "<= 42", "<= 100"]
