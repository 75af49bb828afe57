"""What killed mpiruns leave among the temporary files, and that it keeps no job of ours from starting."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ps_elastic.cluster import launcher, leftovers, mpirun
from ps_elastic.cluster.environment import Mpi

HOST = os.uname().nodename.split(".")[0]


def left(folder: Path, number: int, host: str = HOST, age_s: float = 0.0) -> Path:
    """What an mpirun with this process id has in `folder` while it runs, and after it was killed."""
    session = folder / f"ompi.{number}"
    session.mkdir()
    file = session / f"pmix.{host}.tool"
    file.touch()
    os.utime(file, (file.stat().st_mtime - age_s,) * 2)
    return session


@pytest.fixture
def ended() -> int:
    """A process id that no process has."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_forsaken_are_those_whose_mpirun_runs_no_more(tmp_path, ended):
    dead = {left(tmp_path, ended), left(tmp_path, 10_000_000, host=f"{HOST}.domain")}
    left(tmp_path, os.getpid())
    assert leftovers.forsaken_folders(tmp_path) == dead


def test_a_process_that_began_later_is_not_the_mpirun(tmp_path):
    assert leftovers.forsaken_folders(tmp_path) == set()
    assert leftovers.forsaken_folders(left(tmp_path, os.getpid(), age_s=1e6).parent) == {
        tmp_path / f"ompi.{os.getpid()}"
    }


def test_another_hosts_and_other_folders_are_left_alone(tmp_path, ended):
    for number, host in enumerate(("elsewhere", f"{HOST}0", f"x{HOST}")):
        left(tmp_path, ended + 100_000 * number, host=host)
    (tmp_path / "ompi.mine").mkdir()
    (tmp_path / "ompi.mine" / f"pmix.{HOST}.tool").touch()
    (tmp_path / f"ompi.{ended}0").mkdir()
    assert leftovers.forsaken_folders(tmp_path) == set()


def test_remove_takes_all_that_is_in_a_folder_and_says_which(tmp_path, ended):
    session = left(tmp_path, ended)
    assert leftovers.remove_folder({session, tmp_path / "ompi.0"}) == [session]
    assert list(tmp_path.iterdir()) == []


def test_its_own_folder_is_there_inside_and_gone_afterwards(tmp_path):
    with leftovers.own_folder({"A": "b"}) as variables:
        folder = Path(variables[leftovers.BASE])
        left(folder, 1)
        assert variables["A"] == "b"
    assert not folder.exists()


def test_a_base_that_the_user_chose_is_kept(tmp_path):
    with leftovers.own_folder({leftovers.BASE: str(tmp_path)}) as variables:
        assert variables == {leftovers.BASE: str(tmp_path)}


def test_the_place_that_a_killed_launcher_made_is_forsaken(tmp_path):
    code = (
        "import os, signal; from ps_elastic.cluster import leftovers\n"
        "with leftovers.own_folder({}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60)
    assert leftovers.forsaken_folders(tmp_path) == set(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_place_that_a_living_launcher_made_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with leftovers.own_folder({}):
        assert len(list(tmp_path.iterdir())) == 1
        assert leftovers.forsaken_folders(tmp_path) == set()


@pytest.mark.mpi
def test_an_mpirun_starts_though_a_killed_one_had_its_process_id(tmp_path, mpi: Mpi):
    """The same command once without a place of its own, which fails as long as Open MPI is as it is."""
    if mpi.flavour != "openmpi":
        pytest.skip("only Open MPI keeps such folders")
    temporary, run_dir = tmp_path / "tmp", tmp_path / "run"
    temporary.mkdir()
    run_dir.mkdir()
    rank = [sys.executable, "-c", "print('started')"]
    haunted = f'mkdir "$TMPDIR/ompi.$$" && touch "$TMPDIR/ompi.$$/pmix.{os.uname().nodename}.tool" && exec "$@"'
    command = ["sh", "-c", haunted, "sh", *launcher.mpirun_command(mpi, 1, rank, cores=1)]
    variables = {**os.environ, **launcher.mpi_environment(mpi), "TMPDIR": str(temporary)}
    alone = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
    assert "listener thread failed to start" in alone.stdout + alone.stderr
    with open(tmp_path / "output", "w+") as output:
        ended = mpirun.run(command, variables, run_dir, output, subprocess.STDOUT, limit_s=100)
        output.seek(0)
        assert (ended.code, output.read()) == (0, "started\n")
