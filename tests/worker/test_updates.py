from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, Dropout, Run, fit, flat
from safetensors.torch import load_file
from torch import Tensor, nn

from ps_elastic.compressors.top_k import TopK
from ps_elastic.errors import ConfigError, TaskError
from ps_elastic.tasks import Task
from ps_elastic.worker.gradients import draw_seed
from ps_elastic.worker.updates import Update, updates
from ps_elastic.worker.updates.local_sgd import LocalSgd
from ps_elastic.worker.updates.sgd import Sgd
from ps_elastic.worker.updates.sisa import Sisa


def final(run: Run) -> np.ndarray:
    """The parameters that the run ended with, one after the other in the order of their names, (d,)."""
    saved = load_file(run.directory / "model.safetensors")
    return np.concatenate([saved[name].numpy().ravel() for name in sorted(saved)])


def in_order(model: nn.Module) -> np.ndarray:
    named = dict(model.named_parameters())
    return np.concatenate([named[name].detach().numpy().ravel() for name in sorted(named)])


# ---- local_sgd


class LocalLoop:
    """Local SGD without the framework: a model and a torch optimizer for each worker, averaged by hand.

    chosen(round): the workers, from 1, whose models are averaged.
    """

    def __init__(self, task: Task, workers: int, steps: int, lr: float, *, clip: float | None = None) -> None:
        self.models = [task.model(0) for _ in range(workers)]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=lr, foreach=False) for model in self.models]
        self.batches = [task.batches(rank, workers, 0) for rank in range(1, workers + 1)]
        self.task, self.steps, self.clip = task, steps, clip

    def run(self, rounds: int, chosen: Callable[[int], Sequence[int]]) -> nn.Module:
        for turn in range(rounds):
            start = [p.detach().clone() for p in self.models[0].parameters()]
            for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True), 1):
                for step in range(self.steps):
                    torch.manual_seed(draw_seed(0, rank, turn + 1, step))
                    optimizer.zero_grad()
                    self.task.loss(model, next(self.batches[rank - 1])).backward()
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                    optimizer.step()
            self.average(start, [self.models[rank - 1] for rank in chosen(turn)])
        return self.models[0]

    def average(self, start: list[Tensor], models: list[nn.Module]) -> None:
        """Each model becomes start - mean(start - model), which is their mean but for rounding."""
        with torch.no_grad():
            for i, x in enumerate(start):
                moves = [x - list(model.parameters())[i] for model in models]
                mean = x - sum(moves[1:], moves[0]) / len(moves)
                for model in self.models:
                    list(model.parameters())[i].copy_(mean)


@pytest.mark.parametrize("task", [Blobs(), Dropout()], ids=["Blobs", "Dropout"])
def test_local_sgd_with_full_averaging_is_that_of_a_loop_without_us(tmp_path: Path, task: Task) -> None:
    run = fit(tmp_path, f"helpers:{type(task).__name__}", "update=local_sgd:local_steps=3", samples=360)
    model = LocalLoop(task, 3, 3, 0.1).run(10, lambda turn: (1, 2, 3))  # 10 rounds of 3 workers, 3 steps, 4 samples
    digest = hashlib.sha256(flat(model).astype("<f4").tobytes()).hexdigest()
    assert run.summary["parameters_sha256"] == digest
    assert (run.summary["samples"], run.summary["pushes"], run.summary["versions"]) == (360, 30, 10)


def test_local_sgd_with_averaging_of_a_random_subset_is_that_of_a_loop_without_us(tmp_path: Path) -> None:
    run = fit(
        tmp_path, "helpers:Blobs", "update=local_sgd:local_steps=2", "policy=random_subset:q=2", workers=4, samples=160
    )
    steps = [action for line in map(json.loads, run.events) for action in line["actions"] if action[0] == "step"]
    drawn = [[worker for worker, *_ in terms] for _, terms, *_ in steps]
    model = LocalLoop(Blobs(), 4, 2, 0.1).run(10, lambda turn: drawn[turn])
    assert np.array_equal(final(run), in_order(model))
    assert {len(workers) for workers in drawn} == {2} and len({tuple(workers) for workers in drawn}) > 2


