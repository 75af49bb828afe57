"""Synchronous training against a loop that knows nothing of it: ordinary modules, torch.optim, one process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blobs, Dropout, Images, Odd, Run, fit
from torch import Tensor, nn

from ps_elastic.tasks import Task
from ps_elastic.tasks.digits import Digits
from ps_elastic.worker.gradients import draw_seed

Sgd = torch.optim.SGD


class PlainLoop:
    """(g_1 + ... + g_p) / p, added in worker order and divided once, into torch.optim; no code of ours but the task.

    A parameter that no loss depends on has the gradient zero (torch.optim would skip it: weight decay tells them
    apart). keep: what becomes of worker i's gradients, a list of tensors, before they are added.
    """

    def __init__(
        self, task: Task, workers: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer], seed: int = 0
    ):
        self.task, self.workers, self.seed, self.model = task, workers, seed, task.model(seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.model)
        self.batches = [task.batches(worker, workers, seed) for worker in range(1, workers + 1)]
        self.samples, self.steps = 0, 0
        self.accumulate = 1
        self.keep: Callable[[int, list[Tensor]], list[Tensor]] = lambda worker, gradients: gradients
        self.rate: Callable[[int], float] | None = None

    def run(self, budget: int) -> str:
        self.model.train()
        while self.samples < budget:
            self.steps += 1
            gradients = [self.keep(worker, self.gradient(worker)) for worker in range(1, self.workers + 1)]
            for parameter, of_workers in zip(self.parameters, zip(*gradients, strict=True), strict=True):
                total = of_workers[0].clone()
                for gradient in of_workers[1:]:
                    total += gradient
                parameter.grad = total / self.workers if self.workers > 1 else total
            if self.rate is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(self.samples)
            self.optimizer.step()
            self.samples += self.workers * self.task.batch_size * self.accumulate
        return sha256(self.model)

    def gradient(self, worker: int) -> list[Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        for part in range(self.accumulate):
            torch.manual_seed(draw_seed(self.seed, worker, self.steps, part))
            loss = self.task.loss(self.model, next(self.batches[worker - 1]))
            (loss / self.accumulate).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]


def sha256(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().astype("<f4").tobytes() for p in model.parameters())).hexdigest()


def plain(task: Task, workers: int, budget: int, **settings: Any) -> str:
    settings = {"lr": 0.1, **settings}
    return PlainLoop(task, workers, lambda model: Sgd(trained(model), foreach=False, **settings)).run(budget)


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def hash_of(run: Run) -> str:
    assert run.summary["exit"] == 0
    return str(run.summary["parameters_sha256"])


SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.01},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.003},
]


def words(settings: dict[str, Any]) -> list[str]:
    return [f"optimizer.{key}={str(value).lower()}" for key, value in settings.items()]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "workers", [1, 3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_blobs_end_at_the_bits_of_the_plain_loop(tmp_path: Path, workers: int, settings: dict[str, Any]) -> None:
    run = fit(tmp_path, "helpers:Blobs", *words(settings), workers=workers, samples=200)
    assert hash_of(run) == plain(Blobs(), workers, 200, **settings)


# 2 and 4 workers, with which the mean is divided exactly, are here in the quick suite.
@pytest.mark.parametrize(("workers", "settings"), [(2, SETTINGS[1]), (3, SETTINGS[4]), (4, SETTINGS[0])], ids=str)
def test_digits_end_at_the_bits_of_the_plain_loop(tmp_path: Path, workers: int, settings: dict[str, Any]) -> None:
    run = fit(tmp_path, "digits", *words(settings), workers=workers, samples=3000)
    assert hash_of(run) == plain(Digits(), workers, 3000, **settings)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_network_with_batchnorm_ends_at_the_bits_of_the_plain_loop(tmp_path: Path, workers: int) -> None:
    run = fit(tmp_path, "helpers:Images", *words(SETTINGS[4]), workers=workers, samples=200)
    assert hash_of(run) == plain(Images(), workers, 200, **SETTINGS[4])


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]], ids=str)
def test_frozen_unused_and_tied_parameters_end_at_the_bits_of_the_plain_loop(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = fit(tmp_path, "helpers:Odd", *words(settings), samples=200)
    assert hash_of(run) == plain(Odd(), 3, 200, **settings)


def test_dropout_is_drawn_by_seed_worker_and_step(tmp_path: Path) -> None:
    assert hash_of(fit(tmp_path, "helpers:Dropout", samples=200)) == plain(Dropout(), 3, 200)


def test_another_seed_gives_other_bits_and_those_of_the_plain_loop_too(tmp_path: Path) -> None:
    first, second = (fit(tmp_path, "helpers:Blobs", f"seed={seed}", samples=200) for seed in (0, 5))
    loop = PlainLoop(Blobs(), 3, lambda model: Sgd(model.parameters(), lr=0.1, foreach=False), seed=5)
    assert hash_of(first) != hash_of(second) == loop.run(200)


def test_the_mean_of_two_batches_makes_one_push(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "update.accumulate=2", samples=240)
    loop = PlainLoop(Blobs(), 3, lambda model: Sgd(model.parameters(), lr=0.1, foreach=False))
    loop.accumulate = 2
    assert hash_of(run) == loop.run(240)
    assert run.summary["samples"] == loop.samples
    assert run.summary["used"] == 3 * loop.steps


def test_each_worker_clips_its_own_gradient(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "optimizer.clip_norm=1.0", samples=200)
    loop = PlainLoop(Blobs(), 3, lambda model: Sgd(model.parameters(), lr=0.1, foreach=False))
    clipped = []

    def clip(worker: int, gradients: list[Tensor]) -> list[Tensor]:
        norm = float(torch.linalg.vector_norm(torch.cat([padded(g) for g in gradients])))
        clipped.append(norm > 1.0)
        return [g * (1.0 / norm) for g in gradients] if norm > 1.0 else gradients

    loop.keep = clip
    assert hash_of(run) == loop.run(200)
    assert any(clipped) and not all(clipped)


def padded(tensor: Tensor) -> Tensor:
    """As it stands in the flat vector: followed by zeros up to a multiple of 64 floats."""
    return nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 64))


def cosine(samples: int) -> float:
    return 0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * samples / 200)) / 2)


RATES: dict[str, tuple[list[str], Callable[[int], float]]] = {
    "step": (
        ["schedule.name=step", "schedule.step_samples=50", "schedule.gamma=0.3"],
        lambda samples: 0.1 * 0.3 ** (samples // 50),
    ),
    "cosine": (["schedule.name=cosine", "schedule.final=0.2"], cosine),
    "warm-up": (["schedule.warmup_samples=75"], lambda samples: 0.1 * min(1.0, samples / 75)),
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_follows_the_samples_used(tmp_path: Path, name: str) -> None:
    overrides, rate = RATES[name]
    run = fit(tmp_path, "helpers:Blobs", "optimizer.momentum=0.9", *overrides, samples=200)
    loop = PlainLoop(Blobs(), 3, lambda model: Sgd(model.parameters(), lr=0.1, momentum=0.9, foreach=False))
    loop.rate = rate
    assert hash_of(run) == loop.run(200)
    assert len(set(run.column("step_size"))) > 2


def groups_of(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def test_norms_and_biases_do_not_decay_on_request(tmp_path: Path) -> None:
    overrides = ("optimizer.weight_decay=0.05", "optimizer.momentum=0.9", "optimizer.decay_norm_and_bias=false")
    run = fit(tmp_path, "helpers:Images", *overrides, samples=200)
    loop = PlainLoop(Images(), 3, lambda model: Sgd(groups_of(model, 0.05), lr=0.1, momentum=0.9, foreach=False))
    assert hash_of(run) == loop.run(200) != plain(Images(), 3, 200, weight_decay=0.05, momentum=0.9)


class TopKByHand:
    """Each worker's residual, and the k largest of gradient + residual by a full sort; ties go to the lowest index."""

    def __init__(self, k: int, rate: Callable[[int], float] | None = None) -> None:
        self.k, self.rate = k, rate
        self.residuals: dict[int, Tensor] = {}
        self.pushed: dict[int, int] = {}

    def __call__(self, worker: int, gradients: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([g.flatten() for g in gradients])
        residual = self.residuals.get(worker, torch.zeros_like(flat))
        steps = self.pushed.get(worker, 0)
        if self.rate is not None and steps:
            residual = residual * (self.rate(steps - 1) / self.rate(steps))
        total = flat + residual
        chosen = torch.sort(total.abs(), descending=True, stable=True).indices[: self.k]
        sent = torch.zeros_like(total)
        sent[chosen] = total[chosen]
        self.residuals[worker], self.pushed[worker] = total - sent, steps + 1
        return [part.view_as(g) for part, g in zip(sent.split([g.numel() for g in gradients]), gradients, strict=True)]


def entries(parameters: Iterable[nn.Parameter]) -> int:
    return sum(padded(p.detach()).numel() for p in parameters)


@pytest.mark.parametrize("task", ["helpers:Blobs", "helpers:Images", "digits"])
def test_error_fed_top_k_ends_at_the_bits_of_a_full_sort(tmp_path: Path, task: str) -> None:
    made = {"helpers:Blobs": Blobs(), "helpers:Images": Images(), "digits": Digits()}[task]
    budget = 3000 if task == "digits" else 200
    run = fit(tmp_path, task, "compressor=top_k:ratio=0.05", "optimizer.momentum=0.9", samples=budget)
    loop = PlainLoop(made, 3, lambda model: Sgd(model.parameters(), lr=0.1, momentum=0.9, foreach=False))
    loop.keep = TopKByHand(int(0.05 * entries(loop.parameters)))  # the padding counts in n
    assert hash_of(run) == loop.run(budget)


def test_the_residual_keeps_its_meaning_when_the_learning_rate_changes(tmp_path: Path) -> None:
    overrides, rate = RATES["cosine"]
    run = fit(tmp_path, "helpers:Blobs", "compressor=top_k:ratio=0.05", *overrides, samples=200)
    loop = PlainLoop(Blobs(), 3, lambda model: Sgd(model.parameters(), lr=0.1, foreach=False))
    loop.rate = rate
    loop.keep = TopKByHand(int(0.05 * entries(loop.parameters)), lambda steps: rate(12 * steps))
    assert hash_of(run) == loop.run(200)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_ends_at_the_bits_of_torchs_fused_form_on_the_padded_vector(tmp_path: Path, name: str) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"optimizer.name={name}", "optimizer.lr=0.01", "optimizer.weight_decay=0.02",
              samples=200)  # fmt: skip
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    made: list[Tensor] = []

    def on_padded(model: nn.Module) -> torch.optim.Optimizer:
        made.append(torch.cat([padded(p.detach()) for p in model.parameters()]).requires_grad_())
        return kind(made, lr=0.01, weight_decay=0.02, fused=True)

    loop = PlainLoop(Blobs(), 3, on_padded)
    vector, step = made[0], loop.optimizer.step

    def through_the_vector() -> None:
        vector.grad = torch.cat([padded(p.grad) for p in loop.parameters if p.grad is not None])
        step()
        parts = vector.detach().split([padded(p.detach()).numel() for p in loop.parameters])
        for parameter, part in zip(loop.parameters, parts, strict=True):
            parameter.data.copy_(part[: parameter.numel()].view_as(parameter))

    loop.optimizer.step = through_the_vector  # type: ignore[method-assign,assignment]
    assert hash_of(run) == loop.run(200)


