"""One rank of a job: what can be seen without starting one. The rest is in test_mpi and test_nothing_hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ps_elastic.errors import ConfigError
from ps_elastic.records.run_dir import INTERRUPT, asked_by
from ps_elastic.runtime import loops
from ps_elastic.transport.messages import Farewell, Message


class Deaf:
    """A worker's end whose server never answers."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, dest: int, message: Message) -> None:
        self.sent.append(message)

    def recv(self, timeout: float) -> None:
        return None


def told(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Farewell:
    monkeypatch.setattr(loops, "_ABORT_WITHIN_S", 0.0)
    end: Any = Deaf()
    loops.tell_server(end, 2, error)
    return end.sent[0]


def test_an_error_of_ours_is_told_in_a_line_with_its_code(monkeypatch):
    assert told(ConfigError("no", key="policy"), monkeypatch) == Farewell(2, 0, "policy: no", 2)


def test_the_end_of_a_long_traceback_is_told_in_as_many_bytes_as_fit(monkeypatch):
    farewell = told(ValueError("\N{DOG FACE}" * 40_000 + " at last"), monkeypatch)
    assert farewell.code == 1
    assert farewell.text.endswith("\N{DOG FACE} at last")
    assert 59_990 <= len(farewell.text.encode()) <= 60_000


def test_the_word_of_the_launcher_says_who_asked_to_stop(tmp_path):
    assert asked_by(tmp_path).startswith("SIGUSR1")
    (tmp_path / INTERRUPT).touch()
    assert asked_by(tmp_path) == "Ctrl-C or SIGTERM"


@pytest.mark.mpi
def test_threads_can_be_set_before_torch_is_imported(mpi):
    code = (
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "import sys, ps_elastic.runtime.train, ps_elastic.simulation.simulate, ps_elastic.transport.mpi\n"
        "early = {'torch', 'numpy'} & set(sys.modules)\n"
        "import ps_elastic.transport.server_endpoint\n"
        "sys.exit(bool(early) or 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
