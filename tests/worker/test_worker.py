from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, Dropout, Images, Odd, Poisoned, Slope
from torch import Tensor, nn

from ps_elastic.compressors import Compressor, ErrorFeedback
from ps_elastic.compressors.identity import Identity
from ps_elastic.compressors.top_k import TopK
from ps_elastic.errors import TaskError
from ps_elastic.records.tracker import Tracker
from ps_elastic.tasks import Task
from ps_elastic.transport.messages import Layer, PushMessage, Reply, Settled
from ps_elastic.vectors.layout import Layout, statistics_of
from ps_elastic.worker.flat_module import FlatModule, Memory, ModelLives
from ps_elastic.worker.gradients import GradientSource
from ps_elastic.worker.updates import Update
from ps_elastic.worker.updates.cut_sgd import CutSgd
from ps_elastic.worker.updates.sgd import Sgd
from ps_elastic.worker.worker import Worker


def pushed(worker: Worker) -> list[PushMessage]:
    """The messages of the next push, in the order of the buckets."""
    messages: list[PushMessage] = []
    worker.push(messages.append)
    return sorted(messages, key=lambda message: message.bucket)


class Hand:
    """A worker, answered by hand."""

    def __init__(
        self, task: Task, rank: int = 1, compressor: Compressor | None = None, *, feedback: bool = False,
        buckets: str | int = "whole", update: Update | None = None, memory: Memory | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.model = task.model(0)
        self.layout = Layout(self.model, buckets)
        coders: list[Compressor | ErrorFeedback] = [
            (compressor or Identity()).fresh(b.numel, torch.Generator()) for b in self.layout.buckets
        ]
        if feedback:
            coders = [ErrorFeedback(c, b.numel) for c, b in zip(coders, self.layout.buckets, strict=True)]  # type: ignore[arg-type]
        self.coders = coders
        self.lines: list[dict[str, Any]] = []
        tracker = Tracker(rank, lambda line: self.lines.append(json.loads(line)))
        names = ("seed", "accumulate", "clip_norm", "autocast", "clock")
        of_source = {name: options.pop(name) for name in names if name in options}
        flat, batches = FlatModule(self.model, self.layout, memory), task.batches(rank, 3, 0)
        source = GradientSource(rank, task, flat, batches, update or Sgd(), **of_source)
        self.worker = Worker(source, coders, tracker, **options)
        self.start = self.worker.x.clone()

    def go(self, x: Tensor | None = None, version: int = 0, **told: Any) -> list[PushMessage]:
        """Reply to the last push with the model x (by default that of the start), and compute the next."""
        assert self.worker.load(self.reply(x, version, **told))
        return pushed(self.worker)

    def reply(self, x: Tensor | None = None, version: int = 0, **told: Any) -> Reply:
        model = (self.start if x is None else x).clone().numpy()
        return Reply(**{"worker": 1, "step": self.worker.step, "version": version, "model": model, **told})

    def sent(self, messages: list[PushMessage]) -> Tensor:
        """What the server decodes (d,)."""
        parts = []
        for message, coder, bucket in zip(messages, self.coders, self.layout.buckets, strict=True):
            plain = coder.compressor if isinstance(coder, ErrorFeedback) else coder
            payload = tuple(torch.from_numpy(array) for array in message.arrays)
            parts.append(plain.decode(payload, bucket.numel).clone())
        return torch.cat(parts)

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What was logged of all that was noted so far."""
        self.worker.worker_log.tell()
        return self.lines

    @property
    def residual(self) -> Tensor:
        return torch.cat([coder.residual for coder in self.coders if isinstance(coder, ErrorFeedback)])


def gradients(task: Task, batches: Iterator[Any], count: int = 1) -> dict[str, Tensor]:
    """Of the mean loss over `count` batches, by autograd alone; zeros where no loss depends on a parameter."""
    model = task.model(0).train()
    sum(task.loss(model, next(batches)) for _ in range(count)).backward()  # type: ignore[union-attr]
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad / count)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("task", [Blobs(), Images(), Odd()], ids=["blobs", "images", "odd"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_push_carries_the_gradient_of_the_mean_loss_at_the_model_it_was_given(task: Task, count: int) -> None:
    hand = Hand(task, accumulate=count)
    views = hand.layout.views(hand.sent(hand.go()))
    for name, expected in gradients(task, task.batches(1, 3, 0), count).items():
        assert torch.allclose(views[name], expected, rtol=1e-5, atol=1e-7), name


def test_no_gradient_is_left_over_from_the_push_before() -> None:
    hand = Hand(Odd())
    batches = Odd().batches(1, 3, 0)
    for _ in range(3):
        views = hand.layout.views(hand.sent(hand.go()))
        for name, expected in gradients(Odd(), batches).items():
            assert torch.allclose(views[name], expected, rtol=1e-5, atol=1e-7), name
        assert not views["unused.weight"].any()


def test_a_parameter_that_is_not_reached_this_time_has_no_gradient() -> None:
    @dataclass
    class Alternating(Odd):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.turn = not getattr(self, "turn", False)
            return model.get_parameter("unused.weight").sum() if self.turn else super().loss(model, batch)

    hand = Hand(Alternating())
    first, second = (hand.layout.views(hand.sent(hand.go())) for _ in range(2))
    assert (first["unused.weight"] == 1).all() and not first["out.weight"].any()
    assert not second["unused.weight"].any() and second["out.weight"].any()


def test_the_model_received_is_the_one_computed_on() -> None:
    task = Blobs()
    hand = Hand(task)
    messages = hand.go(torch.zeros(hand.layout.size))
    assert messages[0].loss == pytest.approx(math.log(3))  # three classes, all scores zero
    assert torch.equal(hand.worker.x, torch.zeros(hand.layout.size))


def test_the_header_says_who_which_step_and_on_what() -> None:
    hand = Hand(Slope(batch_size=5), rank=3, accumulate=2)
    hand.go(version=7)
    (message,) = hand.go(version=9)
    assert (message.worker, message.step, message.base, message.bucket, message.buckets) == (3, 2, 9, 0, 1)
    assert (message.samples, message.norm, message.payload_norm, message.residual_norm) == (10, 5.0, 5.0, 0.0)


def test_each_bucket_is_a_message_and_the_first_has_the_numbers_of_the_whole_push() -> None:
    whole, cut = Hand(Blobs()), Hand(Blobs(), buckets="layer")
    (one,), many = whole.go(), cut.go()
    assert [(m.bucket, m.buckets) for m in many] == [(i, 4) for i in range(4)]
    assert torch.equal(whole.sent([one]), cut.sent(many))
    assert (many[0].loss, many[0].samples) == (one.loss, one.samples)
    assert many[0].norm == many[0].payload_norm == pytest.approx(one.norm, rel=1e-6)  # sums in float32, a bucket each


def test_a_gradient_longer_than_clip_norm_is_scaled_down_to_it() -> None:
    hand = Hand(Slope(gradient=(3.0, 4.0)), clip_norm=2.5)
    (message,) = hand.go()
    assert message.norm == 2.5
    assert hand.sent([message])[:2].tolist() == [1.5, 2.0]
    (message,) = Hand(Slope(gradient=(3.0, 4.0)), clip_norm=5.0).go()
    assert message.norm == 5.0


def test_gradients_arrive_in_place_where_the_transport_offers_memory() -> None:
    layout = Layout(Blobs().model(0))
    memory = Memory(layout.empty(), layout.empty())
    hand = Hand(Blobs(), memory=memory)
    (message,) = hand.go()
    assert message.arrays[0].ctypes.data == memory.g.data_ptr()
    assert hand.worker.x.data_ptr() == memory.x.data_ptr()
    memory.x.zero_()  # a model received in place
    assert hand.worker.load(Reply(1, 1, 1, memory.x.numpy()))
    assert pushed(hand.worker)[0].loss == pytest.approx(math.log(3))


def test_who_computes_on_the_servers_model_leaves_it_as_it_is_and_sees_it_change() -> None:
    layout = Layout(Blobs().model(0))
    x = torch.zeros(layout.size)  # not what the worker's own model starts with
    hand = Hand(Blobs(), memory=Memory(x, layout.empty(), ModelLives.SERVERS))
    assert not x.any()
    assert hand.worker.load(Reply(1, 0, 0, x.numpy()))
    assert pushed(hand.worker)[0].loss == pytest.approx(math.log(3))
    assert not x.any()
    x.copy_(torch.arange(layout.size) / layout.size)
    hand.worker.load(Reply(1, 1, 1, x.numpy()))
    assert pushed(hand.worker)[0].loss != pytest.approx(math.log(3))


# ---- error feedback and the fate of pushes


def top_k(**options: Any) -> Hand:
    return Hand(Blobs(), compressor=TopK(ratio=0.05), feedback=True, **options)


def test_what_was_left_out_is_sent_with_the_next_gradient() -> None:
    hand = top_k()
    given, sent = torch.zeros(hand.layout.size), torch.zeros(hand.layout.size)
    batches = Blobs().batches(1, 3, 0)
    for step in range(1, 6):
        messages = hand.go(outcome="used")
        for name, gradient in gradients(Blobs(), batches).items():
            hand.layout.views(given)[name].add_(gradient)
        sent += hand.sent(messages)
        assert torch.allclose(sent + hand.residual, given, atol=1e-6), step
        assert messages[0].residual_norm == pytest.approx(float(hand.residual.norm()), rel=1e-6)
    assert float(hand.residual.norm()) > 0


@pytest.mark.parametrize("buckets", ["whole", "layer"])
def test_a_dropped_push_goes_back_into_the_residual(buckets: str) -> None:
    hand = top_k(buckets=buckets)
    messages = hand.go()
    sent, kept = hand.sent(messages), hand.residual.clone()
    hand.worker.load(hand.reply(outcome="dropped"))
    assert torch.equal(hand.residual, kept + sent)


@pytest.mark.parametrize("outcome", ["used", "held"])
def test_a_push_that_is_used_or_held_does_not(outcome: str) -> None:
    hand = top_k()
    hand.go()
    kept = hand.residual.clone()
    hand.worker.load(hand.reply(outcome=outcome))
    assert torch.equal(hand.residual, kept)


def test_the_fate_of_an_earlier_push_may_be_told_later() -> None:
    hand = top_k()
    first = hand.sent(hand.go())
    second = hand.sent(hand.go(outcome="held"))
    kept = hand.residual.clone()
    told = (Settled(1, "dropped", math.nan), Settled(1, "dropped", math.nan))  # the second time, it is forgotten
    hand.worker.load(hand.reply(outcome="held", settled=told))
    assert torch.equal(hand.residual, kept + first)
    hand.worker.load(hand.reply(outcome="held", settled=(Settled(2, "used", 0.5),)))
    assert torch.equal(hand.residual, kept + first)
    assert second.any()


def test_a_held_payload_survives_the_next_push_where_it_lies_in_the_gradient() -> None:
    hand = Hand(Blobs(), compressor=Identity(), feedback=True)
    first = hand.sent(hand.go())
    second = hand.sent(hand.go(outcome="held"))
    hand.worker.load(hand.reply(outcome="used", settled=(Settled(1, "dropped", math.nan),)))
    assert torch.equal(hand.residual, first) and not torch.equal(first, second)


def test_the_residual_is_rescaled_when_the_step_size_changes() -> None:
    hand = top_k()
    hand.go(alpha=0.4)
    kept = hand.residual.clone()
    hand.worker.load(hand.reply(outcome="used", alpha=0.1))
    assert torch.equal(hand.residual, kept * 4)
    hand.worker.load(hand.reply(outcome="used", alpha=0.0))  # a schedule that ends: nothing to divide by
    assert torch.equal(hand.residual, kept * 4)


def test_what_is_taken_back_late_counts_in_the_step_size_it_was_made_for() -> None:
    hand = Hand(Slope(), compressor=Identity(), feedback=True)
    hand.go(alpha=0.4)
    hand.go(outcome="held", alpha=0.1)
    hand.worker.load(hand.reply(outcome="used", alpha=0.1, settled=(Settled(1, "dropped", math.nan),)))
    assert hand.residual[:2].tolist() == [12.0, 16.0]  # 0.4 g = 0.1 (4 g)


# ---- gradients that are not finite


def test_a_gradient_that_is_not_finite_ends_the_run_by_step_and_loss() -> None:
    hand = Hand(Poisoned(bad=(2,)), rank=2)
    hand.go()
    with pytest.raises(TaskError, match=r"^step 2: the gradient is not finite \(norm (inf|nan), loss -?(inf|nan)"):
        hand.go()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_or_it_is_dropped_and_the_next_batch_taken(value: float) -> None:
    task = Poisoned(bad=tuple(range(2, 11)), value=value)
    hand = Hand(task, rank=2, on_nonfinite="drop", compressor=TopK(ratio=0.01), feedback=True)
    assert hand.go()[0].step == 1
    (message,) = hand.go(outcome="used")
    assert (message.step, message.norm) == (2, 5.0)
    assert torch.isfinite(hand.residual).all()


def test_ten_in_a_row_are_too_many() -> None:
    hand = Hand(Poisoned(bad=tuple(range(2, 12))), rank=2, on_nonfinite="drop")
    hand.go()
    with pytest.raises(TaskError, match="step 2: 10 gradients in a row were not finite"):
        hand.go()


# ---- what it sees and logs


def test_moved_is_what_others_did_meanwhile() -> None:
    hand = Hand(Slope(gradient=(3.0, 4.0)))
    size = hand.layout.size
    g = hand.sent(hand.go())
    others = torch.zeros(size)
    others[0] = 7.0
    reply = hand.reply(hand.start - 0.25 * g + others, version=1, outcome="used", weight=0.25, discrepancy=0.0)
    hand.worker.load(reply)
    hand.worker.note(reply, 1.0, 0.0, 0.0)
    assert hand.notes[-1]["moved"] == pytest.approx(7.0, rel=1e-6)


def test_a_reply_is_a_line_and_so_is_each_fate_told_late() -> None:
    clock = iter([0.0, 2.0, 2.0, 2.5])
    hand = Hand(Slope(), clock=lambda: next(clock))
    first = hand.reply()
    hand.worker.load(first)
    hand.worker.note(first, 0.0, 0.0, 1.5)
    assert hand.notes == []  # it answers no push
    pushed(hand.worker)
    told = (Settled(1, "used", 0.125), Settled(2, "dropped", math.nan))
    reply = hand.reply(version=4, outcome="held", settled=told)
    hand.worker.load(reply)
    hand.worker.note(reply, 9.0, 0.25, 0.75)
    settled = {"event": "settled", "t_s": 9.0, "rank": 1}
    assert hand.notes == [
        {**settled, "step": 1, "outcome": "used", "discrepancy": 0.125},
        {**settled, "step": 2, "outcome": "dropped", "discrepancy": None},
        {
            "event": "reply", "t_s": 9.0, "rank": 1, "step": 1, "version": 4, "discrepancy": None, "moved": 0.0,
            "residual_norm": 0.0, "outcome": "held", "compute_s": 2.0, "encode_s": 0.5, "send_s": 0.25, "wait_s": 0.75,
        },
    ]  # fmt: skip


def test_moved_is_the_same_where_others_look_at_the_model_which_then_stays_as_it_is() -> None:
    found = []
    for lives in (ModelLives.WATCHED, ModelLives.BESIDE):
        task = Blobs()
        layout = Layout(task.model(0))
        hand = Hand(task, memory=Memory(layout.empty(), layout.empty(), lives))
        for version in range(5):
            reply = hand.reply((1 + 0.1 * version) * hand.start, version, outcome="used", weight=0.25)
            hand.worker.load(reply)
            assert torch.equal(hand.worker.x, torch.from_numpy(reply.model))
            hand.worker.note(reply, 0.0, 0.0, 0.0)
            pushed(hand.worker)
            assert lives is not ModelLives.WATCHED or torch.equal(hand.worker.x, torch.from_numpy(reply.model))
        found.append([note["moved"] for note in hand.notes])
    assert found[0] == found[1] and all(moved > 0 for moved in found[0])


def test_the_lines_of_a_reply_wait_until_the_next_push_has_left_or_failed_or_there_is_none_to_come() -> None:
    def refuse(message: PushMessage) -> None:
        raise OSError("nobody takes it")

    hand, seen = Hand(Slope()), list[int]()
    for version, emit in enumerate((lambda message: None, lambda message: seen.append(len(hand.lines)), refuse)):
        reply = hand.reply(version=version)
        hand.worker.load(reply)
        hand.worker.note(reply, 0.0, 0.0, 0.0)
        if emit is refuse:
            with pytest.raises(OSError, match="nobody"):
                hand.worker.push(emit)
        else:
            hand.worker.push(emit)
    assert seen == [0]
    assert [line["version"] for line in hand.lines] == [1, 2]
    stop = Reply(1, hand.worker.step, 3, None, "used")
    hand.worker.load(stop)
    hand.worker.note(stop, 0.0, 0.0, 0.0)
    assert [line["version"] for line in hand.lines] == [1, 2, 3]


def test_a_push_says_how_long_its_worker_has_waited_in_all() -> None:
    hand = Hand(Slope())
    for wait_s in (1.5, 0.75):
        reply = hand.reply()
        hand.worker.load(reply)
        hand.worker.note(reply, 0.0, 0.0, wait_s)
        (message,) = pushed(hand.worker)
    assert message.waited_s == 2.25


def test_a_reply_without_a_model_says_stop() -> None:
    hand = Hand(Slope())
    hand.go()
    assert hand.worker.load(Reply(1, 1, 5, None, "dropped")) is False


def test_the_running_statistics_travel_with_the_first_bucket() -> None:
    hand = Hand(Images(), buckets="layer")
    messages = hand.go()
    assert all(message.statistics is None for message in messages[1:])
    expected = torch.cat([buffer.flatten() for buffer in statistics_of(hand.model)]).numpy()
    assert np.array_equal(messages[0].statistics, expected)
    assert expected.shape == (24,) and expected[0] != 0


def test_dropout_depends_on_seed_worker_and_step_alone() -> None:
    def loss(rank: int, steps: int, seed: int) -> list[float]:
        hand = Hand(OneBatch(), rank=rank, seed=seed)
        losses = []
        for _ in range(steps):
            torch.rand(rank)  # what others draw meanwhile
            losses.append(hand.go()[0].loss)
        return losses

    assert loss(1, 3, 0) == loss(1, 3, 0)
    assert len({*loss(1, 3, 0), *loss(2, 3, 0), *loss(1, 3, 1)}) == 9


@dataclass
class OneBatch(Dropout):
    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.draw(torch.Generator().manual_seed(0), 8)


def test_autocast_computes_in_bfloat16_and_sends_float32() -> None:
    seen: list[torch.dtype] = []

    @dataclass
    class Spy(Blobs):
        dtypes: list[torch.dtype] = field(default_factory=list)

        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            scores = model(batch[0])
            seen.append(scores.dtype)
            return nn.functional.cross_entropy(scores, batch[1])

    (message,) = Hand(Spy(), autocast="bfloat16").go()
    assert seen == [torch.bfloat16] and message.arrays[0].dtype == np.float32
    Hand(Spy()).go()
    assert seen == [torch.bfloat16, torch.float32]


def test_the_model_is_in_training_mode() -> None:
    hand = Hand(Images())
    assert hand.model.training


# ---- layers


LAYERWISE: dict[str, Any] = {"buckets": "layer", "layerwise": True}


def sent_by(hand: Hand, **cut: Any) -> list[PushMessage]:
    messages: list[PushMessage] = []
    hand.worker.push(messages.append, **cut)
    return messages


def layered(hand: Hand, versions: tuple[int, ...], outcomes: tuple[str, ...] = (), **told: Any) -> Reply:
    outcomes = outcomes or ("held",) * len(versions)
    layers = tuple(Layer(version, outcome) for version, outcome in zip(versions, outcomes, strict=True))
    return hand.reply(version=min(versions), layers=layers, **told)


def test_layers_leave_last_first_each_with_its_own_base_and_norms() -> None:
    hand, whole = Hand(Blobs(), **LAYERWISE), Hand(Blobs(), buckets="layer")
    hand.worker.load(layered(hand, (4, 7, 5, 9)))
    messages, expected = sent_by(hand), whole.go()
    assert [(m.bucket, m.buckets, m.base) for m in messages] == [(3, 4, 9), (2, 4, 5), (1, 4, 7), (0, 4, 4)]
    for message in messages:
        (array,) = message.arrays
        assert np.array_equal(array, expected[message.bucket].arrays[0])
        assert message.norm == message.payload_norm == pytest.approx(float(np.linalg.norm(array)), rel=1e-6)
        assert (message.samples, message.loss) == (4, expected[0].loss)


class Clock:
    """Each look is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize(("deadline_s", "reached"), [(0.5, 0), (1.5, 1), (3.5, 3), (9.0, 4)])
def test_a_deadline_leaves_backward_where_it_is(deadline_s: float, reached: int) -> None:
    """The clock is looked at when the push begins and then when each gradient is made, from the last layer on."""
    hand = Hand(Blobs(), update=CutSgd(deadline_s), clock=Clock(), **LAYERWISE)
    whole = Hand(Blobs(), buckets="layer")
    hand.worker.load(layered(hand, (0, 0, 0, 0)))
    messages, expected = sent_by(hand), whole.go()
    here = [message.bucket for message in messages if message.arrays]
    assert len(here) == reached and here == sorted(here, reverse=True)
    for message in messages:
        if message.arrays:
            assert np.array_equal(message.arrays[0], expected[message.bucket].arrays[0])
        else:
            assert (message.norm, message.payload_norm) == (0.0, 0.0)
    assert not any(parameter.grad is not None for parameter in hand.model.parameters())


def test_the_push_after_one_that_was_cut_off_is_whole_again() -> None:
    hand = Hand(Blobs(), update=CutSgd(1.5), clock=Clock(), **LAYERWISE)
    hand.worker.load(layered(hand, (0, 0, 0, 0)))
    assert sum(bool(message.arrays) for message in sent_by(hand)) < 4
    hand.worker.load(layered(hand, (1, 1, 1, 1)))
    messages = sent_by(hand, cut=())
    assert all(message.arrays for message in messages)
    batches = Blobs().batches(1, 3, 0)
    next(batches)
    expected = gradients(Blobs(), batches)
    sent = torch.cat([torch.from_numpy(message.arrays[0]) for message in reversed(messages)])
    for name, view in hand.layout.views(sent).items():
        assert torch.allclose(view, expected[name], rtol=1e-5, atol=1e-7), name


def test_what_is_cut_off_is_no_part_of_what_is_clipped_nor_of_what_is_fed_back() -> None:
    hand = Hand(Blobs(), compressor=TopK(0.1), feedback=True, update=CutSgd(), clip_norm=1e-3, **LAYERWISE)
    hand.worker.load(layered(hand, (0, 0, 0, 0)))
    messages = sent_by(hand, cut={0, 1})
    assert {message.norm for message in messages if not message.arrays} == {0.0}
    assert math.hypot(*(message.norm for message in messages)) == pytest.approx(1e-3, rel=1e-5)
    assert [bool(coder.residual.any()) for coder in hand.coders][:3] == [False, False, True]


def test_a_dropped_layer_is_taken_back_and_a_used_one_is_not() -> None:
    hand = Hand(Blobs(), compressor=TopK(0.1), feedback=True, **LAYERWISE)
    hand.worker.load(layered(hand, (0, 0, 0, 0), alpha=0.1))
    sent_by(hand)
    hand.worker.load(layered(hand, (1, 1, 1, 1), ("used", "dropped", "held", "held"), alpha=0.1))
    settled = (Settled(1, "dropped", math.nan, 2), Settled(1, "used", 0.5, 3), Settled(1, "dropped", math.nan, 1))
    sent_by(hand)
    after_push = [coder.residual.clone() for coder in hand.coders]
    hand.worker.load(layered(hand, (2, 2, 2, 2), settled=settled, alpha=0.1))
    moved = [not torch.equal(a, b) for a, b in zip(after_push, [c.residual for c in hand.coders], strict=True)]
    assert moved == [False, False, True, False]  # bucket 1 was told before, and is not taken back twice
