"""How a run's folder begins, and what it says of the run's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ps_elastic.errors import ConfigError
from ps_elastic.records import run_dir


def test_a_run_gets_a_folder_of_its_name_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_dir.new_run_dir("digits", None)
    assert folder.parent == tmp_path / "runs"
    assert folder.is_dir()
    name, stamp = folder.name.rsplit("-", 1)
    assert name == "digits"
    assert len(stamp) == len("20260102T030405Z")
    assert stamp[8] == "T"
    assert stamp.endswith("Z")


def test_runs_of_the_same_second_get_numbers(tmp_path):
    stem = tmp_path / "runs" / "digits-20260102T030405Z"
    made = [run_dir._make_unique(stem) for _ in range(3)]
    assert [path.name for path in made] == [stem.name, f"{stem.name}-2", f"{stem.name}-3"]


def test_a_given_folder_is_made_or_taken_if_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert run_dir.new_run_dir("digits", str(folder)) == folder
    assert run_dir.new_run_dir("digits", str(folder)) == folder


def test_a_folder_with_a_run_in_it_is_refused_with_exit_2(tmp_path):
    (tmp_path / "summary.json").touch()
    with pytest.raises(ConfigError, match=r"--run-dir: this folder is not empty \(it holds summary\.json\)") as caught:
        run_dir.new_run_dir("digits", str(tmp_path))
    assert caught.value.exit_code == 2
    assert caught.value.source == str(tmp_path)


def test_what_submit_leaves_for_its_job_does_not_count(tmp_path):
    for name in ("job.sbatch", "slurm-12.out"):
        (tmp_path / name).touch()
    assert run_dir.new_run_dir("digits", str(tmp_path)) == tmp_path


def test_a_file_or_a_folder_inside_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for given in ("file", "file/inside"):
        with pytest.raises(ConfigError, match="cannot make this folder"):
            run_dir.new_run_dir("digits", str(tmp_path / given))


def test_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        run_dir.new_run_dir("digits", str(tmp_path))


def test_the_summary_decides_whatever_mpirun_says(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"exit": 75}))
    assert run_dir.outcome(tmp_path, 0) == run_dir.outcome(tmp_path, 1, interrupted=True) == (75, None)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"exit": null}'])
def test_success_without_a_summary_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    ending = run_dir.outcome(tmp_path, 0)
    assert ending.exit == 1
    assert "left no summary.json" in ending.message


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 75, 130])
def test_our_own_codes_pass(tmp_path, code):
    assert run_dir.outcome(tmp_path, code) == (code, None)


@pytest.mark.parametrize("code", [137, -9, 9])  # Open MPI, mpirun itself, MPICH
def test_a_killed_rank_is_a_lost_worker(tmp_path, code):
    assert run_dir.outcome(tmp_path, code) == (5, "a rank was killed by SIGKILL")


def test_other_codes_are_errors_and_an_interruption_is_one(tmp_path):
    assert run_dir.outcome(tmp_path, 42).exit == 1
    assert run_dir.outcome(tmp_path, 1, interrupted=True).exit == 130


def test_a_batch_script_ends_with_the_code_of_its_run(tmp_path):
    command = [sys.executable, "-m", "ps_elastic.records.run_dir", str(tmp_path)]
    (tmp_path / "summary.json").write_text('{"exit": 6}')
    assert subprocess.run([*command, "0"], timeout=30).returncode == 6
    (tmp_path / "summary.json").unlink()
    done = subprocess.run([*command, "0"], timeout=30, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ps-elastic: mpirun ended with 0")
