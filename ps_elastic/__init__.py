"""Train PyTorch models over MPI with a parameter server, and measure what consistency costs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ps_elastic.runtime.train import train
    from ps_elastic.simulation.simulate import simulate

__version__ = "0.1.0"
__all__ = ["__version__", "simulate", "train"]
_FACE = {"train": "runtime.train", "simulate": "simulation.simulate"}  # imported when asked for: `--help` needs neither


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'ps_elastic' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_FACE[name]}"), name)
