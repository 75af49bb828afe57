"""Whether there are compiled kernels, for whom they are worth it, and why there are none."""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from types import ModuleType

LEAST = 1 << 18  # floats: to pass over a smaller model is quicker than to compile, for many steps
EXTRA = "pip install 'ps_elastic[compiled]'"


def kernels_for(numel: int) -> ModuleType | None:
    """The module `kernels`, for passes over models of so many floats; None where numpy and torch are to make them."""
    return _kernels() if numel >= LEAST and why_not() is None else None


@cache
def why_not() -> str | None:
    """What keeps kernels from being compiled here; None where nothing does. Nothing is imported."""
    try:
        metadata.version("numba")
    except metadata.PackageNotFoundError:
        return "numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    return None


def described() -> str:
    """One phrase: what compiles them, or why nothing does."""
    reason = why_not()
    return f"numba {metadata.version('numba')}" if reason is None else f"none: {reason}"


@cache
def _kernels() -> ModuleType:
    from ps_elastic import kernels

    return kernels
