"""Signals to a rank become flags on rank 0; workers leave the answer to it, for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ps_elastic.errors import Interrupted, WorkersLost
from ps_elastic.runtime.signals import Signals, ended_by

NUMBERS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_rank_0_is_told_to_end_well_or_to_end_now():
    signals = Signals(0)
    assert (signals.stop, signals.end) == (False, "")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (signals.stop, signals.end) == (True, "")
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.end == "SIGINT"
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.end == "SIGTERM"


def test_a_worker_ignores_what_rank_0_answers():
    signals = Signals(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGINT)
    assert (signals.stop, signals.end) == (False, "")


def test_a_worker_outlives_sigterm_by_its_grace_and_no_longer():
    code = (
        "import os, signal, time; from ps_elastic.runtime import signals\n"
        "signals.TERM_GRACE_S = 1; signals.Signals(1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(time.time(), flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=30, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGALRM
    assert 0.5 < time.time() - float(done.stdout) < 10


def test_a_signal_after_a_death_tells_of_the_death():
    assert type(ended_by("SIGTERM", [])) is Interrupted and ended_by("SIGTERM", []).exit_code == 130
    error = ended_by("SIGTERM", [2, 3])
    assert type(error) is WorkersLost and error.exit_code == 5
    assert str(error) == "ranks [2, 3] died, and so the launcher ended the job (SIGTERM)"
