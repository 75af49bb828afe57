from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import LayerDesk, LayersAtOnce, fit

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.compressors.top_k import TopK
from ps_elastic.errors import WireError
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Action, Push, Release, Step
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.salf import Salf
from ps_elastic.policies.rules.salf_fill import SalfFill
from ps_elastic.transport.messages import Ask, Farewell, Layer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def uncorrected() -> Salf:
    return Salf(deadline_s=1.0, empty=(0.0, 0.0, 0.0))


def events(desk: LayerDesk) -> list[tuple[str, int]]:
    return [(line["event"], line["bucket"]) for line in map(json.loads, desk.log)]


def test_each_bucket_has_its_own_version_and_a_step_never_mixes_them() -> None:
    desk = LayerDesk(LayersAtOnce)
    desk.bucket(1, 2, 1.0)
    desk.bucket(2, 2, 1.0)
    desk.bucket(2, 1, 4.0)
    assert desk.model == [0.0, -2.0, -1.0]
    assert [(line["bucket"], line["version"], line["base"]) for line in desk.told("used")] == [
        (2, 0, 0),
        (2, 1, 0),
        (1, 0, 0),
    ]
    assert [line["discrepancy"] for line in desk.told("used")] == [0.0, 0.5 * 8, 0.0]
    assert desk.server.ledger.version == 2


def test_a_worker_goes_on_when_every_bucket_has_released_it() -> None:
    desk = LayerDesk(LayersAtOnce)
    assert desk.bucket(1, 2) == {} == desk.bucket(1, 0)
    reply = desk.bucket(1, 1)[1]
    assert (reply.step, reply.outcome) == (1, "used")
    assert reply.layers == tuple(Layer(1, "used", 0.5) for _ in range(3))


def test_a_slice_is_as_old_as_the_release_of_its_bucket_and_its_version_says_so() -> None:
    desk = LayerDesk(LayersAtOnce)
    desk.bucket(1, 2, 1.0)  # layer 2 is version 1, and worker 1 released by it
    desk.bucket(2, 2, 1.0)  # layer 2 is version 2
    desk.bucket(1, 1, 1.0)
    reply = desk.bucket(1, 0, 1.0)[1]
    assert [layer.version for layer in reply.layers] == [1, 1, 1] and reply.version == 1
    assert reply.model.reshape(3, 64)[:, 0].tolist() == [-0.5, -0.5, -0.5]
    assert desk.model == [-0.5, -0.5, -1.0]
    desk.bucket(1, 2, 1.0)
    (*_, line) = desk.told("used")
    assert (line["base"], line["version"], line["staleness"], line["discrepancy"]) == (1, 2, 1, 0.5 * 8)


def test_a_model_of_current_slices_is_the_live_one_and_not_a_copy() -> None:
    desk = LayerDesk(LayersAtOnce, 1)
    given = [reply.model for message in (desk.message(1, i, 1.0) for i in (2, 1, 0))
             for _, reply in desk.server.receive(message, 1.0)]  # fmt: skip
    assert [model.ctypes.data for model in given] == [desk.x.data_ptr()]


def test_a_push_is_counted_once_and_its_samples_by_the_parameters_used() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    desk.push(1, 1.0, 1.0, 1.0)
    desk.push(2, None, 1.0, 1.0)
    desk.tick(1.0)
    totals = desk.server.totals
    assert (totals.pushes, totals.used, totals.dropped, totals.samples_computed) == (2, 2, 0, 6)
    assert totals.samples == 3 + 2  # 2 of 3 layers of 3 samples
    assert totals.bytes_up == 5 * 256
    desk.push(1, None, None, None)
    desk.push(2, None, None, 1.0)
    desk.tick(2.0)
    assert (totals.pushes, totals.used, totals.dropped, totals.samples) == (4, 3, 1, 6)


def test_a_bucket_that_was_cut_off_is_an_asked_of_its_lane() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    desk.push(1, None, 1.0, 1.0)
    assert events(desk)[3:] == [("push", 2), ("push", 1), ("asked", 0)]
    assert desk.push(2, None, None, 4.0) == {}
    replies = desk.tick(1.0)
    assert [(reply.step, reply.outcome) for reply in replies.values()] == [(1, "used")] * 2
    assert desk.model == [0.0, -0.5, -1.25]  # layer 0 stays
    assert [layer.version for layer in replies[1].layers] == [0, 1, 1] and replies[1].version == 0
    assert [layer.outcome for layer in replies[2].layers] == ["held", "held", "used"]


