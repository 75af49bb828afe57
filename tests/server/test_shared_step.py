"""A step that several make has the bits of one made alone, whoever makes which block and whoever never comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ps_elastic.compressors.identity import Identity
from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import WorkersLost
from ps_elastic.policies.events import PushId, Step, Term
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer, block_count
from ps_elastic.server.shared_step import Helper, Leader, TaskBoard, board_bytes
from ps_elastic.server.steppers import moment_count
from ps_elastic.server.store import ParameterStore
from ps_elastic.transport.messages import PushMessage
from ps_elastic.vectors.layout import Layout

WORKERS = (1, 2, 3)
LIMIT_S = 20.0
SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    {"momentum": 0.7, "weight_decay": 0.02, "decay_norm_and_bias": False},
    {"name": "adam"},
    {"name": "adamw", "weight_decay": 0.1, "decay_norm_and_bias": False},
]
pytestmark = pytest.mark.usefixtures("kernels")
TERMS = {
    "one": (Term(PushId(1, 1)),),
    "two": (Term(PushId(1, 1)), Term(PushId(2, 1))),
    "three, in another order": (Term(PushId(3, 1)), Term(PushId(1, 1)), Term(PushId(2, 1))),
    "weighted": (Term(PushId(2, 1), 0.3), Term(PushId(3, 1), 1.7)),
    "one, weighted": (Term(PushId(2, 1), 0.3),),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module() -> nn.Module:
    """Blocks that end where no tensor does, and small tensors: three of them, or seven where the small are apart."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(301, 400), nn.LayerNorm(400), nn.Linear(400, 37))


def nobody(workers: Sequence[int], count: int) -> None:
    """Nobody hears the call."""


def no_wait(at_work: Callable[[], Sequence[int]]) -> None:
    assert list(at_work()) == []


class Host:
    """A leader and helpers that share memory in this process, and an optimizer that has the same to do alone."""

    def __init__(self, call: Any = nobody, wait: Any = no_wait, most: int = 4, **settings: Any) -> None:
        self.layout, self.settings = Layout(module()), Optimizer(**settings)
        self.x, self.alone_x = self._model(), self._model()
        self.moments = [self.layout.empty() for _ in range(moment_count(self.settings))]
        self.alone = FlatOptimizer(self.settings, self.layout, self.alone_x)
        self.blocks = block_count(self.settings, self.layout)
        memory = np.zeros(board_bytes(4, self.blocks) + 64, np.uint8)
        self.board, self.lock = TaskBoard(memory, 4, self.blocks), threading.Lock()
        self.frames = {worker: self.layout.empty() for worker in WORKERS}
        self.called: list[tuple[tuple[int, ...], int]] = []
        self.call = call
        self.optimizer = self._optimizer()

        def noted(workers: Sequence[int], count: int) -> None:
            self.called.append((tuple(workers), count))
            self.call(workers, count)

        self.leader = Leader(self.optimizer, self.frames, self.board, self.lock, most, noted, wait)
        self.helpers = {
            worker: Helper(worker, self._optimizer(), self.frames, self.board, self.lock) for worker in WORKERS
        }
        self._generator = torch.Generator().manual_seed(1)

    def draw(self) -> None:
        for frame in self.frames.values():
            for view in self.layout.views(frame).values():
                view.normal_(generator=self._generator)

    def payloads(self) -> dict[PushId, tuple[tuple[Tensor, ...], ...]]:
        return {PushId(worker, 1): ((frame,),) for worker, frame in self.frames.items()}

    def step(self, terms: Sequence[Term] = TERMS["two"], rate: float = 0.1, combine: str = "mean") -> float | None:
        return self.leader.step(Step(tuple(terms), combine=combine), self.payloads(), rate)

    def step_alone(self, terms: Sequence[Term], rate: float, combine: str) -> float:
        """By a store, as where there is no crew."""
        store = ParameterStore(self.layout, self.alone_x, self.alone, [Identity()], keeps_versions=False)
        for push, _, _ in terms:
            store.take(push, [PushMessage(push.worker, 1, 0, (self.frames[push.worker].numpy(),))])
        store.combine(step := Step(tuple(terms), combine=combine))
        return store.apply(step, rate)

    def is_the_same(self) -> bool:
        return torch.equal(self.x, self.alone_x) and all(map(torch.equal, self.moments, self.alone._moments))

    def _model(self) -> Tensor:
        x = self.layout.empty()
        self.layout.attach(module(), x)
        return x

    def _optimizer(self) -> FlatOptimizer:
        return FlatOptimizer(self.settings, self.layout, self.x, self.moments)


