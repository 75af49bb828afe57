from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Ahead, Desk, fit
from torch import Tensor

from ps_elastic.compressors.identity import Identity
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.server.combine import EagerSum
from ps_elastic.server.combiners import Part, make_combiner
from ps_elastic.server.combiners.base import no_drift
from ps_elastic.transport.messages import Reply
from ps_elastic.vectors.layout import Bucket

BUCKETS = (Bucket(0, 64), Bucket(64, 192), Bucket(192, 256))


def gradient(worker: int, step: int) -> Tensor:
    return torch.randn(256, generator=torch.Generator().manual_seed(1000 * worker + step))


class Table:
    """A eager_sum, and what it should find."""

    def __init__(self) -> None:
        self.sum = torch.full((256,), torch.nan)
        self.eager_sum = EagerSum(BUCKETS, self.sum)

    def arrive(self, worker: int, step: int, *buckets: int) -> None:
        for i in buckets or range(3):
            part = gradient(worker, step)[BUCKETS[i].start : BUCKETS[i].stop]
            self.eager_sum.arrived(PushId(worker, step), i, part)

    def step(self, *pushes: tuple[int, int], **more: Any) -> bool:
        """Whether the sum of these pushes was there; it must then have the bits of the combiner's."""
        terms = tuple(Term(PushId(*push), more.get("weight", 1.0)) for push in pushes)
        found = self.eager_sum.take(Step(terms, combine=more.get("combine", "mean")))
        if found is not None:
            expected = torch.empty(256)
            parts = [Part((gradient(*push),), None, 1.0, no_drift) for push in pushes]
            make_combiner("mean").combine(Identity(), parts, expected)
            assert torch.equal(found / len(pushes), expected)
        return found is not None

    def rounds(self, workers: int = 3, count: int = 2) -> None:
        for step in range(1, count + 1):
            for worker in range(1, workers + 1):
                self.arrive(worker, step)
            assert not self.step(*((worker, step) for worker in range(1, workers + 1)))


@pytest.mark.parametrize("seed", range(5))
def test_after_two_steps_alike_the_third_is_foreseen_in_whatever_order_buckets_come(seed: int) -> None:
    table = Table()
    table.rounds()
    draw = random.Random(seed)
    for step in (3, 4):
        arriving = [(worker, step, i) for worker in (1, 2, 3) for i in range(3)]
        for worker, of, i in draw.sample(arriving, len(arriving)):
            table.arrive(worker, of, i)
        assert table.step((1, step), (2, step), (3, step))


def test_it_is_summed_before_the_step_is_asked_for() -> None:
    table = Table()
    table.rounds(2)
    table.arrive(2, 3, 1, 2)
    assert table.sum.isnan().all()
    table.arrive(1, 3, 2)
    assert torch.equal(table.sum[192:], (gradient(1, 3) + gradient(2, 3))[192:]) and table.sum[:192].isnan().all()


@pytest.mark.parametrize(
    ("pushes", "more"),
    [
        ([(1, 3), (2, 3)], {}),
        ([(1, 3), (3, 3), (2, 3)], {}),
        ([(1, 3), (2, 3), (3, 2)], {}),
        ([(1, 3), (2, 3), (3, 3)], {"weight": 0.5}),
        ([(1, 3), (2, 3), (3, 3)], {"combine": "sum"}),
    ],
    ids=["fewer", "another order", "an earlier push", "weighted", "another combiner"],
)
def test_another_step_than_expected_is_made_as_if_nothing_had_been_done(
    pushes: list[tuple[int, int]], more: dict[str, Any]
) -> None:
    table = Table()
    table.rounds()
    for worker in (1, 2, 3):
        table.arrive(worker, 3)
    assert not table.step(*pushes, **more)
    for worker in (1, 2, 3):
        table.arrive(worker, 4)
    assert not table.step((1, 4), (2, 4), (3, 4))


def test_a_bucket_that_is_missing_or_comes_twice_or_of_another_step_spoils_the_round() -> None:
    for spoil in ((3, 3, 0, 1), (3, 3, 0, 1, 2, 2), (3, 4, 0, 1, 2)):
        table = Table()
        table.rounds()
        table.arrive(1, 3)
        table.arrive(2, 3)
        table.arrive(*spoil)
        if spoil[1] == 4:
            table.arrive(3, 3)
        assert not table.step((1, 3), (2, 3), (3, 3))


def test_what_was_forgotten_is_not_used() -> None:
    table = Table()
    table.rounds()
    table.arrive(1, 3)
    table.eager_sum.forget()
    table.arrive(2, 3)
    table.arrive(3, 3)
    assert not table.step((1, 3), (2, 3), (3, 3))


# ---- in a server


def desk_of(policy: Any) -> Desk:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    return Desk(policy, 2, model=model, buckets="layer")


def push(desk: Desk, worker: int, vector: np.ndarray) -> dict[int, Reply]:
    replies: dict[int, Reply] = {}
    whole = desk.message(worker)
    for i in reversed(range(4)):
        bucket = desk.layout.buckets[i]
        part = whole._replace(arrays=(vector[bucket.start : bucket.stop],), bucket=i, buckets=4)
        replies |= desk.send(part)
    return replies


def test_memory_that_is_received_into_again_before_the_step_is_not_summed() -> None:
    """A worker that is let go before its push is used: what lies in the transport's memory then is its next push."""
    desk = desk_of(Ahead(need=2))
    memory = {worker: np.zeros(desk.layout.size, np.float32) for worker in (1, 2)}
    draw = np.random.default_rng(0)
    for _ in range(6):
        expected = desk.x.clone()
        total = torch.zeros_like(expected)
        for worker in (2, 1):
            memory[worker][:] = draw.normal(size=desk.layout.size)
            total += torch.from_numpy(memory[worker])
            push(desk, worker, memory[worker])
            memory[worker][:] = np.nan
        assert desk.x.isfinite().all()
        assert torch.allclose(desk.x, expected - 0.5 * total / 2, atol=1e-5)


def test_synchronous_steps_are_foreseen_and_asynchronous_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    plain = EagerSum.take

    def take(self: EagerSum, step: Step) -> Tensor | None:
        found.append((total := plain(self, step)) is not None)
        return total

    monkeypatch.setattr(EagerSum, "take", take)
    for policy, expected in ((Synchronous(), [False, False, True, True]), (Asynchronous(), [False] * 8)):
        desk = desk_of(policy)
        for _ in range(4):
            for worker in (2, 1):
                push(desk, worker, np.ones(desk.layout.size, np.float32))
        assert found == expected
        found.clear()


def test_the_bits_are_those_of_steps_that_were_not_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("buckets=layer", "optimizer.momentum=0.9")
    with_it = fit(tmp_path, "helpers:Images", *options, samples=300)
    monkeypatch.setattr(EagerSum, "take", lambda self, step: None)
    without = fit(tmp_path, "helpers:Images", *options, samples=300)
    assert with_it.summary["parameters_sha256"] == without.summary["parameters_sha256"]
    assert with_it.events == without.events
