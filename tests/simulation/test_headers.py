from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Point

from ps_elastic.compressors.identity import Identity
from ps_elastic.config.sections import Norms, Optimizer
from ps_elastic.errors import ConfigError
from ps_elastic.policies.events import ZERO, PushId, Step, Term
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.protocols import Model, Store
from ps_elastic.server.store import ParameterStore
from ps_elastic.server.written import WrittenStore
from ps_elastic.simulation.header_workers import HeaderWorker, RecordedNorms, modelled
from ps_elastic.simulation.headers import HeaderStore
from ps_elastic.simulation.simulate import simulate
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Layout

A, B = PushId(1, 1), PushId(2, 1)
AT_START = View(0, 0.0, None, 0.0, 0.0)


def store(coherence: float, *norms: float, **optimizer: Any) -> HeaderStore:
    """One that holds pushes (1, 1), (2, 1), ... of these norms, whose views were given at the start."""
    made = HeaderStore(Optimizer(**optimizer), Layout(Point(torch.zeros(100))), coherence)
    for worker, norm in enumerate(norms, 1):
        made.give(PushId(worker, 1), AT_START, 0.1)
        made.take(PushId(worker, 1), [PushMessage(worker, 1, 0, (), payload_norm=norm)])
    return made


def test_every_store_has_all_that_a_shard_asks_for() -> None:
    asked = {name for cls in (Store, Model) for name in vars(cls) if not name.startswith("_")}
    x, layout = torch.zeros(128), Layout(Point(torch.zeros(100)))
    stores: list[Store] = [
        HeaderStore(Optimizer(), layout, 0.5),
        ParameterStore(layout, x, FlatOptimizer(Optimizer(), layout, x), [Identity()]),
        ParameterStore(layout, x, FlatOptimizer(Optimizer(), layout, x), [Identity()], copies={}),
        WrittenStore(layout, x, {}),
    ]
    assert len(asked) > 20 and [asked - set(dir(made)) for made in stores] == [set()] * 4


def step(made: HeaderStore, *pushes: PushId, rate: float = 0.1, **more: Any) -> float:
    action = Step.mean(pushes)._replace(**more)
    made.combine(action)
    return made.apply(action, rate)


def test_common_parts_add_up_and_noise_adds_in_squares() -> None:
    assert step(store(1.0, 3.0, 5.0), A, B) == pytest.approx(0.1 * 4.0)  # the mean of the norms
    assert step(store(0.0, 3.0, 4.0), A, B) == pytest.approx(0.1 * 2.5)  # 5 / 2
    assert step(store(0.25, 2.0, 2.0), A, B) == pytest.approx(0.1 * math.sqrt(1.0**2 + 3.0 / 2))


def test_a_distance_grows_like_n_for_what_is_common_and_like_its_root_for_noise() -> None:
    for coherence, expected in ((1.0, 0.4), (0.0, 0.2)):
        made = store(coherence, 1.0, 1.0, 1.0, 1.0, 1.0)
        for worker in range(1, 5):
            step(made, PushId(worker, 1))
        assert made.distance(PushId(5, 1)) == pytest.approx(expected)  # not used: a step ends those of its pushes
        late = PushId(9, 1)
        made.give(late, AT_START, 0.1)
        assert made.distance(late) == 0.0


def test_a_view_given_twice_is_as_old_as_the_first_time() -> None:
    made = store(1.0, 1.0, 1.0)
    step(made, B)
    made.give(A, AT_START, 0.1)
    assert made.distance(A) == pytest.approx(0.1)


def test_momentum_goes_on() -> None:
    made = store(1.0, 1.0, 1.0, momentum=0.5)
    assert [step(made, A), step(made, B)] == pytest.approx([0.1, 0.15])
    assert made.coast() == (pytest.approx(0.75), 1.0)


def test_adam_moves_every_coordinate_by_the_rate() -> None:
    made = store(0.3, 7.0, name="adam")
    assert step(made, A) == pytest.approx(0.1 * math.sqrt(100))
    assert made.coast() == (math.inf, math.inf)


def test_a_stand_in_that_is_the_mean_of_the_others_changes_nothing() -> None:
    made, missing, mean = store(0.5, 3.0, 5.0), PushId(3, 1), PushId(0, 1)
    action = Step((Term(A), Term(B), Term(mean, 1.0, missing)))
    made.combine(action)
    assert made.apply(action, 0.1) == pytest.approx(step(store(0.5, 3.0, 5.0), A, B))
    made.take(missing, [PushMessage(3, 1, 0, (), payload_norm=4.0)])
    made.combine(Step((Term(missing, 1 / 3), Term(mean, -1 / 3)), combine="sum", apply="amend"))
    common = 4 * math.sqrt(0.5) - 4 * math.sqrt(0.5)
    noise = 16 * 0.5 + (9 * 0.5 + 25 * 0.5) / 4
    assert made.amend(missing) == pytest.approx(0.1 / 3 * math.sqrt(common**2 + noise))