def test_every_local_gradient_is_clipped(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "update=local_sgd:local_steps=3", "optimizer.clip_norm=0.3", samples=360)
    model = LocalLoop(Blobs(), 3, 3, 0.1, clip=0.3).run(10, lambda turn: (1, 2, 3))
    free = LocalLoop(Blobs(), 3, 3, 0.1).run(10, lambda turn: (1, 2, 3))
    assert np.allclose(final(run), in_order(model), atol=1e-5)  # torch divides by norm + 1e-6
    assert not np.allclose(final(run), in_order(free), atol=1e-3)


def test_one_local_step_is_plain_sgd(tmp_path: Path) -> None:
    runs = [
        fit(tmp_path, "helpers:Blobs", f"update={name}", samples=240) for name in ("local_sgd:local_steps=1", "sgd")
    ]
    assert np.allclose(final(runs[0]), final(runs[1]), atol=1e-5)


def test_local_steps_follow_the_step_size_that_the_server_tells(tmp_path: Path) -> None:
    task = {"name": "helpers:Slope", "gradient": [1.0]}
    more = ("update=local_sgd:local_steps=3", "schedule.name=step", "schedule.step_samples=6", "schedule.gamma=0.5")
    run = fit(tmp_path, {"task": task}, "optimizer.lr=0.1", *more, workers=2, samples=12)  # 6 samples a round
    assert final(run) == pytest.approx([-3 * 0.1 - 3 * 0.05])
    warm = fit(
        tmp_path, {"task": task}, "update=local_sgd:local_steps=3", "schedule.warmup_samples=6", workers=2, samples=12
    )
    assert final(warm) == pytest.approx([-3 * 0.1])  # the first round is made at a step size of 0


def test_samples_count_every_batch_of_every_local_step(tmp_path: Path) -> None:
    more = ("update.local_steps=3", "update.accumulate=2", "task.batch_size=5")
    run = fit(tmp_path, "helpers:Blobs", "update=local_sgd", *more, workers=2, samples=60)
    assert (run.summary["samples"], run.summary["pushes"]) == (60, 2)


def test_a_worker_observes_its_distance_from_the_mean_of_the_local_models(tmp_path: Path) -> None:
    """Two workers, f_i = (x - b_i)^2/2 with b = +-1, from 0: the last of H gradients is taken 1 - (1 - alpha)^(H-1)
    from the mean. What the server measures is the model that was pulled, which nobody has moved."""
    task = {"name": "quadratic", "curvature": [1.0], "noise": 0.0, "heterogeneity": 1.0, "start": 0.0}
    for steps, expected in ((5, 0.3439), (1, 0.0), (8, 1 - 0.9**7)):
        run = fit(tmp_path, {"task": task}, f"update=local_sgd:local_steps={steps}", workers=2, samples=6 * steps)
        for rank in (1, 2):
            moved = run.column("moved", rank, "reply")[:2]  # the last reply carries no model
            assert moved == pytest.approx([expected, expected], abs=1e-6)
        assert run.summary["discrepancy"]["max"] == 0