def test_late_is_who_was_sent_its_model_before_though_the_version_be_the_same() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    desk.bucket(1, 2)
    desk.tick(1.0)  # a round of layers 0 and 1 without a push: their version stays
    assert desk.server.wake_at == 2.0
    desk.bucket(1, 1)
    reply = desk.bucket(1, 0)[1]
    assert [(line["bucket"], line["reason"]) for line in desk.told("dropped")] == [(1, "late"), (0, "late")]
    assert [layer.outcome for layer in reply.layers] == ["dropped", "dropped", "used"] and reply.outcome == "used"
    desk.push(1, 1.0, 1.0, 1.0)  # begun within this round, so in time
    desk.tick(2.0)
    assert desk.model == [-0.5, -0.5, -1.0]
    assert all(line["discrepancy"] == 0 for line in desk.told("used"))


def test_rounds_of_all_layers_end_together_though_everybody_is_early() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    assert desk.push(1, 1.0, 1.0, 1.0) == {} == desk.push(2, 1.0, 1.0, 1.0)
    assert set(desk.tick(1.0)) == {1, 2}
    assert [event for event, _ in events(desk)[-3:]] == ["woke"] * 3


def test_a_lost_reply_is_sent_again_once_and_says_the_same() -> None:
    desk = LayerDesk(LayersAtOnce)
    first = desk.push(1, 1.0, 1.0, 1.0)[1]
    again = desk.send(Ask(1, 1))[1]
    assert again._replace(model=None) == first._replace(model=None)
    assert again.model.tolist() == first.model.tolist()
    assert desk.send(Ask(1, 1)).keys() == {1}


def test_a_lost_push_is_asked_about_in_every_lane_and_the_next_step_is_the_same_for_all() -> None:
    desk = LayerDesk(LayersAtOnce)
    reply = desk.send(Ask(1, 1))[1]
    assert [event for event, _ in events(desk)[-3:]] == ["asked"] * 3
    desk.views[1] = reply
    assert desk.push(1, 1.0, 1.0, 1.0)[1].step == 2


def test_a_push_that_comes_twice_is_used_once() -> None:
    desk = LayerDesk(LayersAtOnce)
    messages = [desk.message(1, i, 1.0) for i in (2, 1, 0)]
    for message in messages:
        desk.send(message)
    assert [desk.send(message) for message in messages] == [{}, {}, {}]
    assert desk.model == [-0.5] * 3 and desk.server.totals.pushes == 1


def test_a_worker_that_leaves_in_the_middle_of_a_push_leaves_what_came() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    desk.bucket(1, 2)
    desk.push(2, 3.0, 3.0, 3.0)
    desk.take(desk.server.leave(1, 0.5))
    assert desk.tick(1.0).keys() == {2}
    assert desk.model == [-1.5, -1.5, -1.0] and desk.server.lost_workers == [1]
    desk.take(desk.server.leave(2, 1.5))
    totals = desk.server.totals
    assert (totals.pushes, totals.used, totals.dropped) == (2, 2, 0)
    assert not desk.server.run._met and not desk.server.run._gathered


def test_a_worker_that_comes_back_goes_on_at_the_same_step_in_every_lane() -> None:
    desk = LayerDesk(LayersAtOnce)
    desk.bucket(1, 2)  # released by its shard for step 2; the others still owe step 1
    desk.take(desk.server.leave(1, 0.5))
    desk.take(desk.server.join(1, 1.0))
    assert {shard.ledger.workers[1].seen for shard in desk.server.shards} == {2}
    desk.views[1] = desk.send(Ask(1, 2))[1]
    assert desk.push(1, 1.0, 1.0, 1.0)[1].step == 3
    assert replay_decisions(LayersAtOnce(), desk.log, [1, 2]).match


def test_the_end_drops_what_is_held_in_every_lane_and_tells_everybody_to_stop() -> None:
    desk = LayerDesk(lambda: uncorrected(), 2)
    desk.push(1, 1.0, 1.0, 1.0)
    desk.bucket(2, 2)
    replies = desk.take(desk.server.stop(0.5))
    assert replies.keys() == {1} and replies[1].model is None
    assert desk.bucket(2, 1) == {} and desk.bucket(2, 0)[2].model is None
    assert {line["reason"] for line in desk.told("dropped")} == {"done"} and len(desk.told("dropped")) == 6
    for worker in (1, 2):
        desk.send(Farewell(worker, 1))
    assert desk.server.finished


def test_the_budget_ends_the_run() -> None:
    desk = LayerDesk(LayersAtOnce, budget=4)
    desk.push(1, 1.0, 1.0, 1.0)
    desk.bucket(2, 2)
    assert desk.server.run.over and desk.server.ledger.done and desk.server.totals.samples == 4


