"""A launcher as our child: signals become messages, and no process remains. Any program can stand in for mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ps_elastic.cluster import mpirun
from ps_elastic.records.run_dir import INTERRUPT

TELL_PARENT = "import os, signal, sys, time\ndef tell(number): os.kill(os.getppid(), number)\n"
QUIT_BY_USR1 = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(42))\n"


def have_patience(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(mpirun, "STAGES", tuple((number, seconds) for number, _ in mpirun.STAGES))


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Long with a job that is to answer, short with what outlives it."""
    have_patience(monkeypatch, 60.0)
    monkeypatch.setattr(mpirun, "LINGER_S", 0.5)


def run(code: str, run_dir, **more) -> mpirun.Ended:
    return mpirun.run([sys.executable, "-c", TELL_PARENT + code], os.environ, run_dir, **more)


def is_gone(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_untroubled_job_ends_with_its_code(tmp_path):
    assert run("sys.exit(6)", tmp_path) == (6, False, [], False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_travels_as_a_file_and_sigusr1(tmp_path, number):
    ended = run(f"{QUIT_BY_USR1}tell({int(number)}); time.sleep(30)", tmp_path)
    assert (ended.code, ended.interrupted) == (42, True)
    assert (tmp_path / INTERRUPT).read_text() == "130"


def test_sigusr1_is_passed_on_without_the_file(tmp_path):
    ended = run(f"{QUIT_BY_USR1}tell(signal.SIGUSR1); time.sleep(30)", tmp_path)
    assert (ended.code, ended.interrupted) == (42, False)
    assert not (tmp_path / INTERRUPT).exists()


def test_a_deaf_job_is_terminated_and_a_stubborn_one_killed(tmp_path, monkeypatch):
    have_patience(monkeypatch, 0.5)
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
    stubborn = deaf + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    assert run(deaf + "tell(2); time.sleep(30)", tmp_path).code == -signal.SIGTERM
    assert run(stubborn + "tell(2); time.sleep(30)", tmp_path).code == -signal.SIGKILL


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    code = "signal.signal(signal.SIGUSR1, lambda *_: tell(2))\ntell(2)\nwhile True: time.sleep(30)"
    started = time.monotonic()
    assert run(code, tmp_path).code == -signal.SIGTERM
    assert time.monotonic() - started < 20


def test_a_process_that_left_the_session_is_killed_too(tmp_path):
    code = (
        "import subprocess\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(rank.pid, flush=True)"
    )
    with open(tmp_path / "pid", "w+") as output:
        ended = run(code, tmp_path, stdout=output)
        output.seek(0)
        pid = int(output.read())
    assert ended == (0, False, [pid], False)
    assert is_gone(pid)


def test_a_rank_that_is_still_writing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(mpirun, "LINGER_S", 60.0)
    rank = f"import time; time.sleep(0.5); open({str(tmp_path / 'summary')!r}, 'w').close()"
    ended = run(f"import subprocess; subprocess.Popen([sys.executable, '-c', {rank!r}])", tmp_path)
    assert ended.outlived == []
    assert (tmp_path / "summary").exists()


def test_a_job_over_its_limit_is_killed(tmp_path):
    ended = run("time.sleep(60)", tmp_path, limit_s=0.3)
    assert (ended.code, ended.timed_out, ended.interrupted) == (-signal.SIGKILL, True, False)


def test_handlers_are_ours_again_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    run("pass", tmp_path)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_the_job_reads_no_terminal_and_is_a_session_of_its_own(tmp_path):
    assert run("sys.exit(sys.stdin.read() != '' or os.getsid(0) != os.getpid())", tmp_path).code == 0


def test_the_job_ends_when_its_launcher_is_killed(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import os, sys; from pathlib import Path; from ps_elastic.cluster import mpirun\n"
        f"mpirun.run([sys.executable, '-c', {child!r}], os.environ, Path('.'))"
    )
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True) as launcher:
        pid = int(launcher.stdout.readline())
        launcher.kill()
    limit = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    assert is_gone(pid)
