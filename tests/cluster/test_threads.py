from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ps_elastic.cluster import threads


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on eight cores."""
    monkeypatch.setattr(threads, "local_size", lambda: 4)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)


def test_a_rank_computes_on_as_many_threads_as_it_is_told(host: None) -> None:
    line = threads.set_threads(2)
    assert torch.get_num_threads() == 2
    assert line.startswith("4 ranks on this host, 8 cores") and line.endswith("2 threads a rank")
    assert "12 threads" not in line and threads.set_threads(3).endswith("share 8 cores: it works, more slowly")


def test_the_server_takes_what_the_workers_leave(host: None) -> None:
    line = threads.set_server_threads("auto", 2)
    assert torch.get_num_threads() == 2 and line.endswith("2 threads for the server")
    threads.set_server_threads("auto", 1)
    assert torch.get_num_threads() == 5
    threads.set_server_threads(3, 1)
    assert torch.get_num_threads() == 3


def test_a_worker_gives_way_only_inside_and_only_where_it_must() -> None:
    before = os.sched_getscheduler(0)
    with threads.giving_way(needed=True):
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        with threads.giving_way(needed=True):
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER
    with threads.giving_way(needed=False):
        assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize("enabled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_torch_brings_is_never_looked_through_for_garbage(enabled: bool) -> None:
    code = (
        f"import gc; gc.{'enable' if enabled else 'disable'}(); before = gc.get_stats()[2]['collections']\n"
        "from ps_elastic.cluster.threads import set_threads; set_threads(1)\n"
        "print(gc.get_stats()[2]['collections'] - before, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["0", str(enabled), "True"], ended.stderr


def test_where_a_container_forbids_to_give_way_a_worker_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with threads.giving_way(needed=True):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