def test_a_debt_on_zero_is_repaid_by_the_push_itself() -> None:
    made, missing = store(1.0, 3.0), PushId(3, 1)
    action = Step((Term(A), Term(ZERO, 1.0, missing)))
    made.combine(action)
    assert made.apply(action, 0.1) == pytest.approx(0.15)
    made.give(B, AT_START, 0.1)
    ideal = made.ideal(B)
    assert ideal.distance is None
    made.take(missing, [PushMessage(3, 1, 0, (), payload_norm=4.0)])
    made.combine(Step((Term(missing, 0.5), Term(ZERO, -0.5)), combine="sum", apply="amend"))
    assert made.amend(missing) == pytest.approx(0.2)
    ideal.settlement.settle(missing, made.delta())
    assert ideal.distance == pytest.approx(0.2)


def test_a_payload_freed_and_a_view_ended_are_forgotten() -> None:
    made = store(1.0, 1.0)
    made.free([A])
    made.end(A)
    with pytest.raises(KeyError):
        made.distance(A)
    with pytest.raises(KeyError):
        step(made, A)


def test_a_worker_pushes_its_norms_in_turn() -> None:
    worker = HeaderWorker(3, iter([(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)]), nbytes=77, samples=32)
    (message,) = worker.compute(Reply(3, 0, 5, None), 0.0, 1.0, 0.5)
    assert (message.worker, message.step, message.base, message.samples) == (3, 1, 5, 32)
    assert (message.norm, message.payload_norm, message.residual_norm, message.waited_s) == (1.0, 2.0, 3.0, 0.5)
    assert message.arrays[0].nbytes == 77
    (message,) = worker.compute(Reply(3, 7, 6, None), 0.0, 1.0, 0.25)
    assert (message.step, message.norm, message.waited_s) == (8, 4.0, 0.75)


def test_modelled_norms_follow_the_samples_and_the_seed() -> None:
    constant = modelled(Norms(initial=3.0), 1, 0, lambda: 0)
    assert list(islice(constant, 2)) == [(3.0, 3.0, 0.0)] * 2
    samples = iter([0, 100, 200])
    decaying = modelled(Norms(initial=3.0, final=1.0, half_life_samples=100), 1, 0, lambda: next(samples))
    assert [norm for norm, _, _ in islice(decaying, 3)] == [3.0, 2.0, 1.5]
    noisy = [[n for n, _, _ in islice(modelled(Norms(spread=0.5), 1, seed, lambda: 0), 4000)] for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]
    logs = [math.log(norm) for norm in noisy[0]]
    assert math.sqrt(sum(x * x for x in logs) / len(logs)) == pytest.approx(0.5, rel=0.05)


def headers_run(folder: Path, *overrides: str, workers: int = 4, **more: Any) -> dict[str, Any]:
    directory = folder / f"run-{len(list(folder.iterdir()))}"
    made = simulate(
        {"task": "quadratic"}, ["train.samples=120", *overrides], workers=workers, run_dir=directory,
        headers_only=True, **more,
    )  # fmt: skip
    return {**made, "events": [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]}


def test_a_run_of_headers_takes_the_time_of_the_real_one(tmp_path: Path) -> None:
    """Rules that look at no norm decide the same, so that all times are the same too."""
    for policy in ("synchronous", "asynchronous", "stale_synchronous", "first_k", "rennala"):
        overrides = [f"policy={policy}", "simulation.compute.name=exponential"]
        headers = headers_run(tmp_path, *overrides)
        directory = tmp_path / f"real-{policy}"
        real = simulate({"task": "quadratic"}, ["train.samples=120", *overrides], workers=4, run_dir=directory)
        same = ("virtual_s", "pushes", "used", "dropped", "staleness", "wait_share", "bytes_up", "bytes_down")
        assert [headers[key] for key in same] == [real[key] for key in same]


def test_recorded_norms_are_played_again(tmp_path: Path) -> None:
    directory = tmp_path / "recorded"
    simulate({"task": "quadratic"}, ["train.samples=120"], workers=2, run_dir=directory)
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    recorded = {(e["worker"], e["step"]): e["norm"] for e in lines if e["event"] == "push"}
    made = headers_run(tmp_path, workers=4, norms=directory)
    pushes = [event for event in made["events"] if event["event"] == "push"]
    assert len(pushes) == 120
    assert all(e["norm"] == recorded[(e["worker"] - 1) % 2 + 1, e["step"]] for e in pushes)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read it"), ('{"event": "left"}\n', "no pushes"), ('{"event": "push"}\n', "line 1 is no event"),
     ("[1]\n", "line 1 is no event"), ('{"event": "left"}\n{', "line 2 is no event")],
)  # fmt: skip
def test_a_record_without_norms_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "events.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        RecordedNorms(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/events.jsonl: --norms: ")


def test_headers_of_a_larger_model_weigh_more(tmp_path: Path) -> None:
    small, large = headers_run(tmp_path), headers_run(tmp_path, "task.dimension=1000")
    assert (small["bytes_up"], large["bytes_up"]) == (120 * 64 * 4, 120 * 1024 * 4)
    slow = "simulation.network={latency_s: 0, server_bandwidth_bytes_per_s: 4096}"
    assert (
        headers_run(tmp_path, slow, "task.dimension=1000")["virtual_s"] > 120
    )  # a second each way and push; the ways are apart


def test_its_summary_says_what_was_not_computed(tmp_path: Path) -> None:
    made = headers_run(tmp_path)
    assert made["headers_only"] and made["parameters_sha256"] is None and made["metrics"]["loss"] is None
    assert made["bound_holds"] is None and made["snapshots_max"] is None
