"""A real SLURM of two nodes on this machine: a training is submitted, told to stop, and read afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ps_elastic.cluster import doctor
from ps_elastic.cluster.environment import find_mpi
from ps_elastic.errors import PlatformError

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM_UP = REPOSITORY.parent / "shared" / "tools" / "slurm-up"
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes, which are taken down afterwards unless they were up before."""
    pytest.importorskip("sklearn")
    try:
        find_mpi()
    except PlatformError as error:
        pytest.skip(str(error))
    if not SLURM_UP.exists():
        pytest.skip(f"no {SLURM_UP}, which starts a SLURM")
    if os.geteuid() != 0:
        pytest.skip("starting a SLURM needs root")
    was_up = subprocess.run([SLURM_UP, "status"], capture_output=True, timeout=60).returncode == 0
    started = subprocess.run([SLURM_UP, "up", "-n", "2"], capture_output=True, text=True, timeout=400)
    if started.returncode != 0:
        pytest.skip(f"slurm-up: {started.stderr.strip()[-300:]}")
    yield
    if not was_up:
        subprocess.run([SLURM_UP, "down"], check=True, capture_output=True, timeout=120)


def submit(run_dir: Path, *overrides: str) -> int:
    command = [sys.executable, "-m", "ps_elastic", "submit", "configs/digits.yaml", *overrides, "--json"]
    size = ["--nodes", "2", "--tasks-per-node", "2", "--time", "00:10:00", "--run-dir", str(run_dir)]
    done = subprocess.run([*command, *size], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["job_id"])


def state(job_id: int) -> dict[str, str]:
    """What SLURM says of the job."""
    command = ["scontrol", "--oneliner", "show", "job", str(job_id)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)


def wait(job_id: int, limit_s: float = 240) -> dict[str, str]:
    """What SLURM says of the job when it has ended."""
    limit = time.monotonic() + limit_s
    while (job := state(job_id))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        if time.monotonic() > limit:
            subprocess.run(["scancel", str(job_id)], timeout=30)
            raise AssertionError(f"job {job_id} did not end within {limit_s} s: {job}")
        time.sleep(0.5)
    return job


def output(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("slurm-*.out"))


def test_a_submitted_training_runs_on_two_nodes_and_ends_with_its_summary(cluster, tmp_path):
    run_dir = tmp_path / "a run"
    job = wait(submit(run_dir, "train.samples=20000"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["exit"], summary["workers"]) == (0, 3)
    assert {path.name for path in (run_dir / "metrics").iterdir()} == {f"rank-00{rank}.jsonl" for rank in range(4)}


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_job_that_is_told_to_stop_ends_with_the_code_of_its_run(cluster, tmp_path, signal):
    job_id = submit(tmp_path, "train.samples=1000000000")
    events = tmp_path / "events.jsonl"
    limit = time.monotonic() + 120
    while not (events.exists() and events.stat().st_size > 1000):
        assert state(job_id)["JobState"] in ("PENDING", "RUNNING"), output(tmp_path)
        assert time.monotonic() < limit, output(tmp_path)
        time.sleep(0.5)
    subprocess.run(["scancel", "--batch", f"--signal={signal}", str(job_id)], check=True, timeout=30)
    job = wait(job_id)
    summary = json.loads((tmp_path / "summary.json").read_text())
    # SIGUSR1 alone is the end of the time: 75 where a checkpoint was written, else 130.
    assert summary["exit"] in ((75, 130) if signal == "USR1" else (130,)), output(tmp_path)
    assert (tmp_path / "interrupt").exists() == (signal == "TERM")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", f"{summary['exit']}:0")


def batch(tmp_path: Path, line: str) -> tuple[int, str]:
    """Run one line as a job of two nodes with two tasks each; its exit code and what it said."""
    said = tmp_path / "said"
    size = ["--nodes=2", "--ntasks-per-node=2", "--time=00:05:00", f"--chdir={REPOSITORY}", f"--output={said}"]
    done = subprocess.run(["sbatch", "--wait", *size, "--wrap", line], capture_output=True, timeout=240)
    return done.returncode, said.read_text()


def test_launch_in_an_allocation_uses_its_nodes(cluster, tmp_path):
    run_dir = tmp_path / "run"
    train = f"configs/digits.yaml train.samples=20000 --run-dir {run_dir}"
    code, said = batch(tmp_path, f"{sys.executable} -m ps_elastic launch -n 4 {train}")
    assert code == 0, said
    assert "4 ranks in SLURM job" in said
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["exit"], summary["workers"]) == (0, 3)


def test_srun_that_splits_the_world_is_refused_with_exit_3(cluster, tmp_path):
    train = f"train configs/digits.yaml --run-dir {tmp_path / 'run'}"
    before = doctor.unmapped(doctor.SHM)
    code, said = batch(tmp_path, f"srun {sys.executable} -m ps_elastic {train}")
    for segment in doctor.unmapped(doctor.SHM) - before:  # Open MPI leaves one of each rank that is alone
        segment.unlink()
    assert code == 3, said
    assert "the launcher started 4 ranks and MPI sees 1" in said
    assert not (tmp_path / "run").exists()
