"""A process that is woken comes to another core than the one who wakes it, and may be where it likes afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ps_elastic.transport.waking import this_core, wake_elsewhere

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process.pid
        process.kill()


def test_this_core_is_one_of_those_allowed():
    assert this_core() in os.sched_getaffinity(0)


def test_while_it_is_woken_it_may_be_on_all_other_cores_and_then_on_all_again(sleeper):
    before, seen = os.sched_getaffinity(sleeper), []
    wake_elsewhere(sleeper, lambda: seen.append(os.sched_getaffinity(sleeper)))
    assert os.sched_getaffinity(sleeper) == before
    (inside,) = seen
    assert inside == before if len(before) == 1 else (inside < before and len(inside) == len(before) - 1)


def test_one_that_is_bound_stays_where_it_is_and_is_woken(sleeper):
    core, seen = {this_core()}, []
    os.sched_setaffinity(sleeper, core)
    wake_elsewhere(sleeper, lambda: seen.append(os.sched_getaffinity(sleeper)))
    assert seen == [core] and os.sched_getaffinity(sleeper) == core


def test_one_that_is_gone_is_left_to_who_waits_for_it(sleeper):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    seen = []
    wake_elsewhere(gone.pid, lambda: seen.append(True))
    assert seen == [True]


def test_where_waking_fails_it_may_be_on_all_cores_again(sleeper):
    before = os.sched_getaffinity(sleeper)
    with pytest.raises(ZeroDivisionError):
        wake_elsewhere(sleeper, lambda: 1 / 0)
    assert os.sched_getaffinity(sleeper) == before