@pytest.mark.parametrize("compressor", ["identity", "top_k:ratio=0.05"])
def test_the_same_run_twice_has_the_same_bits(tmp_path: Path, compressor: str) -> None:
    for policy in ("synchronous", "asynchronous", "stale_synchronous:bound=1", "first_k:k=2"):
        runs = [
            fit(tmp_path, "helpers:Images", f"policy={policy}", f"compressor={compressor}", samples=100)
            for _ in range(2)
        ]
        assert hash_of(runs[0]) == hash_of(runs[1])
        assert runs[0].events == runs[1].events


def test_buckets_do_not_change_the_bits(tmp_path: Path) -> None:
    runs = [fit(tmp_path, "helpers:Images", f"buckets={cut}", "optimizer.momentum=0.9", samples=300)
            for cut in ("whole", "layer", 4, 400, 1500)]  # fmt: skip
    late = fit(tmp_path, "helpers:Images", "buckets=400", "train.on_nonfinite=drop", "optimizer.momentum=0.9",
               samples=300)  # where nothing leaves before backward ends  # fmt: skip
    assert len({hash_of(run) for run in (*runs, late)}) == 1
    assert len({run.summary["bytes_up"] for run in runs}) == 1
    assert runs[3].events == late.events


def test_running_a_run_s_own_config_again_repeats_it(tmp_path: Path) -> None:
    first = fit(tmp_path, "helpers:Images", "policy=stale_synchronous", "compressor=top_k:ratio=0.1",
                "optimizer.momentum=0.5", samples=300)  # fmt: skip
    from ps_elastic import train

    again = train(first.directory / "config.yaml", workers=3, run_dir=tmp_path / "again")
    assert again is not None
    assert again["parameters_sha256"] == first.summary["parameters_sha256"]
    assert (tmp_path / "again" / "config.yaml").read_text() == (first.directory / "config.yaml").read_text()


def test_the_hash_is_that_of_the_parameters_in_model_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = fit(tmp_path, "helpers:Odd", samples=100)
    saved = load_file(run.directory / "model.safetensors")
    names = [name for name, _ in Odd().model(0).named_parameters()]
    assert sorted(saved) == sorted(names)
    digest = hashlib.sha256(b"".join(saved[name].numpy().astype("<f4").tobytes() for name in names)).hexdigest()
    assert digest == hash_of(run)
