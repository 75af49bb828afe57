"""Workers that run on with pushes unanswered: their views, what the server measures, and what becomes of pushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Desk, fit

from ps_elastic.compressors import ErrorFeedback
from ps_elastic.errors import PolicyError, WireError
from ps_elastic.policies import policies
from ps_elastic.policies.actions import take_release
from ps_elastic.policies.events import Push, PushId, Release, Step
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.policies.rules.message_passing import MessagePassing
from ps_elastic.server.store import ParameterStore
from ps_elastic.simulation.simulate import simulate
from ps_elastic.worker.worker import Worker
from tests.law.rules import HoldsAhead
from tests.law.story import Story

QUADRATIC = {"task": {"name": "quadratic", "dimension": 100}, "optimizer": {"lr": 0.02}, "policy": "message_passing"}
RULES = ("message_passing", "asynchronous", "tests.law.rules:Lottery", "tests.law.rules:HoldsAhead:k=3")
FED = ("compressor=top_k:ratio=0.1", "compressor.error_feedback=true")


@pytest.mark.parametrize(("pipeline", "more"), [(1, ()), (5, ("optimizer.clip_norm=1",))], ids=str)
def test_one_worker_alone_runs_as_if_nothing_were_late(tmp_path: Path, pipeline: int, more: tuple[str, ...]) -> None:
    """All that is missing is its own, and that it re-applies: bit for bit SGD without delay, and D = 0."""
    ahead = fit(tmp_path, QUADRATIC, f"update.pipeline={pipeline}", *more, workers=1, samples=60)
    plain = fit(tmp_path, QUADRATIC, "policy=synchronous", *more, workers=1, samples=60)
    assert ahead.summary["parameters_sha256"] == plain.summary["parameters_sha256"]
    assert set(ahead.column("discrepancy")) == {0.0} and ahead.summary["staleness"]["max"] == pipeline
    assert ahead.summary["bound_holds"] and ahead.summary["dropped"] == pipeline


def test_one_worker_alone_re_applies_what_was_decoded_of_its_pushes(tmp_path: Path) -> None:
    """The entries that top_k sends are added one by one, where the optimizer rounds once less: equal to rounding."""
    ahead = fit(tmp_path, QUADRATIC, "update.pipeline=3", *FED, workers=1, samples=60)
    plain = fit(tmp_path, QUADRATIC, "policy=synchronous", *FED, workers=1, samples=60)
    assert max(ahead.column("discrepancy")) < 1e-6
    assert ahead.column("norm") == pytest.approx(plain.column("norm"), rel=1e-4)


@pytest.mark.parametrize(("workers", "pipeline"), [(2, 1), (2, 3), (3, 2)])
def test_only_what_others_pushed_is_missing(tmp_path: Path, workers: int, pipeline: int) -> None:
    """Without noise, and with each push at the server when its worker has made `pipeline` more: the whole run anew."""
    alpha, rounds = 0.02, 20
    source = {**QUADRATIC, "task": {"name": "quadratic", "noise": 0.0}}
    run = fit(tmp_path, source, f"update.pipeline={pipeline}", workers=workers, samples=workers * rounds)
    c, x, used = np.array([1.0, 2.0, 5.0, 10.0]), np.ones(4), list[tuple[int, np.ndarray]]()
    bases = dict.fromkeys(range(workers), (x, 0))  # the model of the last reply, and how many were used by then
    flying: dict[int, list[Any]] = {i: [] for i in range(workers)}  # (gradient, view, used by then), not answered
    distances = []
    while len(used) < workers * rounds:
        for i in range(workers):
            base, seen = bases[i]
            view = base - alpha / workers * sum(g for g, *_ in flying[i])
            flying[i].append((c * view, view, seen))
            if len(flying[i]) <= pipeline or len(used) == workers * rounds:
                continue
            g, view, seen = flying[i].pop(0)
            others = sum((h for j, h in used[seen:] if j != i), np.zeros(4))
            assert np.allclose(x - view, -alpha / workers * others, atol=1e-12)
            distances.append(np.linalg.norm(x - view))
            x = x - alpha / workers * g
            used.append((i, g))
            bases[i] = x, len(used)
    assert run.column("discrepancy") == pytest.approx(distances, rel=1e-3, abs=1e-6)
    assert max(distances) > 0 and run.summary["B_max"] <= run.summary["B_theory"]


class Witness:
    """Compares every view that the server measures with the model that the worker really computed on, bit by bit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.views: dict[PushId, torch.Tensor] = {}
        self.distances: list[float] = []
        push, apply = Worker.push, ParameterStore.apply

        def noted_push(worker: Worker, emit: Any, cut: Any = None) -> None:
            self.views[PushId(worker.rank, worker.step + 1)] = worker.x.clone()
            push(worker, emit, cut)

        def compared_apply(store: ParameterStore, step: Step, rate: float, views: list[PushId]) -> float:
            for view in views:
                assert (store.view(view) == self.views[view].numpy()).all()
            distances = [float((store.x - self.views[view]).norm()) for view in views]
            moved = apply(store, step, rate, views)
            assert [store.distance_when_used(view) for view in views] == pytest.approx(distances, rel=1e-5)
            self.distances += distances
            return moved

        monkeypatch.setattr(Worker, "push", noted_push)
        monkeypatch.setattr(ParameterStore, "apply", compared_apply)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("more", [(), (*FED, "optimizer.momentum=0.5", "schedule=cosine", "buckets=1024")], ids=str)
