"""A push on its way out: its buckets are encoded and leave one by one; what is taken back where it was not used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.compressors.identity import Identity
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Bucket
from ps_elastic.worker.staging import Staging


class PushEncoder:
    """What a worker's pushes have in common.

    staging: brings the gradient to the CPU. lends: it may be written into before a push has arrived, so that what
    leaves is a copy.
    """

    def __init__(
        self,
        rank: int,
        buckets: Sequence[Bucket],
        compressors: Sequence[Compressor | ErrorFeedback],
        staging: Staging,
        clock: Callable[[], float],
        *,
        lends: bool,
    ) -> None:
        self.rank, self.buckets, self.compressors, self.clock, self.lends = rank, buckets, compressors, clock, lends
        self.staging, self.g = staging, staging.g
        self.parts = [self.g[bucket.start : bucket.stop] for bucket in buckets]  # of the gradient (n,)
        self.feeds_back = any(isinstance(compressor, ErrorFeedback) for compressor in compressors)

    def residual_norm(self) -> float:
        """||e||_2 over all buckets; 0 without error feedback."""
        if not self.feeds_back:
            return 0.0
        return math.hypot(*(float(c.residual.norm()) for c in self.compressors if isinstance(c, ErrorFeedback)))

    def keep(self, payload: Payload) -> Payload:
        """`payload`, with copies of what lies in g, which the next push overwrites."""
        memory = self.g.untyped_storage().data_ptr()
        return tuple([a.clone() if a.untyped_storage().data_ptr() == memory else a for a in payload])


class OutgoingPush:
    """One push: `leave` during backward for each bucket that is finished, then `norm`, and `close` for the rest.

    Bucket 0 leaves last and carries the numbers of the whole push: backward mostly finishes the first layers last.
    """

    def __init__(self, encoder: PushEncoder, step: int, base: int, emit: Callable[[PushMessage], None]) -> None:
        count = len(encoder.buckets)
        self.payloads: list[Payload] = [()] * count
        self.encode_s = self.emit_s = self.residual_norm = 0.0  # emit_s: of what left during backward
        self._encoder, self._step, self._base, self._emit = encoder, step, base, emit
        self._encoded, self._sound = [False] * count, True
        self._squares, self._payload_squares = [[0.0]] * count, [[0.0]] * count  # in parts

    def leave(self, i: int) -> None:
        """Bucket i of g is as it will be. It stays, with all that would follow it, where it is not finite."""
        if i == 0:
            return
        started = self._encoder.clock()
        self._squares[i] = self._encoder.staging.fetch(i)
        self._sound = self._sound and math.isfinite(sum(self._squares[i]))
        if self._sound:
            self._encode(i)
        encoded = self._encoder.clock()
        if self._sound:
            self._send(i)
        self.encode_s += encoded - started
        self.emit_s += self._encoder.clock() - encoded

    def norm(self) -> float:
        """||g||_2; the parts of all buckets are added exactly, and rounded once."""
        for i, encoded in enumerate(self._encoded):
            if not encoded:
                self._squares[i] = self._encoder.staging.fetch(i)
        return _root(self._squares)

    def close(self, samples: int, loss: float, norm: float, waited_s: float, statistics: Any, ahead: int = 0) -> None:
        """Let the rest go, after `norm`; the last layers first."""
        for i in reversed(range(len(self.payloads))):
            if self._encoded[i]:
                continue
            started = self._encoder.clock()
            self._encode(i)
            if i == 0:
                self.residual_norm = self._encoder.residual_norm()
            self.encode_s += self._encoder.clock() - started
            if i:
                self._send(i)
        self._send(
            0, samples=samples, loss=loss, norm=norm, payload_norm=_root(self._payload_squares),
            residual_norm=self.residual_norm, waited_s=waited_s, statistics=statistics, ahead=ahead,
        )  # fmt: skip

    def close_layers(
        self, bases: Sequence[int], cut: Collection[int], samples: int, loss: float, waited_s: float, statistics: Any
    ) -> None:
        """As `close`, for a layerwise rule: each bucket with a base and norms of its own, those in `cut` empty."""
        encoder = self._encoder
        for i in reversed(range(len(self.payloads))):
            started, compressor = encoder.clock(), encoder.compressors[i]
            if i not in cut:
                self._encode(i)
            self.encode_s += encoder.clock() - started
            residual = float(compressor.residual.norm()) if isinstance(compressor, ErrorFeedback) else 0.0
            self._send(
                i, samples=samples, loss=loss, norm=_root(self._squares[i : i + 1]),
                payload_norm=_root(self._payload_squares[i : i + 1]),
                residual_norm=residual, waited_s=waited_s, statistics=None if i else statistics, base=bases[i],
            )  # fmt: skip
        self.residual_norm = encoder.residual_norm()

    def _encode(self, i: int) -> None:
        encoder = self._encoder
        compressor, vector = encoder.compressors[i], encoder.parts[i]
        payload = compressor.encode(vector)
        self.payloads[i], self._encoded[i] = encoder.keep(payload) if encoder.lends else payload, True
        if isinstance(compressor, Identity):
            self._payload_squares[i] = self._squares[i]
        else:
            self._payload_squares[i] = [plain(compressor).payload_norm(payload, vector.numel()) ** 2]

    def _send(self, i: int, **numbers: Any) -> None:
        rank, arrays = self._encoder.rank, tuple([array.numpy() for array in self.payloads[i]])
        base = numbers.pop("base", self._base)
        self._emit(PushMessage(rank, self._step, base, arrays, i, len(self.payloads), **numbers))


def _root(squares: Sequence[Sequence[float]]) -> float:
    return math.sqrt(math.fsum([part for parts in squares for part in parts]))


def plain(compressor: Compressor | ErrorFeedback) -> Compressor:
    """What error feedback wraps, or `compressor` itself."""
    return compressor.compressor if isinstance(compressor, ErrorFeedback) else compressor


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
