"""Jobs under the real mpirun for the tests: each ends in time and leaves no process behind, or the test fails."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from hypothesis import HealthCheck, settings

from ps_elastic.cluster import environment, launcher, mpirun
from ps_elastic.cluster.environment import Mpi
from ps_elastic.errors import PlatformError
from ps_elastic.vectors import kernels as compiled

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "mpi_programs"
TRAIN = (sys.executable, "-m", "ps_elastic", "train")
START_S = 120.0  # enough for any start of any job here, on a machine busy with other things
_MARK = "PS_ELASTIC_TEST"  # whatever a job starts inherits it
RANKS_STDERR = "ranks-stderr.txt"  # in the folder of a job

# Tests and package are compiled once, not by each process that is started: pytest's own rewriting of the tests takes
# four seconds. Whoever wants no bytecode beside the sources may name another place: PYTHONPYCACHEPREFIX.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same examples each time, and none fails for the time that it took on a busy machine.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """`count`: how many examples of a property are looked at, in the quick suite and by the slow tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With `pytest -n 2` one process takes all files that start jobs, which mostly wait and want to be alone in that;
    the other begins with the rest, of which who is free takes the next function with all its cases."""
    from xdist.scheduler import LoadScopeScheduling

    class OneStartsAllJobs(LoadScopeScheduling):  # it begins with the scope of most tests, which is that of the jobs
        def _split_scope(self, nodeid: str) -> str:
            return "jobs" if _starts_jobs(nodeid.partition("::")[0]) else nodeid.partition("[")[0]

    return OneStartsAllJobs(config, log)


@cache
def _starts_jobs(file: str) -> bool:
    text = (ROOT / file).read_text()
    return "pytest.mark.mpi" in text or "pytest.mark.slurm" in text


def pytest_collection_finish() -> None:
    """What torch and thousands of tests are made of stays, and is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


class Ended(NamedTuple):
    """A job of which no process remains."""

    code: int
    stdout: str
    stderr: str
    at: float  # time.time() when the last process was gone

    def messages(self) -> list[str]:
        return messages(self.stderr)


def messages(stderr: str) -> list[str]:
    """What ps_elastic itself said went wrong."""
    return [line.removeprefix("ps-elastic: ") for line in stderr.split("\n") if line.startswith("ps-elastic:")]


class Job:
    """A running command and all that it started."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], folder: Path) -> None:
        self._mark, self._outputs = uuid.uuid4().hex, (folder / "stdout.txt", folder / "stderr.txt")
        self._ranks = folder / RANKS_STDERR
        paths = os.pathsep.join([str(ROOT), str(PROGRAMS)])
        given = {**os.environ, "PYTHONPATH": paths, "TTY_COMPATIBLE": "0", _MARK: self._mark}
        temporary = folder / "tmp"  # what those leave that are killed or alone keeps no later one from starting
        temporary.mkdir()
        given |= {"TMPDIR": str(temporary), **variables}
        with self._outputs[0].open("w") as stdout, self._outputs[1].open("w") as stderr:
            self.process = subprocess.Popen(
                command, env=given, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True, preexec_fn=mpirun.ending_with(os.getpid()),  # also where the tests are killed
            )  # fmt: skip

    def wait(self, limit_s: float = START_S) -> Ended:
        """Return when the command has ended and no process of it remains. Fails the test after `limit_s`."""
        limit = time.monotonic() + limit_s
        while self.process.poll() is None or self.members():
            if time.monotonic() > limit:
                alive = [" ".join(process.cmdline()) for process in self.members()]
                self.kill()
                said = self.said()
                pytest.fail(f"after {limit_s:.0f} s: ended with {self.process.poll()}; alive: {alive}\n{said}")
            time.sleep(0.05)
        at = time.time()
        return Ended(self.process.returncode, self._outputs[0].read_text(), self._errors(), at)

    def until(self, condition: Callable[[], bool], limit_s: float = START_S) -> None:
        """Return when the condition holds. Fails the test where the job ends first, or after `limit_s`."""
        limit = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                self.kill()
                pytest.fail(f"it never came to that; ended with {self.process.poll()}\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        return f"{self._outputs[0].read_text()}\n{self._errors()}"

    def _errors(self) -> str:
        ranks = self._ranks.read_text() if self._ranks.exists() else ""
        return ranks + self._outputs[1].read_text()

    def members(self) -> list[psutil.Process]:
        """Every process that the command started, directly or not, whatever session it is in."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or not ours
                continue
        return found

    def kill(self) -> None:
        for process in self.members():
            process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session", autouse=True)
def without_mpi() -> Iterator[None]:
    """The tests' own process never begins MPI, which leaves shared memory behind and confuses jobs that it starts."""
    yield
    assert "mpi4py.MPI" not in sys.modules


