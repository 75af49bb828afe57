from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, zeros_like

from ps_elastic.compressors.base import Compressor
from ps_elastic.plugins import Decay, NotNegative
from ps_elastic.server.combiners.base import Combiner, Part, combiners

_EPSILON = 1e-7  # the source's, under the root


@combiners.register("delay_compensated")
@dataclass
class DelayCompensated(Combiner):
    """out = SUM_k weight_k (g_k + lambda g_k * g_k * (x - v_k)) / SUM_k weight_k, elementwise.

    Without `decay` lambda = scale. With it, for each push in turn, MS <- decay MS + (1 - decay) g * g and
    lambda = scale / sqrt(MS + 1e-7), elementwise. Exact where lambda g * g is the diagonal curvature.
    Source: Zheng et al., "Asynchronous stochastic gradient descent with delay compensation", ICML 2017
    (arXiv 1609.08326): DC-ASGD-c and DC-ASGD-a.
    """

    scale: NotNegative = 0.04  # lambda; larger: stronger correction
    decay: Decay = None  # of MS; larger: it remembers longer. null: lambda is constant
    mean_square: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # MS (n,)

    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        out.zero_()
        for part in parts:
            if part.payload is not None:  # else it is the zero vector, or made of vectors without a worker's copy
                out.add_(
                    self._compensated(compressor.decode(part.payload, out.numel()), part.drift()), alpha=part.weight
                )
            else:
                part.accumulate(compressor, out, part.weight)
        total = sum(part.weight for part in parts)
        if total != 1:
            out.div_(total)

    def _compensated(self, g: Tensor, drift: Tensor) -> Tensor:
        """g + lambda g * g * drift (n,), in the memory of `drift`."""
        if self.decay is None:
            return drift.mul_(g).mul_(g).mul_(self.scale).add_(g)
        if self.mean_square is None:
            self.mean_square = zeros_like(g)
        self.mean_square.mul_(self.decay).addcmul_(g, g, value=1 - self.decay)
        return drift.mul_(g).mul_(g).mul_(self.scale).div_((self.mean_square + _EPSILON).sqrt_()).add_(g)
