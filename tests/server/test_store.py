"""One pass over the model against torch.optim tensor by tensor, and its norms against numpy in double precision."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Point
from torch import Tensor, nn

from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.config.sections import Optimizer
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.policies.ledger import View
from ps_elastic.server.combiners.mean import Mean
from ps_elastic.server.optimizer import BLOCK, FlatOptimizer
from ps_elastic.server.store import ParameterStore
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout
from ps_elastic.vectors.norms import ACCURACY

ONE, TWO, THREE = (PushId(worker, 1) for worker in (1, 2, 3))
BUCKETS = ("whole", "layer", 1000, 100_000)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    {"momentum": 0.7, "weight_decay": 0.02, "decay_norm_and_bias": False},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module() -> nn.Module:
    """Three of the optimizer's blocks, which end where neither tensors nor buckets do, and small tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(301, 400), nn.LayerNorm(400), nn.Linear(400, 37))


class Bench:
    """A store, the payloads that it takes, and the vectors that these decode to."""

    def __init__(
        self, buckets: str | int = "whole", compressor: Compressor | None = None,
        hooks: dict[str, Any] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.layout = Layout(module(), buckets)
        self.x = self.layout.empty()
        self.layout.attach(module(), self.x)
        self.compressor = compressor or Identity()
        self.optimizer = FlatOptimizer(Optimizer(**settings), self.layout, self.x)
        compressors = [self.compressor] * len(self.layout.buckets)
        self.store = ParameterStore(self.layout, self.x, self.optimizer, compressors, **hooks or {})
        self.given: dict[PushId, Tensor] = {}  # the model that each push was computed on
        self._generator = torch.Generator().manual_seed(1)

    def push(self, push: PushId) -> Tensor:
        """Let `push` carry a random vector; return what decodes of it, (d,)."""
        dense = self.layout.empty()
        for view in self.layout.views(dense).values():
            view.normal_(generator=self._generator)
        decoded, messages = torch.zeros_like(dense), []
        for i, bucket in enumerate(self.layout.buckets):
            payload = self.compressor.encode(dense[bucket.start : bucket.stop])
            self.compressor.accumulate(payload, decoded[bucket.start : bucket.stop])
            arrays = tuple(array.numpy().copy() for array in payload)
            messages.append(PushMessage(push.worker, push.step, 0, arrays, i, len(self.layout.buckets)))
        self.store.take(push, messages)
        return decoded

    def give(self, push: PushId) -> None:
        version = self.store.snapshots.version
        self.given[push] = torch.from_numpy(self.store.give(push, View(version, 0.0, None, 0.0, 0.0), 0.1).copy())

    def step(self, *terms: Term, rate: float = 0.1, views: Sequence[PushId] = (), **more: Any) -> float:
        step = Step(terms, **more)
        self.store.combine(step)
        return self.store.apply(step, rate, views)


class Reference:
    """torch.optim tensor by tensor, in its plain form."""

    def __init__(self, layout: Layout, **settings: Any) -> None:
        self.layout, self.model = layout, module()
        decay_all, decay = settings.pop("decay_norm_and_bias", True), settings.pop("weight_decay", 0.0)
        parameters = list(self.model.parameters())
        groups = [{"params": [p], "weight_decay": decay if decay_all or p.ndim > 1 else 0.0} for p in parameters]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, foreach=False, fused=False, **settings)

    def step(self, gradient: Tensor) -> None:
        for name, view in self.layout.views(gradient).items():
            self.model.get_parameter(name).grad = view.clone()
        self.optimizer.step()

    def equals(self, x: Tensor) -> bool:
        views = self.layout.views(x)
        return all(torch.equal(views[name], p.detach()) for name, p in self.model.named_parameters())


def test_a_server_of_plain_sgd_takes_no_memory_beside_the_model_before_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    layout = Layout(Point(torch.zeros(9_000_000)))  # above 32 MiB malloc maps zeros, so that they take memory when used
    x = layout.empty().fill_(1.0)
    FlatOptimizer(Optimizer(lr=0.1), layout, x)  # compiling takes memory of its own, once
    before = resident()
    made = ParameterStore(layout, x, FlatOptimizer(Optimizer(lr=0.1), layout, x), [Identity()])
    taken, nbytes = resident() - before, 4 * layout.size
    assert taken < nbytes / 10 and made.x is x


