from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Images, OddModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.records.checkpoint import load_parameters, refuse_unsavable, tensors_to_save


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every name of it, tied ones twice."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "init.safetensors"


def loads(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> str:
    """What is told where `tensors` are loaded; the model is then as they are."""
    save_file(tensors, path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return load_parameters(model, str(path))


@pytest.mark.parametrize("left_out", [None, "again.weight", "twice.weight"])
def test_a_tied_tensor_is_loaded_by_both_names_or_either(path: Path, left_out: str | None) -> None:
    model = OddModel()
    tensors = state(model)
    before = tensors.copy()
    tensors.pop(left_out or "", None)
    assert loads(model, tensors, path) == ""
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_of_one_tensor_that_differ_are_refused(path: Path) -> None:
    tensors = state(OddModel())
    tensors["again.weight"] += 1
    with pytest.raises(ConfigError, match=r"'(again|twice)\.weight' differs from another name of 'twice\.weight'"):
        loads(OddModel(), tensors, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_prefix_of_every_name_is_left_out_and_told(path: Path, prefix: str) -> None:
    model = OddModel()
    before = state(model)
    told = loads(model, {prefix + name: tensor for name, tensor in before.items()}, path)
    assert told == f"train.init: every name in '{path}' begins with '{prefix}', which is left out"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_prefix_that_is_the_models_own_stays(path: Path) -> None:
    model = nn.Module()
    model.module = OddModel()
    assert loads(model, state(model), path) == ""
    wrapped = nn.Module()
    wrapped.module = model
    assert "begins with 'module.'" in loads(model, state(wrapped), path)


def test_a_prefix_of_some_names_or_of_the_model_is_named_with_what_to_do(path: Path) -> None:
    tensors = state(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"has \['module.bias'\].*'module.' in names of the file .*DDP: save"):
        loads(nn.Linear(2, 2), {"weight": tensors["weight"], "module.bias": tensors["bias"]}, path)
    model = nn.Module()
    model._orig_mod = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"'_orig_mod.' in names of the model comes from torch.compile"):
        loads(model, tensors, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_refused_with_the_command_that_converts_it(tmp_path: Path, zipped: bool) -> None:
    path, model = tmp_path / "model.pt", OddModel()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match=r"written by torch\.save, and .* can run code.*convert it") as error:
        load_parameters(model, str(path))
    command = str(error.value).split('python -c "')[1].split('"')[0]
    exec(command)
    assert load_parameters(model, str(tmp_path / "model.safetensors")) == ""


def test_a_file_of_anything_else_is_no_safetensors_file(path: Path, tmp_path: Path) -> None:
    path.write_text("PK is how it begins")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_parameters(OddModel(), str(path))
    np.savez(tmp_path / "init.npz", x=np.zeros(2))  # a zip file too
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_parameters(OddModel(), str(tmp_path / "init.npz"))


def test_buffers_that_share_memory_are_saved_each(path: Path) -> None:
    model, base = Images().model(0), torch.arange(10.0)
    model.register_buffer("a", base[:6])
    model.register_buffer("b", base[4:])
    save_file(tensors_to_save(model), path)
    saved = load_file(path)
    assert saved["a"].tolist() == [0, 1, 2, 3, 4, 5] and saved["b"].tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "torch.float32, torch.sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.float32, torch.sparse_csr"),
        (lambda: torch.empty(2, device="meta"), "no memory"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "torch.complex32"),
    ],
)
def test_what_safetensors_has_no_form_for_is_refused_by_name(make: Callable[[], Tensor], kind: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", make())
    with pytest.raises(ConfigError, match=rf"task: 'odd' cannot be saved as safetensors \({kind}"):
        refuse_unsavable(model)
    model = nn.Linear(2, 2)
    model.register_buffer("odd", make(), persistent=False)
    refuse_unsavable(model)
