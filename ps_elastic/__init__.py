"""Train PyTorch models over MPI with a parameter server, and measure what consistency costs."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def __getattr__(name: str) -> Any:
    # `from ps_elastic import train` must work, and `ps-elastic --help` must not import torch for it.
    if name == "train":
        from ps_elastic.runtime.train import train

        return train
    raise AttributeError(f"module 'ps_elastic' has no attribute '{name}'")
