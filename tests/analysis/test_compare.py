"""`ps-elastic compare` with a launcher that writes summaries instead of training."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_folder import Reader

from ps_elastic.analysis.compare.fields import CELL, DOCUMENT, ROW
from ps_elastic.analysis.compare.plan import Comparison, folder_names, plan, split
from ps_elastic.analysis.compare.session import Session, reason
from ps_elastic.analysis.compare.statistics import recommend, rows
from ps_elastic.cli import main
from ps_elastic.cli.compare import perform, working
from ps_elastic.errors import ConfigError, Interrupted, PlatformError
from ps_elastic.plugins import parse_one_line

POLICIES = ("synchronous", "stale_synchronous:bound=4")
COMPRESSORS = ("identity", "top_k:ratio=0.01")


def resolve(overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration that knows two policies and believes everything else."""
    config: dict[str, Any] = {"seed": 0, "policy": "synchronous", "compressor": "identity", "train": {"samples": 100}}
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "policy" and value not in POLICIES:
            raise ConfigError(f"unknown policy '{value}'", key="policy.name")
        if key == "train.samples":
            config["train"] = {"samples": int(value)}
        else:
            config[key] = int(value) if key == "seed" else value
    name, settings = parse_one_line(config["policy"])
    return config | {"policy": {"name": name, **{key: int(value) for key, value in settings.items()}}}


def asked(*overrides: str, seeds: int = 1, **changes: Any) -> Comparison:
    choice: dict[str, Any] = {"workers": 3, "policies": POLICIES, "compressors": COMPRESSORS} | changes
    return plan("digits.yaml", resolve(overrides), overrides, resolve, seeds=seeds, **choice)


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "wall_s": 2.0,
        "samples": 100,
        "dropped": 3,
        "bytes_up": 1000,
        "bytes_down": 4000,
        "staleness": {"mean": 1.5, "max": 4},
        "discrepancy": {"rms": 0.5, "max": 2.0},
        "wait_share": {"1": 0.1, "2": 0.2, "3": 0.3},
        "metrics": {"loss": 0.2, "accuracy": 0.95},
        "time_to_target_s": None,
        "exit": 0,
    } | changes


class FakeLauncher:
    """Takes run_job's arguments, notes them, and does what `behave(overrides, run_dir)` does."""

    def __init__(self, behave: Callable[[Sequence[str], Path], int] | None = None) -> None:
        self.behave = behave or (lambda overrides, run_dir: write_summary(run_dir))
        self.calls: list[tuple[str, int, tuple[str, ...], Path]] = []

    def __call__(
        self, config: str, ranks: int, overrides: Sequence[str], run_dir: Path, *, stdout: Any, stderr: Any
    ) -> int:
        self.calls.append((config, ranks, tuple(overrides), run_dir))
        assert not run_dir.exists() or not any(run_dir.iterdir()), "a run refuses a folder with anything in it"
        stdout.write(b"rank 0: started\nrank 2: the last words\n\n")
        stdout.flush()
        return self.behave(overrides, run_dir)


def write_summary(run_dir: Path, **changes: Any) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.json").write_text(json.dumps(summary(**changes)))
    return 0


def session(out: Path, run: FakeLauncher, comparison: Comparison | None = None) -> Session:
    return Session(comparison or asked(), out, resolve, run, {"ps_elastic": "1"})


