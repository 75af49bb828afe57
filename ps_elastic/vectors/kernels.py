"""Whether there are compiled kernels, for whom they are worth it, and why there are none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from types import ModuleType

LEAST = 1 << 18  # floats: to pass over a smaller model is quicker than to compile, for many steps
EXTRA = "pip install 'ps_elastic[compiled]'"


_broken: list[str] = []  # why numba, which is installed, could not be imported


def kernels_for(numel: int) -> ModuleType | None:
    """The module `kernels`, for passes over models of so many floats; None where numpy and torch are to make them."""
    return _kernels() if numel >= LEAST and why_not() is None else None


def same_bits(one: Callable[..., object], other: Callable[..., object], vectors: int) -> bool:
    """Whether both leave the same bits in so many random vectors that they are given, on this machine.

    Which multiplications torch joins with additions depends on the processor and on how it was built.
    """
    import torch

    given = torch.randn(vectors, 1 << 10, generator=torch.Generator().manual_seed(0))
    ours, theirs = given.clone(), given.clone()
    one(*ours)
    other(*theirs)
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def why_not() -> str | None:
    """What keeps kernels from being compiled here, as far as that is known before the first are asked for, or None."""
    return _broken[0] if _broken else _missing()


def described() -> str:
    """One phrase: what compiles them, or why nothing does."""
    reason = why_not()
    return f"numba {metadata.version('numba')}" if reason is None else f"none: {reason}"


@cache
def _missing() -> str | None:
    try:
        metadata.version("numba")
    except metadata.PackageNotFoundError:
        return "numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    return None


@cache
def _kernels() -> ModuleType | None:
    try:
        from ps_elastic.vectors import numba_kernels
    except ImportError as error:  # as of a numba that is older than this numpy
        _broken.append(f"numba {metadata.version('numba')} cannot be imported: {error}")
        warnings.warn(f"{_broken[0]}; torch and numpy make the passes over the model", RuntimeWarning, stacklevel=3)
        return None
    return numba_kernels
