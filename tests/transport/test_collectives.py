"""What ranks do together; under mpirun it is test_nothing_hangs that shows it."""

from __future__ import annotations

from typing import Any

import pytest

from ps_elastic.errors import Stalled, TaskError
from ps_elastic.transport.collectives import JobFailed, Told, blame, ending_all


class Comm:
    """One of several ranks, for what needs no other."""

    def __init__(self, rank: int) -> None:
        self.rank, self.aborted = rank, 0

    def Get_rank(self) -> int:
        return self.rank

    def Abort(self, code: int) -> None:
        self.aborted = code


def raised() -> ValueError:
    try:
        raise ValueError("no")
    except ValueError as error:
        return error


def test_the_rank_is_named_unless_the_server_speaks_on_purpose():
    assert blame(TaskError("rank 2: no"), 0) == "rank 2: no"
    assert blame(TaskError("no"), 2) == "rank 2: no"
    assert blame(raised(), 0).startswith("rank 0: Traceback (most recent call last):\n")
    assert blame(raised(), 0).endswith("ValueError: no")


@pytest.mark.parametrize(("error", "code"), [(Stalled("x"), 4), (ValueError("x"), 1), (KeyboardInterrupt(), 130)])
def test_what_escapes_ends_the_job_with_its_code(capsys, error, code):
    comm: Any = Comm(1)
    with pytest.raises(type(error)), ending_all(comm):
        raise error
    assert comm.aborted == code
    assert capsys.readouterr().err.startswith("ps-elastic: rank 1: ")


@pytest.mark.parametrize("error", [JobFailed("x", 2), Told(2)])
def test_what_all_know_of_does_not(capsys, error):
    comm: Any = Comm(0)
    with pytest.raises(type(error)), ending_all(comm):
        raise error
    assert comm.aborted == 0
    assert capsys.readouterr().err == ""