def document(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


# What is asked for


def test_lists_are_split_at_commas_and_a_comma_in_a_value_is_refused_by_name() -> None:
    assert split("--policies", "synchronous, my.rules:Mine:bound=3") == ("synchronous", "my.rules:Mine:bound=3")
    with pytest.raises(ConfigError, match=r"--policies: expected names .* got '2' .*cannot be part of a value"):
        split("--policies", "a:milestones=1,2")
    with pytest.raises(ConfigError, match="got ''"):
        split("--policies", "synchronous,")
    with pytest.raises(ConfigError, match="'a' is named 2 times"):
        split("--policies", "a,b,a")


def test_cells_are_every_pair_with_the_seed_slowest_and_added_to_the_configurations() -> None:
    cells = asked("seed=7", seeds=2).cells
    assert [(cell.policy, cell.compressor) for cell in cells[:4]] == [(p, c) for p in POLICIES for c in COMPRESSORS]
    assert [cell.seed for cell in cells] == [7] * 4 + [8] * 4
    assert cells[3].folder == "cells/stale_synchronous-bound=4/top_k-ratio=0.01/seed-7"
    assert cells[3].overrides == ("seed=7", f"policy={POLICIES[1]}", f"compressor={COMPRESSORS[1]}", "seed=7")
    assert len({cell.digest for cell in cells}) == 8


def test_folder_names_are_safe_and_unique() -> None:
    forms = ("a:b=c", "a-b=c", "A:b=c", "x:path=../../etc", "y" * 300)
    names = folder_names(forms)
    assert len({name.casefold() for name in names.values()}) == len(forms)
    assert all("/" not in name and len(name) <= 100 for name in names.values())
    assert names["x:path=../../etc"] == "x-path=.._.._etc"
    assert folder_names(forms[:1]) == {"a:b=c": "a-b=c"}
    assert len({name.casefold() for name in folder_names(("a:b=c", "a:b=C")).values()}) == 2  # on any file system


def test_what_is_varied_cannot_be_overridden() -> None:
    for override in ("policy=synchronous", "policy.bound=4", "compressor.ratio=0.1"):
        with pytest.raises(ConfigError, match="use --policies and --compressors"):
            asked(override)


def test_unknown_policy_is_named_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'synchronus'"):
        asked(policies=("synchronous", "synchronus"))


def test_two_forms_of_the_same_run_are_refused() -> None:
    def blind(overrides: Sequence[str]) -> dict[str, Any]:
        return {"seed": [override for override in overrides if override.startswith("seed=")]}

    with pytest.raises(ConfigError, match="'a, c, seed 0' and 'a:bound=4, c, seed 0' are the same run"):
        plan("x", {"seed": 0}, (), blind, workers=3, policies=("a", "a:bound=4"), compressors=("c",), seeds=1)


# Running


def test_every_cell_runs_once_in_order_through_the_launcher(tmp_path: Path) -> None:
    run = FakeLauncher()
    assert perform(session(tmp_path / "out", run), as_json=False) == 0
    cells = asked().cells
    assert run.calls == [("digits.yaml", 4, cell.overrides, tmp_path / "out" / cell.folder) for cell in cells]
    assert (tmp_path / "out" / cells[0].folder / "output.log").read_text().startswith("rank 0: started")


def test_document_is_written_after_every_cell(tmp_path: Path) -> None:
    seen = []

    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        seen.append(len(document(tmp_path)["cells"]))
        return write_summary(run_dir)

    perform(session(tmp_path, FakeLauncher(behave)), as_json=False)
    assert seen == [0, 1, 2, 3]
    assert not list(tmp_path.glob("*.part"))


def test_failed_cell_is_named_with_its_code_and_log_and_the_others_run(tmp_path: Path, capfd: Any) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        return 4 if f"policy={POLICIES[1]}" in overrides else write_summary(run_dir)

    assert perform(session(tmp_path, FakeLauncher(behave)), as_json=False) == 4
    out, err = capfd.readouterr()
    log = tmp_path / asked().cells[2].folder / "output.log"
    assert f"[3/4] {POLICIES[1]}, identity, seed 0: failed with exit 4: rank 2: the last words (see {log})" in err
    assert log.exists() and "synchronous" in out and "95.00%" in out
    assert [(entry["status"], entry["exit"]) for entry in document(tmp_path)["cells"]] == [
        ("done", 0),
        ("done", 0),
        ("failed", 4),
        ("failed", 4),
    ]
    assert len(document(tmp_path)["rows"]) == 2


MPIRUN = "------------\nprterun has exited due to process rank 0 calling\nabort.\n------------\n\0\n"
TRACEBACK = 'rank 2: Traceback (most recent call last):\n  File "task.py", line 3\n    oops\nValueError: oops'


@pytest.mark.parametrize(
    "error, log, told",
    [
        (TRACEBACK, MPIRUN, "rank 2: ValueError: oops"),
        ("rank 1: gradient is not finite", MPIRUN, "rank 1: gradient is not finite"),
        (None, f"step 1\nps-elastic: rank 1: no file\n  detail\n{MPIRUN}", "rank 1: no file"),
        (None, f"ps-elastic: {TRACEBACK}\n{MPIRUN}", "rank 2: ValueError: oops"),
        (None, "mpirun: not enough slots\n-----\n\0\n", "mpirun: not enough slots"),
        (None, "", ""),
    ],
)
def test_reason_of_a_failure_is_its_own_message_and_not_the_launchers(
    tmp_path: Path, error: str | None, log: str, told: str
) -> None:
    (tmp_path / "output.log").write_text(log)
    failed = {"summary": error and {"error": error}, "log": "output.log"}
    assert reason(failed, tmp_path) == told
    (tmp_path / "output.log").unlink()
    assert reason({"summary": None, "log": "output.log"}, tmp_path) == ""


def test_exit_code_is_the_first_failures(tmp_path: Path) -> None:
    codes = iter([0, 5, 4, 0])

    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        write_summary(run_dir)
        return next(codes)

    assert perform(session(tmp_path, FakeLauncher(behave)), as_json=False) == 5


@pytest.mark.parametrize("left_behind", [None, '{"exit": 0, "wal', '{"exit": 4}', '{"wall_s": 1}'])
def test_a_run_that_ends_with_0_but_no_good_summary_has_failed(tmp_path: Path, left_behind: str | None) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        if left_behind is not None:
            run_dir.mkdir(parents=True)
            (run_dir / "summary.json").write_text(left_behind)
        return 0

    assert perform(session(tmp_path, FakeLauncher(behave)), as_json=False) == (4 if left_behind == '{"exit": 4}' else 1)
    assert {entry["status"] for entry in document(tmp_path)["cells"]} == {"failed"}


def test_finished_cells_are_kept_and_failed_ones_run_again_in_a_clean_folder(tmp_path: Path) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        write_summary(run_dir)
        return 1 if f"policy={POLICIES[1]}" in overrides else 0

    perform(session(tmp_path, FakeLauncher(behave)), as_json=False)
    kept = document(tmp_path)["cells"][:2]
    again = FakeLauncher()
    assert perform(session(tmp_path, again), as_json=False) == 0
    assert [call[2] for call in again.calls] == [cell.overrides for cell in asked().cells[2:]]
    assert document(tmp_path)["cells"][:2] == kept
    failed = tmp_path / asked().cells[2].folder
    assert (failed.with_name("seed-0.aside-1") / "output.log").exists()
    third = FakeLauncher()
    assert perform(session(tmp_path, third), as_json=False) == 0 and not third.calls


def test_a_finished_cell_whose_summary_is_gone_runs_again(tmp_path: Path) -> None:
    perform(session(tmp_path, FakeLauncher()), as_json=False)
    (tmp_path / asked().cells[1].folder / "summary.json").unlink()
    again = FakeLauncher()
    perform(session(tmp_path, again), as_json=False)
    assert [call[2] for call in again.calls] == [asked().cells[1].overrides]


def test_a_finished_cell_whose_configuration_resolves_to_something_else_runs_again(tmp_path: Path) -> None:
    perform(session(tmp_path, FakeLauncher()), as_json=False)

    def with_new_default(overrides: Sequence[str]) -> dict[str, Any]:
        config = resolve(overrides)
        return config | {"bound": 5} if config["policy"]["name"] == "stale_synchronous" else config

    changed = plan(
        "digits.yaml", resolve(()), (), with_new_default, workers=3, policies=POLICIES, compressors=COMPRESSORS, seeds=1
    )
    again = FakeLauncher()
    perform(Session(changed, tmp_path, with_new_default, again, {}), as_json=False)
    assert [call[2] for call in again.calls] == [cell.overrides for cell in changed.cells[2:]]


def test_a_killed_comparison_leaves_a_partial_cell_that_is_moved_aside(tmp_path: Path) -> None:
    session(tmp_path, FakeLauncher()).open()
    partial = tmp_path / asked().cells[0].folder
    partial.mkdir(parents=True)
    (partial / "config.yaml").write_text("seed: 0\n")
    partial.with_name("seed-0.log").write_text("half a line")
    run = FakeLauncher()
    assert perform(session(tmp_path, run), as_json=False) == 0 and len(run.calls) == 4
    aside = partial.with_name("seed-0.aside-1")
    assert sorted(path.name for path in aside.iterdir()) == ["config.yaml", "output.log"]
    assert (aside / "output.log").read_text() == "half a line"


@pytest.mark.parametrize(
    "other, named",
    [
        ({"overrides": ("train.samples=200",)}, r"config\.train\.samples: 100 there, 200 here"),
        ({"overrides": ("seed=3",)}, r"config\.seed: 0 there, 3 here"),
        ({"policies": ("synchronous",)}, r'policies: \["synchronous", .* there, \["synchronous"\] here'),
        ({"seeds": 2}, r"seeds: \[0\] there, \[0, 1\] here"),
        ({"workers": 2}, "workers: 3 there, 2 here"),
    ],
)
def test_folder_of_another_comparison_is_refused_by_the_difference(tmp_path: Path, other: Any, named: str) -> None:
    perform(session(tmp_path, FakeLauncher()), as_json=False)
    before = (tmp_path / "comparison.json").read_text()
    run = FakeLauncher()
    other = dict(other)
    with pytest.raises(ConfigError, match=f"holds another comparison: {named}"):
        session(tmp_path, run, asked(*other.pop("overrides", ()), **other)).open()
    assert not run.calls and (tmp_path / "comparison.json").read_text() == before


def test_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"not empty and holds no comparison\.json"):
        session(tmp_path, FakeLauncher()).open()
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match="not a JSON document"):
        session(tmp_path, FakeLauncher()).open()


