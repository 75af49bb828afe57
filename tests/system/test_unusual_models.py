"""Models out of the ordinary, whole runs: trained as plain torch trains them, or refused by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, ROOT, TRAIN, Several
from helpers import fit
from safetensors.torch import load_file, save_file

from ps_elastic.cli import main
from ps_elastic.errors import TaskError
from ps_elastic.tasks import Task

WORKERS, RATE, STEPS = 3, 0.05, 12


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PROGRAMS)
    import unusual

    return unusual


def run(folder: Path, task: str, *overrides: str) -> dict[str, Any]:
    """The summary of a run in this process."""
    samples = f"train.samples={8 * WORKERS * STEPS}"
    return fit(folder, f"unusual:{task}", f"optimizer.lr={RATE}", samples, *overrides, workers=WORKERS).summary


def plain_loss(task: Task) -> float:
    """The loss after as many steps of plain torch on the mean gradient: one model, all workers' batches."""
    model, batches = task.model(0), [task.batches(worker, WORKERS, 0) for worker in range(1, WORKERS + 1)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(STEPS):
        statistics: list[list[torch.Tensor]] = []
        total = [torch.zeros_like(parameter) for parameter in trained]
        before = [buffer.clone() for buffer in model.buffers()]
        for worker in batches:
            for buffer, old in zip(model.buffers(), before, strict=True):
                buffer.copy_(old)
            gradients = torch.autograd.grad(task.loss(model, next(worker)), trained)
            for place, gradient in zip(total, gradients, strict=True):
                place += gradient.to_dense() / WORKERS
            statistics.append([buffer.clone() for buffer in model.buffers()])
        for buffer, *each in zip(model.buffers(), *statistics, strict=True):
            buffer.copy_(torch.stack(each).double().mean(0))
        with torch.no_grad():
            for parameter, gradient in zip(trained, total, strict=True):
                parameter -= RATE * gradient
    with torch.no_grad():
        return task.evaluate(model.eval())["loss"]


CHANGED = {
    "release": "parameter 'body.weight' was frozen when training began and requires a gradient now",
    "freeze": "parameter 'body.weight' was trained when training began and requires no gradient now",
    "freeze all": "parameter 'body.weight' was trained when training began and requires no gradient now",
    "move": "parameter 'body.weight' lives in other memory",
    "cast": "parameter 'body.weight' lives in other memory",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_parameter_that_changes_its_part_ends_the_run_by_name_and_step(tmp_path: Path, change: str) -> None:
    with pytest.raises(TaskError, match=f"step 6: {CHANGED[change]}"):
        run(tmp_path, "Changes", f"task.change={change}")
    summary = json.loads((tmp_path / "run-0" / "summary.json").read_text())
    assert summary["exit"] == 1 and "step 6" in summary["error"]


def test_modes_that_the_task_set_stay_and_each_evaluation_is_in_eval_mode(tmp_path: Path, tasks: Any) -> None:
    for whole in (False, True):
        summary = run(tmp_path, "Modes", f"task.whole={whole}", "train.evaluate_every_samples=48")
        assert summary["metrics"]["loss"] == pytest.approx(plain_loss(tasks.Modes(whole=whole)), rel=1e-4)


@pytest.mark.parametrize("task", ["SharedBuffers", "NoCopies"])
def test_what_cannot_be_copied_or_shares_buffers_is_trained_and_saved(tmp_path: Path, tasks: Any, task: str) -> None:
    summary = run(tmp_path, task)
    made = getattr(tasks, task)()
    assert summary["metrics"]["loss"] == pytest.approx(plain_loss(made), rel=1e-4)
    saved = load_file(tmp_path / "run-0" / "model.safetensors")
    model = made.model(0)
    assert saved.keys() == dict((*model.named_parameters(), *model.named_buffers())).keys() - {"scale"}
    again = run(tmp_path, task, f"train.init={tmp_path / 'run-0' / 'model.safetensors'}", "optimizer.lr=1e-30")
    assert again["metrics"]["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("Sparse", ()),
        ("Sparse", ("buckets=layer",)),
        ("Frozen", ()),
        ("Frozen", ("task.dtype=float64",)),
        ("Empty", ()),
        ("Empty", ("buckets=layer",)),
        ("Empty", ("buckets=300",)),
    ],
)
def test_it_trains_as_plain_torch_does(tmp_path: Path, tasks: Any, task: str, overrides: tuple[str, ...]) -> None:
    settings = {"dtype": overrides[0].partition("=")[2]} if "task.dtype=float64" in overrides else {}
    made = getattr(tasks, task)(**settings)
    assert run(tmp_path, task, *overrides)["metrics"]["loss"] == pytest.approx(plain_loss(made), rel=1e-4)
    saved, model = load_file(tmp_path / "run-0" / "model.safetensors"), made.model(0)
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("overrides", [("policy=salf_fill",), ("buckets=layer", "compressor=top_k:ratio=0.1")])
def test_empty_parameters_fit_any_policy_and_compressor(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert run(tmp_path, "Empty", *overrides)["exit"] == 0


def test_what_the_user_is_to_know_of_the_model_is_told_on_stderr(tmp_path: Path, tasks: Any, capsys: Any) -> None:
    state = tasks.Modes().model(0).state_dict()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.safetensors")
    init = f"train.init={tmp_path / 'ddp.safetensors'}"
    config = tmp_path / "modes.yaml"
    config.write_text("task: {name: 'unusual:Modes', whole: true}\ntrain: {samples: 16}\n")
    for command, *options in (("train", "--in-process"), ("simulate",)):
        words = [command, str(config), init, "--workers", "2", *options]
        assert main([*words, "--run-dir", str(tmp_path / command)]) == 0
        told = capsys.readouterr().err
        assert "begins with 'module.', which is left out" in told
        assert "`model` returned a model in eval mode, and it is trained so" in told


# Of each kind one: what is right in one process is right where models are received, or read where the server has them.
TRAINED = ("SharedBuffers", "NoCopies", "Sparse", "Frozen", "Empty", "Modes")


@pytest.fixture(scope="module")
def trained(several: Several, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of each of TRAINED, over messages and shared memory."""
    folder = tmp_path_factory.mktemp("unusual")
    plan = {}
    for task in TRAINED:
        (folder / f"{task}.yaml").write_text(f"task: unusual:{task}\n")
        for transport in ("messages", "shared"):
            where = folder / f"{task}-{transport}"
            words = [f"transport={transport}", f"optimizer.lr={RATE}", f"train.samples={8 * WORKERS * STEPS}"]
            plan[where.name] = {"argv": ["train", f"{task}.yaml", *words, "--run-dir", str(where)]}
    for name, said in several.run(plan, folder).items():
        assert [rank.code for rank in said] == [0] * Several.RANKS, (name, said)
    return folder


@pytest.mark.mpi
@pytest.mark.parametrize("task", TRAINED)
def test_under_mpirun_it_trains_as_plain_torch_does(trained: Path, tasks: Any, task: str) -> None:
    expected = plain_loss(getattr(tasks, task)())
    for transport in ("messages", "shared"):
        summary = json.loads((trained / f"{task}-{transport}" / "summary.json").read_text())
        assert summary["metrics"]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["messages", "shared"])
@pytest.mark.parametrize("change", ["release", "move"])
def test_under_mpirun_a_parameter_that_changes_is_named_with_rank_and_step(
    start_ranks: Any, tmp_path: Path, change: str, transport: str
) -> None:
    (tmp_path / "changes.yaml").write_text(f"task: {{name: 'unusual:Changes', change: {change}}}\n")
    words = [str(tmp_path / "changes.yaml"), f"transport={transport}", "--run-dir", str(tmp_path / "run")]
    ended = start_ranks(3, [*TRAIN, *words], PYTHONPATH=os.pathsep.join([str(ROOT), str(PROGRAMS)])).wait()
    assert ended.code == 1
    (message,) = ended.messages()
    assert re.match(rf"rank [12]: step 6: {CHANGED[change]}", message)