@pytest.fixture(params=["torch", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Passes over models of any size are torch's and numpy's, and then those of compiled kernels."""
    if request.param == "compiled" and (reason := compiled.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(compiled, "LEAST", 0 if request.param == "compiled" else sys.maxsize)
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a command: start(command, NAME=value, ...) -> Job. What is left of it at the end of the test is killed."""
    jobs: list[Job] = []

    def begin(command: Sequence[str], **variables: str) -> Job:
        folder = tmp_path / f"job-{len(jobs)}"
        folder.mkdir()
        jobs.append(Job(command, variables, folder))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def mpi() -> Mpi:
    """The MPI of this machine."""
    try:
        return environment.find_mpi()
    except PlatformError as error:
        pytest.skip(str(error))


@pytest.fixture
def start_ranks(start: Callable[..., Job], mpi: Mpi) -> Callable[..., Job]:
    """Start so many ranks of a program: start_ranks(ranks, argv, NAME=value, ...) -> Job.

    What they say to the user does not pass through mpirun, which may drop what a rank says before it aborts the job.
    """
    to_a_file = ("/bin/sh", "-c", f'exec "$@" 2>>{RANKS_STDERR}', "rank")  # in the folder of the job, their own

    def begin(ranks: int, argv: Sequence[str], **variables: str) -> Job:
        return start(ranks_command(mpi, ranks, [*to_a_file, *argv]), **launcher.mpi_environment(mpi), **variables)

    return begin


def ranks_command(mpi: Mpi, ranks: int, argv: Sequence[str]) -> list[str]:
    """mpirun's command line. Not bound to cores: several tests, and other jobs, may run at once."""
    return launcher.mpirun_command(mpi, ranks, argv, cores=1)


class Said(NamedTuple):
    """What one command line came to on one rank."""

    code: int
    stdout: str
    stderr: str

    def messages(self) -> list[str]:
        return messages(self.stderr)


Plan = Mapping[str, Mapping[str, Any]]


class Several:
    """A server and three workers in one job, which run one command line after another for as long as tests have any.

    A job that ended before its time has failed a test; the next begins another.
    """

    RANKS = 4

    def __init__(self, mpi: Mpi, folder: Path) -> None:
        self._mpi, self._folder = mpi, folder
        self._jobs: list[Job] = []
        self._orders = 0

    def run(self, plan: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, list[Said]]:
        """What each rank said of each command line of `plan` (see mpi_programs/several.py), all run in `folder`."""
        each = self.order({"plan": list(plan.values())}, folder, START_S + 5 * len(plan))
        return {name: [Said(*rank[i]) for rank in each] for i, name in enumerate(plan)}

    def order(self, order: Mapping[str, Any], folder: Path, limit_s: float = START_S) -> list[Any]:
        """What each rank leaves of an order as mpi_programs/several.py knows them, carried out in `folder`."""
        job = self._working()
        self._tell({"folder": str(folder), **order})
        files = [folder / f"rank-{rank}.json" for rank in range(self.RANKS)]
        job.until(lambda: all(file.exists() for file in files), limit_s)
        return [json.loads(file.read_text()) for file in files]

    def end(self) -> None:
        if self._jobs and self._jobs[-1].process.poll() is None:
            self._tell(None)
            assert self._jobs[-1].wait().code == 0, self._jobs[-1].said()

    def kill(self) -> None:
        for job in self._jobs:
            job.kill()

    def _working(self) -> Job:
        if not self._jobs or self._jobs[-1].process.poll() is not None:
            self._orders, home = 0, self._home(len(self._jobs))
            home.mkdir()
            program = [sys.executable, str(PROGRAMS / "several.py"), str(home)]
            command = ranks_command(self._mpi, self.RANKS, program)
            self._jobs.append(Job(command, launcher.mpi_environment(self._mpi), home))
        return self._jobs[-1]

    def _tell(self, order: Mapping[str, Any] | None) -> None:
        home = self._home(len(self._jobs) - 1)
        (home / "order").write_text(json.dumps(order))
        (home / "order").rename(home / f"order-{self._orders}.json")
        self._orders += 1

    def _home(self, number: int) -> Path:
        return self._folder / f"job-{number}"


class Trained(dict[str, Path]):
    """The folder of each of several runs of a server and three workers, all of which ended well.

    Those named `first` are trained together, others when they are asked for: one that only slow tests look at is not
    trained without them.
    """

    def __init__(self, several: Several, plan: Plan, first: Iterable[str], folder: Path) -> None:
        self._several, self._plan, self._folder = several, plan, folder
        self.said: dict[str, list[Said]] = {}
        self._train(list(first))

    def __missing__(self, name: str) -> Path:
        self._train([name])
        return self[name]

    def _train(self, names: list[str]) -> None:
        folders = {name: self._folder / name.replace(", ", "-").replace(" ", "_") for name in names}
        plan = {
            name: {**self._plan[name], "argv": [*self._plan[name]["argv"], "--run-dir", str(folders[name])]}
            for name in names
        }
        orders = self._folder / f"order-{len(self)}"
        orders.mkdir()
        said = self._several.run(plan, orders)
        for name in names:
            assert [rank.code for rank in said[name]] == [0] * self._several.RANKS, (name, said[name])
        self.said.update(said)
        self.update(folders)


@pytest.fixture(scope="session")
def several(mpi: Mpi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """One job for the runs of many tests: the start of one takes longer than most of those."""
    ranks = Several(mpi, tmp_path_factory.mktemp("several"))
    try:
        yield ranks
        ranks.end()
    finally:
        ranks.kill()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets: $PS_ELASTIC_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("PS_ELASTIC_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; PS_ELASTIC_DATA names another folder")
    return folder