def test_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out: cannot write there: .*Not a directory"):
        session(tmp_path / "file" / "out", FakeLauncher()).open()


@pytest.mark.parametrize("how", [KeyboardInterrupt(), Interrupted("Ctrl-C"), 130, 75])
def test_interrupt_ends_it_with_the_table_of_what_is_finished(tmp_path: Path, capfd: Any, how: Any) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        if f"compressor={COMPRESSORS[1]}" not in overrides:
            return write_summary(run_dir)
        if isinstance(how, int):
            return how
        raise how

    run = FakeLauncher(behave)
    assert perform(session(tmp_path, run), as_json=False) == (75 if how == 75 else 130)
    out, err = capfd.readouterr()
    assert len(run.calls) == 2 and "95.00%" in out and "[2/4]" in err and "interrupted with exit" in err
    assert [entry["status"] for entry in document(tmp_path)["cells"]] == ["done", "failed"]
    again = FakeLauncher()
    assert perform(session(tmp_path, again), as_json=False) == 0 and len(again.calls) == 3


def test_unusable_environment_is_raised_and_finished_cells_stay(tmp_path: Path) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        if f"compressor={COMPRESSORS[1]}" in overrides:
            raise PlatformError("no mpirun")
        return write_summary(run_dir)

    with pytest.raises(PlatformError):
        perform(session(tmp_path, FakeLauncher(behave)), as_json=False)
    assert [entry["status"] for entry in document(tmp_path)["cells"]] == ["done"]


