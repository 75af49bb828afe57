from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ps_elastic.compressors.base import Compressor
from ps_elastic.server.combiners.base import Combiner, Part, combiners


@combiners.register("sum")
@dataclass
class Sum(Combiner):
    """out = SUM_k weight_k payload_k."""

    elementwise = True

    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        vector, divisor = self.quotient(compressor, parts, out)
        if vector is not out:
            out.copy_(vector)
        if divisor != 1:
            out.div_(divisor)

    def alone(self, compressor: Compressor, part: Part, numel: int) -> Tensor | None:
        return None if compressor.biased or part.weight != 1 else _dense(compressor, part, numel)

    def quotient(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> tuple[Tensor, float]:
        dense = None if compressor.biased else [_dense(compressor, part, out.numel()) for part in parts[:2]]
        if not dense or dense[0] is None:
            out.zero_()
            rest = parts
        elif len(parts) == 1 and parts[0].weight == 1:
            return dense[0], 1.0
        elif len(parts) > 1 and parts[0].weight == 1 and dense[1] is not None:  # one pass for two
            torch.add(dense[0], dense[1], alpha=parts[1].weight, out=out)
            rest = parts[2:]
        else:
            torch.mul(dense[0], parts[0].weight, out=out)
            rest = parts[1:]
        for part in rest:
            part.accumulate(compressor, out, part.weight)
        return out, 1.0


@combiners.register("mean")
@dataclass
class Mean(Sum):
    """out = SUM_k weight_k payload_k / SUM_k weight_k, divided once."""

    def quotient(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> tuple[Tensor, float]:
        vector, _ = super().quotient(compressor, parts, out)
        return vector, sum([part.weight for part in parts])


def _dense(compressor: Compressor, part: Part, numel: int) -> Tensor | None:
    return part.dense if part.payload is None else compressor.decode(part.payload, numel)
