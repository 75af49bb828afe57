"""Memory that model, gradient and messages live in; numpy only, so that the transport need not import torch."""

from __future__ import annotations

import numpy as np


def aligned(nbytes: int, offset: int = 0) -> np.ndarray:
    """A new zeroed (nbytes,) uint8 array whose byte `offset` lies at a 64-byte boundary."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -(raw.ctypes.data + offset) % 64
    return raw[start : start + nbytes]