def test_configuration_that_changes_while_it_runs_is_refused(tmp_path: Path) -> None:
    run = FakeLauncher()
    moving = session(tmp_path, run)
    moving.open()
    moving.execute(asked().cells[0])
    moving.resolve = lambda overrides: resolve(overrides) | {"train": {"samples": 999}}
    with pytest.raises(ConfigError, match=r"digits\.yaml: the configuration changed"):
        moving.execute(asked().cells[1])
    assert len(run.calls) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_cell_at_work_is_shown_by_name_with_the_time_elapsed_on_a_terminal(terminal: bool) -> None:
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with working(screen, "[1/4] synchronous, identity, seed 0"):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())  # type: ignore[attr-defined]
    assert "[1/4] synchronous, identity, seed 0" in shown
    assert ("0:00:00" in shown) is terminal


# The command

CONFIG = "task: {name: quadratic}\npolicy: {name: stale_synchronous, bound: 9}\n"


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    """The current folder holds a configuration, and the command gets this launcher."""
    (tmp_path / "q.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    fake = FakeLauncher()
    monkeypatch.setattr("ps_elastic.cluster.launcher.run_job", fake)
    monkeypatch.setattr("ps_elastic.cluster.launcher.describe", lambda ranks, threads: f"{ranks} ranks")
    return fake


def test_command_runs_the_cells_into_a_new_folder_and_a_second_one_into_another(
    launched: FakeLauncher, capfd: Any
) -> None:
    line = ["compare", "q.yaml", "--policies", "asynchronous,first_k:k=2", "--compressors", "top_k:ratio=0.5", "--json"]
    assert main(line) == 0 and main(line) == 0
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("compare-quadratic-") for folder in folders)
    assert [call[2][:2] for call in launched.calls[:2]] == [
        ("policy=asynchronous", "compressor=top_k:ratio=0.5"),
        ("policy=first_k:k=2", "compressor=top_k:ratio=0.5"),
    ]
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_command_without_lists_takes_the_configurations_own(launched: FakeLauncher) -> None:
    assert main(["compare", "q.yaml", "seed=5", "--workers", "2", "--out", "o"]) == 0
    assert launched.calls == [
        ("q.yaml", 3, ("seed=5", "policy=stale_synchronous:bound=9", "compressor=identity", "seed=5"),
         Path("o/cells/stale_synchronous-bound=9/identity/seed-5"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line, said",
    [
        (["--policies", "asynchronous,synchronus"], "policy.name: unknown policy 'synchronus'; nearest 'synchronous'"),
        (["--policies", "stale_synchronous:bond=3"], "policy.bond: unknown"),
        (["--policies", "stale_synchronous:bound=-1"], "policy.bound: got -1"),
        (["--policies", "stale_synchronous,stale_synchronous:bound=9"], "are the same run"),
        (["--policies", "first_k:k=4"], "--workers: first_k:k=4 needs 4 workers, got 3"),
        (["--compressors", "identity,top_k:ratio=2"], "compressor.ratio: got 2"),
        (["train.sample=5"], "train.sample: unknown"),
        (["policy.bound=2"], "policy.bound=2: this is what a comparison varies"),
        (["--policies", "my.rules:Mine"], "no module 'my"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_command_names_what_is_wrong_before_anything_runs(
    launched: FakeLauncher, capfd: Any, line: list[str], said: str
) -> None:
    assert main(["compare", "q.yaml", *line]) == 2
    captured = capfd.readouterr()
    assert said in captured.err and captured.out == ""
    assert not launched.calls and not Path("runs").exists()


# The document


def test_json_is_one_document_on_stdout_and_the_same_as_the_file(tmp_path: Path, capfd: Any) -> None:
    assert perform(session(tmp_path, FakeLauncher()), as_json=True) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found == document(tmp_path)
    assert "[4/4]" in err and "95.00%" in err
    assert found["baseline"] == {"policy": "synchronous", "compressor": "identity"}
    assert found["seeds"] == [0] and found["versions"] == {"ps_elastic": "1"} and found["workers"] == 3
    cell = found["cells"][3]
    assert cell["run_dir"] == "cells/stale_synchronous-bound=4/top_k-ratio=0.01/seed-0"
    assert (cell["policy"], cell["compressor"], cell["seed"], cell["status"]) == (
        *[POLICIES[1], COMPRESSORS[1]],
        0,
        "done",
    )
    assert cell["summary"] == summary()


def test_csv_has_a_line_for_each_row_with_dotted_figures_flattened(tmp_path: Path) -> None:
    perform(session(tmp_path, FakeLauncher(), asked(seeds=2)), as_json=False)
    with open(tmp_path / "comparison.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["policy"], line["compressor"]) for line in lines] == [(p, c) for p in POLICIES for c in COMPRESSORS]
    assert lines[0]["seeds"] == "0 1" and float(lines[0]["accuracy_mean"]) == 0.95
    assert lines[0]["time_to_target_s"] == "" and float(lines[0]["discrepancy_max"]) == 2.0


def entry(policy: str, seed: int, status: str = "done", **changes: Any) -> dict[str, Any]:
    return {"policy": policy, "compressor": "c", "seed": seed, "status": status, "summary": summary(**changes)}


def of_accuracy(policy: str, *accuracies: float, **changes: Any) -> list[dict[str, Any]]:
    return [
        entry(policy, seed, metrics={"loss": 1.0, "accuracy": accuracy}, **changes)
        for seed, accuracy in enumerate(accuracies)
    ]


BASELINE = {"policy": "a", "compressor": "c"}


def test_row_of_several_seeds_averages_what_is_an_average_and_keeps_the_largest_of_what_is_a_maximum() -> None:
    cells = [
        entry("a", 0, discrepancy={"rms": 3.0, "max": 9.0}, staleness={"mean": 1, "max": 2}, wait_share={"1": 0.2}),
        entry("a", 1, discrepancy={"rms": 4.0, "max": 5.0}, staleness={"mean": 2, "max": 7}, wait_share={"1": 0.4}),
        entry("a", 2, status="failed", wall_s=1e9),
    ]
    (row,) = rows(cells, BASELINE)
    assert row["seeds"] == [0, 1]
    assert row["discrepancy"] == {"rms": pytest.approx(12.5**0.5), "max": 9.0}
    assert row["staleness"] == {"mean": 1.5, "max": 7}
    assert row["wait_share"] == pytest.approx(0.3) and row["wall_s"] == 2.0
    assert row["accuracy"] == {"mean": pytest.approx(0.95), "sd": pytest.approx(0)}


def test_figure_that_one_seed_lacks_is_null() -> None:
    (row,) = rows([entry("a", 0, time_to_target_s=4.0), entry("a", 1)], BASELINE)
    assert row["time_to_target_s"] is None
    (row,) = rows(
        [entry("a", 0, metrics={}, discrepancy=None, staleness=None, wait_share=None, dropped=None)], BASELINE
    )
    assert row["accuracy"] == {"mean": None, "sd": None} and row["discrepancy"] == {"rms": None, "max": None}
    assert row["dropped"] is None and row["wait_share"] is None and row["diff"]["mean"] is None


def test_difference_is_paired_by_seed_and_its_interval_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, base = (0.91, 0.95, 0.90, 0.97), (0.90, 0.93, 0.91, 0.93)
    row = rows([*of_accuracy("a", *base), *of_accuracy("b", *ours)], BASELINE)[1]
    interval = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert row["diff"]["mean"] == pytest.approx(statistics.fmean(ours) - statistics.fmean(base))
    assert (row["diff"]["low"], row["diff"]["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_difference_uses_the_seeds_that_both_finished() -> None:
    row = rows([*of_accuracy("a", 0.5)[:1], *of_accuracy("b", 0.7, 0.1)], BASELINE)[1]
    assert row["diff"] == {"mean": pytest.approx(0.2), "low": None, "high": None}


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 99, 1000])
def test_the_interval_holds_95_percent_of_students_distribution(freedom: int) -> None:
    """t with P(|T| < t) = 0.95 by sums of powers of cosines: Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    ours = [0.5 + 0.01 * (seed % 7) for seed in range(freedom + 1)]
    diff = rows([*of_accuracy("a", *[0.5] * len(ours)), *of_accuracy("b", *ours)], BASELINE)[1]["diff"]
    t = (diff["high"] - diff["mean"]) / (statistics.stdev(ours) / math.sqrt(len(ours)))
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term = math.cos(angle) ** odd
    total = term if freedom > 1 else 0.0
    for power in range(odd + 2, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    assert (2 / math.pi * (angle + total) if odd else total) == pytest.approx(0.95, rel=1e-9)
    assert diff["mean"] - diff["low"] == pytest.approx(diff["high"] - diff["mean"])


def test_several_seeds_without_scipy_are_refused_before_anything_runs(
    launched: FakeLauncher, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ps_elastic.analysis.compare.statistics.find_spec", lambda name: None)
    assert main(["compare", "q.yaml", "--seeds", "2"]) == 3
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "needs scipy" in said and "ps_elastic[statistics]" in said
    assert not launched.calls and not Path("runs").exists()
    assert main(["compare", "q.yaml", "--json"]) == 0 and len(launched.calls) == 1


def test_recommendation_is_the_fastest_within_a_point_of_the_best() -> None:
    cells = [
        *of_accuracy("a", 0.960, wall_s=9.0),
        *of_accuracy("b", 0.955, wall_s=3.0),
        *of_accuracy("c", 0.940, wall_s=1.0),
    ]
    found = recommend(rows(cells, BASELINE), 3, seeds=[0])
    assert (found["policy"], found["compressor"]) == ("b", "c")
    assert "95.50% in 3.0 s" in found["text"] and "96.00% in 9.0 s" in found["text"]
    assert found["text"].endswith("no statistic.")


def test_recommendation_leaves_out_rows_that_miss_a_seed_or_an_accuracy() -> None:
    cells = [*of_accuracy("a", 0.9, 0.9, wall_s=5.0), *of_accuracy("b", 0.99)]
    found = recommend(rows(cells, BASELINE), 2, seeds=[0, 1])
    assert found["policy"] == "a" and found["text"].endswith("Of 2 pairs, 1 did not finish and took no part.")
    nothing = recommend(rows([entry("a", 0, metrics={"loss": 1.0, "accuracy": None})], BASELINE), 1, seeds=[0])
    assert nothing["policy"] is None and nothing["text"].startswith("No recommendation")


def test_figures_that_are_not_numbers_of_json_become_null(tmp_path: Path) -> None:
    def behave(overrides: Sequence[str], run_dir: Path) -> int:
        return write_summary(run_dir, metrics={"loss": float("nan"), "accuracy": 0.1})

    perform(session(tmp_path, FakeLauncher(behave)), as_json=False)
    text = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in text and json.loads(text)["rows"][0]["loss"]["mean"] is None


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_field_of_a_comparison_is_described(tmp_path: Path, seeds: int) -> None:
    assert perform(session(tmp_path, FakeLauncher(), asked(seeds=seeds)), as_json=False) == 0
    made, reader = document(tmp_path), Reader()
    reader.record("comparison.json", "", DOCUMENT, made)
    for cell in made["cells"]:
        reader.record("comparison.json", "cells", CELL, cell)
    for row in made["rows"]:
        reader.record("comparison.json", "rows", ROW, row)
    assert reader.wrong == []
    columns = (tmp_path / "comparison.csv").read_text().split("\n")[0].split(",")
    assert columns == [field.name.replace(".", "_") for field in ROW]


def test_a_discrepancy_to_another_model_is_marked_and_the_mark_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(overrides: Sequence[str]) -> dict[str, Any]:
        policy = next(text.partition("=")[2] for text in overrides if text.startswith("policy="))
        return {"seed": 0, "overrides": list(overrides), "policy": {"name": policy}}

    both = plan(
        "x", {"seed": 0}, (), late, workers=3, policies=("synchronous", "norm_bounded"), compressors=("c",), seeds=1
    )
    perform(Session(both, tmp_path, late, FakeLauncher(), {}), as_json=False)
    assert [row["discrepancy_of"] for row in document(tmp_path)["rows"]] == ["srv", "ideal"]
    marked = [line for line in capsys.readouterr().out.splitlines() if "*" in line]
    assert len(marked) == 2 and "norm_bounded" in marked[0] and "*0.5 / 2" in marked[0]
    assert marked[1].startswith("* D is to the server model including late gradients")
    perform(session(tmp_path / "unmarked", FakeLauncher()), as_json=False)
    assert "*" not in capsys.readouterr().out
