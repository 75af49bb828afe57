"""Shared memory that killed jobs leave: which files nobody needs any more, and that only those are removed."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from ps_elastic.cluster import leftovers

HOST = os.uname().nodename.split(".")[0]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    names = {"left": f"sm_segment.{HOST}.0.1.0", "used": f"sm_segment.{HOST}.0.2.0", "foreign": "sm_segment.x.0.1.0",
             "unknown": "torch_shm", "mpich": "mpich_shm_1_0"}  # fmt: skip
    for name in names.values():
        (tmp_path / name).write_bytes(bytes(mmap.PAGESIZE))
    return {key: tmp_path / name for key, name in names.items()}


def test_only_what_nobody_maps_of_this_host_and_old_enough_is_forsaken(tmp_path, files, monkeypatch):
    with open(files["used"], "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert leftovers.unmapped(tmp_path) == {files["left"], files["foreign"], files["mpich"]}
        assert leftovers.forsaken_segments(tmp_path) == set()  # a job may be starting
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 61)
        assert leftovers.forsaken_segments(tmp_path) == {files["left"]}
    assert leftovers.forsaken_segments(tmp_path) == {files["left"], files["used"]}


def test_somebody_elses_are_left_alone(tmp_path, files, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert leftovers.unmapped(tmp_path) == set()


def test_what_a_process_maps_is_found_and_removed_once(files):
    with open(files["used"], "r+b") as file, mmap.mmap(file.fileno(), 0):
        found = leftovers.mapped_by([os.getpid()])
        assert found == {files["used"]}
        assert leftovers.remove_segments(found) == [files["used"]]
        assert leftovers.remove_segments(found) == []
    assert files["left"].exists()


def test_a_process_that_is_gone_maps_nothing():
    assert leftovers.mapped_by([2**22 + 1]) == set()