def test_the_server_knows_every_view_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, more: tuple[str, ...]
) -> None:
    """Whether pushes are used at once, held or dropped, in this process and where workers finish in any order."""
    witness = Witness(monkeypatch)
    run = fit(tmp_path, QUADRATIC, f"policy={rule}", "update.pipeline=2", *more, samples=60)
    assert len(witness.distances) == run.summary["used"] and max(witness.distances) > 0
    paths = run.column("path_length")
    assert all(d <= path * (1 + 1e-6) + 1e-6 for d, path in zip(run.column("discrepancy"), paths, strict=True))
    witness.distances.clear()
    compute = {"compute": {"name": "exponential"}, "network": {"latency_s": 0.5}}
    simulated = {**QUADRATIC, "simulation": compute}
    summary = simulate(simulated, [f"policy={rule}", "update.pipeline=2", *more, "train.samples=60"], workers=4)
    assert len(witness.distances) == summary["used"] and max(witness.distances) > 0


@pytest.mark.parametrize("rule", ["tests.law.rules:Lottery", "tests.law.rules:HoldsAhead"])
def test_what_error_feedback_sends_again_is_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Of each worker: all its gradients = all its pushes that were used + its residual in the end."""
    made: dict[int, list[torch.Tensor]] = {}  # by the encoder: the gradients, each followed by what was sent of it
    encoders: list[ErrorFeedback] = []
    encode = ErrorFeedback.encode

    def noted(feedback: ErrorFeedback, vector: torch.Tensor) -> Any:
        if feedback not in encoders:
            encoders.append(feedback)
        gradient = vector.clone()
        payload = encode(feedback, vector)
        made.setdefault(id(feedback), []).extend([gradient, feedback.compressor.decode(payload, len(vector)).clone()])
        return payload

    monkeypatch.setattr(ErrorFeedback, "encode", noted)
    run = fit(tmp_path, QUADRATIC, f"policy={rule}", "update.pipeline=2", *FED, samples=40)
    assert run.summary["dropped"] > 2 * 3  # more than those under way at the end
    used = {(line["worker"], line["step"]) for line in run.lines(0, "used")}
    for worker, feedback in enumerate(encoders, 1):  # in the order of their first turns
        gradients, sent = made[id(feedback)][::2], made[id(feedback)][1::2]
        arrived = sum(s for step, s in enumerate(sent, 1) if (worker, step) in used)
        assert torch.allclose(sum(gradients), arrived + feedback.residual, atol=1e-4)


def test_a_reply_says_what_its_model_lacks_and_with_what_weight() -> None:
    desk = Desk(HoldsAhead(k=3), workers=1, pipeline=2)
    told = [desk.push(1)[1], desk.push(1)[1]]  # both held
    assert desk.push(1) == {}  # the first is dropped; no reply
    told.append(desk.push(1, step=4, ahead=1)[1])  # the other three are used
    assert [(reply.step, reply.version, reply.outcome, reply.rate) for reply in told] == [
        (1, 0, "held", 0.5), (2, 0, "held", 0.5), (4, 1, "used", 0.5),
    ]  # fmt: skip
    assert [[(settled.step, settled.outcome) for settled in reply.settled] for reply in told] == [
        [], [(1, "held")], [(1, "dropped"), (2, "used"), (3, "used")],
    ]  # fmt: skip
    assert desk.told("used")[-1]["discrepancy"] == pytest.approx(0.5 * 3 * 8)  # its view had three pushes of norm 8


def test_pushes_that_cannot_be_are_refused() -> None:
    story = Story(Asynchronous(), 2, pipeline=1)
    story.tell(Push(PushId(1, 1), 0))
    for push, text in (
        (Push(PushId(1, 2), 0, ahead=2), "says that 2 pushes of its worker were not answered"),
        (Push(PushId(1, 2), 5, ahead=0), "says base 5, but its model was version 1"),
        (Push(PushId(1, 3), 1, ahead=1), "was never assigned; expected step 2"),
    ):
        with pytest.raises(WireError, match=text):
            story.tell(push)
    story.tell(Push(PushId(1, 2), 0, ahead=1))
    with pytest.raises(WireError, match=r"replies to \[0, 1, 2\]"):
        story.tell(Push(PushId(1, 3), 0, ahead=3))
    story.ledger.waiting[1] = None
    with pytest.raises(PolicyError, match="re-applies its own pushes itself"):
        take_release(story.ledger, Release((1,), own=0.5))


def test_rounds_of_message_passing_keep_within_the_delay() -> None:
    """A worker goes on while it leads by delay - 1 - pipeline: then round t has seen all rounds up to t - delay."""
    story = Story(MessagePassing(delay=3), 2, pipeline=1)
    assert len(story.push(1)) == 2  # used and answered: it leads by 1
    assert len(story.tell(Push(PushId(1, 2), 1))) == 1  # by 2: used, and not answered
    assert list(story.ledger.views) == [PushId(2, 1), PushId(1, 3)]  # but it may compute its third
    story.tell(Push(PushId(1, 3), 1, ahead=1))
    assert list(story.ledger.views) == [PushId(2, 1)]
    story.push(2)
    released = story.tell(Push(PushId(2, 2), story.ledger.told(2)[1].version))
    assert [a.workers for a in released if isinstance(a, Release)] == [(2, 1)] or released[-1].workers in ((1, 2), (1,))


def test_the_simulated_rounds_of_message_passing_never_miss_more_than_promised(tmp_path: Path) -> None:
    delay, workers = 4, 5
    source = {**QUADRATIC, "simulation": {"compute": {"name": "pareto"}, "network": {"latency_s": 0.3}}}
    settings = [f"policy.delay={delay}", "update.pipeline=2", "train.samples=400"]
    summary = simulate(source, settings, workers=workers, run_dir=tmp_path / "run")
    own = 2 + 1  # of its own at most, since the reply
    assert summary["staleness"]["max"] <= (workers - 1) * (2 * delay - 1) + own
    assert summary["bound_holds"] and summary["B_max"] > 0


def test_rules_say_whether_their_workers_may_run_ahead() -> None:
    assert {name for name, cls in policies.items() if cls.pipelines} == {"asynchronous", "message_passing"}
