"""Parameters of a model, written and read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile, is_zipfile

from ps_elastic.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

# what is put before the names of a module that is wrapped
_WRAPPERS = {"module.": "DataParallel or DDP", "_orig_mod.": "torch.compile"}


def load_parameters(model: nn.Module, path: str) -> str:
    """Fill the model's parameters, and buffers where the file has them, from a safetensors file.

    A prefix that a wrapper gave to every name is left out; returned is what the user is to be told of that, or "".
    Raises ConfigError for a missing or broken file, a missing or unknown name, or another shape.
    """
    import torch

    file = _read(path)
    names = _places(model)
    prefix = _common_prefix(file, names)
    found: dict[str, Tensor] = {}
    for name, tensor in file.items():
        place = names.get(name.removeprefix(prefix), name.removeprefix(prefix))
        if place in found and not torch.equal(found[place], tensor):
            raise ConfigError(
                f"'{path}': '{name}' differs from another name of '{place}', which is the same tensor in the model; "
                "expected equal numbers, or one of the two",
                key="train.init",
            )
        found[place] = tensor
    expected = dict(_saved(model))
    missing, foreign = dict(model.named_parameters()).keys() - found.keys(), found.keys() - expected.keys()
    if missing or foreign:
        raise ConfigError(
            f"'{path}' lacks {sorted(missing)} and has {sorted(foreign)}; expected the names of the model"
            + _hint(missing, foreign),
            key="train.init",
        )
    with torch.no_grad():
        for name, tensor in found.items():
            target = expected[name]
            if target.shape != tensor.shape:
                raise ConfigError(
                    f"'{path}': '{name}' is {tuple(tensor.shape)}, expected {tuple(target.shape)}", key="train.init"
                )
            target.copy_(tensor)
    return f"train.init: every name in '{path}' begins with '{prefix}', which is left out" if prefix else ""


def _read(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"no file '{path}'", key="train.init") from None
    except (SafetensorError, OSError) as error:
        if Path(path).is_file() and _is_pickle(path):
            raise ConfigError(
                f"'{path}' was written by torch.save, and reading that can run code; expected safetensors. If you "
                f'trust the file, convert it once: python -c "import torch, safetensors.torch as s; '
                f"d = torch.load('{path}', weights_only=True); "
                f"s.save_file({{k: v.clone() for k, v in d.items()}}, '{Path(path).with_suffix('.safetensors')}')\" "
                "(of a checkpoint, d is the state_dict in it)",
                key="train.init",
            ) from None
        raise ConfigError(f"'{path}' is not a safetensors file: {error}", key="train.init") from None


def _is_pickle(path: str) -> bool:
    """Whether torch.save has written it: in a zip file, or in the form before."""
    if is_zipfile(path):
        with ZipFile(path) as file:
            return any(name.endswith("data.pkl") for name in file.namelist())
    with Path(path).open("rb") as plain:
        return plain.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _places(model: nn.Module) -> dict[str, str]:
    """Every name of the state -> the name under which its tensor is saved, which is another where it is tied."""
    first: dict[int, str] = {}
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = model.state_dict().keys()
    return {name: first.setdefault(id(tensor), name) for name, tensor in both if name in names}


def _common_prefix(file: Iterable[str], names: Container[str]) -> str:
    """What a wrapper put before every name in the file, "" where the model has such names itself."""
    prefix, rest = "", list(file)
    while rest and not any(name in names for name in rest):
        wrapper = next((wrapper for wrapper in _WRAPPERS if all(name.startswith(wrapper) for name in rest)), "")
        if not wrapper:
            return ""
        prefix, rest = prefix + wrapper, [name.removeprefix(wrapper) for name in rest]
    return prefix


def _hint(missing: Iterable[str], foreign: Iterable[str]) -> str:
    """What to do where a wrapper's prefix is in some of the names."""
    where = {"the file": foreign, "the model": missing}
    for owner, unmatched in where.items():
        for wrapper in _WRAPPERS:
            if any(name.startswith(wrapper) for name in unmatched):
                return (
                    f". '{wrapper}' in names of {owner} comes from "
                    f"{_WRAPPERS[wrapper]}: save, and return in `model`, the module inside"
                )
    return ""


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """What is written of the model: parameters and persistent buffers by name, on the CPU, tied tensors once.

    A buffer or frozen parameter that has some of its memory in common with another is copied, since the file has none
    in common; trained parameters have none.
    """
    tensors, seen = {}, set[int]()
    for name, tensor in _saved(model):
        held = tensor.detach().cpu().contiguous()
        storage = held.untyped_storage().data_ptr()
        tensors[name] = held.clone() if storage in seen and not tensor.requires_grad else held
        seen.add(storage)
    return tensors


def refuse_unsavable(model: nn.Module) -> None:
    """Raise ConfigError by name for what could not be written as model.safetensors after all the training."""
    import torch
    from safetensors.torch import save

    for name, tensor in _saved(model):
        strided = tensor.layout is torch.strided and not tensor.is_quantized
        try:
            if strided and not tensor.is_meta:
                save({name: torch.empty(0, dtype=tensor.dtype)})
                continue
        except (KeyError, RuntimeError, TypeError, ValueError):  # a type that the format does not know
            pass
        kind = "no memory" if tensor.is_meta else f"{tensor.dtype}" if strided else f"{tensor.dtype}, {tensor.layout}"
        raise ConfigError(
            f"'{name}' cannot be saved as safetensors ({kind}); expected a dense tensor of a plain type, or a buffer "
            "registered with persistent=False",
            key="task",
        )


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones once."""
    names = model.state_dict().keys()
    return (pair for pair in (*model.named_parameters(), *model.named_buffers()) if pair[0] in names)
