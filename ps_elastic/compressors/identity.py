from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ps_elastic.compressors.base import Compressor, Payload, compressors
from ps_elastic.errors import WireError


@compressors.register("identity")
@dataclass
class Identity(Compressor):
    """Send everything: 4 bytes an entry."""

    biased, cuts = False, True

    def encode(self, vector: Tensor) -> Payload:
        return (vector.contiguous(),)

    def accumulate(self, payload: Payload, out: Tensor, weight: float = 1.0) -> None:
        out.add_(payload[0], alpha=weight)

    def decode(self, payload: Payload, numel: int) -> Tensor:
        return payload[0]

    def cut(self, payload: Payload, stops: Sequence[int]) -> list[Payload]:
        return [(piece,) for piece in payload[0].tensor_split(list(stops[:-1]))]

    def check(self, payload: Payload, numel: int) -> None:
        if len(payload) != 1 or payload[0].dtype != torch.float32 or payload[0].shape != (numel,):
            raise WireError(f"identity: got {[tuple(a.shape) for a in payload]}, expected one float32 array of {numel}")

    def max_nbytes(self, numel: int) -> int:
        return 4 * numel

    def gamma(self, numel: int) -> float:
        return 0.0
