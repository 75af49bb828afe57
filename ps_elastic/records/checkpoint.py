"""Parameters of a model, written and read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ps_elastic.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_parameters(model: nn.Module, path: str) -> None:
    """Fill the model's parameters, and buffers where the file has them, from a safetensors file.

    Raises ConfigError for a missing or broken file, a missing or unknown name, or another shape.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"no file '{path}'", key="train.init") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{path}' is not a safetensors file: {error}", key="train.init") from None
    expected = dict(_saved(model))
    missing, foreign = dict(model.named_parameters()).keys() - found.keys(), found.keys() - expected.keys()
    if missing or foreign:
        raise ConfigError(
            f"'{path}' lacks {sorted(missing)} and has {sorted(foreign)}; expected the names of the model",
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