def first_blocks_by_helpers(host: Host, counts: dict[int, int]) -> Any:
    """A call upon which worker w makes counts[w] blocks before the leader begins, which makes the rest."""

    def call(workers: Sequence[int], members: int) -> None:
        for worker, count in counts.items():
            helper = host.helpers[worker]
            helper._board = Stopping(host.board, count)  # type: ignore[assignment]
            assert helper.help()
            helper._board = host.board

    return call


class Stopping:
    """A board that tells after `count` blocks that there are no more."""

    def __init__(self, board: TaskBoard, count: int) -> None:
        self._board, self._left = board, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._board, name)

    def take(self, rank: int, number: int) -> int | None:
        self._left -= 1
        if self._left >= 0:
            return self._board.take(rank, number)
        self._board.busy[rank] = 0
        return None


COMBINED = [
    ("one", "mean"), ("two", "mean"), ("three, in another order", "mean"), ("weighted", "mean"),
    ("one, weighted", "mean"), ("two", "sum"), ("weighted", "sum"),
    *(pytest.param(terms, "sum", marks=pytest.mark.slow) for terms in TERMS if terms not in ("two", "weighted")),
]  # fmt: skip


@pytest.mark.parametrize(("terms", "combine"), COMBINED)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_any_split_has_the_bits_of_a_step_made_alone_and_of_the_length_of_its_move(settings, terms, combine):
    host = Host(most=6, **settings)
    for counts in ({}, {1: 1}, {2: 1, 1: 1}, {3: host.blocks}, {}):
        if len(counts) > len(TERMS[terms]):  # a step has no more members than terms
            continue
        host.call = first_blocks_by_helpers(host, counts)
        host.draw()
        moved = host.step(TERMS[terms], 0.1, combine)
        assert moved == host.step_alone(TERMS[terms], 0.1, combine) > 0
        assert host.is_the_same()
    assert host.board.done[0] > 0 and host.board.done[3] > 0


@pytest.mark.parametrize("settings", [{"momentum": 0.9, "decay_norm_and_bias": False, "weight_decay": 0.1}], ids=str)
def test_threads_that_take_what_they_can_make_the_same_step(settings):
    over = threading.Event()

    def wait(at_work: Callable[[], Sequence[int]]) -> None:
        while at_work():
            time.sleep(1e-4)

    host = Host(wait=wait, **settings)

    def work(helper: Helper) -> None:
        while not over.wait(1e-4):
            helper.help()

    threads = [threading.Thread(target=work, args=(helper,), daemon=True) for helper in host.helpers.values()]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            host.draw()
            terms = TERMS["three, in another order"]
            assert host.step(terms, 0.01) == host.step_alone(terms, 0.01, "mean")
            assert host.is_the_same()
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert sum(host.board.done.tolist()) == 30 * host.blocks and host.leader.steps == 30
    assert host.leader.helped == sum(host.board.done.tolist()[1:]) / (30 * host.blocks)


def test_who_comes_late_or_finds_no_seat_changes_nothing():
    host = Host(most=3, momentum=0.9)  # of which one computes: one member
    host.draw()
    seen: list[bool] = []

    def call(workers: Sequence[int], members: int) -> None:
        assert host.board.join() is not None  # somebody has taken it, and makes nothing yet
        seen.append(host.helpers[2].help())

    host.call = call
    host.step()
    x = host.x.clone()
    assert seen == [False] and host.board.done.tolist() == [host.blocks, 0, 0, 0]
    assert not host.helpers[1].help() and not host.helpers[1].help()  # late, and a second time without a look
    assert torch.equal(x, host.x) and host.called == [((1, 2), 1)]


def test_a_helper_that_missed_steps_is_in_the_step_of_the_others():
    host = Host(name="adam")  # whose steps depend on their number
    for round in range(6):
        host.call = first_blocks_by_helpers(host, {2: 2}) if round >= 4 else nobody
        host.draw()
        assert host.step() == host.step_alone(TERMS["two"], 0.1, "mean")
        assert host.is_the_same()
    assert host.board.done.tolist() == [6 * host.blocks - 4, 0, 4, 0]


def test_rank_0_waits_for_who_took_a_block_and_no_longer():
    host = Host(momentum=0.9)
    host.draw()
    begun: list[Any] = []

    def call(workers: Sequence[int], members: int) -> None:
        helper = host.helpers[2]
        task = host.board.join()
        assert task is not None
        helper._optimizer.go_to(task.nth)
        begun.append((helper._making(task), host.board.take(2, task.number), task))

    def wait(at_work: Callable[[], Sequence[int]]) -> None:
        assert list(at_work()) == [2] and not torch.equal(host.x, host.alone_x)
        make, i, task = begun.pop()
        host.board.squares[i] = make(i)
        assert host.board.take(2, task.number) is None
        assert list(at_work()) == []

    host.call, host.leader._wait = call, wait
    before = host.step_alone(TERMS["two"], 0.1, "mean")
    assert host.step() == before and host.is_the_same()


