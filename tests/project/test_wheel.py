"""The wheel, installed in an environment of its own outside the repository, does what the checkout does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "task: {name: quadratic, batch_size: 1, noise: 1.0}\noptimizer: {lr: 0.02}\ntrain: {samples: 60}\n"
pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `ps-elastic ARGUMENTS` as the wheel installed it, in a folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = folder / "source"  # a copy: building leaves folders behind
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if name.startswith("ps_elastic/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=200)
    shutil.rmtree(source)
    (wheel,) = folder.glob("ps_elastic-*.whl")

    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet", "--no-deps", "--no-index",
         str(wheel)],
        check=True, timeout=200,
    )  # fmt: skip
    # What it requires is found where these tests found it; .pth files there, as that of a checkout, are not read.
    (packages / "required.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (folder / "work").mkdir()
    (folder / "work" / "config.yaml").write_text(CONFIG)
    around = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def ps_elastic(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "ps-elastic"), *arguments]
        return subprocess.run(command, cwd=folder / "work", env=around, capture_output=True, text=True, timeout=120)

    where = subprocess.run(
        [str(environment / "bin" / "python"), "-c", "import ps_elastic; print(ps_elastic.__file__)"],
        cwd=folder, env=around, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(environment)
    return ps_elastic


def test_it_trains_in_one_process(run: Run) -> None:
    done = run("train", "--in-process", "--workers", "2", "config.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 60


@pytest.mark.mpi
@pytest.mark.usefixtures("mpi")
def test_it_launches_a_job(run: Run) -> None:
    done = run("launch", "-n", "3", "config.yaml", "--run-dir", "launched")
    assert done.returncode == 0, done.stderr


def test_it_writes_a_batch_script(run: Run) -> None:
    done = run("submit", "config.yaml", "--nodes", "1", "--tasks-per-node", "3", "--time", "10", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in done.stdout


@pytest.mark.parametrize("kind", ["policies", "compressors", "tasks", "updates", "benchmarks"])
def test_it_lists_what_there_is(run: Run, kind: str) -> None:
    done = run("list", kind, "--json")
    assert done.returncode == 0, done.stderr
    here = subprocess.run(
        [sys.executable, "-m", "ps_elastic", "list", kind, "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads(here.stdout)
