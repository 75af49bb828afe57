from __future__ import annotations

from itertools import permutations

import pytest

from ps_elastic.errors import WireError
from ps_elastic.server.run import BucketAssembler
from ps_elastic.transport.messages import PushMessage


def part(bucket: int, worker: int = 1, step: int = 1, buckets: int = 3) -> PushMessage:
    return PushMessage(worker, step, 0, (), bucket, buckets)


def test_a_push_in_one_piece_is_whole_at_once() -> None:
    assert BucketAssembler().add(part(0, buckets=1)) == [part(0, buckets=1)]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_in_whatever_order_buckets_come_the_last_brings_all_in_their_own(order: tuple[int, ...]) -> None:
    gathering = BucketAssembler()
    assert [gathering.add(part(i)) for i in order[:-1]] == [[], []]
    assert gathering.add(part(order[-1])) == [part(0), part(1), part(2)]
    assert gathering.add(part(order[0])) == []  # and a second copy begins anew


def test_pushes_of_several_workers_and_steps_may_be_mixed() -> None:
    gathering = BucketAssembler()
    pushes = [(1, 1), (1, 2), (2, 1)]
    for bucket in (2, 0):
        assert [gathering.add(part(bucket, *push)) for push in pushes] == [[]] * 3
    for push in pushes:
        assert gathering.add(part(1, *push)) == [part(bucket, *push) for bucket in range(3)]


def test_nothing_is_kept_of_a_worker_that_left() -> None:
    gathering = BucketAssembler()
    for bucket in (2, 1):
        gathering.add(part(bucket))
        gathering.add(part(bucket, worker=2))
    gathering.forget(1)
    assert gathering.add(part(0)) == []
    assert len(gathering.add(part(0, worker=2))) == 3


@pytest.mark.parametrize("bucket", [2, 3])
def test_a_bucket_that_cannot_be_is_refused_by_name(bucket: int) -> None:
    gathering = BucketAssembler()
    gathering.add(part(2, worker=4, step=7))
    expected = rf"worker 4, step 7: got bucket {bucket} of 3, expected one that is not in \[2\]"
    with pytest.raises(WireError, match=expected):
        gathering.add(part(bucket, worker=4, step=7))
