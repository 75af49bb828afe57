from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ps_elastic.combiners.base import Combiner, Part, combiners
from ps_elastic.compressors.base import Compressor


@combiners.register("sum")
@dataclass
class Sum(Combiner):
    """out = SUM_k weight_k payload_k."""

    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        first, *rest = parts
        if first.payload is not None and not compressor.biased:  # copying is cheaper than adding to zeros
            out.copy_(compressor.decode(first.payload, out.numel()))
            if first.weight != 1:
                out.mul_(first.weight)
        else:
            rest = list(parts)
            out.zero_()
        for part in rest:
            part.accumulate(compressor, out, part.weight)


@combiners.register("mean")
@dataclass
class Mean(Sum):
    """out = SUM_k weight_k payload_k / SUM_k weight_k, divided once."""

    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        super().combine(compressor, parts, out)
        total = sum(part.weight for part in parts)
        if total != 1:
            out.div_(total)
