"""A push on its way out: its buckets are encoded and leave one by one; what was not used is added back.

Where they go is the outlet's to say: to the server, or into the model itself (`hogwild`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.compressors.base import reapply
from ps_elastic.compressors.identity import Identity
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Bucket
from ps_elastic.worker.staging import Staging


class Outlet(Protocol):
    """How a worker's pushes leave, and where it continues from. Called in this order, from reply to reply.

    write_made: lets a push leave as backward made it, in place of `ready`, and gives back what it consists of and its
    norm; if that is not finite, nothing has left. None where it must be encoded.
    """

    write_made: Callable[[], tuple[Payload, float]] | None

    def came(self, reply: Reply) -> None:
        """Learn the outcomes of pushes: what was discarded is added back where it came from."""

    def resume(self, model: Any) -> None:
        """Stand where the next push is computed, given the model of the last reply."""

    def begin(self, step: int, version: int, told: int, *, early: bool) -> tuple[int, int]:
        """Push `step` begins, after the reply to step `told` with a model of `version`; return what its metadata say of
        the model computed on: its version, and how many earlier pushes its reply did not answer. early: buckets may
        leave while it is computed on."""
        ...

    def ready(self, i: int, payload: Payload) -> tuple[Any, ...]:
        """Bucket i is encoded, bucket 0 last; return what its message carries."""
        ...

    def close(self, payloads: list[Payload]) -> None:
        """The push has left; its payloads, a bucket each, stay as they are while they are needed."""


class ToServer:
    """Pushes are sent. x (d,): where they are computed. To the model of each reply those are applied that it lacks,
    where a worker leaves as many as `pipeline` unanswered."""

    write_made: Callable[[], tuple[Payload, float]] | None = None

    def __init__(self, x: Tensor, buckets: Sequence[Bucket], plains: Sequence[Compressor], pipeline: int) -> None:
        self._x, self._buckets, self._plains, self._pipeline = x, buckets, plains, pipeline
        self._flying: dict[int, list[Payload]] = {}  # pushes that the model of the last reply lacks
        self._step, self._rate = 0, 0.0

    def came(self, reply: Reply) -> None:
        if self._pipeline:
            held = {step for step, outcome in outcomes(reply) if outcome == "held"}
            self._flying = {step: sent for step, sent in self._flying.items() if step > reply.step or step in held}
            self._rate = reply.rate

    def resume(self, model: Any) -> None:
        received = torch.from_numpy(model)
        if received.data_ptr() != self._x.data_ptr():
            self._x.copy_(received)
        for payloads in self._flying.values():
            reapply(self._x, payloads, self._buckets, self._plains, self._rate)

    def begin(self, step: int, version: int, told: int, *, early: bool) -> tuple[int, int]:
        self._step = step
        return version, step - 1 - told

    def ready(self, i: int, payload: Payload) -> tuple[Any, ...]:
        return tuple(map(Tensor.numpy, payload))

    def close(self, payloads: list[Payload]) -> None:
        if self._pipeline:
            self._flying[self._step] = payloads
            reapply(self._x, payloads, self._buckets, self._plains, self._rate)


class PushEncoder:
    """A worker's pushes, one after another: `begin`, `leave` during backward for each bucket that is finished, then
    `norm`, and `close` for the rest.

    Bucket 0 leaves last and carries the numbers of the whole push: backward mostly finishes the first layers last.
    staging: brings the gradient to the CPU. lends: it may be written into before a push has arrived, so that what
    leaves is a copy. Of the push begun: payloads; residual_norm; encode_s; emit_s, of what left during backward.
    """

    def __init__(
        self, rank: int, buckets: Sequence[Bucket], compressors: Sequence[Compressor | ErrorFeedback], staging: Staging,
        clock: Callable[[], float], outlet: Outlet, *, lends: bool,
    ) -> None:  # fmt: skip
        self._rank, self._compressors, self._clock, self._outlet, self._lends = rank, compressors, clock, outlet, lends
        self._staging, self._memory = staging, staging.g.untyped_storage().data_ptr()
        self._parts = [staging.g[bucket.start : bucket.stop] for bucket in buckets]  # of the gradient (n,)
        self.feeds_back = any(isinstance(compressor, ErrorFeedback) for compressor in compressors)

    def begin(self, step: int, base: int, ahead: int, emit: Callable[[PushMessage], None]) -> None:
        """The next push, computed on version `base`, leaves by `emit`. ahead: see `PushMessage`."""
        count = len(self._parts)
        self.payloads: list[Payload] = [()] * count
        self.encode_s = self.emit_s = self.residual_norm = 0.0
        self._step, self._base, self._ahead, self._emit, self._sound = step, base, ahead, emit, True
        self._encoded, self._arrays = [False] * count, [()] * count
        self._squares, self._payload_squares = [[0.0]] * count, [[0.0]] * count  # in parts

    def leave(self, i: int) -> None:
        """Bucket i of g is as it will be. It stays, with all that would follow it, where it is not finite."""
        if i == 0:
            return
        started = self._clock()
        self._squares[i] = self._staging.fetch(i)
        self._sound = self._sound and math.isfinite(sum(self._squares[i]))
        if self._sound:
            self._encode(i)
        encoded = self._clock()
        if self._sound:
            self._send(i)
        self.encode_s += encoded - started
        self.emit_s += self._clock() - encoded

    def norm(self) -> float:
        """||g||_2; the parts of all buckets are added exactly, and rounded once."""
        if (write_made := self._outlet.write_made) is not None:
            started = self._clock()
            self.payloads[0], norm = write_made()
            self._squares[0] = self._payload_squares[0] = [norm * norm]
            self._encoded[0] = True
            self.encode_s += self._clock() - started
            return norm
        for i, encoded in enumerate(self._encoded):
            if not encoded:
                self._squares[i] = self._staging.fetch(i)
        return _root(self._squares)

    def close(self, samples: int, loss: float, norm: float, waited_s: float, statistics: Any) -> None:
        """Let the rest go, after `norm`; the last layers first."""
        for i in reversed(range(len(self.payloads))):
            if self._encoded[i]:
                continue
            started = self._clock()
            self._encode(i)
            if i == 0:
                self.residual_norm = self._residual_norm(self._compressors)
            self.encode_s += self._clock() - started
            if i:
                self._send(i)
        self._send(
            0, samples=samples, loss=loss, norm=norm, payload_norm=_root(self._payload_squares),
            residual_norm=self.residual_norm, waited_s=waited_s, statistics=statistics, ahead=self._ahead,
        )  # fmt: skip

    def close_layers(
        self, bases: Sequence[int], cut: Collection[int], samples: int, loss: float, waited_s: float, statistics: Any
    ) -> None:
        """As `close`, for a layerwise policy: each bucket with a base and norms of its own, those in `cut` empty."""
        for i in reversed(range(len(self.payloads))):
            started, one = self._clock(), slice(i, i + 1)
            if i not in cut:
                self._encode(i)
            self.encode_s += self._clock() - started
            self._send(
                i, samples=samples, loss=loss, norm=_root(self._squares[one]), base=bases[i], waited_s=waited_s,
                payload_norm=_root(self._payload_squares[one]), statistics=None if i else statistics,
                residual_norm=self._residual_norm(self._compressors[one]),
            )  # fmt: skip
        self.residual_norm = self._residual_norm(self._compressors)

    def keep(self, payload: Payload) -> Payload:
        """`payload`, with copies of what lies in g, which the next push overwrites."""
        return tuple([a.clone() if a.untyped_storage().data_ptr() == self._memory else a for a in payload])

    def _residual_norm(self, compressors: Sequence[Compressor | ErrorFeedback]) -> float:
        """||e||_2 over these buckets; 0 without error feedback."""
        if not self.feeds_back:
            return 0.0
        return math.hypot(*(float(c.residual.norm()) for c in compressors if isinstance(c, ErrorFeedback)))

    def _encode(self, i: int) -> None:
        compressor, vector = self._compressors[i], self._parts[i]
        payload = compressor.encode(vector)
        if self._lends:
            payload = self.keep(payload)
        self.payloads[i], self._encoded[i], self._arrays[i] = payload, True, self._outlet.ready(i, payload)
        if isinstance(compressor, Identity):
            self._payload_squares[i] = self._squares[i]
        else:
            self._payload_squares[i] = [plain(compressor).payload_norm(payload, vector.numel()) ** 2]

    def _send(self, i: int, **numbers: Any) -> None:
        base, count = numbers.pop("base", self._base), len(self.payloads)
        self._emit(PushMessage(self._rank, self._step, base, self._arrays[i], i, count, **numbers))


def _root(squares: Sequence[Sequence[float]]) -> float:
    return math.sqrt(math.fsum(chain.from_iterable(squares)))


def outcomes(reply: Reply) -> list[tuple[int, str]]:
    """(step, outcome) of each push that a reply tells of."""
    return [(reply.step, reply.outcome), *((settled.step, settled.outcome) for settled in reply.settled)]


def plain(compressor: Compressor | ErrorFeedback) -> Compressor:
    """What error feedback wraps, or `compressor` itself."""
    return compressor.compressor if isinstance(compressor, ErrorFeedback) else compressor


class Residuals:
    """Keeps what was sent until its outcome is known: what a discarded push carried goes back into the residual.

    compressors: of the buckets. scales: whether the server multiplies what is pushed by its step size, so that a
    residual is rescaled as that changes.
    """

    def __init__(self, compressors: Sequence[Compressor | ErrorFeedback], *, scales: bool, layerwise: bool) -> None:
        self._compressors, self._scales, self._layerwise = compressors, scales, layerwise
        self._alpha = 0.0  # the last that was not 0
        self._sent: dict[int, tuple[float, dict[int, Payload]]] = {}  # alpha, and by bucket what may yet be discarded

    def sent(self, step: int, payloads: dict[int, Payload]) -> None:
        """Push `step` has left, with these payloads of buckets, which stay as they are."""
        self._sent[step] = self._alpha, payloads

    def learn(self, reply: Reply) -> None:
        """Learn the outcomes of pushes, and the step size."""
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
