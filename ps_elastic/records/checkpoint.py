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


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones once."""
    names = model.state_dict().keys()
    return (pair for pair in (*model.named_parameters(), *model.named_buffers()) if pair[0] in names)
