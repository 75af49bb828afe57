"""What a worker's error feedback has to know of the server: its step size, and what became of each push."""

from __future__ import annotations

from collections.abc import Sequence

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.transport.messages import Reply


class Residuals:
    """Keeps what was sent until its fate is known: what a dropped push carried goes back into the residual.

    compressors: of the buckets. scales: whether the server multiplies what is pushed by its step size, so that a
    residual is rescaled as that changes.
    """

    def __init__(self, compressors: Sequence[Compressor | ErrorFeedback], *, scales: bool, layerwise: bool) -> None:
        self._compressors, self._scales, self._layerwise = compressors, scales, layerwise
        self._alpha = 0.0  # the last that was not 0
        self._sent: dict[int, tuple[float, dict[int, Payload]]] = {}  # alpha, and by bucket what may yet be dropped

    def sent(self, step: int, payloads: dict[int, Payload]) -> None:
        """Push `step` has left, with these payloads of buckets, which stay as they are."""
        self._sent[step] = self._alpha, payloads

    def learn(self, reply: Reply) -> None:
        """Learn the fates of pushes, and the step size."""
        if self._sent:
            every = range(len(self._compressors))
            for i in every:
                self._settle(reply.step, i, reply.layers[i].outcome if self._layerwise else reply.outcome)
            for settled in reply.settled:
                for i in (settled.bucket,) if self._layerwise else every:
                    self._settle(settled.step, i, settled.outcome)
        if reply.alpha and reply.alpha != self._alpha:
            before, self._alpha = self._alpha, reply.alpha
            if (factor := self._factor(before)) != 1:
                for compressor in self._compressors:
                    if isinstance(compressor, ErrorFeedback):
                        compressor.rescale(factor)

    def _settle(self, step: int, bucket: int, outcome: str) -> None:
        if outcome == "held" or step not in self._sent:
            return
        alpha, payloads = self._sent[step]
        payload, compressor = payloads.pop(bucket, None), self._compressors[bucket]
        if not payloads:
            del self._sent[step]
        if payload is not None and outcome == "dropped" and isinstance(compressor, ErrorFeedback):
            compressor.take_back(payload, self._factor(alpha))

    def _factor(self, alpha: float) -> float:
        """What a gradient kept back at step size `alpha` counts now; updates and models are scaled already."""
        return alpha / self._alpha if alpha and self._alpha and self._scales else 1.0