def test_a_helper_that_dies_in_a_block_ends_the_step_by_what_the_wait_raises():
    def wait(at_work: Callable[[], Sequence[int]]) -> None:
        raise WorkersLost(f"ranks {list(at_work())} died")

    def call(workers: Sequence[int], members: int) -> None:
        host.board.join()
        host.board.take(2, host.board.number)

    host = Host(call, wait)
    with pytest.raises(WorkersLost, match=r"ranks \[2\] died"):
        host.step()


def test_a_helper_that_fails_stays_at_work_so_that_its_block_is_missed():
    host = Host()

    def fail(i: int, *_: Any) -> float:
        raise MemoryError

    def call(workers: Sequence[int], members: int) -> None:
        host.helpers[1]._optimizer.step_block = fail  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            host.helpers[1].help()

    missed: list[list[int]] = []
    host.call, host.leader._wait = call, lambda at_work: missed.append(list(at_work()))
    host.step()
    assert missed == [[1]]


@pytest.mark.parametrize(
    ("why", "terms", "most", "combine"),
    [
        ("a payload that was copied", (Term(PushId(1, 1)), Term(PushId(2, 2))), 4, "mean"),
        ("a vector of the server", (Term(PushId(1, 1)), Term(PushId(0, 3))), 4, "mean"),
        ("another combiner", TERMS["two"], 4, "delay_compensated:scale=0.04"),
        ("one core", TERMS["three, in another order"], 1, "mean"),
        ("the other workers compute on all cores but one", TERMS["two"], 2, "mean"),
    ],
)
def test_what_cannot_be_shared_is_left_to_rank_0(why, terms, most, combine):
    host = Host(most=most)
    host.draw()
    payloads = {**host.payloads(), PushId(2, 2): ((host.frames[2].clone(),),)}
    before = host.x.clone()
    found = host.leader.step(Step(terms, combine=combine), payloads, 0.1)
    assert found is None and host.called == [] and torch.equal(before, host.x)
    assert host.board.number == 0 and host.leader.helped is None


def test_nobody_is_called_for_whom_there_is_no_core():
    for most, terms, members in ((4, "three, in another order", 3), (3, "three, in another order", 2), (4, "two", 2)):
        host = Host(most=most)
        host.step(TERMS[terms])
        assert [count for _, count in host.called] == [members]


class Watching:
    """In the place of a crew: notes the steps that it is asked for, and leaves them to the store."""

    def __init__(self) -> None:
        self.asked = 0

    def step(self, step: Step, payloads: Any, rate: float) -> float | None:
        self.asked += 1
        return None


def test_a_crew_is_asked_for_steps_that_do_nothing_but_change_the_model():
    one, two, three = PushId(1, 1), PushId(2, 1), PushId(3, 1)
    layout, gradient = Layout(module()), np.zeros(Layout(module()).size, np.float32)

    def asked(terms: Sequence[Term], *, given: Sequence[PushId] = (), views: Sequence[PushId] = (), **more: Any) -> int:
        x = layout.empty()
        crew: Any = Watching()
        store = ParameterStore(layout, x, FlatOptimizer(Optimizer(momentum=0.9), layout, x), [Identity()], crew=crew)
        for version in (0, 1):
            for push in given[version:] if version else given[:1]:
                store.give(push, View(version, 0.0, None, 0.0, 0.0), 0.1)
            if not version and len(given) > 1:
                store.combine(step := Step((Term(PushId(0, 0)),)))
                store.apply(step, 0.1)
        crew.asked = 0
        for push in (one, two):
            store.take(push, [PushMessage(push.worker, 1, 0, (gradient,))])
        store.combine(step := Step(tuple(terms), **more))
        assert math.isfinite(store.apply(step, 0.1, views))
        return crew.asked

    both = (Term(one), Term(two))
    assert asked(both) == 1
    assert asked((Term(one),), given=(one,), views=(one,)) == 1  # of the model as it is
    assert asked(both, apply="assign") == 0
    assert asked((Term(one),), given=(two,)) == 0  # which is to be kept
    assert asked((Term(two),), given=(one, two), views=(two, one)) == 0  # one of which is a version behind
    assert asked((Term(one), Term(PushId(0, 0), 1.0, three))) == 0  # a stand-in
