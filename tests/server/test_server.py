"""Stories told to a server: messages in, replies out; no transport, no clock, no training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import Ahead, Dealer, Desk, Point, Surveyor
from torch import Tensor

from ps_elastic.compressors.top_k import TopK
from ps_elastic.config.sections import Optimizer, Target
from ps_elastic.errors import PolicyError, TaskError, WireError
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Action, Push, Release, Step, Wake
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.first_k import FirstK
from ps_elastic.policies.rules.stale_synchronous import StaleSynchronous
from ps_elastic.policies.rules.synchronous import Synchronous
from ps_elastic.server.evaluator import Evaluation
from ps_elastic.transport.messages import MOST_SETTLED, Ask, Farewell, Reply


def ends(replies: dict[int, Reply]) -> dict[int, tuple[Any, ...]]:
    """worker -> (step answered, outcome, version, first entry of the model)."""
    return {
        worker: (r.step, r.outcome, r.version, None if r.model is None else float(r.model[0]))
        for worker, r in replies.items()
    }


def test_everybody_starts_with_version_0() -> None:
    desk = Desk(Synchronous(), 3)
    assert ends(desk.views) == dict.fromkeys((1, 2, 3), (0, "held", 0, 0.0))
    assert all(reply.alpha == 0.5 and math.isnan(reply.discrepancy) for reply in desk.views.values())


def test_a_round_is_one_step_by_the_mean_and_one_reply_each() -> None:
    desk = Desk(Synchronous(), 2)
    assert desk.push(2, 3.0) == {}
    replies = desk.push(1, 1.0)
    assert ends(replies) == {1: (1, "used", 1, -1.0), 2: (1, "used", 1, -1.0)}
    assert all(reply.discrepancy == 0 and reply.weight == 0.25 for reply in replies.values())


def test_pushes_are_added_in_worker_order_whatever_order_they_came_in() -> None:
    big, small = 1e8, 3.0  # (1e8 + 3) - 1e8 is 0 in float32, and (1e8 - 1e8) + 3 is 3
    desk = Desk(Synchronous(), 3, optimizer=Optimizer(lr=3.0))
    for worker, value in ((3, -big), (1, big), (2, small)):
        desk.push(worker, value)
    assert float(desk.x[0]) == 0.0


def test_a_push_used_at_once_is_answered_at_once() -> None:
    desk = Desk(Asynchronous(), 2)
    assert ends(desk.push(1, 1.0)) == {1: (1, "used", 1, -0.25)}
    replies = desk.push(2, 1.0)
    assert ends(replies) == {2: (1, "used", 2, -0.5)}
    assert replies[2].discrepancy == pytest.approx(0.25 * 8)  # 64 entries of 0.25
    (fresh, stale) = desk.told("used")
    assert (fresh["staleness"], fresh["discrepancy"], fresh["path_length"]) == (0, 0.0, 0.0)
    assert (stale["staleness"], stale["base"], stale["version"]) == (1, 0, 1)


def test_a_line_of_a_push_used_has_every_field_of_the_contract() -> None:
    desk = Desk(Asynchronous(), 2)
    desk.push(1, 1.0, norm=2.0, payload_norm=1.5, residual_norm=0.5)
    (line,) = desk.told("used")
    assert line == {
        "event": "used", "t_s": 1.0, "rank": 0, "worker": 1, "step": 1, "base": 0, "version": 0, "x": "srv",
        "staleness": 0, "discrepancy": 0.0, "B": 0.0, "step_size": 0.5, "path_length": 0.0, "norm": 2.0,
        "payload_norm": 1.5, "residual_norm": 0.5, "weight": 1.0, "share": 0.5,
    }  # fmt: skip


def test_a_late_push_is_dropped_and_its_worker_told() -> None:
    desk = Desk(FirstK(k=1), 2)
    assert ends(desk.push(1, 1.0)) == {1: (1, "used", 1, -0.5)}
    replies = desk.push(2, 9.0)
    assert ends(replies) == {2: (1, "dropped", 1, -0.5)}
    assert math.isnan(replies[2].discrepancy) and replies[2].weight == 0
    (line,) = desk.told("dropped")
    assert line == {"event": "dropped", "t_s": 2.0, "rank": 0, "worker": 2, "step": 1, "reason": "late"}


# ---- workers that go on before their push is used


def test_a_push_may_be_held_while_its_worker_goes_on() -> None:
    desk = Desk(Ahead(need=3), 2)
    assert ends(desk.push(1, 1.0)) == {1: (1, "held", 0, 0.0)}
    assert ends(desk.push(1, 2.0)) == {1: (2, "held", 0, 0.0)}
    assert ends(desk.push(2, 3.0)) == {2: (1, "held", 0, 0.0)}  # released, then used
    assert float(desk.x[0]) == -1.0
    replies = desk.push(1, 1.0)
    assert [(s.step, s.outcome, s.discrepancy) for s in replies[1].settled] == [(1, "used", 0.0), (2, "used", 0.0)]
    assert desk.push(1, 1.0)[1].settled == ()  # each fate is told once


def test_a_payload_is_copied_out_of_the_transport_before_its_worker_goes_on() -> None:
    desk = Desk(Ahead(need=2), 2)
    memory = np.ones(64, np.float32)
    first = desk.message(1)._replace(arrays=(memory,))
    for worker, reply in desk.server.receive(first, 1.0):
        desk.take([(worker, reply)])
        memory[:] = 99  # the reply is on its way: the next push comes in
    desk.push(2, 3.0)
    assert float(desk.x[0]) == -1.0


def test_a_payload_used_before_its_worker_goes_on_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(Asynchronous(), 2)
    copies: list[Tensor] = []
    clone = torch.Tensor.clone

    def watched(tensor: Tensor) -> Tensor:
        copies.append(tensor)
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", watched)
    desk.push(1, 1.0)
    assert copies == []


def test_a_held_push_that_is_dropped_is_told_later() -> None:
    desk = Desk(Ahead(need=3, scorned=1), 2)
    desk.push(1, 1.0)
    desk.push(2, 2.0)
    desk.push(1, 1.0)
    assert float(desk.x[0]) == -1.0
    settled = desk.push(1, 1.0)[1].settled
    assert [(s.step, s.outcome) for s in settled] == [(1, "dropped"), (2, "dropped")]
    assert all(math.isnan(s.discrepancy) for s in settled)


def test_more_fates_than_one_reply_holds_come_with_the_next() -> None:
    desk = Desk(Ahead(need=MOST_SETTLED + 10), 2)
    for _ in range(MOST_SETTLED + 10):
        desk.push(1, 0.0)
    first, second, third = (desk.push(1, 0.0)[1].settled for _ in range(3))
    assert [len(first), len(second), len(third)] == [MOST_SETTLED, 10, 0]
    assert [s.step for s in first + second] == list(range(1, MOST_SETTLED + 11))


# ---- the end


def test_the_run_ends_at_the_first_version_whose_samples_reach_the_budget() -> None:
    desk = Desk(Synchronous(), 2, budget=3)
    desk.push(1, 1.0)
    assert all(reply.model is not None for reply in desk.push(2, 1.0).values())
    desk.push(1, 1.0)
    replies = desk.push(2, 1.0)
    assert {w: (r.outcome, r.model) for w, r in replies.items()} == {1: ("used", None), 2: ("used", None)}
    assert (desk.server.totals.samples, desk.server.totals.dropped) == (4, 0)
    assert not desk.server.finished
    desk.send(Farewell(1, 2))
    assert not desk.server.finished
    desk.send(Farewell(2, 2))
    assert desk.server.finished


def test_pushes_that_come_after_the_end_are_dropped_as_done() -> None:
    desk = Desk(Asynchronous(), 3, budget=1)
    assert desk.push(1, 1.0)[1].model is None
    after = float(desk.x[0])
    replies = desk.push(2, 1.0)
    assert (replies[2].outcome, replies[2].model) == ("dropped", None)
    assert desk.told("dropped")[0]["reason"] == "done"
    assert float(desk.x[0]) == after and desk.server.totals.used == 1
    assert desk.server.totals.samples_computed == 2


def test_held_pushes_are_dropped_at_the_end() -> None:
    desk = Desk(Synchronous(), 2)
    desk.push(1, 1.0)
    replies = desk.take(desk.server.stop(5.0))
    assert ends(replies) == {1: (1, "dropped", 0, None)}
    assert ends(desk.push(2, 1.0)) == {2: (1, "dropped", 0, None)}


class Judge:
    """An evaluator whose loss is 1 / samples."""

    due, has_begun = 0, True

    def __init__(self) -> None:
        self.statistics: dict[int, np.ndarray] = {}

    def submit(self, x: Tensor, samples: int, version: int, now: float) -> None:
        self.last = Evaluation(samples, version, now, {"loss": 1.0 / samples})

    def finished(self) -> Iterator[Evaluation]:
        yield self.last


def test_a_target_reached_ends_the_run() -> None:
    desk = Desk(Asynchronous(), 2, evaluator=Judge(), target=Target("loss", "<=", 0.34))
    for _ in range(2):
        assert desk.push(1, 1.0)[1].model is not None
    desk.push(1, 1.0)
    assert desk.server.ledger.done and desk.server.totals.time_to_target_s == 3.0
    assert desk.push(2, 1.0)[2].model is None
    assert [line["samples"] for line in desk.told("evaluated")] == [1, 2, 3, 3]


# ---- what is lost, repeated, or wrong


def test_a_repeated_push_is_ignored() -> None:
    desk = Desk(Asynchronous(), 2)
    message = desk.message(1, 1.0)
    desk.send(message)
    before = desk.x.clone()
    assert desk.send(message) == {}
    assert torch.equal(desk.x, before) and desk.server.totals.pushes == 1


@pytest.mark.parametrize("discrepancy", ["exact", "bound", "off"])
def test_a_worker_that_asks_again_gets_its_reply_again(discrepancy: str) -> None:
    """Its ask and the reply may have crossed; the version may have moved on since."""
    desk = Desk(Asynchronous(), 2, discrepancy=discrepancy)
    first = desk.push(1, 1.0)[1]
    desk.push(2, 1.0)
    again = desk.send(Ask(1, 1))[1]
    assert again._replace(model=None) == first._replace(model=None) or discrepancy == "off"
    assert (again.step, again.version, again.outcome) == (1, 1, "used")
    if discrepancy == "exact":
        assert np.array_equal(again.model, first.model)
    replies = desk.push(1, 1.0)
    assert replies[1].outcome == "used"
    line = desk.told("used")[-1]
    assert line["discrepancy"] is None if discrepancy == "off" else line["discrepancy"] > 0


def test_asking_while_waiting_changes_nothing() -> None:
    desk = Desk(Synchronous(), 2)
    desk.push(1, 1.0)
    assert desk.send(Ask(1, 1)) == {}
    assert ends(desk.push(2, 1.0)).keys() == {1, 2}


def test_a_lost_push_is_computed_anew_on_the_model_of_now() -> None:
    desk = Desk(Asynchronous(), 2)
    desk.push(2, 1.0)
    replies = desk.send(Ask(1, 1))  # it has sent step 1, which never came
    assert ends(replies) == {1: (1, "held", 1, -0.25)}
    assert ends(desk.push(1, 1.0)) == {1: (2, "used", 2, -0.5)}
    assert desk.told("used")[-1]["staleness"] == 0


def test_the_others_go_on_when_a_worker_leaves() -> None:
    desk = Desk(Synchronous(), 3, budget=2)
    desk.push(1, 1.0)
    desk.push(2, 1.0)
    replies = desk.take(desk.server.leave(3, 9.0))
    assert {w: r.outcome for w, r in replies.items()} == {1: "used", 2: "used"}
    assert desk.server.lost_workers == [3]
    desk.send(Farewell(1, 1))
    desk.send(Farewell(2, 1))
    assert desk.server.finished


def test_a_worker_that_leaves_after_its_farewell_is_not_waited_for() -> None:
    desk = Desk(Synchronous(), 2, budget=2)
    desk.push(1, 1.0)
    desk.push(2, 1.0)
    desk.send(Farewell(1, 1))
    desk.take(desk.server.leave(1, 9.0))
    desk.send(Farewell(2, 1))
    assert desk.server.finished


def test_a_worker_that_failed_ends_the_run_by_rank() -> None:
    desk = Desk(Synchronous(), 2)
    with pytest.raises(TaskError, match=r"^rank 2: step 4: the gradient is not finite$"):
        desk.send(Farewell(2, 4, "step 4: the gradient is not finite", 1))


def test_what_cannot_be_is_refused() -> None:
    desk = Desk(Synchronous(), 2, compressor=TopK(ratio=0.5))
    with pytest.raises(WireError, match="the server got a Reply"):
        desk.send(Reply(1, 1, 1, None))
    with pytest.raises(WireError, match="was never assigned"):
        desk.push(1, 1.0, step=2)
    with pytest.raises(WireError, match="says base 7, but its model was version 0"):
        desk.push(1, 1.0, base=7)
    with pytest.raises(WireError, match="top_k: got"):
        desk.push(1, 1.0, arrays=(np.zeros(3, np.float32),))


def test_a_rule_that_breaks_a_law_is_named() -> None:
    @dataclass
    class Greedy(Policy):
        def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
            yield Step.mean([push.id, push.id])
            yield Release((push.id.worker,))

    desk = Desk(Greedy(), 2)
    with pytest.raises(PolicyError, match="policy Greedy on Push"):
        desk.push(1, 1.0)


# ---- buckets


def test_a_rule_sees_a_push_when_all_of_its_buckets_are_here() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    desk = Desk(Asynchronous(), 2, model=model, buckets="layer")
    before = desk.x.clone()
    assert len(desk.layout.buckets) == 4

    def part(worker: int, bucket: int) -> dict[int, Reply]:
        array = np.full(desk.layout.buckets[bucket].numel, float(worker), np.float32)
        return desk.send(desk.message(worker)._replace(arrays=(array,), bucket=bucket, buckets=4))

    for bucket in range(3):
        assert part(1, bucket) == part(2, bucket) == {}
    assert part(2, 3).keys() == {2} and part(1, 3).keys() == {1}
    assert torch.allclose(desk.x, before - 0.25 * 3)
    assert desk.server.totals.pushes == 2
    assert desk.server.totals.bytes_up == 2 * 4 * desk.layout.size


# ---- discrepancy


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rule", [Synchronous, Asynchronous, StaleSynchronous, FirstK, Dealer])
def test_every_discrepancy_is_the_distance_from_the_view_given(rule: type[Policy], seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    desk = Desk(rule(), 4, optimizer=Optimizer(lr=0.1, momentum=0.5))
    queues: dict[int, list[Reply]] = {worker: [reply] for worker, reply in desk.views.items()}
    checked = 0
    for _ in range(80):
        worker = draw.choice([w for w, queue in queues.items() if queue])
        reply = queues[worker].pop(0)
        desk.views[worker] = reply
        x, lines = desk.x.clone(), len(desk.told("used"))
        given = dict(desk.views)
        for other, answer in desk.push(worker, torch.randn(64, generator=generator)).items():
            queues[other].append(answer)
        for line in desk.told("used")[lines:]:
            view = given[line["worker"]]
            assert view.version == line["base"]
            expected = float((x.double() - torch.from_numpy(view.model).double()).norm())
            assert line["discrepancy"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert line["discrepancy"] <= line["path_length"]
            checked += 1
    assert checked > 25


def test_a_bound_is_the_path_length_and_off_is_nothing() -> None:
    lines = {}
    for mode in ("exact", "bound", "off"):
        desk = Desk(Asynchronous(), 3, discrepancy=mode)
        for _ in range(3):
            for worker, value in ((1, 1.0), (2, -1.0), (3, 2.0)):
                desk.push(worker, value)
        lines[mode] = desk.told("used")
        assert desk.server.store.snapshots.peak == (0 if mode != "exact" else 2)
    assert [line["discrepancy"] for line in lines["bound"]] == [line["path_length"] for line in lines["exact"]]
    assert [line["discrepancy"] for line in lines["off"]] == [None] * 9
    assert any(a["discrepancy"] < b["discrepancy"] for a, b in zip(lines["exact"], lines["bound"], strict=True))
    assert desk.server.totals.summary(1.0)["discrepancy"] == {"rms": None, "max": None}


def test_b_is_the_discrepancy_over_the_largest_step_size_since_the_view() -> None:
    rates = [0.25, 0.5, 0.125, 0.0625, 0.0625]
    desk = Desk(Asynchronous(), 2, alpha=lambda samples: rates[samples])
    for _ in range(3):
        desk.push(1, 1.0)
    desk.push(2, 1.0)
    line = desk.told("used")[-1]
    assert line["discrepancy"] == pytest.approx(8 * 0.5 * (0.25 + 0.5 + 0.125))
    assert line["B"] == line["discrepancy"] / 0.5
    assert desk.server.totals.summary(1.0)["B_max"] == line["B"]


def test_a_view_given_stays_as_it_was_until_its_push_is_used() -> None:
    desk = Desk(Asynchronous(), 3)
    models = {w: r.model.copy() for w, r in desk.views.items()}
    for _ in range(5):
        desk.push(1, 1.0)
    assert np.array_equal(desk.send(Ask(2, 0))[2].model, models[2])
    assert not np.array_equal(desk.views[1].model, models[1])


def test_copies_of_the_model_are_freed_with_the_last_view() -> None:
    desk = Desk(Asynchronous(), 3)
    for _ in range(20):
        for worker in (1, 2, 3):
            desk.push(worker, 1.0)
    assert desk.server.store.snapshots.peak == 2  # the views of the two that do not push now
    desk.take(desk.server.leave(2, 99.0))
    desk.take(desk.server.leave(3, 99.0))
    for _ in range(3):
        desk.push(1, 1.0)
    assert not desk.server.store.snapshots.copies


def test_a_rule_may_ask_for_the_true_distances() -> None:
    policy = Surveyor()
    desk = Desk(policy, 3)
    desk.push(1, 1.0)
    desk.push(1, -1.0)  # back where it was
    # Asked before the release, of the views of workers 2 and 3: in units of alpha = 0.5, 64 entries of 0.5 / 3.
    assert policy.seen == pytest.approx([8 / 3, 8 / 3, 0.0, 0.0], abs=1e-6)
    answers = [action for line in map(json.loads, desk.log) for action in line["actions"] if action[0] == "measured"]
    assert [(worker, step) for _, worker, step, _ in answers] == [(2, 1), (3, 1)] * 2


def test_a_job_queued_for_a_busy_worker_is_on_the_model_of_when_it_was_given() -> None:
    """Worker 1 pushes; the next job goes to worker 2, which computes: it starts it when it next waits."""

    @dataclass
    class ToTwo(Policy):
        jobs = 2

        def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
            yield Step.mean([push.id], share=0.5)
            yield Release((2,) if push.id.worker == 1 else (1,))

    desk = Desk(ToTwo(), 2)
    assert desk.push(1, 1.0) == {}  # x = -0.25, given to worker 2 as its second job
    replies = desk.push(2, 1.0)
    assert ends(replies) == {1: (1, "used", 2, -0.5), 2: (1, "held", 1, -0.25)}  # the job first, then the rule
    settled = desk.push(2, 1.0)
    assert desk.told("used")[-1]["base"] == 1
    assert desk.told("used")[-1]["discrepancy"] == pytest.approx(8 * 0.25)
    assert 2 not in settled


# ---- step size and time


def test_the_step_size_follows_the_samples_and_the_reply_tells_the_next() -> None:
    desk = Desk(Asynchronous(), 2, alpha=lambda samples: 1.0 / (1 + samples))
    assert desk.push(1, 1.0)[1].alpha == 0.5
    assert desk.push(1, 1.0)[1].alpha == pytest.approx(1 / 3)
    assert [line["step_size"] for line in desk.told("used")] == [1.0, 0.5]
    assert float(desk.x[0]) == pytest.approx(-0.5 * (1.0 + 0.5))


def test_at_step_size_zero_nothing_moves_and_the_travel_is_the_direction() -> None:
    desk = Desk(Asynchronous(), 2, alpha=lambda samples: 0.1 if samples else 0.0)
    desk.push(1, 1.0)
    assert not desk.x.any()
    assert desk.server.ledger.travelled == pytest.approx(0.5 * 8)
    assert desk.push(2, 1.0)[2].discrepancy == 0


def test_travelled_bounds_every_discrepancy_over_alpha() -> None:
    desk = Desk(Asynchronous(), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for worker in (1, 2, 3):
            view = next(v for p, v in desk.server.ledger.views.items() if p.worker == worker)
            bound = desk.server.ledger.travelled - view.travelled
            desk.push(worker, torch.randn(64, generator=generator))
            assert desk.told("used")[-1]["discrepancy"] / 0.5 <= bound * (1 + 1e-6)


@dataclass
class Reaching(Policy):
    """Asynchronous; notes how far it was told the next step could go, and how far that went."""

    uses_reach: ClassVar[bool] = True
    seen: list[tuple[float, float]] = field(init=False, default_factory=list)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        reach = ledger.reach(push.payload_norm, 0.5)
        yield Step.mean([push.id], share=0.5)
        self.seen.append((ledger.applied.moved, reach))
        yield Release((push.id.worker,))


@pytest.mark.parametrize("size_of_x", [1.0, 1e4])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}])
def test_no_step_goes_farther_than_the_rule_was_told(settings: dict[str, Any], size_of_x: float) -> None:
    """With x large and the steps small float32 alone moves the model by more than alpha ||g||: hence the rounding."""
    policy = Reaching()
    optimizer = Optimizer(lr=1e-3, **settings)
    desk = Desk(policy, 2, optimizer=optimizer, model=Point(torch.full((64,), size_of_x)))
    generator = torch.Generator().manual_seed(0)
    for turn in range(40):
        desk.push(1 + turn % 2, torch.randn(64, generator=generator))
        norm = float(desk.x.double().norm())
        assert desk.server.ledger.applied.rounding == pytest.approx(2.0**-24 * norm / 1e-3, rel=1e-6)
    assert all(moved <= reach for moved, reach in policy.seen)
    assert max(moved / reach for moved, reach in policy.seen) > 0.2


def test_what_no_rule_asks_for_is_not_measured() -> None:
    desk = Desk(Asynchronous(), 2, optimizer=Optimizer(momentum=0.9), model=Point(torch.ones(64)))
    desk.push(1, 1.0)
    applied = desk.server.ledger.applied
    assert (applied.coast, applied.gain, applied.rounding) == (0.0, 1.0, 0.0)


def test_running_statistics_are_copied_out_of_the_transport() -> None:
    judge = Judge()
    desk = Desk(Asynchronous(), 2, evaluator=judge)
    memory = np.ones(3, np.float32)
    desk.push(2, 1.0, statistics=memory)
    memory[:] = 9
    assert {worker: own.tolist() for worker, own in judge.statistics.items()} == {2: [1.0, 1.0, 1.0]}


def test_a_wake_is_due_by_the_clock() -> None:
    @dataclass
    class Late(Policy):
        def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
            yield Wake(ledger.now + 10)

        def on_wake(self, ledger: Ledger) -> Iterator[Action]:
            yield Step.mean(ledger.held)
            yield Release(tuple(ledger.waiting))

    desk = Desk(Late(), 2)
    assert desk.push(1, 1.0) == {} and desk.server.wake_at == 11.0
    assert desk.take(desk.server.tick(10.9)) == {}
    assert ends(desk.take(desk.server.tick(11.0))) == {1: (1, "used", 1, -0.5)}
    assert desk.server.wake_at is None
