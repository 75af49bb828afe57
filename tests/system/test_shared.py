"""Windows of shared memory: refused by name where they cannot be, and nothing of them stays whatever ends a job."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TRAIN, Job, Several

from ps_elastic.cluster import leftovers
from ps_elastic.cluster.environment import Mpi

pytestmark = pytest.mark.mpi

WORKERS = 2
FLOATS = 200_000
SHARED_STEPS = ("task.floats=1000000",)  # so many that workers take part in the steps
REFUSED = {
    "another host": ({"apart": "2"}, 2, "transport: got shared, but ranks [2] are on other hosts than the server"),
    "too little room": ({"room": 10_000_000}, 3, "transport: shared, but shared windows need 20 MB in /dev/shm, which"),
    "no room at all": ({"room": 0}, 3, "has 0 MB"),
}


@pytest.fixture(scope="module")
def refused(several: Several, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("refused")
    (folder / "run.yaml").write_text("task: troubled:Troubled\n")
    argv = ["train", "run.yaml", "transport=shared", f"task.floats={FLOATS}", "--run-dir"]
    plan = {name: {"argv": [*argv, str(folder / name)], **knobs} for name, (knobs, _, _) in REFUSED.items()}
    return several.run(plan, folder)


@pytest.mark.parametrize("name", list(REFUSED))
def test_shared_memory_that_cannot_be_is_refused_by_one_message(refused, name):
    _, code, message = REFUSED[name]
    assert [rank.code for rank in refused[name]] == [code] * Several.RANKS
    (told,) = refused[name][0].messages()
    assert message in told
    assert [rank.stderr for rank in refused[name][1:]] == [""] * (Several.RANKS - 1)


class Training:
    """A job that trains over shared windows until something ends it, and the shared memory that it had."""

    def __init__(self, job: Job, run_dir: Path) -> None:
        self.job, self.run_dir = job, run_dir
        events = run_dir / "events.jsonl"
        job.until(lambda: events.exists() and events.stat().st_size > 1000)
        self.segments = leftovers.mapped_by(process.pid for process in job.members())

    def ranks(self) -> list[int]:
        """The process of each rank, in order."""
        ranked = {}
        for process in self.job.members():
            rank = process.environ().get("OMPI_COMM_WORLD_RANK", process.environ().get("PMI_RANK"))
            if rank is not None:
                ranked[int(rank)] = process.pid
        return [ranked[rank] for rank in sorted(ranked)]


@pytest.fixture
def train(start_ranks: Callable[..., Job], start: Callable[..., Job], mpi: Mpi, tmp_path: Path):
    if mpi.flavour != "openmpi":
        pytest.skip("knows the files of Open MPI only")
    (tmp_path / "run.yaml").write_text("task: troubled:Troubled\n")

    def begin(*overrides: str, launch: bool = False, policy: str = "asynchronous") -> Training:
        argv = [str(tmp_path / "run.yaml"), f"task.floats={FLOATS}", "train.samples=100000000", "transport=shared",
                f"policy={policy}", *overrides, "--run-dir", str(tmp_path / "run")]  # fmt: skip
        if launch:
            job = start([*TRAIN[:-1], "launch", "-n", str(WORKERS + 1), *argv])
        else:
            job = start_ranks(WORKERS + 1, [*TRAIN, *argv])
        return Training(job, tmp_path / "run")

    return begin


def nothing_stays(training: Training) -> None:
    training.job.wait()
    assert training.segments, "nothing was looked for"
    assert [path for path in training.segments if path.exists()] == []


@pytest.mark.parametrize("policy", ["synchronous", pytest.param("asynchronous", marks=pytest.mark.slow)])
def test_nothing_stays_when_mpirun_is_killed(train, policy):
    training = train(policy=policy)
    training.job.process.kill()  # prterun lives on as its child where mpirun is a script
    for process in training.job.members():
        if "prterun" in process.name() or "mpirun" in process.name():
            process.send_signal(signal.SIGKILL)
    nothing_stays(training)
    summary = json.loads((training.run_dir / "summary.json").read_text())
    assert (summary["exit"], summary["error"]) == (130, "the run was told to end (SIGTERM)")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("policy", "more"), [("synchronous", ()), ("asynchronous", ()), ("synchronous", SHARED_STEPS)])
def test_nothing_stays_when_a_rank_is_killed(train, rank, policy, more):
    training = train(*more, policy=policy)
    os.kill(training.ranks()[rank], signal.SIGKILL)
    nothing_stays(training)
    if rank:
        summary = json.loads((training.run_dir / "summary.json").read_text())
        assert (summary["exit"], summary["lost_workers"]) == (5, [2])


@pytest.mark.slow
def test_nothing_stays_when_a_worker_is_killed_that_writes_the_model(train):
    training = train("views=torn", "writers=workers", "task.torn=true")
    os.kill(training.ranks()[2], signal.SIGKILL)
    nothing_stays(training)
    summary = json.loads((training.run_dir / "summary.json").read_text())
    assert (summary["exit"], summary["lost_workers"]) == (5, [2])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("policy", "more"), [("asynchronous", ()), ("synchronous", SHARED_STEPS)])
def test_nothing_stays_after_ctrl_c(train, number, policy, more):
    training = train(*more, policy=policy, launch=True)
    training.job.process.send_signal(number)
    nothing_stays(training)


@pytest.mark.slow
def test_nothing_stays_when_everything_was_killed_but_the_launcher_that_sweeps(train):
    training = train(launch=True)
    for process in training.job.members():
        if process.pid != training.job.process.pid and "python" not in process.name():
            process.send_signal(signal.SIGKILL)  # mpirun
    nothing_stays(training)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "exit", "kill"])
@pytest.mark.parametrize(("policy", "more"), [("asynchronous", ()), ("synchronous", SHARED_STEPS)])
def test_nothing_stays_when_the_task_fails(train, fault, policy, more):
    nothing_stays(train(f"task.fault={fault}", "task.step=300", "task.sleep_s=0.01", *more, policy=policy))


@pytest.mark.slow
def test_nothing_stays_after_a_run_that_ends_well(train):
    nothing_stays(train("train.samples=500", "task.sleep_s=0.01"))


def test_a_server_names_the_worker_that_never_takes_its_model(start_ranks, tmp_path):
    """Rank 2 stops, as by SIGSTOP, between the reply and its copy: the wait has its deadline."""
    program = [sys.executable, str(Path(__file__).parents[1] / "mpi_programs" / "never_takes.py")]
    ended = start_ranks(WORKERS + 1, program).wait()
    assert ended.code == 0, ended.stderr
    assert ended.stdout.strip() == "rank 2 took nothing in for 1 s"