def test_error_feedback_of_updates_is_not_rescaled_when_the_step_size_changes(tmp_path: Path) -> None:
    """One worker: x + residual must be the sum of all local moves, whatever alpha was when each was made."""
    run = fit(
        tmp_path, "helpers:Blobs", "update=local_sgd:local_steps=2", "compressor=top_k:ratio=0.1",
        "schedule.name=step", "schedule.step_samples=40", "schedule.gamma=0.1", workers=1, samples=120,
    )  # fmt: skip
    task, model = Blobs(), Blobs().model(0)
    batches, residual, top_k = task.batches(1, 1, 0), None, TopK(ratio=0.1)
    for turn in range(15):
        lr = 0.1 * 0.1 ** (turn * 8 // 40)
        start = padded(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(2):
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()
            optimizer.step()
        whole = start - padded(model) + (0 if residual is None else residual)
        sent = top_k.decode(top_k.encode(whole), whole.numel())
        residual = whole - sent
        nn.utils.vector_to_parameters(unpadded(start - sent, model), model.parameters())
    assert np.allclose(final(run), in_order(model), atol=1e-5)


def padded(model: nn.Module) -> Tensor:
    """As it stands in the flat vector: each tensor followed by zeros up to a multiple of 64 floats."""
    tensors = [p.detach().flatten() for p in model.parameters()]
    return torch.cat([nn.functional.pad(t, (0, -t.numel() % 64)) for t in tensors])


def unpadded(vector: Tensor, model: nn.Module) -> Tensor:
    parts = vector.split([p.numel() + -p.numel() % 64 for p in model.parameters()])
    return torch.cat([part[: p.numel()] for part, p in zip(parts, model.parameters(), strict=True)])


def test_after_a_gradient_that_is_not_finite_local_steps_begin_again_at_the_model_pulled(tmp_path: Path) -> None:
    """The second of worker 2's batches is infinite: its first three are drawn for nothing or anew."""
    task = {"name": "helpers:Poisoned", "gradient": [1.0], "bad": [2]}
    more = ("update=local_sgd:local_steps=2", "optimizer.lr=0.1", "train.on_nonfinite=drop")
    run = fit(tmp_path, {"task": task}, *more, workers=2, samples=8)
    assert final(run) == pytest.approx([-0.4])  # two rounds of two steps
    with pytest.raises(TaskError, match="step 1: the gradient is not finite"):
        fit(tmp_path, {"task": task}, *more[:2], workers=2, samples=8)


# ---- sisa


def two_wells(tmp_path: Path, update: str, samples: int) -> Run:
    """f_i = (x - b_i)^2/2 with b = 1 and 3, without noise, from 0, with the rule that PISA goes with."""
    task = {"name": "quadratic", "curvature": [1.0], "noise": 0.0, "heterogeneity": 1.0, "optimum": 2.0, "start": 0.0}
    return fit(tmp_path, {"task": task}, "policy=consensus", f"update={update}", workers=2, samples=samples)


PISA = "sisa:precondition=false:sigma=2:rho=3:mu=1"


def test_the_first_round_of_pisa_is_the_gradient_step_that_theory_says(tmp_path: Path) -> None:
    run = two_wells(tmp_path, f"{PISA}:ridge=0", samples=2)
    assert final(run) == pytest.approx([0.8])  # w_0 - 2 mean(g)/(sigma + rho)


def test_pisa_rests_at_the_regularised_optimum_whatever_the_data_of_each(tmp_path: Path) -> None:
    assert final(two_wells(tmp_path, f"{PISA}:ridge=0.5", samples=400)) == pytest.approx([4 / 3])
    assert final(two_wells(tmp_path, f"{PISA}:ridge=0", samples=400)) == pytest.approx([2.0])


def test_the_multipliers_of_pisa_rest_at_minus_the_gradients() -> None:
    workers = [Sisa(sigma=2.0, rho=3.0, ridge=0.5, precondition=False, mu=1.0) for _ in range(2)]
    w = torch.zeros(1)
    for version in range(200):
        pushed = [
            contribution(worker, w, lambda b=b, w=w: w - b, version) for worker, b in zip(workers, (1, 3), strict=True)
        ]
        w = sum(pushed, torch.zeros(1)) / 2
    assert float(w) == pytest.approx(4 / 3)
    assert [float(worker._multiplier) for worker in workers] == pytest.approx([-1 / 3, 5 / 3])


def contribution(update: Update, w: Tensor, gradient: Callable[[], Tensor], version: int = 0) -> Tensor:
    """What `update` pushes at w, from a function that gives the gradient there."""
    g, before = torch.empty_like(w), w.clone()

    def compute() -> float:
        g.copy_(gradient())
        return 1.25

    assert update.run(compute, w, g, 0.1, version) == 1.25
    assert torch.equal(w, before)
    return g


@pytest.mark.parametrize("precondition", [False, True])
def test_sisa_is_its_four_equations(precondition: bool) -> None:
    """In double precision, with a sigma that grows every third version."""
    settings: dict[str, Any] = {"sigma": 0.7, "rho": 30.0, "ridge": 0.2, "beta": 0.9, "mu": 0.8, "growth_every": 3}
    update, generator = Sisa(precondition=precondition, **settings), np.random.default_rng(0)
    pi, m = np.zeros(30), np.zeros(30)
    for version in range(12):
        w, g = generator.standard_normal((2, 30)).astype(np.float32)
        z = contribution(update, torch.from_numpy(w), lambda g=g: torch.from_numpy(g), version)
        sigma = 0.7 / 0.8 ** (version // 3)
        m = 0.9 * m + 0.1 * (g + pi) ** 2
        q = np.sqrt(m / (1 - 0.9 ** (version + 1))) if precondition else 1.0
        w_i = w - (g + pi) / (sigma + 30.0 * q)
        pi = pi + sigma * (w_i - w)
        assert np.allclose(z.numpy(), (sigma * w_i + pi) / (sigma + 0.2), rtol=1e-5, atol=1e-6)


def test_sisa_learns_where_the_workers_have_different_data(tmp_path: Path) -> None:
    task = {"name": "digits", "heterogeneity": 5.0}
    run = fit(tmp_path, {"task": task}, "policy=consensus", "update=sisa", samples=20000)
    assert run.summary["metrics"]["accuracy"] > 0.9


def test_a_gradient_that_is_not_finite_leaves_the_multipliers_as_they_were(tmp_path: Path) -> None:
    update, w = Sisa(rho=1.0), torch.ones(4)
    contribution(update, w, lambda: torch.ones(4))
    kept = update._multiplier.clone(), update._moment.clone(), update._rounds  # type: ignore[union-attr]
    assert not contribution(update, w, lambda: torch.full((4,), math.inf)).isfinite().any()
    assert torch.equal(update._multiplier, kept[0]) and torch.equal(update._moment, kept[1])  # type: ignore[arg-type]
    assert update._rounds == kept[2]
    task = {"name": "helpers:Poisoned", "bad": [2, 5]}
    run = fit(
        tmp_path, {"task": task}, "policy=consensus", "update=sisa", "train.on_nonfinite=drop", workers=2, samples=20
    )
    assert np.isfinite(final(run)).all() and run.summary["samples"] == 20


# ---- every update


@pytest.mark.parametrize("name", [name for name, _ in updates.items()])
def test_an_update_leaves_the_model_pulled_as_it_was_and_the_padding_zero(name: str) -> None:
    update, x = updates.load(name)(), torch.tensor([1.0, -2.0, 0.0, 0.0])
    for version in range(3):
        pushed = contribution(update, x, lambda: torch.tensor([0.5, 0.25, 0.0, 0.0]), version)
        assert pushed[:2].all() and not pushed[2:].any()


@pytest.mark.parametrize(
    ("update", "setting", "value"),
    [
        (LocalSgd, "local_steps", 0),
        (Sisa, "sigma", 0.0),
        (Sisa, "rho", -1.0),
        (Sisa, "ridge", -1.0),
        (Sisa, "beta", 1.0),
        (Sisa, "mu", 0.0),
        (Sisa, "mu", 1.1),
        (Sisa, "growth_every", 0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(update: type[Update], setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: got {value}, expected"):
        update(**{setting: value})


def test_no_two_workers_share_the_state_of_their_update(tmp_path: Path) -> None:
    """Worker 2 pulls the other way; were pi shared, neither would rest at its own gradient."""
    assert Sgd().view is None and LocalSgd().view is None
    run = two_wells(tmp_path, f"{PISA}:ridge=0", samples=400)
    assert run.summary["metrics"]["distance"] < 1e-5
