from __future__ import annotations

import pytest
import torch

from ps_elastic.server.views import Snapshots


def changed(snapshots: Snapshots, value: float) -> None:
    """What the server does for each version."""
    if (kept := snapshots.advance()) is not None:
        kept.copy_(snapshots.x)
    snapshots.x.fill_(value)


def test_the_current_version_is_the_live_vector_itself() -> None:
    snapshots = Snapshots(torch.zeros(3))
    snapshots.hold(0)
    assert snapshots.vector(0) is snapshots.x


def test_a_version_that_somebody_holds_stays_as_it_was() -> None:
    snapshots = Snapshots(torch.zeros(3))
    snapshots.hold(0)
    changed(snapshots, 1)
    snapshots.hold(1)
    changed(snapshots, 2)
    assert snapshots.vector(0).tolist() == [0, 0, 0]
    assert snapshots.vector(1).tolist() == [1, 1, 1]
    assert snapshots.vector(2).tolist() == [2, 2, 2]


def test_a_version_that_nobody_holds_is_not_copied() -> None:
    snapshots = Snapshots(torch.zeros(3))
    snapshots.hold(0)
    snapshots.release(0)
    changed(snapshots, 1)
    assert snapshots.peak == 0
    with pytest.raises(KeyError):
        snapshots.vector(0)


def test_holders_of_one_version_share_its_copy_and_the_last_frees_it() -> None:
    snapshots = Snapshots(torch.zeros(3))
    for _ in range(5):
        snapshots.hold(0)
    changed(snapshots, 1)
    assert snapshots.peak == 1
    for _ in range(4):
        snapshots.release(0)
    assert snapshots.vector(0).tolist() == [0, 0, 0]
    snapshots.release(0)
    with pytest.raises(KeyError):
        snapshots.vector(0)


def test_the_steady_state_allocates_nothing() -> None:
    snapshots = Snapshots(torch.zeros(3))
    places = set()
    for version in range(20):
        snapshots.hold(version)
        changed(snapshots, version + 1.0)
        places.add(snapshots.vector(version).data_ptr())
        if version:
            assert snapshots.vector(version - 1).tolist() == [version - 1.0] * 3
            snapshots.release(version - 1)
    assert snapshots.peak == 2
    assert len(places) == 2
