from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ps_elastic.compressors.base import Compressor, Payload, compressors
from ps_elastic.errors import WireError
from ps_elastic.plugins import Ratio

_SAMPLE = 64  # look at one entry in 64 to guess the threshold
_BLOCK = 1 << 16  # entries whose magnitudes stay in cache
_SMALL = 1 << 15  # entries; below this the sample costs more than it saves


@compressors.register("top_k")
@dataclass
class TopK(Compressor):
    """Send the k = max(1, floor(ratio n)) entries of largest magnitude; the lowest index wins a tie.

    Contraction: ||v - decode(encode(v))||^2 <= (1 - k/n) ||v||^2, equality where all |v_j| are equal.
    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018, definition 2.1; Aji and Heafield,
    "Sparse communication for distributed gradient descent", EMNLP 2017.
    """

    cuts = True
    ratio: Ratio = 0.01  # fraction of the entries that is sent; larger: more bytes, smaller error

    def count(self, numel: int) -> int:
        """k for a bucket of `numel` entries."""
        return max(1, int(self.ratio * numel))

    def encode(self, vector: Tensor) -> Payload:
        """Returns (indices, values): (k,) int32 and (k,) float32, sorted by index."""
        vector = vector.detach().cpu()
        indices = torch.from_numpy(largest(vector.numpy(), self.count(vector.numel())))
        return indices.to(torch.int32), vector[indices]

    def accumulate(self, payload: Payload, out: Tensor, weight: float = 1.0) -> None:
        indices, values = payload
        out.index_add_(0, indices, values, alpha=weight)

    def cut(self, payload: Payload, stops: Sequence[int]) -> list[Payload]:
        indices, values = payload
        ends = [0, *np.searchsorted(indices.numpy(), np.array(stops, np.int32)).tolist()]
        starts = (0, *stops)
        return [(indices[i:j] - start, values[i:j]) for start, (i, j) in zip(starts, pairwise(ends), strict=False)]

    def check(self, payload: Payload, numel: int) -> None:
        types = [array.dtype for array in payload]
        lengths = [array.numel() for array in payload]
        k = self.count(numel)
        if types != [torch.int32, torch.float32] or lengths != [k, k]:
            raise WireError(f"top_k: got {types} of {lengths}, expected int32 and float32 of {k}")
        indices = payload[0].numpy()
        if not (indices[0] >= 0 and indices[-1] < numel and (indices[1:] > indices[:-1]).all()):
            raise WireError(f"top_k: the indices are not ascending numbers within 0..{numel - 1}")

    def max_nbytes(self, numel: int) -> int:
        return 8 * self.count(numel) + 8

    def payload_norm(self, payload: Payload, numel: int) -> float:
        return float(payload[1].norm())

    def gamma(self, numel: int) -> float:
        return 1 - self.count(numel) / numel


def largest(vector: np.ndarray, k: int) -> np.ndarray:
    """Indices (k,) int64, ascending, of the k entries of `vector` (n,) with the largest magnitudes.

    Ties go to the lowest index. A threshold a little below the k-th largest is guessed from a sample, so that only the
    few entries above it need to be selected from; where the guess was too high, all are.
    """
    n = vector.size
    if k >= n:
        return np.arange(n)
    candidates = None
    if n > _SMALL:
        sample = np.abs(vector[::_SAMPLE])
        rank = int(1.3 * k / n * sample.size) + 16  # 1.3 and 16: room for the sample's error
        if rank < sample.size:
            candidates = _at_least(vector, np.partition(sample, sample.size - rank)[sample.size - rank])
    if candidates is None or candidates.size < k:
        candidates = np.arange(n)
    values = np.abs(vector[candidates])
    threshold = np.partition(values, values.size - k)[values.size - k]
    chosen = values > threshold
    chosen[np.flatnonzero(values == threshold)[: k - np.count_nonzero(chosen)]] = True
    indices: np.ndarray = candidates[chosen]
    return indices


def _at_least(vector: np.ndarray, threshold: float) -> np.ndarray:
    """Indices, ascending, of the entries of `vector` (n,) whose magnitude is `threshold` or more: one pass over it."""
    room, mask = np.empty(_BLOCK, vector.dtype), np.empty(_BLOCK, bool)
    found = []
    for start in range(0, vector.size, _BLOCK):
        part = vector[start : start + _BLOCK]
        magnitude = np.abs(part, out=room[: part.size])
        found.append(np.flatnonzero(np.greater_equal(magnitude, threshold, out=mask[: part.size])) + start)
    return np.concatenate(found)