def test_what_was_held_beyond_its_reply_is_settled_by_bucket() -> None:
    desk = LayerDesk(lambda: ReleaseThenUse())
    assert desk.push(1, 1.0, 1.0, 1.0)[1].outcome == "held"
    desk.bucket(2, 1)
    assert [layer.outcome for layer in desk.push(1, None, None, None)[1].layers] == ["held"] * 3
    (settled,) = desk.views[1].settled
    assert (settled.step, settled.outcome, settled.bucket) == (1, "used", 1)


def test_a_bucket_that_there_is_not_is_refused() -> None:
    desk = LayerDesk(LayersAtOnce)
    with pytest.raises(WireError, match="worker 1: got bucket 7, expected one of 3"):
        desk.send(desk.message(1, 0, 1.0)._replace(bucket=7))


@pytest.mark.parametrize("make", [LayersAtOnce, SalfFill, lambda: Salf(empty="estimated")])
def test_the_decisions_of_every_lane_replay(make: Callable[[], Policy]) -> None:
    desk = LayerDesk(make, 3)
    for turn in range(1, 5):
        for worker in (1, 2, 3):
            if desk.views[worker].step == turn - 1:
                desk.push(worker, 1.0 if worker + turn > 4 else None, 1.0 if worker > 1 else None, 1.0)
        desk.tick(float(turn))
    replay = replay_decisions(make(), desk.log, range(1, 4))
    assert replay.match and replay.events == len(desk.log), replay.first_mismatch
    changed = [line.replace('"share": 1.0', '"share": 0.5') for line in desk.log]
    changed[-1] = desk.log[-1].replace('"actions": [', '"actions": [["wake", 9.0], ')
    assert not replay_decisions(make(), changed, range(1, 4)).match


def test_payloads_and_views_are_freed() -> None:
    desk = LayerDesk(lambda: uncorrected(), 3, compressor=TopK(0.5))
    for turn in range(1, 6):
        for worker in (1, 2, 3):
            if desk.views[worker].step < turn:
                desk.push(worker, None if worker == turn % 3 else 1.0, 1.0, 2.0)
        desk.tick(float(turn))
    for part in desk.server.store.parts:  # type: ignore[attr-defined]
        assert not part.payloads.of and len(part.views.versions) == 3
    desk.take(desk.server.stop(9.0))
    for worker in (1, 2, 3):
        desk.push(worker, 1.0, 1.0, 1.0)
        desk.take(desk.server.leave(worker, 10.0))
    for part in desk.server.store.parts:  # type: ignore[attr-defined]
        assert not part.payloads.of and not part.views.versions and not part.snapshots.copies


HEAVY = ("optimizer.momentum=0.9", "optimizer.weight_decay=0.01", "optimizer.nesterov=true")


@pytest.mark.parametrize("extra", [(), HEAVY])
def test_with_everybody_in_time_the_run_is_the_synchronous_one_bit_for_bit(
    tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """A round that uses everything in every layer is a synchronous step; momentum is elementwise."""
    plain = fit(tmp_path, "helpers:Blobs", *extra, "buckets=layer", samples=120)
    layers = fit(tmp_path, "helpers:Blobs", *extra, "policy=salf", "policy.empty=[0,0,0,0]", samples=120)
    assert layers.summary["parameters_sha256"] == plain.summary["parameters_sha256"]
    assert layers.summary["samples"] == plain.summary["samples"] == 120
    assert {line["bucket"] for line in layers.lines(0, "used")} == {0, 1, 2, 3}


def test_lines_of_whole_pushes_name_no_bucket(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "buckets=layer", samples=24)
    assert not any("bucket" in line for line in run.lines(0, "used"))
    assert not any('"bucket' in line for line in run.events)


class ReleaseThenUse(LayersAtOnce):
    """The first push of a layer is held and its worker let go; the second uses both."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) > 1:
            yield Step.mean(ledger.held)
        yield Release((push.id.worker,))


def test_a_worker_observes_what_others_moved_by_the_weights_of_its_layers(tmp_path: Path) -> None:
    """Alone, and with a rule that uses what it pushes at once, it sees nothing move but what it moved itself."""
    run = fit(tmp_path, "helpers:Blobs", "policy=helpers:LayersAtOnce", "optimizer.lr=0.5", workers=1, samples=40)
    *moved, last = run.column("moved", rank=1, event="reply")
    assert len(moved) >= 9 and max(moved) < 1e-6 and last is None  # the last reply has no model