def test_the_model_is_of_several_blocks() -> None:
    assert 2 * BLOCK < Layout(module()).size < 3 * BLOCK


@pytest.mark.parametrize("buckets", BUCKETS)
@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.03)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_mean_has_the_bits_of_the_plain_loop(settings: dict[str, Any], compressor: Compressor, buckets: Any) -> None:
    bench = Bench(buckets, compressor, **settings)
    reference = Reference(bench.layout, **settings)
    for pushes in [(ONE,), (ONE, TWO), (ONE, TWO, THREE), (ONE,), (ONE, TWO, THREE)]:
        decoded = [bench.push(push) for push in pushes]
        bench.step(*map(Term, pushes))
        total = decoded[0].clone()
        for vector in decoded[1:]:
            total += vector
        reference.step(total / len(pushes) if len(pushes) > 1 else total)
        assert reference.equals(bench.x)


@dataclass
class WholeMean(Mean):
    """The mean, of whole buckets at once."""

    elementwise = False


@pytest.mark.parametrize("buckets", BUCKETS)
@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.03)], ids=str)
@pytest.mark.parametrize("apply", ["step", "assign"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_blocks_have_the_bits_of_the_whole_whatever_the_weights(
    name: str, apply: str, compressor: Compressor, buckets: Any
) -> None:
    ends = []
    zero = PushId(0, 0)
    for combine in ("mean", "test_store:WholeMean"):
        bench = Bench(buckets, compressor, name=name)
        moves = []
        for weights in [(0.3, 1.0, 2.5), (1.0, 0.4, 1.0), (2.0,), (1.0, 1.0)]:
            pushes = (ONE, TWO, THREE)[: len(weights)]
            for push in pushes:
                bench.push(push)
            terms = (*map(Term, pushes, weights), Term(zero, 0.5))
            moves.append(bench.step(*terms, combine=combine, apply=apply))
        ends.append((bench.x.clone(), moves))
    (x, moves), (other, others) = ends
    assert torch.equal(x, other) and moves == others


def test_a_payload_stays_as_it_is() -> None:
    bench = Bench()
    kept = {push: bench.push(push) for push in (ONE, TWO)}
    bench.step(Term(ONE), Term(TWO, 3.0))
    bench.step(Term(ONE))
    bench.step(Term(ONE, 2.0))
    for push, vector in kept.items():
        assert torch.equal(bench.store.payloads.of[push][0][0], vector)


def test_one_and_two_threads_make_the_same_bits() -> None:
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bench = Bench(momentum=0.9, weight_decay=0.01)
        moves = []
        for weights in [(1.0, 1.0, 1.0), (0.7, 1.3, 0.1)]:
            for push in (ONE, TWO, THREE):
                bench.push(push)
            moves.append(bench.step(*map(Term, (ONE, TWO, THREE), weights)))
        ends.append((bench.x.clone(), moves))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def apart(a: Tensor, b: Tensor) -> float:
    """||a - b|| in double precision, by numpy."""
    return math.sqrt(np.sum((a.numpy().astype(np.float64) - b.numpy()) ** 2))


@pytest.mark.parametrize("buckets", ["whole", 100_000])
@pytest.mark.parametrize("apply", ["step", "assign"])
def test_a_pass_measures_the_views_and_keeps_those_that_others_hold(apply: str, buckets: Any) -> None:
    """Three workers take turns; the memory of the view just used becomes that of the model of before."""
    bench, turns = Bench(buckets, momentum=0.9), 9
    store = bench.store
    for worker in (1, 2, 3):
        bench.give(PushId(worker, 1))
    places = set()
    for turn in range(turns):
        push = PushId(turn % 3 + 1, turn // 3 + 1)
        old, view = bench.x.clone(), bench.given.pop(push)
        bench.push(push)
        moved = bench.step(Term(push), views=[push], apply=apply)
        store.free([push])
        assert math.isclose(store.distance_when_used(push), apart(old, view), rel_tol=2 * ACCURACY)
        assert math.isclose(moved, apart(bench.x, old), rel_tol=2 * ACCURACY)
        bench.give(PushId(push.worker, push.step + 1))
        for held, given in bench.given.items():
            assert torch.equal(torch.from_numpy(store.view(held)), given)
            assert math.isclose(store.distance(held), apart(bench.x, given), rel_tol=2 * ACCURACY)
        places.update(store.view(held).ctypes.data for held in bench.given)
    assert store.snapshots.peak == 2 and len(places) == 3  # and x itself


def test_a_view_that_is_owed_is_measured_and_goes_on() -> None:
    bench = Bench()
    for push in (ONE, TWO):
        bench.give(push)
    bench.push(TWO)
    bench.step(Term(TWO), views=[TWO])
    bench.give(TWO._replace(step=2))
    bench.push(TWO._replace(step=2))
    bench.step(Term(TWO._replace(step=2)), Term(PushId(0, 0), 1.0, ONE), views=[TWO._replace(step=2), ONE])
    assert bench.store.distance_when_used(ONE) > 0 == bench.store.distance_when_used(TWO._replace(step=2))
    assert torch.equal(torch.from_numpy(bench.store.view(ONE)), bench.given[ONE])


def test_the_transport_is_told_before_the_model_or_a_view_changes() -> None:
    seen: list[bool] = []
    given: list[tuple[Tensor, Tensor]] = []

    def look() -> None:
        seen.append(all(torch.equal(memory, was) for memory, was in given))

    bench = Bench(hooks={"before_change": look})
    bench.give(ONE), bench.give(TWO)
    for push in (ONE, TWO):
        memories = [bench.x, torch.from_numpy(bench.store.view(push))]
        given[:] = [(memory, memory.clone()) for memory in memories]
        bench.push(push)
        bench.step(Term(push), views=[push])
    assert seen == [True, True]


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_at_rate_zero_the_direction_is_that_of_the_terms(settings: dict[str, Any]) -> None:
    bench = Bench(**settings)
    vectors = [bench.push(push) for push in (ONE, TWO)]
    assert bench.step(Term(ONE), Term(TWO), rate=0.0) == 0.0
    mean = (vectors[0].double() + vectors[1].double()) / 2
    expected = float(mean.norm()) * (1 + settings.get("momentum", 0.0))
    assert math.isclose(bench.store.direction_norm(), expected, rel_tol=1e-5)


@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.03)], ids=str)
def test_the_steady_state_allocates_nothing_of_the_size_of_the_model(compressor: Compressor) -> None:
    bench = Bench("whole", compressor, momentum=0.9)
    pushes = [PushId(worker, step) for step in range(1, 5) for worker in (1, 2, 3)]
    for push in pushes[:3]:
        bench.give(push)

    def turn(push: PushId) -> None:
        bench.store.combine(Step((Term(push),), share=0.3))
        bench.store.apply(Step((Term(push),), share=0.3), 0.1, [push])
        bench.give(push._replace(step=push.step + 1))

    for push in pushes:
        bench.push(push)
    for push in pushes[:6]:
        turn(push)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for push in pushes[6:]:
            turn(push)
    largest = max(event.cpu_memory_usage for event in profile.function_events)
    assert largest < bench.layout.size, largest  # bytes: a quarter of a model


@pytest.mark.parametrize("buckets", BUCKETS)
@pytest.mark.parametrize("pushes", [(ONE,), (ONE, TWO)])
def test_what_a_step_is_told_to_be_done_with_stays_as_it_is_then(buckets: str | int, pushes: Sequence[PushId]) -> None:
    told: list[tuple[int, Tensor]] = []
    begun: list[Sequence[int]] = []

    def begin_step(workers: Sequence[int], x: np.ndarray) -> Any:
        begun.append(workers)
        assert x.ctypes.data == bench.x.data_ptr()
        return lambda done: told.append((done, bench.x[:done].clone()))

    bench = Bench(buckets, hooks={"begin_step": begin_step}, momentum=0.9)
    for push in pushes:
        bench.push(push)
    bench.step(*[Term(push, 1.0) for push in pushes])
    assert begun == [[push.worker for push in pushes]]
    assert len({done for done, _ in told}) >= 3 and told[-1][0] == bench.x.numel()
    for done, seen in told:
        assert torch.equal(seen, bench.x[:done])
