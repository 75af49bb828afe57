"""Error feedback: what a compressor left out is added to the next gradient. It wraps any compressor and knows none."""

from __future__ import annotations

import torch
from torch import Tensor

from ps_elastic.compressors.base import Compressor, Payload


class ErrorFeedback:
    """The private residual e (n,) of one worker and bucket, in gradient units.

    w = g + e; send Q(w); e' = w - decode(Q(w)). So what was sent plus what is kept equals what there was.
    Source: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback
    fixes SignSGD and other gradient compression schemes", ICML 2019, algorithm 2.
    """

    def __init__(self, compressor: Compressor, numel: int, device: torch.device | str = "cpu") -> None:
        self.compressor = compressor
        self.residual = torch.zeros(numel, device=device)

    def encode(self, vector: Tensor) -> Payload:
        """Compress vector + residual; `vector` (n,) is not modified."""
        self.residual += vector
        memory = self.residual.untyped_storage().data_ptr()
        payload = self.compressor.encode(self.residual)
        payload = tuple([a.clone() if a.untyped_storage().data_ptr() == memory else a for a in payload])
        self.compressor.accumulate(payload, self.residual, -1.0)
        return payload

    def take_back(self, payload: Payload, factor: float = 1.0) -> None:
        """The push with this payload was dropped: what it carried is to be sent again.

        factor: the server's step size when it was sent over that of now.
        """
        self.compressor.accumulate(payload, self.residual, factor)

    def rescale(self, factor: float) -> None:
        """The server's step size changed to 1/factor of what it was: e stands for the same move of the model."""
        self.residual *= factor
